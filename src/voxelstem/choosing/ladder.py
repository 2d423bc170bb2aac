"""The ladder: ways to adapt from cheap to dear, climbed while that pays.

**The rule.** A rung is taken in place of the best so far if its figure is better by more than a margin, and if its
paired interval does not reach down to worse by that margin. Both are measured on the same subjects in the same folds,
none of whom the heads had seen. Otherwise the best so far stays, so ties go to the cheaper.

*Why not ask for significance.* With tens of labelled subjects an interval around a difference is a tenth wide, and
hardly anything would ever be climbed to. The two mistakes are not alike either: a rung taken for nothing costs its
seconds, as the lower end sees to it that little is lost; a rung that is missed is missed in every scan to come. So a
gain must be likely and large enough to matter (the estimate), and a loss that matters must be unlikely (the lower end,
as in trials of non-inferiority: Piaggio et al. 2012).

*Why the best so far, and not the rung below.* Small steps add up: two rungs that each gain less than the margin may
gain more together.

**Grace.** One rung that does not pay is not the end, two in a row are. Rungs differ in kind: pooling by attention does
nothing for what all patches show alike, and a change of the network may. But each costs many times the one before, and
if neither another head nor another network helps, it is the labels that are missing. A rung also is not tried if
nothing that matters is left to gain.

The figure of the rung that won is the best of several on the same subjects, so it is a little too good (Cawley & Talbot
2010): what is claimed of it belongs to subjects that had no part in this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from voxelstem.certainty.crossfit import CrossFitted, as_facts, scale_of
from voxelstem.choosing.unseen import has_width, not_seen
from voxelstem.errors import AuditError, ConfigError, VoxelstemError
from voxelstem.metrics import Interval
from voxelstem.protocols import Task

HEAD = ("mode", "figure", "better than the best before", "seconds", "decision")
"""Columns of `Climb.rows`."""
CANNOT = (ValueError, AuditError, ConfigError)
"""What is raised where the subjects of a fold, or the settings, do not let anything be learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LadderConfig:
    """When a dearer way to adapt pays."""

    margin: float = 0.02
    """A difference that matters; of metrics in the labels' unit, a share of the first rung's figure."""
    grace: int = 1
    """So many rungs in a row may fail to pay before the climb ends."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a margin that is not positive, or a negative grace.
        """
        if not 0 < self.margin < math.inf or self.grace < 0:
            raise ValueError(f"margin must be positive and grace not negative, got {self.margin} and {self.grace}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """What came of a rung: every labelled subject as unseen, and how long that took."""

    fitted: CrossFitted
    seconds: float

    def __post_init__(self) -> None:
        """Guard the time.

        Raises:
            ValueError: it is negative or no number.
        """
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds must be a number >= 0, got {self.seconds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A way to adapt, and how to try it. It is tried at most once, and not before its turn."""

    mode: str
    attempt: Callable[[], Tried]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What was found on a rung."""

    mode: str
    figure: Interval
    """NaN where nothing could be learned in one of the folds, as `why` says."""
    against: str
    """The best so far; empty on the first rung."""
    gain: Interval | None
    """By how much the figure is better than that one's, subject by subject; None on the first rung, and where nothing
    could be learned."""
    seconds: float
    taken: bool
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Climb:
    """What was tried, what was chosen, and why it ended there."""

    metric: str
    margin: float
    """In the metric's own unit."""
    chosen: str
    steps: tuple[Step, ...]
    untried: tuple[str, ...]
    stopped: str
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    """Rungs that these settings do not allow, and why."""

    @property
    def seconds(self) -> float:
        """How long all of it took."""
        return math.fsum(step.seconds for step in self.steps)

    def facts(self) -> dict[str, Any]:
        """Everything as plain data for JSON; an undefined figure becomes None."""
        return as_facts(self) | {"seconds": self.seconds}

    def rows(self) -> list[tuple[str, ...]]:
        """A table for a page, below `HEAD`: a row for each rung, also for those that were not tried."""
        tried = [
            (
                step.mode,
                f"{self.metric} {step.figure}" if step.figure.subjects else "",
                "" if step.gain is None else f"{step.gain} ({step.against})",
                f"{step.seconds:.1f}",
                f"{'taken' if step.taken else 'not taken'}: {step.why}",
            )
            for step in self.steps
        ]
        others = dict.fromkeys(self.untried, self.stopped) | dict(self.left_out)
        return [*tried, *((mode, "", "", "", f"not tried: {why}") for mode, why in others.items())]


def said(error: Exception) -> str:
    """The cause alone, without the hint of what to do next."""
    return error.problem if isinstance(error, VoxelstemError) else str(error)


def climb(
    rungs: Sequence[Rung],
    *,
    task: Task,
    metric: str,
    config: LadderConfig,
    left_out: Mapping[str, str] | None = None,
) -> Climb:
    """Try rungs from cheap to dear by the rule above.

    A rung on which nothing can be learned in one of the folds did not pay, and says why. On the first there is nothing
    to fall back on: what it raises goes through.

    `left_out` names rungs that the settings do not allow, and why: they are told beside the others.

    Raises:
        ValueError: no rung, one twice, rungs that were cross-fitted with different plans, or a metric of which nobody
            knows whether more is better.
    """
    modes = tuple(rung.mode for rung in rungs)
    if not rungs or len(set(modes)) < len(modes):
        raise ValueError(f"a ladder has rungs, each of them once, got {', '.join(modes) or 'none'}")
    scale = scale_of(metric)
    best = rungs[0].attempt()
    figure = best.fitted.figure(task, metric)
    margin = scale.margin(config.margin, figure.estimate)
    first = _begun(modes[0], figure, best.seconds)
    steps, chosen, failed, stopped = [first], first, 0, "there is no rung above"
    for rung in rungs[1:]:
        left = abs(scale.best - chosen.figure.estimate)
        if left <= margin:
            stopped = _nothing_left(chosen, metric, left=left, margin=margin)
            break
        if failed > config.grace:
            stopped = "one rung did not pay" if failed == 1 else f"{failed} rungs in a row did not pay"
            break
        began = time.monotonic()
        try:
            tried = rung.attempt()
        except CANNOT as error:
            steps.append(_unlearned(rung.mode, error, against=chosen.mode, seconds=time.monotonic() - began))
            failed += 1
            continue
        step = _judge(rung.mode, tried, best, against=chosen.mode, task=task, metric=metric, margin=margin)
        steps.append(step)
        if step.taken:
            best, chosen = tried, step
        failed = 0 if step.taken else failed + 1
    return Climb(
        metric=metric,
        margin=margin,
        chosen=chosen.mode,
        steps=tuple(steps),
        untried=modes[len(steps) :],
        stopped=stopped,
        left_out=left_out or {},
    )


def _nothing_left(chosen: Step, metric: str, *, left: float, margin: float) -> str:
    """Why the climb ends where nothing better that matters can be measured."""
    if not has_width(chosen.figure):
        return f"nothing better than {chosen.mode} can be measured here: {not_seen(chosen.figure, metric)}"
    return f"{chosen.mode} leaves {left:.3g} to gain at most, which is within the margin of {margin:.3g}"


def _begun(mode: str, figure: Interval, seconds: float) -> Step:
    why = "the cheapest is where the climb begins"
    return Step(mode=mode, figure=figure, against="", gain=None, seconds=seconds, taken=True, why=why)


def _unlearned(mode: str, error: Exception, *, against: str, seconds: float) -> Step:
    return Step(
        mode=mode,
        figure=Interval(estimate=math.nan, low=None, high=None, subjects=0, note="not learned"),
        against=against,
        gain=None,
        seconds=seconds,
        taken=False,
        why=f"in one of the folds nothing could be learned: {said(error)}",
    )


def _judge(mode: str, tried: Tried, best: Tried, *, against: str, task: Task, metric: str, margin: float) -> Step:
    gain = tried.fitted.better_than(best.fitted, task, metric)
    taken, why = decide(gain, margin)
    return Step(
        mode=mode,
        figure=tried.fitted.figure(task, metric),
        against=against,
        gain=gain,
        seconds=tried.seconds,
        taken=taken,
        why=why,
    )


def decide(gain: Interval, margin: float) -> tuple[bool, str]:
    """Whether a rung pays that is better by `gain` than the best so far, and why."""
    if math.isnan(gain.estimate):
        return False, "the difference is undefined"
    if not gain.estimate > margin:
        return False, f"the gain is not above the margin of {margin:.3g}"
    if gain.low is None:
        return False, f"nobody can say how sure the gain is ({gain.note})"
    if not gain.low > -margin:
        return False, f"it may as well be worse by the margin of {margin:.3g} or more"
    return True, f"the gain is above the margin of {margin:.3g}, and a loss of as much is unlikely"
