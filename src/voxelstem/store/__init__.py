"""Studies on disk: compressed volumes named after their content, beside one catalogue."""

from __future__ import annotations

from voxelstem.store.catalogue import Record, Refusal
from voxelstem.store.reader import Store
from voxelstem.store.splits import Fractions, split_of
from voxelstem.store.writer import Writer, write

__all__ = ["Fractions", "Record", "Refusal", "Store", "Writer", "split_of", "write"]
