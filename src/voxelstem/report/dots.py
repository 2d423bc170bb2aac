"""Figures of the tables as dots with intervals: how they grow with labels, and what they are for each structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import NullLocator

from voxelstem.metrics import Interval, Score
from voxelstem.report.figures import GRID, INK, Picture, blank, to_png
from voxelstem.report.marks import BAND, Mark, handle, legend_below, marks_of, plain_axes, told, written

SHIFT = 1.025
"""Neighbouring contestants stand so far apart across, as a factor, that one's interval does not hide another's."""
CLOSEST = 1.15
"""Ticks nearer to each other than this factor would be printed over one another."""
GAP = 0.19
"""Between contestants in a row of a structure, rows being 1 apart."""


SPOKEN = {
    "dice": "Dice",
    "auroc": "AUROC",
    "ece": "calibration error",
    "mae": "mean absolute error",
    "r": "correlation r",
}
MOST_STRUCTURES = 40
"""In one picture; the table has them all."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Extrapolated:
    """What a contestant might reach with more labels, by a curve that was fitted to its figures."""

    name: str
    """Of a contestant that is shown."""
    labelled: Float[np.ndarray, "point"]
    estimate: Float[np.ndarray, "point"]
    low: Float[np.ndarray, "point"]
    high: Float[np.ndarray, "point"]
    band: str = "95 % of the gains by curves of resamples"
    """What lies between low and high, for the caption."""

    def __post_init__(self) -> None:
        """Guard the points.

        Raises:
            ValueError: lengths that differ, no point, counts that do not rise from 1 on, or a band that is no band or
                of which nobody says what it is.
        """
        sides = (self.estimate, self.low, self.high)
        if not len(self.labelled) or any(len(side) != len(self.labelled) for side in sides):
            raise ValueError("an extrapolation needs points, each with an estimate and a band")
        if self.labelled[0] < 1 or not (np.diff(self.labelled) > 0).all():
            raise ValueError("the numbers of labelled subjects must rise from 1 on")
        if not ((self.low <= self.estimate) & (self.estimate <= self.high)).all() or not self.band.strip():
            raise ValueError("an extrapolation lies within its band, and says what that is")


def label_efficiency_picture(
    scores: Sequence[Score], metric: str, *, extrapolated: Sequence[Extrapolated] = ()
) -> Picture:
    """Every contestant's figure against the number of labelled subjects, which doubles with each tick.

    Args:
        scores: Lines of the table; those of other metrics are passed over.
        metric: Which figure.
        extrapolated: Curves beyond the figures; drawn dashed, because nobody measured them.

    Raises:
        ValueError: no such figure, two of one contestant at one number of labels, too many contestants, or an
            extrapolation of somebody who is not shown.
    """
    by_name = _by_name(scores, metric)
    marks = marks_of(list(by_name))
    strangers = [one.name for one in extrapolated if one.name not in marks]
    if strangers:
        raise ValueError(f"'{strangers[0]}' is extrapolated but has no figure")
    spoken = _spoken(metric)
    figure = blank(6.2, 4.6)
    axes = figure.add_subplot(1, 1, 1)
    plain_axes(axes, across="labelled subjects", up=spoken)
    axes.set_xscale("log", base=2)
    counts = sorted({count for own in by_name.values() for count in own})
    nothing = min([count for count in counts if count] or [2]) / 2
    for place, (name, own) in enumerate(by_name.items()):
        _points(axes, own, marks[name], SHIFT ** (place - (len(by_name) - 1) / 2), nothing)
    for one in extrapolated:
        axes.fill_between(one.labelled, one.low, one.high, color=marks[one.name].colour, alpha=BAND, lw=0)
        axes.plot(one.labelled, one.estimate, color=marks[one.name].colour, lw=1.2, ls=(0, (2, 3)))
    _ticks(axes, counts, extrapolated, nothing)
    legend_below(figure, [handle(marks[name], written(name), marker=True) for name in by_name])
    said = [
        f"{name}: " + ", ".join(f"{told(value)} with {count}" for count, value in own.items())
        for name, own in by_name.items()
    ]
    said += [
        f"{one.name} extrapolated to {one.labelled[-1]:g}: {one.estimate[-1]:.2f} "
        f"[{one.low[-1]:.2f}, {one.high[-1]:.2f}]"
        for one in extrapolated
    ]
    return Picture(
        png=to_png(figure),
        alt=f"{spoken} against the number of labelled subjects. {'; '.join(said)}",
        caption=f"{spoken} on the same held-out subjects for every number of labelled ones. Bars: 95 % bootstrap "
        "intervals over the held-out subjects; they do not hold how much another choice of labelled subjects would "
        f"change, which is averaged over the draws that were made.{_beyond(extrapolated)}",
    )


def _by_name(scores: Sequence[Score], metric: str) -> dict[str, dict[int, Interval]]:
    """Contestant to number of labelled subjects to figure, the numbers rising."""
    found: dict[str, dict[int, Interval]] = {}
    for score in scores:
        own = found.setdefault(score.name, {}) if score.metric == metric else {}
        if score.labelled in own:
            raise ValueError(f"'{score.name}' has two figures of {metric} at {score.labelled} labelled subjects")
        own[score.labelled] = score.value
    return {name: dict(sorted(own.items())) for name, own in found.items()}


