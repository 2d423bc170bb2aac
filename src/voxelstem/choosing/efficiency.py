"""Label efficiency: how good a way to adapt is with N labelled subjects, and what the next labels would buy.

A curve is cross-fitting with fewer labels. Each repeat parts the subjects into folds once for all sizes; while a fold
is held out, N of the others are drawn and learned from. So all sizes are scored on the same subjects, everybody counts
once in every repeat, and a larger draw holds the smaller ones.

What lies beyond is read off a power law, which errors follow over wide ranges (Hestness et al. 2017; for clinical
classifiers Figueroa et al. 2012), and never farther than twice the largest size that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from voxelstem.certainty.crossfit import Answer, Figure, Outcomes, Scale, as_facts, cross_fit, scale_of, seed_of
from voxelstem.certainty.folds import Folds, Strata
from voxelstem.choosing.powerlaw import PowerLaws, fit_power_laws
from voxelstem.choosing.unseen import has_width, not_seen
from voxelstem.metrics import FEWEST_SUBJECTS, Interval, defined_mean, drawn
from voxelstem.progress import Advance
from voxelstem.protocols import Task

FEWEST_SIZES = 3
"""A power law has three numbers."""
PRIOR = 2.0
"""The spread of draws at one size is estimated as if this many more repeats had shown the average of all sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveConfig:
    """Which sizes are tried, and what is made of them."""

    sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
    """Labelled subjects, as far as there are so many; the least and the most that can be drawn always are tried."""
    step: int = 10
    """So many more labelled subjects are asked about."""
    margin: float = 0.01
    """A gain below this is little; of metrics in the labels' unit, a share of the figure at the largest size."""
    draws: int = 500
    """Resamples of subjects and repeats behind the intervals of what is read off the curve."""
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a size or step below 1, a margin that is not positive, too few draws or a level without sense.
        """
        if min(self.step, *self.sizes, 1) < 1 or not 0 < self.margin < math.inf:
            raise ValueError(f"sizes and step must be at least 1 and margin positive, got {self}")
        if self.draws < 100 or not 0 < self.level < 1:  # noqa: PLR2004 - fewer draws have no 2.5 % tail
            raise ValueError(f"draws must be at least 100 and level lie in (0, 1), got {self.draws} and {self.level}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The figure with so many labelled subjects."""

    subjects: int
    score: Interval
    each: tuple[float, ...]
    """That of every repeat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """score(N) = asymptote - drop * N^-exponent; where less is better, the drop stands with a plus."""

    asymptote: float
    """Far beyond what was measured: no promise, and next to meaningless while the exponent is small."""
    drop: float
    exponent: Interval
    at_bound: bool
    """Whether the exponent is as small or as large as the fit allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """By how much the figure is better with more labelled subjects than with fewer."""

    have: int
    then: int
    value: Interval
    """Above 0 is better, also where less is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A label-efficiency curve, and what can be read off it."""

    metric: str
    labelled: int
    """Subjects that have labels; with a fold held out, fewer can be learned from."""
    repeats: int
    margin: float
    """A gain below this is little, in the metric's own unit."""
    points: tuple[Point, ...]
    rise: Gain | None = None
    """From the smallest size to the largest, as measured; None where that cannot be said."""
    law: Law | None = None
    """None where it is not identified: `why` says why."""
    gains: tuple[Gain, ...] = ()
    """By the law, from all that are labelled: to `CurveConfig.step` more, and to twice the largest size, beyond which
    nothing is said."""
    flat: bool = False
    """Whether there is no rise that matters from the smallest size to the largest, for all that the interval holds."""
    why: str = ""

    def facts(self) -> dict[str, Any]:
        """Everything as plain data for JSON, and what it recommends; an undefined figure becomes None."""
        return as_facts(self) | {"recommendation": recommend(self)}


