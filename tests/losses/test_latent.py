from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from voxelstem.losses.latent import contrast_repulsion, kl, row_cosines, subject_cosine


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 2, 1, 2, generator=generator), torch.randn(4, 3, 2, 1, 2, generator=generator)


def naive_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = (side.flatten().double().tolist() for side in (one, other))
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_kl_equals_its_naive_twin(pair) -> None:
    mean, logvar = pair
    terms = [
        0.5 * (math.exp(s) + m * m - 1 - s)
        for m, s in zip(mean.flatten().tolist(), logvar.flatten().tolist(), strict=True)
    ]
    assert float(kl(mean, logvar)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize(
    ("mean", "logvar", "cost"),
    [(0.0, 0.0, 0.0), (1.0, 0.0, 0.5), (0.0, math.log(4), 0.5 * (3 - math.log(4))), (2.0, math.log(0.25), 2.3181472)],
)
def test_kl_has_its_closed_form(mean: float, logvar: float, cost: float) -> None:
    assert float(kl(torch.full((2, 3), mean), torch.full((2, 3), logvar))) == pytest.approx(cost, abs=1e-6)


def test_kl_is_the_integral_that_it_stands_for() -> None:
    mean, sigma = 0.7, 1.6
    x = np.linspace(-15, 15, 200_001)
    own = np.exp(-((x - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    log_ratio = (x**2 - ((x - mean) / sigma) ** 2) / 2 - math.log(sigma)
    integral = float(np.trapezoid(own * log_ratio, x))
    assert float(kl(torch.tensor([mean]), torch.tensor([2 * math.log(sigma)]))) == pytest.approx(integral, abs=1e-5)


def test_the_subject_s_term_is_one_less_the_mean_cosine(pair) -> None:
    cosines = [naive_cosine(*rows) for rows in zip(*pair, strict=True)]
    assert row_cosines(*pair).tolist() == pytest.approx(cosines, abs=1e-6)
    assert float(subject_cosine(*pair)) == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    assert float(subject_cosine(pair[0], 3 * pair[0])) == pytest.approx(0.0, abs=1e-6)
    assert float(subject_cosine(pair[0], -pair[0])) == pytest.approx(2.0, abs=1e-6)


def test_repulsion_is_the_mean_cosine_of_pairs_that_are_no_copies(pair) -> None:
    cosines = [naive_cosine(*rows) for rows in zip(*pair, strict=True)]
    assert float(contrast_repulsion(*pair).value) == pytest.approx(np.mean(cosines), abs=1e-6)
    found = contrast_repulsion(*pair, skip=torch.tensor([True, False, False, True]))
    assert float(found.value) == pytest.approx(np.mean(cosines[1:3]), abs=1e-6)
    assert float(found.count) == 2


def test_a_copy_is_not_pushed_away_from_itself(pair) -> None:
    one, other = (side.clone().requires_grad_() for side in pair)
    contrast_repulsion(one, other, skip=torch.tensor([False, True, True, True])).value.backward()
    assert one.grad is not None
    assert one.grad[0].any()
    assert not one.grad[1:].any()


def test_a_batch_of_copies_has_no_repulsion(pair) -> None:
    found = contrast_repulsion(*pair, skip=torch.ones(4, dtype=torch.bool))
    assert float(found.count) == 0
    assert float(found.value) == 0


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    zeros = torch.zeros(2, 5, requires_grad=True)
    subject_cosine(zeros, torch.ones(2, 5)).backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()