def _beyond(extrapolated: Sequence[Extrapolated]) -> str:
    if not extrapolated:
        return ""
    bands = "; ".join(dict.fromkeys(one.band for one in extrapolated))
    return (
        f" Thin dashes: extrapolated, not measured; the band about them holds {bands}. A curve that was fitted to few "
        "points may be wrong beyond them."
    )


def structures_picture(scores: Sequence[Score], metric: str = "dice") -> Picture:
    """The figure of each structure for every contestant, the first one's lowest at the top.

    Raises:
        ValueError: no such figure, two lines of one contestant, or too many contestants.
    """
    chosen = [score for score in scores if score.metric == metric and score.parts]
    names = [score.name for score in chosen]
    marks = marks_of(names)
    everything = list(dict.fromkeys(part for score in chosen for part in score.parts))
    first = chosen[0].parts
    ranked = sorted(everything, key=lambda part: (first[part].estimate if part in first else np.inf, part))
    order, hidden = ranked[:MOST_STRUCTURES], len(ranked[MOST_STRUCTURES:])
    figure = blank(6.2, 1.1 + (0.14 + 0.09 * len(chosen)) * len(order) + 0.2 * len(chosen))
    axes = figure.add_subplot(1, 1, 1)
    spoken = _spoken(metric)
    plain_axes(axes, across=spoken, up="")
    for row, part in enumerate(order):
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color=GRID, alpha=0.35, lw=0)
        for place, score in enumerate(chosen):
            if part in score.parts:
                height = row + GAP * (place - (len(chosen) - 1) / 2)
                _row(axes, score.parts[part], height, marks[score.name])
    subjects = [max(score.parts[part].subjects for score in chosen if part in score.parts) for part in order]
    labels = [f"{written(part)}  (n={count})" for part, count in zip(order, subjects, strict=True)]
    axes.set_yticks(range(len(order)), labels, fontsize=8.5)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(visible=False, axis="y")
    overall = [
        handle(marks[score.name], f"{told(score.value)}  {written(score.name)}", marker=True) for score in chosen
    ]
    legend_below(figure, overall, title=f"mean {spoken} over structures [95 % interval over subjects]")
    said = "; ".join(
        f"{score.name}: " + ", ".join(f"{part} {told(score.parts[part])}" for part in order if part in score.parts)
        for score in chosen
    )
    return Picture(
        png=to_png(figure),
        alt=f"{spoken} of {len(order)} structures. {said}",
        caption=f"{spoken} of each structure, mean over the n held-out subjects whose truth holds it. Bars: 95 % "
        "bootstrap intervals over subjects; a dot without a bar has too few. Structures stand in the order of the "
        "first contestant's figure, the lowest on top."
        + (f" {hidden} more, with higher figures, are left to the table." if hidden else ""),
    )


def _spoken(metric: str) -> str:
    return SPOKEN.get(metric, metric.replace("_", " "))


def _points(axes: Any, own: Mapping[int, Interval], mark: Mark, shift: float, nothing: float) -> None:
    """A contestant's figures in the order of labels; what needed none stands apart from the line of those that did."""
    across = [(count or nothing) * shift for count in own]
    for where, value in zip(across, own.values(), strict=True):
        if value.low is not None and value.high is not None:
            axes.plot([where] * 2, [value.low, value.high], color=mark.colour, lw=2, alpha=0.5)
    heights = [value.estimate for value in own.values()]
    alone = int(0 in own)
    for part in (slice(0, alone), slice(alone, None)):
        axes.plot(across[part], heights[part], color=mark.colour, ls=mark.line, lw=1.6, marker=mark.marker, ms=6)


def _ticks(axes: Any, labelled: Sequence[int], extrapolated: Sequence[Extrapolated], nothing: float) -> None:
    """A tick at each number that was measured, and at the end of what was not."""
    ends = {int(one.labelled[-1]) for one in extrapolated}
    shown = sorted({*labelled, *ends})
    places = [count or nothing for count in shown]
    kept: list[int] = []
    for at, place in enumerate(places):
        if not kept or place / places[kept[-1]] > CLOSEST:
            kept.append(at)
    axes.set_xticks([places[at] for at in kept], [f"{shown[at]}" for at in kept])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(places[0] / 1.25, places[-1] * 1.25)
    if ends:
        border = max(*labelled, nothing) * 1.12
        axes.axvline(border, color=INK, lw=0.8, ls=(0, (1, 3)))
        how: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "fontsize": 8, "color": INK, "va": "bottom"}
        axes.text(border * 1.02, 0.01, "extrapolated", **how)


def _row(axes: Any, value: Interval, height: float, mark: Mark) -> None:
    if value.low is not None and value.high is not None:
        axes.plot([value.low, value.high], [height] * 2, color=mark.colour, lw=2, alpha=0.5)
    axes.plot([value.estimate], [height], mark.marker, color=mark.colour, ms=5)
