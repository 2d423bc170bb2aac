from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from voxelstem.choosing.powerlaw import EXPONENTS, PowerLaws, fit_power_laws

SIZES = [2, 5, 10, 20, 50, 80]
ONES = np.ones(len(SIZES))


def law(asymptote: float, drop: float, exponent: float, sizes: list[int] = SIZES) -> np.ndarray:
    return np.array([asymptote - drop * size**-exponent for size in sizes])


def misfit(found: PowerLaws, scores: np.ndarray, weights: np.ndarray) -> float:
    said = np.array([found.at(size)[0] for size in SIZES])
    return float((weights * (said - scores) ** 2).sum())


@given(st.floats(0.3, 0.99), st.floats(0.05, 0.8), st.floats(0.06, 1.9))
def test_a_law_is_found_again(asymptote: float, drop: float, exponent: float) -> None:
    scores = law(asymptote, drop, exponent)
    found = fit_power_laws(SIZES, scores[None], ONES, ceiling=1.0)
    assert found.exponent[0] == pytest.approx(exponent, rel=0.003)
    assert [found.at(size)[0] for size in SIZES] == pytest.approx(scores, abs=1e-4)
    assert found.at(160)[0] == pytest.approx(law(asymptote, drop, exponent, [160])[0], abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 1.5), st.floats(0.0, 0.05), st.sampled_from([0.9, 1.3]))
def test_no_search_from_many_beginnings_finds_a_better_law(
    seed: int, exponent: float, noise: float, asymptote: float
) -> None:
    rng = np.random.default_rng(seed)
    scores = law(asymptote, 0.5, exponent) + rng.normal(0, noise, len(SIZES))
    weights = rng.uniform(0.2, 5, len(SIZES))
    ours = misfit(fit_power_laws(SIZES, scores[None], weights, ceiling=1.0), scores, weights)

    def gaps(at: np.ndarray) -> np.ndarray:
        return np.sqrt(weights) * (law(*at) - scores)

    bounds = ([-50.0, 0.0, EXPONENTS[0]], [1.0, 100.0, EXPONENTS[1]])
    theirs = min(
        2 * least_squares(gaps, [0.8, 0.4, start], bounds=bounds, xtol=1e-12, ftol=1e-12).cost
        for start in (0.06, 0.3, 0.7, 1.2, 1.9)
    )
    assert ours <= theirs * 1.001 + 1e-7


@given(st.lists(st.floats(0, 1), min_size=len(SIZES), max_size=len(SIZES)))
def test_bounds_hold_whatever_the_scores(scores: list[float]) -> None:
    found = fit_power_laws(SIZES, np.array([scores]), ONES, ceiling=0.8)
    assert found.asymptote[0] <= 0.8
    assert found.drop[0] >= 0
    assert math.isnan(found.exponent[0]) == (found.drop[0] == 0)
    assert math.isnan(found.exponent[0]) or EXPONENTS[0] <= found.exponent[0] <= EXPONENTS[1]
    assert found.at(500)[0] >= found.at(50)[0]


def test_a_curve_that_aims_beyond_what_can_be_bends_to_the_ceiling() -> None:
    found = fit_power_laws(SIZES, law(1.3, 0.9, 0.2)[None], ONES, ceiling=1.0)
    assert found.asymptote[0] == 1.0
    assert found.exponent[0] > 0.25
    assert [found.at(size)[0] for size in SIZES] == pytest.approx(law(1.3, 0.9, 0.2), abs=0.03)


def test_a_precise_size_draws_the_law_to_itself() -> None:
    scores = law(0.9, 0.5, 0.5)
    scores[3] += 0.05
    light, heavy = (
        abs(fit_power_laws(SIZES, scores[None], np.where(np.arange(6) == 3, weight, 1.0), ceiling=1.0).at(20)[0])
        for weight in (0.01, 100.0)
    )
    assert light == pytest.approx(scores[3] - 0.05, abs=0.002)
    assert heavy == pytest.approx(scores[3], abs=0.002)


@pytest.mark.parametrize("scores", [[0.7] * 6, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
def test_what_does_not_rise_has_no_drop_and_no_exponent(scores: list[float]) -> None:
    found = fit_power_laws(SIZES, np.array([scores]), ONES, ceiling=1.0)
    assert found.drop[0] == 0
    assert math.isnan(found.exponent[0])
    assert not found.at_bound[0]
    assert found.at(1000)[0] == found.asymptote[0] == pytest.approx(np.mean(scores))


@pytest.mark.parametrize(("exponent", "bound"), [(0.01, True), (0.5, False), (3.0, True)])
def test_an_exponent_at_its_bound_says_so(exponent: float, bound: bool) -> None:
    found = fit_power_laws(SIZES, law(0.9, 0.5, exponent)[None], ONES, ceiling=5.0)
    assert found.at_bound[0] == bound


def test_many_curves_are_fitted_as_each_alone_and_one_with_a_gap_is_left_out() -> None:
    rng = np.random.default_rng(0)
    scores = np.stack([law(0.9, 0.5, c) + rng.normal(0, 0.02, 6) for c in (0.2, 0.6, 1.1, 0.4)])
    scores[2, 4] = math.nan
    together = fit_power_laws(SIZES, scores, ONES, ceiling=1.0)
    for at, row in enumerate(scores):
        alone = fit_power_laws(SIZES, row[None], ONES, ceiling=1.0)
        for name in ("asymptote", "drop", "exponent"):
            assert getattr(together, name)[at] == pytest.approx(getattr(alone, name)[0], nan_ok=True)
    assert np.isnan([together.asymptote[2], together.drop[2], together.exponent[2], together.at(7)[2]]).all()


@pytest.mark.parametrize("sizes", [[2, 5], [2, 5, 5], [5, 2, 10], [0, 1, 2]])
def test_sizes_that_carry_no_law_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="three sizes that grow"):
        fit_power_laws(sizes, np.zeros((1, len(sizes))), np.ones(len(sizes)), ceiling=1.0)


@pytest.mark.parametrize("weights", [np.ones(5), np.zeros(6), np.full(6, np.nan)])
def test_weights_without_sense_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a positive weight"):
        fit_power_laws(SIZES, np.zeros((1, 6)), weights, ceiling=1.0)
