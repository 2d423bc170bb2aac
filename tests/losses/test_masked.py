from __future__ import annotations

import itertools

import pytest
import torch

from voxelstem.losses.masked import masked_mse, smooth_l1

SHAPE = (2, 1, 3, 4, 2)


@pytest.fixture
def voxels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Guess, truth, what was hidden, what counts."""
    generator = torch.Generator().manual_seed(0)
    guess, truth = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    masked, counted = (torch.rand(SHAPE, generator=generator) < share for share in (0.6, 0.7))
    return guess, truth, masked, counted


def naive_masked_mse(guess, truth, where) -> float:
    total, number = 0.0, 0
    for at in itertools.product(*map(range, SHAPE)):
        if where[at]:
            total += (float(guess[at]) - float(truth[at])) ** 2
            number += 1
    return total / number


def test_the_squared_error_equals_its_naive_twin(voxels) -> None:
    guess, truth, masked, counted = voxels
    assert float(masked_mse(guess, truth, masked).value) == pytest.approx(naive_masked_mse(guess, truth, masked))
    found = masked_mse(guess, truth, masked, counted=counted)
    assert float(found.value) == pytest.approx(naive_masked_mse(guess, truth, masked & counted))
    assert float(found.count) == int((masked & counted).sum())


def test_it_is_what_a_hand_computes() -> None:
    guess, truth = torch.tensor([1.0, 5.0, 0.0, 9.0]), torch.tensor([0.0, 2.0, 4.0, 9.5])
    masked = torch.tensor([True, True, False, False])
    assert float(masked_mse(guess, truth, masked).value) == 5.0
    assert float(masked_mse(guess, truth, ~masked).value) == pytest.approx((16 + 0.25) / 2)
    assert float(masked_mse(guess, truth, masked, counted=torch.tensor([True, False, True, True])).value) == 1.0


def test_visible_voxels_change_nothing_and_their_gradient_is_exactly_zero(voxels) -> None:
    guess, truth, masked, _ = voxels
    guess = guess.requires_grad_()
    loss = masked_mse(guess, truth, masked).value
    loss.backward()
    assert guess.grad is not None
    assert not guess.grad[~masked].any()
    assert (guess.grad[masked] != 0).all()
    other = torch.where(masked, guess, 77.0)
    assert torch.equal(masked_mse(other, torch.where(masked, truth, -5.0), masked).value, loss)


def test_twice_the_volume_with_nothing_more_hidden_costs_the_same(voxels) -> None:
    guess, truth, masked, _ = voxels
    wider = [torch.cat([one, one], 2) for one in (guess, truth)]
    hidden = torch.cat([masked, torch.zeros_like(masked)], 2)
    torch.testing.assert_close(masked_mse(*wider, hidden).value, masked_mse(guess, truth, masked).value)


def naive_smooth_l1(guess, truth, where, beta: float) -> float:
    errors = []
    for at in itertools.product(*map(range, SHAPE)):
        distance = abs(float(guess[at]) - float(truth[at]))
        if where[at]:
            errors.append(distance**2 / (2 * beta) if distance < beta else distance - beta / 2)
    return sum(errors) / len(errors)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_smooth_l1_equals_its_naive_twin(voxels, beta: float) -> None:
    guess, truth, _, counted = voxels
    everywhere = torch.ones(SHAPE, dtype=torch.bool)
    found = smooth_l1(guess, truth, beta=beta).value
    assert float(found) == pytest.approx(naive_smooth_l1(guess, truth, everywhere, beta))
    found = smooth_l1(guess, truth, beta=beta, counted=counted).value
    assert float(found) == pytest.approx(naive_smooth_l1(guess, truth, counted, beta))


def test_smooth_l1_is_a_parabola_within_beta_and_a_line_beyond() -> None:
    distances = {0.05: 0.0125, 0.1: 0.05, 0.3: 0.25, 1.0: 0.95}
    for distance, cost in distances.items():
        assert float(smooth_l1(torch.tensor([distance]), torch.zeros(1)).value) == pytest.approx(cost, rel=1e-5)


def test_a_guess_in_half_precision_is_compared_in_single() -> None:
    truth = torch.full((4,), 0.30078125 + 2**-9)
    guess = torch.full((4,), 0.30078125, dtype=torch.bfloat16)
    assert float(masked_mse(guess, truth, torch.ones(4, dtype=torch.bool)).value) == pytest.approx(2**-18)
    assert smooth_l1(guess, truth).value.dtype == torch.float32
