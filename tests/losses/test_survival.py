from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from torch import Tensor

from voxelstem.losses.survival import cox_loss, fates, hazard_curve, hazard_loss

people = st.lists(
    st.tuples(st.integers(0, 4), st.booleans(), st.floats(-3, 3)), min_size=1, max_size=12
)  # few times, so that many are equal


def of(rows: list[tuple[int, bool, float]]) -> tuple[Tensor, Tensor, Tensor]:
    times, events, risks = zip(*rows, strict=True)
    return torch.tensor(risks, dtype=torch.float64), torch.tensor(times, dtype=torch.float64), torch.tensor(events)


def drawn(count: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    times = rng.integers(1, 8, count).astype(float)
    return torch.tensor(rng.normal(size=count)), torch.tensor(times), torch.tensor(rng.random(count) < 0.7)


def naive_cox(risk: list[float], time: list[float], event: list[bool], ties: str) -> float:
    total = 0.0
    for moment in sorted(set(time)):
        tied = [i for i in range(len(time)) if time[i] == moment and event[i]]
        watched = sum(math.exp(risk[i]) for i in range(len(time)) if time[i] >= moment)
        own = sum(math.exp(risk[i]) for i in tied)
        for rank, i in enumerate(tied):
            taken = rank / len(tied) * own if ties == "efron" else 0.0
            total += math.log(watched - taken) - risk[i]
    return total / max(sum(event), 1)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@given(people)
@settings(deadline=None)
def test_the_partial_likelihood_is_that_of_loops(ties: str, rows: list[tuple[int, bool, float]]) -> None:
    found = cox_loss(*of(rows), ties=ties)  # pyright: ignore[reportArgumentType]
    times, events, risks = (list(column) for column in zip(*rows, strict=True))
    assert float(found) == pytest.approx(naive_cox(risks, times, events, ties), abs=1e-9)


def test_lifelines_finds_the_same_likelihood_and_no_slope_where_it_ends() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(60, 3))
    times = np.ceil(6 * rng.exponential(size=60) * np.exp(-rows[:, 0]))
    events = rng.random(60) < 0.7
    table = pd.DataFrame(rows).assign(time=times, event=events)
    fitted = CoxPHFitter().fit(table, "time", "event", fit_options={"precision": 1e-12})
    weight = torch.tensor(fitted.params_.to_numpy(), requires_grad=True)
    loss = cox_loss(torch.tensor(rows) @ weight, torch.tensor(times), torch.tensor(events))
    assert -float(loss.detach()) * events.sum() == pytest.approx(fitted.log_likelihood_, abs=1e-8)
    (slope,) = torch.autograd.grad(loss, weight)
    assert slope.abs().max() < 1e-6
    assert len(np.unique(times[events])) < events.sum()  # there were ties


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_the_slope_is_that_of_small_steps(ties: str) -> None:
    risk, time, event = drawn()
    assert torch.autograd.gradcheck(lambda r: cox_loss(r, time, event, ties=ties), risk.requires_grad_())  # pyright: ignore


def test_without_ties_both_ways_are_one() -> None:
    risk, time, event = drawn()
    time = time + torch.arange(30) / 100
    assert float(cox_loss(risk, time, event)) == pytest.approx(float(cox_loss(risk, time, event, ties="breslow")))


def test_neither_the_order_of_rows_nor_a_common_risk_matters() -> None:
    risk, time, event = drawn()
    wanted = float(cox_loss(risk, time, event))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert float(cox_loss(risk[order], time[order], event[order])) == pytest.approx(wanted)
    assert float(cox_loss(risk + 500, time * 7 + 1, event)) == pytest.approx(wanted)


def test_risks_a_thousand_apart_are_still_compared() -> None:
    """In time order, so that the late are next to nothing beside the early ones."""
    risk = torch.tensor([1000.0, 0.0, -1000.0, -1000.0], dtype=torch.float64, requires_grad=True)
    time, event = torch.tensor([1.0, 2.0, 3.0, 3.0]), torch.ones(4, dtype=torch.bool)
    loss = cox_loss(risk, time, event)
    assert float(loss.detach()) == pytest.approx(math.log(2) / 4)  # only the last two are as likely one as the other
    (slope,) = torch.autograd.grad(loss, risk)
    assert slope.isfinite().all()
    assert slope.tolist() == pytest.approx([0.0] * 4, abs=1e-12)


