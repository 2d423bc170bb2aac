from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy import stats

from voxelstem.certainty.calibration import wilson_interval
from voxelstem.certainty.thresholds import Thresholds, conformal_quantile, coverage, fewest_for, fit_thresholds
from voxelstem.change import conformal_half_width

LEVELS = ("0.5", "0.6", "0.7", "0.75", "0.8", "0.9", "0.95", "0.99")


@given(st.lists(st.integers(-5, 5), max_size=60), st.sampled_from(LEVELS))
def test_the_quantile_is_the_rank_that_fractions_give(scores: list[int], level: str) -> None:
    rank = math.ceil((len(scores) + 1) * Fraction(level))
    wanted = sorted(scores)[rank - 1] if rank <= len(scores) else math.inf
    assert conformal_quantile(np.array(scores, dtype=float), level=float(level)) == wanted
    assert (fewest_for(float(level)) <= len(scores)) == math.isfinite(wanted)


@given(st.integers(1, 80), st.sampled_from(LEVELS))
def test_the_quantile_is_that_of_rates_of_change(count: int, level: str) -> None:
    errors = np.abs(np.random.default_rng(count).normal(size=count))
    half = conformal_half_width(errors, level=float(level))
    assert conformal_quantile(errors, level=float(level)) == (math.inf if half is None else half)


def test_a_level_needs_so_many_subjects() -> None:
    assert [fewest_for(level) for level in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]


@pytest.mark.parametrize(("count", "level"), [(19, 0.9), (50, 0.9), (40, 0.8)])
def test_a_new_score_lies_below_as_often_as_ranks_say(count: int, level: float) -> None:
    # Of n + 1 numbers drawn alike each rank is as likely as another: exactly ceil((n + 1) * level) / (n + 1).
    rng = np.random.default_rng(count)
    rounds = 4000
    below = [
        rng.standard_cauchy() <= conformal_quantile(rng.standard_cauchy(count), level=level) for _ in range(rounds)
    ]
    truth = math.ceil((count + 1) * level - 1e-9) / (count + 1)
    assert truth >= level
    assert np.mean(below) == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / rounds))


def test_each_group_has_the_quantile_of_its_own() -> None:
    rng = np.random.default_rng(0)
    scores, groups = rng.random(60), ["A"] * 30 + ["B"] * 21 + ["C"] * 9
    found = fit_thresholds(scores, level=0.95, groups=groups)
    assert found.groups == ("A", "B", "C")
    assert found.subjects == (30, 21, 9)
    assert found.values[0] == conformal_quantile(scores[:30], level=0.95)
    assert found.values[1] == conformal_quantile(scores[30:51], level=0.95)
    assert found.lacking == ("C",)
    np.testing.assert_array_equal(found.of_rows(3, ["B", "C", "new"]), [found.values[1], math.inf, math.inf])


def test_one_threshold_for_all_takes_no_groups() -> None:
    found = fit_thresholds(np.arange(19.0), level=0.95)
    assert (found.groups, found.values, found.subjects, found.lacking) == ((), (18.0,), (19,), ())
    np.testing.assert_array_equal(found.of_rows(2, ()), [18.0, 18.0])
    with pytest.raises(ValueError, match="take no groups of 2 rows, got 2"):
        found.of_rows(2, ["A", "B"])
    with pytest.raises(ValueError, match="take a group for each of 2 rows, got 0"):
        fit_thresholds(np.arange(19.0), level=0.95, groups=["A"] * 19).of_rows(2, ())


def test_thresholds_rest_on_disk(tmp_path: Path) -> None:
    names = ["Zürich \x00 \n, ward 3", "B", "C"]
    groups = [name for name, count in zip(names, (20, 10, 3), strict=True) for _ in range(count)]
    for found in (
        fit_thresholds(np.random.default_rng(0).random(33), level=0.9, groups=groups),
        fit_thresholds(np.random.default_rng(0).random(33), level=0.9),
    ):
        save_file(found.arrays(), tmp_path / "t.safetensors")
        assert Thresholds.of(load_file(tmp_path / "t.safetensors")) == found


