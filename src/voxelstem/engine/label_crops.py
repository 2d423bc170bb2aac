"""What a scan's voxel labels say at the voxels of a view, nearest neighbour."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int16

from voxelstem.errors import StoreError
from voxelstem.store.reader import Record, Store

COUNTED = "counted:"
"""With a view's name, what its flags are called in a batch."""


def count_flags(
    store: Store, record: Record, places_mm: Float[np.ndarray, "view 2 3"], size_ijk: tuple[int, int, int], name: str
) -> Float32[np.ndarray, "view 1 i j k"]:
    """0 in the voxels of a scan's views whose label is the class `name`, 1 in all others.

    A scan without voxel labels, or without this class, counts whole.

    Raises:
        StoreError: the labels cannot be read.
    """
    flags = np.ones((len(places_mm), 1, *size_ijk), np.float32)
    values = [value for value, called in record.classes.items() if called == name]
    if record.has_labels and values:
        for flag, place in zip(flags, places_mm, strict=True):
            flag[0] = ~np.isin(label_view(store, record.key, place, size_ijk), values)
    return flags


def label_view(
    store: Store, key: str, place_mm: Float[np.ndarray, "2 3"], size_ijk: tuple[int, int, int]
) -> Int16[np.ndarray, "i j k"]:
    """Values of a scan's label map at the voxels of a view, 0 beyond the scan.

    Args:
        store: Where the scan is.
        key: Of the scan.
        place_mm: Where the view begins and how far it reaches, from the scan's low corner; a mirrored axis runs
            backwards, as in `protocols.Batch`.
        size_ijk: Voxels of the view.

    Raises:
        StoreError: the scan has no voxel labels, or they cannot be read.
    """
    record = store.record(key)
    if not record.has_labels:
        raise StoreError(
            f"volume '{key[:16]}' has no voxel labels, and the objective learns from them",
            hint="ingest its mask with --labels, or train on scans that have one",
        )
    inside: list[np.ndarray] = []
    for axis, count in enumerate(size_ijk):
        at_mm = place_mm[0, axis] + (np.arange(count) + 0.5) * place_mm[1, axis] / count
        # Half-way between two voxels rounding decides; a hair more than float32 keeps it from being noise.
        index = np.floor(at_mm.astype(np.float64) / record.spacing_mm[axis] + 1e-4).astype(int)
        inside.append(np.where((index >= 0) & (index < record.shape_ijk[axis]), index, -1))
    found = np.zeros(size_ijk, np.int16)
    known = [index[index >= 0] for index in inside]
    if all(len(index) for index in known):
        low = [int(index.min()) for index in known]
        size = [int(index.max()) + 1 - start for index, start in zip(known, low, strict=True)]
        box = store.label_crop(key, (low[0], low[1], low[2]), (size[0], size[1], size[2]))
        own = np.ix_(*[index - start for index, start in zip(known, low, strict=True)])
        found[np.ix_(*[index >= 0 for index in inside])] = box[own]
    return found
