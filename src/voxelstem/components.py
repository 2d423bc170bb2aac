"""Which voxels of a label map hang together: all its classes in one pass, a plane at a time.

Connected components by runs (He, Chao and Suzuki 2008, "A run-based two-scan labeling algorithm"), here in one scan: a
component is measured while it grows and let go when the sweep has left it, so that no map of components exists. The
time does not grow with the number of classes, and the memory with one plane and the largest components only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from scipy import sparse
from scipy.sparse import csgraph

MOST_WAITING = 1 << 16
"""Components that wait to be compared with the largest ones of their class; bounds the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """Voxels of one class: all of them, or those that touch one another by a face, an edge or a corner."""

    voxels: int
    centre_ijk: tuple[float, float, float]
    """Mean of the voxels' indices."""
    low: tuple[float, float, float]
    """The least of the voxels' centres along each of the directions that were asked for."""
    high: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """What there is of one class."""

    whole: Component
    count: int
    large: int
    """How many components have the least size that was asked for."""
    largest: int
    """Voxels of the largest one."""
    listed: tuple[Component, ...]
    """The largest of the `large` ones, from the largest on; of equal ones that with the first voxel in C order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Sets:
    """Sets of voxels: numbers that add up where sets of a class join, and numbers of which the least stays."""

    value: Int[np.ndarray, "set"]
    sums: Float[np.ndarray, "4 set"]
    """Voxels, and the sums of their three indices; whole numbers, far below 2^53."""
    least: Float[np.ndarray, "7 set"]
    """Place of the first voxel in C order, the lows along three directions, and the negative highs."""

    def joined(self, into: Int[np.ndarray, "set"], count: int) -> _Sets:
        """Join sets: `into` tells for each which of `count` new ones it becomes part of."""
        value = np.zeros(count, dtype=np.int64)
        value[into] = self.value
        least = np.full((len(self.least), count), np.inf)
        for row, given in zip(least, self.least, strict=True):
            np.minimum.at(row, into, given)
        sums = np.stack([np.bincount(into, weights=row, minlength=count) for row in self.sums])
        return _Sets(value=value, sums=sums, least=least)

    def take(self, which: Int[np.ndarray, "some"] | Bool[np.ndarray, "set"]) -> _Sets:
        """Some of the sets."""
        return _Sets(value=self.value[which], sums=self.sums[:, which], least=self.least[:, which])

    def component(self, at: int) -> Component:
        """One of the sets."""
        count, i, j, k = (float(row[at]) for row in self.sums)
        low, high = self.least[1:4, at], -self.least[4:7, at]
        return Component(
            voxels=int(count),
            centre_ijk=(i / count, j / count, k / count),
            low=(float(low[0]), float(low[1]), float(low[2])),
            high=(float(high[0]), float(high[1]), float(high[2])),
        )


_NONE = _Sets(value=np.zeros(0, np.int64), sums=np.zeros((4, 0)), least=np.zeros((7, 0)))


def survey(
    labels: Integer[np.ndarray, "i j k"],
    directions: Float[np.ndarray, "3 3"],
    *,
    least: int,
    most: int,
) -> Mapping[int, Components]:
    """Find the components of every class of a label map; voxels touch by a face, an edge or a corner.

    Args:
        labels: Class numbers, none negative; 0 is background.
        directions: Each row is a direction along which low and high are told, by its product with a voxel's indices.
        least: Components of fewer voxels are counted and not listed.
        most: Of one class, so many are listed at most.

    Returns:
        What there is of each class that has a voxel.
    """
    told = _Told(least=least, most=most, top=int(labels.max(initial=0)))
    before = _Plane(labels=np.zeros(labels.shape[1:], labels.dtype), ids=np.zeros(labels.shape[1:], np.int64))
    growing = _NONE
    for index, plane in enumerate(labels):
        here, runs = _runs(np.ascontiguousarray(plane), index, directions)
        count, into = _connected(here, before, len(runs.value), len(growing.value))
        both = _Sets(
            value=np.concatenate([runs.value, growing.value]),
            sums=np.concatenate([runs.sums, growing.sums], axis=1),
            least=np.concatenate([runs.least, growing.least], axis=1),
        ).joined(into, count)
        grows = np.zeros(count, dtype=np.bool_)
        grows[into[: len(runs.value)]] = True
        told.take(both.take(~grows))
        growing = both.take(grows)
        ids = np.append((np.cumsum(grows) - 1)[into[: len(runs.value)]], -1)  # the last one is what -1 finds
        before = _Plane(labels=here.labels, ids=ids[here.ids])
    told.take(growing)
    return told.all()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Plane:
    """A plane of the label map, and which run or component each of its voxels belongs to."""

    labels: Integer[np.ndarray, "j k"]
    ids: Int[np.ndarray, "j k"]
    """-1, or anything, where there is background."""


def _runs(plane: Integer[np.ndarray, "j k"], index: int, directions: Float[np.ndarray, "3 3"]) -> tuple[_Plane, _Sets]:
    """The runs of equal voxels along k, without background."""
    begins = np.ones(plane.shape, dtype=np.bool_)
    np.not_equal(plane[:, 1:], plane[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=plane.size)
    values = plane.ravel()[starts]
    inside = values > 0
    numbers = np.where(inside, np.cumsum(inside) - 1, -1)
    ids = numbers[np.cumsum(begins.ravel()) - 1].reshape(plane.shape)
    starts, lengths = starts[inside], lengths[inside]
    j, k = np.divmod(starts, plane.shape[1])
    middle = k + (lengths - 1) / 2
    # Along a run any direction grows or falls evenly: its ends are its extremes.
    first = directions[:, :1] * index + directions[:, 1:2] * j + directions[:, 2:] * k
    last = first + directions[:, 2:] * (lengths - 1)
    sets = _Sets(
        value=values[inside].astype(np.int64),
        sums=np.stack([lengths, lengths * index, lengths * j, lengths * middle]).astype(np.float64),
        least=np.concatenate([(starts + index * plane.size)[None], np.minimum(first, last), -np.maximum(first, last)]),
    )
    return _Plane(labels=plane, ids=ids), sets


def _connected(here: _Plane, before: _Plane, runs: int, growing: int) -> tuple[int, Int[np.ndarray, "node"]]:
    """Which runs and growing components are one: how many there are then, and which of them each is part of."""
    pairs = [_touching(here, before, step, runs) for step in (-1, 0, 1)]
    pairs.append(_touching(here, here, -1, 0))
    one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    nodes = runs + growing
    if not one.size:
        return nodes, np.arange(nodes)
    graph = sparse.coo_array((np.ones(one.size, np.bool_), (one, other)), shape=(nodes, nodes))
    count, into = csgraph.connected_components(graph.tocsr(), directed=False)
    return int(count), into


def _touching(
    here: _Plane, there: _Plane, step: int, offset: int
) -> tuple[Int[np.ndarray, "pair"], Int[np.ndarray, "pair"]]:
    """Pairs of runs of one class that touch, the rows j of one plane beside the rows j + `step` of another.

    Enough of them to connect all that touch; `offset` is added to the ids of `there`.
    """
    rows = len(here.labels)
    mine, theirs = slice(max(0, -step), rows - max(0, step)), slice(max(0, step), rows - max(0, -step))
    a, b, ids_a, ids_b = here.labels[mine], there.labels[theirs], here.ids[mine], there.ids[theirs]
    filled = a > 0
    same = (a == b) & filled
    # Two runs that lie side by side are told of once, where that begins.
    faces = same.copy()
    faces[:, 1:] &= ~(same[:, :-1] & (a[:, 1:] == a[:, :-1]))
    # Across k only where neither voxel's own neighbour connects them already.
    apart = ~(same[:, 1:] | same[:, :-1])
    after = (a[:, :-1] == b[:, 1:]) & filled[:, :-1] & apart
    ahead = (a[:, 1:] == b[:, :-1]) & filled[:, 1:] & apart
    one = np.concatenate([ids_a[faces], ids_a[:, :-1][after], ids_a[:, 1:][ahead]])
    other = np.concatenate([ids_b[faces], ids_b[:, 1:][after], ids_b[:, :-1][ahead]])
    return one, other + offset


class _Told:
    """Components that the sweep has left, class by class: all of them in sum, and the largest."""

    def __init__(self, *, least: int, most: int, top: int) -> None:
        """`top` is the largest class number."""
        self._least, self._most, self._top = least, most, top
        self._whole = _NONE.joined(np.zeros(0, np.int64), top + 1)
        self._count, self._large, self._largest = (np.zeros(top + 1, dtype=np.int64) for _ in range(3))
        self._waiting, self._kept = 0, [_NONE]

    def take(self, sets: _Sets) -> None:
        """Note components that are complete."""
        if not sets.value.size:
            return
        sizes = sets.sums[0].astype(np.int64)
        both = [
            np.concatenate(pair, axis=-1) for pair in ((self._whole.sums, sets.sums), (self._whole.least, sets.least))
        ]
        values = np.concatenate([np.arange(self._top + 1), sets.value])
        self._whole = _Sets(value=values, sums=both[0], least=both[1]).joined(values, self._top + 1)
        self._count += np.bincount(sets.value, minlength=self._top + 1)
        large = sizes >= self._least
        self._large += np.bincount(sets.value[large], minlength=self._top + 1)
        np.maximum.at(self._largest, sets.value, sizes)
        self._kept.append(sets.take(large))
        self._waiting += int(large.sum())
        if self._waiting > MOST_WAITING:
            self._settle()

    def all(self) -> dict[int, Components]:
        """What there is of each class that has a voxel."""
        self._settle()
        (kept,) = self._kept
        return {
            value: Components(
                whole=self._whole.component(value),
                count=int(self._count[value]),
                large=int(self._large[value]),
                largest=int(self._largest[value]),
                listed=tuple(kept.component(int(at)) for at in np.flatnonzero(kept.value == value)),
            )
            for value in map(int, np.flatnonzero(self._count))
        }

    def _settle(self) -> None:
        """Keep the largest of each class, in order."""
        value = np.concatenate([sets.value for sets in self._kept])
        sums = np.concatenate([sets.sums for sets in self._kept], axis=1)
        least = np.concatenate([sets.least for sets in self._kept], axis=1)
        order = np.lexsort((least[0], -sums[0], value))
        ordered = value[order]
        rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        self._kept = [_Sets(value=value, sums=sums, least=least).take(order[rank < self._most])]
        self._waiting = 0
