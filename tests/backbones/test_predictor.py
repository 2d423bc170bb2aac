from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.predictor import Predictor, take

SIZE = EncoderConfig(dim=24, depth=2, heads=2)


def made(config: EncoderConfig = SIZE, *, context_dim: int = 0) -> Predictor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        predictor = Predictor(12, 5, config, context_dim=context_dim)
        for block in predictor.encoder.blocks:
            # Large enough that attention is far from even: where a token lies then shows.
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
        return predictor.eval()


def asked() -> tuple[Tensor, Tensor, Tensor]:
    """Visible tokens of two rows, their places and the hidden ones, on a grid of 2 x 2 x 2."""
    positions = grid_positions((2, 2, 2))
    order = torch.tensor([[5, 0, 3, 1, 7, 2], [1, 7, 2, 6, 4, 0]])
    return (
        torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1)),
        positions[order[:, :4]],
        positions[order[:, 4:]],
    )


@torch.no_grad()
def test_moving_the_visible_tokens_changes_the_answer() -> None:
    predictor, (visible, seen_at, hidden_at) = made(), asked()
    plain = predictor(visible, seen_at, hidden_at)
    assert (predictor(visible.flip(1), seen_at, hidden_at) - plain).abs().max() > 1e-3
    torch.testing.assert_close(predictor(visible.flip(1), seen_at.flip(1), hidden_at), plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_hidden_place_has_an_answer_of_its_own() -> None:
    predictor, (visible, seen_at, hidden_at) = made(), asked()
    plain = predictor(visible, seen_at, hidden_at)
    assert (plain[:, 0] - plain[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(predictor(visible, seen_at, hidden_at.flip(1)), plain.flip(1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_do_not_meet() -> None:
    predictor, (visible, seen_at, hidden_at) = made(), asked()
    both = predictor(visible, seen_at, hidden_at)
    alone = predictor(visible[1:], seen_at[1:], hidden_at[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_context_of_a_row_is_heard() -> None:
    predictor, given = made(context_dim=3), asked()
    one, other = (predictor(*given, torch.full((2, 3), value)) for value in (0.0, 1.0))
    assert one.shape == (2, 2, 5)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("size", [EncoderConfig(dim=6, depth=1, heads=1), EncoderConfig(dim=48, depth=3, heads=4)])
def test_any_size_will_do_and_all_of_it_learns(size: EncoderConfig) -> None:
    predictor = made(size)
    predictor(*asked()).square().sum().backward()
    assert not [name for name, member in predictor.named_parameters() if member.grad is None or not member.grad.any()]


def test_without_a_block_it_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=0"):
        Predictor(12, 5, replace(SIZE, depth=0))


def test_take_picks_other_patches_in_every_row() -> None:
    rows = torch.arange(12.0).reshape(2, 3, 2)
    assert take(rows, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
