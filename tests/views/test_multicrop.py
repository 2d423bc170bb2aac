from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from voxelstem.errors import ConfigError
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig, apply_augment
from voxelstem.views.crop import Crop, ViewKind, apply_view
from voxelstem.views.intensity import Stats, limits, measure, window
from voxelstem.views.multicrop import Region, ViewsConfig, covering_region, draw_changes, draw_sample, make_views

SPEC = InputSpec(spacing_mm=(2.0, 2.0, 3.0), low_hu=-160.0, high_hu=240.0)
CONFIG = ViewsConfig(
    global_=ViewKind(count=2, size_ijk=(8, 8, 6), min_scale=0.8, max_scale=1.2),
    local=ViewKind(count=3, size_ijk=(4, 4, 4), min_scale=(0.5, 0.6, 0.7), max_scale=1.0, spread="uniform"),
    region_scale=1.5,
)
STRONG = AugmentConfig(
    flip_axes=(0, 1, 2), noise_std=0.1, gamma=0.2, shift=0.1, smooth_p=0.4, sharpen_p=0.4, sharpen_amount=(1.0, 2.0)
)


@dataclass(frozen=True)
class Scan:
    """What a record knows, and the voxels."""

    shape_ijk: tuple[int, int, int] = (30, 28, 20)
    spacing_mm: tuple[float, float, float] = (1.5, 1.5, 3.0)
    body_start_ijk: tuple[int, int, int] = (2, 3, 0)
    body_size_ijk: tuple[int, int, int] = (25, 20, 20)

    @property
    def hu(self) -> np.ndarray:
        return np.random.default_rng(0).integers(-1000, 1000, (1, *self.shape_ijk)).astype(np.float32)


SCAN = Scan()


def region(config: ViewsConfig = CONFIG, seed: int = 0, dtype: Any = np.float32, scan: Scan = SCAN) -> Region:
    rng = np.random.default_rng(seed)
    views = draw_sample(config, SPEC, scan, rng)
    crop = covering_region(views, scan)
    return Region(
        voxels=scan.hu[:, *crop.slices].astype(dtype),
        crop=crop,
        spacing_mm=scan.spacing_mm,
        views=views,
        changes=draw_changes(config.augment, views, rng),
    )


def of_array(array: np.ndarray) -> Stats:
    return measure(lambda low, high: array[:, low:high], array.shape[1])


def test_a_sample_has_its_kinds_of_views() -> None:
    made = make_views([region(seed=seed) for seed in range(3)], SPEC, CONFIG)
    assert {name: tuple(view.shape) for name, view in made.items()} == {
        "global": (3, 2, 1, 8, 8, 6),
        "local": (3, 3, 1, 4, 4, 4),
    }
    only = replace(CONFIG, local=ViewKind(count=0))
    assert set(make_views([region(only)], SPEC, only)) == {"global"}


