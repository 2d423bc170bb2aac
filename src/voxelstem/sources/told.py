"""What a folder's own tables say of one of its scans, in one form, whichever layout the folder has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from voxelstem.sources import bids
from voxelstem.study import Acquisition, Study

HEALTHY = ("control", "controls", "cn", "hc", "healthy", "healthy control", "nc", "nondemented", "normal")
"""Words for people without a known disease, in small letters."""
ILL = ("case", "case-control", "converted", "demented", "disease", "ill", "patient", "patients", "unhealthy")
"""Words for people with one. What is in neither list is not known: a group may be called anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """Facts of one scan, with the source's own ids: they are replaced at the door (`deidentify.py`)."""

    subject: str
    """Whose scan it is; other than all people of other data sets, whose tables count from one too."""
    acquisition: Acquisition
    labels: Mapping[str, str] = field(default_factory=dict)
    """Scan-level facts, such as `pathology: no`."""


def tell(study: Study, told: Told | None) -> Study:
    """Add to a scan what is told of it; what its own file says of sequence and date stays where the table is silent."""
    if told is None:
        return study
    said = told.acquisition
    words = {name: getattr(said, name) for name in ("study", "group", "session", "date", "sex", "contrast")}
    words = {name: word for name, word in words.items() if word}
    if said.age_years is not None:
        words["age_years"] = said.age_years
    volumes = tuple(replace(volume, acquisition=replace(volume.acquisition, **words)) for volume in study.volumes)
    return replace(study, subject=told.subject, volumes=volumes, labels={**study.labels, **told.labels})


def acquisition(person: tuple[str, ...], session: str, *, name: str, facts: Acquisition) -> Acquisition:
    """Link the scans of one session, and the copies of one picture.

    Args:
        person: What tells the subject from all others.
        session: Its visit, as the source calls it.
        name: What tells the picture from others of the visit.
        facts: All else that is known.
    """
    visit = "/".join((*person, session))
    return replace(facts, study=visit, group=f"{visit}/{name}", session=session.removeprefix("ses-"))


def health(word: object) -> dict[str, str]:
    """The label `pathology` for what a table calls a person's group or state; none where that says nothing.

    >>> health("Control"), health("demented"), health("unknown"), health(None)
    ({'pathology': 'no'}, {'pathology': 'yes'}, {}, {})
    """
    plain = str(word or "").strip().lower()
    return {"pathology": "no"} if plain in HEALTHY else {"pathology": "yes"} if plain in ILL else {}


def age(told: object) -> float | None:
    """An age in years from a table's cell or a JSON value; None for what is none.

    >>> age("34.5"), age(7), age("nan"), age("young"), age(None), age(True)
    (34.5, 7.0, None, None, None, None)
    """
    if told is None or isinstance(told, bool) or not isinstance(told, str | int | float):
        return None
    try:
        return bids.age_years(str(told))
    except ValueError:
        return None
