"""Parts of the evaluation page beside the scores: how sure runs may be, which is better, and shifts of prevalence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from voxelstem.metrics import Interval
from voxelstem.report import page

SAID = {
    "ece": "expected calibration error (0 is best)",
    "brier": "Brier score (0 is best)",
    "slope": "calibration slope (1 is best, below is boasting)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sureness:
    """How far a run's probabilities, sets and intervals can be taken at their word, on the test subjects."""

    run: str
    subjects: int
    """Whom calibrator and sets were fitted to; 0 where there are none."""
    stated: Mapping[str, Interval]
    """`ece`, `brier` and `slope` of probabilities as the head states them; empty where it states none."""
    calibrated: Mapping[str, Interval]
    """The same after calibration; empty without a calibrator."""
    covered: Interval | None
    """Share of subjects whose truth lies in the conformal set or interval."""
    level: float | None
    """The share that was promised."""
    set_size: float | None
    """Mean number of classes that cannot be ruled out."""
    flagged: Interval | None
    """Share of test scans that are unlike the labelled ones."""
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Two runs on the same test subjects."""

    task: str
    metric: str
    one: str
    other: str
    difference: Interval
    """By how much `one` is better, paired by subject."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prevalence:
    """How often each class occurs where a run learned and where it is tested."""

    run: str
    labelled: Mapping[str, float]
    tested: Mapping[str, float]


def evidence_sections(
    sure: Sequence[Sureness], compared: Sequence[Compared], shares: Sequence[Prevalence]
) -> list[page.Section]:
    """The sections for which there is something to say."""
    found: list[page.Section] = []
    if sure:
        found.append(page.section("How sure the runs may be", *(part for one in sure for part in _sure(one))))
    if compared:
        rows = [(f"{pair.one} - {pair.other}", pair.task, pair.metric, str(pair.difference)) for pair in compared]
        note = "On the same test subjects, paired by subject; above 0 the first is better, also where less is better."
        table = page.table(("runs", "task", "metric", "difference"), rows, caption="One run against another")
        found.append(page.section("Runs against each other", page.paragraph(note), table))
    if shares:
        found.append(page.section("Prevalence", *(_shares(one) for one in shares)))
    return found


def _sure(one: Sureness) -> list[str]:
    rows = [
        (SAID[name], str(value), str(one.calibrated[name]) if name in one.calibrated else "not calibrated")
        for name, value in one.stated.items()
    ]
    parts = [page.table(("figure", "as stated", "calibrated"), rows, caption=one.run)] if rows else []
    lines = [f"{one.run}: {note}" for note in one.notes]
    if one.subjects:
        how = "each answered by a head of another fold"
        lines.append(f"{one.run}: calibrated on {one.subjects} labelled subjects, {how}")
    if one.covered is not None and one.level is not None:
        what = "sets" if one.set_size is not None else "intervals"
        size = "" if one.set_size is None else f", {one.set_size:.2f} classes in a set on average"
        lines.append(f"{one.run}: {what} made to hold the truth for {one.level:.0%} held it for {one.covered}{size}")
    if one.flagged is not None:
        lines.append(f"{one.run}: flagged as unlike the labelled scans: {one.flagged}")
    return [*parts, *([page.bullets(lines)] if lines else [])]


def _shares(one: Prevalence) -> str:
    rows = [(name, f"{one.labelled[name]:.1%}", f"{one.tested.get(name, 0.0):.1%}") for name in one.labelled]
    return page.table(("class", "where it learned", "where it is tested"), rows, caption=one.run)
