from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle
from tests.draws import counts_of

from voxelstem import metrics
from voxelstem.metrics import (
    Interval,
    MeanOf,
    auroc,
    averaged,
    balanced_accuracy,
    bootstrap_interval,
    effective_rank,
    mean,
    paired_difference,
)

labelled_scores = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30)


@given(labelled_scores)
def test_auroc_counts_pairs_with_ties_as_half(rows: list[tuple[bool, int]]) -> None:
    truth = np.array([row[0] for row in rows])
    score = np.array([float(row[1]) for row in rows])
    pairs = [(p > n) + 0.5 * (p == n) for p in score[truth] for n in score[~truth]]
    if pairs:
        assert auroc(truth, score) == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert math.isnan(auroc(truth, score))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_accuracies_agree_with_scikit_learn(rows: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(rows).T
    if len(set(truth.tolist())) > 1:
        labels = sorted(set(truth.tolist()))
        recall = oracle.recall_score(truth, predicted, labels=labels, average="macro", zero_division=0)
        assert balanced_accuracy(truth, predicted) == pytest.approx(recall)
    else:
        assert math.isnan(balanced_accuracy(truth, predicted))


def macro_auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    return float(metrics.counted_macro_auroc(np.ones((1, len(truth))), truth, scores)[0])


def test_macro_auroc_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    scores = rng.random((200, 4)) + np.eye(4)[truth] * 0.3
    scores /= scores.sum(axis=1, keepdims=True)
    assert macro_auroc(truth, scores) == pytest.approx(oracle.roc_auc_score(truth, scores, multi_class="ovr"))
    binary = truth % 2
    assert macro_auroc(binary, scores[:, :2]) == pytest.approx(
        oracle.roc_auc_score(binary, scores[:, 1] - scores[:, 0])
    )


def test_an_interval_agrees_with_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).normal(size=25)
    ours = bootstrap_interval({f"s{i}": float(v) for i, v in enumerate(values)}, draws=4000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.04)
    assert ours.high == pytest.approx(theirs.high, abs=0.04)


def test_subjects_are_resampled_and_not_rows() -> None:
    # Two kinds of subjects with 50 equal rows each: rows would pretend to 500 independent values.
    by_subject = {f"s{i}": [float(i % 2)] * 50 for i in range(10)}
    interval = bootstrap_interval(by_subject, lambda sample: float(np.mean([v for rows in sample for v in rows])))
    as_rows = bootstrap_interval({f"r{i}": float(i % 2) for i in range(500)})
    assert interval.high is not None
    assert interval.low is not None
    assert as_rows.high is not None
    assert as_rows.low is not None
    assert interval.high - interval.low > 4 * (as_rows.high - as_rows.low)


def test_two_subjects_give_no_interval_and_say_so() -> None:
    interval = bootstrap_interval({"a": 0.5, "b": 0.7})
    assert (interval.low, interval.high, interval.subjects) == (None, None, 2)
    assert str(interval) == "0.600 (n=2, no interval)"


def test_few_subjects_are_called_rough() -> None:
    assert "rough" in bootstrap_interval({"a": 0.5, "b": 0.7, "c": 0.6}).note
    assert bootstrap_interval({f"s{i}": float(i) for i in range(10)}).note == ""


def test_a_statistic_that_is_mostly_undefined_gives_no_interval() -> None:
    interval = bootstrap_interval({str(i): i for i in range(5)}, lambda rows: 1.0 if len(set(rows)) == 5 else math.nan)
    assert interval.estimate == 1.0
    assert interval.low is None
    assert "undefined" in interval.note


def test_pairing_removes_what_both_sides_share() -> None:
    rng = np.random.default_rng(3)
    shared = rng.normal(0, 10, 30)
    a = {f"s{i}": float(v + 1 + e) for i, (v, e) in enumerate(zip(shared, rng.normal(0, 0.1, 30), strict=True))}
    b = {f"s{i}": float(v) for i, v in enumerate(shared)}
    difference = paired_difference(a, b)
    assert difference.estimate == pytest.approx(1, abs=0.1)
    assert difference.low is not None
    assert difference.low > 0.8
    assert difference.high is not None
    assert difference.high < 1.2


