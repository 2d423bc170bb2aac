"""Parts of the evaluation page beside the scores: how sure runs may be, which is better, and shifts of prevalence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from voxelstem.certainty.vennabers import IntervalBin
from voxelstem.metrics import Interval
from voxelstem.report import page

RATES = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
}
SAID = {
    "ece": "expected calibration error (0 is best)",
    "brier": "Brier score (0 is best)",
    "slope": "calibration slope (1 is best, below is boasting)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """Between which ends the probability of one class was said to lie on average, and how often it came true."""

    overall: IntervalBin
    """All answers or boxes; its share has an interval over subjects."""
    bins: tuple[IntervalBin, ...] = ()
    """Those of similar ends, where each is of another subject."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VolumesHeld:
    """How often stated intervals of volumes held the true volume, on the test subjects."""

    level: float
    """The share that was promised."""
    overall: Interval
    """Mean over subjects of the share of their structures; Wilson's interval of as many answers as subjects."""
    by_structure: Mapping[str, Interval]
    volumes: int
    """How many were stated."""
    missed: int
    """How many more structures experts drew and the run did not find: these have no interval."""


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
    by_group: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    """Facet (`sex`, `scanner`) to group to the share of its subjects whose truth was held."""
    flagged_by_centres: Interval | None = None
    """The same share as `flagged`, by the distance to the nearest class's mean."""
    width: float | None = None
    """Of the interval of the answer's probability, on average."""
    bins: tuple[IntervalBin, ...] = ()
    """Subjects of similar intervals, and how often the answer was right."""
    boxes: int = 0
    """On how many boxes `stated` and `calibrated` rest; 0 of other tasks."""
    ends: Mapping[str, Ends] = field(default_factory=dict[str, Ends])
    """Class to the ends of its probability, where each class is there or not, and of boxes."""
    volumes: VolumesHeld | None = None
    unmeasured: Mapping[str, str] = field(default_factory=dict[str, str])
    """What findings of such a task may state and was not held to its word here, and why."""


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
    shift: Mapping[str, Interval] = field(default_factory=dict)
    """By how much more often the class occurs where it is tested, with an interval for all classes at once."""

    @property
    def words(self) -> str:
        """What the shift means; empty where there is nothing to compare."""
        moved = [name for name, by in self.shift.items() if by.low is not None and by.high is not None]
        moved = [name for name in moved if (self.shift[name].low or 0.0) > 0 or (self.shift[name].high or 0.0) < 0]
        if not self.shift:
            return ""
        if not moved:
            return "No class is shown to be more or less common than where it learned: intervals include zero."
        told = ", ".join(f"'{one}' {self.labelled[one]:.0%} to {self.tested[one]:.0%}" for one in moved)
        return (
            f"Prevalence shift beyond chance: {told}. Stated probabilities, predictive values and thresholds that were "
            "right where it learned need not be right here; AUROC, sensitivity and specificity do not depend on shares."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatingPoint:
    """What a run's yes and no are worth at one threshold; without one, `why` says why it was not measured."""

    run: str
    positive: str
    """The class that is called yes."""
    threshold: float | None = None
    """Of the probability as the head states it."""
    shown: float | None = None
    """The same threshold of the probability as findings show it: after calibration, where the run has any."""
    fixed_on: str = ""
    figures: Mapping[str, Interval] = field(default_factory=dict)
    """`sensitivity`, `specificity`, `ppv` and `npv` on the test subjects, if that threshold were the rule."""
    answers: Mapping[str, Interval] = field(default_factory=dict[str, Interval])
    """The same of what `predict` answers, which is the more probable class, on the same subjects."""
    by_group: Mapping[str, Mapping[str, Mapping[str, Interval]]] = field(default_factory=dict)
    """Facet to group to the same figures."""
    why: str = ""


def evidence_sections(
    sure: Sequence[Sureness],
    compared: Sequence[Compared],
    shares: Sequence[Prevalence],
    points: Sequence[OperatingPoint] = (),
) -> list[page.Section]:
    """The sections for which there is something to say."""
    found: list[page.Section] = []
    if sure:
        found.append(page.section("How sure the runs may be", *(part for one in sure for part in _sure(one))))
    if points:
        found.append(page.section("At a fixed threshold", *(part for one in points for part in _point(one))))
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
        (SAID[name], _figure(value), _figure(one.calibrated[name]) if name in one.calibrated else "not calibrated")
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
    if one.covered is not None and not one.by_group:
        lines.append(f"{one.run}: coverage of each sex or scanner: NOT MEASURED, the store does not tell two apart")
    if one.flagged is not None:
        lines.append(f"{one.run}: flagged as unlike the labelled scans: {one.flagged}")
    if one.flagged_by_centres is not None:
        lines.append(f"{one.run}: flagged as unlike the means of their classes: {one.flagged_by_centres}")
    if one.width is not None:
        held = sum(each.held for each in one.bins)
        lines.append(
            f"{one.run}: intervals of the answer's probability are {one.width:.3f} wide on average; what was observed "
            f"may lie within them in {held} of {len(one.bins)} bins"
        )
    lines += _claimed(one)
    lines += [f"{one.run}: {what}: NOT MEASURED: {why}" for what, why in one.unmeasured.items()]
    parts += [page.bullets(lines)] if lines else []
    if one.bins:
        told = [
            (
                f"{each.mean_low:.3f} to {each.mean_high:.3f}",
                str(each.rows),
                str(each.came_true),
                "yes" if each.held else "no",
            )
            for each in one.bins
        ]
        head = ("mean interval", "n", "answer was right", "may be so")
        parts.append(page.table(head, told, caption=f"{one.run}: intervals of probabilities"))
    parts += _ends(one) + _volumes(one)
    for facet, groups in one.by_group.items():
        held = [(name, str(value.subjects), str(value)) for name, value in groups.items()]
        parts.append(page.table((facet, "n", "truth held"), held, caption=f"{one.run}: coverage of each {facet}"))
    return parts


def _figure(value: Interval) -> str:
    """A figure of calibration, or that it has no value: no slope is finite where a threshold parts true from false."""
    return f"undefined ({value.note})" if math.isnan(value.estimate) else str(value)


def _claimed(one: Sureness) -> list[str]:
    """What was counted, of boxes and of volumes."""
    lines: list[str] = []
    if one.boxes:
        lines.append(
            f"{one.run}: a probability of a box is held against whether the box hits something that none before it had "
            f"hit: {one.boxes} boxes, figures are means over classes, intervals over subjects"
        )
    if one.volumes is not None:
        held = one.volumes
        missed = f"; {held.missed} more were there and not found, and have none" if held.missed else ""
        lines.append(
            f"{one.run}: intervals of volumes made to hold the true volume for {held.level:.0%} held it for "
            f"{held.overall}: {held.volumes} volumes of {held.overall.subjects} subjects{missed}"
        )
    return lines


def _ends(one: Sureness) -> list[str]:
    if not one.ends:
        return []
    rows = [
        (
            name,
            f"{ends.overall.rows} of {ends.overall.came_true.subjects} subjects"
            if one.boxes
            else str(ends.overall.rows),
            f"{ends.overall.mean_low:.3f} to {ends.overall.mean_high:.3f}",
            str(ends.overall.came_true),
            "yes" if ends.overall.held else "no",
            # Boxes are no subjects, and have no bins.
            *([] if one.boxes else [f"{sum(each.held for each in ends.bins)} of {len(ends.bins)}"]),
        )
        for name, ends in one.ends.items()
    ]
    head = ("class", "n", "mean ends", "came true", "may be so", *([] if one.boxes else ["bins that may be so"]))
    what = "a box is right" if one.boxes else "a class is there"
    return [page.table(head, rows, caption=f"{one.run}: ends of the probability that {what}")]


def _volumes(one: Sureness) -> list[str]:
    if one.volumes is None:
        return []
    rows = [(name, str(share.subjects), str(share)) for name, share in one.volumes.by_structure.items()]
    return [page.table(("structure", "n", "true volume held"), rows, caption=f"{one.run}: intervals of volumes")]


def _point(one: OperatingPoint) -> list[str]:
    rows = [("what predict answers", *_rates(one.answers))] if one.answers else []
    if one.threshold is None or one.shown is None:
        told = f"{one.run}: operating point NOT MEASURED: {one.why}."
        told += " What predict answers, the more probable class, was counted all the same." if rows else ""
    else:
        told = (
            f"{one.run}: predict answers with the more probable class, and follows no threshold. Whoever would rather "
            f"say '{one.positive}' from a threshold on could take a probability of '{one.positive}' of "
            f"{_chance(one.shown)}, as findings show it ({_scales(one)}). It was fixed on {one.fixed_on}, for the best "
            "balanced accuracy, and no test subject had a say in it."
        )
        rows.append(("if that threshold were the rule", *_rates(one.figures)))
        rows += [
            (f"the same, {facet}: {name}", *_rates(own))
            for facet, groups in one.by_group.items()
            for name, own in groups.items()
        ]
    if not rows:
        return [page.paragraph(told)]
    head = ("rule, on the test subjects", *(RATES[name] for name in RATES))
    note = (
        "Each figure has its own n: sensitivity counts those who have it, PPV those of whom it was said. Scans of one "
        f"subject are averaged first. A finding of another class with probability p gives '{one.positive}' 1 - p."
    )
    return [page.paragraph(told), page.table(head, rows, caption=one.run), page.paragraph(note)]


def _scales(one: OperatingPoint) -> str:
    """How the threshold on findings and the head's own are related."""
    if one.threshold == one.shown:
        return "the head's own, which is not calibrated"
    return f"calibrated; {_chance(one.threshold or 0.0)} as the head states it before"


def _chance(value: float) -> str:
    """With three decimals, or as many as tell it from 0 and 1."""
    digits = next((count for count in range(3, 13) if 0 < round(value, count) < 1), 3)
    return f"{value:.{digits}f}"


def _rates(figures: Mapping[str, Interval]) -> list[str]:
    shown = [figures[name] for name in RATES]
    return [f"{one} (n={one.subjects})" if one.subjects else "nobody to ask (n=0)" for one in shown]


def _shares(one: Prevalence) -> str:
    rows = [
        (name, f"{share:.1%}", f"{one.tested.get(name, 0.0):.1%}", str(one.shift[name]) if name in one.shift else "")
        for name, share in one.labelled.items()
    ]
    head = ("class", "where it learned", "where it is tested", "difference")
    words = page.note(one.words) if "beyond chance" in one.words else page.paragraph(one.words)
    return page.table(head, rows, caption=one.run) + (words if one.words else "")
