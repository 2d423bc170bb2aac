from __future__ import annotations

from voxelstem.metrics import Interval
from voxelstem.report.checks import Cost, Crossed, costs_section, crossed_section, exposure_section


def interval(estimate: float, half: float = 0.1) -> Interval:
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half, subjects=31)


def test_every_contestant_of_the_cross_fitted_table_is_a_line() -> None:
    lines = [
        Crossed(
            run="run",
            name="run",
            metric="auroc",
            value=interval(0.8),
            over_scratch=interval(0.2),
            over_intensity=interval(0.02),
        ),
        Crossed(
            run="run",
            name="scratch",
            metric="auroc",
            value=interval(0.6),
            over_scratch=None,
            over_intensity=interval(-0.3),
        ),
    ]
    html = crossed_section(lines, ["run: 31 subjects in 5 folds"], ["other: NOT MEASURED: too few"]).body
    assert "a head that had not seen it" in html
    assert "scratch (for run)" in html
    assert "0.800 [0.700, 0.900]" in html
    assert "+0.200 [+0.100, +0.300] better" in html
    assert "+0.020 [-0.080, +0.120] unclear" in html
    assert "-0.300 [-0.400, -0.200] worse" in html
    assert "31 subjects in 5 folds" in html
    assert "other: NOT MEASURED: too few" in html
    assert "<table" not in crossed_section([], [], ["other: NOT MEASURED: <b>"]).body
    assert "&lt;b&gt;" in crossed_section([], [], ["other: NOT MEASURED: <b>"]).body


def test_what_nobody_timed_is_not_measured() -> None:
    costs = [
        Cost(run="run", name="run", what="head", seconds=None, peak_gib=None),
        Cost(run="run", name="unet", what="U-Net, 200 steps", seconds=12.34, peak_gib=1.5),
    ]
    html = costs_section(costs).body
    assert html.count("NOT MEASURED") == 2
    assert "12.3 s" in html
    assert "1.50 GiB" in html
    assert "unet (for run)" in html


def test_what_is_not_known_of_the_pretraining_is_a_box_that_cannot_be_overlooked() -> None:
    html = exposure_section(["run: NOT MEASURED: name it", "other: compared"]).body
    assert html.count('class="note"') == 1
    assert "<p>other: compared</p>" in html
