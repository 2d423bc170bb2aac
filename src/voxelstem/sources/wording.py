"""Words for facts: writes the report of a paired phantom from `wording.toml`, never the same way twice.

A fact is said by a template of its own, so that no sentence depends on another one's truth. What is wrong with the
patient always stands in the findings; what is normal is often left out, as people do.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from voxelstem.sources.lobes import SIDES
from voxelstem.study import Report

_SLOT = re.compile(r"\{(\w+)\}")
_DECIMAL_SHARE = 0.4
"""Of the sizes that are given in centimetres."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saying:
    """One thing that can be said: the template's group, and what fills its places."""

    topic: str
    case: str
    amiss: bool
    """Whether it is a finding: then it is always said."""
    values: Mapping[str, str] = field(default_factory=dict)


@cache
def _templates() -> dict[str, Any]:
    text = resources.files("voxelstem.sources").joinpath("wording.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def templates(topic: str, case: str, form: str) -> tuple[str, ...]:
    """The ways in which a case can be said; empty where there is none in this form (`prose`, `terse`, `impression`)."""
    return tuple(_templates()[topic][case].get(form, ()))


def fill(template: str, values: Mapping[str, str], rng: np.random.Generator) -> str:
    """Put values, or words drawn from the list, in a template's places, and begin with a capital.

    Raises:
        KeyError: a place is neither a value nor a list of words.
    """
    words: Mapping[str, Sequence[str]] = _templates()["words"]

    def put(slot: re.Match[str]) -> str:
        name = slot[1]
        said = values.get(name, name)
        # A value such as `hypodense` may itself be said in several words.
        if said in words:
            said = str(rng.choice(words[said]))
        elif name not in values:
            raise KeyError(name)
        return _SLOT.sub(put, said)

    text = _SLOT.sub(put, template)
    return text[0].upper() + text[1:]


def length(size_mm: int, rng: np.random.Generator) -> str:
    """A size as people write it: `24 mm` or `2.4 cm`."""
    return f"{size_mm / 10:.1f} cm" if rng.random() < _DECIMAL_SHARE else f"{size_mm} mm"


def write_report(sayings: Sequence[Saying], rng: np.random.Generator, *, rewrites: int = 0) -> Report:
    """Write findings and impression about a patient of whom all this is true.

    Args:
        sayings: In the order in which radiologists go, the examination first.
        rng: Draws what is left out, style, order and words.
        rewrites: Further ways to write the findings and the impression, each drawn anew. Every second one is brief:
            it says one or two of the facts, as a question would.
    """
    said = [
        (_brief(sayings, "prose", rng), _brief(sayings, "impression", rng))
        if number and number % 2 == 0
        else (_findings(sayings, rng), _impression(sayings, rng))
        for number in range(1 + rewrites)
    ]
    rest = str(rng.choice(templates("around", "said", "prose"))) if rng.random() < 0.5 else ""  # noqa: PLR2004 - half of all
    findings, impressions = zip(*said, strict=True)
    return Report(
        findings_text=findings[0],
        impression_text=impressions[0],
        findings_rewrites=findings[1:],
        impression_rewrites=impressions[1:],
        rest_text=rest,
        language="en",
    )


def _findings(sayings: Sequence[Saying], rng: np.random.Generator) -> str:
    form = "prose" if rng.random() < 0.65 else "terse"  # noqa: PLR2004 - how many dictate whole sentences
    said_share, extra = rng.uniform(0.3, 1.0), int(rng.integers(0, 5))
    first, rest = list(sayings[:1]), [one for one in sayings[1:] if one.amiss or rng.random() < said_share]
    lines = [_say(one, form, rng) for one in rest]
    always = templates("always", "said", form)
    lines += [always[index] for index in rng.permutation(len(always))[:extra]]
    # In the order of the body, or as it comes to mind.
    if rng.random() < 0.6:  # noqa: PLR2004 - share of the unordered
        lines = [lines[index] for index in rng.permutation(len(lines))]
    opening = [_say(one, form, rng) for one in first]
    lines = [*opening, *lines] if rng.random() < 0.8 else [*lines, *opening]  # noqa: PLR2004 - most say it first
    return ("\n" if form == "terse" and rng.random() < 0.5 else " ").join(lines)  # noqa: PLR2004 - half of these


def _brief(sayings: Sequence[Saying], form: str, rng: np.random.Generator) -> str:
    can = [one for one in sayings if templates(one.topic, one.case, form)]
    picked = [can[index] for index in rng.permutation(len(can))[: int(rng.integers(1, 3))]]
    if form == "prose":
        return " ".join(_say(one, form, rng) for one in picked)
    return " ".join(f"{fill(_drawn(one, form, rng), _values(one, rng), rng)}." for one in picked)


def _say(one: Saying, form: str, rng: np.random.Generator) -> str:
    """A sentence, at times with what is so on the other side; what is normal on both at times side by side.

    Were one side denied only where the other is ill, to deny it would say that the other is.
    """
    if not one.amiss and "other" in _templates()[one.topic] and rng.random() < 0.5:  # noqa: PLR2004 - half of these
        return " ".join(fill(_drawn_of(one.topic, "other", form, rng), {"other": side}, rng) for side in SIDES)
    text = fill(_drawn(one, form, rng), _values(one, rng), rng)
    if "other" in one.values and rng.random() < 0.4:  # noqa: PLR2004 - share that says more
        text = f"{text} {fill(_drawn_of(one.topic, 'other', form, rng), one.values, rng)}"
    return text


def _impression(sayings: Sequence[Saying], rng: np.random.Generator) -> str:
    found = [one for one in sayings if one.amiss]
    items = [fill(_drawn(one, "impression", rng), _values(one, rng), rng) for one in found]
    items = [items[index] for index in rng.permutation(len(items))]
    if not found:
        items = [str(rng.choice(templates("well", "said", "impression")))]
    normal = [one for one in sayings if not one.amiss and templates(one.topic, one.case, "impression")]
    count = int(rng.integers(0, 3)) if normal else 0
    chosen = [normal[index] for index in rng.permutation(len(normal))[:count]]
    items += [fill(_drawn(one, "impression", rng), _values(one, rng), rng) for one in chosen]
    match int(rng.integers(3)):
        case 0:
            return " ".join(f"{number}. {item}." for number, item in enumerate(items, start=1))
        case 1:
            return f"{'; '.join(items)}."
        case _:
            return " ".join(f"{item}." for item in items)


def _drawn(one: Saying, form: str, rng: np.random.Generator) -> str:
    return _drawn_of(one.topic, one.case, form, rng)


def _drawn_of(topic: str, case: str, form: str, rng: np.random.Generator) -> str:
    return str(rng.choice(templates(topic, case, form)))


def _values(one: Saying, rng: np.random.Generator) -> dict[str, str]:
    """Numbers as they are written this time."""
    return {name: length(int(value), rng) if value.isdigit() else value for name, value in one.values.items()}