@pytest.mark.parametrize("windowed", ["last", "first"])
def test_a_view_is_what_the_whole_scan_gives_at_its_place_changed_by_its_plan(windowed: Any) -> None:
    config = replace(CONFIG, augment=STRONG, windowed=windowed)
    whole = Crop(start_ijk=(0, 0, 0), size_ijk=SCAN.shape_ijk)
    hu = torch.from_numpy(SCAN.hu)
    for seed in range(4):
        sample = region(config, seed)
        made = make_views([sample], SPEC, config)
        for name, plans in sample.views.items():
            for view, plan, change in zip(made[name][0], plans, sample.changes[name], strict=True):
                where: dict[str, Any] = {"spacing_mm": SCAN.spacing_mm}
                if windowed == "first":
                    want = apply_view(window(hu, limits(None, SPEC)), plan, whole, outside=0.0, **where)
                else:
                    want = window(apply_view(hu, plan, whole, outside=SPEC.low_hu, **where), limits(None, SPEC))
                want = want.flip([1 + axis for axis in change.flip_axes])
                torch.testing.assert_close(view, apply_augment(want[None], [change], STRONG)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalisation", ["zscore", "unit99"])
@pytest.mark.parametrize("windowed", ["last", "first"])
def test_views_of_brains_are_normalised_by_the_whole_scan_each_by_its_own(windowed: Any, normalisation: Any) -> None:
    spec = InputSpec(modality="MR", spacing_mm=SPEC.spacing_mm, normalisation=normalisation)
    config = replace(CONFIG, windowed=windowed, overhang=0.6)
    scans = [SCAN.hu + 1500, 0.01 * SCAN.hu]
    samples = []
    for seed, scan in enumerate(scans):
        sample = region(config, seed)
        samples.append(replace(sample, voxels=scan[:, *sample.crop.slices], stats=of_array(scan)))
    made = make_views(samples, spec, config)
    whole = Crop(start_ijk=(0, 0, 0), size_ijk=SCAN.shape_ijk)
    for index, (sample, scan) in enumerate(zip(samples, scans, strict=True)):
        how = limits(scan, spec)
        for view, plan in zip(made["global"][index], sample.views["global"], strict=True):
            seen = apply_view(
                torch.from_numpy(scan), plan, whole, spacing_mm=SCAN.spacing_mm, outside=float(scan.min())
            )
            if windowed == "first" and normalisation == "unit99":
                clipped = window(torch.from_numpy(scan), how)
                want = apply_view(clipped, plan, whole, spacing_mm=SCAN.spacing_mm, outside=0.0)
            else:
                want = window(seen, how)
            torch.testing.assert_close(view, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("augment", "fits"),
    [
        (AugmentConfig(), True),
        (AugmentConfig(flip_axes=(0, 1)), True),
        (AugmentConfig(noise_std=0.1, gamma=0.1, smooth_p=0.5, clip=False), True),
        (AugmentConfig(noise_std=0.1), False),
        (AugmentConfig(gamma=0.1), False),
        (AugmentConfig(shift=0.1, clip=False), False),
    ],
)
def test_changes_that_would_cut_z_scores_to_0_to_1_are_refused(augment: AugmentConfig, fits: bool) -> None:
    config = replace(CONFIG, augment=augment)
    for normalisation in ("zscore", "unit99"):
        spec = InputSpec(modality="MR", spacing_mm=SPEC.spacing_mm, normalisation=normalisation)
        if fits or normalisation == "unit99":
            assert draw_sample(config, spec, SCAN, np.random.default_rng(0))
        else:
            with pytest.raises(ConfigError, match="z-scores are not"):
                draw_sample(config, spec, SCAN, np.random.default_rng(0))


def test_clipping_first_and_last_differ_where_metal_meets_air() -> None:
    first, last = (make_views([region()], SPEC, replace(CONFIG, windowed=how)) for how in ("first", "last"))
    assert (first["global"] - last["global"]).abs().max() > 0.1


def test_samples_made_together_are_those_made_alone() -> None:
    config = replace(CONFIG, augment=STRONG)
    samples = [region(config, seed) for seed in range(5)]
    together = make_views(samples, SPEC, config)
    for index, sample in enumerate(samples):
        for name, views in make_views([sample], SPEC, config).items():
            torch.testing.assert_close(views[0], together[name][index], rtol=0, atol=1e-6)


def test_whole_hu_travel_in_half_the_bytes_and_give_the_same_bits() -> None:
    config = replace(CONFIG, augment=STRONG)
    plain, packed = (make_views([region(config, dtype=dtype)], SPEC, config) for dtype in (np.float32, np.int16))
    assert all(torch.equal(plain[name], packed[name]) for name in plain)


def test_sixteen_bit_arithmetic_about_it_changes_nothing() -> None:
    plain = make_views([region()], SPEC, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        within = make_views([region()], SPEC, CONFIG)
    assert all(torch.equal(plain[name], within[name]) for name in plain)


def test_a_mirrored_axis_runs_backwards_from_its_high_corner() -> None:
    sample = region(replace(CONFIG, augment=AugmentConfig(flip_axes=(1,), flip_p=1.0)))
    places = sample.places_mm["local"]
    assert places.shape == (3, 2, 3)
    for (start, extent), plan in zip(places, sample.views["local"], strict=True):
        np.testing.assert_allclose(extent, np.multiply(plan.extent_mm, (1, -1, 1)), rtol=1e-6)
        np.testing.assert_allclose(np.minimum(start, start + extent), plan.start_mm, atol=1e-4)


def test_the_region_may_lie_anywhere_about_the_middle_of_the_scan() -> None:
    # The scan is 45 x 42 x 60 mm, a region 24 x 24 x 27 mm; along the first axis the box is shorter than that.
    config = replace(
        CONFIG, central_mm=(20.0, 30.0, 500.0), local=ViewKind(count=0), global_=replace(CONFIG.global_, count=9)
    )
    rng = np.random.default_rng(0)
    plans = [plan for _ in range(60) for plan in draw_sample(config, SPEC, SCAN, rng)["global"]]
    low = np.min([plan.start_mm for plan in plans], axis=0)
    high = np.max([np.add(plan.start_mm, plan.extent_mm) for plan in plans], axis=0)
    np.testing.assert_allclose(low, (22.5 - 12, 6.0, 0.0), atol=2.5)
    np.testing.assert_allclose(high, (22.5 + 12, 36.0, 60.0), atol=2.5)
    assert (low >= np.array((10.5, 6.0, 0.0)) - 1e-6).all()
    assert (high <= np.array((34.5, 36.0, 60.0)) + 1e-6).all()


def test_spectre_s_extents_can_be_said() -> None:
    spec = InputSpec(spacing_mm=(0.5, 0.5, 1.0))
    scan = Scan(shape_ijk=(400, 400, 300), spacing_mm=(0.75, 0.75, 1.0))
    config = ViewsConfig(
        global_=ViewKind(count=2, size_ijk=(128, 128, 64), min_scale=1.0, max_scale=2.0, spread="uniform"),
        local=ViewKind(count=8, size_ijk=(48, 48, 24), min_scale=1.0, max_scale=8 / 3, spread="uniform"),
        region_scale=2.0,
        central_mm=(256.0, 256.0, 384.0),
    )
    rng = np.random.default_rng(0)
    samples = [draw_sample(config, spec, scan, rng) for _ in range(200)]
    for name, low, high in (("global", 0.5, 1.0), ("local", 0.1875, 0.5)):
        shares = np.array([plan.extent_mm for sample in samples for plan in sample[name]]) / 128.0
        np.testing.assert_allclose(shares.min(axis=0), low, atol=0.01)
        np.testing.assert_allclose(shares.max(axis=0), high, atol=0.01)
        np.testing.assert_allclose(shares.mean(axis=0), (low + high) / 2, atol=0.02)


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_": ViewKind(count=0)},
        {"region_scale": -1.0},
        {"region_scale": 0.0},
        {"overhang": -0.1},
        {"central_mm": (1.0, 0.0, 1.0)},
    ],
)
def test_views_that_cannot_be_drawn_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ViewsConfig(**wrong)