def test_damaged_thresholds_are_refused() -> None:
    arrays = fit_thresholds(np.arange(20.0), level=0.9, groups=["A", "B"] * 10).arrays()
    with pytest.raises(ValueError, match="there is no level, thresholds"):
        Thresholds.of({name: arrays[name] for name in ("groups", "subjects")})
    with pytest.raises(ValueError, match="one threshold and one count"):
        Thresholds.of(arrays | {"thresholds": np.zeros(3)})
    with pytest.raises(ValueError, match="one threshold and one count"):
        Thresholds.of(arrays | {"thresholds": np.array([0.5, math.nan])})
    with pytest.raises(ValueError, match="level lies in"):
        Thresholds.of(arrays | {"level": np.array(1.0)})
    with pytest.raises(ValueError, match=r"Expecting|Extra|delimiter|utf-8"):
        Thresholds.of(arrays | {"groups": np.array([91, 255, 3], dtype=np.uint8)})


def test_too_few_calibration_subjects_are_refused_with_their_counts() -> None:
    with pytest.raises(ValueError, match=r"a level of 0\.9 needs 9 calibration subjects, there are 8"):
        fit_thresholds(np.arange(8.0), level=0.9)
    with pytest.raises(ValueError, match=r"needs 9 calibration subjects, the largest group has 8"):
        fit_thresholds(np.arange(13.0), level=0.9, groups=["A"] * 5 + ["B"] * 8)
    with pytest.raises(ValueError, match="there are 0"):
        fit_thresholds(np.zeros(0), level=0.9)
    with pytest.raises(ValueError, match="got 3 for 9 rows"):
        fit_thresholds(np.arange(9.0), level=0.9, groups=["A"] * 3)
    with pytest.raises(ValueError, match="1 of 9 scores are NaN"):
        fit_thresholds(np.where(np.arange(9) == 2, math.nan, 1.0), level=0.9)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="level lies in"):
            fit_thresholds(np.arange(9.0), level=level)
        with pytest.raises(ValueError, match="level lies in"):
            conformal_quantile(np.arange(9.0), level=level)


def test_coverage_counts_each_subject_once() -> None:
    covered = np.array([True, True, True, False, False])
    found = coverage(covered, ["a", "a", "a", "b", "b"])
    assert found.overall.estimate == 0.5
    assert found.overall.subjects == 2
    naive = coverage(covered, list("abcde"))
    assert naive.overall == wilson_interval(3 / 5, 5)
    assert naive.by_group == {}


def test_coverage_of_a_group_is_that_of_its_subjects() -> None:
    rng = np.random.default_rng(0)
    covered, of = rng.random(80) < 0.8, rng.integers(0, 30, 80)
    subjects, groups = [f"s{n}" for n in of], ["even" if n % 2 == 0 else "odd" for n in of]
    found = coverage(covered, subjects, groups=groups, level=0.9)
    assert list(found.by_group) == ["even", "odd"]
    for group, interval in found.by_group.items():
        each = [
            np.mean([covered[row] for row in range(80) if subjects[row] == name])
            for name in sorted({subjects[row] for row in range(80) if groups[row] == group})
        ]
        assert interval == wilson_interval(float(np.mean(each)), len(each), level=0.9)


def test_the_interval_of_a_mean_of_shares_is_wide_enough() -> None:
    # Subjects with many scans each, whose own shares differ: the interval over subjects holds the true mean.
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        each = rng.beta(4, 1, 25)
        rows = rng.random((25, 4)) < each[:, None]
        overall = coverage(rows.ravel(), np.repeat([f"s{n}" for n in range(25)], 4).tolist()).overall
        assert overall.low is not None
        assert overall.high is not None
        held += overall.low <= stats.beta(4, 1).mean() <= overall.high
    assert held >= 0.95 * 400


def test_coverage_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 0 for 0 rows"):
        coverage(np.zeros(0, dtype=bool), [])
    with pytest.raises(ValueError, match="got 1 and 0 for 2 rows"):
        coverage(np.ones(2, dtype=bool), ["a"])
    with pytest.raises(ValueError, match="got 2 and 1 for 2 rows"):
        coverage(np.ones(2, dtype=bool), ["a", "b"], groups=["A"])


def test_a_group_is_held_to_its_own_threshold_as_if_there_were_no_others() -> None:
    scores = np.concatenate([np.arange(20.0), 100 + np.arange(20.0)])
    found = fit_thresholds(scores, level=0.9, groups=["a"] * 20 + ["b"] * 20)
    for at, group in enumerate("ab"):
        alone = fit_thresholds(scores[20 * at : 20 * at + 20], level=0.9)
        assert found.of_group(group) == alone
    with pytest.raises(ValueError, match="no threshold of its own"):
        found.of_group("c")


def test_a_level_of_next_to_nothing_takes_the_smallest_score() -> None:
    assert conformal_quantile(np.array([3.0, 1.0, 2.0]), level=1e-12) == 1.0
