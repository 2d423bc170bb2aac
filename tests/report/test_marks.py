from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from voxelstem.metrics import Interval
from voxelstem.report.marks import LONGEST_NAME, MARKS, marks_of, told, written

# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0: linear RGB as somebody without one kind of cones sees it.
CONES = {
    "all": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = TO_XYZ @ np.clip(rgb, 0, 1) / [0.95047, 1.0, 1.08883]
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", CONES)
def test_colours_stay_apart_for_everybody(kind: str) -> None:
    seen = [lab(CONES[kind] @ linear(mark.colour)) for mark in MARKS]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 15


def test_colours_stand_out_on_white() -> None:
    # WCAG 2.1, success criterion 1.4.11: 3 to 1 for graphics.
    assert min(1.05 / (TO_XYZ[1] @ linear(mark.colour) + 0.05) for mark in MARKS) >= 3


def test_no_two_contestants_share_a_line_or_a_marker() -> None:
    assert len({str(mark.line) for mark in MARKS}) == len({mark.marker for mark in MARKS}) == len(MARKS)


def test_marks_follow_the_order_of_the_names() -> None:
    assert list(marks_of(["run", "scratch"]).items()) == [("run", MARKS[0]), ("scratch", MARKS[1])]
    assert marks_of(["scratch"])["scratch"] == MARKS[0]


@pytest.mark.parametrize(
    ("names", "said"), [([], "none"), (["a", "b", "a"], "names of their own"), (list("abcdef"), "no more than 5")]
)
def test_contestants_that_cannot_be_told_apart_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        marks_of(names)


def test_a_name_in_a_picture_is_no_formula_and_hidden_from_no_legend() -> None:
    assert written("cost $x$") == r"cost \$x\$"
    assert not written("_mine").startswith("_")
    assert written("_mine").strip() == "_mine"
    assert len(written("x" * 200)) == LONGEST_NAME


def test_a_figure_is_told_with_its_interval_or_why_there_is_none() -> None:
    assert told(Interval(estimate=0.7, low=0.6, high=0.8, subjects=9)) == "0.70 [0.60, 0.80]"
    assert told(Interval(estimate=0.7, low=None, high=None, subjects=2, note="n=2, no interval")) == (
        "0.70 (n=2, no interval)"
    )
