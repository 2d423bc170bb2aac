from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.optimize import isotonic_regression
from sklearn.isotonic import IsotonicRegression

from voxelstem.certainty.vennabers import VennAbers, fit_venn_abers, held_frequency, steps_of


def rows_of(chance: np.ndarray) -> np.ndarray:
    return np.stack([1 - chance, chance], axis=1)


def drawn(count: int, seed: int, *, boast: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Stated probabilities of a yes that boast, and whether it was true."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(1.0, 1.0, count)
    truth = rng.random(count) < chance
    odds = (chance / (1 - chance)) ** boast
    return odds / (1 + odds), truth


def naive_twin(scores: np.ndarray, there: np.ndarray, new: float) -> tuple[float, float]:
    """Fit scikit-learn's isotonic regression anew with the new row, once for each answer that it may have."""
    ends: list[float] = []
    for answer in (0.0, 1.0):
        x, y = np.append(scores, new), np.append(there.astype(np.float64), answer)
        ends.append(float(IsotonicRegression(y_min=0, y_max=1).fit(x, y).predict([new])[0]))
    return ends[0], ends[1]


def slow_isotonic(scores: list[float], answers: list[float], at: float) -> float:
    """Largest over stretches that begin at or below, of the smallest mean over those that end at or above."""
    pairs = sorted(zip(scores, answers, strict=True))
    begins = {pair[0] for pair in pairs if pair[0] <= at}
    ends = {pair[0] for pair in pairs if pair[0] >= at}

    def mean(begin: float, end: float) -> float:
        inside = [answer for score, answer in pairs if begin <= score <= end]
        return sum(inside) / len(inside)

    return max(min(mean(begin, end) for end in ends) for begin in begins)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("digits", [1, 3])
def test_it_is_scikit_learns_isotonic_regression_fitted_anew_for_each_answer(seed: int, digits: int) -> None:
    stated, there = drawn(40, seed)
    stated = np.round(stated, digits)  # with ties
    found = fit_venn_abers(rows_of(stated), there.astype(np.int64))
    new = np.concatenate([stated[:10], np.linspace(0, 1, 23)])
    said = found.apply(rows_of(new))
    for place, score in enumerate(new.tolist()):
        low, high = naive_twin(stated, there, score)
        assert said.low[place, 1] == pytest.approx(low, abs=1e-9)
        assert said.high[place, 1] == pytest.approx(high, abs=1e-9)


def test_it_is_its_slow_twin_of_stretches() -> None:
    stated, there = drawn(15, 5)
    found = fit_venn_abers(rows_of(stated), there.astype(np.int64))
    for score in (0.0, 0.01, 0.3, float(stated[3]), 0.77, 1.0):
        said = found.apply(rows_of(np.array([score])))
        for answer, side in ((0.0, said.low), (1.0, said.high)):
            slow = slow_isotonic([*stated.tolist(), score], [*there.astype(float).tolist(), answer], score)
            assert side[0, 1] == pytest.approx(slow, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), min_size=10, max_size=40),
    st.integers(1, 60),
)
def test_ends_are_sorted_rise_with_the_score_and_leave_room_for_one_more(pairs: list, tail: int) -> None:
    shares = np.array([pair[0] for pair in pairs]) / 20
    rows = np.stack([shares, (1 - shares) * 0.7, (1 - shares) * 0.3], axis=1)
    found = fit_venn_abers(rows, np.array([pair[1] for pair in pairs]))
    grid = np.linspace(0, 1, tail + 1)
    said = found.apply(np.stack([grid, (1 - grid) / 2, (1 - grid) / 2], axis=1))
    assert (said.low <= said.high).all()
    assert (np.diff(said.low[:, 0]) >= 0).all()
    assert (np.diff(said.high[:, 0]) >= 0).all()
    # Of n rows, one more answer moves a mean by 1 / (n + 1) at least.
    assert (said.high - said.low >= 1 / (len(pairs) + 1) - 1e-9).all()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 25), st.booleans()), min_size=1, max_size=60))
def test_one_pass_says_what_an_isotonic_regression_for_each_score_and_answer_says(
    pairs: list[tuple[int, bool]],
) -> None:
    scores, there = np.array([pair[0] for pair in pairs]) / 25, np.array([pair[1] for pair in pairs])
    found = steps_of([(scores, there)])
    values, of = np.unique(scores, return_inverse=True)
    np.testing.assert_array_equal(found.scores, values)
    for at in range(len(values)):
        for answer, side in ((0, found.low), (1, found.high)):
            rows, hits = np.bincount(of).astype(np.float64), np.bincount(of, there)
            rows[at], hits[at] = rows[at] + 1, hits[at] + answer
            assert side[at] == pytest.approx(isotonic_regression(hits / rows, weights=rows).x[at], abs=1e-12)


def test_no_of_two_classes_is_yes_of_the_other() -> None:
    stated, there = drawn(60, 3)
    found = fit_venn_abers(rows_of(stated), there.astype(np.int64)).apply(rows_of(np.linspace(0.01, 0.99, 30)))
    np.testing.assert_allclose(found.low[:, 0], 1 - found.high[:, 1], atol=1e-9)
    np.testing.assert_allclose(found.high[:, 0], 1 - found.low[:, 1], atol=1e-9)


