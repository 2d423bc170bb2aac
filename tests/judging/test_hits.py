from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.heads.boxes import Box, Matched
from voxelstem.judging.hits import Counted, count, painted, thresholds_of
from voxelstem.tasks.detect import Detected


def said(*boxes: tuple[float, bool], truths: int, scans: int = 1) -> Matched:
    scores, hits = zip(*boxes, strict=True) if boxes else ((), ())
    return Matched(scores=tuple(scores), hits=tuple(hits), truths=truths, scans=scans)


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.8, 0.9]), st.booleans()), max_size=6),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([0.125, 0.5, 1.0, 2.0]),
)
def test_the_threshold_is_the_lowest_score_that_slow_counting_allows(
    subjects: list[list[tuple[float, bool]]], rate: float
) -> None:
    outcomes = {f"s{at}": Detected(by_class={"cyst": said(*boxes, truths=6)}) for at, boxes in enumerate(subjects)}
    allowed = [math.inf]
    for limit in {score for boxes in subjects for score, _ in boxes}:
        false = sum(score >= limit and not hit for boxes in subjects for score, hit in boxes)
        if false <= rate * len(subjects):
            allowed.append(limit)
    assert thresholds_of(outcomes, rate=rate) == {"cyst": min(allowed)}


def test_each_class_has_its_own_threshold_and_scans_are_counted_not_subjects() -> None:
    outcomes = {
        "one": Detected(
            by_class={"cyst": said((0.9, False), (0.8, False), truths=0, scans=2), "stone": said(truths=1)}
        ),
        "two": Detected(by_class={"cyst": said((0.7, False), (0.6, False), (0.5, True), truths=2)}),
    }
    # Three scans allow three false cysts.
    assert thresholds_of(outcomes) == {"cyst": 0.7, "stone": math.inf}


def test_a_subject_s_boxes_are_counted_from_the_thresholds_on() -> None:
    one = Detected(
        by_class={
            "cyst": said((0.9, True), (0.8, False), (0.3, True), truths=3),
            "stone": said((0.9, False), (0.2, True), truths=1),
        }
    )
    found = count(one, {"cyst": 0.5, "stone": 0.1})
    assert found == Counted(found=2, missed=2, false=2)
    assert found.errors == 4
    assert count(one, {"cyst": math.inf, "stone": math.inf}) == Counted(found=0, missed=4, false=0)


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_boxes_are_painted_where_voxel_centres_lie_in_them_and_the_first_lies_on_top(tilt: float) -> None:
    turn = np.array([[math.cos(tilt), -math.sin(tilt), 0], [math.sin(tilt), math.cos(tilt), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([1.5, 2.0, -3.0]), (-20.0, 5.0, 40.0)
    shape = (12, 10, 8)
    boxes = [
        Box(name="a", low_ras_mm=(-18.0, 7.0, 20.0), high_ras_mm=(-9.0, 16.0, 33.0)),
        Box(name="b", low_ras_mm=(-12.0, 9.0, 10.0), high_ras_mm=(900.0, 900.0, 30.0)),
        Box(name="c", low_ras_mm=(500.0, 500.0, 500.0), high_ras_mm=(501.0, 501.0, 501.0)),
    ]
    wanted = np.zeros(shape, np.int16)
    for at in np.ndindex(shape):
        centre = affine[:3, :3] @ np.array(at, dtype=float) + affine[:3, 3]
        for number, box in enumerate(boxes, start=1):
            if np.all(centre >= box.low_ras_mm) and np.all(centre <= box.high_ras_mm):
                wanted[at] = number
                break
    np.testing.assert_array_equal(painted(boxes, affine, shape), wanted)
    assert set(np.unique(wanted)) == {0, 1, 2}
    assert not painted([], affine, shape).any()
