from __future__ import annotations

import pytest
import torch
from torch import Tensor

from voxelstem.backbones.pools import POOLS, AttentionPool, mean, pool


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), torch.randn(3, 5, 4, generator=generator)


SHARE = torch.tensor([[1.0, 1, 1, 1, 1], [1, 0.5, 0, 0, 0], [0, 0, 0.25, 0, 0]])


def test_a_mean_by_shares_equals_loops() -> None:
    _, tokens = rows()
    found = mean(tokens, SHARE)
    for row in range(3):
        total = sum(SHARE[row, token] * tokens[row, token] for token in range(5))
        torch.testing.assert_close(found[row], total / SHARE[row].sum())
    torch.testing.assert_close(mean(tokens, torch.ones(3, 5)), mean(tokens))


def test_what_has_no_share_changes_nothing() -> None:
    cls, tokens = rows()
    changed = torch.where(SHARE[..., None] > 0, tokens, tokens + 100)
    assert torch.equal(pool(cls, changed, share=SHARE), pool(cls, tokens, share=SHARE))


def test_a_row_without_any_share_has_the_mean_zero() -> None:
    _, tokens = rows()
    assert torch.equal(mean(tokens, torch.zeros(3, 5)), torch.zeros(3, 4))


def test_each_pool_is_what_its_name_says() -> None:
    cls, tokens = rows()
    assert torch.equal(pool(cls, tokens, "cls"), cls)
    assert torch.equal(pool(cls, tokens, "mean"), tokens.mean(dim=1))
    assert torch.equal(pool(cls, tokens), torch.cat([cls, tokens.mean(dim=1)], dim=1))
    assert POOLS == ("cls-mean", "cls", "mean")


def test_an_unknown_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="cls-mean, cls, mean"):
        pool(*rows(), "max")  # pyright: ignore[reportArgumentType]


def test_the_attention_pool_equals_softmax_in_loops() -> None:
    torch.manual_seed(0)
    network, (_, tokens) = AttentionPool(4, 2).requires_grad_(False), rows()
    network.query.mul_(50)
    query = network.q(network.query)
    found = network(tokens, SHARE)
    for row in range(3):
        key, value = network.kv(tokens[row]).chunk(2, dim=-1)
        mixed = torch.zeros(4)
        for head in range(2):
            part = slice(2 * head, 2 * head + 2)
            powers = torch.stack([(query[part] @ key[token, part] / 2**0.5).exp() for token in range(5)])
            powers = powers * (SHARE[row] > 0)
            mixed[part] = (powers / powers.sum()) @ value[:, part]
        x = network.proj(mixed)
        wanted = x + network.fc2(torch.nn.functional.gelu(network.fc1(network.norm(x))))
        torch.testing.assert_close(found[row], wanted)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="heads must divide dim"):
        AttentionPool(4, 3)
