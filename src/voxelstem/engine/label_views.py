"""Voxel labels under the views of a batch: read from the store where each view lies, nearest neighbour.

Beside the views of one kind, such as `global`, a batch then holds `labels:global`, of the same shape with one channel:
the label map's values, 0 where the view reaches beyond the scan.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from voxelstem.engine.label_crops import label_view
from voxelstem.engine.loader import Loader
from voxelstem.errors import StoreError
from voxelstem.protocols import Batch

GLOBAL, LABELS = "global", "labels:global"
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
