from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.errors import AuditError
from voxelstem.heads.risks import CERTAIN, Hazard, Seen, beran, constants, cox_of_sets, hazards_of, judged_by, minimised
from voxelstem.heads.survival import Watched, interval_edges, kaplan_meier
from voxelstem.losses.survival import cox_loss


def a_watch(count: int, seed: int, *, whole: bool = False) -> Watched:
    rng = np.random.default_rng(seed)
    time = rng.uniform(0.5, 20, count)
    event = rng.random(count) < 0.6
    event[0] = True
    return Watched(time=np.ceil(time) if whole else time, event=event)


def naive_beran(watched: Watched, weights: np.ndarray) -> list[float]:
    """Step after step, by loops over subjects."""
    found, left = [], 1.0
    for moment in sorted(set(watched.time.tolist())):
        came = at_risk = 0.0
        for time, event, weight in zip(watched.time, watched.event, weights, strict=True):
            at_risk += weight if time >= moment else 0.0
            came += weight if time == moment and event else 0.0
        left *= 1 - came / at_risk if at_risk > 0 else 1.0
        found.append(left)
    return found


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), seed=st.integers(0, 999), whole=st.booleans())
def test_beran_is_kaplan_and_meier_by_weight(count: int, seed: int, whole: bool) -> None:
    watched = a_watch(count, seed, whole=whole)
    weights = np.random.default_rng(seed).random(count) * (np.arange(count) % 3 < 2)
    assert beran(watched, weights).value == pytest.approx(naive_beran(watched, weights))
    plain = kaplan_meier(watched)
    even = beran(watched, np.full(count, 0.2))
    assert even.time.tolist() == plain.time.tolist()
    assert even.value == pytest.approx(plain.value, abs=1e-12)


def test_beyond_the_last_who_counts_the_curve_stays() -> None:
    watched = Watched(time=np.array([1.0, 2.0, 9.0]), event=np.array([True, False, True]))
    assert beran(watched, np.array([1.0, 1.0, 0.0])).value.tolist() == [0.5, 0.5, 0.5]


def naive_misfit(bias: np.ndarray, risk: np.ndarray, watched: Watched, edges: np.ndarray) -> float:
    total = 0.0
    for own, time, event in zip(risk, watched.time, watched.event, strict=True):
        for low, high, constant in zip(edges[:-1], edges[1:], bias, strict=True):
            hazard = 1 / (1 + math.exp(-(constant + own)))
            if event and low <= time < high:
                total -= math.log(hazard)
            elif time >= (high if event else (low + high) / 2):
                total -= math.log(1 - hazard)
    return total


def test_no_small_step_from_the_constants_is_better() -> None:
    watched = a_watch(40, 3)
    risk, edges = np.random.default_rng(4).normal(size=40), interval_edges(watched, 4)
    found = constants(watched, risk, edges)
    # The last interval may end in certainty: whoever reaches it has the event.
    inner = np.abs(found) < CERTAIN - 1
    assert inner.sum() >= 3
    best = naive_misfit(np.clip(found, -20, 20), risk, watched, edges)
    for at in np.flatnonzero(inner):
        for step in (-1e-3, 1e-3):
            moved = np.clip(found, -20, 20)
            moved[at] += step
            assert naive_misfit(moved, risk, watched, edges) > best


def test_constants_of_equal_risks_are_those_that_a_model_without_columns_finds() -> None:
    watched = a_watch(60, 5)
    model = Hazard.of(watched, 5, own=False)
    fitted = minimised(model, Seen.of(np.zeros((60, 1)), watched), 1.0)[:-1]
    found = constants(watched, np.zeros(60), interval_edges(watched, 5))
    # What ends in certainty is cut off elsewhere by either.
    free = np.abs(found) < 10
    assert free.sum() >= 4
    assert found[free] == pytest.approx(fitted[free], abs=1e-3)


def test_a_case_among_those_still_watched_is_cox_s_likelihood_of_its_event() -> None:
    said = torch.tensor([[0.3], [1.2], [-0.7]], requires_grad=True)
    known = torch.tensor([[2.0, 1.0], [5.0, 0.0], [9.0, 1.0]])
    loss = cox_of_sets(said, known)
    risks = [math.exp(value) for value in said[:, 0].tolist()]
    assert loss.item() == pytest.approx(-math.log(risks[0] / sum(risks)))
    first_alone = torch.tensor([True, False, False])
    assert loss.item() == pytest.approx(cox_loss(said[:, 0], known[:, 0], first_alone).item())
    loss.backward()
    assert said.grad is not None
    assert said.grad[0] < 0 < said.grad[1]


def test_hazards_are_likeliest_at_no_risk_where_all_are_alike() -> None:
    watched = a_watch(30, 6)
    loss = hazards_of(watched, 4)
    known = torch.tensor(np.stack([watched.time, watched.event], axis=1))
    still = float(loss(torch.zeros(30, 1), known))
    assert all(float(loss(torch.full((30, 1), shift), known)) > still for shift in (-0.1, 0.1))


def test_whoever_judges_looks_no_farther_than_enough_are_watched() -> None:
    watched = Watched(time=np.arange(1.0, 11.0), event=np.zeros(10, bool))
    assert judged_by(watched, least=0.45, moments=4)["moments"].tolist() == [0.0, 1.25, 2.5, 3.75, 5.0]
    with pytest.raises(AuditError, match="beyond time 0"):
        judged_by(Watched(time=np.zeros(3), event=np.zeros(3, bool)), least=0.2, moments=4)
