"""Calibrated answers to questions of yes or no that do not exclude each other: findings of a scan, boxes of a class.

Each question has a line of its own (Platt 1999), which never turns the order of two answers round, and an interval by
Venn-Abers. Where one subject gave several answers, as scans give boxes, these are taken for as many independent ones:
the probabilities are shares of such answers, and their intervals are rather too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from voxelstem.certainty.calibration import log_odds
from voxelstem.certainty.calibrators import Platt, fit_platt
from voxelstem.certainty.thresholds import as_bytes, from_bytes, read_arrays
from voxelstem.certainty.vennabers import VennAbers, steps_of

_LINE = ("scale", "shift", "positives", "negatives")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Told:
    """Answers to one question whose truth is known."""

    chance: Float[np.ndarray, "answer"]
    """Stated probability of a yes."""
    there: Bool[np.ndarray, "answer"]
    """Whether it was one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chance:
    """A calibrated probability of a yes, and between which ends it lies."""

    probability: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class YesNo:
    """Calibrates answers to the questions that it knows."""

    names: tuple[str, ...]
    lines: tuple[Platt, ...]
    between: VennAbers
    """Its classes are the questions, in their order."""

    def __post_init__(self) -> None:
        """Guard the questions.

        Raises:
            ValueError: a question twice, or not one line and one interval for each.
        """
        if not len(set(self.names)) == len(self.names) == len(self.lines) == len(self.between.steps):
            raise ValueError(f"every question has a name, a line and an interval, got {len(self.names)} names")

    def __contains__(self, name: object) -> bool:
        """Whether answers to this question were calibrated."""
        return name in self.names

    def apply(self, name: str, chance: float) -> Chance:
        """Calibrate one answer. The line's probability always lies in the interval, which reaches out to it.

        Raises:
            ValueError: a question that it does not know, or what is no probability.
        """
        if name not in self.names:
            raise ValueError(f"answers of '{name}' were not calibrated")
        at, stated = self.names.index(name), np.array([chance], dtype=np.float64)
        probability = float(self.lines[at].apply(stated)[0])
        low, high = (float(side[0]) for side in self.between.of_class(at, stated))
        return Chance(probability=probability, low=min(low, probability), high=max(high, probability))

    def arrays(self) -> dict[str, np.ndarray]:
        """As they rest on disk; the names are JSON in bytes."""
        lines = {part: np.array([getattr(line, part) for line in self.lines], dtype=np.float64) for part in _LINE}
        return {"names": as_bytes(list(self.names))} | lines | self.between.arrays()

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> YesNo:
        """Read what `arrays` gave.

        Raises:
            ValueError: an array is missing, or they do not fit together.
        """
        names, *_ = read_arrays(arrays, "names", *_LINE)
        count = {len(arrays[part]) for part in _LINE}
        known = tuple(str(name) for name in from_bytes(names))
        if count != {len(known)}:
            raise ValueError(f"{len(known)} questions need as many lines, got {sorted(count)}")
        lines = tuple(Platt.of({part: np.array(arrays[part][at]) for part in _LINE}) for at in range(len(known)))
        return cls(names=known, lines=lines, between=VennAbers.of(arrays))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What could be fitted, and of what it could not, why."""

    yesno: YesNo | None
    lacking: Mapping[str, str]


def fit_yesno(told: Mapping[str, Told], *, fewest: int) -> Fitted:
    """Calibrate every question that has enough answers of either kind, and say of the others why not.

    Args:
        told: Of each question, answers about subjects whom the answering head had not seen.
        fewest: So many yes and so many no are asked for, 3 at least.

    Raises:
        ValueError: fewer than three are asked for.
    """
    if fewest < 3:  # noqa: PLR2004 - what `fit_platt` asks for
        raise ValueError(f"three answers of either kind are the least, got {fewest}")
    lines: dict[str, Platt] = {}
    lacking: dict[str, str] = {}
    for name, one in told.items():
        yes, no = int(one.there.sum()), int((~one.there).sum())
        if min(yes, no) < fewest:
            lacking[name] = f"{yes} true and {no} false ones, {fewest} of either kind are the least"
            continue
        try:
            lines[name] = fit_platt(log_odds(one.chance), one.there)
        except ValueError as error:
            lacking[name] = str(error)
    if not lines:
        return Fitted(yesno=None, lacking=lacking)
    between = steps_of([(told[name].chance, told[name].there) for name in lines])
    return Fitted(yesno=YesNo(names=tuple(lines), lines=tuple(lines.values()), between=between), lacking=lacking)
