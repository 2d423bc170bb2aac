"""What an honest evaluation needs, and which of it was not measured. The list is fixed: nothing drops out unsaid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from voxelstem.report import page


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Something that a reader must know before trusting a figure."""

    name: str
    why: str
    """What is unknown as long as nobody measured it."""
    needed: str
    """What it would take."""


NEEDS: Mapping[str, Need] = MappingProxyType(
    {
        "intervals": Need(
            name="Intervals over subjects",
            why="how much the figures would move with other subjects of the same kind",
            needed="three held-out subjects at least, ten for an interval that is not rough",
        ),
        "leakage_store": Need(
            name="Leakage within the store",
            why="whether somebody who was learned from is also tested on, as a subject or as a copy of a scan",
            needed="the check that `voxelstem evaluate` makes between the store's splits",
        ),
        "leakage_pretraining": Need(
            name="Leakage against the pretraining data",
            why="whether the weights saw the test scans, without labels, before",
            needed="the store of the pretraining (or its list of digests): `voxelstem show STORE --against STORE`",
        ),
        "calibration": Need(
            name="Calibration",
            why="whether stated probabilities come true",
            needed="a task with probabilities, and enough held-out subjects in every bin",
        ),
        "sex": Need(
            name="Subgroups: sex",
            why="whether one sex is served worse",
            needed="the sex of every test subject, and some thirty of each",
        ),
        "age": Need(
            name="Subgroups: age",
            why="whether an age is served worse",
            needed="the age at every test scan, and some thirty subjects in each band",
        ),
        "scanner": Need(
            name="Subgroups: scanner",
            why="whether the figures hold on every scanner, kernel and slice thickness",
            needed="headers with make, model and protocol, and some thirty subjects of each",
        ),
        "site": Need(
            name="Subgroups: site",
            why="whether the figures hold in every hospital that is in the store",
            needed="the site of every scan, and some thirty subjects of each",
        ),
        "prevalence": Need(
            name="Shift of prevalence",
            why="what precision and probabilities become where the disease is rarer or more common",
            needed="the prevalence where it is to be used, and figures at that prevalence",
        ),
        "external": Need(
            name="External site",
            why="whether anything holds in a hospital that nothing was learned from",
            needed="labelled scans of a hospital that is neither in pretraining nor in adaptation",
        ),
        "strange": Need(
            name="Share of strange scans",
            why="how many scans are unlike all that was learned from, and how the figures are on these",
            needed="a score of strangeness with its threshold, set on scans that were not tested on",
        ),
        "readers": Need(
            name="Comparison with readers",
            why="whether it helps, or equals, the people who read such scans",
            needed="several radiologists reading the same scans blinded, with and without it",
        ),
        "energy": Need(
            name="Energy",
            why="what training and each scan cost in electricity",
            needed="a power meter or the counters of the processor and the GPU while it runs",
        ),
    }
)
"""Key, as `verdict_section` takes it, to what it stands for."""
MEASURED, NOT_MEASURED = "MEASURED", "NOT MEASURED"


def unmeasured(measured: Mapping[str, str]) -> tuple[str, ...]:
    """Keys of what was not measured, in the order of `NEEDS`; for the JSON beside the page.

    Raises:
        ValueError: as `verdict_section`.
    """
    _check(measured)
    return tuple(key for key in NEEDS if key not in measured)


def verdict_section(measured: Mapping[str, str], *, title: str = "What was not measured") -> page.Section:
    """The part of the page that says, line by line, what was measured and what was not.

    Args:
        measured: Key of `NEEDS` to the figure, or where on the page it stands.
        title: Of the section.

    Raises:
        ValueError: an unknown key, or one without a word of what was found: silence is not a measurement.
    """
    _check(measured)
    missing = unmeasured(measured)
    rows = [
        [
            need.name,
            MEASURED if key in measured else NOT_MEASURED.replace(" ", "\N{NO-BREAK SPACE}"),
            measured.get(key, f"unknown: {need.why}; it takes {need.needed}"),
        ]
        # What is missing comes first: that is what the section is for.
        for key, need in sorted(NEEDS.items(), key=lambda item: item[0] in measured)
    ]
    told = (
        f"{len(NEEDS) - len(missing)} of {len(NEEDS)} lines were measured. That is a count, not a mark: what was "
        "measured may have been measured badly, and what was not may be what matters to you."
    )
    return page.section(
        title,
        page.paragraph(told),
        page.table(["what", "state", "figure, or what is unknown and what it takes"], rows),
    )


def _check(measured: Mapping[str, str]) -> None:
    strange = sorted(set(measured) - set(NEEDS))
    if strange:
        raise ValueError(f"'{strange[0]}' is nothing that the list asks for; it asks for {', '.join(NEEDS)}")
    silent = sorted(key for key, told in measured.items() if not told.strip())
    if silent:
        raise ValueError(f"'{silent[0]}' is said to be measured, without a figure or the place where it stands")
