from __future__ import annotations

from voxelstem.choosing.efficiency import Curve, Gain, Law, Point
from voxelstem.choosing.ladder import Climb, Step
from voxelstem.metrics import Interval
from voxelstem.report.ladder import ladder_page


def some(value: float) -> Interval:
    return Interval(estimate=value, low=value - 0.05, high=value + 0.05, subjects=20)


STEPS = (
    Step(mode="knn", figure=some(0.7), against="", gain=None, seconds=1.0, taken=True, why="begins"),
    Step(mode="probe", figure=some(0.8), against="knn", gain=some(0.1), seconds=2.0, taken=True, why="<i>pays</i>"),
)
CLIMB = Climb(metric="auroc", margin=0.02, chosen="probe", steps=STEPS, untried=("full",), stopped="two did not pay")
POINTS = tuple(Point(subjects=n, score=some(0.9 - 0.4 * n**-0.5), each=(0.6, 0.7)) for n in (2, 5, 10, 20))
LAW = Law(asymptote=0.9, drop=0.4, exponent=some(0.5), at_bound=False)
GAINS = (Gain(have=24, then=34, value=some(0.06)), Gain(have=24, then=40, value=some(0.08)))
CURVE = Curve(
    metric="auroc",
    labelled=24,
    repeats=2,
    margin=0.01,
    points=POINTS,
    rise=Gain(have=2, then=20, value=some(0.2)),
    law=LAW,
    gains=GAINS,
)


def test_every_rung_and_what_labels_buy_stand_on_the_page() -> None:
    text = ladder_page(CLIMB, CURVE, CLIMB.chosen, "")
    for wanted in (
        "Chosen: probe",
        "two did not pay",
        "not tried",
        "knn",
        "0.700 [0.650, 0.750]",
        "extrapolated to 40",
    ):
        assert wanted in text, wanted
    assert "10 more labelled subjects would improve auroc by" in text
    assert "<i>pays</i>" not in text
    assert "radiomics or what is said without a look at the scan stands on the page of voxelstem evaluate" in text


def test_without_a_curve_it_says_why() -> None:
    text = ladder_page(CLIMB, None, "", "no curve: too dear")
    assert "No curve: too dear." in text
    assert "<img" not in text


def test_a_curve_of_another_mode_than_the_chosen_says_so() -> None:
    text = ladder_page(CLIMB, CURVE, "knn", "this curve is of knn: the other one takes hours")
    assert "This curve is of knn: the other one takes hours." in text
