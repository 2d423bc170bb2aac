"""Brain phantoms as the folder that a study would publish: BIDS, masks beside it, tables of volumes and of facts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from voxelstem.errors import VoxelstemError
from voxelstem.sources import nifti
from voxelstem.sources.brain_anatomy import CLASSES
from voxelstem.study import VOLUME_LABEL, Study

NAME = "brain phantoms"
"""Of the data set: its people are `brain phantoms/sub-...` to a store."""
SCORES = (
    "general white matter", "general grey matter", "general csf", "cerebellum", "brainstem", "thalamus",
    "putamen+pallidum", "hippocampus+amygdala",
)  # fmt: skip
"""Columns of SynthSeg's quality scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BrainFiles:
    """Where `brain_files` wrote what `ingest` and `adapt` read."""

    scans: Path
    """A BIDS data set."""
    labels: Path
    """Masks at the scans' relative paths, and `labels.json`."""
    volumes: Path
    """A table in SynthSeg's layout: one row a scan, volumes in mm3."""
    qc: Path
    """SynthSeg's scores of the same scans, all good."""
    pathology: Path
    """`subject,label`: yes or no."""
    ages: Path
    """`subject,value`: years at the first session."""


def brain_files(folder: Path, studies: Iterable[Study]) -> BrainFiles:
    """Write drawn brains (`brain`, `brain_subject`) as files.

    Raises:
        VoxelstemError: the folder cannot be written.
    """
    files = BrainFiles(
        scans=folder / "scans",
        labels=folder / "labels",
        volumes=folder / "volumes.csv",
        qc=folder / "qc.csv",
        pathology=folder / "pathology.csv",
        ages=folder / "ages.csv",
    )
    try:
        told = [_write_scan(files, study) for study in studies]
        _write_tables(files, told)
    except OSError as error:
        raise VoxelstemError(
            f"phantoms cannot be written into '{folder.name}': {error.strerror}",
            hint="check the folder's rights and free some space",
        ) from error
    return files


def relative_path(study: Study) -> str:
    """Where a brain lies in the data set: `sub-…/ses-…/anat/sub-…_ses-…_T1w.nii.gz`, also for what is no anatomy."""
    said = study.volumes[0].acquisition
    who, visit = _person(study), f"ses-{said.session}"
    return f"{who}/{visit}/anat/{who}_{visit}_{said.contrast}.nii.gz"


def _person(study: Study) -> str:
    return f"sub-{study.subject.replace('-', '')}"


def _write_scan(files: BrainFiles, study: Study) -> tuple[str, Study]:
    volume = study.volumes[0]
    assert volume.labels is not None  # every phantom has labels
    relative = relative_path(study)
    nifti.write(files.scans / relative, volume.array[0].astype(np.int16), volume.affine_ras)
    nifti.write(files.labels / relative, volume.labels.array.astype(np.uint8), volume.affine_ras)
    # The voxels are on disk: keep the words only.
    words = replace(volume, array=np.zeros((1, 1, 1, 1), np.float32), labels=None)
    return relative, replace(study, volumes=(words,))


def _write_tables(files: BrainFiles, told: Sequence[tuple[str, Study]]) -> None:
    files.labels.mkdir(parents=True, exist_ok=True)
    classes = {"classes": {str(value): name for value, name in CLASSES.items()}}
    (files.labels / "labels.json").write_text(json.dumps(classes, indent=1) + "\n")
    files.scans.mkdir(parents=True, exist_ok=True)
    (files.scans / "dataset_description.json").write_text(f'{{"Name": "{NAME}", "BIDSVersion": "1.10.0"}}\n')
    people: dict[str, Study] = {}
    visits: dict[str, dict[str, Study]] = {}
    for _, study in told:
        people.setdefault(_person(study), study)
        visits.setdefault(_person(study), {}).setdefault(study.volumes[0].acquisition.session, study)
    _write(
        files.scans / "participants.tsv",
        ("participant_id", "age", "sex"),
        [(who, _age(study), study.volumes[0].acquisition.sex) for who, study in people.items()],
    )
    for who, sessions in visits.items():
        rows = [(f"ses-{visit}", _age(one), one.volumes[0].acquisition.date) for visit, one in sessions.items()]
        _write(files.scans / who / f"{who}_sessions.tsv", ("session_id", "age", "acq_time"), rows)
    names = [relative.rpartition("/")[2].removesuffix(".nii.gz") for relative, _ in told]
    structures = [name for name in (told[0][1].labels if told else {}) if name.startswith(VOLUME_LABEL)]
    header = ("subject", *(name.removeprefix(VOLUME_LABEL) for name in structures))
    sizes: list[Mapping[str, str]] = [study.labels for _, study in told]
    _write(
        files.volumes,
        header,
        [(name, *map(each.__getitem__, structures)) for name, each in zip(names, sizes, strict=True)],
    )
    _write(files.qc, ("subject", *SCORES), [(name, *["0.9"] * len(SCORES)) for name in names])
    named = {f"{NAME}/{who}": study for who, study in people.items()}
    _write(files.pathology, ("subject", "label"), [(who, study.labels["pathology"]) for who, study in named.items()])
    _write(files.ages, ("subject", "value"), [(who, _age(study)) for who, study in named.items()])


def _age(study: Study) -> str:
    return f"{study.volumes[0].acquisition.age_years:g}"


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
