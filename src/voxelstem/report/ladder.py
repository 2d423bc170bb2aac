"""The page beside a run that `auto` chose: every rung that was tried, and what labels buy."""

from __future__ import annotations

import numpy as np

from voxelstem.crossfit import scale_of
from voxelstem.efficiency import Curve, recommend
from voxelstem.ladder import HEAD, Climb
from voxelstem.metrics import Score
from voxelstem.report import page
from voxelstem.report.dots import Extrapolated, label_efficiency_picture

UNSEEN = (
    "Every figure is of labelled subjects that the head had not seen (cross-fitting). They were used to choose, so the "
    "figure of what was chosen is a little too good: what is claimed of it belongs to test subjects, by "
    "voxelstem evaluate."
)


def ladder_page(climb: Climb, curve: Curve | None, why: str) -> str:
    """The whole page. `why` says why there is no curve."""
    sections = [
        page.section(
            "Ways to adapt, from cheap to dear",
            page.paragraph(f"Chosen: {climb.chosen}. The climb ended because {climb.stopped}."),
            page.table(
                HEAD, climb.rows(), caption="Better than the best before: paired by subject, above 0 is better."
            ),
            page.paragraph(UNSEEN),
        ),
        page.section("What labels buy", *(_curve(climb, curve) if curve is not None else [page.paragraph(why)])),
    ]
    return page.page("How this run was chosen", sections)


def _curve(climb: Climb, curve: Curve) -> list[str]:
    scores = [
        Score(
            name=climb.chosen,
            task="labelled subjects, held out in turn",
            mode=climb.chosen,
            metric=curve.metric,
            budget=point.subjects,
            labelled=point.subjects,
            repeats=curve.repeats,
            value=point.score,
        )
        for point in curve.points
    ]
    drawn = label_efficiency_picture(scores, curve.metric, extrapolated=_beyond(climb, curve))
    rows = [(str(point.subjects), str(point.score)) for point in curve.points]
    return [
        page.paragraph(recommend(curve).capitalize() + "."),
        page.picture(drawn),
        page.table(("labelled subjects", curve.metric), rows, caption="Intervals over subjects"),
    ]


def _beyond(climb: Climb, curve: Curve) -> list[Extrapolated]:
    """What the power law says of more labels than there are; nothing where there is no law, or no interval of it."""
    law = curve.law
    told = [(gain.then, gain.value.low, gain.value.high) for gain in curve.gains]
    sure = [(then, low, high) for then, low, high in told if low is not None and high is not None]
    if law is None or not sure:
        return []
    sign = -1.0 if scale_of(curve.metric).less_is_better else 1.0

    def at(subjects: int) -> float:
        return law.asymptote - sign * law.drop * subjects**-law.exponent.estimate

    here = at(curve.labelled)
    ends = np.array([[sign * low, sign * high] for _, low, high in sure])
    labelled = np.array([curve.labelled, *(then for then, _, _ in sure)], dtype=np.float64)
    estimate = np.array([here, *(at(then) for then, _, _ in sure)])
    low = np.minimum(np.array([here, *(here + ends.min(axis=1))]), estimate)
    high = np.maximum(np.array([here, *(here + ends.max(axis=1))]), estimate)
    return [Extrapolated(name=climb.chosen, labelled=labelled, estimate=estimate, low=low, high=high)]
