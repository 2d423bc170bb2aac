from __future__ import annotations

from dataclasses import replace

from voxelstem.certainty.vennabers import IntervalBin
from voxelstem.metrics import Interval
from voxelstem.report import page
from voxelstem.report.evidence import (
    Compared,
    Ends,
    OperatingPoint,
    Prevalence,
    Sureness,
    VolumesHeld,
    evidence_sections,
)


def some(value: float) -> Interval:
    return Interval(estimate=value, low=value - 0.1, high=value + 0.1, subjects=20)


SURE = Sureness(
    run="<b>run</b>",
    subjects=30,
    stated={"ece": some(0.2)},
    calibrated={"ece": some(0.1)},
    covered=some(0.88),
    level=0.9,
    set_size=1.25,
    flagged=some(0.05),
    notes=("a note",),
)
PAIR = Compared(task="classify", metric="auroc", one="probe", other="knn", difference=some(0.07))
SHARES = Prevalence(run="run", labelled={"yes": 0.5, "no": 0.5}, tested={"yes": 0.1, "no": 0.9})


def test_everything_that_is_known_stands_on_the_page_and_nothing_is_markup() -> None:
    text = page.page("t", evidence_sections([SURE], [PAIR], [SHARES]))
    numbers = ("0.200 [0.100, 0.300]", "0.100 [0.000, 0.200]", "0.880", "90%", "1.25 classes", "0.070", "10.0%")
    for wanted in (*numbers, "a note", "probe - knn", "30 labelled subjects, each answered by a head of another fold"):
        assert wanted in text
    assert "<b>run</b>" not in text


def test_intervals_of_probabilities_are_shown_with_their_width_and_bin_by_bin() -> None:
    bins = (
        IntervalBin(rows=12, mean_low=0.5, mean_high=0.7, came_true=some(0.6)),
        IntervalBin(rows=14, mean_low=0.9, mean_high=0.95, came_true=some(0.3)),
    )
    one = replace(SURE, width=0.125, bins=bins, flagged_by_centres=some(0.15))
    text = page.page("t", evidence_sections([one], [], []))
    for wanted in (
        "0.125 wide on average",
        "in 1 of 2 bins",
        "0.500 to 0.700",
        "0.900 to 0.950",
        "unlike the means of their classes: 0.150",
    ):
        assert wanted in text
    assert "wide on average" not in page.page("t", evidence_sections([SURE], [], []))


def test_what_was_not_held_to_its_word_is_named() -> None:
    text = page.page("t", evidence_sections([replace(SURE, unmeasured={"widths of <x>": "too <few>"})], [], []))
    assert "widths of &lt;x&gt;: NOT MEASURED: too &lt;few&gt;" in text
    assert "NOT MEASURED: too" not in page.page("t", evidence_sections([SURE], [], []))


def test_a_slope_that_no_number_can_be_is_undefined_and_not_nan() -> None:
    lost = Interval(estimate=float("nan"), low=None, high=None, subjects=9, note="undefined in most resamples")
    text = page.page("t", evidence_sections([replace(SURE, stated={"slope": lost}, calibrated={})], [], []))
    assert "undefined (undefined in most resamples)" in text
    assert "nan (" not in text


def test_ends_of_yes_or_no_and_of_boxes_stand_class_by_class_with_how_many_there_were() -> None:
    whole = IntervalBin(rows=40, mean_low=0.25, mean_high=0.375, came_true=some(0.3))
    off = IntervalBin(rows=20, mean_low=0.8, mean_high=0.9, came_true=some(0.1))
    answers = replace(SURE, ends={"<cyst>": Ends(overall=whole, bins=(whole, off))})
    text = page.page("t", evidence_sections([answers], [], []))
    for wanted in (
        "ends of the probability that a class is there",
        "&lt;cyst&gt;",
        "0.250 to 0.375",
        "0.300 [0.200, 0.400]",
        "<td>1 of 2</td>",
        "bins that may be so",
    ):
        assert wanted in text
    boxes = replace(SURE, boxes=40, ends={"cyst": Ends(overall=off)})
    text = page.page("t", evidence_sections([boxes], [], []))
    for wanted in (
        "that a box is right",
        "20 of 20 subjects",
        "0.800 to 0.900",
        "<td>no</td>",
        "before it had hit: 40 boxes",
    ):
        assert wanted in text
    assert "bins that may be so" not in text


