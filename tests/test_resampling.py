from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from torch.nn.functional import interpolate

from voxelstem import resampling
from voxelstem.geometry import spacing_mm, voxel_to_patient
from voxelstem.resampling import (
    area_weights,
    grid_affine,
    grid_coordinates,
    resample,
    resampled_count,
    steps_ijk,
    weights,
)

SIZES = st.tuples(*[st.integers(1, 12)] * 3)
EDGES = st.tuples(*[st.floats(0.3, 9)] * 3)
SEEDS = st.integers(0, 999)


def voxels(shape: tuple[int, ...], seed: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1000, 1000, (channels, *shape)).astype(np.float32)


def oblique(spacing: tuple[float, float, float], seed: int) -> np.ndarray:
    """An affine whose axes are turned anyhow, with a random origin."""
    rng = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turned * spacing
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return affine


def naive_triangle(line: np.ndarray, place: float, width: float, air: float = 0.0) -> float:
    """The textbook: a triangle of half-width `width` over an endless line that is air beyond the scan."""
    size = len(line)
    inside = -0.5 <= place <= size - 0.5
    centre = min(max(place, 0), size - 1) if inside else place
    heights, values = [], []
    for index in range(math.floor(centre - width) - 1, math.ceil(centre + width) + 2):
        height = max(0.0, 1 - abs(index - centre) / width)
        if height and (0 <= index < size or not inside):
            heights.append(height)
            values.append(line[index] if 0 <= index < size else air)
    return sum(h * v for h, v in zip(heights, values, strict=True)) / sum(heights)


def naive_resample(array: np.ndarray, have: tuple[float, ...], wanted: tuple[float, ...]) -> np.ndarray:
    """Every line along every axis by itself, in double precision."""
    for axis, (old, new) in enumerate(zip(have, wanted, strict=True)):
        size = array.shape[axis]
        step = new / old
        count = resampled_count(size, old, new)
        places = [min((at + 0.5) * step - 0.5, size - 0.5) for at in range(count)]
        array = np.apply_along_axis(
            lambda line, places=places, step=step: np.array([naive_triangle(line, p, max(1.0, step)) for p in places]),
            axis,
            array.astype(np.float64),
        )
    return array


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 12), count=st.integers(1, 9), start=st.floats(-6, 12), step=st.floats(0.2, 5), seed=SEEDS)
def test_along_one_axis_it_is_a_triangle_over_an_endless_line(
    size: int, count: int, start: float, step: float, seed: int
) -> None:
    line = voxels((size,), seed)[0].astype(np.float64)
    places = grid_coordinates(count, start=start, step=step)
    assume(np.abs(places + 0.5).min() > 1e-6)
    assume(np.abs(places - size + 0.5).min() > 1e-6)
    expected = [naive_triangle(line, place, max(1.0, step)) for place in places]
    np.testing.assert_allclose(weights(places, size, step=step) @ line, expected, atol=1e-6)


def test_a_single_coordinate_averages_over_its_whole_step() -> None:
    places = grid_coordinates(1, start=0.0, step=10.0)
    seen = weights(places, 10, step=10.0)[0]
    assert (seen > 0).all()
    assert seen.sum() == pytest.approx(1)


@pytest.mark.parametrize("step", [1.3, 1.5, 2.7])
def test_a_ramp_thinned_by_a_fraction_is_off_by_a_tenth_of_a_voxel_at_most(step: float) -> None:
    places = grid_coordinates(int(24 / step), start=0.0, step=step)
    inner = (places >= step) & (places <= 23 - step)
    assert np.abs((weights(places, 24, step=step) @ np.arange(24.0) - places)[inner]).max() < 0.1


@settings(max_examples=50, deadline=None)
@given(size=st.integers(4, 40), step=st.floats(1.0, 50.0))
def test_thinning_looks_at_every_voxel(size: int, step: float) -> None:
    count = resampled_count(size, 1.0, step)
    assert (weights(grid_coordinates(count, start=0.0, step=step), size, step=step).sum(axis=0) > 0).all()


