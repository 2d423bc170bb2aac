from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from voxelstem.views.augment import AugmentConfig, AugmentPlan, apply_augment, draw_augment

STRONG = AugmentConfig(flip_axes=(0, 1, 2), noise_std=0.2, gamma=0.4, shift=0.2)
NOTHING = AugmentPlan(flip_axes=(), noise_std=0.0, gamma=1.0, low=0.0, high=1.0, seed=0)


def view(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 5, 6, 7, generator=torch.Generator().manual_seed(seed))


def test_a_plan_applied_twice_gives_the_same_voxels() -> None:
    plan = draw_augment(STRONG, np.random.default_rng(3))
    assert torch.equal(apply_augment(view(), plan), apply_augment(view(), plan))


def test_the_same_generator_draws_the_same_plan() -> None:
    first, again, other = (draw_augment(STRONG, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_another_seed_gives_other_noise() -> None:
    noisy = dataclasses.replace(NOTHING, noise_std=0.1)
    assert not torch.equal(apply_augment(view(), noisy), apply_augment(view(), dataclasses.replace(noisy, seed=1)))


def test_the_view_stays_in_the_window() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        changed = apply_augment(view(), draw_augment(STRONG, rng))
        assert changed.isfinite().all()
        assert 0 <= changed.min() <= changed.max() <= 1


def test_with_everything_off_nothing_changes() -> None:
    assert draw_augment(AugmentConfig(), np.random.default_rng(0)) == dataclasses.replace(
        NOTHING, seed=draw_augment(AugmentConfig(), np.random.default_rng(0)).seed
    )
    assert torch.equal(apply_augment(view(), NOTHING), view())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flip_mirrors_its_axis_and_no_other(axis: int) -> None:
    mirrored = apply_augment(view(), dataclasses.replace(NOTHING, flip_axes=(axis,)))
    expected = np.flip(view().numpy(), 1 + axis)
    np.testing.assert_array_equal(mirrored.numpy(), expected)


def test_only_the_axes_asked_for_are_mirrored_and_half_of_the_time() -> None:
    rng = np.random.default_rng(0)
    flips = [draw_augment(AugmentConfig(flip_axes=(0, 2)), rng).flip_axes for _ in range(400)]
    assert {axis for flip in flips for axis in flip} == {0, 2}
    assert abs(np.mean([0 in flip for flip in flips]) - 0.5) < 0.1


def test_moving_the_window_is_linear_between_its_ends() -> None:
    moved = apply_augment(view(), dataclasses.replace(NOTHING, low=0.1, high=0.9))
    torch.testing.assert_close(moved, ((view() - 0.1) / 0.8).clamp(0, 1))


def test_gamma_bends_and_keeps_the_ends() -> None:
    bent = apply_augment(torch.tensor([0.0, 0.25, 1.0]).reshape(1, 3, 1, 1), dataclasses.replace(NOTHING, gamma=0.5))
    torch.testing.assert_close(bent.flatten(), torch.tensor([0.0, 0.5, 1.0]))


def test_noise_has_the_spread_of_the_plan() -> None:
    grey = torch.full((1, 30, 30, 30), 0.5)
    noise = apply_augment(grey, dataclasses.replace(NOTHING, noise_std=0.05)) - 0.5
    assert float(noise.std()) == pytest.approx(0.05, rel=0.05)
    assert abs(float(noise.mean())) < 0.002


def test_the_view_itself_is_left_alone() -> None:
    given = view()
    apply_augment(given, draw_augment(STRONG, np.random.default_rng(1)))
    assert torch.equal(given, view())


def test_amounts_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="flip_axes"):
        AugmentConfig(flip_axes=(3,))
    for wrong in ({"noise_std": -0.1}, {"gamma": 1.0}, {"shift": 0.5}):
        with pytest.raises(ValueError, match="need noise_std"):
            AugmentConfig(**wrong)
