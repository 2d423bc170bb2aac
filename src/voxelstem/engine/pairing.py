"""Which other scan of its subject a sample shows, and at which place of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from voxelstem.engine.targets import Facts
from voxelstem.store.reader import Store
from voxelstem.store.records import Record
from voxelstem.views.crop import ViewPlan
from voxelstem.views.pair import carry_over


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Partner:
    """The second scan of a sample; the first one itself where none can be paired."""

    record: Record
    plan: ViewPlan
    """The view, in millimetres from this scan's low corner."""
    refused: tuple[tuple[str, str], ...] = ()
    """Keys of the scans that were drawn before and cannot show the place, and why."""


def find_partner(
    facts: Facts, store: Store, record: Record, plan: ViewPlan, *, rng: np.random.Generator, aside: Collection[str] = ()
) -> Partner:
    """Draw partners of a scan until one shows the place of its view.

    Which one is found depends on `rng` and on which of them are put `aside`, never on when they were.

    Args:
        facts: Who can be paired with whom.
        store: Where the scans lie.
        record: Scan a.
        plan: Its view.
        rng: What is drawn comes from here.
        aside: Keys of scans that cannot be read.
    """
    config, refused = facts.config, list[tuple[str, str]]()
    for key in facts.draw(record.key, rng):
        if key in aside:
            continue
        other = store.record(key)
        found = carry_over(plan, record, other, least_overlap=config.least_overlap, tolerance_mm=config.tolerance_mm)
        if isinstance(found, ViewPlan):
            return Partner(record=other, plan=found, refused=tuple(refused))
        refused.append((key, found))
    return Partner(record=record, plan=plan, refused=tuple(refused))
