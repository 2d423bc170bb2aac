from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import average_precision_score

from voxelstem.certainty.assurance import Assurance
from voxelstem.findings import Weights
from voxelstem.protocols import Example, Head
from voxelstem.tasks.retrieve import Retrieve, Retrieved, average_precision, by_chance, whitening

CLASSES = ("benign", "malign")
WEIGHTS = Weights(sha256="a" * 64, name="lesion", licence="mit")


@dataclass(frozen=True)
class Row:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


def example(row: np.ndarray, kind: int | None, at: int, subject: str = "") -> Example:
    label = None if kind is None else CLASSES[kind]
    return Example(
        subject=subject or f"s{at:024x}", key=f"{at:064x}", features=Row(row), affine_ras=np.eye(4), label=label
    )


def planted(count: int, seed: int, *, noise: float = 1.0, dim: int = 12) -> list[Example]:
    """The class lies in one column; another one is far louder and says nothing of it."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.arange(count) % 2)
    rows = noise * rng.normal(size=(count, dim))
    rows[:, 0] += 2.0 * kinds
    rows[:, 1] *= 20.0
    return [example(row, int(kind), 1000 * seed + at) for at, (row, kind) in enumerate(zip(rows, kinds, strict=True))]


def naive_outcome(task: Retrieve, labelled: list[Example], asked: Example) -> tuple[float, float]:
    """Precision at k and average precision of plain cosines, by loops."""
    told: list[tuple[float, bool]] = []
    for one in labelled:
        if one.subject != asked.subject:
            lengths = [math.sqrt(sum(x * x for x in each.features.scan)) for each in (one, asked)]
            product = sum(a * b for a, b in zip(one.features.scan, asked.features.scan, strict=True))
            told.append((product / lengths[0] / lengths[1], one.label == asked.label))
    ranked = [right for _, right in sorted(told, key=lambda pair: -pair[0])]
    hits, parts = 0, []
    for place, right in enumerate(ranked, start=1):
        hits += right
        if right:
            parts.append(hits / place)
    return sum(ranked[: task.k]) / len(ranked[: task.k]), sum(parts) / len(parts)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_figures_of_plain_cosines_are_those_of_loops(k: int) -> None:
    task, labelled = Retrieve(k=k), planted(15, 0, noise=0.5)
    head = task.fit(labelled, CLASSES, mode="knn", seed=0)
    asked = [*planted(6, 1), example(labelled[2].features.scan * 1.1, 1, 99, subject=labelled[2].subject)]
    for one in asked:
        found = task.outcome(head, one)
        wanted = naive_outcome(task, labelled, one)
        assert (found.precision, found.average_precision) == pytest.approx(wanted)


def test_a_case_of_the_scan_s_own_subject_is_never_found() -> None:
    rows = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    labelled = [example(row, at // 2, at, subject=("one", "two", "three", "four")[at]) for at, row in enumerate(rows)]
    task = Retrieve(k=1)
    head = task.fit(labelled, CLASSES, mode="knn", seed=0)
    assert task.outcome(head, labelled[0]).shares == (1.0, 0.0)
    own = example(rows[0], 1, 9, subject="three")
    assert task.outcome(head, own).average_precision == pytest.approx(1 / 3)  # only the fourth is of its class now


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_average_precision_is_scikit_learns(right: list[bool]) -> None:
    found = average_precision(np.array(right))
    if not any(right):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(average_precision_score(right, -np.arange(len(right))))


@pytest.mark.parametrize("kinds", [[0, 0, 1, 1, 1, 0], [1, 0, 0], [0, 0, 0], [1]])
def test_chance_is_the_mean_over_all_orders(kinds: list[int]) -> None:
    for truth in set(kinds):
        orders = [np.array(order) == truth for order in itertools.permutations(kinds)]
        found = by_chance(truth, np.array(kinds), 2)
        assert found.average_precision == pytest.approx(np.mean([average_precision(order) for order in orders]))
        assert found.precision == pytest.approx(np.mean([order[:1].mean() for order in orders]))


def test_of_a_class_that_no_case_has_chance_is_none_and_precision_nothing() -> None:
    found = by_chance(1, np.array([0, 0]), 2)
    assert (found.precision, math.isnan(found.average_precision)) == (0.0, True)


def test_the_learned_metric_finds_what_a_loud_column_hides_from_plain_cosines() -> None:
    labelled, asked, task = planted(60, 0), planted(60, 1), Retrieve()
    found = {}
    for mode in task.modes:
        head = task.fit(labelled, CLASSES, mode=mode, seed=0)
        outcomes = [task.outcome(head, one) for one in asked]
        found[mode] = [task.statistic(metric)(outcomes) for metric in task.metrics]
    chance = by_chance(0, np.arange(60) % 2, 2)
    assert found["probe"][0] > 0.6 > chance.precision
    assert found["probe"][1] > chance.average_precision + 0.05
    assert found["probe"][0] > found["knn"][0] + 0.05


def test_the_metric_is_the_inverse_root_of_the_shrunk_covariance_within_classes() -> None:
    rng = np.random.default_rng(3)
    rows, truth = rng.normal(size=(9, 14)) * np.linspace(0.5, 3, 14), np.arange(9) % 3
    metric = whitening(rows, truth)
    about = np.stack([row - rows[truth == kind].mean(axis=0) for row, kind in zip(rows, truth, strict=True)])
    covariance, _ = ledoit_wolf(about, assume_centered=True)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    stretched = metric["turn"].T @ np.diag(metric["stretch"] - metric["plain"]) @ metric["turn"]
    assert stretched + metric["plain"] * np.eye(14) == pytest.approx(root, rel=1e-6, abs=1e-9)


def test_one_scan_of_each_class_gives_plain_cosines_about_their_middle() -> None:
    labelled = [example(np.array([3.0, 1.0]), 0, 0), example(np.array([1.0, 1.0]), 1, 1)]
    task = Retrieve(k=1)
    head = task.fit(labelled, CLASSES, mode="probe", seed=0)
    assert [one.label for one in task.alike(head, np.array([2.5, 1.0]))] == ["benign"]
    assert task.alike(head, np.array([2.5, 1.0]))[0].cosine == pytest.approx(1.0)


@pytest.mark.parametrize("mode", Retrieve.modes)
def test_the_same_labels_give_the_same_head_and_it_rests_as_plain_arrays(mode: str) -> None:
    task, labelled = Retrieve(), planted(12, 0)
    one, other = (task.fit(labelled, CLASSES, mode=mode, seed=seed) for seed in (0, 7))
    assert all(np.array_equal(array, other.arrays[name]) for name, array in one.arrays.items())
    assert all(array.dtype != object for array in one.arrays.values())


def test_findings_name_the_nearest_cases_by_key_and_what_most_of_them_are() -> None:
    task, labelled = Retrieve(k=3), planted(20, 0)
    head = task.fit(labelled, CLASSES, mode="knn", seed=0)
    asked = labelled[4].features
    most, *cases = task.findings(head, asked, WEIGHTS, Assurance())
    near = task.alike(head, asked.scan)
    assert near[0].key == labelled[4].key[:16]
    assert [one.cosine for one in near] == sorted((one.cosine for one in near), reverse=True)
    labels = [one.label for one in near]
    assert most.kind == "class"
    assert most.answer == max(CLASSES, key=labels.count)
    assert most.certainty is not None
    assert most.certainty.probability == pytest.approx(labels.count(most.answer) / 3)
    assert [one.name for one in cases] == [f"like case {one.key}: {one.label}" for one in near]
    assert [one.quantity.value for one in cases if one.quantity] == [one.cosine for one in near]


def test_a_long_label_is_cut_off_in_the_name_of_a_case() -> None:
    classes = ("a" * 60, "b")
    labelled = [
        Example(subject=f"s{at}", key=f"{at:064x}", features=Row(row), affine_ras=np.eye(4), label=classes[at])
        for at, row in enumerate(np.eye(2))
    ]
    head = Retrieve().fit(labelled, classes, mode="knn", seed=0)
    named = Retrieve(k=2).findings(head, Row(np.array([0.5, 1.0])), WEIGHTS, Assurance())
    assert max(len(one.name) for one in named) == 64


def test_a_subject_s_scans_ask_one_by_one_and_are_averaged() -> None:
    one = Retrieved(truth=1, shares=(0.2, 0.8), average_precision=0.5)
    other = Retrieved(truth=1, shares=(0.6, 0.4), average_precision=0.7)
    joined = Retrieve().combine([one, other])
    assert joined.shares == pytest.approx((0.4, 0.6))
    assert (joined.precision, joined.average_precision) == pytest.approx((0.6, 0.6))


def test_what_cannot_be_learned_from_is_refused() -> None:
    labelled = planted(6, 0)
    with pytest.raises(ValueError, match="no mode 'tree'"):
        Retrieve().fit(labelled, CLASSES, mode="tree", seed=0)
    with pytest.raises(ValueError, match="all of one class"):
        Retrieve().fit([one for one in labelled if one.label == "benign"], CLASSES, mode="knn", seed=0)
    with pytest.raises(ValueError, match="one label each"):
        Retrieve().fit([*labelled, example(np.ones(12), None, 9)], CLASSES, mode="knn", seed=0)
    with pytest.raises(ValueError, match="k must be at least 1"):
        Retrieve(k=0)
    alone = [example(row, at, at, subject="one") for at, row in enumerate(np.eye(2))]
    head: Head = Retrieve().fit(alone, CLASSES, mode="knn", seed=0)
    with pytest.raises(ValueError, match="cannot be the nearest"):
        Retrieve().outcome(head, alone[0])
