from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig, patchify
from voxelstem.chance import Chance

LEVEL = EncoderConfig(dim=24, depth=2, heads=2)
CONFIG = ScanVitConfig(
    channels=2, patch_ijk=(4, 2, 3), block_ijk=(8, 6, 6), block=LEVEL, scan=dataclasses.replace(LEVEL, dim=12, depth=1)
)
GRID, PATCHES = (2, 1, 2), 2 * 3 * 2


@pytest.fixture(scope="module")
def network() -> ScanVit:
    torch.manual_seed(0)
    made = ScanVit(CONFIG)
    # Untrained weights of 0.02 hide everything behind the residual: make the branches loud.
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return made.eval().requires_grad_(False)


def scans(batch: int = 2) -> Tensor:
    return torch.rand(batch, 4, 2, *CONFIG.block_ijk, generator=torch.Generator().manual_seed(1))


def patch_slices(patch: int) -> tuple[slice, slice, slice]:
    i, j, k = (
        slice(at * size, (at + 1) * size)
        for at, size in zip(np.unravel_index(patch, (2, 3, 2)), CONFIG.patch_ijk, strict=True)
    )
    return i, j, k


def test_patchify_equals_loops() -> None:
    blocks = scans().flatten(0, 1)
    patches = patchify(blocks, CONFIG.patch_ijk)
    assert patches.shape == (8, PATCHES, 2 * 4 * 2 * 3)
    for row, patch in np.ndindex(8, PATCHES):
        assert torch.equal(patches[row, patch], blocks[row][(slice(None), *patch_slices(patch))].flatten())


def test_shapes_are_those_of_the_protocol(network: ScanVit) -> None:
    tokens = network.encode(scans(), GRID)
    assert tokens.cls.shape == (2, 4, 24)
    assert tokens.patches.shape == (2, 4, PATCHES, 24)
    assert tokens.blocks is not None
    assert tokens.blocks.shape == (2, 4, 12)
    assert tokens.scan is not None
    assert tokens.scan.shape == (2, 12)


def test_a_kept_patch_is_encoded_as_if_there_were_no_others(network: ScanVit) -> None:
    keep = torch.stack([torch.randperm(PATCHES)[:5] for _ in range(8)])
    blocks = scans().flatten(0, 1)
    _, kept = network.encode_blocks(blocks, keep=keep)
    for row in range(8):
        voxels = torch.stack([blocks[row][(slice(None), *patch_slices(int(p)))].flatten() for p in keep[row]])
        x = network.embed(2 * voxels - 1)[None]
        _, alone = network.block_encoder(x, grid_positions((2, 3, 2))[keep[row]][None])
        torch.testing.assert_close(kept[row], alone[0], atol=1e-5, rtol=1e-4)


def test_keeping_every_patch_is_keeping_none_back(network: ScanVit) -> None:
    keep = torch.arange(PATCHES).expand(2, 4, -1)
    torch.testing.assert_close(network.encode(scans(), GRID, keep=keep).scan, network.encode(scans(), GRID).scan)


def test_what_is_not_kept_is_not_seen(network: ScanVit) -> None:
    hidden = scans()
    hidden[(..., *patch_slices(3))] = 0.0
    keep = torch.tensor([p for p in range(PATCHES) if p != 3]).expand(2, 4, -1)
    assert torch.equal(network.encode(scans(), GRID, keep=keep).scan, network.encode(hidden, GRID, keep=keep).scan)
    assert not torch.allclose(network.encode(scans(), GRID).scan, network.encode(hidden, GRID).scan, atol=1e-4)


def test_what_is_masked_is_not_seen_and_the_rest_is(network: ScanVit) -> None:
    masked = torch.zeros(2, 4, PATCHES, dtype=torch.bool)
    masked[..., 3] = True
    before = network.encode(scans(), GRID, masked=masked).patches
    for patch, same in ((3, True), (4, False)):
        changed = scans()
        changed[(..., *patch_slices(patch))] = 0.0
        after = network.encode(changed, GRID, masked=masked).patches
        assert torch.allclose(after, before, atol=1e-4) is same


def test_a_masked_patch_still_has_its_place(network: ScanVit) -> None:
    masked = torch.ones(1, 4, PATCHES, dtype=torch.bool)
    rows = network.encode(scans(1), GRID, masked=masked).patches[0, 0]
    gaps = torch.cdist(rows, rows) + torch.eye(PATCHES)
    assert float(gaps.min()) > 1e-3


def test_each_block_is_first_seen_by_itself_and_then_with_all_others(network: ScanVit) -> None:
    changed = scans()
    changed[:, 2] = 0.5
    before, after = network.encode(scans(), GRID), network.encode(changed, GRID)
    others = [0, 1, 3]
    torch.testing.assert_close(before.patches[:, others], after.patches[:, others])
    torch.testing.assert_close(before.cls[:, others], after.cls[:, others])
    assert before.blocks is not None
    assert after.blocks is not None
    assert float((before.blocks - after.blocks)[:, others].abs().amax(dim=-1).min()) > 1e-4


