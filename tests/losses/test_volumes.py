from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from voxelstem.losses.volumes import known_class, volume_regression

NAN = math.nan


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """What was predicted, and what is known of three scans and four structures; nothing of the last scan."""
    predicted = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 2
    return predicted, torch.tensor([[0.5, NAN, -1.0, 2.0], [NAN, 0.0, 1.5, -0.5], [NAN] * 4])


def test_huber_equals_its_naive_twin_over_what_is_known(rows) -> None:
    costs = []
    for guess, truth in zip(rows[0].flatten().tolist(), rows[1].flatten().tolist(), strict=True):
        if not math.isnan(truth):
            distance = abs(guess - truth)
            costs.append(distance**2 / 2 if distance < 1 else distance - 0.5)
    found = volume_regression(*rows)
    assert float(found.value) == pytest.approx(np.mean(costs), rel=1e-5)
    assert float(found.count) == 6


def test_cosine_is_of_the_known_columns_of_each_known_row(rows) -> None:
    cosines = []
    for guess, truth in zip(rows[0].numpy(), rows[1].numpy(), strict=True):
        known = ~np.isnan(truth)
        if known.any():
            a, b = guess[known].astype(float), truth[known].astype(float)
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert float(volume_regression(*rows, form="cosine").value) == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    released = volume_regression(*rows, form="released")
    assert float(released.value) == pytest.approx(-np.mean(cosines), abs=1e-6)
    assert float(released.count) == 2


@pytest.mark.parametrize("form", ["huber", "cosine", "released"])
def test_what_nobody_knows_has_no_slope_and_the_rest_a_finite_one(rows, form) -> None:
    predicted = rows[0].clone().requires_grad_()
    volume_regression(predicted, rows[1], form=form).value.backward()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()
    assert not predicted.grad[rows[1].isnan()].any()
    assert predicted.grad[~rows[1].isnan()].all()


@pytest.mark.parametrize("form", ["huber", "cosine", "released"])
def test_a_column_that_nobody_knows_changes_nothing(rows, form) -> None:
    wider = [torch.cat([side, side.new_full((3, 1), value)], 1) for side, value in zip(rows, (9.0, NAN), strict=True)]
    torch.testing.assert_close(volume_regression(*wider, form=form).value, volume_regression(*rows, form=form).value)


@pytest.mark.parametrize("form", ["huber", "cosine", "released"])
def test_where_nothing_is_known_nothing_counts(form) -> None:
    found = volume_regression(torch.randn(2, 3), torch.full((2, 3), NAN), form=form)
    assert float(found.count) == 0


def test_un_centred_shares_of_the_head_hardly_tell_subjects_apart_and_standardised_ones_do() -> None:
    generator = torch.Generator().manual_seed(0)
    usual = torch.tensor([0.30, 0.25, 0.02, 0.005, 0.004])
    shares = usual * (1 + 0.08 * torch.randn(64, 5, generator=generator))
    standard = (shares - shares.mean(0)) / shares.std(0)
    apart = [float(volume_regression(table, table.roll(1, 0), form="cosine").value) for table in (shares, standard)]
    assert apart[0] < 0.02
    assert apart[1] > 0.7


def test_pathology_is_the_cross_entropy_of_those_of_whom_it_is_known() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.3, 0.9], [5.0, 5.0]])
    truth = torch.tensor([0.0, 1.0, NAN])
    costs = [math.log(math.exp(a) + math.exp(b)) - own for (a, b), own in (((2.0, -1.0), 2.0), ((0.3, 0.9), 0.9))]
    found = known_class(logits, truth)
    assert float(found.value) == pytest.approx(np.mean(costs), rel=1e-5)
    assert float(found.count) == 2
    assert float(known_class(torch.zeros(2, 2), torch.tensor([1.0, 0.0])).value) == pytest.approx(math.log(2))


def test_an_unknown_is_no_illness_and_has_no_slope() -> None:
    logits = torch.zeros(2, 2, requires_grad=True)
    known_class(logits, torch.tensor([NAN, 1.0])).value.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0], [0.5, -0.5]]
