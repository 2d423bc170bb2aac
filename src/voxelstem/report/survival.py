"""How long subjects of higher and of lower predicted risk went without the event, and how many were watched still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.lines import Line2D

from voxelstem.heads.survival import Watched, kaplan_meier
from voxelstem.report.agreement import NORMAL_95
from voxelstem.report.figures import INK, Picture, blank, to_png
from voxelstem.report.marks import BAND, MARKS, Mark, handle, legend_below, plain_axes, written

GROUPS = ("higher risk", "lower risk")
_MARKS = {GROUPS[0]: MARKS[1], GROUPS[1]: MARKS[0]}
SOFT = "#5b6673"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outlook:
    """Chance of no event in a group, with pointwise 95 % limits, from each time on."""

    time: Float[np.ndarray, "step"]
    chance: Float[np.ndarray, "step"]
    low: Float[np.ndarray, "step"]
    high: Float[np.ndarray, "step"]
    """NaN where the chance is 0: nothing can be said of its spread any more."""


def outlook(watched: Watched) -> Outlook:
    """Kaplan and Meier's curve with Greenwood's variance, limits on the scale of log(-log S), within [0, 1].

    Kalbfleisch and Prentice 2002, section 1.4.1. Where no event has come yet the limits are 1.
    """
    curve = kaplan_meier(watched)
    here = watched.event.astype(np.float64)
    came = np.array([here[watched.time == time].sum() for time in curve.time])
    left = at_risk(watched, curve.time)
    with np.errstate(divide="ignore", invalid="ignore"):
        greenwood = np.cumsum(np.where(came > 0, came / (left * (left - came)), 0.0))
        spread = NORMAL_95 * np.sqrt(greenwood) / np.abs(np.log(curve.value))
        low, high = curve.value ** np.exp(spread), curve.value ** np.exp(-spread)
    sure, over = curve.value >= 1, curve.value <= 0
    low, high = (np.where(sure, 1.0, np.where(over, np.nan, side)) for side in (low, high))
    return Outlook(time=curve.time, chance=curve.value, low=low, high=high)


def at_risk(watched: Watched, times: Float[np.ndarray, "moment"]) -> Int[np.ndarray, "moment"]:
    """How many were watched until each time or longer without an event before it."""
    return (watched.time[None] >= times[:, None]).sum(axis=1)


def kaplan_meier_picture(
    watched: Watched, risk: Float[np.ndarray, "subject"], *, threshold: float, name: str, unit: str
) -> Picture:
    """Curves of those above the threshold and of all others, with the numbers at risk under the axis.

    Args:
        watched: The held-out subjects.
        risk: What a contestant said of each; higher is worse.
        threshold: The median risk of the labelled subjects: it must not be looked up among those who are judged.
        name: Of the contestant.
        unit: Of the times; the label file's own.

    Raises:
        ValueError: not one finite risk for each subject.
    """
    if len(risk) != len(watched) or not np.isfinite([*risk, threshold]).all():
        raise ValueError(f"{len(watched)} subjects need as many finite risks and a threshold, got {len(risk)}")
    groups = {GROUPS[0]: risk > threshold, GROUPS[1]: risk <= threshold}
    held = {group: _only(watched, who) for group, who in groups.items() if who.any()}
    figure = blank(6.2, 5.2)
    axes, table = figure.subplots(2, 1, height_ratios=[5, 1], sharex=True)
    plain_axes(axes, across="", up="share without the event", title=written(name))
    ticks = _ticks(float(watched.time.max()))
    for group, some in held.items():
        _draw(axes, some, _MARKS[group])
    _all(axes, watched)
    axes.set_xlim(0, float(watched.time.max()) * 1.02 or 1.0)
    axes.set_ylim(-0.02, 1.03)
    axes.set_xticks(ticks)
    axes.tick_params(labelbottom=True)
    axes.set_xlabel(f"time ({unit})" if unit else "time", fontsize=9, color=INK)
    _numbers(table, held, ticks)
    legend_below(figure, [*(_handle(group, some) for group, some in held.items()), _handle_of_all(watched)])
    return Picture(png=to_png(figure), alt=_in_words(held, ticks, name, unit), caption=_caption(held, watched))


def _only(watched: Watched, who: Bool[np.ndarray, "subject"]) -> Watched:
    return Watched(time=watched.time[who], event=watched.event[who])


def _ticks(last: float) -> list[float]:
    """About five round times from 0 on, the last of them not beyond the last that was observed."""
    if last <= 0:
        return [0.0]
    size = 10.0 ** np.floor(np.log10(last / 5))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if last / (size * factor) <= 6)  # noqa: PLR2004
    return [float(number * step) for number in range(int(last / step + 1e-9) + 1)]


def _steps(one: Outlook, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of a curve that falls in steps, from (0, 1) on."""
    return np.repeat(np.append(0.0, one.time), 2)[1:], np.repeat(np.append(1.0, values), 2)[:-1]


