from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.losses.binary import balanced_binary_entropy, kind_weights


def made_up(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random((rows, 3)) < 0.3, math.nan, (rng.random((rows, 3)) < (0.1, 0.5, 0.8)).astype(float))
    return torch.from_numpy(rng.normal(size=(rows, 3))), torch.from_numpy(truth)


def naive(logits: list[list[float]], truth: list[list[float]]) -> float:
    """One cell after the other."""
    total = 0.0
    for row, told in enumerate(truth):
        for at, there in enumerate(told):
            if math.isnan(there):
                continue
            alike = sum(other[at] == there for other in truth)
            chance = 1 / (1 + math.exp(-logits[row][at]))
            total -= len(truth) / (2 * alike) * math.log(chance if there else 1 - chance)
    return total / (len(truth) * len(truth[0]))


@given(st.integers(1, 20), st.integers(0, 99))
def test_the_loss_is_its_slow_twin(rows: int, seed: int) -> None:
    logits, truth = made_up(rows, seed)
    found = balanced_binary_entropy(logits, truth, kind_weights(truth))
    assert found.item() == pytest.approx(naive(logits.tolist(), truth.tolist()), abs=1e-9)


def test_what_nobody_knows_teaches_nothing() -> None:
    logits, truth = made_up(20, 0)
    logits.requires_grad_()
    balanced_binary_entropy(logits, truth, kind_weights(truth)).backward()
    assert logits.grad is not None
    assert (logits.grad[truth.isnan()] == 0).all()
    assert (logits.grad[~truth.isnan()] != 0).all()


def test_saying_one_half_costs_the_same_however_rare_a_class_is() -> None:
    _, truth = made_up(50, 1)
    for at in range(3):
        one = truth[:, at : at + 1]
        loss = balanced_binary_entropy(torch.zeros(50, 1, dtype=torch.float64), one, kind_weights(one))
        assert loss.item() == pytest.approx(math.log(2))


def test_a_kind_that_nobody_shows_weighs_nothing() -> None:
    truth = torch.tensor([[1.0], [1.0], [math.nan]])
    np.testing.assert_array_equal(kind_weights(truth), [[0.0], [0.75]])
