from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from voxelstem.embedding import Embedding
from voxelstem.heads.attending import AttendConfig, score
from voxelstem.metrics import averaged
from voxelstem.protocols import Example, Head
from voxelstem.tasks.classify import Classify, Guess, balanced_entropy, majority

QUICK = Classify(attention=AttendConfig(steps=60))


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
    task, classes = QUICK, ("no", "yes")
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
    shares = [vote / sum(votes) for vote in votes]
    np.testing.assert_allclose(task.predict(head, query), [(4 * share + 1 / 3) / 5 for share in shares], rtol=1e-9)
    # A run of 0.12.0 was calibrated on plain shares, and keeps them.
    np.testing.assert_allclose(task.predict(replace(head, facts={}), query), shares, rtol=1e-9)


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


def speckled(count: int, *, seed: int, blocks: int = 1) -> list[Example]:
    """Scans in which three patches out of many say what they are, and their mean nothing at all."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        kind = index % 2
        tokens = rng.normal(size=(40 * blocks, 8))
        at = rng.permutation(len(tokens))[:3]
        tokens[at, 0] += 5
        tokens[at, 1] += 2.5 * (2 * kind - 1)
        tokens -= tokens.mean(axis=0)
        rows = tokens.astype(np.float32)
        seen = Embedding(
            scan=rows.mean(axis=0),
            blocks=rows.reshape(blocks, 40, 8).mean(axis=1),
            grid=(1, 1, blocks),
            coverage=1.0,
            tokens=rows.reshape(2, 4, 5 * blocks, 8),
            tokens_affine_ras=np.eye(4),
        )
        examples.append(
            Example(
                subject=f"s{index}",
                key=f"k{index}",
                features=seen,
                affine_ras=np.eye(4),
                label=("no", "yes")[kind],
            )
        )
    return examples


def test_attention_finds_the_few_patches_that_decide_and_the_probe_cannot() -> None:
    train, held, found = speckled(40, seed=0), speckled(60, seed=1), {}
    for mode in ("probe", "attention"):
        head = Classify().fit(train, ("no", "yes"), mode=mode, seed=0)
        found[mode] = Classify().statistic("auroc")([Classify().outcome(head, one) for one in held])
    assert found["attention"] > 0.95
    assert found["probe"] < 0.7
    assert head.facts["bag"] == "tokens"
    said = score(head, held[0].features)
    assert said.shares.shape == (2, 4, 5)
    np.testing.assert_allclose(Classify().answer(head, held[0].features), softmax(said.logits))


def test_scans_of_several_blocks_are_attended_to_by_block() -> None:
    few = Classify(attention=AttendConfig(few_steps=2))
    head = few.fit(speckled(6, seed=0, blocks=2), ("no", "yes"), mode="attention", seed=0)
    assert head.facts["bag"] == "blocks"
    assert few.answer(head, speckled(1, seed=3, blocks=2)[0].features).sum() == pytest.approx(1)


def test_patches_are_asked_for_only_where_they_are_looked_at() -> None:
    assert Classify().looks_at_tokens("attention")
    assert not any(Classify().looks_at_tokens(mode) for mode in ("probe", "knn", "full"))
    assert not Classify(attention=AttendConfig(bag="blocks")).looks_at_tokens("attention")


def test_attention_never_predicts_a_class_that_no_label_shows() -> None:
    few = Classify(attention=AttendConfig(few_steps=5))
    train = cloud(10, ("a", "b"), seed=0)
    head = few.fit(train, ("unseen", "a", "b"), mode="attention", seed=0)
    assert few.answer(head, train[0].features)[0] == 0


def test_attention_rests_as_plain_arrays_and_equal_seeds_give_equal_heads() -> None:
    few = Classify(attention=AttendConfig(few_steps=5))
    train = speckled(6, seed=0)
    heads = [few.fit(train, ("no", "yes"), mode="attention", seed=seed) for seed in (1, 1, 2)]
    for name, array in heads[0].arrays.items():
        np.testing.assert_array_equal(array, heads[1].arrays[name])
    assert (heads[0].arrays["look"] != heads[2].arrays["look"]).any()
    again = Head(
        mode="attention",
        classes=heads[0].classes,
        arrays={name: array.copy() for name, array in heads[0].arrays.items()},
        facts=dict(heads[0].facts),
    )
    np.testing.assert_array_equal(few.answer(again, train[0].features), few.answer(heads[0], train[0].features))


def test_attention_is_not_asked_of_one_vector() -> None:
    few = Classify(attention=AttendConfig(few_steps=1))
    head = few.fit(speckled(4, seed=0), ("no", "yes"), mode="attention", seed=0)
    with pytest.raises(ValueError, match="not at the scan's one vector"):
        few.predict(head, np.zeros(8, np.float32))
    with pytest.raises(ValueError, match="the scan has none"):
        few.answer(head, Seen(np.zeros(8, np.float32)))


def test_every_class_weighs_alike_in_the_entropy_of_attention() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0, 0, 0, 2, 2, 0])
    logits, rows = rng.normal(size=(4, 4)), np.array([5, 3, 0, 1])
    total = mass = 0.0
    for row, place in zip(logits, rows, strict=True):
        weight = 1 / (truth == truth[place]).sum()
        total -= weight * (row[truth[place]] - math.log(sum(math.exp(value) for value in row)))
        mass += weight
    found = balanced_entropy(truth)(torch.from_numpy(logits).float(), rows)
    assert float(found) == pytest.approx(total / mass, rel=1e-5)