def test_centres_lie_half_a_voxel_inside_the_edges() -> None:
    np.testing.assert_allclose(grid_coordinates(4, start=0.0, step=2.0), [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_allclose(grid_coordinates(2, start=3.0, step=0.5), [2.75, 3.25])


@given(count=st.integers(1, 2000), have=st.floats(0.1, 10), wanted=st.floats(0.1, 10))
def test_resampling_never_cuts_and_never_adds_a_whole_voxel(count: int, have: float, wanted: float) -> None:
    result = resampled_count(count, have, wanted)
    assert result >= 1
    assert result * wanted >= count * have - 2e-6 * wanted
    assert result == 1 or (result - 1) * wanted < count * have


def test_a_spacing_that_divides_evenly_adds_no_voxel_of_padding() -> None:
    assert resampled_count(100, 0.3, 0.1) == 300
    assert resampled_count(3, 0.1, 0.3) == 1


@settings(max_examples=60, deadline=None)
@given(shape=SIZES, have=EDGES, finer=st.tuples(*[st.floats(0.2, 1.0)] * 3), seed=SEEDS)
def test_a_finer_grid_is_scipys_linear_interpolation(
    shape: tuple[int, int, int], have: tuple[float, ...], finer: tuple[float, ...], seed: int
) -> None:
    array, affine = voxels(shape, seed), oblique((have[0], have[1], have[2]), seed)
    wanted = tuple(old * step for old, step in zip(have, finer, strict=True))
    result, new_affine = resample(array, affine, (wanted[0], wanted[1], wanted[2]))
    # scipy is asked at the places in the patient where the result says its voxels lie.
    ijk = np.stack(np.meshgrid(*map(np.arange, result.shape[1:]), indexing="ij"), -1).reshape(-1, 3)
    places = (np.linalg.inv(affine) @ new_affine @ np.c_[ijk, np.ones(len(ijk))].T)[:3]
    expected = map_coordinates(array[0].astype(np.float64), places, order=1, mode="nearest")
    np.testing.assert_allclose(result[0].ravel(), expected, atol=2e-3)


@settings(max_examples=12, deadline=None)
@given(shape=SIZES, have=EDGES, wanted=EDGES, seed=SEEDS)
def test_any_grid_is_the_naive_triangle_line_by_line(
    shape: tuple[int, int, int], have: tuple[float, ...], wanted: tuple[float, float, float], seed: int
) -> None:
    steps = [abs(new / old - 1) * size for old, new, size in zip(have, wanted, shape, strict=True)]
    assume(min(steps) > resampling.SAME_VOXELS)
    array = voxels(shape, seed)
    result, _ = resample(array, np.diag([*have, 1.0]), wanted)
    np.testing.assert_allclose(result[0], naive_resample(array[0], have, wanted), atol=2e-3)


def test_more_planes_than_are_made_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    array = voxels((70, 45, 20), 3, channels=2)
    whole, _ = resample(array, np.eye(4), (1.7, 0.6, 2.4))
    monkeypatch.setattr(resampling, "ROWS", 3)
    by_threes, _ = resample(array, np.eye(4), (1.7, 0.6, 2.4))
    np.testing.assert_allclose(by_threes, whole, atol=1e-3)
    for channel in (0, 1):
        alone, _ = resample(array[channel : channel + 1], np.eye(4), (1.7, 0.6, 2.4))
        np.testing.assert_array_equal(by_threes[channel], alone[0])


@settings(max_examples=60, deadline=None)
@given(shape=SIZES, have=EDGES, wanted=EDGES, seed=SEEDS)
def test_labels_take_the_value_of_the_nearest_voxel(
    shape: tuple[int, int, int], have: tuple[float, ...], wanted: tuple[float, float, float], seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, 9, (1, *shape)).astype(np.int16)
    affine = np.diag([*have, 1.0])
    result, new_affine = resample(labels, affine, wanted, mode="nearest")
    assert result.dtype == np.int16
    lines = []
    for axis, size in enumerate(shape):
        step, first = new_affine[axis, axis] / have[axis], new_affine[axis, 3] / have[axis]
        centres = [min(first + at * step, size - 1) for at in range(result.shape[axis + 1])]
        # Of two voxels at the same distance the higher one.
        lines.append([min(range(size), key=lambda at, c=c: (round(abs(at - c), 5), -at)) for c in centres])
    for to, source in zip(np.ndindex(result.shape[1:]), itertools.product(*lines), strict=True):
        assert result[(0, *to)] == labels[(0, *source)]


@settings(max_examples=60, deadline=None)
@given(shape=SIZES, have=EDGES, wanted=EDGES, seed=SEEDS)
def test_the_field_of_view_stays_where_it_is_in_the_patient(
    shape: tuple[int, int, int], have: tuple[float, float, float], wanted: tuple[float, float, float], seed: int
) -> None:
    affine = oblique(have, seed)
    result, new_affine = resample(voxels(shape, seed), affine, wanted)
    low, new_low = (voxel_to_patient(np.full((1, 3), -0.5), a) for a in (affine, new_affine))
    np.testing.assert_allclose(new_low, low, atol=1e-9)
    # The far corner, measured along the axes: never inside the old one, never a whole voxel beyond.
    beyond = np.array(result.shape[1:]) * spacing_mm(new_affine) - np.array(shape) * have
    assert (beyond > -resampling.SAME_VOXELS * np.array(wanted)).all()
    assert (beyond < np.array(wanted) + 1e-6).all()
    np.testing.assert_allclose(new_affine[:3, :3] / spacing_mm(new_affine), affine[:3, :3] / have, atol=1e-9)


def test_a_voxel_that_stays_keeps_its_place() -> None:
    """A bright blob's centre of mass lies at the same millimetres before and after."""
    grid = np.stack(np.meshgrid(*map(np.arange, (40, 36, 30)), indexing="ij"), -1).astype(float)
    blob = np.exp(-((grid - [17.3, 20.1, 12.6]) ** 2 / 18).sum(-1)).astype(np.float32)[None]
    affine = oblique((1.0, 1.2, 2.0), 5)
    for wanted in ((2.0, 2.4, 3.0), (0.7, 0.9, 1.1), (3.0, 0.6, 2.0)):
        result, new_affine = resample(blob, affine, wanted)
        places = []
        for array, a in ((blob, affine), (result, new_affine)):
            ijk = np.stack(np.meshgrid(*map(np.arange, array.shape[1:]), indexing="ij"), -1).reshape(-1, 3)
            mass = array.ravel().astype(np.float64)[:, None]
            places.append(voxel_to_patient((ijk * mass).sum(0, keepdims=True) / mass.sum(), a))
        np.testing.assert_allclose(places[0], places[1], atol=0.02)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_an_axis_with_the_wanted_spacing_is_copied_bit_for_bit(mode: resampling.Mode) -> None:
    array = voxels((20, 17, 9), 1)
    result, affine = resample(array, np.diag([1.0, 1.5, 2.000001, 1.0]), (1.0, 1.500001, 2.0), mode=mode)
    np.testing.assert_array_equal(result, array)
    np.testing.assert_array_equal(affine, np.diag([1.0, 1.5, 2.000001, 1.0]))
    thinned, _ = resample(array, np.diag([1.0, 1.5, 2.0, 1.0]), (2.0, 1.5, 2.0), mode=mode)
    assert thinned.shape == (1, 10, 17, 9)


def test_the_input_is_left_alone() -> None:
    array = voxels((20, 17, 9), 1)
    before = array.copy()
    resample(array, np.eye(4), (2.0, 0.5, 1.0))
    np.testing.assert_array_equal(array, before)


def test_thinning_does_not_alias() -> None:
    """Stripes finer than the new grid become their mean, not another pattern."""
    stripes = np.tile(np.where(np.arange(120) % 2, 500.0, -500.0).astype(np.float32)[None, :, None, None], (1, 1, 4, 4))
    thinned, _ = resample(stripes, np.eye(4), (4.0, 1.0, 1.0))
    assert np.abs(thinned[:, 2:-2]).max() < 1


def test_memory_is_input_and_output_and_a_few_planes() -> None:
    array = voxels((160, 160, 100), 0)
    tracemalloc.start()
    result, _ = resample(array, np.eye(4), (1.5, 1.5, 1.5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < result.nbytes + 0.35 * array.nbytes


@pytest.mark.parametrize("spacing", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, float("nan"))])
def test_a_spacing_without_extent_is_refused(spacing: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        resample(voxels((3, 3, 3), 0), np.eye(4), spacing)


def test_a_grid_of_wider_voxels_begins_at_the_same_corner() -> None:
    affine = oblique((1.0, 2.0, 3.0), 2)
    wider = grid_affine(affine, (2.0, 1.5, 0.5))
    assert spacing_mm(wider) == pytest.approx((2.0, 3.0, 1.5))
    low = np.full((1, 3), -0.5)
    np.testing.assert_allclose(voxel_to_patient(low, wider), voxel_to_patient(low, affine), atol=1e-9)


def test_steps_are_exactly_one_where_the_far_end_would_not_move() -> None:
    assert steps_ijk(np.diag([1.0, 1.0, 1.0, 1.0]), (100, 100, 100), (1.0004, 1.0006, 2.0)) == (1.0, 1.0006, 2.0)


@given(st.integers(1, 40), st.integers(1, 40), SEEDS)
def test_an_area_is_the_mean_of_all_voxels_that_it_touches(size: int, count: int, seed: int):
    line = np.random.default_rng(seed).uniform(-1000, 1000, size)
    expected = [
        np.mean([line[at] for at in range(size) if (at + 1) * count > out * size and at * count < (out + 1) * size])
        for out in range(count)
    ]
    assert np.allclose(area_weights(size, count) @ line, expected, atol=1e-9)


@given(SIZES, SIZES, SEEDS)
@settings(max_examples=40)
def test_areas_along_three_axes_are_torchs_area_interpolation(shape, wanted, seed: int):
    array = voxels(shape, seed)[0].astype(np.float64)
    over_i, over_j, over_k = (area_weights(size, count) for size, count in zip(shape, wanted, strict=True))
    found = np.einsum("ai,bj,ck,ijk->abc", over_i, over_j, over_k, array)
    expected = interpolate(torch.from_numpy(array)[None, None], size=wanted, mode="area")[0, 0]
    assert np.allclose(found, expected, atol=1e-9)
