from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.losses.koleo import koleo


def naive_koleo(embedding: Tensor) -> float:
    rows = [row / row.norm() for row in embedding.double()]
    gaps = [min(float((a - b).norm()) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
    return -sum(math.log(gap) for gap in gaps) / len(gaps)


@pytest.mark.parametrize(("rows", "dim"), [(2, 3), (5, 2), (16, 8), (40, 24)])
def test_it_equals_its_naive_twin(rows: int, dim: int) -> None:
    embedding = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows))
    assert float(koleo(embedding)) == pytest.approx(naive_koleo(embedding), rel=1e-4)


def test_lengths_do_not_matter() -> None:
    embedding = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(koleo(embedding * torch.linspace(0.1, 9, 6)[:, None]), koleo(embedding))


def test_two_opposite_rows_are_neighbours_of_each_other_and_not_of_themselves() -> None:
    assert float(koleo(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-math.log(2.0))


def test_rows_that_lie_apart_cost_less() -> None:
    close = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1]])
    apart = torch.tensor([[1.0, 0.0], [-0.5, 0.866], [-0.5, -0.866]])
    assert float(koleo(apart)) < float(koleo(close))


def test_following_the_gradient_moves_neighbours_apart() -> None:
    embedding = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.2, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    koleo(embedding).backward()
    assert embedding.grad is not None
    before = embedding.detach()
    assert float(koleo(before - 0.01 * embedding.grad)) < float(koleo(before))


def test_equal_rows_and_empty_rows_stay_finite() -> None:
    for embedding in (torch.ones(3, 4), torch.zeros(3, 4)):
        embedding.requires_grad_()
        loss = koleo(embedding)
        loss.backward()
        assert loss.isfinite()
        assert embedding.grad is not None
        assert embedding.grad.isfinite().all()


def test_a_lower_precision_around_it_finds_the_same_neighbours() -> None:
    embedding = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = koleo(embedding)
    assert torch.equal(found, koleo(embedding))


@pytest.mark.parametrize("peer", ["lightly", "spectre"])
def test_loss_and_gradient_are_the_peers(golden: Any, peer: str) -> None:
    # They add their 1e-8 to every coordinate of the difference too, which is lost in float32.
    rows = golden.cases.embeddings().requires_grad_()
    loss = koleo(rows)
    loss.backward()
    golden.agrees(f"{peer}/koleo/loss", loss)
    golden.agrees(f"{peer}/koleo/gradient", rows.grad)
