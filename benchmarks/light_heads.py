"""Light heads on frozen tokens for the learning benchmark: the linear one of `segment`, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from voxelstem import metrics
from voxelstem.protocols import Example, Head
from voxelstem.study import LabelMap
from voxelstem.tasks.segment import Segment, numbered
from voxelstem.views import cells

SEGMENT = Segment()


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """`Segment`, scored by counting: the same Dice as MONAI's in a fraction of the time."""

    modes: ClassVar[tuple[str, ...]] = ("probe",)
    metrics: ClassVar[tuple[str, ...]] = ("dice",)
    voxels: ClassVar[bool] = True

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        return SEGMENT.fit(examples, classes, mode=mode, seed=seed)

    def outcome(self, head: Head, example: Example) -> dict[str, float]:
        """Dice of every class that the truth holds, voxel by voxel on the scan's own grid."""
        truth = numbered(labels_of(example), head.classes)
        i, j, k = truth.shape
        predicted = SEGMENT.predict(head, example.features, example.affine_ras, (i, j, k)).array
        kinds = len(head.classes) + 1
        both = np.bincount((truth * kinds + predicted).ravel(), minlength=kinds * kinds).reshape(kinds, kinds)
        size = both.sum(axis=0) + both.sum(axis=1)
        present = both.sum(axis=1) > 0
        return {
            name: float(2 * both[kind, kind] / size[kind])
            for kind, name in enumerate(head.classes, start=1)
            if present[kind]
        }

    def combine(self, outcomes: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return SEGMENT.combine(outcomes)

    def statistic(self, metric: str) -> Callable[[Sequence[Any]], float]:
        return SEGMENT.statistic(metric)


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """The class of a token is the vote of the labelled tokens that are most alike, with nothing trained.

    Tokens are standardised by the labelled ones and compared by their cosine. Both sides keep every token of an organ
    and a draw of the background's, whose votes count for those left out.
    """

    modes: ClassVar[tuple[str, ...]] = ("knn",)
    metrics: ClassVar[tuple[str, ...]] = ("balanced accuracy",)
    voxels: ClassVar[bool] = True

    k: int = 10
    background: int = 1000
    """Tokens without an organ that are kept: of all labelled scans together, and of each tested one."""

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        del mode
        parts = [majority(example, classes) for example in examples]
        rows, kinds = (np.concatenate(side) for side in zip(*parts, strict=True))
        kept, importance = self._thin(kinds, seed)
        rows, kinds = rows[kept], kinds[kept]
        middle, scale = rows.mean(axis=0), np.maximum(rows.std(axis=0), 1e-6)
        votes = np.eye(len(classes) + 1, dtype=np.float32)[kinds] * importance[:, None]
        arrays = {"middle": middle, "scale": scale, "rows": unit((rows - middle) / scale), "votes": votes}
        return Head(mode="knn", classes=classes, arrays=arrays)

    def outcome(self, head: Head, example: Example) -> dict[str, float]:
        """Recall of every kind of token that the truth holds, background among them."""
        rows, kinds = majority(example, head.classes)
        kept, _ = self._thin(kinds, 0)
        rows, kinds = rows[kept], kinds[kept]
        alike = unit((rows - head.arrays["middle"]) / head.arrays["scale"]) @ head.arrays["rows"].T
        nearest = np.argpartition(alike, -self.k, axis=1)[:, -self.k :]
        guess = head.arrays["votes"][nearest].sum(axis=1).argmax(axis=1)
        names = ("background", *head.classes)
        return {names[kind]: float((guess[kinds == kind] == kind).mean()) for kind in np.unique(kinds).tolist()}

    def combine(self, outcomes: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return SEGMENT.combine(outcomes)

    def statistic(self, metric: str) -> Callable[[Sequence[Any]], float]:
        del metric
        return SEGMENT.statistic("dice")

    def _thin(self, kinds: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of the kept tokens, and for how many each of them stands."""
        organ, rest = np.flatnonzero(kinds), np.flatnonzero(kinds == 0)
        drawn = np.sort(np.random.default_rng(seed).permutation(rest)[: self.background])
        share = np.full(len(drawn), len(rest) / max(len(drawn), 1), dtype=np.float32)
        return np.concatenate([organ, drawn]), np.concatenate([np.ones(len(organ), dtype=np.float32), share])


def majority(example: Example, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that hold at least one voxel of a scan, and the kind of most voxels in each."""
    tokens, affine = example.features.tokens, example.features.tokens_affine_ras
    assert tokens is not None
    assert affine is not None
    values = numbered(labels_of(example), classes)
    i, j, k = tokens.shape[:3]
    counts = cells.tally(values, cells.lay(example.affine_ras, values.shape, affine, (i, j, k)), len(classes) + 1)
    counts = counts.reshape(-1, len(classes) + 1)
    held = counts.any(axis=1)
    return tokens.reshape(-1, tokens.shape[3])[held].astype(np.float32), counts[held].argmax(axis=1)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def labels_of(example: Example) -> LabelMap:
    assert example.labels is not None
    return example.labels


def mean_of(outcomes: Sequence[Mapping[str, float]]) -> float:
    """The figure of one repeat: over subjects, of the mean over kinds."""
    return metrics.mean([metrics.mean(list(outcome.values())) for outcome in outcomes])
