from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.errors import IngestError
from voxelstem.sources.grid import Frame, place

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
OBLIQUE = ((0.8, 0.6, 0.0), (-0.48, 0.64, 0.6))
START = np.array([-10.0, -20.0, 30.0])


def stack(heights, axes=AXIAL, *, slide=None, digits=6):
    """Frames of 5 rows of 0.8 mm and 4 columns of 0.6 mm, at heights along the normal."""
    normal = np.cross(*axes)
    slide = np.zeros((len(heights), 3)) if slide is None else np.asarray(slide)
    return [
        Frame(
            name=f"image {index + 1}",
            orientation=(*axes[0], *axes[1]),
            position_mm=tuple(np.round(START + normal * height + slide[index], digits)),
            pixel_spacing_mm=(0.8, 0.6),
            rows=5,
            columns=4,
        )
        for index, height in enumerate(heights)
    ]


def even(count=8, step=2.5):
    return [index * step for index in range(count)]


def refused(code, words=None):
    return pytest.raises(IngestError, match=words, check=lambda problem: problem.code == code)


def naive_lps_mm(frame, column, row):
    """PS3.3 equation C.7.6.2.1-1, by hand."""
    along_row, along_column = frame.orientation[:3], frame.orientation[3:]
    between_rows, between_columns = frame.pixel_spacing_mm
    return [
        frame.position_mm[axis] + along_row[axis] * between_columns * column + along_column[axis] * between_rows * row
        for axis in range(3)
    ]


@given(
    angles=st.tuples(*[st.floats(-3, 3) for _ in range(3)]),
    order=st.permutations(range(6)),
    step=st.floats(0.3, 8),
)
@settings(max_examples=60, deadline=None)
def test_every_corner_lies_where_the_standard_says_in_any_direction_and_order(angles, order, step):
    x, y, z = angles
    turn = (
        np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
        @ np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
        @ np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    )
    straight = stack(even(6, step), (tuple(turn[:, 0]), tuple(turn[:, 1])))
    frames = [straight[index] for index in order]
    grid = place(frames)
    assert [frames[index].name for index in grid.order] == [f"image {n}" for n in range(1, 7)]
    for column, row, at in ((0, 0, 0), (3, 0, 0), (0, 4, 5), (3, 4, 5), (1, 2, 3)):
        left, back, up = naive_lps_mm(frames[grid.order[at]], column, row)
        np.testing.assert_allclose(grid.affine_ras @ [column, row, at, 1], [-left, -back, up, 1], atol=1e-4)


def test_slices_are_counted_after_columns_and_rows():
    grid = place(stack(even()))
    assert grid.shape == (4, 5, 8)
    assert grid.notes == ()
    assert grid.repair is None


@pytest.mark.parametrize("axes", [AXIAL, OBLIQUE])
@pytest.mark.parametrize("step", [0.33, 0.625, 0.75, 1.25])
@pytest.mark.parametrize("start", [0.0, 0.037])
def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(axes, step, start):
    heights = [start + height for height in even(60, step)]
    grid = place(stack(heights, axes, digits=1))
    assert grid.repair is None
    true = place(stack(heights, axes)).affine_ras
    for corner in ((0, 0, 0, 1), (3, 4, 59, 1)):
        assert np.abs(grid.affine_ras @ corner - true @ corner).max() < 0.06


@pytest.mark.parametrize("step", [0.5, 0.625, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0])
@pytest.mark.parametrize("start", [0.0, -123.5, -812.75, 37.1])
def test_the_slice_spacing_is_the_true_one_to_the_last_digit(step, start):
    for count in (16, 77, 301):
        affine = place(stack([start + height for height in even(count, step)])).affine_ras
        assert affine[2, 2] == step


@pytest.mark.parametrize("step", [0.1, 0.7, 1.1])
def test_a_repaired_stack_has_the_true_slice_spacing_too(step):
    for start in (0.0, -812.75):
        heights = [start + height for height in even(77, step)]
        tilted = stack(heights, slide=[(0, 0.2 * height, 0) for height in even(77, step)])
        assert place(tilted, repair=True).affine_ras[2, 2] == step


def test_a_deviation_from_the_even_grid_is_noted():
    assert place(stack(even(60, 0.625), digits=1)).notes == (
        "slice positions lie up to 0.05 mm off the even grid that they were read as",
    )


def test_positions_cut_after_a_tenth_of_a_millimetre_are_even():
    frames = [
        replace(one, position_mm=tuple(np.trunc(np.array(one.position_mm) * 10) / 10)) for one in stack(even(40, 0.625))
    ]
    assert place(frames).repair is None


def test_finer_positions_excuse_no_uneven_gap():
    heights = even(20, 0.625)
    heights[7] += 0.05
    with refused("slice-gaps", "2 of 19 slice gaps differ"):
        place(stack(heights, digits=3))


@pytest.mark.parametrize("step", [0.3, 0.625, 1.0, 5.0])
@pytest.mark.parametrize("lost", [1, 10, 18])
@pytest.mark.parametrize("digits", [1, 6])
def test_a_missing_slice_is_found_even_when_positions_are_rounded(step, lost, digits):
    heights = even(20, step)
    del heights[lost]
    with refused("slice-gaps"):
        place(stack(heights, digits=digits))


def test_gaps_of_whole_multiples_say_where_how_many_slices_are_missing():
    heights = [height for index, height in enumerate(even(20)) if index not in (3, 9, 10)]
    with refused("slice-gaps", r"series of 17 slices every 2\.50 mm are 3: 1 after slice 3, 2 after slice 8"):
        place(stack(heights))


