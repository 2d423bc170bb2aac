from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from voxelstem.backbones.places import PlaceReadout, count_cells, texture
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig, patchify
from voxelstem.errors import ConfigError


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_place_is_read_by_its_own_matrix() -> None:
    torch.manual_seed(0)
    readout, tokens, beside = PlaceReadout(24, 3, places=8, beside=2), drawn(2, 8, 24), drawn(2, 8, 2, seed=1)
    found = readout(tokens, beside)
    over = readout.over_places.weight.unflatten(1, (8, 5))
    for row in range(2):
        twin = sum(
            over[:, place] @ torch.cat([readout.channels(tokens[row, place]), beside[row, place]]) for place in range(8)
        )
        torch.testing.assert_close(found[row], twin)
    # A mean of the tokens stays where two of them change places; this does not.
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    assert (readout(tokens[:, order], beside[:, order]) - found).abs().max() > 0.1
    assert 0.3 < float(found.detach().std()) < 3  # as loud as cls


def test_other_tokens_than_the_grid_s_are_refused() -> None:
    with pytest.raises(ConfigError, match="made for 9 tokens of a block and there are 8"):
        PlaceReadout(24, 3, places=9)(drawn(2, 8, 24))


def twin_texture(patch: np.ndarray, cell: int) -> list[float]:
    """The same, voxel by voxel."""
    channels, *edges = patch.shape
    found: list[float] = []
    for corner in itertools.product(*(range(0, edge, cell) for edge in edges)):
        squares: list[float] = []
        for channel, *at in itertools.product(range(channels), *(range(low, low + cell) for low in corner)):
            beside = [
                np.clip(np.add(at, step), 0, np.subtract(edges, 1))
                for step in (*np.eye(3, dtype=int), *-np.eye(3, dtype=int))
            ]
            squares.append((sum(patch[channel, *at] - patch[channel, *place] for place in beside) / 6) ** 2)
        found.append(math.log1p(200 * math.sqrt(np.mean(squares))) - 2)
    return found


@pytest.mark.parametrize("channels", [1, 2])
def test_texture_is_the_logarithm_of_second_differences(channels: int) -> None:
    patches = torch.rand(2, 3, channels * 4 * 4 * 2, generator=torch.Generator().manual_seed(3))
    found = texture(patches, (4, 4, 2), cells=(2, 1))
    assert found.shape == (2, 3, count_cells((4, 4, 2), (2, 1)))
    for row, patch in itertools.product(range(2), range(3)):
        voxels = patches[row, patch].double().numpy().reshape(channels, 4, 4, 2)
        twin = twin_texture(voxels, 2) + twin_texture(voxels, 1)
        assert found[row, patch].tolist() == pytest.approx(twin, abs=1e-4)


def test_a_flat_patch_has_none_and_a_ball_in_a_lung_has_much() -> None:
    flat = torch.full((1, 1, 8, 8, 8), 0.3)
    ball = flat.clone()
    ball[..., 2:4, 2:4, 2:4] = 0.8
    calm, rough = (texture(patchify(x, (8, 8, 8)), (8, 8, 8), cells=(4,))[0, 0] for x in (flat, ball))
    assert calm.tolist() == [-2.0] * 8
    assert int(rough.argmax()) == 0
    assert rough[0] > 1


def make(**changes: object) -> ScanVit:
    torch.manual_seed(0)
    config = ScanVitConfig(patch_ijk=(4, 4, 4), block_ijk=(8, 8, 8), place_readout=3, **changes)  # pyright: ignore[reportArgumentType]
    return ScanVit(config)


def test_a_block_s_cls_holds_what_its_places_say_and_its_tokens_stay() -> None:
    network = make(texture_cells=(2,))
    assert network.readout is not None
    plain = ScanVit(ScanVitConfig(patch_ijk=(4, 4, 4), block_ijk=(8, 8, 8)))
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if "readout" not in name})
    blocks = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    (cls, tokens), (bare, wanted) = network.encode_blocks(blocks), plain.encode_blocks(blocks)
    assert torch.equal(tokens, wanted)
    beside = texture(patchify(blocks, (4, 4, 4)), (4, 4, 4), cells=(2,))
    torch.testing.assert_close(cls, bare + network.readout(tokens, beside))
    last = network.intermediates(blocks, [network.config.block.depth])[0]
    torch.testing.assert_close(last[0], cls)


def test_what_is_hidden_has_no_texture() -> None:
    network = make(texture_cells=(2,))
    blocks = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    other = blocks.clone()
    other[..., :4, :4, :4] = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2))
    masked = torch.zeros(1, 8, dtype=torch.bool)
    masked[0, 0] = True
    assert torch.equal(network.encode_blocks(blocks, masked=masked)[0], network.encode_blocks(other, masked=masked)[0])
    assert not torch.equal(network.encode_blocks(blocks)[0], network.encode_blocks(other)[0])


def test_a_part_of_the_patches_cannot_be_read_by_place() -> None:
    with pytest.raises(ConfigError, match="only some patches are kept"):
        make().encode_blocks(torch.rand(1, 1, 8, 8, 8), keep=torch.tensor([[0, 5]]))


def test_a_block_of_another_shape_with_as_many_patches_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads whole blocks"):
        make().encode_blocks(torch.rand(1, 1, 4, 8, 16))


@pytest.mark.parametrize(
    "wrong", [{"place_readout": -1}, {"texture_cells": (2,)}, {"place_readout": 2, "texture_cells": (3,)}]
)
def test_readouts_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"place_readout|texture_cells"):
        ScanVitConfig(**wrong)  # pyright: ignore[reportArgumentType]