def test_a_paired_difference_of_means_is_the_mean_difference_of_the_same_draws() -> None:
    rng = np.random.default_rng(4)
    a = {f"s{i}": float(v) for i, v in enumerate(rng.normal(size=12))}
    b = {f"s{i}": float(v) for i, v in enumerate(rng.normal(size=12))}
    direct = bootstrap_interval({name: a[name] - b[name] for name in a}, seed=5)
    paired = paired_difference(a, b, seed=5)
    assert (paired.estimate, paired.low, paired.high) == pytest.approx((direct.estimate, direct.low, direct.high))


def test_a_paired_difference_refuses_unequal_subjects() -> None:
    with pytest.raises(ValueError, match="same subjects"):
        paired_difference({"a": 1.0}, {"b": 1.0})


def test_the_same_seed_gives_the_same_interval() -> None:
    values = {f"s{i}": float(i) for i in range(7)}
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(dict(reversed(values.items())), seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_repeats_are_averaged_within_a_draw() -> None:
    repeats = {"a": (0.0, 1.0), "b": (1.0, 1.0), "c": (0.5, 0.0)}
    assert bootstrap_interval(repeats, averaged(mean)).estimate == pytest.approx((0.5 + 2 / 3) / 2)


@pytest.mark.parametrize("repeated", [False, True])
def test_means_resampled_at_once_equal_means_draw_by_draw(repeated: bool) -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(size=(9, 3))
    values[2] = math.nan
    values[5, 1] = math.nan
    held = {f"s{i}": row.tolist() if repeated else float(row[0]) for i, row in enumerate(values)}
    at_once = MeanOf(float)
    slow = lambda sample: mean(list(sample))  # noqa: E731 - the same statistic without its short cut
    pair = (averaged(at_once), averaged(slow)) if repeated else (at_once, slow)
    fast, naive = (bootstrap_interval(held, statistic, draws=300) for statistic in pair)
    assert (fast.estimate, fast.low, fast.high) == pytest.approx((naive.estimate, naive.low, naive.high))


def test_auroc_by_ranks_equals_auroc_by_pairs() -> None:
    rng = np.random.default_rng(8)
    truth, score = rng.random(300) < 0.4, rng.integers(0, 20, 300).astype(float)
    gaps = np.subtract.outer(score[truth], score[~truth])
    assert auroc(truth, score) == pytest.approx(((gaps > 0) + (gaps == 0) / 2).mean())


def test_the_mean_leaves_undefined_values_out() -> None:
    assert mean([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean([math.nan]))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    hits = 0
    for trial in range(200):
        sample = {f"s{i}": float(v) for i, v in enumerate(rng.normal(0, 1, 40))}
        interval = bootstrap_interval(sample, lambda rows: sum(rows) / len(rows), draws=200, seed=trial)
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize("bad", [{"level": 1.0}, {"draws": 50}])
def test_a_senseless_level_or_number_of_draws_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval({"a": 1.0}, **bad)  # pyright: ignore[reportArgumentType]


def test_an_interval_prints_estimate_and_bounds() -> None:
    assert str(Interval(estimate=0.71234, low=0.6, high=0.8, subjects=12)) == "0.712 [0.600, 0.800]"


def naive_rank(rows: np.ndarray) -> float:
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    shares = [value / sum(values) for value in values]
    return float(np.exp(-sum(share * np.log(share) for share in shares if share > 0)))


def test_effective_rank_is_the_entropy_of_the_singular_values():
    rows = np.random.default_rng(0).normal(size=(40, 7)) * [9, 5, 3, 1, 1, 0.1, 0.1]
    assert effective_rank(rows) == pytest.approx(naive_rank(rows), rel=1e-6)


def test_rows_on_a_line_have_rank_one():
    line = np.linspace(-1, 1, 20)[:, None] * np.array([[1.0, 2.0, -3.0]]) + 5
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-3)


def test_rows_that_fill_space_evenly_have_the_rank_of_the_space():
    assert effective_rank(np.concatenate([np.eye(6), -np.eye(6)])) == pytest.approx(6.0, rel=1e-6)


def test_equal_rows_have_no_direction_and_break_nothing():
    assert effective_rank(np.ones((5, 3))) == pytest.approx(1.0, abs=1e-3)


def pairs_won(there: np.ndarray, score: np.ndarray) -> float:
    won = [(a > b) + (a == b) / 2 for a in score[there] for b in score[~there]]
    return float(np.mean(won)) if won else math.nan


def mean_recall(kinds: np.ndarray, said: np.ndarray, every: set[int]) -> float:
    """NaN where a draw leaves a class out: the mean over the rest would be another figure."""
    if set(kinds.tolist()) != every or len(every) < 2:
        return math.nan
    return float(np.mean([np.mean(said[kinds == kind] == kind) for kind in every]))


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_all_draws_at_once_are_those_of_each_draw(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, bins = 12, 4
    truth, score = rng.random(rows) < 0.4, np.round(rng.random(rows), 1)
    kinds, said = rng.integers(0, 3, rows), rng.integers(0, 3, rows)
    picks = rng.integers(0, rows, (40, rows))
    counts = counts_of(picks, rows)

    def f1(there: np.ndarray, yes: np.ndarray) -> float:
        if not there.any():
            return math.nan
        hits = sum(bool(a and b) for a, b in zip(there, yes, strict=True))
        return hits / (hits + 0.5 * sum(bool(a != b) for a, b in zip(there, yes, strict=True)))

    def error(there: np.ndarray, chance: np.ndarray) -> float:
        total = 0.0
        for part in range(bins):
            inside = [n for n in range(len(chance)) if min(int(chance[n] * bins), bins - 1) == part]
            if inside:
                total += len(inside) * abs(float(np.mean(chance[inside])) - float(np.mean(there[inside])))
        return total / len(chance)

    for got, wanted in (
        (metrics.counted_auroc(counts, truth, score), [pairs_won(truth[p], score[p]) for p in picks]),
        (
            metrics.counted_balance(counts, kinds, said),
            [mean_recall(kinds[p], said[p], set(kinds.tolist())) for p in picks],
        ),
        (metrics.counted_f1(counts, truth, score > 0.5), [f1(truth[p], score[p] > 0.5) for p in picks]),
        (
            metrics.counted_calibration_error(counts, truth, score, bins=bins),
            [error(truth[p], score[p]) for p in picks],
        ),
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("statistic", [MeanOf(float), lambda sample: float(np.mean(sample))])
def test_any_statistic_of_a_draw_is_that_of_the_picked(statistic: metrics.Statistic[float]) -> None:
    values = np.random.default_rng(5).normal(size=9).tolist()
    picks = np.random.default_rng(6).integers(0, 9, (30, 9))
    wanted = [float(np.mean([values[at] for at in row])) for row in picks.tolist()]
    assert metrics.of_draws(statistic, values, counts_of(picks, 9)) == pytest.approx(wanted)


def test_draws_are_those_of_numpy_s_generator_counted() -> None:
    picks = np.random.default_rng([3, 5]).integers(0, 7, (200, 7))
    np.testing.assert_array_equal(metrics.drawn(7, draws=200, seed=[3, 5]), counts_of(picks, 7))


def test_a_constant_answer_has_one_balanced_accuracy_whatever_is_drawn() -> None:
    """Draws that leave a rare class out are left out: the mean over the others would be another figure."""
    truth = np.array([0, 1, 1, 1, 2, 2, 2, 2])
    statistic = lambda counts: metrics.counted_balance(counts, truth, np.zeros(8, dtype=int))  # noqa: E731
    found = statistic(metrics.drawn(8, draws=500, seed=0))
    assert np.isnan(found).mean() == pytest.approx((7 / 8) ** 8 + (5 / 8) ** 8 + (1 / 2) ** 8, abs=0.06)
    np.testing.assert_allclose(found[~np.isnan(found)], 1 / 3)


def test_equal_infinite_scores_are_ties_and_what_is_no_number_is_refused() -> None:
    truth, score = np.array([True, False, True, False]), np.array([np.inf, np.inf, -np.inf, -np.inf])
    assert auroc(truth, score) == auroc(truth[::-1], score[::-1]) == 0.5
    with pytest.raises(ValueError, match="must be numbers"):
        auroc(truth, np.array([0.1, math.nan, 0.2, 0.3]))
