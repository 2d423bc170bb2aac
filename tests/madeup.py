"""Examples without scans and tasks without heads, for tests of what stands above tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from voxelstem.metrics import MeanOf
from voxelstem.protocols import Example, Head
from voxelstem.study import LabelMap, Survival
from voxelstem.tasks.classify import Classify, Guess


@dataclass(frozen=True)
class Seen:
    scan: np.ndarray
    tokens: np.ndarray | None = None
    tokens_affine_ras: np.ndarray | None = None


def example(subject: str, *, key: str = "", scan: Sequence[float] = (0.0,), **truth: Any) -> Example:
    seen = Seen(np.asarray(scan, dtype=np.float64))
    return Example(subject=subject, key=key or f"of {subject}", features=seen, affine_ras=np.eye(4), **truth)


def classed(**counts: int) -> list[Example]:
    """So many subjects of each class, mixed."""
    names = [name for name, count in counts.items() for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(names))
    return [example(f"s{place:03d}", label=names[index]) for place, index in enumerate(order)]


def timed(events: int, censored: int) -> list[Example]:
    told = [Survival(time=1.0 + place, event=place < events) for place in range(events + censored)]
    return [example(f"s{place:03d}", survival=one) for place, one in enumerate(told)]


def voxels(subject: str, *values: int) -> Example:
    names = {1: "liver", 2: "spleen", 3: "kidney"}
    array = np.array([0, *values], dtype=np.int16).reshape(-1, 1, 1)
    return example(subject, labels=LabelMap(array=array, classes=names))


@dataclass(frozen=True)
class Counting:
    """A task whose outcome is a number that `says` makes of those who were learned from, who is held out and a seed."""

    modes: ClassVar[tuple[str, ...]] = ("probe",)
    metrics: ClassVar[tuple[str, ...]] = ("dice", "mae")
    voxels: ClassVar[bool] = False

    says: Callable[[frozenset[str], str, int], float]
    seen: list[frozenset[str]] = field(default_factory=list)

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        self.seen.append(frozenset(example.subject for example in examples))
        return Head(
            mode=mode, classes=classes, arrays={}, facts={"fit": float(len(self.seen) - 1), "seed": float(seed)}
        )

    def outcome(self, head: Head, example: Example) -> float:
        return self.says(self.seen[int(head.facts["fit"])], example.subject, int(head.facts["seed"]))

    def combine(self, outcomes: Sequence[float]) -> float:
        return math.fsum(outcomes) / len(outcomes)

    def statistic(self, metric: str) -> Callable[[Sequence[float]], float]:
        assert metric in self.metrics
        return MeanOf(float)


@dataclass(frozen=True)
class Memory:
    """Knows by heart whom it learned from; of others it says how many were of class 1, and a little by their names."""

    modes: ClassVar[tuple[str, ...]] = ("probe",)
    metrics: ClassVar[tuple[str, ...]] = ("auroc", "balanced_accuracy")
    voxels: ClassVar[bool] = False

    whim: float = 0.0

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        del seed
        share = float(np.mean([example.label == classes[1] for example in examples]))
        known = {example.subject: float(example.label == classes[1]) for example in examples}
        return Head(mode=mode, classes=classes, arrays={}, facts={"share": share, **known})

    def outcome(self, head: Head, example: Example) -> Guess:
        drawn = np.random.default_rng([ord(letter) for letter in example.subject]).normal()
        chance = head.facts.get(example.subject, float(head.facts["share"]) + self.whim * drawn)
        truth = head.classes.index(example.label or "")
        return Guess(truth=truth, scores=(1 - float(chance), float(chance)))

    def combine(self, outcomes: Sequence[Guess]) -> Guess:
        return Classify().combine(outcomes)

    def statistic(self, metric: str) -> Callable[[Sequence[Guess]], float]:
        return Classify().statistic(metric)
