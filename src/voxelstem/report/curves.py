"""Pictures of how well scores tell subjects apart, and how well stated probabilities come true.

All contestants of a picture were asked about the same subjects; otherwise one pair of axes would compare nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from voxelstem.heads.boxes import RATES, Matched
from voxelstem.report import sweeps
from voxelstem.report.figures import INK, Picture, blank, to_png
from voxelstem.report.marks import BAND, Mark, handle, legend_below, marks_of, plain_axes, told, written
from voxelstem.report.sweeps import DRAWS, Judged, Reliability, Trace

FEW_ALARMS = 0.1
"""The share of false alarms at which the sensitivity is read out for the text."""
SOFT = "#5b6673"
BANDS = 2
"""Contestants whose bands are drawn, the first ones: more would hide one another."""
_BAND = (
    f"Bands: between them lie 95 % of the curves of {DRAWS:,} resamples of the subjects, at each place across by "
    "itself; a whole curve leaves its band more often."
)
_PERFECT = (
    "{} parts these subjects without an error, and so does every resample of them: an interval without width does not "
    "say how rare errors are."
)
_ALL_FOUND = (
    "{} finds everything at each of these rates, and so it does in every resample of the subjects: an interval without "
    "width does not say how rare misses are."
)
_AVERAGED = "The curve of a contestant with several seeds is the mean of theirs."


def roc_picture(contestants: Sequence[Judged], *, about: str) -> Picture:
    """ROC curves in one pair of axes, each with its band and its AUROC with interval.

    Args:
        contestants: The run first, then what it must beat; at most five.
        about: What is told apart, for the text: `lesion: yes`.

    Raises:
        ValueError: contestants of different subjects, too many of them, or one kind of subjects is missing.
    """
    subjects, there = _same_subjects(contestants)
    traces = [sweeps.roc(judged) for judged in contestants]
    figure, axes = _square(across="1 - specificity (share of false alarms)", up="sensitivity")
    axes.plot([0, 1], [0, 1], color=SOFT, lw=0.9, ls=(0, (1, 2)))
    _draw(axes, traces)
    _name(figure, traces, "AUROC", [Line2D([], [], color=SOFT, lw=0.9, ls=(0, (1, 2)), label="chance: 0.50")])
    reads = [float(trace.line.after(np.array([FEW_ALARMS]))[0]) for trace in traces]
    said = "; ".join(
        f"{trace.name}: AUROC {told(trace.area)}, sensitivity {read:.2f} at {FEW_ALARMS:.0%} false alarms"
        for trace, read in zip(traces, reads, strict=True)
    )
    return Picture(
        png=to_png(figure),
        alt=f"ROC curves of {about}, {subjects} held-out subjects, {there} of them positive. {said}",
        caption=f"ROC of {about}: {there} of {subjects} held-out subjects are positive. "
        f"{_of_bands(traces)} Whether one contestant beats another is read from the paired differences in the table.",
    )


def precision_recall_picture(contestants: Sequence[Judged], *, about: str) -> Picture:
    """Precision against recall, with average precision, and the prevalence that blind guesses reach.

    Raises:
        ValueError: as `roc_picture`.
    """
    subjects, there = _same_subjects(contestants)
    prevalence = there / subjects
    traces = [sweeps.precision_recall(judged) for judged in contestants]
    figure, axes = _square(across="recall (sensitivity)", up="precision (positive predictive value)")
    axes.axhline(prevalence, color=SOFT, lw=0.9, ls=(0, (1, 2)))
    _draw(axes, traces)
    blind = Line2D([], [], color=SOFT, lw=0.9, ls=(0, (1, 2)), label=f"prevalence: {prevalence:.2f}")
    _name(figure, traces, "average precision", [blind])
    said = "; ".join(f"{trace.name}: average precision {told(trace.area)}" for trace in traces)
    return Picture(
        png=to_png(figure),
        alt=f"Precision against recall of {about}, {subjects} held-out subjects, prevalence {prevalence:.2f}. {said}",
        caption=f"Precision and recall of {about}. The dotted line is the prevalence among these {subjects} held-out "
        f"subjects ({there} positive), which guessing reaches; where a disease is rarer, precision is lower. "
        f"Average precision is the area under the steps. {_of_bands(traces)}",
    )


def reliability_picture(contestants: Sequence[Judged], *, about: str, bins: int = 10) -> Picture:
    """For each contestant how often stated probabilities came true, above how many subjects got them.

    Raises:
        ValueError: contestants of different subjects, too many of them, what is no probability, or no bin.
    """
    subjects, there = _same_subjects(contestants)
    shown = [sweeps.reliability(judged, bins=bins) for judged in contestants]
    marks = marks_of([one.name for one in shown])
    columns, rows = min(len(shown), 2), -(-len(shown) // 2)
    figure = blank(3.1 * columns + 0.1, 3.8 * rows)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3.2, 1] * rows)
    for place, one in enumerate(shown):
        row, column = divmod(place, 2)
        above = figure.add_subplot(grid[2 * row, column])
        _diagram(above, one, marks[one.name], first=column == 0)
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=above)
        _tally(below, one, marks[one.name], first=column == 0)
    said = "; ".join(
        f"{one.name}: calibration error {told(one.ece)}, stated and came true "
        + ", ".join(f"{bin_.mean_chance:.2f} and {bin_.came_true.estimate:.2f} (n={bin_.rows})" for bin_ in one.bins)
        for one in shown
    )
    several = (
        " Where several seeds stand for a contestant, n is their mean." if any(o.repeats > 1 for o in shown) else ""
    )
    return Picture(
        png=to_png(figure),
        alt=f"Reliability of the stated probability of {about}, {subjects} held-out subjects, {there} positive. {said}",
        caption=f"Stated probability of {about} and how often it came true, in {bins} bins of one width; on the dotted "
        "line both are equal. Bars about the points: Wilson's 95 % interval of the share in that bin. Below: subjects "
        f"in each bin (n).{several} ECE: expected calibration error with its 95 % bootstrap interval over subjects; it "
        "grows where subjects are few, so compare only what was measured on the same ones.",
    )


def froc_picture(contestants: Mapping[str, Mapping[str, Sequence[Matched]]], *, about: str) -> Picture:
    """FROC curves: what share is found at how many false positives per scan.

    Args:
        contestants: Name to subject to what was matched in each repeat; the run first.
        about: What is looked for.

    Raises:
        ValueError: contestants of different subjects, too many of them, or nothing is there to be found.
    """
    asked = [frozenset(by_subject) for by_subject in contestants.values()]
    if len(set(asked)) != 1:
        raise ValueError("contestants of one picture must have been asked about the same subjects")
    traces = [sweeps.froc(name, by_subject) for name, by_subject in contestants.items()]
    some = [matched[0] for matched in next(iter(contestants.values())).values()]
    truths, scans = sum(one.truths for one in some), sum(one.scans for one in some)
    figure, axes = _square(across="false positives per scan", up="sensitivity")
    axes.set_xscale("log", base=2)
    axes.set_xlim(RATES[0], RATES[-1])
    axes.set_xticks(RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.minorticks_off()
    _draw(axes, traces)
    _name(figure, traces, "mean sensitivity at the seven ticks", [])
    said = "; ".join(
        f"{trace.name}: {told(trace.area)} on average, "
        + ", ".join(f"{trace.line.after(np.array([rate]))[0]:.2f} at {rate:g}" for rate in (RATES[0], 1.0, RATES[-1]))
        for trace in traces
    )
    return Picture(
        png=to_png(figure),
        alt=f"FROC curves of {about}: sensitivity at 1/8 to 8 false positives per scan, {truths} things to be found in "
        f"{scans} scans of {len(some)} held-out subjects. {said}",
        caption=f"FROC of {about}: {truths} to be found in {scans} scans of {len(some)} held-out subjects. The figure "
        "in the legend is the mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives per scan. "
        f"{_of_bands(traces, perfect=_ALL_FOUND)}",
    )


def _same_subjects(contestants: Sequence[Judged]) -> tuple[int, int]:
    """How many subjects there are, and how many of them are positive."""
    if not contestants or any(not np.array_equal(one.truth, contestants[0].truth) for one in contestants):
        raise ValueError("contestants of one picture must have been asked about the same subjects")
    return len(contestants[0].truth), int(contestants[0].truth.sum())


def _square(*, across: str, up: str) -> tuple[Figure, Any]:
    figure = blank(5.6, 5.7)
    axes = figure.add_subplot(1, 1, 1)
    plain_axes(axes, across=across, up=up)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.02)
    return figure, axes


def _draw(axes: Any, traces: Sequence[Trace]) -> None:
    """Lines over bands, those of the first contestant on top of the others'."""
    marks = marks_of([trace.name for trace in traces])
    for depth, trace in enumerate(reversed(traces)):
        mark, band = marks[trace.name], trace.band
        if band is not None and trace in traces[:BANDS]:
            axes.fill_between(band.x, band.low, band.high, color=mark.colour, alpha=BAND, lw=0, zorder=1.5)
        axes.plot(trace.line.x, trace.line.y, color=mark.colour, ls=mark.line, lw=1.8, zorder=3 + depth)


