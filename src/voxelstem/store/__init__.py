"""Studies on disk: compressed volumes named after their content, beside one catalogue."""

from __future__ import annotations

from voxelstem.store.plans import epoch_order
from voxelstem.store.reader import Store
from voxelstem.store.records import Native, Record, Refusal
from voxelstem.store.selection import Selection, Wanted
from voxelstem.store.splits import Fractions, split_of
from voxelstem.store.writer import Writer, write

__all__ = [
    "Fractions",
    "Native",
    "Record",
    "Refusal",
    "Selection",
    "Store",
    "Wanted",
    "Writer",
    "epoch_order",
    "split_of",
    "write",
]
