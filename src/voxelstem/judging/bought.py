"""What labels buy: the label-efficiency curve that `adapt --mode auto` left beside a run, for the evaluation's page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from voxelstem.adapted import AUTO, Adapted
from voxelstem.choosing.efficiency import Curve, Gain, Law, Point
from voxelstem.errors import CheckpointError
from voxelstem.metrics import Interval
from voxelstem.report import page
from voxelstem.report.ladder import curve_parts

FILE = "auto.json"
WHENCE = (
    "Taken over from the run's own folder, where mode auto left it: every figure is of labelled subjects, each held "
    "out in turn from a head that had not seen them (cross-fitting). No test subject is in it, and no figure of this "
    "evaluation."
)


def bought(name: str, adapted: Adapted) -> page.Section:
    """The section on what labels buy a run: its curve, or why there is none.

    Raises:
        CheckpointError: what lies beside the run cannot be read.
    """
    title, path = f"What labels buy: {name}", adapted.weights.parent / FILE
    if not path.is_file():
        why = f"NOT MEASURED: mode {adapted.config.mode} was asked for, and the curve is drawn by mode {AUTO}."
        return page.section(title, page.paragraph(why))
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        mode, why = str(facts["curve_of"]), str(facts["why"])
        curve = None if facts["curve"] is None else curve_of(facts["curve"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{FILE} of the run '{adapted.name}' is damaged", hint="copy the whole run folder again"
        ) from error
    if curve is None:
        return page.section(title, page.paragraph(f"NOT MEASURED: {why or 'there is no curve'}."))
    said = [page.paragraph(f"{why[:1].upper()}{why[1:]}.")] if why else []
    return page.section(title, page.paragraph(WHENCE), *said, *curve_parts(mode, curve))


def curve_of(facts: Mapping[str, Any]) -> Curve:
    """Read what `Curve.facts` gave: a figure that is None there was undefined.

    Raises:
        KeyError, TypeError: a part is missing, or of another kind.
    """
    law, rise = facts["law"], facts["rise"]
    return Curve(
        metric=facts["metric"],
        labelled=facts["labelled"],
        repeats=facts["repeats"],
        margin=_number(facts["margin"]),
        points=tuple(
            Point(subjects=one["subjects"], score=_interval(one["score"]), each=tuple(map(_number, one["each"])))
            for one in facts["points"]
        ),
        rise=None if rise is None else _gain(rise),
        law=None
        if law is None
        else Law(
            asymptote=_number(law["asymptote"]),
            drop=_number(law["drop"]),
            exponent=_interval(law["exponent"]),
            at_bound=law["at_bound"],
        ),
        gains=tuple(map(_gain, facts["gains"])),
        flat=facts["flat"],
        why=facts["why"],
    )


def _gain(facts: Mapping[str, Any]) -> Gain:
    return Gain(have=facts["have"], then=facts["then"], value=_interval(facts["value"]))


def _interval(facts: Mapping[str, Any]) -> Interval:
    found = Interval(**facts)
    return replace(found, estimate=_number(found.estimate))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
