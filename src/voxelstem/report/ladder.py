"""The page beside a run that `auto` chose: every rung that was tried, and what labels buy."""

from __future__ import annotations

import numpy as np

from voxelstem.certainty.crossfit import scale_of
from voxelstem.choosing.efficiency import Curve, recommend
from voxelstem.choosing.ladder import HEAD, Climb
from voxelstem.metrics import Score
from voxelstem.report import page
from voxelstem.report.dots import Extrapolated, label_efficiency_picture

UNSEEN = (
    "Every figure is of labelled subjects that the head had not seen (cross-fitting). They were used to choose, so the "
    "figure of what was chosen is a little too good: what is claimed of it belongs to test subjects, by "
    "voxelstem evaluate."
)
BASELINES = (
    "No rung is a baseline: whether any of them beats an untrained network, intensities, radiomics or what is said "
    "without a look at the scan stands on the page of voxelstem evaluate."
)


def ladder_page(climb: Climb, curve: Curve | None, curve_of: str, why: str) -> str:
    """The whole page. `why` says why there is no curve, or why that of another mode than was chosen (`curve_of`)."""
    told = [page.paragraph(f"{why[:1].upper()}{why[1:]}.")] if why else []
    sections = [
        page.section(
            "Ways to adapt, from cheap to dear",
            page.paragraph(f"Chosen: {climb.chosen}. The climb ended because {climb.stopped}."),
            page.table(
                HEAD, climb.rows(), caption="Better than the best before: paired by subject, above 0 is better."
            ),
            page.paragraph(UNSEEN),
            page.paragraph(BASELINES),
        ),
        page.section("What labels buy", *told, *([] if curve is None else curve_parts(curve_of, curve))),
    ]
    return page.page("How this run was chosen", sections)


def curve_parts(mode: str, curve: Curve) -> list[str]:
    """What labels buy in a mode, as parts of a page: what to do, the curve with what lies beyond it, and its points."""
    scores = [
        Score(
            name=mode,
            task="labelled subjects, held out in turn",
            mode=mode,
            metric=curve.metric,
            budget=point.subjects,
            labelled=point.subjects,
            repeats=curve.repeats,
            value=point.score,
        )
        for point in curve.points
    ]
    drawn = label_efficiency_picture(scores, curve.metric, extrapolated=_beyond(mode, curve))
    rows = [(str(point.subjects), str(point.score)) for point in curve.points]
    return [
        page.paragraph(recommend(curve).capitalize() + "."),
        page.picture(drawn),
        page.table(("labelled subjects", curve.metric), rows, caption="Intervals over subjects"),
    ]


def _beyond(mode: str, curve: Curve) -> list[Extrapolated]:
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
    return [Extrapolated(name=mode, labelled=labelled, estimate=estimate, low=low, high=high)]
