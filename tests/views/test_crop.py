from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.errors import ConfigError
from voxelstem.study import InputSpec
from voxelstem.views.crop import Crop, ViewKind, ViewPlan, apply_view, covering_crop, cut, draw_crop, draw_views

SPEC = InputSpec(spacing_mm=(2.0, 2.0, 3.0))
AIR = -1000.0
SHAPES = st.tuples(*[st.integers(1, 12)] * 3)
MM = st.tuples(*[st.floats(0.4, 5.0)] * 3)


@settings(max_examples=50, deadline=None)
@given(shape=SHAPES, size=SHAPES, seed=st.integers(0, 99))
def test_a_drawn_crop_lies_in_the_volume_and_is_as_large_as_it_may_be(
    shape: tuple[int, int, int], size: tuple[int, int, int], seed: int
) -> None:
    crop = draw_crop(shape, size, np.random.default_rng(seed))
    assert crop.size_ijk == tuple(min(pair) for pair in zip(shape, size, strict=True))
    assert min(crop.start_ijk) >= 0
    assert cut(np.zeros((1, *shape)), crop).shape == (1, *crop.size_ijk)


def test_views_of_a_spec_that_has_no_spacing_are_refused() -> None:
    spec, box = InputSpec(resampling="fit"), ((0.0, 0.0, 0.0), (9.0, 9.0, 9.0))
    with pytest.raises(ConfigError, match="views need a spacing"):
        draw_views(ViewKind(), spec, box, np.random.default_rng(0))


def test_a_crop_reaches_every_place_of_the_volume() -> None:
    rng = np.random.default_rng(0)
    starts = {draw_crop((4, 3, 2), (2, 2, 2), rng).start_ijk for _ in range(200)}
    assert starts == {(i, j, 0) for i in range(3) for j in range(2)}


def test_cutting_takes_the_voxels_of_the_box() -> None:
    array = np.arange(2.0 * 4 * 5 * 6).reshape(2, 4, 5, 6)
    box = cut(array, Crop(start_ijk=(1, 2, 3), size_ijk=(2, 3, 1)))
    assert box.shape == (2, 2, 3, 1)
    for channel, i, j, k in np.ndindex(box.shape):
        assert box[channel, i, j, k] == array[channel, 1 + i, 2 + j, 3 + k]


@settings(max_examples=50, deadline=None)
@given(start=MM, extra=MM, seed=st.integers(0, 999))
def test_views_stay_in_the_box_when_they_fit(
    start: tuple[float, float, float], extra: tuple[float, float, float], seed: int
) -> None:
    kind = ViewKind(count=4, size_ijk=(8, 6, 4), min_scale=0.5, max_scale=1.5)
    largest = np.array(kind.size_ijk) * SPEC.spacing_mm * kind.max_scale
    box = np.array(start), largest + extra
    for plan in draw_views(kind, SPEC, (tuple(box[0]), tuple(box[1])), np.random.default_rng(seed)):
        assert (np.array(plan.start_mm) >= box[0] - 1e-9).all()
        assert (np.array(plan.start_mm) + plan.extent_mm <= box[0] + box[1] + 1e-9).all()


def test_a_view_longer_than_the_box_is_centred_on_it() -> None:
    kind = ViewKind(size_ijk=(10, 10, 10))
    plan = draw_views(kind, SPEC, ((5.0, 0.0, 1.0), (8.0, 20.0, 10.0)), np.random.default_rng(0))[0]
    assert plan.extent_mm == (20.0, 20.0, 30.0)
    np.testing.assert_allclose(plan.start_mm, (5 + 4 - 10, 0.0, 1 + 5 - 15))


def test_scales_fill_their_range_on_every_axis_by_itself() -> None:
    kind = ViewKind(count=400, size_ijk=(8, 6, 4), min_scale=0.5, max_scale=2.0)
    plans = draw_views(kind, SPEC, ((0.0, 0.0, 0.0), (99.0, 99.0, 99.0)), np.random.default_rng(0))
    assert len(plans) == 400
    scales = np.array([plan.extent_mm for plan in plans]) / (np.array(kind.size_ijk) * SPEC.spacing_mm)
    assert scales.min() >= 0.5 - 1e-9
    assert scales.max() <= 2.0 + 1e-9
    assert (scales.min(axis=0) < 0.55).all()
    assert (scales.max(axis=0) > 1.9).all()
    # Drawn evenly in the logarithm: as many views are smaller than the spec's spacing as are larger.
    np.testing.assert_allclose((scales < 1).mean(axis=0), 0.5, atol=0.1)
    assert np.abs(np.corrcoef(scales.T) - np.eye(3)).max() < 0.2


def test_scales_may_differ_by_axis_and_fill_their_range_evenly_in_millimetres() -> None:
    kind = ViewKind(
        count=800, size_ijk=(8, 6, 4), min_scale=(0.5, 1.0, 1.0), max_scale=(1.5, 1.0, 3.0), spread="uniform"
    )
    plans = draw_views(kind, SPEC, ((0.0, 0.0, 0.0), (99.0, 99.0, 99.0)), np.random.default_rng(0))
    scales = np.array([plan.extent_mm for plan in plans]) / (np.array(kind.size_ijk) * SPEC.spacing_mm)
    np.testing.assert_allclose(scales.min(axis=0), (0.5, 1.0, 1.0), atol=0.02)
    np.testing.assert_allclose(scales.max(axis=0), (1.5, 1.0, 3.0), atol=0.02)
    np.testing.assert_allclose(scales.mean(axis=0), (1.0, 1.0, 2.0), atol=0.05)
    quarters = np.histogram(scales[:, 2], bins=4, range=(1.0, 3.0))[0] / 800
    np.testing.assert_allclose(quarters, 0.25, atol=0.05)


