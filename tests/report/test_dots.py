from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from voxelstem.metrics import Interval, Score
from voxelstem.report.dots import MOST_STRUCTURES, Extrapolated, label_efficiency_picture, structures_picture
from voxelstem.report.figures import Picture


def interval(estimate: float, *, subjects: int = 12, bare: bool = False) -> Interval:
    if bare:
        return Interval(estimate=estimate, low=None, high=None, subjects=2, note="n=2, no interval")
    return Interval(estimate=estimate, low=estimate - 0.05, high=estimate + 0.04, subjects=subjects)


def score(
    name: str,
    estimate: float,
    labelled: int = 5,
    *,
    metric: str = "dice",
    parts: Mapping[str, Interval] | None = None,
    bare: bool = False,
) -> Score:
    return Score(
        name=name,
        task="segment",
        mode="probe",
        metric=metric,
        budget=labelled,
        labelled=labelled,
        repeats=1,
        value=interval(estimate, bare=bare),
        parts=parts or {},
    )


def size(picture: Picture) -> tuple[int, int]:
    image = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))
    assert image.std() > 5
    return image.shape[0], image.shape[1]


def more(name: str = "run", *, band: str = "all resamples", **changes: list[float]) -> Extrapolated:
    points = {"labelled": [5.0, 20.0], "estimate": [0.6, 0.7], "low": [0.6, 0.6], "high": [0.6, 0.8]} | changes
    return Extrapolated(name=name, band=band, **{side: np.array(values) for side, values in points.items()})


def test_every_number_of_labels_is_told_with_its_interval_in_order() -> None:
    scores = [
        score("run", 0.6, 5),
        score("run", 0.4, 1),
        score("scratch", 0.3, 1),
        score("scratch", 0.9, 5, metric="hd"),
    ]
    picture = label_efficiency_picture(scores, "dice")
    assert "run: 0.40 [0.35, 0.44] with 1, 0.60 [0.55, 0.64] with 5; scratch: 0.30 [0.25, 0.34] with 1" in picture.alt
    assert "0.90" not in picture.alt
    assert "95 % bootstrap intervals over the held-out subjects" in picture.caption
    assert "xtrapolated" not in picture.alt + picture.caption
    assert size(picture)[1] <= 710


def test_what_was_extrapolated_is_said_to_be_and_changes_the_picture() -> None:
    scores = [score("run", 0.4, 1), score("run", 0.6, 5)]
    picture = label_efficiency_picture(scores, "dice", extrapolated=[more()])
    assert "run extrapolated to 20: 0.70 [0.60, 0.80]" in picture.alt
    assert "not measured; the band about them holds all resamples" in picture.caption
    assert picture.png != label_efficiency_picture(scores, "dice").png


def test_figures_without_labels_or_without_intervals_can_be_drawn() -> None:
    picture = label_efficiency_picture([score("zeroshot", 0.3, 0), score("run", 0.4, 1, bare=True)], "dice")
    assert "zeroshot: 0.30 [0.25, 0.34] with 0" in picture.alt
    assert "0.40 (n=2, no interval) with 1" in picture.alt
    assert size(label_efficiency_picture([score("zeroshot", 0.3, 0)], "dice"))


@pytest.mark.parametrize(
    ("scores", "extrapolated", "said"),
    [
        ([score("run", 0.4, metric="hd")], [], "needs contestants"),
        ([score("run", 0.4), score("run", 0.5)], [], "two figures"),
        ([score("run", 0.4)], [more("other")], "'other' is extrapolated"),
        ([score(f"run {n}", 0.4) for n in range(6)], [], "no more than 5"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(
    scores: list[Score], extrapolated: list[Extrapolated], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        label_efficiency_picture(scores, "dice", extrapolated=extrapolated)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"low": [0.6]}, "estimate and a band"),
        ({"labelled": [], "estimate": [], "low": [], "high": []}, "needs points"),
        ({"labelled": [5.0, 5.0]}, "must rise"),
        ({"labelled": [0.0, 5.0]}, "from 1 on"),
        ({"high": [0.6, 0.65]}, "within its band"),
        ({"band": " "}, "says what that is"),
    ],
)
def test_an_extrapolation_without_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        more(**changes)


def test_structures_stand_in_the_order_of_the_first_contestants_figures() -> None:
    run = {"liver": interval(0.9), "spleen": interval(0.5, subjects=7), "aorta": interval(0.7, bare=True)}
    scratch = {"liver": interval(0.2), "spleen": interval(0.3), "gallbladder": interval(0.1)}
    picture = structures_picture([score("run", 0.7, parts=run), score("scratch", 0.2, parts=scratch)])
    assert "run: spleen 0.50 [0.45, 0.54], aorta 0.70 (n=2, no interval), liver 0.90 [0.85, 0.94]" in picture.alt
    assert "scratch: spleen 0.30 [0.25, 0.34], liver 0.20 [0.15, 0.24], gallbladder 0.10" in picture.alt
    assert "Dice of 4 structures" in picture.alt
    assert "95 % bootstrap intervals" in picture.caption.replace("\n", " ")
    assert size(picture)[1] <= 710


def test_of_very_many_structures_the_lowest_are_shown_and_the_others_counted() -> None:
    parts = {f"part {n:03}": interval(n / 200) for n in range(MOST_STRUCTURES + 7)}
    picture = structures_picture([score("run", 0.1, parts=parts)])
    assert f"part {MOST_STRUCTURES - 1:03}" in picture.alt
    assert f"part {MOST_STRUCTURES:03}" not in picture.alt
    assert "7 more, with higher figures" in picture.caption
    assert size(picture)[0] < 2200


def test_structures_that_nobody_measured_are_refused() -> None:
    with pytest.raises(ValueError, match="needs contestants"):
        structures_picture([score("run", 0.5)])
