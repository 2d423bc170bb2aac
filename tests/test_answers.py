from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from tests.draws import counts_of

from voxelstem.answers import Answer, Figure, best_threshold, shares, truth_of
from voxelstem.metrics import averaged
from voxelstem.protocols import Example

CLASSES = ("cyst", "stone", "gas")


def answers(count: int, *, seed: int = 0, unknown: float = 0.3) -> list[Answer]:
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random((count, 3)) < unknown, math.nan, (rng.random((count, 3)) < 0.4).astype(float))
    scores = expit(rng.normal(size=(count, 3)) + np.nan_to_num(truth))
    return [
        Answer(classes=CLASSES, truth=tuple(t), scores=tuple(s), thresholds=(0.5, 0.6, 0.4))
        for t, s in zip(truth.tolist(), scores.tolist(), strict=True)
    ]


@pytest.mark.parametrize("kind", ["auroc", "balanced_accuracy", "f1"])
def test_figures_are_those_of_scikit_learn_over_whom_is_known(kind: str) -> None:
    sample = answers(60)
    each = []
    for at, name in enumerate(CLASSES):
        known = [one for one in sample if name in one]
        assert 0 < len(known) < 60
        there = [one.truth[at] > 0 for one in known]
        scores = [one.scores[at] for one in known]
        said = [score >= known[0].thresholds[at] for score in scores]
        oracle = {
            "auroc": lambda there=there, scores=scores: roc_auc_score(there, scores),
            "balanced_accuracy": lambda there=there, said=said: balanced_accuracy_score(there, said),
            "f1": lambda there=there, said=said: f1_score(there, said),
        }[kind]()
        assert Figure(kind=kind, only=name)(sample) == pytest.approx(oracle, abs=1e-12)
        each.append(oracle)
    assert Figure(kind=kind)(sample) == pytest.approx(np.mean(each), abs=1e-12)


def test_a_class_of_one_kind_only_is_not_defined_and_does_not_count() -> None:
    sample = [one for one in answers(40) if one.truth[1] != 1]
    assert math.isnan(Figure(kind="auroc", only="stone")(sample))
    others = [Figure(kind="auroc", only=name)(sample) for name in ("cyst", "gas")]
    assert Figure(kind="auroc")(sample) == pytest.approx(np.mean(others))
    assert math.isnan(Figure(kind="auroc")([one for one in sample if set(one.truth) <= {0.0}]))


@given(st.integers(0, 99))
def test_a_draw_is_the_figure_of_the_picked(seed: int) -> None:
    sample, picks = answers(12, seed=seed), np.random.default_rng(seed).integers(0, 12, (3, 12))
    for kind in ("auroc", "balanced_accuracy", "ece"):
        quick = Figure(kind=kind).of_draws(sample, counts_of(picks, 12))
        whole = [name for name in sample[0].classes if not math.isnan(Figure(kind=kind, only=name)(sample))]
        each = [[Figure(kind=kind, only=name)([sample[pick] for pick in row]) for name in whole] for row in picks]
        slow = [np.mean(values) for values in each]  # NaN where a draw leaves a class out
        np.testing.assert_allclose(quick, slow, atol=1e-12)
    pairs = list(zip(sample, sample[::-1], strict=True))
    both = np.nanmean([Figure(kind="auroc")(sample), Figure(kind="auroc")(sample[::-1])])
    assert averaged(Figure(kind="auroc"))(pairs) == pytest.approx(both, nan_ok=True)


def test_the_truth_of_a_scan_is_there_not_there_or_not_known() -> None:
    plain = {"subject": "a", "key": "a", "features": None, "affine_ras": np.eye(4)}
    one = Example(**plain, findings={"cyst": True, "gas": False})  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(truth_of(CLASSES, one), (1.0, math.nan, 0.0))
    assert truth_of(CLASSES, Example(**plain, label="gas")) == (0.0, 0.0, 1.0)  # pyright: ignore[reportArgumentType]


def test_the_best_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    there = rng.random(40) < 0.3
    scores = np.round(expit(rng.normal(size=40) + there), 2)

    def figure(limit: float) -> float:
        said = scores >= limit
        return float((said[there].mean() + (~said[~there]).mean()) / 2)

    assert figure(best_threshold(scores, there)) == max(figure(limit) for limit in np.linspace(0, 1, 1001))
    assert best_threshold(np.array([0.1, 0.2, 0.7, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.45)


def test_shares_are_of_those_who_are_known() -> None:
    assert shares([{"a": True}, {"a": False, "b": True}, {"a": False}], ["a", "b", "c"]) == (1 / 3, 1.0, 0.5)
