from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from tests.draws import counts_of

from voxelstem import metrics
from voxelstem.certainty.calibration import (
    CalibrationFigure,
    brier_score,
    calibration_error,
    check_probabilities,
    counted_adaptive_error,
    counted_in_the_large,
    counted_recalibration,
    log_odds,
    multiclass_brier_score,
    recalibration,
    reliability_curve,
    wilson_interval,
)

# Tenths, so that rows share a probability and lie on edges of bins.
forecasts = st.lists(st.tuples(st.booleans(), st.integers(0, 10)), min_size=1, max_size=30)


@dataclass(frozen=True)
class Guess:
    truth: int
    scores: tuple[float, ...]


def forecast(rows: int, *, scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truths, and probabilities whose log-odds are on a line: `scale` times the true ones plus `shift`."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-0.3, 1.5, rows)
    return rng.random(rows) < expit(odds), expit(scale * odds + shift)


def naive_adaptive_error(truth: list[bool], chance: list[float], bins: int) -> float:
    """Rows in order of their probability; those of one probability together go where their middle one stands."""
    inside: dict[int, list[tuple[bool, float]]] = {}
    for value in sorted(set(chance)):
        before = sum(other < value for other in chance)
        same = sum(other == value for other in chance)
        part = min(int(bins * (before + same / 2) / len(chance)), bins - 1)
        inside.setdefault(part, []).extend((t, c) for t, c in zip(truth, chance, strict=True) if c == value)
    return sum(abs(sum(t for t, _ in rows) - sum(c for _, c in rows)) for rows in inside.values()) / len(chance)


@given(forecasts, st.integers(1, 12))
def test_errors_agree_with_loops(rows: list[tuple[bool, int]], bins: int) -> None:
    truth, chance = [t for t, _ in rows], [c / 10 for _, c in rows]
    asked = np.array(truth), np.array(chance)
    assert calibration_error(*asked, bins=bins, binning="mass") == pytest.approx(
        naive_adaptive_error(truth, chance, bins), abs=1e-12
    )
    width = 0.0
    for part in range(bins):
        inside = [n for n, c in enumerate(chance) if min(int(c * bins), bins - 1) == part]
        width += abs(sum(truth[n] for n in inside) - sum(chance[n] for n in inside))
    assert calibration_error(*asked, bins=bins) == pytest.approx(width / len(rows), abs=1e-12)


@given(forecasts, st.randoms())
def test_the_order_of_rows_changes_no_error(rows: list[tuple[bool, int]], random) -> None:
    mixed = list(rows)
    random.shuffle(mixed)
    one, other = ((np.array([t for t, _ in r]), np.array([c / 10 for _, c in r])) for r in (rows, mixed))
    for binning in ("width", "mass"):
        assert calibration_error(*one, binning=binning) == pytest.approx(
            calibration_error(*other, binning=binning), abs=1e-12
        )


def test_bins_of_equal_mass_hold_as_many_rows_each() -> None:
    truth, chance = forecast(103)
    curve = reliability_curve(truth, chance, bins=10, binning="mass")
    assert {part.rows for part in curve} == {10, 11}
    assert sum(part.rows for part in curve) == 103
    assert all(a.high < b.low for a, b in pairwise(curve))


def test_a_perfect_forecast_has_little_error_and_a_bold_one_much() -> None:
    honest, bold = forecast(20_000), forecast(20_000, scale=3.0)
    for binning in ("width", "mass"):
        assert calibration_error(*honest, binning=binning) < 0.012
        assert calibration_error(*bold, binning=binning) > 0.1


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_the_curve_is_scikit_learns(binning: str) -> None:
    truth, chance = forecast(200)
    curve = reliability_curve(truth, chance, bins=8, binning=binning)
    share, mean = calibration_curve(truth, chance, n_bins=8, strategy={"width": "uniform", "mass": "quantile"}[binning])
    np.testing.assert_allclose([part.came_true.estimate for part in curve], share, atol=1e-12)
    np.testing.assert_allclose([part.mean_chance for part in curve], mean, atol=1e-12)


def test_the_curves_gaps_are_the_error() -> None:
    truth, chance = forecast(60)
    for binning in ("width", "mass"):
        curve = reliability_curve(truth, chance, bins=7, binning=binning)
        gaps = [part.rows * abs(part.came_true.estimate - part.mean_chance) for part in curve]
        assert sum(gaps) / 60 == pytest.approx(calibration_error(truth, chance, bins=7, binning=binning))


def test_empty_bins_are_left_out_and_edges_are_named() -> None:
    curve = reliability_curve(np.array([True, False, True]), np.array([0.05, 0.07, 1.0]), bins=10)
    assert [(part.low, part.high, part.rows) for part in curve] == [(0.0, 0.1, 2), (0.9, 1.0, 1)]


@given(st.integers(0, 40), st.integers(1, 40), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilsons_interval_is_scipys(hits: int, more: int, level: float) -> None:
    ours = wilson_interval(hits / (hits + more), hits + more, level=level)
    theirs = stats.binomtest(hits, hits + more).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.low is not None
    assert ours.high is not None
    assert 0 <= ours.low <= ours.estimate <= ours.high <= 1


def test_all_of_twelve_is_no_proof_of_all() -> None:
    interval = wilson_interval(1.0, 12)
    assert interval.low == pytest.approx(0.7575, abs=1e-4)
    assert interval.high == 1.0


@given(forecasts)
def test_brier_scores_are_scikit_learns(rows: list[tuple[bool, int]]) -> None:
    truth, chance = np.array([t for t, _ in rows]), np.array([c / 10 for _, c in rows])
    assert brier_score(truth, chance) == pytest.approx(brier_score_loss(truth, chance, pos_label=True))
    assert brier_score(truth, chance) == pytest.approx(sum((c / 10 - t) ** 2 for t, c in rows) / len(rows))
    both = np.stack([1 - chance, chance], axis=1)
    assert multiclass_brier_score(truth.astype(int), both) == pytest.approx(2 * brier_score(truth, chance))


def test_the_brier_score_of_classes_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth, probabilities = rng.integers(0, 4, 50), rng.dirichlet(np.ones(4), 50)
    loops = sum((probabilities[n, k] - (truth[n] == k)) ** 2 for n in range(50) for k in range(4)) / 50
    ours = multiclass_brier_score(truth, probabilities)
    assert ours == pytest.approx(loops)
    assert ours == pytest.approx(brier_score_loss(truth, probabilities, labels=[0, 1, 2, 3], scale_by_half=False))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (3.0, 1.0), (0.4, -2.0)])
