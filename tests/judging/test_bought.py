from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from tests.report.test_ladder import CURVE, some

from voxelstem.adapted import Adapted, resolve
from voxelstem.choosing.efficiency import Curve, Point
from voxelstem.errors import CheckpointError
from voxelstem.judging.bought import bought, curve_of
from voxelstem.metrics import Interval
from voxelstem.protocols import Head

UNKNOWN = Interval(estimate=math.nan, low=None, high=None, subjects=3, note="one class")
BARE = Curve(
    metric="mae",
    labelled=5,
    repeats=2,
    margin=math.nan,
    points=(Point(subjects=2, score=UNKNOWN, each=(math.nan, 0.5)),),
    why="two sizes are too few",
)


@pytest.mark.parametrize("curve", [CURVE, BARE], ids=["full", "bare"])
def test_a_curve_is_read_as_it_was_written(curve: Curve) -> None:
    text = json.dumps(curve.facts(), allow_nan=False)
    assert repr(curve_of(json.loads(text))) == repr(curve)  # NaN is not equal to itself


def run_of(folder: Path, facts: object) -> Adapted:
    if facts is not None:
        (folder / "auto.json").write_text(facts if isinstance(facts, str) else json.dumps(facts))
    config = resolve("classify", "probe", budget=None, settings={})
    return Adapted(
        name="run",
        config=config,
        task=config.head,
        head=Head(mode="probe", classes=("no", "yes"), arrays={}),
        weights=folder / "weights",
        labelled=(),
        subjects=(),
        sha256="",
    )


def test_the_curve_that_auto_left_stands_on_the_page_and_says_where_it_is_from(tmp_path: Path) -> None:
    told = bought("mine", run_of(tmp_path, {"curve": CURVE.facts(), "curve_of": "knn", "why": "this curve is of knn"}))
    assert told.title == "What labels buy: mine"
    for wanted in (
        "<img",
        "the run&#x27;s own folder",
        "No test subject",
        "This curve is of knn.",
        "extrapolated to 40",
    ):
        assert wanted in told.body, wanted


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (None, "NOT MEASURED: mode probe was asked for"),
        ({"curve": None, "curve_of": "", "why": "no curve: too dear"}, "NOT MEASURED: no curve: too dear."),
    ],
)
def test_without_a_curve_it_says_why(tmp_path: Path, facts: object, said: str) -> None:
    body = bought("mine", run_of(tmp_path, facts)).body
    assert said in body
    assert "<img" not in body


@pytest.mark.parametrize("facts", ["{", "[]", "{}", {"curve": {"metric": "x"}, "curve_of": "", "why": ""}], ids=repr)
def test_damage_is_named(tmp_path: Path, facts: object) -> None:
    with pytest.raises(CheckpointError, match=r"auto\.json of the run 'run' is damaged"):
        bought("mine", run_of(tmp_path, facts))


def test_points_may_be_without_an_interval() -> None:
    plain = dataclasses.replace(CURVE, points=(Point(subjects=2, score=some(0.5), each=()),), rise=None, law=None)
    assert curve_of(json.loads(json.dumps(plain.facts()))) == plain