def _name(figure: Figure, traces: Sequence[Trace], what: str, more: Sequence[Line2D]) -> None:
    marks = marks_of([trace.name for trace in traces])
    shown = [handle(marks[trace.name], f"{told(trace.area)}  {written(trace.name)}{_seeds(trace)}") for trace in traces]
    legend_below(figure, [*shown, *more], title=f"{what} [95 % interval over subjects]")


def _seeds(trace: Trace) -> str:
    return f", mean of {trace.repeats}" if trace.repeats > 1 else ""


def _of_bands(traces: Sequence[Trace], *, perfect: str = _PERFECT) -> str:
    """What the bands are and whose, or why there are none."""
    shown = [trace for trace in traces[:BANDS] if trace.band is not None]
    bare = list(dict.fromkeys(trace.area.note for trace in traces[:BANDS] if trace.band is None))
    said = (
        [f"{_BAND} Shown for {_listed(shown)} only, so that all lines can be seen."] if len(traces) > BANDS else [_BAND]
    )
    said = said if shown else []
    said += [f"No band where there can be none ({'; '.join(bare)})."] if bare else []
    said += [perfect.format(trace.name) for trace in traces if trace.area.low == 1]
    return " ".join([*said, _AVERAGED] if any(trace.repeats > 1 for trace in traces) else said)