def test_without_an_event_there_is_neither_loss_nor_slope() -> None:
    risk = torch.randn(5, requires_grad=True)
    loss = cox_loss(risk, torch.rand(5), torch.zeros(5, dtype=torch.bool))
    (slope,) = torch.autograd.grad(loss, risk)
    assert float(loss.detach()) == 0.0
    assert slope.tolist() == [0.0] * 5


def test_half_precision_is_added_up_in_full() -> None:
    risk, time, event = drawn(200)
    found = cox_loss(risk.bfloat16(), time, event)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(cox_loss(risk, time, event)), abs=0.01)


EDGES = torch.tensor([0.0, 1.0, 3.0, 4.0])


def naive_hazard(logits: list[list[float]], time: list[float], event: list[bool]) -> float:
    total = 0.0
    for row, until, came in zip(logits, time, event, strict=True):
        for k, logit in enumerate(row):
            low, high = float(EDGES[k]), float(EDGES[k + 1])
            hazard = 1 / (1 + math.exp(-logit))
            if came and low <= until < high:
                total -= math.log(hazard)
            elif until >= (high if came else (low + high) / 2):
                total -= math.log(1 - hazard)
    return total / len(time)


@given(people)
@settings(deadline=None)
def test_the_likelihood_of_hazards_is_that_of_loops(rows: list[tuple[int, bool, float]]) -> None:
    risk, time, event = of(rows)
    logits = risk[:, None] + torch.tensor([-1.0, 0.5, 0.0], dtype=torch.float64)
    found = hazard_loss(logits, fates(time, event, EDGES))
    assert float(found) == pytest.approx(naive_hazard(logits.tolist(), time.tolist(), event.tolist()))


def test_who_left_after_the_middle_of_an_interval_has_passed_it() -> None:
    time = torch.tensor([0.4, 0.5, 1.9, 2.0, 3.0, 4.0, 9.0])
    known = fates(time, torch.zeros(7, dtype=torch.bool), EDGES)
    assert known.passed.sum(dim=1).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert not known.came.any()
    known = fates(time, torch.ones(7, dtype=torch.bool), EDGES)
    assert known.came.int().argmax(dim=1).tolist() == [0, 0, 1, 1, 2, 0, 0]
    assert known.came.any(dim=1).tolist() == [True] * 5 + [False] * 2
    assert known.passed.sum(dim=1).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_the_best_constant_hazards_are_events_over_those_at_risk() -> None:
    """And their curve is Kaplan and Meier's where nobody leaves within an interval."""
    time = torch.tensor([0.5] * 4 + [1.0] * 2 + [2.0] * 3 + [5.0] * 3)
    event = torch.tensor([True] * 4 + [False] * 2 + [True] * 3 + [False] * 3)
    logits = torch.logit(torch.tensor([4 / 12, 3 / 6, 1e-6], dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(hazard_loss(logits.expand(12, 3), fates(time, event, EDGES)), logits)
    assert slope.abs().max() < 1e-6
    assert hazard_curve(logits[None])[0].tolist() == pytest.approx([8 / 12, 8 / 12 * 3 / 6, 8 / 12 * 3 / 6], abs=1e-5)


def test_certain_hazards_stay_finite() -> None:
    logits = torch.tensor([[300.0, -300.0, 300.0]], requires_grad=True)
    loss = hazard_loss(logits, fates(torch.tensor([3.5]), torch.tensor([True]), EDGES))
    assert float(loss.detach()) == pytest.approx(300.0)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert hazard_curve(logits.detach()).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("edges", [[1.0], [0.0, 1.0, 1.0], [2.0, 1.0]])
def test_edges_that_make_no_intervals_are_refused(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="two or more edges"):
        fates(torch.ones(1), torch.ones(1, dtype=torch.bool), torch.tensor(edges))
