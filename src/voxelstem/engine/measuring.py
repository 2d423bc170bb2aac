"""What a backbone wants to be shown before the first step: blocks of many scans, as training will show them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from voxelstem import distributed
from voxelstem.engine.checkpoint import checkpoints
from voxelstem.engine.loader import Loader
from voxelstem.views.tile import split_blocks

SCANS = 1024
"""Views that are measured at most, three for each direction that `ScanVitConfig` keeps of them by default; of few scans
two each, for they come mirrored too."""
BYTES = 2**30
"""Of views that are held for it; what is computed of them takes about three times as much beside them."""


def measure(objective: nn.Module, load: Callable[[], Loader], *, run: Path) -> list[dict[str, Any]]:
    """Show every network of the objective that asks for it (`wants_measuring`) the run's first views.

    Args:
        objective: Not yet shared out among processes.
        load: Makes a loader of the run's scans and views for one process alone, one sample of each opened scan.
        run: The run's folder: its checkpoints hold what was measured, and with one of them nothing is read.

    Returns:
        What the journal should know: nothing, or how many views were measured.
    """
    asking: list[Any] = [network for network in objective.modules() if getattr(network, "wants_measuring", False)]
    if not asking or distributed.said(bool(checkpoints(run / "checkpoints"))):
        return []
    views = _views(load()) if distributed.here().rank == 0 else []
    count = distributed.said(len(views))
    for network in asking:
        if views:
            size = network.config.block_ijk
            network.measure([split_blocks(view[None], size).flatten(0, 1) for view in views])
        for buffer in network.buffers():
            buffer.copy_(distributed.first(buffer))
    return [{"measured": count}]


def _views(loader: Loader) -> list[Tensor]:
    """The first views, each (channel, i, j, k)."""
    wanted, found = min(SCANS, 2 * len(loader.keys)), list[Tensor]()
    steps = math.ceil(wanted / loader.config.batch)
    with closing(loader.batches(0, steps)) as batches:
        for batch in batches:
            found += batch.views["global"][:, 0].unbind()
            wanted = min(wanted, max(BYTES // found[0].nbytes, 2))
            if len(found) >= wanted:
                break
    return found[:wanted]