def test_scans_of_a_batch_do_not_see_one_another(network: ScanVit) -> None:
    both = network.encode(scans(), GRID)
    for row in range(2):
        alone = network.encode(scans()[row : row + 1], GRID)
        torch.testing.assert_close(both.scan[row : row + 1], alone.scan, atol=1e-5, rtol=1e-4)


def test_the_scan_level_knows_where_each_block_lies(network: ScanVit) -> None:
    straight, turned = network.encode(scans(), (4, 1, 1)).scan, network.encode(scans(), (1, 4, 1)).scan
    assert not torch.allclose(straight, turned, atol=1e-4)


def test_a_block_is_described_by_cls_and_the_mean_of_its_patches(network: ScanVit) -> None:
    tokens = network.encode(scans(), GRID)
    described = torch.cat([tokens.cls, tokens.patches.mean(dim=2)], dim=-1)
    whole, rows = network.scan_encoder(network.scan_project(described), grid_positions(GRID)[None])
    torch.testing.assert_close(tokens.scan, whole)
    torch.testing.assert_close(tokens.blocks, rows)


def test_a_grid_that_does_not_hold_the_blocks_is_refused(network: ScanVit) -> None:
    # TypeError is jaxtyping's, where its shape checks are switched on.
    with pytest.raises((RuntimeError, TypeError)):
        network.encode(scans(), (2, 2, 2))


def test_blocks_of_another_size_can_be_encoded(network: ScanVit) -> None:
    cls, patches = network.encode_blocks(torch.rand(3, 2, 4, 4, 9))
    assert cls.shape == (3, 24)
    assert patches.shape == (3, 1 * 2 * 3, 24)


def test_without_a_scan_level_there_are_blocks_only() -> None:
    flat = ScanVit(dataclasses.replace(CONFIG, scan=dataclasses.replace(LEVEL, depth=0)))
    tokens = flat.encode(scans(), GRID)
    assert not flat.has_scan_level
    assert tokens.scan is None
    assert tokens.blocks is None
    with pytest.raises(ValueError, match="no scan level"):
        flat.look_at_scan(torch.cat([tokens.cls, tokens.patches.mean(dim=2)], dim=-1), GRID)


def test_the_same_seed_draws_the_same_network() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(ScanVit(CONFIG).encode(scans(), GRID).scan)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_depth_groups_hold_every_weight_once_from_the_input_up(network: ScanVit) -> None:
    groups = network.param_groups()
    assert [depth for depth, _ in groups] == [0, 1, 2, 3]
    named = [name for _, group in groups for name, _ in group]
    assert sorted(named) == sorted(name for name, _ in network.named_parameters())
    homes = {name: depth for depth, group in groups for name, _ in group}
    assert homes["embed.weight"] == homes["mask_token"] == homes["block_encoder.prefix"] == 0
    assert homes["block_encoder.blocks.0.fc1.weight"] == 1
    assert homes["scan_encoder.prefix"] == homes["scan_project.weight"] == homes["block_encoder.norm.weight"] == 3


def test_patches_that_do_not_fill_the_block_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide"):
        ScanVitConfig(patch_ijk=(4, 4, 5), block_ijk=(32, 32, 32))


@pytest.mark.parametrize("wrong", [{"patch_ijk": (0, 4, 4)}, {"block_ijk": (0, 32, 32)}, {"channels": 0}])
def test_sizes_below_one_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScanVitConfig(**wrong)


def test_unit_inputs_enter_as_they_are(network: ScanVit) -> None:
    plain = ScanVit(dataclasses.replace(CONFIG, inputs="unit")).eval().requires_grad_(False)
    plain.load_state_dict(network.state_dict())
    blocks = scans().flatten(0, 1)
    assert torch.equal(plain.encode_blocks(2 * blocks - 1)[1], network.encode_blocks(blocks)[1])


def test_intermediates_and_attention_are_those_of_the_first_level(network: ScanVit) -> None:
    blocks = scans().flatten(0, 1)
    (last,) = network.intermediates(blocks, (2,))
    cls, patches = network.encode_blocks(blocks)
    assert torch.equal(last[0], cls)
    assert torch.equal(last[1], patches)
    assert network.cls_attention(blocks).shape == (8, 2, PATCHES)


def test_a_generator_moves_the_patches() -> None:
    moving = dataclasses.replace(CONFIG, block=dataclasses.replace(LEVEL, rope_shift=0.5))
    torch.manual_seed(0)
    network = ScanVit(moving)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    plain = network.encode(scans(), GRID)
    moved = network.encode(scans(), GRID, chance=Chance.of(1, count=len(scans())))
    assert not torch.allclose(plain.patches, moved.patches, atol=1e-4)
    assert torch.equal(moved.scan, network.encode(scans(), GRID, chance=Chance.of(1, count=len(scans()))).scan)
