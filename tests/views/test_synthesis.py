from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from voxelstem.chance import Chance
from voxelstem.sources.brain import BrainConfig, brain
from voxelstem.views.synthesis import SynthesisConfig, _in_slices, apply_synthesis, draw_synthesis

PLAIN = SynthesisConfig(
    spread=(0.0, 0.0), air_p=0.0, bias=0.0, blur_sigma=(1e-3, 1e-3), thick_p=0.0, noise=0.0, gamma=0.0
)
"""Nothing but a mean for each class."""


@pytest.fixture(scope="module")
def maps():
    """Label maps of three brains."""
    arrays = [brain(BrainConfig(seed=seed)).volumes[0].labels.array for seed in range(3)]
    return torch.stack([torch.from_numpy(array.astype("int64")) for array in arrays])


def made(maps, config, seed=0):
    return apply_synthesis(maps, draw_synthesis(config, Chance.of(seed, count=len(maps)), classes=10))


def test_images_lie_between_0_and_1_and_a_plan_gives_the_same_voxels_twice(maps):
    plan = draw_synthesis(SynthesisConfig(), Chance.of(1, count=3), classes=10)
    images = apply_synthesis(maps, plan)
    assert images.shape == (3, 1, 32, 32, 32)
    assert torch.equal(images, apply_synthesis(maps, plan))
    assert torch.allclose(images.amin((1, 2, 3, 4)), torch.zeros(3))
    assert torch.allclose(images.amax((1, 2, 3, 4)), torch.ones(3))


def test_a_row_depends_on_its_own_key_only(maps):
    whole = made(maps, SynthesisConfig())
    plan = draw_synthesis(SynthesisConfig(), Chance.of(0, first=1, count=1), classes=10)
    assert torch.allclose(apply_synthesis(maps[1:2], plan), whole[1:2], atol=1e-6)


def test_without_any_effect_an_image_is_its_class_means_stretched(maps):
    plan = draw_synthesis(PLAIN, Chance.of(2, count=3), classes=10)
    images = apply_synthesis(maps, plan)
    for image, labels, means in zip(images, maps, plan.means, strict=True):
        there = means[labels.unique()]
        wanted = (means[labels] - there.min()) / (there.max() - there.min())
        assert torch.allclose(image[0], wanted, atol=1e-5)


def test_the_order_of_tissues_is_another_in_each_image(maps):
    white, grey = 5, 4
    small = maps[0, ::2, ::2, ::2]
    images = made(small.expand(30, -1, -1, -1), SynthesisConfig())
    brighter = [float(image[0][small == white].mean() > image[0][small == grey].mean()) for image in images]
    assert 0.25 < sum(brighter) / len(brighter) < 0.75


def test_a_bias_field_is_smooth_and_multiplies():
    # Of one class without grain, all that is left is the field.
    config = replace(PLAIN, bias=0.5)
    image = apply_synthesis(
        torch.zeros(1, 24, 24, 24, dtype=torch.int64), draw_synthesis(config, Chance.of(3, count=1), classes=1)
    )[0, 0]
    steps = torch.cat([image.diff(dim=axis).abs().flatten() for axis in range(3)])
    assert image.std() > 0.1
    assert steps.max() < 0.3


def test_slices_are_thick_along_one_axis():
    plan = draw_synthesis(replace(PLAIN, thick=4.0, thick_p=1.0), Chance.of(5, count=20), classes=2)
    assert ((plan.thick > 1).sum(dim=1) == 1).all()
    assert (plan.thick > 1).any(dim=0).all()
    assert plan.thick.max() <= 4.0
    assert (draw_synthesis(PLAIN, Chance.of(5, count=20), classes=2).thick == 1).all()


def test_slices_of_three_voxels_average_what_lies_in_them():
    image = torch.arange(6.0)[:, None, None].expand(6, 4, 4)[None, None]
    thick = _in_slices(image, torch.tensor([[3.0, 1.0, 1.0]]))
    # Slices of 0..2 and 3..5 are 1 and 4; between their middles it is a straight line, beyond them it is flat.
    assert torch.allclose(thick[0, 0, :, 0, 0], torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 4.0]))
    assert torch.equal(_in_slices(image, torch.ones(1, 3)), image)


def test_noise_and_grain_are_as_wide_as_drawn():
    flat = (torch.arange(32)[None, :, None, None] > 15).long().expand(1, 32, 32, 32)
    config = replace(PLAIN, spread=(0.1, 0.1))
    plan = draw_synthesis(config, Chance.of(7, count=1), classes=2)
    image = apply_synthesis(flat, plan)[0, 0]
    low, high = image[:16], image[16:]
    assert low.std() / high.std() == pytest.approx(1.0, abs=0.05)
    step = (plan.means[0, 1] - plan.means[0, 0]).abs()
    assert (high.mean() - low.mean()).abs() / low.std() == pytest.approx(float(step) / 0.1, rel=0.05)


def test_air_is_0_without_grain_where_it_was_drawn_so(maps):
    for air_p in (0.0, 1.0):
        config = SynthesisConfig(air_p=air_p, bias=0.0, thick_p=0.0, noise=0.0)
        plan = draw_synthesis(config, Chance.of(8, count=3), classes=10)
        assert bool((plan.spreads[:, 0] == 0).all()) == bool(air_p)
    corner = made(maps, SynthesisConfig(air_p=1.0, noise=0.0))[:, 0, :3, :3, :3]
    assert (corner.flatten(1).std(dim=1) < 0.01).all()


def test_labels_beyond_the_plan_are_refused(maps):
    plan = draw_synthesis(SynthesisConfig(), Chance.of(0, count=3), classes=4)
    with pytest.raises(ValueError, match="0 to 3, got 0 to"):
        apply_synthesis(maps, plan)
    with pytest.raises(ValueError, match="one plan for each of the 2"):
        apply_synthesis(maps[:2], plan)


@pytest.mark.parametrize("wrong", [{"spread": (0.2, 0.1)}, {"noise": -0.1}, {"air_p": 1.5}, {"thick": 0.5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"need|must"):
        SynthesisConfig(**wrong)
