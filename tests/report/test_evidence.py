from __future__ import annotations

from dataclasses import replace

from voxelstem.metrics import Interval
from voxelstem.report import page
from voxelstem.report.evidence import Compared, Prevalence, Sureness, evidence_sections


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


def test_what_is_not_known_makes_no_section() -> None:
    assert evidence_sections([], [], []) == []
    bare = replace(SURE, subjects=0, covered=None, level=None, set_size=None, flagged=None)
    text = page.page("t", evidence_sections([bare], [], []))
    assert "hold the truth" not in text
    assert "flagged" not in text