def test_the_end_that_belongs_to_the_truth_is_calibrated_whatever_the_scores_boast() -> None:
    """The promise itself, over many draws: of all rows with an end about p, a share of p is positive."""
    ends: list[np.ndarray] = []
    truths: list[np.ndarray] = []
    for seed in range(150):
        stated, there = drawn(41, seed, boast=6.0)
        found = fit_venn_abers(rows_of(stated[:-1]), there[:-1].astype(np.int64))
        new, true = drawn(200, seed + 1000, boast=6.0)
        said = found.apply(rows_of(new))
        ends.append(np.where(true, said.high[:, 1], said.low[:, 1]))
        truths.append(true)
    end, true = np.concatenate(ends), np.concatenate(truths)
    for low in np.arange(0.0, 1.0, 0.1):
        inside = (end >= low) & (end < low + 0.1 + 1e-9)
        # 40 known subjects in 150 draws: the standard error of a bin's share is about 0.02.
        assert true[inside].mean() == pytest.approx(end[inside].mean(), abs=0.05)


def test_with_more_subjects_the_interval_narrows_and_bins_hold_the_observed_frequency() -> None:
    widths: dict[int, float] = {}
    for count in (20, 100, 400):
        held: list[bool] = []
        own: list[float] = []
        for seed in range(10):
            stated, there = drawn(count, seed)
            new, true = drawn(300, seed + 100)
            said = fit_venn_abers(rows_of(stated), there.astype(np.int64)).apply(rows_of(new))
            told = held_frequency(said.low[:, 1], said.high[:, 1], true)
            assert len(told) == 5
            held += [one.held for one in told]
            own.append(float((said.high - said.low)[:, 1].mean()))
        # 50 bins: a share of 0.9 varies by 0.04.
        assert np.mean(held) > 0.78
        widths[count] = float(np.mean(own))
    assert widths[20] > 1.5 * widths[100] > 2.25 * widths[400]


def test_bins_of_intervals_agree_with_loops_and_find_intervals_that_lie() -> None:
    rng = np.random.default_rng(0)
    middle = np.round(rng.random(100), 2)
    low, high = np.maximum(middle - 0.1, 0), np.minimum(middle + 0.1, 1)
    true = rng.random(100) < middle
    told = held_frequency(low, high, true, bins=4)
    assert sum(one.rows for one in told) == 100
    order = np.argsort((low + high) / 2, kind="stable")
    start = 0
    for one in told:
        rows = order[start : start + one.rows]
        assert one.mean_low == pytest.approx(np.mean([low[row] for row in rows]))
        assert one.mean_high == pytest.approx(np.mean([high[row] for row in rows]))
        assert one.came_true.estimate == pytest.approx(np.mean([true[row] for row in rows]))
        start += one.rows
    liars = held_frequency(np.full(50, 0.9), np.full(50, 0.95), np.arange(50) % 2 == 0)
    assert [one.held for one in liars] == [False]
    assert len(held_frequency(low[:8], high[:8], true[:8])) == 1


def test_it_rests_on_disk(tmp_path: Path) -> None:
    stated, there = drawn(30, 0)
    found = fit_venn_abers(rows_of(stated), there.astype(np.int64))
    save_file({name: np.asarray(array) for name, array in found.arrays().items()}, tmp_path / "a.safetensors")
    again = VennAbers.of(load_file(tmp_path / "a.safetensors"))
    one, other = (some.apply(rows_of(np.linspace(0, 1, 50))) for some in (found, again))
    np.testing.assert_array_equal(one.low, other.low)
    np.testing.assert_array_equal(one.high, other.high)
    assert (again.subjects, again.steps) == (30, found.steps)


def test_a_damaged_one_is_refused() -> None:
    stated, there = drawn(30, 0)
    arrays = fit_venn_abers(rows_of(stated), there.astype(np.int64)).arrays()
    broken = {
        "steps": (np.array([3, 4]), "every class has steps"),
        "scores": (arrays["scores"][::-1], "rise from step to step"),
        "high": (arrays["low"] - 0.5, "sorted and lie"),
        "low": (arrays["low"][:-1], "every class has steps"),
    }
    for name, (value, message) in broken.items():
        with pytest.raises(ValueError, match=message):
            VennAbers.of(arrays | {name: value})
    with pytest.raises(ValueError, match="no subjects"):
        VennAbers.of({name: array for name, array in arrays.items() if name != "subjects"})


def test_what_is_no_probability_or_too_little_is_refused() -> None:
    stated, there = drawn(30, 0)
    truth = there.astype(np.int64)
    with pytest.raises(ValueError, match="need 10 held-out subjects, there are 9"):
        fit_venn_abers(rows_of(stated[:9]), truth[:9])
    with pytest.raises(ValueError, match="add up to 1"):
        fit_venn_abers(2 * rows_of(stated) / 3, truth)
    with pytest.raises(ValueError, match="label"):
        fit_venn_abers(rows_of(stated), truth + 5)
    found = fit_venn_abers(rows_of(stated), truth)
    with pytest.raises(ValueError, match="fitted to 2 classes, got 3"):
        found.apply(np.full((1, 3), 1 / 3))
    with pytest.raises(ValueError, match="no lower end above"):
        held_frequency(np.array([0.6]), np.array([0.5]), np.array([True]))
    with pytest.raises(ValueError, match="bin at least"):
        held_frequency(np.array([0.4]), np.array([0.5]), np.array([True]), bins=0)