def test_the_slope_is_scikit_learns(scale: float, shift: float) -> None:
    truth, chance = forecast(300, scale=scale, shift=shift)
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(log_odds(chance)[:, None], truth)
    ours = recalibration(truth, chance)
    assert ours.slope == pytest.approx(oracle.coef_[0, 0], abs=1e-5)
    assert ours.intercept == pytest.approx(oracle.intercept_[0], abs=1e-5)


def test_the_slope_undoes_what_was_done_to_the_log_odds() -> None:
    ours = recalibration(*forecast(40_000, scale=2.0, shift=0.5))
    assert ours.slope == pytest.approx(0.5, abs=0.02)
    assert ours.intercept == pytest.approx(-0.25, abs=0.04)
    perfect = recalibration(*forecast(40_000))
    assert (perfect.slope, perfect.intercept, perfect.in_the_large) == pytest.approx((1, 0, 0), abs=0.05)


@given(st.integers(0, 200), st.floats(0.2, 4), st.floats(-3, 3))
@settings(max_examples=40)
def test_in_the_large_makes_the_mean_probability_the_share_that_is_true(seed: int, scale: float, shift: float) -> None:
    truth, chance = forecast(40, scale=scale, shift=shift, seed=seed)
    if truth.all() or not truth.any():
        return
    ours = recalibration(truth, chance)
    assert expit(log_odds(chance) + ours.in_the_large).mean() == pytest.approx(truth.mean(), abs=1e-7)
    if not math.isnan(ours.slope):
        line = expit(ours.slope * log_odds(chance) + ours.intercept)
        assert line.mean() == pytest.approx(truth.mean(), abs=1e-6)
        assert ((line - truth) * log_odds(chance)).sum() == pytest.approx(0, abs=1e-4)