def test_other_gaps_are_named_by_the_first():
    heights = even()
    heights[-1] += 1.0
    with refused("slice-gaps", r"1 of 7 slice gaps differ from 2\.50 mm; the first, after slice 7, is 3\.50 mm"):
        place(stack(heights))


def test_small_steps_that_add_up_to_a_drift_are_refused():
    gaps = np.where(np.arange(299) < 150, 2.5 * 1.004, 2.5 * 0.996)
    with refused("slice-gaps", "drift by up to"):
        place(stack(np.concatenate([[0], np.cumsum(gaps)])))


def test_a_slice_twice_in_one_place_is_refused():
    with refused("duplicate-slices", "2 of 10 slices .* the first is slice 4"):
        place(stack([*even(), even()[2], even()[5]]))


def with_digests(frames, contents):
    return [replace(one, digest=lambda content=content: content) for one, content in zip(frames, contents, strict=True)]


def test_repair_drops_a_slice_that_shows_the_same_in_the_same_place():
    frames = with_digests(stack([*even(), even()[2]]), "abcdefghc")
    with refused("duplicate-slices"):
        place(frames)
    grid = place(frames, repair=True)
    assert grid.order == (0, 1, 2, 3, 4, 5, 6, 7)
    assert grid.notes == ("1 exact duplicates of slices dropped",)


@pytest.mark.parametrize("contents", ["abcdefghX", None])
def test_repair_keeps_refusing_another_picture_in_the_same_place(contents):
    frames = stack([*even(), even()[2]])
    with refused("duplicate-slices"):
        place(with_digests(frames, contents) if contents else frames, repair=True)


def test_equal_pictures_side_by_side_are_no_duplicates():
    frames = with_digests(stack([*even(), even()[2]], slide=[[0, 0, 0]] * 8 + [[5, 0, 0]]), "abcdefghc")
    with refused("duplicate-slices"):
        place(frames, repair=True)


def test_too_few_slices_are_refused_also_after_duplicates_went():
    with refused("too-few-slices", "has 2 slices"):
        place(stack(even(2)))
    with refused("too-few-slices", "has 2 slices"):
        place(with_digests(stack([0, 2.5, 2.5]), "abb"), repair=True)


@pytest.mark.parametrize("degrees", [0.5, 18.5, -30.0])
def test_a_tilt_is_refused_with_its_angle_and_described_for_repair(degrees):
    heights = np.array(even(20))
    slide = np.tan(np.radians(degrees)) * heights
    frames = stack(heights, slide=np.stack([0 * slide, slide, 0 * slide], axis=1))
    with refused("tilt", re.escape(f"about {abs(degrees):.1f} degrees")):
        place(frames)
    grid = place(frames, repair=True)
    assert grid.repair is not None
    np.testing.assert_allclose(grid.repair.slide_mm, np.stack([0 * slide, slide], axis=1), atol=1e-5)
    np.testing.assert_allclose(grid.repair.height_mm, heights, atol=1e-5)
    assert grid.repair.step_mm == pytest.approx(2.5)


def test_a_slide_steeper_than_any_gantry_stays_refused():
    heights = np.array(even())
    with refused("tilt"):
        place(stack(heights, slide=np.outer(heights, [0, 1.2, 0])), repair=True)


def test_repair_takes_one_missing_slice_and_uneven_gaps_but_no_larger_hole():
    heights = even(20)
    one = place(stack(heights[:5] + heights[6:]), repair=True)
    assert one.repair is not None
    assert one.repair.step_mm == pytest.approx(2.5)
    assert one.shape == (4, 5, 19)
    with refused("slice-gaps") as caught:
        place(stack(heights[:5] + heights[7:]), repair=True)
    assert "too wide for --repair" in caught.value.hint


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("orientation", (), "no-geometry"),
        ("position_mm", (), "no-geometry"),
        ("pixel_spacing_mm", (), "no-geometry"),
        ("orientation", (0.0,) * 6, "bad-affine"),
        ("orientation", (2.0, 0.0, 0.0, 0.0, 2.0, 0.0), "bad-affine"),
        ("orientation", (1.0, 0.0, 0.0, 0.6, 0.8, 0.0), "bad-affine"),
        ("orientation", (1.0, 0.0, 0.0, 1.0, 0.0, 0.0), "bad-affine"),
        ("orientation", (1.0, 0.0, 0.0, 0.0, np.nan, 0.0), "bad-affine"),
        ("orientation", (1.0, 0.0, 0.0), "bad-affine"),
        ("position_mm", (0.0, np.inf, 0.0), "bad-affine"),
        ("pixel_spacing_mm", (0.0, 0.6), "bad-affine"),
        ("pixel_spacing_mm", (-0.8, 0.6), "bad-affine"),
    ],
)
def test_headers_that_give_no_place_are_refused(field, value, code):
    with refused(code):
        place([replace(one, **{field: value}) for one in stack(even())], repair=True)


def test_slices_of_another_direction_or_size_are_refused():
    frames = stack(even())
    turned = replace(frames[4], orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    with refused("mixed-orientation", "1 of 8 slices"):
        place([*frames[:4], turned, *frames[5:]], repair=True)
    for other in (replace(frames[4], rows=6), replace(frames[4], pixel_spacing_mm=(0.8, 0.7))):
        with refused("mixed-size"):
            place([*frames[:4], other, *frames[5:]], repair=True)
