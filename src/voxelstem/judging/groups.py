"""Groups of subjects that a figure may hold in and another not: by what the records say of scanner and sex."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from voxelstem.certainty.assurance import group_of
from voxelstem.store import Record

FACETS = ("sex", "scanner")
NOT_SAID = "not said"


def facet_of(record: Record, facet: str) -> str:
    """What a record says of one of `FACETS`; an empty word where it says nothing. A maker has one name of its many.

    Raises:
        ValueError: another facet.
    """
    if facet == "sex":
        return record.acquisition.sex
    if facet == "scanner":
        model = record.acquisition.facts.get("ManufacturerModelName", "")
        return " ".join(filter(None, (group_of(record.acquisition), model)))
    raise ValueError(f"a facet is one of {', '.join(FACETS)}, got '{facet}'")


def groups_of(records: Iterable[Record]) -> dict[str, dict[str, str]]:
    """Facet to subject to group, for the facets that tell at least two groups of these subjects apart.

    A subject is of the group that its first scan with a word says; who has none is `not said`.
    """
    records = list(records)
    found: dict[str, dict[str, str]] = {}
    for facet in FACETS:
        own: dict[str, str] = {}
        for record in records:
            own[record.subject] = own.get(record.subject, "") or facet_of(record, facet)
        if len(set(own.values()) - {""}) > 1:
            found[facet] = {subject: group or NOT_SAID for subject, group in own.items()}
    return found


def missing(groups: Mapping[str, object]) -> str:
    """Which facets cannot be told apart, in words; empty where all can."""
    lost = [facet for facet in FACETS if facet not in groups]
    return f"{' and '.join(lost)}: the store does not tell two groups of the test subjects apart" if lost else ""