def label_curve(
    answer: Answer,
    strata: Strata,
    plan: Sequence[Folds],
    *,
    task: Task,
    metric: str,
    config: CurveConfig,
    advance: Advance | None = None,
) -> Curve:
    """Measure a label-efficiency curve, fit its power law, and say what more labels would buy.

    Intervals of points resample subjects. Those of the rise, the exponent and the gains resample subjects and repeats,
    each by itself (Owen 2007), repeats so much wider as there are few (Rao & Wu 1988). Where nothing but draws
    differed, 95 % intervals of made-up curves held the truth for 85 of 100 with two repeats, for 90 with five and for
    93 with ten: take five or more. In the fit, sizes count by the precision of their mean over repeats.

    `advance` counts folds, of which there are `folds_of_curve`.

    Raises:
        ValueError: a plan of other subjects, no size that all folds allow, or as `cross_fit`.
    """
    sizes, everybody = sizes_of(strata, plan, config), sorted(strata.kinds)
    figure, scale = Figure.of(task, metric), scale_of(metric)
    # The first row is everybody, once each; then come the resamples.
    resamples = drawn(len(everybody), draws=config.draws, seed=[config.seed, 53])
    counts = np.concatenate([np.ones((1, len(everybody))), resamples])
    points: list[Point] = []
    tables: list[Float[np.ndarray, "draw repeat"]] = []
    for size in sizes:
        few = cross_fit(_with_few(answer, strata, size), plan, seed=config.seed, advance=advance)
        tables.append(figure.by_repeat([few.by_subject[subject] for subject in everybody], counts))
        points.append(Point(subjects=size, score=few.figure(task, metric), each=tuple(tables[-1][0].tolist())))
    curve = Curve(
        metric=metric,
        labelled=len(everybody),
        repeats=len(plan),
        margin=scale.margin(config.margin, points[-1].score.estimate),
        points=tuple(points),
    )
    return _read(curve, np.stack(tables, axis=2), scale, config)


def sizes_of(strata: Strata, plan: Sequence[Folds], config: CurveConfig) -> list[int]:
    """The sizes of a curve, from the least that shows a subject of each kind to the most that every fold leaves.

    Raises:
        ValueError: a plan of other subjects, or there is no size.
    """
    if any(folds.subjects != frozenset(strata.kinds) for folds in plan):
        raise ValueError("the plan parts other subjects than those of the strata")
    kept = [
        (folds.subjects - held, seed_of(config.seed, repeat, fold))
        for repeat, folds in enumerate(plan)
        for fold, held in enumerate(folds.held)
    ]
    most = min(len(subjects) for subjects, _ in kept)
    least = max(_fewest(strata, subjects, seed) for subjects, seed in kept)
    if least > most:
        raise ValueError(f"a curve begins at {least} labelled subjects, and the folds leave {most}")
    return sorted({least, most, *(size for size in config.sizes if least < size < most)})


def folds_of_curve(strata: Strata, plan: Sequence[Folds], config: CurveConfig) -> int:
    """How often something is fitted for a curve.

    Raises:
        ValueError: as `sizes_of`.
    """
    return len(sizes_of(strata, plan, config)) * sum(len(folds.held) for folds in plan)


def draw_order(strata: Strata, subjects: frozenset[str], seed: int) -> list[str]:
    """Subjects in the order in which they are drawn: the first N are the draw of N.

    As in `truth.draw`, classes take turns, and of subjects with times those with an event come as often as their share
    is. Where subjects show several things, those who show one that was not there yet come first.
    """
    names = sorted(subjects)
    order = [names[index] for index in np.random.default_rng([seed, 59]).permutation(len(names))]
    if strata.rule == "things":
        first = _cover(strata, order)
        return [*first, *(subject for subject in order if subject not in first)]
    queues: dict[str, list[str]] = {}
    for subject in order:
        queues.setdefault(next(iter(strata.kinds[subject]), ""), []).append(subject)
    places = {
        subject: (turn / len(queue) if strata.rule == "events" else turn, kind)
        for kind, queue in queues.items()
        for turn, subject in enumerate(queue)
    }
    return sorted(order, key=places.__getitem__)