def test_a_frame_is_jittered_about_the_middle_of_the_body_however_long_that_is() -> None:
    spec = replace(SPEC, block_ijk=(4, 4, 3), frame_ijk=(8, 8, 6))
    one = ViewsConfig(global_=ViewKind(count=1, size_ijk=(8, 8, 6)), region_scale=1.25)
    rng = np.random.default_rng(0)
    plans = [draw_sample(one, spec, SCAN, rng)["global"][0] for _ in range(200)]
    middles = np.array([np.add(plan.start_mm, np.divide(plan.extent_mm, 2)) for plan in plans])
    offset = middles - (np.array([2, 3, 0]) + np.array([25, 20, 20]) / 2) * SCAN.spacing_mm
    free = 0.25 / 2 * np.array([16.0, 16.0, 18.0])
    assert (np.abs(offset) <= free + 1e-9).all()
    assert (np.abs(offset).max(axis=0) > 0.8 * free).all()


@pytest.mark.parametrize(
    "other",
    [
        {"global_": ViewKind(count=1, size_ijk=(8, 8, 3))},
        {"local": ViewKind(count=2, size_ijk=(4, 4, 3))},
        {"central_mm": (100.0, 100.0, 100.0)},
    ],
)
def test_views_other_than_the_frame_are_refused(other: dict[str, Any]) -> None:
    spec = replace(SPEC, block_ijk=(4, 4, 3), frame_ijk=(8, 8, 6))
    config = replace(ViewsConfig(global_=ViewKind(count=1, size_ijk=(8, 8, 6))), **other)
    with pytest.raises(ConfigError, match="frame of"):
        draw_sample(config, spec, SCAN, np.random.default_rng(0))


def test_a_spec_without_a_spacing_is_refused() -> None:
    with pytest.raises(ConfigError, match="views need a spacing"):
        draw_sample(CONFIG, InputSpec(resampling="fit"), SCAN, np.random.default_rng(0))
