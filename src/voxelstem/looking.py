"""What a run of `adapt` looks at: which volumes of a study, and where in a scan it is asked to look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from voxelstem.errors import ConfigError, IngestError
from voxelstem.finetune.cases import SAME_MM
from voxelstem.regions import of_box
from voxelstem.sources import read_labels
from voxelstem.study import InputSpec, Study, Volume

Corner = tuple[float, float, float]


def volumes_of(study: Study, spec: InputSpec, contrasts: Sequence[str]) -> tuple[Volume, ...]:
    """The volumes that are looked at together: one for each contrast in their order, or the only one without any.

    Raises:
        IngestError: none is of the modality, there are several, or one of the contrasts is lacking.
    """
    fitting = [volume for volume in study.volumes if volume.modality == spec.modality]
    if not fitting:
        have = ", ".join(sorted({volume.modality for volume in study.volumes}))
        raise IngestError(
            f"these weights were trained on {spec.modality}, the scan is {have}",
            code="other-modality",
            hint=f"choose weights for {have}",
        )
    if not contrasts:
        if len(fitting) > 1:
            raise IngestError(
                f"the study has {len(fitting)} volumes", code="several-volumes", hint="predict each by itself"
            )
        return (fitting[0],)
    by_name = {volume.acquisition.contrast: volume for volume in fitting}
    lacking = [name for name in contrasts if name not in by_name]
    if lacking:
        raise IngestError(
            f"the run sees {', '.join(contrasts)} together, and the study has no {lacking[0]}",
            code="lacks-contrast",
            hint="give the whole session, with contrasts named as in the store",
        )
    return tuple(by_name[name] for name in contrasts)


def region_of(volume: Volume, mask: Path | None, box_ras_mm: tuple[Corner, Corner] | None) -> Bool[np.ndarray, "i j k"]:
    """Lay a box into a scan, or read a mask and see that it lies on the scan's grid.

    Raises:
        ConfigError: neither is given, the box lies outside the scan, or the mask on another grid.
    """
    if box_ras_mm is not None:
        low, high = box_ras_mm
        try:
            return of_box(volume.affine_ras, volume.shape_ijk, low_ras_mm=low, high_ras_mm=high)
        except ValueError as error:
            raise ConfigError(
                f"the box does not fit the scan: {error}", hint="give mm in the patient (RAS+)"
            ) from error
    if mask is None:
        raise ConfigError("no region is given", hint="give its mask with --region, or --box")
    grid = read_labels(mask)
    apart = np.abs((grid.affine_ras - volume.affine_ras) @ np.array([*volume.shape_ijk, 1.0])).max()
    if grid.array.shape != volume.shape_ijk or apart > SAME_MM:
        raise ConfigError("the mask of the region lies on another grid than the scan", hint="resample it to the scan's")
    return grid.array > 0
