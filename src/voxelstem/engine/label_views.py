"""Voxel labels under the views of a batch: read from the store where each view lies, nearest neighbour.

Beside the views of one kind, such as `global`, a batch then holds `labels:global`, of the same shape with one channel:
the label map's values, 0 where the view reaches beyond the scan.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16

from voxelstem.errors import StoreError
from voxelstem.protocols import Batch
from voxelstem.store.reader import Record, Store

if TYPE_CHECKING:
    from voxelstem.engine.loader import Loader

GLOBAL, LABELS, COUNTED = "global", "labels:global", "counted:"
TOLERANCE_MM = 0.01


def follow(loader: Loader, batches: Generator[Batch, None, None], start: int) -> Generator[Batch, None, None]:
    """Lay label maps under the global views of a loader's batches, the first of which is of step `start`.

    Raises:
        StoreError: a scan has no voxel labels, or cannot be read.
    """
    with closing(batches):
        for step, batch in enumerate(batches, start=start):
            yield with_labels(loader, batch, step)


def with_labels(loader: Loader, batch: Batch, step: int) -> Batch:
    """The batch of this step with `labels:global`.

    Raises:
        StoreError: a scan has no voxel labels or cannot be read, or another scan stands in for one by now.
    """
    view, places = batch.views[GLOBAL], batch.places_mm[GLOBAL].cpu().numpy()
    size = (view.shape[3], view.shape[4], view.shape[5])
    samples: list[np.ndarray] = []
    for row, where in enumerate(places):
        record, plans = loader.plan(step, batch.first + row)
        for (start, extent), plan in zip(where, plans[GLOBAL], strict=True):
            if not np.allclose(np.minimum(start, start + extent), plan.start_mm, atol=TOLERANCE_MM):
                raise StoreError(
                    f"sample {batch.first + row} of step {step} is of another scan than volume '{record.key[:16]}'",
                    hint="a scan was put aside meanwhile: take damaged scans out of the store, then resume the run",
                )
        samples.append(np.stack([label_view(loader.store, record.key, place, size) for place in where]))
    labels = torch.from_numpy(np.stack(samples)[:, :, None]).to(view)
    return replace(batch, views={**batch.views, LABELS: labels})


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
