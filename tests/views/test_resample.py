from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from voxelstem.resampling import grid_coordinates, resample, weights
from voxelstem.views.resample import sample

AIR = -1000.0
SIZES = st.tuples(*[st.integers(1, 7)] * 3)


def cube(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1000, 1000, shape)


def read(array: np.ndarray, coordinates: list[np.ndarray], step: float = 1.0) -> np.ndarray:
    picked = (coordinates[0], coordinates[1], coordinates[2])
    return sample(torch.from_numpy(array)[None], picked, step_ijk=(step, step, step), outside=AIR)[0].numpy()


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


@given(shape=SIZES)
@settings(max_examples=20, deadline=None)
def test_the_scans_own_grid_gives_back_its_voxels_exactly(shape: tuple[int, int, int]) -> None:
    array = cube(shape, 0)
    whole = torch.from_numpy(np.round(array)).float()[None]
    own = [grid_coordinates(size, start=0.0, step=1.0) for size in shape]
    assert torch.equal(sample(whole, (own[0], own[1], own[2]), step_ijk=(1.0, 1.0, 1.0), outside=AIR), whole)


@pytest.mark.parametrize("step", [0.3, 1.0, 1.7, 2.0, 3.3, 5.0])
def test_a_constant_stays_constant(step: float) -> None:
    count = int(10 / step)
    places = grid_coordinates(count, start=0.0, step=step)
    np.testing.assert_allclose(read(np.full((10, 10, 10), 40.0), [places] * 3, step), 40.0, rtol=1e-12)


@pytest.mark.parametrize("step", [0.25, 0.5, 1.0, 2.0, 3.0, 4.0])
def test_a_ramp_stays_a_ramp_away_from_the_edges(step: float) -> None:
    places = grid_coordinates(int(24 / step), start=0.0, step=step)
    ramp = np.tile(np.arange(24.0)[:, None, None], (1, 24, 24))
    got = read(ramp, [places] * 3, step)[:, 0, 0]
    inner = (places >= step) & (places <= 23 - step)
    assert inner.any()
    np.testing.assert_allclose(got[inner], places[inner], atol=1e-9)


@pytest.mark.parametrize("spacing", [(2.0, 1.5, 3.0), (0.5, 1.0, 0.8), (8.0, 8.0, 8.0)])
def test_torch_and_numpy_make_the_same_voxels(spacing: tuple[float, float, float]) -> None:
    array = cube((8, 6, 24), 4).astype(np.float32)[None]
    expected, _ = resample(array, np.eye(4), spacing)
    places = [
        np.minimum(grid_coordinates(count, start=0.0, step=step), size - 0.5)
        for count, step, size in zip(expected.shape[1:], spacing, array.shape[1:], strict=True)
    ]
    got = sample(torch.from_numpy(array), (places[0], places[1], places[2]), step_ijk=spacing, outside=AIR)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-3)


def test_a_view_of_one_voxel_is_the_mean_of_what_it_spans() -> None:
    ramp = np.tile(np.arange(10.0)[:, None, None], (1, 10, 10))
    place = grid_coordinates(1, start=0.0, step=10.0)
    assert read(ramp, [place] * 3, 10.0).item() == pytest.approx(4.5)
    spike = np.zeros((10, 10, 10))
    spike[1, 8, 2] = 1000.0
    assert read(spike, [place] * 3, 10.0).item() > 0


def test_beyond_the_scan_lies_the_outside_value() -> None:
    array = cube((4, 4, 4), 1)
    got = read(array, [np.array([-2.0, -1.0, 4.0, 7.0]), np.arange(4.0), np.arange(4.0)])
    np.testing.assert_allclose(got, AIR)


def test_half_a_voxel_beyond_the_last_centre_still_repeats_the_edge() -> None:
    array = cube((4, 3, 3), 2)
    got = read(array, [np.array([-0.5, -0.2, 3.2, 3.5]), np.arange(3.0), np.arange(3.0)])
    np.testing.assert_allclose(got, array[[0, 0, 3, 3]], rtol=1e-12)


def test_channels_do_not_mix() -> None:
    array = torch.from_numpy(np.stack([cube((5, 5, 5), seed) for seed in (0, 1)]))
    places = grid_coordinates(3, start=0.4, step=1.4)
    how = {"step_ijk": (1.4, 1.4, 1.4), "outside": AIR}
    both = sample(array, (places, places, places), **how)
    for channel in (0, 1):
        alone = sample(array[channel : channel + 1], (places, places, places), **how)
        torch.testing.assert_close(both[channel : channel + 1], alone)


@pytest.mark.parametrize("counts", [(40, 3, 9), (5, 50, 20), (33, 17, 2)])
def test_axes_may_shrink_and_grow_at_once_and_in_any_order(counts: tuple[int, int, int]) -> None:
    array = np.stack([cube((21, 18, 35), seed) for seed in (0, 1)])
    steps = [size / count for size, count in zip(array.shape[1:], counts, strict=True)]
    places = [grid_coordinates(count, start=-0.2, step=step * 0.95) for count, step in zip(counts, steps, strict=True)]
    expected = array - AIR
    for axis, (place, step) in enumerate(zip(places, steps, strict=True), start=1):
        matrix = weights(place, array.shape[axis], step=step)
        expected = np.moveaxis(np.tensordot(matrix, expected, axes=(1, axis)), 0, axis)
    got = sample(
        torch.from_numpy(array),
        (places[0], places[1], places[2]),
        step_ijk=(steps[0], steps[1], steps[2]),
        outside=AIR,
    )
    np.testing.assert_allclose(got.numpy(), expected + AIR, atol=1e-9)
