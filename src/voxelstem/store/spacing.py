"""Bring a volume to the recipe's spacing, once, before it is stored."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from voxelstem import resampling
from voxelstem.errors import IngestError
from voxelstem.study import LabelMap, Volume

MOST_BYTES = 4 * 2**30
"""A resampled volume may take this much memory: a spacing given in metres would ask for a million times more."""


def resample_volume(volume: Volume, spacing_mm: tuple[float, float, float]) -> Volume:
    """Bring a volume and its voxel labels to `spacing_mm` along R, A and S; what has it already comes back as it is.

    Voxels are interpolated linearly and averaged where the grid becomes coarser (`resampling.resample`), labels take
    the nearest value. CT is rounded to whole HU again: that is far below its noise, saves a third of the bytes, and
    keeps a processor's last bit out of the store. The provenance says all of it.

    Raises:
        IngestError: the result would be larger than `MOST_BYTES` (code `too-large`).
        ValueError: a spacing is not a positive number.
    """
    steps = resampling.steps_ijk(volume.affine_ras, volume.shape_ijk, spacing_mm)
    if steps == (1.0, 1.0, 1.0):
        return volume
    shape = [resampling.resampled_count(size, 1.0, step) for size, step in zip(volume.shape_ijk, steps, strict=True)]
    size = math.prod([volume.array.shape[0], *shape]) * np.dtype(np.float32).itemsize
    if size > MOST_BYTES:
        raise IngestError(
            f"at {_millimetres(spacing_mm)} it would have {shape[0]} x {shape[1]} x {shape[2]} voxels, "
            f"{size / 2**30:.1f} GiB; at most {MOST_BYTES / 2**30:g} GiB are made",
            code="too-large",
            hint="choose a coarser spacing; it is given in millimetres",
        )
    array, affine = resampling.resample(volume.array, volume.affine_ras, spacing_mm)
    notes = [f"resampled from {_millimetres(volume.spacing_mm)} to {_millimetres(spacing_mm)}"]
    if volume.modality == "CT":
        np.rint(array, out=array)
        notes.append("rounded to whole HU after resampling")
    labels = volume.labels
    if labels is not None:
        values, _ = resampling.resample(labels.array[None], volume.affine_ras, spacing_mm, mode="nearest")
        labels = LabelMap(array=values[0], classes=labels.classes)
    provenance = replace(volume.provenance, notes=(*volume.provenance.notes, *notes))
    return replace(volume, array=array, affine_ras=affine, labels=labels, provenance=provenance)


def _millimetres(spacing_mm: tuple[float, float, float]) -> str:
    return " x ".join(f"{edge:.4g}" for edge in spacing_mm) + " mm"
