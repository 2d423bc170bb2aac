"""Scans as a network to be fine-tuned sees them: on its grid, in its intensities, with what an expert said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from voxelstem.errors import ConfigError
from voxelstem.resampling import resample
from voxelstem.store import Record, Store
from voxelstem.streaming import Scan, columns, lay, of_store
from voxelstem.study import InputSpec, Survival
from voxelstem.tasks.segment import numbered
from voxelstem.views import slide, tile

SAME_MM = 0.01
"""How far two affines may place a voxel apart for their scans to lie on one grid."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen:
    """One scan, or several contrasts of one session, ready for the network; at least as large as its patch."""

    image: Float[Tensor, "contrast i j k"]
    affine_ras: Float[np.ndarray, "4 4"]
    shape_ijk: tuple[int, int, int]
    """Of the scan within `image`; what lies behind is padding."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """A labelled scan to learn from."""

    seen: Seen
    truth: Int[Tensor, "i j k"] | None = None
    """Class of each voxel of the image, 0 for background."""
    target: int | float | Survival | tuple[float, ...] = 0
    """The scan's class, its (standardised) number, how long nothing happened, or 1, 0 or NaN for each class, where
    voxels have none."""
    subject: str = ""
    """Whose scan it is, for what compares one subject with another."""
    marked: tuple[Int[np.ndarray, "voxel"], ...] = ()
    """For each class that occurs, the flat indices of its voxels."""


def see(store: Store, keys: Sequence[str], spec: InputSpec) -> Seen:
    """Read scans that lie on one grid and lay them out as the weights saw theirs.

    Raises:
        ConfigError: another modality, or scans on different grids.
        IngestError: a scan cannot be brought to the weights' spacing, or holds values that are not finite.
    """
    return look([of_store(store, key) for key in keys], spec, names=[key[:16] for key in keys])


def look(scans: Sequence[Scan], spec: InputSpec, *, names: Sequence[str] = ()) -> Seen:
    """Lay scans that lie on one grid out as the weights saw theirs; `names` are what messages call them.

    Raises:
        ConfigError: another modality, several channels, or scans on different grids.
        IngestError: a scan cannot be brought to the weights' spacing, or holds values that are not finite.
    """
    _check(scans, spec, names or [str(place) for place in range(1, len(scans) + 1)])
    images: list[Tensor] = []
    # All on one grid, but each with limits of its own.
    outlines = [lay(scan, spec) for scan in scans]
    laid = outlines[0]
    for scan, outline in zip(scans, outlines, strict=True):
        image = tile.stitch(torch.cat(list(columns(scan, outline, spec))), laid.tiling)
        images.append(slide.pad(image, spec.block_ijk, outside=float(image.min())))
    return Seen(image=torch.cat(images), affine_ras=laid.affine_ras, shape_ijk=laid.tiling.shape_ijk)


def labelled(store: Store, keys: Sequence[str], spec: InputSpec, classes: tuple[str, ...]) -> Case:
    """A scan with voxel labels, the first of the keys having them; they are brought to the network's grid too.

    Raises:
        ValueError: the first scan has no labels.
    """
    seen, record = see(store, keys, spec), store.record(keys[0])
    labels = store.labels(keys[0])
    if labels is None:
        raise ValueError("a voxel-level task needs voxel labels")
    wanted_mm = spec.grid_spacing_mm(record.spacing_mm, record.shape_ijk)
    values = numbered(labels, classes)[None]
    values, _ = resample(values, record.affine_ras, wanted_mm, mode="nearest")
    assert values.shape[1:] == seen.shape_ijk
    truth = slide.pad(torch.from_numpy(values.astype(np.int64)), spec.block_ijk, outside=0)[0]
    flat = truth.numpy().ravel()
    marked = [np.flatnonzero(flat == kind) for kind in range(1, len(classes) + 1)]
    return Case(seen=seen, truth=truth, marked=tuple(places for places in marked if len(places)))


def companions(store: Store, records: Sequence[Record], contrasts: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """For each scan of the first contrast, the keys of its session's contrasts in order; every scan alone without any.

    Raises:
        ConfigError: no scan is of the first contrast, or a session lacks one of the others.
    """
    if not contrasts:
        return {record.key: (record.key,) for record in records}
    there: dict[tuple[str, str, str], str] = {}
    for record in store:
        there.setdefault((*_visit(record), record.acquisition.contrast), record.key)
    found = {
        record.key: (record.key, *(there.get((*_visit(record), name), "") for name in contrasts[1:]))
        for record in records
        if record.acquisition.contrast == contrasts[0]
    }
    if not found:
        known = ", ".join(sorted({record.acquisition.contrast for record in records} - {""})) or "none named"
        raise ConfigError(f"no labelled scan is {contrasts[0]}: their contrasts are {known}", hint="name the first so")
    for place, name in enumerate(contrasts):
        lacking = sum(not keys[place] for keys in found.values())
        if lacking:
            raise ConfigError(
                f"{lacking} of {len(found)} labelled sessions lack {name}", hint="leave it out of full.contrasts"
            )
    return found


def _visit(record: Record) -> tuple[str, str]:
    said = record.acquisition
    return record.subject, said.study or said.session or record.study


def _check(scans: Sequence[Scan], spec: InputSpec, names: Sequence[str]) -> None:
    first = scans[0]
    corner = np.array([*first.shape_ijk, 1.0])
    for scan, name in zip(scans, names, strict=True):
        if scan.modality != spec.modality:
            raise ConfigError(
                f"these weights were trained on {spec.modality}, scan {name} is {scan.modality}",
                hint=f"choose weights for {scan.modality}, or {spec.modality} scans",
            )
        if scan.channels != 1:
            raise ConfigError(f"scan {name} has {scan.channels} channels, one is seen at a time")
        apart = np.abs((scan.affine_ras - first.affine_ras) @ corner).max()
        if scan.shape_ijk != first.shape_ijk or apart > SAME_MM:
            raise ConfigError(
                f"scans {names[0]} and {name} of one session do not lie on one grid",
                hint="register and resample the contrasts to the first one, then ingest them again",
            )
