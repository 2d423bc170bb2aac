"""Parts of the evaluation page about how its figures came to be: pretraining and test apart, folds, time and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from voxelstem.metrics import Interval
from voxelstem.report import page


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a contestant that was fitted took."""

    run: str
    """Beside which run it stands."""
    name: str
    what: str
    """What was fitted, in words."""
    seconds: float | None
    """None where nobody measured it."""
    peak_gib: float | None
    """The largest resident memory of the whole process until then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossed:
    """A line of the table of cross-fitted figures."""

    run: str
    name: str
    metric: str
    value: Interval
    over_scratch: Interval | None
    over_intensity: Interval | None


def crossed_section(lines: Sequence[Crossed], about: Sequence[str], notes: Sequence[str]) -> page.Section:
    """The table of figures over every labelled subject; `about` says of each run how it was cross-fitted."""
    told = (
        "Every labelled subject, of any split, predicted by a head that had not seen it: cross-fitted over outer folds "
        "of subjects, whatever the task chooses by itself chosen within each fold's training part. These are figures "
        "of the way to adapt and not of the run's own head, which the tables above judge. The network may have seen "
        "scans of the training split in its pretraining, without labels. With few subjects intervals are too narrow."
    )
    rows = [
        (
            f"{one.name}" if one.name == one.run else f"{one.name} (for {one.run})",
            one.metric.replace("_", " "),
            str(one.value.subjects),
            str(one.value),
            _signed(one.over_scratch),
            _signed(one.over_intensity),
        )
        for one in lines
    ]
    head = ("contestant", "metric", "n", "figure", "better than scratch by", "better than intensity by")
    return page.section(
        "Cross-fitted over all labelled subjects",
        page.paragraph(told),
        *(
            [page.table(head, rows, caption="95 % bootstrap intervals over subjects; differences paired")]
            if rows
            else []
        ),
        page.bullets([*about, *notes]),
    )


def costs_section(costs: Sequence[Cost]) -> page.Section:
    """Seconds and memory of everything that was fitted, as far as anybody measured them."""
    rows = [
        (
            one.name if one.name == one.run else f"{one.name} (for {one.run})",
            one.what,
            "NOT MEASURED" if one.seconds is None else f"{one.seconds:.1f} s",
            "NOT MEASURED" if one.peak_gib is None else f"{one.peak_gib:.2f} GiB",
        )
        for one in costs
    ]
    note = (
        "Seconds on the wall, on the machine that fitted it; of what rests on disk, when it was made. Memory is the "
        "peak of the whole process until then: whoever comes later stands on what came before."
    )
    head = ("contestant", "what was fitted", "seconds", "process peak")
    return page.section("What it took", page.table(head, rows, caption="Time and memory"), page.paragraph(note))


def exposure_section(lines: Sequence[str]) -> page.Section:
    """What is known of the pretraining and the tested subjects."""
    parts = [page.note(line) if "NOT MEASURED" in line else page.paragraph(line) for line in lines]
    return page.section("Did pretraining see the test subjects?", *parts)


def _signed(value: Interval | None) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None or math.isnan(value.estimate):
        return f"{value.estimate:+.3f} ({value.note})"
    word = "better" if value.low > 0 else "worse" if value.high < 0 else "unclear"
    return f"{value.estimate:+.3f} [{value.low:+.3f}, {value.high:+.3f}] {word}"
