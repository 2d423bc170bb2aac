"""Thresholds that hold for new subjects as often as they say, and whether they did: the ground of conformal prediction.

A score says how strange something is. Of n calibration subjects and a new one drawn like them, each is as likely as
any other to be the strangest: that is all a threshold needs to be right. The promise is about all new subjects
together; for each scanner or site it holds only where that group has a threshold of its own (Mondrian; Vovk et al.
2005, section 4.5). One row is one subject.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from voxelstem.certainty.calibration import wilson_interval
from voxelstem.metrics import Interval

ROUNDING = 1e-9
"""Sums of the same numbers in another order are this equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """How strange an answer may be and still be held for possible: one number for all, or one for each group."""

    level: float
    groups: tuple[str, ...] = ()
    """Scanners, sites or others; empty if there is one threshold for all."""
    values: tuple[float, ...]
    """Infinite for a group with too few calibration subjects: whatever it asks, nothing is ruled out."""
    subjects: tuple[int, ...]
    """Calibration subjects of each."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a level outside (0, 1), or not one threshold and count for each group.
        """
        _check_level(self.level)
        sizes = {len(self.values), len(self.subjects), len(self.groups) or 1}
        if len(sizes) > 1 or len(set(self.groups)) < len(self.groups) or any(map(math.isnan, self.values)):
            raise ValueError(f"every group has one threshold and one count, got {self}")

    @property
    def lacking(self) -> tuple[str, ...]:
        """Groups with too few calibration subjects."""
        return tuple(name for name, value in zip(self.groups, self.values, strict=False) if value == math.inf)

    def of_rows(self, rows: int, groups: Sequence[str]) -> Float[np.ndarray, "row"]:
        """The threshold of each row; infinite for a group that the calibration had too few subjects of, or none.

        Raises:
            ValueError: not one group for each row, or groups where the calibration knew none.
        """
        if len(groups) != (rows if self.groups else 0):
            wanted = "a group for each" if self.groups else "no groups"
            raise ValueError(f"these thresholds take {wanted} of {rows} rows, got {len(groups)} groups")
        if not self.groups:
            return np.full(rows, self.values[0])
        by_group = dict(zip(self.groups, self.values, strict=True))
        return np.array([by_group.get(name, math.inf) for name in groups])

    def of_group(self, group: str) -> Thresholds:
        """A group's own threshold as if it were that of all.

        Raises:
            ValueError: there is no such group.
        """
        if group not in self.groups:
            raise ValueError(f"there is no threshold of its own for this group; there are {len(self.groups)} others")
        at = self.groups.index(group)
        return Thresholds(level=self.level, values=(self.values[at],), subjects=(self.subjects[at],))

    def arrays(self) -> dict[str, np.ndarray]:
        """As they rest on disk; the names of groups are JSON in bytes."""
        return {
            "level": np.array(self.level),
            "groups": as_bytes(list(self.groups)),
            "thresholds": np.array(self.values, dtype=np.float64),
            "subjects": np.array(self.subjects, dtype=np.int64),
        }

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Thresholds:
        """Read what `arrays` gave.

        Raises:
            ValueError: an array is missing, or they do not fit together.
        """
        level, groups, values, subjects = read_arrays(arrays, "level", "groups", "thresholds", "subjects")
        names = tuple(str(name) for name in from_bytes(groups))
        return cls(level=float(level), groups=names, values=tuple(values.tolist()), subjects=tuple(subjects.tolist()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How often sets or intervals held the truth, over subjects."""

    overall: Interval
    by_group: Mapping[str, Interval] = field(default_factory=dict)


def fit_thresholds(scores: Float[np.ndarray, "row"], *, level: float, groups: Sequence[str] = ()) -> Thresholds:
    """The `conformal_quantile` of all scores, or of each group's.

    Raises:
        ValueError: too few subjects for the level (in every group, if there are some), not one group for each row, NaN,
            or a level outside (0, 1).
    """
    if len(groups) not in (0, len(scores)):
        raise ValueError(f"every row needs a group, got {len(groups)} for {len(scores)} rows")
    sizes = Counter(groups) if groups else Counter({"": len(scores)})
    if max(sizes.values(), default=0) < fewest_for(level):
        where = "the largest group has" if groups else "there are"
        raise ValueError(
            f"a level of {level} needs {fewest_for(level)} calibration subjects, {where} {max(sizes.values())}: lower "
            "the level or hold out more"
        )
    names, kinds = sorted(sizes), np.asarray(groups)
    parts = [scores[kinds == name] if groups else scores for name in names]
    return Thresholds(
        level=level,
        groups=tuple(names) if groups else (),
        values=tuple(conformal_quantile(part, level=level) for part in parts),
        subjects=tuple(len(part) for part in parts),
    )


def conformal_quantile(scores: Float[np.ndarray, "row"], *, level: float) -> float:
    """The ceil((n + 1) * level)-th smallest of n scores: one more is no larger with probability `level` at least.

    Vovk et al. 2005, section 2.2. Infinite where there are too few scores for the level (`fewest_for`).

    Raises:
        ValueError: NaN, or a level outside (0, 1).
    """
    _check_level(level)
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN")
    # (n + 1) * level is a whole number for many levels, and floats are a little beside it.
    rank = max(math.ceil((len(scores) + 1) * level - ROUNDING), 1)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def fewest_for(level: float) -> int:
    """How many calibration subjects a level needs: 9 for 0.9, 19 for 0.95.

    Raises:
        ValueError: a level outside (0, 1).
    """
    _check_level(level)
    return math.ceil(level / (1 - level) - ROUNDING)


def coverage(
    covered: Bool[np.ndarray, "row"], subjects: Sequence[str], *, groups: Sequence[str] = (), level: float = 0.95
) -> Coverage:
    """Share of subjects whose truth was held, overall and in each group, with Wilson's interval over subjects.

    Args:
        covered: What `PredictedSets.holds` or `PredictedIntervals.holds` said.
        subjects: Of each row; a subject with several rows counts once, by its share of them.
        groups: Of each row.
        level: Of the interval, not of the sets.

    Raises:
        ValueError: no rows, not one subject or group for each, or a level outside (0, 1).
    """
    if len(covered) == 0 or len(subjects) != len(covered) or len(groups) not in (0, len(covered)):
        raise ValueError(
            f"every row needs a subject and, if any has one, a group, got {len(subjects)} and {len(groups)} for "
            f"{len(covered)} rows"
        )
    people, of = np.unique(np.asarray(subjects), return_inverse=True)

    def within(rows: Bool[np.ndarray, "row"]) -> Interval:
        count = np.bincount(of[rows], minlength=len(people))
        share = np.bincount(of[rows], covered[rows], minlength=len(people))[count > 0] / count[count > 0]
        return wilson_interval(float(share.mean()), len(share), level=level)

    kinds = np.asarray(groups)
    by_group = {str(name): within(kinds == name) for name in sorted(set(groups))}
    return Coverage(overall=within(np.ones(len(covered), dtype=np.bool_)), by_group=by_group)


def as_bytes(value: str | list[str]) -> UInt8[np.ndarray, "byte"]:
    """Names as an array that rests beside numbers: JSON in bytes."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def from_bytes(stored: np.ndarray) -> Any:
    """Read what `as_bytes` gave."""
    return json.loads(stored.astype(np.uint8).tobytes())


def read_arrays(arrays: Mapping[str, np.ndarray], *names: str) -> list[np.ndarray]:
    """The arrays of these names, in this order.

    Raises:
        ValueError: some are not there.
    """
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"there is no {', '.join(missing)} among the arrays")
    return [arrays[name] for name in names]


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level lies in (0, 1), got {level}")
