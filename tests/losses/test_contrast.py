from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from voxelstem.losses.contrast import between_groups, nt_xent, same_subject, standardised, vicreg


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(5, 4, generator=generator)
    return one, one + 0.5 * torch.randn(5, 4, generator=generator)


def naive_nt_xent(
    one: np.ndarray, other: np.ndarray, temperature: float, subjects: tuple[float, ...] = (0, 1, 2, 3, 4)
) -> float:
    """Chen et al. 2020, equation 1, one view after another; views of one's own subject are no others."""
    views = [row / np.linalg.norm(row) for row in np.concatenate([one, other]).astype(float)]
    count, costs = len(one), []
    for i, view in enumerate(views):
        partner = (i + count) % len(views)
        asked = [k for k in range(2 * count) if k == partner or subjects[k % count] != subjects[i % count]]
        others = [math.exp(float(view @ views[k]) / temperature) for k in asked]
        own = math.exp(float(view @ views[partner]) / temperature)
        costs.append(-math.log(own / sum(others)))
    return sum(costs) / len(costs)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_equals_its_naive_twin(pair, temperature: float) -> None:
    expected = naive_nt_xent(*(side.numpy() for side in pair), temperature)
    assert float(nt_xent(*pair, temperature=temperature)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("subjects", [(0, 1, 2, 3, 4), (0, 1, 0, 1, 1), (3, 3, 3, 3, 3)])
def test_other_samples_of_the_same_subject_are_no_negatives(pair, subjects: tuple[int, ...]) -> None:
    expected = naive_nt_xent(*(side.numpy() for side in pair), 0.5, subjects)
    same = same_subject(torch.tensor(subjects).float()[:, None])
    assert float(nt_xent(*pair, same=same, temperature=0.5)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_what_all_views_share_is_taken_off_before_they_are_compared(pair) -> None:
    rows = np.concatenate([side.numpy() for side in pair]).astype(float)
    deviation = rows.std(axis=0)
    expected = (rows - rows.mean(axis=0)) / (deviation + 1e-3 * deviation.mean())
    np.testing.assert_allclose(torch.cat(standardised(*pair)).numpy(), expected, rtol=1e-4, atol=1e-5)
    # Far from 0 all views point one way, and none can be told from another.
    far = tuple(1e3 + side for side in pair)
    assert float(nt_xent(*far)) == pytest.approx(math.log(9), rel=1e-3)
    assert float(nt_xent(*standardised(*far))) == pytest.approx(float(nt_xent(*standardised(*pair))), rel=1e-2)


def test_a_column_that_does_not_vary_says_nothing_and_breaks_nothing() -> None:
    one, other = (torch.zeros(3, 2, requires_grad=True) for _ in range(2))
    sides = standardised(one, other)
    assert not torch.cat(sides).any()
    torch.cat(sides).square().sum().backward()
    assert one.grad is not None
    assert torch.isfinite(one.grad).all()


def test_what_lies_between_groups_equals_its_naive_twin() -> None:
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    group = torch.tensor([0.0, 2, 2, math.nan, 0, 5, 5, 5, math.nan])
    shares = []
    for column in values.numpy().T:
        known = [(float(g), value) for g, value in zip(group, column, strict=True) if not math.isnan(g)]
        middle = np.mean([value for _, value in known])
        total = sum((value - middle) ** 2 for _, value in known)
        between = 0.0
        for name in (0.0, 2.0, 5.0):
            own = [value for g, value in known if g == name]
            between += len(own) * (np.mean(own) - middle) ** 2
        shares.append(between / total)
    assert float(between_groups(values, group)) == pytest.approx(np.mean(shares), rel=1e-5)


def test_groups_that_are_points_take_all_and_groups_with_one_mean_nothing() -> None:
    group = torch.tensor([0.0, 0, 1, 1])
    assert float(between_groups(torch.tensor([[1.0], [1], [3], [3]]), group)) == pytest.approx(1.0)
    assert float(between_groups(torch.tensor([[1.0], [3], [3], [1]]), group)) == pytest.approx(0.0)


@pytest.mark.parametrize("group", [[math.nan] * 3, [1.0, 1.0, math.nan]])
def test_one_group_alone_has_nothing_to_lie_between(group: list[float]) -> None:
    values = torch.randn(3, 2, requires_grad=True)
    found = between_groups(values, torch.tensor(group))
    found.backward()
    assert found == 0
    assert values.grad is not None
    assert not values.grad.any()


def test_nobody_knows_whose_scan_it_is_and_so_it_is_like_no_other(pair) -> None:
    same = same_subject(torch.full((5, 1), math.nan))
    assert float(nt_xent(*pair, same=same)) == float(nt_xent(*pair))


def test_nt_xent_has_its_closed_forms() -> None:
    # Where all views are one, each of the 2n - 1 others is as near as the partner.
    assert float(nt_xent(torch.ones(4, 3), torch.ones(4, 3))) == pytest.approx(math.log(7), rel=1e-5)
    # Pairs at cosine 1, others at 0: log(1 + (2n - 2) exp(-1 / t)).
    expected = math.log(1 + 6 * math.exp(-2))
    assert float(nt_xent(torch.eye(4), torch.eye(4), temperature=0.5)) == pytest.approx(expected, rel=1e-5)


def test_nt_xent_asks_nothing_of_lengths_or_of_the_order_of_pairs(pair) -> None:
    one, other = pair
    wanted = nt_xent(one, other)
    torch.testing.assert_close(nt_xent(3 * one, 0.2 * other), wanted)
    torch.testing.assert_close(nt_xent(one.flip(0), other.flip(0)), wanted)
    torch.testing.assert_close(nt_xent(other, one), wanted)


def test_a_lower_precision_around_it_changes_nothing(pair) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nt_xent(*pair), vicreg(*pair).covariance
    torch.testing.assert_close(found, (nt_xent(*pair), vicreg(*pair).covariance), rtol=0, atol=0)


def naive_vicreg(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    rows, columns = one.shape
    invariance = sum((a - b) ** 2 for a, b in zip(one.ravel(), other.ravel(), strict=True)) / one.size
    variance = covariance = 0.0
    for side in (one, other):
        means = [sum(side[:, c]) / rows for c in range(columns)]
        for c in range(columns):
            for d in range(columns):
                shared = sum((row[c] - means[c]) * (row[d] - means[d]) for row in side) / (rows - 1)
                if c == d:
                    variance += max(0.0, 1 - math.sqrt(shared + 1e-4)) / columns / 2
                else:
                    covariance += shared**2 / columns
    return invariance, variance, covariance


def test_vicreg_equals_its_naive_twin(pair) -> None:
    found = vicreg(*(0.8 * side for side in pair))
    wanted = naive_vicreg(*(0.8 * side.double().numpy() for side in pair))
    assert [float(found.invariance), float(found.variance), float(found.covariance)] == pytest.approx(wanted, rel=1e-4)
    assert found.variance > 0


def test_vicreg_has_its_closed_forms() -> None:
    same = vicreg(torch.ones(3, 2), torch.ones(3, 2))
    assert [float(same.invariance), float(same.covariance)] == [0.0, 0.0]
    assert float(same.variance) == pytest.approx(1 - 0.01)
    # Two columns that are one: all their variance, 4, is shared.
    twice = torch.tensor([[2.0, 2.0], [-2.0, -2.0], [0.0, 0.0]])
    found = vicreg(twice, twice)
    assert float(found.variance) == 0.0
    assert float(found.covariance) == pytest.approx(2 * 4**2)


def test_one_row_has_no_variance() -> None:
    with pytest.raises(ValueError, match="two rows or more, got 1"):
        vicreg(torch.ones(1, 2), torch.ones(1, 2))
