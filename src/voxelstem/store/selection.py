"""Choose among all volumes of a store by what the catalogue says of them: as columns, not as 250,000 records."""

from __future__ import annotations

import math
import sqlite3
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from voxelstem.store.splits import Split

Text = np.ndarray[Any, np.dtype[np.object_]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which volumes to choose; as it stands, all of them. An empty word asks for nothing."""

    split: Split | Literal["any"] = "any"
    modality: str = ""
    contrast: str = ""
    session: str = ""
    max_spacing_mm: float = math.inf
    """No edge of a voxel is longer than this, but for a nanometre of rounding."""
    min_voxels: int = 0
    """Of one channel."""
    labelled: bool = False
    """Only those with voxel labels."""
    reported: bool = False
    """Only those with a report."""
    one_per_group: bool = False
    """Of near-copies, all kernels and reconstructions of one acquisition, only the best; see `best_of_groups`."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no volume could fit.
        """
        if not self.max_spacing_mm > 0:
            raise ValueError(f"max_spacing_mm must be > 0, got {self.max_spacing_mm}")
        if self.min_voxels < 0:
            raise ValueError(f"min_voxels must be >= 0, got {self.min_voxels}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Selection:
    """Chosen volumes, ordered by key: one column for each fact, all of the same length. Words are Python strings."""

    key: Text
    subject: Text
    split: Text
    modality: Text
    session: Text
    contrast: Text
    sex: Text
    group: Text
    """Near-copies share this, see `Record.group`; volumes of different groups count as independent."""
    age_years: Float64[np.ndarray, " volume"]
    """NaN where it is not known."""
    bytes: Int64[np.ndarray, " volume"]
    channels: Int64[np.ndarray, " volume"]
    shape_ijk: Int64[np.ndarray, "volume 3"]
    spacing_mm: Float64[np.ndarray, "volume 3"]
    labelled: Bool[np.ndarray, " volume"]
    reported: Bool[np.ndarray, " volume"]

    def __len__(self) -> int:
        """How many volumes were chosen."""
        return len(self.key)

    def take(self, which: Bool[np.ndarray, " volume"] | Int64[np.ndarray, " chosen"]) -> Selection:
        """Return some of them: a mask or places, as numpy indexes."""
        return Selection(**{each.name: getattr(self, each.name)[which] for each in fields(self)})

    def acquisitions(self) -> int:
        """How many independent scans these are: near-copies count once."""
        return len(set(self.group.tolist()))

    def subjects(self) -> int:
        """How many people these are scans of."""
        return len(set(self.subject.tolist()))


_WORDS = ("key", "subject", "split", "modality", "session", "contrast", "sex", "group")
_COLUMNS = (
    *_WORDS[:-1],
    "CASE acq_group WHEN '' THEN voxels ELSE acq_group END",
    "age_years",
    "bytes + label_bytes + native_bytes + native_label_bytes",
    "channels",
    *("size_i", "size_j", "size_k", "spacing_i", "spacing_j", "spacing_k"),
    "label_key != ''",
    "reported",
)
_AT_ONCE = 4096
_ROUNDING_MM = 1e-6
"""What turning an affine into spacings may add."""


def select(connection: sqlite3.Connection, wanted: Wanted, last: int) -> Selection:
    """Ask the tables for the volumes that are wanted and that came no later than number `last`."""
    words = {name: getattr(wanted, name) for name in ("modality", "contrast", "session")}
    words["split"] = "" if wanted.split == "any" else wanted.split
    terms = ["number <= :last", *(f"{name} = :{name}" for name, word in words.items() if word)]
    if math.isfinite(wanted.max_spacing_mm):
        terms.append("MAX(spacing_i, spacing_j, spacing_k) <= :max_spacing_mm + :rounding")
    if wanted.min_voxels:
        terms.append("size_i * size_j * size_k >= :min_voxels")
    if wanted.labelled:
        terms.append("label_key != ''")
    if wanted.reported:
        terms.append("reported")
    given = words | {"last": last, "min_voxels": wanted.min_voxels}
    given |= {"max_spacing_mm": wanted.max_spacing_mm, "rounding": _ROUNDING_MM}
    cursor = connection.cursor()
    cursor.row_factory = None  # plain tuples: a quarter of the time
    cursor.execute(f"SELECT {', '.join(_COLUMNS)} FROM volumes WHERE {' AND '.join(terms)}", given)
    found = _to_selection(cursor)
    # Sorted here: in the order of keys SQLite would jump through the whole file.
    found = found.take(np.argsort(found.key.astype("S")))
    return found.take(best_of_groups(found)) if wanted.one_per_group else found


def best_of_groups(found: Selection) -> Int64[np.ndarray, " group"]:
    """Find the best volume of each group: the finest along its coarsest axis, then the most voxels, then the least key.

    A thin reconstruction can be turned into a thick one but not back, so the thin one stands for the acquisition.

    Returns:
        Places in `found`, ascending.
    """
    coarsest, voxels = found.spacing_mm.max(axis=1, initial=0), found.shape_ijk.prod(axis=1)
    # Spacings that differ by less than a micrometre are equal.
    order = np.lexsort((np.arange(len(found)), -voxels, np.round(coarsest, 3)))
    groups, best = found.group.tolist(), dict[str, int]()
    for at in order.tolist():
        best.setdefault(groups[at], at)
    return np.sort(np.fromiter(best.values(), np.int64, len(best)))


def _to_selection(cursor: sqlite3.Cursor) -> Selection:
    columns: list[list[Any]] = [[] for _ in _COLUMNS]
    same: dict[str, str] = {}
    while rows := cursor.fetchmany(_AT_ONCE):
        for name, column, cells in zip_longest(_WORDS, columns, zip(*rows, strict=True)):
            # Equal words become one string: a split or a subject is said many times.
            column.extend(cells if name in (None, "key") else (same.setdefault(word, word) for word in cells))
    age, size, channels, *grid, labelled, reported = columns[len(_WORDS) :]
    return Selection(
        **{name: np.array(column, dtype=object) for name, column in zip(_WORDS, columns, strict=False)},
        age_years=np.array(age, dtype=np.float64),
        bytes=np.array(size, dtype=np.int64),
        channels=np.array(channels, dtype=np.int64),
        shape_ijk=np.array(grid[:3], dtype=np.int64).T,
        spacing_mm=np.array(grid[3:], dtype=np.float64).T,
        labelled=np.array(labelled, dtype=bool),
        reported=np.array(reported, dtype=bool),
    )