def recommend(curve: Curve) -> str:
    """Say in a sentence what more labels would buy, by the numbers of the curve alone."""
    scale = scale_of(curve.metric)
    if curve.rise is not None and curve.flat:
        falls = curve.rise.value.high is not None and curve.rise.value.high < 0
        risen = _risen(curve.rise, curve.metric)
        return _little(curve, curve.rise.value, risen, f"the curve {'falls' if falls else 'is flat'}: {risen}")
    if curve.law is None:
        return f"too few to say: {curve.why}"
    if not curve.gains:
        return f"too few to say: the curve ends at half of the {curve.labelled} labelled subjects"
    near, far = curve.gains[0], curve.gains[-1]
    if far.value.high is not None and far.value.high < curve.margin:
        most = f"{_would(near, curve.metric)} no more than {_number(near.value.high or 0.0, scale)}"
        promised = f"{_would(far, curve.metric)} {_in_words(far.value, scale)}"
        return _little(curve, far.value, promised, f"the curve is flat: {most}")
    # Where a few more are too few to be noticed, what is told is what twice as many would buy.
    gain = near if near.value.estimate >= curve.margin else far
    words = f"by this curve {_would(gain, curve.metric)} {_in_words(gain.value, scale)}"
    sure = gain.value.low is not None and gain.value.low > 0 and gain.value.estimate >= curve.margin
    return words if sure else f"too few to say: {words}"


def _little(curve: Curve, gain: Interval, alike: str, verdict: str) -> str:
    """The verdict that more labels would buy little, unless nothing shows how rare errors are.

    The best figure there can be has no errors to resample: it bounds neither the rise nor what a law promises.
    """
    # Where the figure of the largest size is undefined, the curve was read without it.
    last = next(point.score for point in reversed(curve.points) if not math.isnan(point.score.estimate))
    if has_width(gain) and has_width(last):
        return f"{verdict}: more labels of this kind would buy little"
    return f"too few to say: {not_seen(last, curve.metric, alike=alike if has_width(last) else '')}"


def _read(curve: Curve, table: Float[np.ndarray, "draw repeat size"], scale: Scale, config: CurveConfig) -> Curve:
    """What the measured figures of draws say, of which the first is that of everybody."""
    known = np.isfinite(table[0]).all(axis=0)
    sizes = [point.subjects for point, there in zip(curve.points, known, strict=True) if there]
    if curve.repeats < 2:  # noqa: PLR2004
        return replace(curve, why="one repeat does not show how much one draw of subjects differs from another")
    if len(sizes) < FEWEST_SIZES:
        why = f"a curve needs {FEWEST_SIZES} sizes at which {curve.metric} is defined, and there are {len(sizes)}"
        return replace(curve, why=why)
    scores = table[:, :, known] * (-1.0 if scale.less_is_better else 1.0)
    chosen = np.random.default_rng([config.seed, 61]).integers(0, curve.repeats, scores.shape[:2])
    chosen[0] = np.arange(curve.repeats)
    means = defined_mean(scores, 1)
    # Resampling n repeats shows (n - 1) / n of the variance of their mean, which matters where they are few.
    wider = math.sqrt(curve.repeats / (curve.repeats - 1))
    means += wider * (defined_mean(np.take_along_axis(scores, chosen[:, :, None], axis=1), 1) - means)
    value = _interval(means[:, -1] - means[:, 0], curve.labelled, config.level)
    rise = Gain(have=sizes[0], then=sizes[-1], value=value)
    curve, words = replace(curve, rise=rise), _risen(rise, curve.metric)
    if value.low is None or value.high is None:
        return replace(curve, why=words)
    if value.high < curve.margin:
        return replace(curve, flat=True, why=words)
    if value.low <= 0:
        return replace(curve, why=f"{words}, which may be chance")
    best = -scale.best if scale.less_is_better else scale.best
    laws = fit_power_laws(sizes, means, _weights(scores[0]), ceiling=best)
    expected = laws.at(sizes[-1]) - laws.at(sizes[-2])
    late = _interval(means[:, -1] - means[:, -2] - expected, curve.labelled, config.level)
    return _extrapolate(curve, sizes, laws, late, config)