def test_coverage_of_volumes_stands_beside_the_promise_of_each_structure_and_of_all() -> None:
    held = VolumesHeld(level=0.9, overall=some(0.6), by_structure={"<liver>": some(0.7)}, volumes=33, missed=0)
    text = page.page("t", evidence_sections([replace(SURE, volumes=held)], [], []))
    for wanted in (
        "the true volume for 90% held it for 0.600 [0.500, 0.700]: 33 volumes of 20 subjects",
        "&lt;liver&gt;",
        "0.700 [0.600, 0.800]",
    ):
        assert wanted in text
    assert "not found" not in text
    lost = page.page("t", evidence_sections([replace(SURE, volumes=replace(held, missed=4))], [], []))
    assert "20 subjects; 4 more were there and not found, and have none" in lost


def test_what_is_not_known_makes_no_section() -> None:
    assert evidence_sections([], [], []) == []
    bare = replace(SURE, subjects=0, covered=None, level=None, set_size=None, flagged=None)
    text = page.page("t", evidence_sections([bare], [], []))
    assert "hold the truth" not in text
    assert "flagged" not in text


def test_an_operating_point_names_its_threshold_and_on_whom_it_was_fixed() -> None:
    share = Interval(estimate=0.8, low=0.6, high=0.9, subjects=21)
    nobody = Interval(estimate=float("nan"), low=None, high=None, subjects=0, note="nobody")
    figures = {"sensitivity": share, "specificity": share, "ppv": share, "npv": nobody}
    point = OperatingPoint(
        run="run",
        positive="yes",
        threshold=0.37,
        shown=0.99996,
        fixed_on="31 validation subjects",
        figures=figures,
        answers=figures | {"sensitivity": Interval(estimate=0.7, low=0.5, high=0.8, subjects=21)},
        by_group={"sex": {"F": figures, "M": figures}},
    )
    missing = OperatingPoint(run="other", positive="yes", why="too few <subjects>")
    bare = replace(point, run="bare", threshold=0.25, shown=0.25)
    (part,) = evidence_sections([], [], [], [point, missing, bare])
    assert part.title == "At a fixed threshold"
    assert "predict answers with the more probable class, and follows no threshold" in part.body
    # Not 1.000, which no probability reaches.
    assert "of 0.99996, as findings show it (calibrated; 0.370 as the head states it before)" in part.body
    assert "of 0.250, as findings show it (the head&#x27;s own, which is not calibrated)" in part.body
    answered, ruled = part.body.index("what predict answers"), part.body.index("if that threshold were the rule")
    assert answered < part.body.index("0.700 [0.500, 0.800] (n=21)") < ruled
    assert "31 validation subjects" in part.body
    assert "the same, sex: F" in part.body
    assert "0.800 [0.600, 0.900] (n=21)" in part.body
    assert "nobody to ask (n=0)" in part.body
    assert "nan" not in part.body
    assert "operating point NOT MEASURED: too few &lt;subjects&gt;." in part.body
    (told,) = evidence_sections([], [], [], [replace(missing, answers=point.answers)])
    assert "was counted all the same" in told.body
    assert "0.700 [0.500, 0.800] (n=21)" in told.body
    assert "if that threshold" not in told.body


def test_a_shift_of_prevalence_is_a_box_only_where_it_is_beyond_chance() -> None:
    def body(low: float, high: float) -> str:
        shift = {"yes": Interval(estimate=(low + high) / 2, low=low, high=high, subjects=90)}
        one = Prevalence(run="run", labelled={"yes": 0.5}, tested={"yes": 0.2}, shift=shift)
        (part,) = evidence_sections([], [], [one])
        return part.body

    assert 'class="note"' in body(-0.4, -0.2)
    assert "&#x27;yes&#x27; 50% to 20%" in body(-0.4, -0.2)
    assert 'class="note"' not in body(-0.4, 0.2)
    assert "intervals include zero" in body(-0.4, 0.2)
