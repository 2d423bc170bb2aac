from __future__ import annotations

import pytest
import torch

from voxelstem.backbones.places import PlaceReadout
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.errors import ConfigError


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_place_is_read_by_its_own_matrix() -> None:
    torch.manual_seed(0)
    readout, tokens = PlaceReadout(24, 3, places=8), drawn(2, 8, 24)
    found = readout(tokens)
    over = readout.over_places.weight.unflatten(1, (8, 3))
    for row in range(2):
        twin = sum(over[:, place] @ readout.channels(tokens[row, place]) for place in range(8))
        torch.testing.assert_close(found[row], twin)
    # A mean of the tokens stays where two of them change places; this does not.
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    assert (readout(tokens[:, order]) - found).abs().max() > 0.1
    assert 0.3 < float(found.detach().std()) < 3  # as loud as cls


def test_other_tokens_than_the_grid_s_are_refused() -> None:
    with pytest.raises(ConfigError, match="made for 9 tokens of a block and there are 8"):
        PlaceReadout(24, 3, places=9)(drawn(2, 8, 24))


def make() -> ScanVit:
    torch.manual_seed(0)
    return ScanVit(ScanVitConfig(patch_ijk=(4, 4, 4), block_ijk=(8, 8, 8), place_readout=3))


def test_a_block_s_cls_holds_what_its_places_say_and_its_tokens_stay() -> None:
    network = make()
    assert network.readout is not None
    plain = ScanVit(ScanVitConfig(patch_ijk=(4, 4, 4), block_ijk=(8, 8, 8)))
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if "readout" not in name})
    blocks = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    (cls, tokens), (bare, wanted) = network.encode_blocks(blocks), plain.encode_blocks(blocks)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(cls, bare + network.readout(tokens))
    last = network.intermediates(blocks, [network.config.block.depth])[0]
    torch.testing.assert_close(last[0], cls)


def test_a_part_of_the_patches_cannot_be_read_by_place() -> None:
    with pytest.raises(ConfigError, match="only some patches are kept"):
        make().encode_blocks(torch.rand(1, 1, 8, 8, 8), keep=torch.tensor([[0, 5]]))


def test_a_block_of_another_shape_with_as_many_patches_is_refused() -> None:
    with pytest.raises(ConfigError, match="wants whole ones"):
        make().encode_blocks(torch.rand(1, 1, 4, 8, 16))


def test_a_readout_of_less_than_no_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="place_readout"):
        ScanVitConfig(place_readout=-1)