def _draw(axes: Any, watched: Watched, mark: Mark) -> None:
    one = outlook(watched)
    across, low = _steps(one, one.low)
    axes.fill_between(across, low, _steps(one, one.high)[1], color=mark.colour, alpha=BAND, lw=0)
    axes.plot(*_steps(one, one.chance), color=mark.colour, ls=mark.line, lw=1.8)
    ended = watched.time[~watched.event]
    heights = np.append(1.0, one.chance)[np.searchsorted(one.time, ended, side="right")]
    axes.plot(ended, heights, ls="", marker="|", ms=6, mew=1.1, color=mark.colour)


def _all(axes: Any, watched: Watched) -> None:
    one = outlook(watched)
    axes.plot(*_steps(one, one.chance), color=SOFT, lw=1.0, ls=(0, (1, 2)))


def _numbers(axes: Any, held: dict[str, Watched], ticks: list[float]) -> None:
    """A line of numbers for each group, under the times to which they belong."""
    axes.axis("off")
    axes.set_ylim(-0.6, len(held) + 0.4)
    axes.text(0.0, len(held) - 0.2, "number at risk", fontsize=8, color=INK, transform=axes.get_yaxis_transform())
    for row, (group, some) in enumerate(held.items()):
        for tick, count in zip(ticks, at_risk(some, np.array(ticks)), strict=True):
            across = "left" if tick == 0 else "center"
            axes.text(tick, len(held) - 1 - row, f"{count}", ha=across, fontsize=8.5, color=_MARKS[group].colour)
        label = axes.text(-0.01, len(held) - 1 - row, group, ha="right", fontsize=8.5, color=_MARKS[group].colour)
        label.set_transform(axes.get_yaxis_transform())


def _handle(group: str, some: Watched) -> Any:
    return handle(_MARKS[group], f"{group}: {len(some)} subjects, {int(some.event.sum())} with the event")


def _handle_of_all(watched: Watched) -> Any:
    return Line2D([], [], color=SOFT, lw=1.0, ls=(0, (1, 2)), label=f"all {len(watched)} held-out subjects")


def _in_words(held: dict[str, Watched], ticks: list[float], name: str, unit: str) -> str:
    parts: list[str] = []
    for group, some in held.items():
        one = outlook(some)
        inside = [tick for tick in ticks[1:] if tick <= one.time[-1]]
        places = np.searchsorted(one.time, inside, side="right")
        chances = np.append(1.0, one.chance)[places]
        read = ", ".join(
            f"{chance:.2f} at {tick:g} ({count} at risk)"
            for chance, tick, count in zip(chances, inside, at_risk(some, np.array(inside)), strict=True)
        )
        parts.append(f"{group}, {len(some)} subjects, {int(some.event.sum())} events: {read or 'no tick reached'}")
    of = f" in {unit}" if unit else ""
    return f"Share without the event over time{of} by the risk that {name} predicted. " + "; ".join(parts)


def _caption(held: dict[str, Watched], watched: Watched) -> str:
    empty = [group for group in GROUPS if group not in held]
    alone = f" No held-out subject is of {empty[0]}." if empty else ""
    return (
        f"Kaplan-Meier curves of {len(watched)} held-out subjects, parted at the median risk of the labelled subjects."
        f"{alone} Bands: pointwise 95 % limits (Greenwood's variance, log-log scale); small upright strokes: subjects "
        "whose watch ended there. Where few are at risk, a curve says little. Two groups hide how finely risks are "
        "ordered: that is what the C-index in the table measures."
    )
