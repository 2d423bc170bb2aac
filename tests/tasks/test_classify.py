from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from voxelstem.metrics import averaged
from voxelstem.protocols import Example, Head
from voxelstem.tasks.classify import Classify, Guess, majority


@dataclass(frozen=True)
class Seen:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


def cloud(count: int, classes: tuple[str, ...], *, seed: int, gap: float = 3.0, dim: int = 12) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        kind = index % len(classes)
        scan = rng.normal(size=dim) + gap * np.eye(dim)[kind]
        examples.append(
            Example(
                subject=f"s{index}",
                key=f"k{index}",
                features=Seen(scan.astype(np.float32)),
                affine_ras=np.eye(4),
                label=classes[kind],
            )
        )
    return examples


@pytest.mark.parametrize("mode", Classify.modes)
def test_a_head_tells_separate_classes_apart(mode: str) -> None:
    task, classes = Classify(), ("no", "perhaps", "yes")
    head = task.fit(cloud(30, classes, seed=0), classes, mode=mode, seed=0)
    outcomes = [task.outcome(head, example) for example in cloud(60, classes, seed=1)]
    assert task.statistic("auroc")(outcomes) > 0.9
    assert task.statistic("balanced_accuracy")(outcomes) > 0.8


@pytest.mark.parametrize("mode", Classify.modes)
def test_labels_without_meaning_score_like_chance(mode: str) -> None:
    task, classes = Classify(), ("no", "yes")
    aurocs = []
    for seed in range(8):
        head = task.fit(cloud(20, classes, seed=seed, gap=0.0), classes, mode=mode, seed=0)
        outcomes = [task.outcome(head, example) for example in cloud(60, classes, seed=100 + seed, gap=0.0)]
        aurocs.append(task.statistic("auroc")(outcomes))
    assert 0.4 < np.mean(aurocs) < 0.6


@pytest.mark.parametrize("classes", [("no", "yes"), ("a", "b", "c")])
def test_the_probe_is_scikit_learns_pipeline(classes: tuple[str, ...]) -> None:
    train = cloud(9, classes, seed=0)
    head = Classify(strength=0.3, prior=0.0).fit(train, classes, mode="probe", seed=0)
    rows = np.stack([example.features.scan for example in train]).astype(float)
    truth = [classes.index(example.label or "") for example in train]
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, class_weight="balanced", max_iter=500))
    oracle.fit(rows, truth)
    probe = cloud(1, classes, seed=7)[0].features.scan
    np.testing.assert_allclose(Classify().predict(head, probe), oracle.predict_proba(probe[None])[0], atol=1e-4)


def test_knn_votes_as_the_slow_twin_does() -> None:
    classes = ("a", "b", "c")
    train = cloud(15, classes, seed=0, gap=1.0)
    task = Classify(neighbours=4, temperature=0.2)
    head = task.fit(train, classes, mode="knn", seed=0)
    query = cloud(1, classes, seed=5)[0].features.scan.astype(float)
    ranked = []
    for example in train:
        row = example.features.scan.astype(float)
        cosine = sum(x * y for x, y in zip(row, query, strict=True)) / math.sqrt((row**2).sum() * (query**2).sum())
        ranked.append((cosine, classes.index(example.label or "")))
    ranked.sort(reverse=True)
    votes = [sum(math.exp(c / 0.2) for c, kind in ranked[:4] if kind == label) for label in range(3)]
    np.testing.assert_allclose(task.predict(head, query), np.array(votes) / sum(votes), rtol=1e-9)


def test_one_label_of_each_class_is_enough() -> None:
    classes = ("no", "yes")
    for mode in Classify.modes:
        head = Classify().fit(cloud(2, classes, seed=0, gap=9.0), classes, mode=mode, seed=0)
        guesses = [Classify().outcome(head, example) for example in cloud(20, classes, seed=1, gap=9.0)]
        assert Classify().statistic("balanced_accuracy")(guesses) > 0.9


def test_the_strength_is_chosen_only_with_enough_subjects_of_every_class() -> None:
    classes = ("no", "yes")
    few = Classify().fit(cloud(8, classes, seed=0), classes, mode="probe", seed=0)
    assert few.facts["strength"] == Classify().strength
    noise = Classify().fit(cloud(60, classes, seed=0, gap=0.0), classes, mode="probe", seed=0)
    signal = Classify().fit(cloud(60, classes, seed=0, gap=6.0), classes, mode="probe", seed=0)
    assert noise.facts["strength"] < signal.facts["strength"]


def test_a_class_that_no_label_shows_is_never_predicted() -> None:
    classes = ("a", "b", "unseen")
    head = Classify().fit(cloud(10, ("a", "b"), seed=0), classes, mode="probe", seed=0)
    assert Classify().predict(head, np.zeros(12, np.float32))[2] == pytest.approx(0)


def test_a_constant_feature_does_no_harm() -> None:
    train = [
        Example(
            subject=e.subject,
            key=e.key,
            features=Seen(np.append(e.features.scan, np.float32(1e3 + 0.1))),
            affine_ras=np.eye(4),
            label=e.label,
        )
        for e in cloud(10, ("no", "yes"), seed=0)
    ]
    head = Classify(prior=0.0).fit(train, ("no", "yes"), mode="probe", seed=0)
    assert head.arrays["scale"][-1] == 1.0
    assert np.isfinite(head.arrays["weight"]).all()


def test_one_class_and_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="one class"):
        Classify().fit(cloud(4, ("yes",), seed=0), ("no", "yes"), mode="knn", seed=0)
    with pytest.raises(ValueError, match="no mode"):
        Classify().fit(cloud(4, ("no", "yes"), seed=0), ("no", "yes"), mode="full", seed=0)
    with pytest.raises(ValueError, match="positive"):
        Classify(strength=0.0)


def test_several_scans_of_a_subject_become_one_guess() -> None:
    combined = Classify().combine([Guess(truth=1, scores=(0.2, 0.8)), Guess(truth=1, scores=(0.6, 0.4))])
    assert combined.truth == 1
    assert combined.scores == pytest.approx((0.4, 0.6))


def test_the_majority_knows_the_shares_and_ranks_nothing() -> None:
    shares = majority(["yes", "no", "no", "no"], ("no", "yes"))
    assert shares == (0.75, 0.25)
    guesses = [Guess(truth=kind, scores=shares) for kind in (0, 1, 0, 1)]
    assert Classify().statistic("auroc")(guesses) == 0.5
    assert averaged(Classify().statistic("balanced_accuracy"))([(guess,) for guess in guesses]) == 0.5


def test_the_head_is_plain_arrays() -> None:
    head = Classify().fit(cloud(10, ("no", "yes"), seed=0), ("no", "yes"), mode="probe", seed=0)
    again = Head(mode=head.mode, classes=head.classes, arrays={k: v.copy() for k, v in head.arrays.items()})
    scan = cloud(1, ("no",), seed=3)[0].features.scan
    np.testing.assert_array_equal(Classify().predict(again, scan), Classify().predict(head, scan))
    weighed = head.arrays["weight"] @ ((scan - head.arrays["middle"]) / head.arrays["scale"]) + head.arrays["bias"]
    np.testing.assert_allclose(Classify().predict(head, scan), softmax(weighed))
