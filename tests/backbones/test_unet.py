from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelstem.backbones.unet import Residual, UNet, UNetConfig, resenc
from voxelstem.chance import Chance
from voxelstem.config import flatten, overlay
from voxelstem.testing import check_backbone

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = UNetConfig(features=(3, 4, 5), depths=(1, 2, 1), strides=(1, 2, 2), block_ijk=(8, 8, 8))


def opened(name: str) -> ModuleType:
    """A module of `tests/golden`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def drawn(config: UNetConfig = SMALL, seed: int = 0) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(config)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def count(module: torch.nn.Module | None) -> int:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters())


def all_heads(network: UNet, blocks: Tensor) -> list[Tensor]:
    return network.decode_levels(network.features(blocks))


@pytest.mark.parametrize("skips", ["full", "none", "dropped"])
def test_it_keeps_the_contract_of_backbones(skips: str) -> None:
    check_backbone(lambda: UNet(overlay(SMALL, {"skips": skips})), beyond=all_heads)


def test_an_encoder_alone_keeps_it_without_more() -> None:
    check_backbone(lambda: UNet(replace(SMALL, decoder=False)))
    with pytest.raises(AssertionError, match=r"no gradient reaches decoder\.stages"):
        check_backbone(lambda: UNet(SMALL))


def test_resenc_l_has_nnu_net_s_parameters_and_tensors() -> None:
    with torch.device("meta"):
        network, encoder = UNet(resenc("L")), UNet(resenc("L", decoder=False))
    assert resenc("L") == UNetConfig()
    assert (count(network), count(network.encoder), count(network.decoder)) == (102_348_965, 90_296_576, 12_052_389)
    state = network.state_dict()
    assert len(state) == 264
    assert len(encoder.state_dict()) == 224
    assert {name: tuple(state[name].shape) for name in state if name in SHAPES} == SHAPES
    # A skip is projected where the width changes, and only pooled into the last stage.
    assert sorted(name for name in state if ".skip." in name and name.endswith("conv.weight")) == [
        f"encoder.stages.{stage}.blocks.0.skip.1.conv.weight" for stage in (1, 2, 3, 4)
    ]
    assert not any(".skip." in name and name.endswith("conv.bias") for name in state)


SHAPES = {
    "encoder.stem.convs.0.conv.weight": (32, 1, 3, 3, 3),
    "encoder.stem.convs.0.norm.bias": (32,),
    "encoder.stages.1.blocks.0.conv1.conv.weight": (64, 32, 3, 3, 3),
    "encoder.stages.1.blocks.0.skip.1.norm.weight": (64,),
    "encoder.stages.5.blocks.5.conv2.norm.weight": (320,),
    "decoder.stages.0.convs.0.conv.weight": (320, 640, 3, 3, 3),
    "decoder.transpconvs.0.weight": (320, 320, 2, 2, 2),
    "decoder.transpconvs.4.weight": (64, 32, 2, 2, 2),
    "decoder.seg_layers.4.weight": (1, 32, 1, 1, 1),
}


@pytest.mark.parametrize(
    ("size", "parameters", "patch"), [("M", 25_598_037, 32), ("S", 8_404_660, 16), ("tiny", 79_130, 4)]
)
def test_the_smaller_sizes_are_what_they_were(size: str, parameters: int, patch: int) -> None:
    with torch.device("meta"):
        network = UNet(resenc(size))  # type: ignore[arg-type]
    assert (count(network), network.patch_ijk) == (parameters, (patch,) * 3)


@pytest.mark.parametrize("name", ["six", "odd"])
def test_it_answers_as_dynamic_network_architectures_does(name: str) -> None:
    cases, golden = opened("cases"), opened("resenc_cases")
    answers = np.load(golden.ANSWERS)
    network = UNet(UNetConfig(**golden.SIZES[name], block_ijk=golden.BLOCKS[name])).eval()
    network.load_state_dict(golden.weights(name, network.state_dict()))
    with torch.no_grad():
        maps = network.features(golden.block(name))
        found = {f"{name}/bottleneck": maps[-1]}
        found |= {f"{name}/head{level}": head for level, head in enumerate(network.decode_levels(maps))}
        finest = network.decode(maps)
        cls, tokens = network.encode_blocks(golden.block(name))
    assert {key for key in answers if key.startswith(name)} == found.keys()
    assert max(cases.distance(cases.digest(answer), answers[key]) for key, answer in found.items()) <= golden.TOLERANCE
    assert torch.equal(finest, found[f"{name}/head0"])
    torch.testing.assert_close(tokens.transpose(1, 2), maps[-1].flatten(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cls, maps[-1].mean((2, 3, 4)), atol=1e-5, rtol=1e-5)


def test_maps_run_from_the_blocks_own_grid_to_the_bottleneck() -> None:
    network = drawn(replace(SMALL, out_channels=2))
    maps = network.features(noise(2, 1, 8, 4, 12))
    assert [tuple(one.shape) for one in maps] == [(2, 3, 8, 4, 12), (2, 4, 4, 2, 6), (2, 5, 2, 1, 3)]
    assert [tuple(one.shape) for one in network.decode_levels(maps)] == [(2, 2, 8, 4, 12), (2, 2, 4, 2, 6)]


def test_maps_are_not_changed_by_what_is_made_of_them() -> None:
    network = drawn()
    maps = network.features(noise(1, 1, 8, 8, 8))
    before = [one.clone() for one in maps]
    network.decode(maps)
    assert all(torch.equal(one, other) for one, other in zip(maps, before, strict=True))


def test_without_skips_only_the_bottleneck_is_heard() -> None:
    network = drawn(replace(SMALL, skips="none"))
    maps = network.features(noise(2, 1, 8, 8, 8))
    silent = [torch.zeros_like(one) for one in maps[:-1]]
    assert torch.equal(network.decode(maps), network.decode([*silent, maps[-1]]))
    full = drawn()
    assert not torch.equal(full.decode(maps), full.decode([*silent, maps[-1]]))
    assert count(network) < count(full)


def test_skips_are_dropped_in_training_alone_and_only_by_chance() -> None:
    plain, network = drawn().train(), drawn(replace(SMALL, skips="dropped", skip_drop=0.9)).train()
    network.load_state_dict(plain.state_dict())
    maps, chance = plain.features(noise(4, 1, 8, 8, 8)), Chance.of(0, count=4)
    wanted = plain.decode(maps, chance)
    assert torch.equal(network.decode(maps), wanted)
    assert not torch.equal(network.decode(maps, chance), wanted)
    assert torch.equal(network.eval().decode(maps, chance), wanted)


def test_each_row_and_level_is_dropped_by_its_own_key_as_often_as_asked() -> None:
    network = drawn(replace(SMALL, skips="dropped", skip_drop=0.7)).train()
    rows = 400
    maps = [one.expand(rows, -1, -1, -1, -1) for one in network.features(noise(1, 1, 4, 4, 4))]
    chance = Chance.of(3, count=rows)
    silent = [torch.zeros_like(one) for one in maps]
    with torch.no_grad():
        found = network.decode(maps, chance)
        part = network.decode([one[5:9] for one in maps], chance.part(5, 9))
        ways = {
            (fine, coarse): network.decode([(silent, maps)[fine][0][:1], (silent, maps)[coarse][1][:1], maps[2][:1]])
            for fine in (False, True)
            for coarse in (False, True)
        }
    torch.testing.assert_close(part, found[5:9])
    near = {way: (found - painted).abs().amax((1, 2, 3, 4)) < 1e-4 for way, painted in ways.items()}
    assert torch.stack(list(near.values())).sum(0).eq(1).all()
    shares = {way: rows_.float().mean().item() for way, rows_ in near.items()}
    for (fine, coarse), share in shares.items():
        assert share == pytest.approx((0.3 if fine else 0.7) * (0.3 if coarse else 0.7), abs=0.07)


def test_a_dropped_skip_leaves_no_gradient() -> None:
    network = drawn(replace(SMALL, skips="dropped", skip_drop=0.99)).train()
    maps = [one.detach().requires_grad_() for one in network.features(noise(1, 1, 8, 8, 8))]
    network.decode(maps, Chance.of(0)).square().sum().backward()
    gradients = [one.grad for one in maps]
    assert all(gradient is not None for gradient in gradients)
    assert [bool(gradient.any()) for gradient in gradients if gradient is not None] == [False, False, True]


def test_an_encoder_s_weights_come_out_of_the_whole_network_s_and_paint_nothing() -> None:
    whole, encoder = drawn(), drawn(replace(SMALL, decoder=False), seed=1)
    encoder.load_state_dict({name: value for name, value in whole.state_dict().items() if name.startswith("encoder.")})
    blocks = noise(2, 1, 8, 8, 8)
    assert torch.equal(encoder.encode_blocks(blocks)[1], whole.encode_blocks(blocks)[1])
    with pytest.raises(ValueError, match="decoder=False"):
        encoder.decode(encoder.features(blocks))
    with pytest.raises(ValueError, match="a map of each of 3 stages, got 2"):
        whole.decode(whole.features(blocks)[1:])


def test_a_residual_block_adds_what_came_in_pooled() -> None:
    layer, x = Residual(2, 2, stride=2, branch_gain=0.0), noise(1, 2, 4, 4, 4) - 0.5
    pooled = torch.stack([
        x[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].mean((1, 2, 3))
        for i in range(2)
        for j in range(2)
        for k in range(2)
    ])  # fmt: skip
    wanted = torch.where(pooled > 0, pooled, pooled * 0.01).T.reshape(1, 2, 2, 2, 2)
    torch.testing.assert_close(layer(x), wanted)


def test_large_batches_are_encoded_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network, blocks = drawn().eval(), noise(3, 1, 8, 8, 8)
    whole = network.encode_blocks(blocks)
    monkeypatch.setattr("voxelstem.backbones.unet.VOXELS_AT_ONCE", 8**3)
    parts = network.encode_blocks(blocks)
    torch.testing.assert_close(parts, whole)


def test_depth_grows_from_the_stem_to_the_finest_head() -> None:
    depths = {name: depth for depth, members in drawn().param_groups() for name, _ in members}
    in_order = [
        "encoder.stem.convs.0.conv.weight",
        "encoder.stages.0.blocks.0.conv1.conv.weight",
        "encoder.stages.1.blocks.0.skip.1.conv.weight",
        "encoder.stages.1.blocks.1.conv2.norm.bias",
        "encoder.stages.2.blocks.0.conv1.conv.bias",
        "decoder.transpconvs.0.weight",
        "decoder.seg_layers.1.bias",
    ]
    assert [depths[name] for name in in_order] == list(range(7))
    assert depths["decoder.stages.0.convs.0.conv.weight"] == 5


def test_settings_replay() -> None:
    changed = replace(resenc("tiny", channels=2, skips="dropped", decoder=False), block_ijk=(16, 16, 16))
    assert overlay(UNetConfig(), flatten(changed)) == changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": (3, 4)}, "one entry for each of two or more stages"),
        ({"depths": (1, 0, 1)}, "must be >= 1"),
        ({"strides": (2, 2, 2)}, "first stride 1"),
        ({"block_ijk": (8, 8, 6)}, "must fill block_ijk"),
        ({"skip_drop": 1.0}, r"skip_drop lies in \[0, 1\)"),
    ],
)
def test_a_network_that_cannot_be_is_refused(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **change)
