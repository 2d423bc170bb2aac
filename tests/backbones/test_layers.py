from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.layers import (
    Attention,
    Block,
    grid_positions,
    move_positions,
    pair_order,
    place_code,
    rope_turns,
    rotate,
    scaled_linear,
)
from voxelstem.chance import Chance

BASE = 1000.0


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_positions(count: int) -> Tensor:
    return torch.rand(1, count, 3) * 2 - 1


def half_split(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """The usual spelling: angles of R, A, S side by side, twice; x cos + (-second half, first half) sin. One token."""
    count = len(x) // 6
    angles = [2 * math.pi * float(p) / base ** (2 * k / (len(x) // 3)) for p in positions for k in range(count)]
    first, second = x.double().chunk(2)
    turned = torch.cat([-second, first])
    cos, sin = (torch.tensor([turn(a) for a in angles * 2], dtype=torch.float64) for turn in (math.cos, math.sin))
    return x.double() * cos + turned * sin


def test_cells_lie_at_their_centres_with_the_last_axis_fastest() -> None:
    grid = (2, 3, 4)
    expected = [
        [(index + 0.5) / size * 2 - 1 for index, size in zip(cell, grid, strict=True)] for cell in np.ndindex(grid)
    ]
    torch.testing.assert_close(grid_positions(grid), torch.tensor(expected))


def test_one_cell_lies_in_the_middle() -> None:
    assert grid_positions((1, 1, 1)).tolist() == [[0.0, 0.0, 0.0]]


def test_periods_grow_from_one_towards_the_base() -> None:
    turns = rope_turns(torch.tensor([[0.01, 0.0, 0.0]]), 24, base=BASE)[0]
    periods = 2 * math.pi * 0.01 / turns.angle()[:4]
    torch.testing.assert_close(periods, BASE ** (torch.arange(4) / 4), rtol=1e-4, atol=0)
    torch.testing.assert_close(turns[4:], torch.ones(8, dtype=turns.dtype))


def test_scores_equal_those_of_the_half_split_form_on_permuted_rows() -> None:
    dim, tokens = 18, 5
    query, key, positions = torch.randn(tokens, dim), torch.randn(tokens, dim), random_positions(tokens)
    turns = rope_turns(positions, dim, base=BASE)
    ours = [rotate(x[None, None], turns)[0, 0] for x in (query, key)]
    # Our neighbours (2d, 2d + 1) are the half-split form's (d, d + half).
    order = torch.arange(dim).reshape(-1, 2).T.flatten()
    twins = [
        torch.stack([half_split(row[order], place, BASE) for row, place in zip(x, positions[0], strict=True)])
        for x in (query, key)
    ]
    torch.testing.assert_close(ours[0] @ ours[1].T, (twins[0] @ twins[1].T).float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[0][:, order], twins[0].float(), atol=1e-5, rtol=1e-4)


def test_scores_depend_on_relative_places_only() -> None:
    query, key, positions = torch.randn(1, 2, 6, 12), torch.randn(1, 2, 6, 12), random_positions(6)

    def scores(places: Tensor) -> Tensor:
        turns = rope_turns(places, 12, base=BASE)
        return rotate(query, turns) @ rotate(key, turns).transpose(-1, -2)

    moved = scores(positions + torch.tensor([0.3, -0.7, 1.9]))
    torch.testing.assert_close(moved, scores(positions), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scores(positions * 2), scores(positions), atol=1e-2)


def test_turning_keeps_lengths_and_leaves_position_zero_alone() -> None:
    x = torch.randn(1, 2, 4, 12)
    turned = rotate(x, rope_turns(random_positions(4), 12, base=BASE))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(x, rope_turns(torch.zeros(1, 4, 3), 12, base=BASE)), x)


def test_half_precision_is_turned_in_full_and_given_back_in_half() -> None:
    x, turns = torch.randn(1, 2, 4, 12).bfloat16(), rope_turns(random_positions(4), 12, base=BASE)
    assert torch.equal(rotate(x, turns), rotate(x.float(), turns).bfloat16())


def test_attention_equals_softmax_in_loops() -> None:
    dim, heads, tokens, head_dim = 24, 2, 4, 12
    attention, positions, scale = Attention(dim, heads), random_positions(tokens), torch.rand(dim)
    x = torch.randn(1, tokens, dim)
    with torch.no_grad():
        query, key, value = attention.qkv(x)[0].double().split(dim, dim=-1)
        order = torch.arange(head_dim).reshape(-1, 2).T.flatten()
        expected = torch.zeros(tokens, dim, dtype=torch.float64)
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            for a in range(tokens):
                asks = half_split(query[a, part][order], positions[0, a], BASE)
                answers = [half_split(key[b, part][order], positions[0, b], BASE) for b in range(tokens)]
                powers = [math.exp(float(asks @ answer) / math.sqrt(head_dim)) for answer in answers]
                for b in range(tokens):
                    expected[a, part] += powers[b] / sum(powers) * value[b, part]
        expected = (attention.proj(expected.float()) * scale)[None]
        turns = rope_turns(positions, head_dim, base=BASE)
        torch.testing.assert_close(attention(x, turns, scale), expected, atol=1e-5, rtol=1e-4)


def test_a_scaled_layer_is_the_layer_times_the_scale() -> None:
    layer, x, scale = nn.Linear(5, 7), torch.randn(2, 3, 5), torch.randn(7)
    torch.testing.assert_close(scaled_linear(x, layer, scale), layer(x) * scale)


def test_the_scale_gets_the_gradient_it_would_get_on_the_rows() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    scales = [torch.full((7,), 0.3, requires_grad=True) for _ in range(2)]
    scaled_linear(x, layer, scales[0]).square().sum().backward()
    (layer(x) * scales[1]).square().sum().backward()
    torch.testing.assert_close(scales[0].grad, scales[1].grad)


def test_a_block_is_two_scaled_branches_after_norms() -> None:
    block = Block(12, 1, mlp_ratio=2.0, eps=1e-5, layer_scale=0.5)
    x, turns = torch.randn(2, 5, 12), rope_turns(random_positions(5), 12, base=BASE)
    middle = x + 0.5 * block.attn(block.norm1(x), turns, torch.ones(12))
    expected = middle + 0.5 * block.fc2(F.gelu(block.fc1(block.norm2(middle))))
    torch.testing.assert_close(block(x, turns), expected)
    assert block.fc1.out_features == 24


def test_a_block_whose_branches_are_scaled_to_nothing_changes_nothing() -> None:
    block = Block(12, 2, mlp_ratio=4.0, eps=1e-5, layer_scale=0.0)
    x = torch.randn(2, 5, 12)
    assert torch.equal(block(x, rope_turns(random_positions(5), 6, base=BASE)), x)


def test_the_pair_order_leads_from_the_half_split_form_to_neighbours() -> None:
    assert pair_order(12) == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]


def test_positions_are_moved_then_stretched_for_each_sample_alone() -> None:
    positions = random_positions(5)
    moved = move_positions(positions, Chance.of(3, count=400), shift=0.3, jitter=1.5, rescale=2.0)
    assert moved.shape == (400, 5, 3)
    # Of two tokens the difference is stretched only, so what is left tells the draws apart.
    stretch = (moved[:, 1] - moved[:, 0]) / (positions[:, 1] - positions[:, 0])
    shift = moved[:, 0] / stretch - positions[:, 0]
    assert float(shift.abs().max()) <= 0.3 + 1e-4
    assert float(shift.abs().max()) > 0.28
    logs = stretch.log() / math.log(2)
    assert float(logs.abs().max()) <= 1 + math.log(1.5) / math.log(2) + 1e-4
    common = logs.mean(dim=1)
    assert 0.45 < float(common.std()) < 0.70  # log-uniform over (-1, 1) has 0.577; jitter adds a little
    assert float((logs - common[:, None]).abs().max()) > 0.3
    again = move_positions(positions, Chance.of(3, count=400), shift=0.3, jitter=1.5, rescale=2.0)
    assert torch.equal(moved, again)


def test_positions_stay_where_they_are_without_shift_jitter_and_rescale() -> None:
    positions = random_positions(5)
    same = move_positions(positions, Chance.of(0, count=2), shift=0.0, jitter=1.0, rescale=1.0)
    assert torch.equal(same, positions.expand(2, -1, -1))


def test_the_first_tokens_looks_are_the_shares_that_attention_mixes_by() -> None:
    attention, turns, x = Attention(24, 2), rope_turns(random_positions(6), 12, base=BASE), torch.randn(2, 6, 24)
    with torch.no_grad():
        looks = attention.first_looks(x, turns)
        assert looks.shape == (2, 2, 6)
        value = attention.qkv(x)[..., 48:].unflatten(-1, (2, 12))
        mixed = torch.einsum("bht,bthd->bhd", looks, value).flatten(1)
        torch.testing.assert_close(attention.proj(mixed), attention(x, turns, torch.ones(24))[:, 0])


def test_a_place_s_code_is_its_waves_one_after_another():
    positions = random_positions(5)
    found = place_code(positions, 4)
    assert found.shape == (1, 5, 24)
    waves = [math.pi * 2 ** (-2 + 4 * k / 3) for k in range(4)]
    for at, place in enumerate(positions[0]):
        angles = [wave * float(p) for p in place for wave in waves]
        wanted = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
        torch.testing.assert_close(found[0, at], wanted, atol=1e-5, rtol=1e-5)


def test_cells_of_a_grid_have_codes_of_their_own():
    codes = place_code(grid_positions((6, 5, 6)), 8)
    gaps = torch.cdist(codes, codes) + 9 * torch.eye(len(codes))
    assert gaps.min() > 0.5
