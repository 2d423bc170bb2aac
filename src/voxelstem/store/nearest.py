"""The nearest among many unit vectors: by comparing all with all, or, where that takes hours, only near lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

EXACT = 20_000
"""Up to so many vectors all are compared with all; more are sorted into lists first."""
PROBES = 16
"""Lists that are searched for a query: those whose centres are nearest to it."""
ROUNDS = 5
"""Of Lloyd's algorithm (k-means) for the centres; finer centres find no more."""
SAMPLE = 64
"""Vectors for each centre that the centres are made from."""
SCORES = 1 << 24
"""Scores in memory at a time: 64 MiB."""
NOBODY = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Best:
    """For each query the best found so far, best first. Filled in by `Nearest.search`, over several calls."""

    ids: Int64[np.ndarray, "query place"]
    """Which vector; `NOBODY` where fewer were found."""
    scores: Float32[np.ndarray, "query place"]

    @classmethod
    def empty(cls, queries: int, *, most: int, floor: float) -> Best:
        """Make room for `most` finds a query, each with a product of at least `floor`."""
        return cls(
            ids=np.full((queries, most), NOBODY, np.int64),
            scores=np.full((queries, most), np.nextafter(np.float32(floor), np.float32(-2)), np.float32),
        )

    def offer(
        self,
        rows: Int64[np.ndarray, " find"],
        ids: Int64[np.ndarray, " find"],
        scores: Float32[np.ndarray, " find"],
    ) -> None:
        """Let finds take the place of worse ones. The same vector found twice keeps its better score."""
        if not len(rows):
            return
        touched, most = np.unique(rows), self.ids.shape[1]
        rows = np.concatenate([rows, np.repeat(touched, most)])
        ids = np.concatenate([ids, self.ids[touched].ravel()])
        scores = np.concatenate([scores, self.scores[touched].ravel()])
        order = np.lexsort((-scores, ids, rows))
        rows, ids, scores = rows[order], ids[order], scores[order]
        again = (rows[1:] == rows[:-1]) & (ids[1:] == ids[:-1]) & (ids[1:] != NOBODY)
        fresh = np.concatenate([[True], ~again])
        rows, ids, scores = rows[fresh], ids[fresh], scores[fresh]
        order = np.lexsort((ids, -scores, rows))
        rows, ids, scores = rows[order], ids[order], scores[order]
        starts = np.searchsorted(rows, touched)
        place = np.arange(len(rows)) - np.repeat(starts, np.diff([*starts, len(rows)]))
        kept = place < most
        self.ids[rows[kept], place[kept]] = ids[kept]
        self.scores[rows[kept], place[kept]] = scores[kept]

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield query and vector of every find."""
        rows, places = np.nonzero(self.ids != NOBODY)
        yield from zip(rows.tolist(), self.ids[rows, places].tolist(), strict=True)


class Nearest:
    """Vectors to be searched. Deterministic: the same vectors give the same lists."""

    def __init__(self, vectors: Float32[np.ndarray, "vector dim"], *, exact: int = EXACT) -> None:
        """Sort the vectors into lists, or into a single one if they are no more than `exact`."""
        self._vectors = vectors
        count = 1 if len(vectors) <= exact else int(np.sqrt(len(vectors)))
        self._centres = _centres(vectors, count)
        home = np.concatenate([probed[:, 0] for _, probed in self._probes(vectors, 1)])
        order = np.argsort(home, kind="stable")
        self._lists = np.split(order, np.searchsorted(home[order], np.arange(1, count)))

    def search(
        self, queries: Float32[np.ndarray, "query dim"], best: Best, asked: Best, *, among_themselves: bool
    ) -> None:
        """Find pairs of a query and a vector where either is among the best for the other.

        Args:
            queries: Unit vectors.
            best: For each query; finds better than what it holds go in.
            asked: The same for each vector here: a query that all vectors find near does not crowd out the others.
            among_themselves: The queries are made from these very vectors, in their order: none finds itself.
        """
        lists = len(self._lists)
        probed = np.concatenate([part for _, part in self._probes(queries, min(PROBES, lists))])
        order = np.argsort(probed.ravel(), kind="stable")
        starts = np.searchsorted(probed.ravel()[order], np.arange(lists + 1))
        for number, members in enumerate(self._lists):
            asking = order[starts[number] : starts[number + 1]] // probed.shape[1]
            step = max(1, SCORES // max(1, len(members)))
            for at in range(0, len(asking) if len(members) else 0, step):
                rows = asking[at : at + step]
                scores = queries[rows] @ self._vectors[members].T
                better = scores > np.minimum(best.scores[rows, -1:], asked.scores[members, -1])
                most = best.ids.shape[1]
                if np.count_nonzero(better) > 4 * most * sum(scores.shape):
                    # Early on nearly everything is better than nothing; sorting it all would take most of the time.
                    better &= scores >= np.minimum(_least(scores, most, axis=1), _least(scores, most, axis=0))
                row, column = np.nonzero(better)
                if among_themselves:
                    other = rows[row] != members[column]
                    row, column = row[other], column[other]
                best.offer(rows[row], members[column], scores[row, column])
                asked.offer(members[column], rows[row], scores[row, column])

    def _probes(
        self, queries: Float32[np.ndarray, "query dim"], count: int
    ) -> Iterator[tuple[int, Int64[np.ndarray, "query probe"]]]:
        step = max(1, SCORES // len(self._centres))
        for at in range(0, max(1, len(queries)), step):
            scores = queries[at : at + step] @ self._centres.T
            yield at, np.argpartition(-scores, count - 1, axis=1)[:, :count]


def _least(scores: Float32[np.ndarray, "query vector"], most: int, *, axis: int) -> Float32[np.ndarray, "..."]:
    """The least score that is still among the `most` best along an axis; one more, as one may be the query itself."""
    place = max(0, scores.shape[axis] - most - 1)
    return np.take(np.partition(scores, place, axis=axis), [place], axis=axis)


def _centres(vectors: Float32[np.ndarray, "vector dim"], count: int) -> Float32[np.ndarray, "list dim"]:
    """Find centres by k-means on a sample drawn with a fixed seed."""
    if count == 1:
        return np.zeros((1, vectors.shape[1]), np.float32)
    rng = np.random.default_rng(0)
    sample = vectors[np.sort(rng.choice(len(vectors), size=min(len(vectors), SAMPLE * count), replace=False))]
    centres = sample[rng.choice(len(sample), size=count, replace=False)]
    for _ in range(ROUNDS):
        home = np.concatenate(
            [np.argmax(sample[at : at + 4096] @ centres.T, axis=1) for at in range(0, len(sample), 4096)]
        )
        total = np.zeros_like(centres)
        np.add.at(total, home, sample)
        length = np.linalg.norm(total, axis=1, keepdims=True)
        centres = np.where(length > 0, total / np.maximum(length, 1e-6), centres).astype(np.float32)
    return centres