def test_the_same_generator_draws_the_same_views() -> None:
    kind = ViewKind(count=3, min_scale=0.5, max_scale=2.0)
    box = ((0.0, 0.0, 0.0), (300.0, 300.0, 300.0))
    first, again, other = (draw_views(kind, SPEC, box, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_what_is_no_view_is_refused() -> None:
    nothing = ({"count": -1}, {"size_ijk": (4, 0, 4)}, {"min_scale": 2.0}, {"min_scale": 0.0})
    axis = ({"min_scale": (0.5, 1.1, 0.5)}, {"max_scale": (1.0, 1.0, float("inf"))}, {"max_scale": float("nan")})
    for wrong in (*nothing, *axis):
        with pytest.raises(ValueError, match="a view needs"):
            ViewKind(**wrong)


@settings(max_examples=150, deadline=None)
@given(
    shape=SHAPES,
    spacing=MM,
    size=st.tuples(*[st.integers(1, 6)] * 3),
    voxel_mm=st.tuples(*[st.floats(0.2, 9.0)] * 3),
    place=st.tuples(*[st.floats(-0.7, 1.3)] * 3),
    seed=st.integers(0, 9),
)
def test_the_covering_crop_gives_the_view_that_the_whole_scan_gives(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    size: tuple[int, int, int],
    voxel_mm: tuple[float, float, float],
    place: tuple[float, float, float],
    seed: int,
) -> None:
    scan = np.random.default_rng(seed).uniform(-1000, 1000, (1, *shape))
    start = np.array(place) * shape * spacing
    extent = np.array(size) * voxel_mm
    plan = ViewPlan(start_mm=tuple(start.tolist()), extent_mm=tuple(extent.tolist()), size_ijk=size)
    crop = covering_crop(plan, spacing, shape)
    assert min(crop.start_ijk) >= 0
    assert (np.array(crop.start_ijk) + crop.size_ijk <= shape).all()
    whole = Crop(start_ijk=(0, 0, 0), size_ijk=shape)
    from_crop, from_whole = (
        apply_view(torch.from_numpy(cut(scan, box)), plan, box, spacing_mm=spacing, outside=AIR)
        for box in (crop, whole)
    )
    assert from_crop.shape == (1, *size)
    torch.testing.assert_close(from_crop, from_whole, rtol=0, atol=1e-6)


def test_the_covering_crop_reads_little_more_than_the_view() -> None:
    plan = ViewPlan(start_mm=(30.0, 30.0, 30.0), extent_mm=(20.0, 20.0, 20.0), size_ijk=(20, 20, 20))
    crop = covering_crop(plan, (1.0, 1.0, 1.0), (100, 100, 100))
    assert max(crop.size_ijk) <= 20 + 4


def test_a_view_on_the_scans_own_grid_is_a_cut() -> None:
    scan = np.random.default_rng(0).integers(-1000, 1000, (1, 9, 8, 7)).astype(np.float32)
    plan = ViewPlan(start_mm=(4.0, 3.0, 0.0), extent_mm=(8.0, 9.0, 20.0), size_ijk=(4, 3, 5))
    crop = covering_crop(plan, (2.0, 3.0, 4.0), (9, 8, 7))
    view = apply_view(torch.from_numpy(cut(scan, crop)), plan, crop, spacing_mm=(2.0, 3.0, 4.0), outside=AIR)
    np.testing.assert_allclose(view.numpy(), scan[:, 2:6, 1:4, 0:5], atol=1e-3)


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_a_mirrored_view_is_the_view_mirrored(axes: tuple[int, ...]) -> None:
    scan = torch.from_numpy(np.random.default_rng(0).uniform(-1000, 1000, (2, 9, 8, 7)))
    plan = ViewPlan(start_mm=(4.0, 3.0, -1.0), extent_mm=(9.0, 9.0, 20.0), size_ijk=(4, 3, 5))
    crop = Crop(start_ijk=(0, 0, 0), size_ijk=(9, 8, 7))
    plain, mirrored = (
        apply_view(scan, plan, crop, spacing_mm=(2.0, 3.0, 4.0), outside=AIR, flip_axes=flips) for flips in ((), axes)
    )
    torch.testing.assert_close(mirrored, plain.flip([1 + axis for axis in axes]), rtol=0, atol=1e-9)


def test_a_view_that_misses_the_scan_is_all_air() -> None:
    plan = ViewPlan(start_mm=(-50.0, 0.0, 0.0), extent_mm=(8.0, 8.0, 8.0), size_ijk=(4, 4, 4))
    crop = covering_crop(plan, (1.0, 1.0, 1.0), (9, 9, 9))
    scan = np.full((1, 9, 9, 9), 700.0)
    view = apply_view(torch.from_numpy(cut(scan, crop)), plan, crop, spacing_mm=(1.0, 1.0, 1.0), outside=AIR)
    np.testing.assert_allclose(view.numpy(), AIR)
