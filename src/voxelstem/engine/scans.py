"""Which scans of a store a run learns from, and why the others are left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from voxelstem.errors import StoreError
from voxelstem.store import Store
from voxelstem.store.selection import Selection, Wanted
from voxelstem.study import InputSpec
from voxelstem.views.multicrop import ViewsConfig
from voxelstem.views.report import fault_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Scans to learn from."""

    scans: Selection
    left_out: dict[str, int]
    """How many were left out for which reason."""


def trainable(store: Store, spec: InputSpec) -> Selection:
    """Scans of the training subjects in the recipe's modality; test subjects are never shown to a model.

    Raises:
        StoreError: there are none.
    """
    chosen = store.select(Wanted(split="train", modality=spec.modality))
    if not len(chosen):
        have = sorted(set(store.select().modality)) or ["nothing"]
        raise StoreError(
            f"the store has no {spec.modality} scan in its training split "
            f"(it holds {', '.join(have)}, {len(store)} in all)",
            hint=f"ingest {spec.modality} scans, or choose a recipe for what the store holds",
        )
    return chosen


def choose(store: Store, spec: InputSpec, views: ViewsConfig) -> Chosen:
    """`trainable` scans; of these, where the recipe learns from reports, the ones whose report says something.

    Raises:
        StoreError: there are none.
    """
    scans = trainable(store, spec)
    if views.report is None:
        return Chosen(scans=scans, left_out={})
    # Page by page: asking for each of 250,000 by its key takes ten times as long.
    wanted = set(scans.key.tolist())
    found = {record.key: fault_of(record.report, views.report) for record in store if record.key in wanted}
    faults = [found[key] for key in scans.key.tolist()]
    left_out = dict(sorted(Counter(filter(None, faults)).items()))
    kept = scans.take(np.array([not fault for fault in faults], dtype=bool))
    if not len(kept):
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise StoreError(
            f"none of the {len(scans)} training scans has a report to learn from ({counts})",
            hint="ingest with --reports FILE, or choose a recipe that needs none",
        )
    return Chosen(scans=kept, left_out=left_out)
