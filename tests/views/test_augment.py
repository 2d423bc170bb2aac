from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from voxelstem.config import flatten, overlay, read_toml, to_toml
from voxelstem.views.augment import AugmentConfig, AugmentPlan, apply_augment, draw_augment
from voxelstem.views.blur import blur

BLUR = {"smooth_p": 0.3, "sharpen_p": 0.3, "blur_sigma": ((1.5, 2.5), (1.5, 2.5), (0.75, 1.25))}
STRONG = AugmentConfig(flip_axes=(0, 1, 2), noise_std=0.2, gamma=0.4, shift=0.2, **BLUR)
FREE = AugmentConfig(clip=False)
NOTHING = AugmentPlan()


def views(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.rand(rows, 1, 5, 6, 7, generator=torch.Generator().manual_seed(seed))


def changed(plan: AugmentPlan, config: AugmentConfig = STRONG, given: torch.Tensor | None = None) -> torch.Tensor:
    return apply_augment(views() if given is None else given.clone(), [plan], config)


def test_a_plan_applied_twice_gives_the_same_voxels() -> None:
    for seed in range(8):
        plan = draw_augment(STRONG, np.random.default_rng(seed))
        assert torch.equal(changed(plan), changed(plan))


def test_the_same_generator_draws_the_same_plan() -> None:
    first, again, other = (draw_augment(STRONG, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_one_more_change_leaves_the_plans_of_the_others_as_they_were() -> None:
    plain = draw_augment(AugmentConfig(noise_std=0.1), np.random.default_rng(1))
    more = draw_augment(AugmentConfig(noise_std=0.1, gamma=0.2, smooth_p=1.0), np.random.default_rng(1))
    assert (plain.noise_std, plain.seed) == (more.noise_std, more.seed)
    assert more.blur_sigma
    assert plain.blur_sigma is None


def test_a_view_among_others_is_changed_as_it_is_alone() -> None:
    rng = np.random.default_rng(4)
    plans = [draw_augment(STRONG, rng) for _ in range(12)]
    kinds = {(plan.blur_sigma is not None, plan.sharpen_amount > 0) for plan in plans}
    assert kinds == {(False, False), (True, False), (True, True)}
    for config in (STRONG, replace(STRONG, clip=False)):
        together = apply_augment(views(rows=12), plans, config)
        alone = [changed(plan, config, row[None]) for plan, row in zip(plans, views(rows=12), strict=True)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_another_seed_gives_other_noise() -> None:
    noisy = replace(NOTHING, noise_std=0.1)
    assert not torch.equal(changed(noisy), changed(replace(noisy, seed=1)))


def test_the_views_stay_in_the_window() -> None:
    rng = np.random.default_rng(0)
    result = apply_augment(views(rows=50), [draw_augment(STRONG, rng) for _ in range(50)], STRONG)
    assert result.isfinite().all()
    assert 0 <= result.min() <= result.max() <= 1


def test_without_clipping_only_the_moved_window_cuts_off() -> None:
    loud = replace(NOTHING, noise_std=0.5)
    free = changed(loud, FREE)
    assert free.min() < 0
    assert free.max() > 1
    cut = changed(replace(loud, low=0.1, high=0.9), FREE)
    torch.testing.assert_close(cut, ((free - 0.1) / 0.8).clamp(0, 1))


def test_with_everything_off_nothing_changes() -> None:
    drawn = draw_augment(AugmentConfig(), np.random.default_rng(0))
    assert replace(drawn, seed=0) == NOTHING
    assert torch.equal(changed(NOTHING), views())


def test_every_change_comes_as_often_as_its_chance_says() -> None:
    config = replace(STRONG, flip_p=0.2, gamma_p=0.25, noise_p=0.5, shift_p=0.75)
    rng = np.random.default_rng(0)
    plans = [draw_augment(config, rng) for _ in range(3000)]
    shares = {
        "flip": np.mean([[axis in plan.flip_axes for axis in range(3)] for plan in plans], axis=0) - 0.2,
        "smooth": np.mean([plan.blur_sigma is not None and not plan.sharpen_amount for plan in plans]) - 0.3,
        "sharpen": np.mean([plan.sharpen_amount > 0 for plan in plans]) - 0.3,
        "gamma": np.mean([plan.gamma != 1 for plan in plans]) - 0.25,
        "noise": np.mean([plan.noise_std > 0 for plan in plans]) - 0.5,
        "window": np.mean([plan.low != 0 for plan in plans]) - 0.75,
    }
    assert {name: bool((abs(off) < 0.03).all()) for name, off in shares.items()} == dict.fromkeys(shares, True)


def test_amounts_fill_their_ranges() -> None:
    config = AugmentConfig(
        sharpen_p=1.0, sharpen_amount=(2.0, 4.0), shift=(0.0, 0.4), gamma=0.1, blur_sigma=((1, 2),) * 3
    )
    rng = np.random.default_rng(0)
    plans = [draw_augment(config, rng) for _ in range(500)]
    for seen, low, high in (
        ([plan.low for plan in plans], 0.0, 0.4),
        ([plan.high for plan in plans], 0.6, 1.0),
        ([plan.gamma for plan in plans], 0.9, 1.1),
        ([plan.sharpen_amount for plan in plans], 2.0, 4.0),
        ([width for plan in plans for width in plan.blur_sigma or ()], 1.0, 2.0),
        ([width for plan in plans for width in plan.sharpen_sigma], 0.25, 0.5),
    ):
        assert low <= min(seen) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(seen) <= high


def test_only_the_axes_asked_for_are_mirrored() -> None:
    rng = np.random.default_rng(0)
    flips = [draw_augment(AugmentConfig(flip_axes=(0, 2)), rng).flip_axes for _ in range(400)]
    assert {axis for flip in flips for axis in flip} == {0, 2}


def test_only_a_flip_along_the_first_axis_changes_left_and_right() -> None:
    assert AugmentConfig(flip_axes=(0, 1)).breaks_laterality
    for kept in (AugmentConfig(), AugmentConfig(flip_axes=(1, 2)), AugmentConfig(flip_axes=(0,), flip_p=0.0)):
        assert not kept.breaks_laterality


def test_smoothing_is_a_blur() -> None:
    plan = replace(NOTHING, blur_sigma=(1.5, 0.7, 0.9))
    torch.testing.assert_close(changed(plan), blur(views(), torch.tensor([[1.5, 0.7, 0.9]])))


def test_sharpening_adds_what_a_second_blur_takes_away() -> None:
    plan = replace(NOTHING, blur_sigma=(1.5, 0.7, 0.9), sharpen_sigma=(0.5, 0.4, 0.6), sharpen_amount=12.0)
    once = blur(views(), torch.tensor([[1.5, 0.7, 0.9]]), edge="air")
    twice = blur(once, torch.tensor([[0.5, 0.4, 0.6]]), edge="air")
    sharp = changed(plan, replace(FREE, edge="air"))
    torch.testing.assert_close(sharp, once + 12 * (once - twice))
    assert sharp.std() > once.std()


def test_moving_the_window_is_linear_between_its_ends() -> None:
    moved = changed(replace(NOTHING, low=0.1, high=0.9))
    torch.testing.assert_close(moved, ((views() - 0.1) / 0.8).clamp(0, 1))


def test_gamma_bends_and_keeps_the_ends() -> None:
    given = torch.tensor([0.0, 0.25, 1.0]).reshape(1, 1, 3, 1, 1)
    torch.testing.assert_close(changed(replace(NOTHING, gamma=0.5), STRONG, given).flatten(), torch.tensor([0, 0.5, 1]))


def test_without_clipping_gamma_bends_between_the_ends_of_the_view() -> None:
    given = torch.tensor([-1.0, 0.0, 3.0]).reshape(1, 1, 3, 1, 1)
    torch.testing.assert_close(changed(replace(NOTHING, gamma=0.5), FREE, given).flatten(), torch.tensor([-1.0, 1, 3]))
    flat = torch.full((1, 1, 2, 2, 2), 0.25)
    assert torch.equal(changed(replace(NOTHING, gamma=0.5), FREE, flat), flat)


def test_noise_has_the_spread_of_the_plan() -> None:
    grey = torch.full((1, 1, 30, 30, 30), 0.5)
    noise = changed(replace(NOTHING, noise_std=0.05), STRONG, grey) - 0.5
    assert float(noise.std()) == pytest.approx(0.05, rel=0.05)
    assert abs(float(noise.mean())) < 0.002


def test_a_plan_for_each_view_is_needed() -> None:
    with pytest.raises(ValueError, match="one plan for each of the 2 views, got 1"):
        apply_augment(views(rows=2), [NOTHING], STRONG)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"flip_axes": (3,)}, "flip_axes"),
        ({"noise_std": -0.1}, "need noise_std"),
        ({"gamma": 1.0}, "need noise_std"),
        ({"shift": 0.5}, "need noise_std"),
        ({"shift": (0.0, 0.5)}, "need noise_std"),
        ({"flip_p": 1.5}, "flip_p"),
        ({"gamma_p": -0.5}, "gamma_p"),
        ({"smooth_p": 0.6, "sharpen_p": 0.6}, "smooth_p \\+ sharpen_p"),
        ({"blur_sigma": ((0.0, 1.0),) * 3}, "blur_sigma"),
        ({"sharpen_sigma": ((1.0, 0.5),) * 3}, "sharpen_sigma"),
        ({"sharpen_amount": (2.0, 1.0)}, "sharpen_amount"),
    ],
)
def test_amounts_outside_their_range_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AugmentConfig(**wrong)


@pytest.mark.parametrize("shift", [0.1, (0.0, 0.4)])
def test_settings_survive_a_file(tmp_path: Any, shift: float | tuple[float, float]) -> None:
    config = replace(STRONG, shift=shift, edge="air", clip=False)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert overlay(AugmentConfig(), read_toml(tmp_path / "config.toml")) == config
    assert flatten(config)["edge"] == "air"
