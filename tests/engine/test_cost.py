from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from voxelstem.backbones import BACKBONES
from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.engine import cost
from voxelstem.pretrain import make_objective
from voxelstem.protocols import Batch, StepOutput
from voxelstem.recipes import named
from voxelstem.testing import make_batch

SAMPLES = 2
TINY = ["tiny.base", "tiny.jepa", "tiny.dino", "tiny.spectre_stage1"]


@cache
def calls_of(config):
    return cost.observe(make_objective(cost.miniature(config)), cost.blank_batch(config.views, SAMPLES))


def costs_of(config, *, bf16: bool = False):
    return cost.sample_cost(calls_of(config), make_objective(config), bf16=bf16)


def kept_by(objective, batch) -> int:
    """Bytes that autograd keeps, each piece of memory once; parameters were there before."""
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = objective.step(batch, progress=0.5)
    assert output.loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_what_a_step_keeps_is_as_much_as_the_formula_says(name: str, bf16: bool):
    config = named(name)
    costs = costs_of(config, bf16=bf16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        measured = kept_by(make_objective(config), cost.blank_batch(config.views, SAMPLES))
    assert SAMPLES * costs.kept_bytes + costs.scaled_bytes + costs.cast_bytes == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("name", TINY)
def test_multiplications_are_counted_as_torch_counts_them(name: str):
    config = named(name)
    costs = costs_of(config)
    objective, batch = make_objective(config), cost.blank_batch(config.views, SAMPLES)
    counter = FlopCounterMode(display=False)
    # The one kernel of attention that torch can count on a CPU.
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = objective.step(batch, progress=0.5).loss
        forward = counter.get_total_flops()
        loss.backward()
    assert SAMPLES * costs.forward_flops == pytest.approx(forward, rel=0.1)
    assert SAMPLES * (costs.forward_flops + costs.backward_flops) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_recomputing_keeps_less_and_a_frozen_pass_keeps_nothing_of_the_blocks():
    costs = costs_of(named("tiny.dino"))
    assert 0 < costs.kept_recomputing_bytes < costs.kept_bytes / 2
    assert 0 < costs.block_flops < costs.forward_flops


def test_a_miniature_differs_in_widths_alone():
    config = named("tiny.dino")
    small = cost.miniature(config)
    assert small.backbone.block == replace(config.backbone.block, dim=12, heads=2)
    assert small.views == config.views
    assert replace(small, backbone=config.backbone, objective=config.objective) == config


def test_observing_leaves_the_objective_as_it_was():
    objective = make_objective(cost.miniature(named("tiny.dino")))
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    cost.observe(objective, cost.blank_batch(named("tiny.dino").views, 2))
    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())
    assert not any(module._forward_pre_hooks for module in objective.modules())


def test_spectre_s_backbone_costs_374_gflop_for_a_block():
    """Counted by torch on the released package, for a block of 128 x 128 x 64 (512 patches and the cls token)."""
    from voxelstem.backbones.encoder import Encoder

    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(dim=1080, depth=24, heads=12))
        embed = nn.Linear(2048, 1080)
    calls = [cost.Call(part=f"blocks.{index}", rows=1.0, tokens=513, trained=False) for index in range(24)]
    calls.append(cost.Call(part="embed", rows=512.0, tokens=1, trained=False))
    encoder.embed = embed
    assert cost.sample_cost(calls, encoder, bf16=True).forward_flops == pytest.approx(374e9, rel=0.01)


class Paints(nn.Module):
    """A convolutional network paints what it sees."""

    def __init__(self, backbone: UNet | Disentangled) -> None:
        super().__init__()
        self.backbone = backbone

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        del progress
        view = batch.views["global"].flatten(0, 1)
        if isinstance(self.backbone, UNet):
            painted = self.backbone.decode(self.backbone.features(view))
        else:
            latents = self.backbone.latents(view)
            painted = self.backbone.reconstruct(latents.subject_mean, latents.contrast_mean)
        return StepOutput(loss=(painted - view).square().mean())


CONVOLUTIONS = {
    "unet": UNetConfig(features=(8, 16, 16), depths=(1, 2, 1), strides=(1, 2, 2), block_ijk=(16, 16, 16)),
    "disentangled": DisentangledConfig(width=8, levels=3, latent=8, block_ijk=(16, 16, 16), vae=False),
}


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions_are_counted_as_torch_counts_them(name: str):
    config, batch = CONVOLUTIONS[name], make_batch(samples=SAMPLES)
    objective = Paints(BACKBONES[name](config))
    calls = cost.observe(Paints(BACKBONES[name](cost.miniature(config))), batch)
    costs = cost.sample_cost(calls, objective, bf16=False)
    with FlopCounterMode(display=False) as counter:
        output = objective.step(batch, progress=0.5)
    assert SAMPLES * costs.forward_flops == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert costs.backward_flops == 2 * costs.forward_flops
    assert output.loss.isfinite()
    assert SAMPLES * costs.kept_bytes == pytest.approx(kept_by(objective, batch), rel=0.3)


def test_a_miniature_of_resenc_has_the_same_parts():
    with torch.device("meta"):
        full, small = UNet(UNetConfig()), UNet(cost.miniature(UNetConfig()))
    assert small.state_dict().keys() == full.state_dict().keys()
