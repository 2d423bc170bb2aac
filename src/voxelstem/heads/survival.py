"""Times until an event, of which some are only known to be longer: curves and scores, pure numpy.

Whoever is watched until time t without an event is *censored* at t. Times may carry any unit; curves, ranges and times
that are asked for carry the same one. Where an event and the end of a watch share a time, the event came first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from voxelstem.study import Survival

BLOCK = 1 << 22
"""Pairs that are compared at once: few enough to stay in memory however many subjects there are."""
LARGEST = 700.0
"""Log hazard that float64 still holds; the event is certain long before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """What is known of some subjects, as arrays."""

    time: Float[np.ndarray, "subject"]
    event: Bool[np.ndarray, "subject"]

    def __post_init__(self) -> None:
        """Guard the times.

        Raises:
            ValueError: nobody is there, lengths differ, or a time is negative, infinite or no number.
        """
        if self.time.shape != self.event.shape or self.time.ndim != 1 or not len(self.time):
            raise ValueError(f"one time and one event each are needed, got {self.time.shape} and {self.event.shape}")
        if not (np.isfinite(self.time) & (self.time >= 0)).all():
            raise ValueError("times must be numbers >= 0")

    @classmethod
    def of(cls, told: Iterable[Survival]) -> Watched:
        """The same as arrays."""
        kept = list(told)
        return cls(time=np.array([one.time for one in kept]), event=np.array([one.event for one in kept], np.bool_))

    def __len__(self) -> int:
        """Subjects."""
        return len(self.time)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A chance that falls in steps: `value` from each `time` on, 1 before the first. Unknown beyond the last time."""

    time: Float[np.ndarray, "step"]
    value: Float[np.ndarray, "step"]

    def __post_init__(self) -> None:
        """Guard the steps.

        Raises:
            ValueError: no step, lengths that differ, times that do not rise or values outside [0, 1].
        """
        if self.time.shape != self.value.shape or self.time.ndim != 1 or not len(self.time):
            raise ValueError(f"a curve needs a value for each time, got {self.time.shape} and {self.value.shape}")
        if not (np.diff(self.time) > 0).all() or not ((self.value >= 0) & (self.value <= 1)).all():
            raise ValueError("the times of a curve must rise and its values lie in [0, 1]")

    def at(self, time: Float[np.ndarray, "moment"]) -> Float[np.ndarray, "moment"]:
        """The chance at each time, a step at that very time included.

        Raises:
            ValueError: a time lies beyond the last one that was observed.
        """
        if len(time) and not time.max() <= self.time[-1]:
            raise ValueError(f"the curve ends at {self.time[-1]:g}, and was asked for {time.max():g}")
        return np.append(1.0, self.value)[np.searchsorted(self.time, time, side="right")]


def kaplan_meier(watched: Watched) -> Curve:
    """Chance that the event has not come yet, with a step at every observed time (Kaplan & Meier 1958)."""
    times, came, _, at_risk = _counts(watched)
    return Curve(time=times, value=np.cumprod(1 - came / at_risk))


def censoring(watched: Watched) -> Curve:
    """Chance of being watched still: Kaplan and Meier's curve with the parts of event and censoring exchanged.

    Whose event falls on the end of somebody else's watch is not at risk of being censored there any more.
    """
    times, came, ended, at_risk = _counts(watched)
    left = at_risk - came
    return Curve(time=times, value=np.cumprod(1 - ended / np.maximum(left, 1)))


def breslow(watched: Watched, log_risk: Float[np.ndarray, "subject"]) -> Curve:
    """Chance of no event for a subject of log risk 0 (Breslow 1972): exp of minus the baseline cumulative hazard.

    Args:
        watched: Subjects.
        log_risk: The logarithm of each one's hazard ratio; another subject's curve is this one to the power of the
            exponential of its log risk.
    """
    times, came, _, _ = _counts(watched)
    order = np.argsort(-watched.time, kind="stable")
    # Late subjects may be as good as safe beside early ones: their sum must not drown in another's scale.
    summed = np.logaddexp.accumulate(log_risk[order])
    last = np.searchsorted(-watched.time[order], -times, side="right") - 1
    hazards = came * np.exp(np.minimum(-summed[last], LARGEST))
    return Curve(time=times, value=np.exp(-np.cumsum(hazards)))


def harrell_c(watched: Watched, risk: Float[np.ndarray, "subject"]) -> float:
    """How often, of two subjects, the one at higher risk has the event first (Harrell et al. 1982).

    A pair counts if it is known who fared worse: the earlier time ends with an event, or at equal times one of the two
    does. Two events at one time are no pair, neither here nor in lifelines 0.30 or scikit-survival 0.28. Equal risks
    count half; scikit-survival calls risks equal that differ by no more than 1e-8, here they must be so exactly.

    Returns:
        The share, 0.5 if all risks are equal; NaN if no pair counts.
    """
    return float(counted_concordance(np.ones((1, len(watched))), watched, risk, np.ones(len(watched)))[0])


def uno_c(watched: Watched, risk: Float[np.ndarray, "subject"], *, uncensored: Curve, tau: float) -> float:
    """`harrell_c` of events before `tau`, freed from how long subjects were watched (Uno et al. 2011).

    Each pair weighs by the inverse square of the chance to be watched until its event.

    Args:
        watched: Subjects who are judged.
        risk: Higher is worse.
        uncensored: `censoring` of the subjects that were learned from.
        tau: Events at or after this time begin no pair.

    Raises:
        ValueError: as `uno_weights`.
    """
    weights = uno_weights(watched, uncensored=uncensored, tau=tau)
    return float(counted_concordance(np.ones((1, len(watched))), watched, risk, weights)[0])


def uno_weights(watched: Watched, *, uncensored: Curve, tau: float) -> Float[np.ndarray, "subject"]:
    """What the pairs count for that a subject's event begins: 1 / G(time)^2, and 0 without an event before `tau`.

    G is taken with its step at that very time, as Uno et al. write it and scikit-survival takes it.

    Raises:
        ValueError: by `uncensored` nobody is watched until such an event.
    """
    counted = watched.event & (watched.time < tau)
    weights = np.zeros(len(watched))
    weights[counted] = _inverse(uncensored, watched.time[counted]) ** 2
    return weights


def counted_concordance(
    counts: Float[np.ndarray, "draw subject"],
    watched: Watched,
    risk: Float[np.ndarray, "subject"],
    weights: Float[np.ndarray, "subject"],
) -> Float[np.ndarray, "draw"]:
    """Share of pairs in order, in each draw in which a subject stands `counts` times.

    Args:
        counts: A subject and its double are no pair, so that draws with replacement are counted as they are.
        watched: Subjects.
        risk: Higher is worse.
        weights: What the pairs count for that a subject's event begins.

    Raises:
        ValueError: lengths differ, or a risk is infinite or no number.
    """
    if not len(watched) == len(risk) == len(weights) == counts.shape[1] or not np.isfinite(risk).all():
        raise ValueError("each subject needs a finite risk, a weight and a count")
    counted = np.flatnonzero(watched.event & (weights > 0))
    right, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    for some in np.array_split(counted, math.ceil(len(counted) * len(watched) / BLOCK) or 1):
        begin, end = watched.time[some, None], watched.time[None]
        longer = (end > begin) | ((end == begin) & ~watched.event)
        gaps = risk[some, None] - risk[None]
        first = counts[:, some] * weights[some]
        right += (first * (counts @ (longer * ((gaps > 0) + 0.5 * (gaps == 0))).T)).sum(axis=1)
        pairs += (first * (counts @ longer.astype(np.float64).T)).sum(axis=1)
    return np.where(pairs > 0, right / np.where(pairs > 0, pairs, 1.0), math.nan)


def brier_weights(
    watched: Watched, times: Float[np.ndarray, "moment"], *, uncensored: Curve
) -> Float[np.ndarray, "subject moment"]:
    """What each subject's squared error counts for at each time, so that the censored are made up for by the others.

    1 / G(its time) once its event has come, 1 / G(moment) while it is watched, and 0 once its watch has ended (Graf et
    al. 1999).

    Raises:
        ValueError: by `uncensored` nobody is watched until a time that is needed.
    """
    there = watched.time[:, None] > times
    came = watched.event[:, None] & ~there
    at_moment, at_event = np.zeros(len(times)), np.zeros(len(watched))
    # Only what is needed: a curve may end before times that nobody reaches.
    reached, counted = there.any(axis=0), came.any(axis=1)
    at_moment[reached] = _inverse(uncensored, times[reached])
    at_event[counted] = _inverse(uncensored, watched.time[counted])
    return there * at_moment + came * at_event[:, None]


def brier(
    watched: Watched,
    chances: Float[np.ndarray, "subject moment"],
    times: Float[np.ndarray, "moment"],
    *,
    uncensored: Curve,
) -> Float[np.ndarray, "moment"]:
    """Mean squared error, at each time, of the chance that the event has not come yet (Graf et al. 1999).

    Args:
        watched: Subjects who are judged.
        chances: Predicted for each of them and each time.
        times: Moments.
        uncensored: `censoring` of the subjects that were learned from.

    Raises:
        ValueError: as `brier_weights`, or shapes that do not fit.
    """
    if chances.shape != (len(watched), len(times)):
        raise ValueError(f"chances must be {(len(watched), len(times))}, got {chances.shape}")
    errors = (watched.time[:, None] > times) - chances
    return (brier_weights(watched, times, uncensored=uncensored) * errors**2).mean(axis=0)


def integrated_brier(
    watched: Watched,
    chances: Float[np.ndarray, "subject moment"],
    times: Float[np.ndarray, "moment"],
    *,
    uncensored: Curve,
) -> float:
    """The mean of `brier` over the range of rising `times`, by trapezoids. 0.25 is what saying 0.5 of everybody gets.

    Raises:
        ValueError: as `brier` or `spans`.
    """
    return float(brier(watched, chances, times, uncensored=uncensored) @ spans(times))


def spans(times: Float[np.ndarray, "moment"]) -> Float[np.ndarray, "moment"]:
    """Share of the range of `times` that each stands for in the trapezoidal rule; they add up to 1.

    Raises:
        ValueError: fewer than two times, or times that do not rise.
    """
    steps = np.diff(times)
    if not len(steps) or not (steps > 0).all():
        raise ValueError("a range needs two or more times, one after the other")
    return (np.append(steps, 0.0) + np.append(0.0, steps)) / 2 / (times[-1] - times[0])


def interval_edges(watched: Watched, intervals: int) -> Float[np.ndarray, "edge"]:
    """Edges from 0 to just beyond the last time, such that each interval holds an event, and about as many as others.

    Args:
        watched: Subjects.
        intervals: How many at most; fewer if events have fewer distinct times.

    Raises:
        ValueError: there is no event, or fewer than one interval.
    """
    times, counts = np.unique(watched.time[watched.event], return_counts=True)
    if not len(times) or intervals < 1:
        raise ValueError(f"at least one event and one interval are needed, got {len(times)} and {intervals}")
    passed, between = np.cumsum(counts)[:-1] / counts.sum(), (times[:-1] + times[1:]) / 2
    wanted = np.arange(1, intervals) / intervals if len(between) else np.zeros(0)
    inner = np.unique([between[np.abs(passed - share).argmin()] for share in wanted])
    return np.concatenate([[0.0], inner, [np.nextafter(watched.time.max(), math.inf)]])


def _inverse(uncensored: Curve, times: Float[np.ndarray, "moment"]) -> Float[np.ndarray, "moment"]:
    chances = uncensored.at(times)
    if not (chances > 0).all():
        raise ValueError(f"nobody who was learned from is watched until {times[chances <= 0].min():g}")
    return 1 / chances


def _counts(watched: Watched) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct times; how many events and how many ends of watching fall on each; and how many subjects reach it."""
    times, place = np.unique(watched.time, return_inverse=True)
    came = np.bincount(place, weights=watched.event, minlength=len(times))
    ended = np.bincount(place, weights=~watched.event, minlength=len(times))
    at_risk = np.cumsum((came + ended)[::-1])[::-1]
    return times, came, ended, at_risk