def test_what_a_threshold_parts_has_no_slope() -> None:
    truth = np.array([False, False, True, True])
    assert math.isnan(recalibration(truth, np.array([0.1, 0.2, 0.3, 0.4])).slope)
    assert math.isnan(recalibration(truth, np.array([0.4, 0.3, 0.2, 0.1])).slope)
    assert math.isnan(recalibration(truth, np.array([0.1, 0.2, 0.2, 0.4])).slope)  # they touch: still no finite maximum
    assert math.isnan(recalibration(truth, np.full(4, 0.3)).slope)
    assert recalibration(truth, np.full(4, 0.3)).in_the_large == pytest.approx(-math.log(0.3 / 0.7))
    assert math.isfinite(recalibration(truth, np.array([0.1, 0.3, 0.2, 0.4])).slope)
    one = recalibration(np.ones(4, dtype=bool), np.array([0.1, 0.2, 0.3, 0.4]))
    assert math.isnan(one.slope)
    assert math.isnan(one.in_the_large)


def test_certain_answers_keep_every_figure_finite() -> None:
    truth, chance = np.array([True, False, True, False, True]), np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    ours = recalibration(truth, chance)
    assert np.isfinite([ours.slope, ours.intercept, ours.in_the_large]).all()
    assert recalibration(np.array([True, False]), np.array([1.0, 1.0])).in_the_large == pytest.approx(
        -math.log(1e12), rel=1e-3
    )


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_all_draws_at_once_are_those_of_each_draw(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, chance = rng.random(15) < 0.5, np.round(rng.random(15), 1)
    picks = rng.integers(0, 15, (60, 15))
    counts = counts_of(picks, 15)
    each = [recalibration(truth[row], chance[row]) for row in picks]
    np.testing.assert_allclose(
        counted_recalibration(counts, truth, chance), [[r.intercept, r.slope] for r in each], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(counted_in_the_large(counts, truth, chance), [r.in_the_large for r in each], atol=1e-6)
    np.testing.assert_allclose(
        counted_adaptive_error(counts, truth, chance, bins=4),
        [calibration_error(truth[row], chance[row], bins=4, binning="mass") for row in picks],
        atol=1e-12,
    )
    assert np.isnan(counted_adaptive_error(np.ones((2, 0)), truth[:0], chance[:0], bins=4)).all()


KINDS = ("ece", "adaptive_ece", "brier", "slope", "in_the_large")


def guesses(classes: int, rows: int = 60) -> dict[str, Guess]:
    rng = np.random.default_rng(classes)
    probabilities = rng.dirichlet(np.ones(classes), rows)
    truth = [int(rng.choice(classes, p=row)) for row in probabilities]
    return {f"s{n}": Guess(t, tuple(row.tolist())) for n, (t, row) in enumerate(zip(truth, probabilities, strict=True))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 4])
def test_a_figure_gives_an_interval_over_subjects(kind: str, classes: int) -> None:
    figure = CalibrationFigure(kind=kind)
    by_subject = guesses(classes)
    fast = metrics.bootstrap_interval(by_subject, figure, draws=200)
    # Without `resampled`, the figure is asked for each draw.
    slow = metrics.bootstrap_interval(by_subject, figure.__call__, draws=200)
    assert (fast.estimate, fast.low, fast.high) == pytest.approx((slow.estimate, slow.low, slow.high), rel=1e-5)
    assert fast.low is not None
    assert fast.high is not None
    assert fast.low < fast.high
    twice = {name: (guess, guess) for name, guess in by_subject.items()}
    repeated = metrics.bootstrap_interval(twice, metrics.averaged(figure), draws=200)
    assert repeated.estimate == pytest.approx(fast.estimate)


def test_figures_are_those_of_the_functions() -> None:
    two, four = list(guesses(2).values()), list(guesses(4).values())
    truth, chance = np.array([g.truth == 1 for g in two]), np.array([g.scores[1] for g in two])
    line = recalibration(truth, chance)
    wanted = (calibration_error(truth, chance), calibration_error(truth, chance, binning="mass"))
    wanted = (*wanted, brier_score(truth, chance), line.slope, line.in_the_large)
    assert [CalibrationFigure(kind=kind)(two) for kind in KINDS] == pytest.approx(wanted)
    scores = np.array([g.scores for g in four])
    right, best = scores.argmax(axis=1) == np.array([g.truth for g in four]), scores.max(axis=1)
    assert CalibrationFigure(kind="ece", bins=5)(four) == pytest.approx(calibration_error(right, best, bins=5))
    assert CalibrationFigure(kind="brier")(four) == pytest.approx(
        multiclass_brier_score(np.array([g.truth for g in four]), scores)
    )
    assert math.isnan(CalibrationFigure(kind="ece")([]))


def test_calibration_is_compared_in_pairs() -> None:
    honest = guesses(2, 1500)
    bold = {
        name: Guess(guess.truth, (1 - bolder, bolder))
        for name, guess in honest.items()
        for bolder in expit(3 * log_odds(np.array(guess.scores[1:]))).tolist()
    }
    for kind, low in (("ece", 0.03), ("brier", 0.0)):
        gap = metrics.paired_difference(bold, honest, CalibrationFigure(kind=kind), draws=200)
        assert gap.low is not None
        assert gap.low > low
    flatter = metrics.paired_difference(bold, honest, CalibrationFigure(kind="slope"), draws=200)
    assert flatter.high is not None
    assert flatter.high < -0.4


BAD = np.array([0.2, math.nan, 0.4]), np.array([0.2, 1.2, 0.4]), np.array([-0.1, 0.2, 0.4])


@pytest.mark.parametrize("measure", [calibration_error, brier_score, recalibration, reliability_curve])
def test_what_is_no_probability_is_refused(measure) -> None:
    for chance in BAD:
        with pytest.raises(ValueError, match=r"1 of 3 rows do not; the first, row [01]"):
            measure(np.array([True, False, True]), chance)
    with pytest.raises(ValueError, match="got 3 and 2"):
        measure(np.array([True, False]), np.array([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="got 0 and 0"):
        measure(np.zeros(0, dtype=bool), np.zeros(0))


def test_rows_that_do_not_add_up_are_refused_and_told_why() -> None:
    with pytest.raises(ValueError, match=r"2 of 3 rows do not; the first, row 1, adds up to 1\.2000"):
        check_probabilities(np.array([[0.5, 0.5], [0.6, 0.6], [0.1, 0.1]]))
    with pytest.raises(ValueError, match="two classes"):
        check_probabilities(np.ones((3, 1)))
    with pytest.raises(ValueError, match="there must be a row"):
        check_probabilities(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        multiclass_brier_score(np.array([0, 2]), np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        multiclass_brier_score(np.array([0]), np.full((2, 2), 0.5))


def test_probabilities_in_16_bits_add_up_well_enough() -> None:
    rows = np.random.default_rng(0).dirichlet(np.ones(20), 200).astype(np.float16)
    np.testing.assert_allclose(check_probabilities(rows).sum(axis=1), 1, atol=1e-15)


def test_settings_without_sense_are_refused() -> None:
    truth, chance = np.array([True]), np.array([0.5])
    with pytest.raises(ValueError, match="a bin at least"):
        calibration_error(truth, chance, bins=0)
    with pytest.raises(ValueError, match="a bin at least"):
        reliability_curve(truth, chance, bins=0)
    with pytest.raises(ValueError, match="a bin at least"):
        CalibrationFigure(kind="ece", bins=0)
    for share, subjects, level in ((0.5, 0, 0.95), (1.5, 3, 0.95), (math.nan, 3, 0.95), (0.5, 3, 1.0)):
        with pytest.raises(ValueError, match="a share needs a subject"):
            wilson_interval(share, subjects, level=level)