def _listed(traces: Sequence[Trace]) -> str:
    return " and ".join(trace.name for trace in traces)


def _diagram(axes: Any, one: Reliability, mark: Mark, *, first: bool) -> None:
    seeds = f" (mean of {one.repeats})" if one.repeats > 1 else ""
    title = f"{written(one.name)}{seeds}\nECE {told(one.ece)}"
    plain_axes(axes, across="", up="came true" if first else "", title=title)
    axes.plot([0, 1], [0, 1], color=SOFT, lw=0.9, ls=(0, (1, 2)))
    for bin_ in one.bins:
        axes.plot(
            [bin_.mean_chance] * 2, [bin_.came_true.low, bin_.came_true.high], color=mark.colour, lw=1.6, alpha=0.6
        )
    shares = [bin_.came_true.estimate for bin_ in one.bins]
    axes.plot([bin_.mean_chance for bin_ in one.bins], shares, color=mark.colour, lw=1.0, marker=mark.marker, ms=5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.tick_params(labelbottom=False)


def _tally(axes: Any, one: Reliability, mark: Mark, *, first: bool) -> None:
    plain_axes(axes, across="stated probability", up="n" if first else "")
    for bin_ in one.bins:
        axes.bar(bin_.low, bin_.rows, width=bin_.high - bin_.low, align="edge", color=mark.colour, ec="white", lw=0.6)
        middle = (bin_.low + bin_.high) / 2
        axes.text(middle, bin_.rows, f"{bin_.rows}", ha="center", va="bottom", fontsize=7, color=INK)
    axes.set_ylim(0, 1.4 * max(bin_.rows for bin_ in one.bins))
    axes.set_yticks([])
    axes.grid(visible=False)
