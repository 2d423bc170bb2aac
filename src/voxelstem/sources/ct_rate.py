"""CT-RATE: what its file names say. `train_12_a_2.nii.gz` is the second reconstruction of scan `a` of patient 12.

Hamamci et al. 2024, arXiv:2403.17834: 25,692 scans of 21,304 patients, reconstructed into 50,188 volumes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from voxelstem.sources.bids import Bids
from voxelstem.study import Study

NAME = re.compile(r"(?P<subject>(?:train|valid)_\d+)_(?P<scan>[a-z]+)_\d+\.nii(?:\.gz)?")


def annotate(study: Study, relative: str, dataset: Bids | None) -> Study:
    """Name the patient, and link the reconstructions of one scan; a file of another name comes back as it is.

    Args:
        study: As the NIfTI reader gives it.
        relative: Where the file lies below the folder that was searched.
        dataset: The tables of a BIDS data set, whose own words win.
    """
    found = NAME.fullmatch(relative.rpartition("/")[2])
    if found is None or dataset is not None:
        return study
    scan = f"{found['subject']}_{found['scan']}"
    volumes = tuple(
        replace(volume, acquisition=replace(volume.acquisition, study=scan, group=scan)) for volume in study.volumes
    )
    return replace(study, subject=found["subject"], volumes=volumes)
