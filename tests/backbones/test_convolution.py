from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from voxelstem.backbones.convolution import (
    EPS,
    ConvNorm,
    InstanceNorm,
    as_tokens,
    cells_of,
    draw_convolutions,
    emptied,
    hidden,
    in_parts,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normed() -> InstanceNorm:
    norm = InstanceNorm(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -3.0]))
    return norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_each_channel_of_each_row_is_normed_over_its_own_voxels(layout: torch.memory_format) -> None:
    norm, x = normed(), 5 + 2 * noise(2, 3, 4, 5, 6)
    found = norm(x.contiguous(memory_format=layout))
    for row in range(2):
        for channel in range(3):
            own = x[row, channel].double()
            spread = ((own - own.mean()).square().mean() + EPS).sqrt()
            wanted = (own - own.mean()) / spread * norm.weight[channel] + norm.bias[channel]
            torch.testing.assert_close(found[row, channel].double(), wanted, atol=1e-5, rtol=1e-5)


def test_both_ways_to_norm_have_the_same_gradient() -> None:
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        norm, x = normed(), noise(2, 3, 4, 4, 4).contiguous(memory_format=layout).requires_grad_()
        (norm(x) * noise(2, 3, 4, 4, 4, seed=1)).sum().backward()
        gradients.append([x.grad, norm.weight.grad, norm.bias.grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_of_a_single_voxel_nothing_is_left_but_the_shift() -> None:
    norm = normed()
    found = norm(noise(2, 3, 1, 1, 1))
    torch.testing.assert_close(found.flatten(1), norm.bias.expand(2, 3), atol=1e-3, rtol=0)


def test_a_convolution_strides_norms_and_lets_a_hundredth_of_what_is_negative_through() -> None:
    layer = ConvNorm(2, 3, stride=2)
    x = noise(1, 2, 6, 4, 8)
    found = layer(x)
    assert found.shape == (1, 3, 3, 2, 4)
    plain = nn.functional.instance_norm(layer.conv(x))
    torch.testing.assert_close(found, torch.where(plain > 0, plain, plain * 0.01), atol=1e-5, rtol=1e-4)
    assert ConvNorm(2, 3, active=False)(x).min() < -0.5


def test_convolutions_are_drawn_with_the_spread_of_he_and_no_bias() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(ConvNorm(32, 64), nn.ConvTranspose3d(64, 32, 2, 2))
        draw_convolutions(network)
    weight = network[0].conv.weight
    assert weight.std().item() == pytest.approx((2 / (32 * 27)) ** 0.5, rel=0.02)
    assert not network[0].conv.bias.any()
    assert not network[1].bias.any()


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 3)] * 3), st.integers(0, 99))
def test_emptied_patches_are_zero_and_others_stay(cells: tuple, patch: tuple, seed: int) -> None:
    sizes = [count * edge for count, edge in zip(cells, patch, strict=True)]
    blocks = 1 + noise(2, 1, *sizes, seed=seed).abs()
    patches = noise(2, cells[0] * cells[1] * cells[2], seed=seed + 1) > 0
    found = emptied(blocks, patches, patch)
    for row in range(2):
        for i in range(sizes[0]):
            for j in range(sizes[1]):
                for k in range(sizes[2]):
                    number = (i // patch[0] * cells[1] + j // patch[1]) * cells[2] + k // patch[2]
                    wanted = 0.0 if patches[row, number] else blocks[row, 0, i, j, k]
                    assert found[row, 0, i, j, k] == wanted


def test_what_keep_does_not_name_is_emptied_like_what_is_masked() -> None:
    blocks = 1 + noise(2, 1, 4, 4, 4).abs()
    keep = torch.tensor([[0, 5], [7, 2]])
    masked = torch.ones(2, 8, dtype=torch.bool).scatter(1, keep, value=False)
    one = hidden(blocks, (2, 2, 2), masked=None, keep=keep)
    assert torch.equal(one, hidden(blocks, (2, 2, 2), masked=masked, keep=None))
    assert (one != 0).sum() == 2 * 2 * 8
    assert hidden(blocks, (2, 2, 2), masked=None, keep=None) is blocks


def test_a_block_that_patches_do_not_fill_is_refused() -> None:
    assert cells_of(torch.zeros(1, 1, 8, 4, 12), (4, 4, 4)) == (2, 1, 3)
    with pytest.raises(ValueError, match=r"patches of 4 x 4 x 4 voxels must fill a block, got \(8, 6, 8\)"):
        hidden(torch.zeros(1, 1, 8, 6, 8), (4, 4, 4), masked=None, keep=None)


def test_cells_become_tokens_in_c_order_and_their_mean_cls() -> None:
    maps = noise(2, 5, 2, 3, 4)
    cls, tokens = as_tokens(maps, keep=None)
    assert torch.equal(tokens[1, (1 * 3 + 2) * 4 + 3], maps[1, :, 1, 2, 3])
    torch.testing.assert_close(cls, maps.mean((2, 3, 4)))
    kept_cls, kept = as_tokens(maps, keep=torch.tensor([[23, 0], [1, 2]]))
    assert torch.equal(kept[0], tokens[0, [23, 0]])
    torch.testing.assert_close(kept_cls[1], tokens[1, [1, 2]].mean(0))


def test_a_long_batch_is_computed_a_part_at_a_time() -> None:
    blocks, seen = noise(5, 1, 2, 2, 2), list[int]()

    def double(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return part * 2

    assert torch.equal(in_parts(double, blocks, 16), blocks * 2)
    assert torch.equal(in_parts(double, blocks, 4), blocks * 2)
    assert seen == [2, 2, 1, 1, 1, 1, 1, 1]