def _extrapolate(curve: Curve, sizes: Sequence[int], laws: PowerLaws, late: Interval, config: CurveConfig) -> Curve:
    """What the laws of draws say, of which the first is that of everybody; the last step beats it by `late`."""
    if math.isnan(laws.exponent[0]):
        return replace(curve, why=f"{curve.metric} does not rise from size to size in between")
    if late.low is not None and late.low > 0 and late.estimate >= curve.margin:
        # As of heads that are no better than chance until they have seen enough: no power law bends upwards.
        why = f"from {sizes[-2]} to {sizes[-1]} labelled subjects {curve.metric} rose faster than a power law can"
        return replace(curve, why=f"{why}; label more and draw the curve again")
    have, farthest = curve.labelled, 2 * sizes[-1]
    gains = tuple(
        Gain(have=have, then=then, value=_interval(laws.at(then) - laws.at(have), have, config.level))
        for then in sorted({min(have + config.step, farthest), farthest})
        if then > have
    )
    law = Law(
        asymptote=float(laws.asymptote[0]) * (-1.0 if scale_of(curve.metric).less_is_better else 1.0),
        drop=float(laws.drop[0]),
        exponent=_interval(laws.exponent, have, config.level),
        at_bound=bool(laws.at_bound[0]),
    )
    return replace(curve, law=law, gains=gains)


def _weights(scores: Float[np.ndarray, "repeat size"]) -> Float[np.ndarray, "size"]:
    """One over the variance of each size's mean, shrunk towards that of all sizes; even where nothing varies."""
    squares = ((scores - scores.mean(axis=0)) ** 2).sum(axis=0)
    freedom = len(scores) - 1
    variance = (squares + PRIOR * squares.mean() / freedom) / (freedom + PRIOR)
    return 1 / variance if variance.min() > 0 else np.ones(len(variance))


def _interval(values: Float[np.ndarray, "draw"], subjects: int, level: float) -> Interval:
    """The first value, with the middle part of the others."""
    rest = values[1:][~np.isnan(values[1:])]
    note = f"n={subjects}, no interval" if subjects < FEWEST_SUBJECTS else ""
    if len(rest) <= len(values) / 2:
        note = "undefined in most resamples, no interval"
    low, high = (None, None) if note else np.quantile(rest, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(estimate=float(values[0]), low=low, high=high, subjects=subjects, level=level, note=note)


def _with_few(answer: Answer, strata: Strata, size: int) -> Answer:
    def few(kept: frozenset[str], held: frozenset[str], seed: int) -> Outcomes:
        return answer(frozenset(draw_order(strata, kept, seed)[:size]), held, seed)

    return few


def _fewest(strata: Strata, subjects: frozenset[str], seed: int) -> int:
    """The least that can be learned from: a subject of each kind, and two where subjects are compared."""
    if strata.rule == "things":
        return max(1, len(_cover(strata, draw_order(strata, subjects, seed))))
    return len({kind for subject in subjects for kind in strata.kinds[subject]}) if strata.rule == "classes" else 2


def _cover(strata: Strata, order: Sequence[str]) -> dict[str, None]:
    """Those in an order who show something that nobody before them did."""
    seen: set[str] = set()
    first: dict[str, None] = {}
    for subject in order:
        if not strata.kinds[subject] <= seen:
            first[subject] = None
            seen |= strata.kinds[subject]
    return first


def _risen(rise: Gain, metric: str) -> str:
    words = _in_words(rise.value, scale_of(metric))
    return f"from {rise.have} to {rise.then} labelled subjects {metric} got better by {words}"


def _would(gain: Gain, metric: str) -> str:
    return f"{gain.then - gain.have} more labelled subjects would improve {metric} by"


def _in_words(value: Interval, scale: Scale) -> str:
    if value.low is None or value.high is None:
        return f"{_number(value.estimate, scale)} ({value.note})"
    return f"{_number(value.estimate, scale)} [{_number(value.low, scale)}, {_number(value.high, scale)}]"


def _number(value: float, scale: Scale) -> str:
    text = f"{value:.3g}" if scale.in_units else f"{value:.3f}"
    return text.removeprefix("-") if float(text) == 0 else text
