from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from voxelstem.losses.longitudinal import SHORTEST_YEARS, annualised, known_huber, latent_dynamics

NAN = math.nan


def naive_known_huber(predicted: Tensor, target: Tensor, weight: Tensor | None, delta: float) -> float:
    total, trust = 0.0, 0.0
    for index in range(target.numel()):
        truth = float(target.flatten()[index])
        if math.isnan(truth):
            continue
        gap = abs(float(predicted.flatten()[index]) - truth)
        much = 1.0 if weight is None else float(weight.expand_as(target).flatten()[index])
        total += much * (0.5 * gap**2 if gap < delta else delta * (gap - delta / 2))
        trust += much
    return total / trust if trust else 0.0


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predicted, target = 2 * torch.randn(2, 5, 4, generator=generator)
    return predicted, torch.where(torch.rand(5, 4, generator=generator) < 0.3, NAN, target)


@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_huber_of_the_known_equals_its_naive_twin(delta: float, weighted: bool) -> None:
    predicted, target = draw()
    weight = torch.rand(5, 1, generator=torch.Generator().manual_seed(1)) if weighted else None
    expected = naive_known_huber(predicted, target, weight, delta)
    assert float(known_huber(predicted, target, weight, delta=delta).value) == pytest.approx(expected, rel=1e-5)


def test_what_nobody_knows_gives_no_gradient_and_nothing_known_costs_nothing() -> None:
    predicted, target = draw()
    predicted = predicted.requires_grad_()
    known_huber(predicted, target).value.backward()
    assert predicted.grad is not None
    assert (predicted.grad[target.isnan()] == 0).all()
    assert (predicted.grad[target.isfinite()] != 0).all()
    nothing = known_huber(predicted.detach(), torch.full_like(target, NAN))
    assert (float(nothing.value), float(nothing.count)) == (0.0, 0.0)


def test_a_wild_prediction_where_nobody_knows_harms_nothing() -> None:
    predicted, target = draw()
    wild = torch.where(target.isnan(), torch.inf, predicted)
    assert torch.equal(known_huber(wild, target).value, known_huber(predicted, target).value)


def test_an_untrusted_scan_counts_for_nothing() -> None:
    predicted, target = draw()
    weight = torch.tensor([1.0, 1, 0, 1, 1])[:, None]
    changed = predicted.clone()
    changed[2] += 100
    assert torch.equal(known_huber(changed, target, weight).value, known_huber(predicted, target, weight).value)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 10), st.sampled_from([-1.0, 1.0]), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_change_a_year_is_what_it_was_made_with(years: float, sign: float, rates: list[float]) -> None:
    first, rate = torch.tensor([[0.1, -2.0, 1.0]]), torch.tensor([rates])
    span = torch.tensor([[sign * years]])
    torch.testing.assert_close(annualised(first, first + rate * span, span), rate, atol=1e-4, rtol=1e-4)


def test_too_short_a_time_and_missing_volumes_have_no_rate() -> None:
    first = torch.tensor([[1.0, NAN], [1.0, 2.0], [1.0, 2.0]])
    second = torch.tensor([[2.0, 3.0], [2.0, 3.0], [2.0, NAN]])
    years = torch.tensor([[2.0], [SHORTEST_YEARS / 2], [NAN]])
    rate = annualised(first, second, years)
    assert rate[0].tolist() == pytest.approx([0.5, NAN], nan_ok=True)
    assert rate[1:].isnan().all()


def test_no_gradient_runs_into_the_state_that_came() -> None:
    foreseen, came = torch.randn(2, 3, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    foreseen, came = foreseen.requires_grad_(), came.requires_grad_()
    latent_dynamics(foreseen, came, torch.ones(3, 1)).value.backward()
    assert came.grad is None
    assert foreseen.grad is not None
    assert foreseen.grad.abs().sum() > 0


def test_a_row_that_is_left_out_of_the_dynamics_counts_for_nothing() -> None:
    foreseen, came = torch.randn(2, 3, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    known = torch.tensor([[1.0], [0.0], [1.0]])
    kept = known_huber(foreseen[[0, 2]], came[[0, 2]])
    torch.testing.assert_close(latent_dynamics(foreseen, came, known).value, kept.value)


def test_the_wrong_order_costs_more_than_not_to_know_and_the_right_one_nothing() -> None:
    years = torch.tensor([[2.0], [-1.0], [NAN]])
    right, unsure, wrong = (
        float(known_huber(said, years).value) for said in (years.nan_to_num(7.0), torch.zeros(3, 1), -years)
    )
    assert wrong > unsure > right == 0
