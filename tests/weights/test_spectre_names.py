from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import AlignHead
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.backbones.sizes import SIZES, sized
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.weights.spectre_names import head_to_ours, head_to_theirs, shapes, size_of, to_ours, to_theirs

Shapes = Mapping[str, tuple[int, ...]]


def small(*, scan_depth: int = 1, registers: int = 0, heads: int = 2, third: int = 2) -> ScanVitConfig:
    block = EncoderConfig(dim=heads * 3 * third, depth=2, heads=heads, registers=registers)
    scan = dataclasses.replace(block, depth=scan_depth, rope_base=100.0)
    return ScanVitConfig(patch_ijk=(4, 4, 2), block_ijk=(8, 8, 4), block=block, scan=scan, inputs="unit")


def drawn(shapes: Shapes, base: float, *, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors; the periods by their formula, one by one."""
    random = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    count = len(tensors["rope.periods"])
    tensors["rope.periods"] = torch.tensor([base ** (2 * k / (2 * count)) for k in range(count)])
    return tensors


def theirs(config: ScanVitConfig, *, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    backbone, combiner = shapes(config)
    return drawn(backbone, 1000.0, seed=seed), drawn(combiner, 100.0, seed=seed + 1) if combiner else None


def same(a: Mapping[str, Tensor] | None, b: Mapping[str, Tensor] | None, *, but: str = "") -> bool:
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a if name != but)


# --- the released names


@pytest.mark.parametrize("size", ["spectre-small", "spectre-base", "spectre-large"])
def test_names_shapes_and_order_of_both_levels_are_the_released_ones(spectre_keys: Mapping[str, Shapes], size: str):
    backbone, combiner = shapes(SIZES[size])
    assert list(backbone.items()) == list(spectre_keys[f"{size}/backbone"].items())
    assert list(combiner.items()) == list(spectre_keys[f"{size}/combiner"].items())


@pytest.mark.parametrize("size", ["spectre-small", "spectre-base", "spectre-large"])
def test_our_networks_are_written_under_exactly_the_released_names(spectre_keys: Mapping[str, Shapes], size: str):
    with torch.device("meta"):
        state = ScanVit(SIZES[size]).state_dict()
        parts = to_theirs(state, SIZES[size])
    for part, found in zip(("backbone", "combiner"), parts, strict=True):
        assert found is not None
        wanted = spectre_keys[f"{size}/{part}"]
        assert [(name, tuple(tensor.shape)) for name, tensor in found.items()] == list(wanted.items())


def test_the_kept_list_of_names_is_the_specification_s(
    spectre_keys: Mapping[str, Shapes], spec_keys: Mapping[str, Shapes]
):
    assert spectre_keys.keys() == spec_keys.keys()
    assert all(list(spectre_keys[part].items()) == list(spec_keys[part].items()) for part in spec_keys)


def test_the_released_sizes_have_as_many_numbers_as_stated():
    backbone, combiner = (sum(map(math.prod, part.values())) for part in shapes(SIZES["spectre-large"]))
    assert (backbone, combiner) == (338_528_175, 58_389_135)


@pytest.mark.parametrize("side", ["image", "text"])
def test_heads_are_written_under_exactly_the_released_names(spectre_keys: Mapping[str, Shapes], side: str):
    wanted = spectre_keys[f"{side}_head"]
    with torch.device("meta"):
        found = head_to_theirs(AlignHead({"image": 2160, "text": 1024}[side]).state_dict())
    assert [(name, tuple(tensor.shape)) for name, tensor in found.items()] == list(wanted.items())


# --- there and back


configs = st.builds(
    small,
    scan_depth=st.integers(0, 2),
    registers=st.integers(0, 3),
    heads=st.integers(1, 3),
    third=st.sampled_from((2, 4, 6)),
)


@settings(deadline=None, max_examples=25)
@given(config=configs, seed=st.integers(0, 1000))
def test_their_tensors_come_back_with_the_same_bits(config: ScanVitConfig, seed: int):
    backbone, combiner = theirs(config, seed=seed)
    back = to_theirs(to_ours(backbone, combiner, config), config)
    # The periods are computed, not kept: their last bit may be another one.
    for found, wanted in zip(back, (backbone, combiner), strict=True):
        assert same(found, wanted, but="rope.periods")
        if wanted is not None and found is not None:
            assert torch.allclose(found["rope.periods"], wanted["rope.periods"], rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(config=configs, seed=st.integers(0, 1000))
def test_our_networks_come_back_with_the_same_bits(config: ScanVitConfig, seed: int):
    torch.manual_seed(seed)
    network = ScanVit(config)
    ours = to_ours(*to_theirs(network.state_dict(), config), config)
    assert same(ours, network.state_dict(), but="mask_token")
    assert not ours["mask_token"].any()
    network.load_state_dict(ours)


def test_half_precision_stays_half_precision():
    backbone, combiner = theirs(small())
    lower = [{name: tensor.bfloat16() for name, tensor in part.items()} for part in (backbone, combiner or {})]
    ours = to_ours(lower[0], lower[1], small())
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}


@pytest.mark.parametrize("today", [False, True])
def test_heads_come_back_with_the_same_bits_under_old_and_new_names(today: bool):
    head = AlignHead(24)
    their = head_to_theirs(head.state_dict())
    if today:
        new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
        their = {name.replace("weight_g", new["weight_g"]).replace("weight_v", new["weight_v"]): tensor
                 for name, tensor in their.items()}  # fmt: skip
        assert "last_layer.parametrizations.weight.original1" in their
    assert same(head_to_ours(their, 24, what="head"), head.state_dict())


def test_a_head_under_torch_s_own_weight_norm_computes_the_same():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*[torch.nn.Linear(a, b) for a, b in ((24, 2048), (2048, 2048), (2048, 256))])
    last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(256, 512, bias=False))
    state = {f"layers.{at}.{kind}": getattr(layers[at // 2], kind) for at in (0, 2, 4) for kind in ("weight", "bias")}
    state |= {f"last_layer.{name}": tensor for name, tensor in last.state_dict().items()}
    head = AlignHead(24)
    head.load_state_dict(head_to_ours(state, 24, what="head"))
    x = torch.randn(5, 24)
    wanted = last(layers[2](F.gelu(layers[1](F.gelu(layers[0](x))))))
    assert torch.allclose(head(x), wanted, atol=1e-5)


# --- meaning: a slow twin of their backbone


def half_split(x: Tensor, angles: Tensor) -> Tensor:
    """Turn (token, head_dim) as SPECTRE does: x cos + (-second half, first half) sin."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def naive_backbone(state: Mapping[str, Tensor], config: ScanVitConfig, block: Tensor) -> Tensor:
    """Every token of one block (i, j, k), prefix first, head by head."""
    dim, heads = config.block.dim, config.block.heads
    width = dim // heads
    proj = F.conv3d(block[None, None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"],
                    stride=config.patch_ijk)  # fmt: skip
    grid = (proj.shape[2], proj.shape[3], proj.shape[4])
    prefix = [state[name][0] for name in ("cls_token", "reg_token") if name in state]
    x = torch.cat([*prefix, proj[0].flatten(1).T])
    count = sum(map(len, prefix))
    angles = (2 * math.pi * grid_positions(grid)[:, :, None] / state["rope.periods"]).flatten(1)
    angles = torch.cat([torch.zeros(count, angles.shape[1]), angles])

    def normed(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], config.block.eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for at in range(config.block.depth):
        b = f"blocks.{at}"
        y = normed(x, f"{b}.norm1")
        query, kv = linear(y, f"{b}.attn.q"), linear(y, f"{b}.attn.kv")
        mixed = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            q, k = half_split(query[:, own], angles), half_split(kv[:, :dim][:, own], angles)
            mixed.append((q @ k.T / width**0.5).softmax(dim=-1) @ kv[:, dim:][:, own])
        x = x + linear(torch.cat(mixed, dim=1), f"{b}.attn.proj") * state[f"{b}.ls1.gamma"]
        y = F.gelu(linear(normed(x, f"{b}.norm2"), f"{b}.mlp.fc1"))
        x = x + linear(y, f"{b}.mlp.fc2") * state[f"{b}.ls2.gamma"]
    return normed(x, "norm")


@pytest.mark.parametrize("registers", [0, 2])
def test_the_mapped_network_computes_what_theirs_computes(registers: int):
    config = small(heads=2, third=4, registers=registers)
    backbone, combiner = theirs(config)
    backbone = {name: tensor if "rope" in name else tensor / 4 for name, tensor in backbone.items()}
    network = ScanVit(config)
    network.load_state_dict(to_ours(backbone, combiner, config))
    block = torch.rand(8, 8, 8)
    with torch.no_grad():
        cls, patches = network.encode_blocks(block[None, None])
    wanted = naive_backbone(backbone, config, block)
    assert torch.allclose(cls[0], wanted[0], atol=1e-5)
    assert torch.allclose(patches[0], wanted[1 + registers :], atol=1e-5)


# --- what is refused


def test_missing_unknown_and_mis_shaped_tensors_are_all_named_at_once():
    config = small()
    backbone, combiner = theirs(config)
    del backbone["blocks.0.attn.q.weight"], backbone["norm.bias"]
    backbone |= {"pos_embed": torch.zeros(1, 8, 12), "blocks.1.ls1.gamma": torch.zeros(3)}
    with pytest.raises(CheckpointError) as error:
        to_ours(backbone, combiner, config)
    for fact in (
        "2 missing: blocks.0.attn.q.weight, norm.bias",
        "1 unknown: pos_embed",
        "1 of another shape: blocks.1.ls1.gamma (3,) instead of (12,)",
    ):
        assert fact in error.value.problem


def test_a_combiner_of_another_size_is_refused():
    backbone, _ = theirs(small(heads=2))
    _, combiner = theirs(small(heads=3))
    with pytest.raises(CheckpointError, match=r"SPECTRE combiner for a backbone 12 wide.*\n.*patch_proj\.weight"):
        to_ours(backbone, combiner, small(heads=2))


def test_a_combiner_that_is_not_given_is_missed():
    with pytest.raises(CheckpointError, match="combiner"):
        to_ours(theirs(small())[0], None, small())


@pytest.mark.parametrize("part", ["backbone", "combiner"])
def test_positions_of_another_base_are_refused(part: str):
    config = small(third=4)
    backbone, combiner = theirs(config)
    assert combiner is not None
    {"backbone": backbone, "combiner": combiner}[part]["rope.periods"] *= 1.001
    with pytest.raises(CheckpointError, match=rf"the {part}'s rope.periods run to"):
        to_ours(backbone, combiner, config)


@pytest.mark.parametrize("name", SIZES)
def test_the_size_is_told_from_the_shapes(name: str):
    with torch.device("meta"):
        backbone = {key: torch.empty(shape) for key, shape in shapes(SIZES[name])[0].items()}
    assert size_of(backbone) == name


def test_a_width_that_spectre_does_not_have_is_refused():
    with pytest.raises(CheckpointError, match=r"none of SPECTRE's sizes.*\(12, 1, 4, 4, 2\)(.|\n)*spectre-large 1080"):
        size_of(theirs(small())[0])


def test_weights_of_another_family_are_refused_with_what_is_missing_and_what_is_unknown():
    with pytest.raises(CheckpointError, match=r"390 missing: cls_token(.|\n)*1 unknown: conv1.weight"):
        size_of({"conv1.weight": torch.zeros(64, 1, 7, 7, 7)})


def test_a_combiner_given_as_backbone_is_recognised():
    _, combiner = theirs(small())
    with pytest.raises(CheckpointError, match="a combiner is given as --combiner") as error:
        size_of(combiner or {})
    assert "backbone" in error.value.problem
    assert "missing" not in error.value.problem


def test_blocks_that_are_missing_at_the_end_are_named():
    with torch.device("meta"):
        backbone = {key: torch.empty(shape) for key, shape in shapes(SIZES["spectre-large"])[0].items()}
    short = {key: tensor for key, tensor in backbone.items() if not key.startswith("blocks.23.")}
    assert size_of(short) == "spectre-large"
    with pytest.raises(CheckpointError, match=r"16 missing: blocks\.23\.norm1\.weight"):
        to_ours(short, None, sized("spectre-large", scan_level=False))


def test_a_network_that_centres_its_inputs_is_not_written_as_spectre_s():
    config = dataclasses.replace(small(), inputs="centred")
    with pytest.raises(ConfigError, match="centred at zero"):
        to_theirs(ScanVit(config).state_dict(), config)


def test_a_state_of_another_config_is_not_written():
    with pytest.raises(CheckpointError, match=r"missing: scan_project\.weight"):
        to_theirs(ScanVit(small(scan_depth=0)).state_dict(), small())
