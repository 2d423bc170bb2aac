from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from voxelstem.views.resample import grid_coordinates, resampled_count, sample, weights

AIR = -1000.0
SIZES = st.tuples(*[st.integers(1, 7)] * 3)


def cube(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1000, 1000, shape)


def read(array: np.ndarray, coordinates: list[np.ndarray]) -> np.ndarray:
    picked = (coordinates[0], coordinates[1], coordinates[2])
    return sample(torch.from_numpy(array)[None], picked, outside=AIR)[0].numpy()


def naive_value(line: np.ndarray, place: float, width: float) -> float:
    """The textbook: a triangle of half-width `width` over an endless line that is air beyond the scan."""
    size = len(line)
    inside = -0.5 <= place <= size - 0.5
    centre = min(max(place, 0), size - 1) if inside else place
    heights, values = [], []
    for index in range(math.floor(centre - width) - 1, math.ceil(centre + width) + 2):
        height = max(0.0, 1 - abs(index - centre) / width)
        if height and (0 <= index < size or not inside):
            heights.append(height)
            values.append(line[index] if 0 <= index < size else AIR)
    return sum(h * v for h, v in zip(heights, values, strict=True)) / sum(heights)


@settings(max_examples=50, deadline=None)
@given(shape=SIZES, seed=st.integers(0, 999))
def test_inside_the_scan_it_is_linear_interpolation(shape: tuple[int, int, int], seed: int) -> None:
    rng, array = np.random.default_rng(seed), cube(shape, seed)
    coordinates = []
    for size in shape:
        count = int(rng.integers(1, 9))
        step = rng.uniform(0, min(1.0, (size - 1) / count))
        coordinates.append(rng.uniform(0, size - 1 - step * (count - 1)) + step * np.arange(count))
    expected = map_coordinates(array, np.meshgrid(*coordinates, indexing="ij"), order=1, mode="nearest")
    np.testing.assert_allclose(read(array, coordinates), expected, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 12),
    count=st.integers(2, 9),
    start=st.floats(-6, 12),
    step=st.floats(0.2, 5),
    seed=st.integers(0, 9),
)
def test_along_one_axis_it_is_a_triangle_over_an_endless_line(
    size: int, count: int, start: float, step: float, seed: int
) -> None:
    line = cube((size, 1, 1), seed)
    places = grid_coordinates(count, start=start, step=step)
    assume(np.abs(places + 0.5).min() > 1e-6)
    assume(np.abs(places - size + 0.5).min() > 1e-6)
    expected = [naive_value(line[:, 0, 0], place, max(1.0, step)) for place in places]
    got = read(line, [places, np.zeros(1), np.zeros(1)])[:, 0, 0]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@given(shape=SIZES)
@settings(max_examples=20, deadline=None)
def test_the_scans_own_grid_gives_back_its_voxels_exactly(shape: tuple[int, int, int]) -> None:
    array = cube(shape, 0)
    whole = torch.from_numpy(np.round(array)).float()[None]
    own = [grid_coordinates(size, start=0.0, step=1.0) for size in shape]
    assert torch.equal(sample(whole, (own[0], own[1], own[2]), outside=AIR), whole)


@pytest.mark.parametrize("step", [0.3, 1.0, 1.7, 2.0, 3.3, 5.0])
def test_a_constant_stays_constant(step: float) -> None:
    count = int(10 / step)
    places = grid_coordinates(count, start=0.0, step=step)
    np.testing.assert_allclose(read(np.full((10, 10, 10), 40.0), [places] * 3), 40.0, rtol=1e-12)


@pytest.mark.parametrize("step", [0.25, 0.5, 1.0, 2.0, 3.0, 4.0])
def test_a_ramp_stays_a_ramp_away_from_the_edges(step: float) -> None:
    places = grid_coordinates(int(24 / step), start=0.0, step=step)
    ramp = np.tile(np.arange(24.0)[:, None, None], (1, 2, 2))
    got = read(ramp, [places, np.arange(2.0), np.arange(2.0)])[:, 0, 0]
    inner = (places >= step) & (places <= 23 - step)
    assert inner.any()
    np.testing.assert_allclose(got[inner], places[inner], atol=1e-9)


@pytest.mark.parametrize("step", [1.3, 1.5, 2.7])
def test_a_ramp_thinned_by_a_fraction_is_off_by_a_tenth_of_a_voxel_at_most(step: float) -> None:
    places = grid_coordinates(int(24 / step), start=0.0, step=step)
    inner = (places >= step) & (places <= 23 - step)
    assert np.abs((weights(places, 24) @ np.arange(24.0) - places)[inner]).max() < 0.1


def test_beyond_the_scan_lies_the_outside_value() -> None:
    array = cube((4, 4, 4), 1)
    got = read(array, [np.array([-2.0, -1.0, 4.0, 7.0]), np.arange(4.0), np.arange(4.0)])
    np.testing.assert_allclose(got, AIR)


def test_half_a_voxel_beyond_the_last_centre_still_repeats_the_edge() -> None:
    array = cube((4, 3, 3), 2)
    got = read(array, [np.array([-0.5, -0.2, 3.2, 3.5]), np.arange(3.0), np.arange(3.0)])
    np.testing.assert_allclose(got, array[[0, 0, 3, 3]], rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(4, 40), step=st.floats(1.0, 3.9))
def test_thinning_looks_at_every_voxel(size: int, step: float) -> None:
    count = resampled_count(size, 1.0, step)
    assert (weights(grid_coordinates(count, start=0.0, step=step), size).sum(axis=0) > 0).all()


def test_channels_do_not_mix() -> None:
    array = torch.from_numpy(np.stack([cube((5, 5, 5), seed) for seed in (0, 1)]))
    places = grid_coordinates(3, start=0.4, step=1.4)
    both = sample(array, (places, places, places), outside=AIR)
    for channel in (0, 1):
        alone = sample(array[channel : channel + 1], (places, places, places), outside=AIR)
        torch.testing.assert_close(both[channel : channel + 1], alone)


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
