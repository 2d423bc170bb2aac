from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from voxelstem.heads.scales import laid, measured_columns, ruler, standard
from voxelstem.protocols import Example
from voxelstem.study import Survival
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.regress import Regress
from voxelstem.tasks.retrieve import Retrieve
from voxelstem.tasks.survive import Survive


@dataclass(frozen=True)
class Plain:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


@dataclass(frozen=True)
class InUnits(Plain):
    measured: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


def naive(rows: np.ndarray, measured: list[bool], prior: float) -> list[list[float]]:
    """Rows as a head sees them, number by number."""
    count, dim = rows.shape
    means = [sum(float(row[at]) for row in rows) / count for at in range(dim)]
    variances = [sum((float(row[at]) - means[at]) ** 2 for row in rows) / count for at in range(dim)]
    network = [variances[at] for at in range(dim) if not measured[at]]
    seen = [[0.0] * dim for _ in rows]
    vary = []
    for at in range(dim):
        spread = variances[at]
        if not measured[at]:
            average = sum(network) / len(network)
            spread = average if math.isinf(prior) else (count * spread + prior * average) / (count + prior)
        if spread < 1e-12 * max(abs(float(row[at])) for row in rows) ** 2:
            continue
        vary.append(at)
        for own, row in zip(seen, rows, strict=True):
            own[at] = (float(row[at]) - means[at]) / math.sqrt(spread)
    for kind in (True, False):
        part = [at for at in vary if measured[at] == kind]
        if 0 < len(part) < len(vary):
            for own in seen:
                for at in part:
                    own[at] /= math.sqrt(2 * len(part) / len(vary))
    return seen


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    measured=st.lists(st.booleans(), min_size=1, max_size=6),
    prior=st.sampled_from([0.0, 10.0, math.inf]),
    still=st.booleans(),
)
def test_columns_are_seen_as_the_slow_twin_sees_them(
    seed: int, measured: list[bool], prior: float, still: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(7, len(measured))) * 10 ** rng.uniform(-3, 9, len(measured)) + 5
    if still and measured[0]:
        rows[:, 0] = 123.4
    found = standard(rows, np.array(measured), prior=prior)
    np.testing.assert_allclose((rows - found.middle) / found.scale, naive(rows, measured, prior), atol=1e-9)


def test_both_kinds_weigh_alike_however_many_columns_they_have_and_whatever_their_units() -> None:
    rng = np.random.default_rng(0)
    rows = np.hstack([rng.normal(size=(20, 300)), rng.normal(size=(20, 4)) * [1e9, 1e-3, 1.0, 50.0]])
    measured = np.arange(304) >= 300
    for prior in (0.0, 10.0, math.inf):
        found = standard(rows, measured, prior=prior)
        squares = np.square((rows - found.middle) / found.scale).mean(axis=0)
        assert squares[measured].sum() == pytest.approx(152)
        assert squares[~measured].sum() == pytest.approx(152, rel=0.05)


def test_a_measured_column_that_does_not_vary_is_zero_in_every_scan() -> None:
    rows = np.array([[1.0, 7.0], [2.0, 7.0], [4.0, 7.0]])
    how = ruler(rows, np.array([True, True]))
    assert laid(how, np.array([3.0, -1e9]))[1] == 0.0
    assert np.array_equal(laid(how, rows)[:, 1], np.zeros(3))


def test_a_networks_vectors_are_compared_as_they_are_and_so_are_those_of_heads_without_a_ruler() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4))
    assert ruler(rows, np.zeros(4, bool)) == {}
    assert np.array_equal(laid({}, rows), rows)


def test_scans_that_do_not_agree_on_what_is_measured_are_refused() -> None:
    one = InUnits(np.zeros(2), measured=np.array([True, False]))
    assert measured_columns([Plain(np.zeros(3))]).tolist() == [False] * 3
    assert measured_columns([one, one]).tolist() == [True, False]
    for wrong in ([], [one, Plain(np.zeros(2))], [Plain(np.zeros(2)), Plain(np.zeros(3))]):
        with pytest.raises(ValueError, match="must agree"):
            measured_columns(wrong)


# ------------------------------------------------------------------------- what the heads of the tasks make of it

LOUD = np.array([3.5e9, 1.8e7, 4e5])
"""Spreads of what says nothing: energies, volumes of other organs."""
TOLD = {
    "classify": (Classify(), "auroc"),
    "each": (Classify(), "auroc"),
    "regress": (Regress(), "r"),
    "survive": (Survive(folds=2, fewest=2), "harrell_c"),
    "retrieve": (Retrieve(), "precision_at_k"),
}


def patients(count: int, seed: int, what: str, *, network: int = 0) -> list[Example]:
    """What is asked follows from the volume of a lesion, the smallest of four numbers, alone."""
    rng = np.random.default_rng(seed)
    volume = rng.permutation(np.linspace(2e3, 2e4, count))
    large = volume > 1.1e4
    quiet = 10 * rng.normal(size=(count, network)) + 30
    others = LOUD * (5 + rng.normal(size=(count, len(LOUD))))
    found = []
    for at, (row, size) in enumerate(zip(np.column_stack([quiet, others, volume]), volume, strict=True)):
        told: dict[str, Any] = {
            "classify": {"label": ("no", "yes")[int(large[at])]},
            "retrieve": {"label": ("no", "yes")[int(large[at])]},
            "each": {"findings": {"large": bool(large[at]), "small": not large[at]}},
            "regress": {"value": float(size)},
            "survive": {"survival": Survival(time=float(3e4 - size), event=at % 4 > 0)},
        }[what]
        features = InUnits(row, measured=np.arange(len(row)) >= network)
        found.append(Example(subject=f"s{at}", key=f"{at:064d}", features=features, affine_ras=np.eye(4), **told))
    return found


def figure(what: str, mode: str, labelled: list[Example], tested: list[Example]) -> float:
    task, metric = TOLD[what]
    classes = {"classify": ("no", "yes"), "retrieve": ("no", "yes"), "each": ("large", "small")}.get(what, ())
    head = task.fit(labelled, classes, mode=mode, seed=0)
    return float(task.statistic(metric)([task.combine([task.outcome(head, one)]) for one in tested]))


def unsaid(examples: list[Example]) -> list[Example]:
    """The same scans, of which nobody says what is measured."""
    return [replace(example, features=Plain(example.features.scan)) for example in examples]


@pytest.mark.parametrize("mode", ["probe", "knn"])
@pytest.mark.parametrize("what", TOLD)
def test_the_volume_of_a_lesion_that_decides_is_found_among_larger_numbers(what: str, mode: str) -> None:
    labelled, tested = patients(60, 1, what), patients(40, 2, what)
    least = {"retrieve": 0.75, "regress": 0.6}.get(what, 0.8) if mode == "knn" else 0.8
    assert figure(what, mode, labelled, tested) > least


@pytest.mark.parametrize("what", ["classify", "each", "retrieve"])
def test_without_units_of_their_own_the_largest_numbers_hide_it(what: str) -> None:
    labelled, tested = patients(60, 1, what), patients(40, 2, what)
    assert figure(what, "knn", unsaid(labelled), unsaid(tested)) < 0.65 < figure(what, "knn", labelled, tested)


@pytest.mark.parametrize("mode", ["probe", "knn"])
@pytest.mark.parametrize("what", TOLD)
def test_beside_a_network_that_knows_nothing_it_is_heard_as_is_a_network_that_knows_beside_it(
    what: str, mode: str
) -> None:
    labelled, tested = patients(60, 1, what, network=200), patients(40, 2, what, network=200)
    alone = figure(what, mode, patients(60, 1, what), patients(40, 2, what))
    chance = 0.0 if what == "regress" else 0.5
    beside = figure(what, mode, labelled, tested)
    assert beside - chance > 0.5 * (alone - chance)
    swapped = [
        [
            replace(
                example,
                features=InUnits(
                    np.append(np.repeat(example.features.scan[-1:] / 1e4, 200), example.features.scan[200:203]),
                    measured=np.arange(203) >= 200,
                ),
            )
            for example in some
        ]
        for some in (labelled, tested)
    ]
    assert figure(what, mode, swapped[0], swapped[1]) - chance > 0.5 * (alone - chance)


@pytest.mark.parametrize("mode", ["probe", "knn"])
@pytest.mark.parametrize("what", TOLD)
def test_answers_do_not_change_with_the_units(what: str, mode: str) -> None:
    labelled, tested = patients(24, 3, what, network=5), patients(6, 4, what, network=5)
    task, _ = TOLD[what]
    classes = {"classify": ("no", "yes"), "retrieve": ("no", "yes"), "each": ("large", "small")}.get(what, ())
    unit = np.append(np.ones(5), [1e-9, 1e3, 7.0, 1e-3])  # litres, and the like

    def converted(some: list[Example]) -> list[Example]:
        return [replace(one, features=replace(one.features, scan=one.features.scan * unit)) for one in some]  # pyright: ignore

    plain, other = (task.fit(some, classes, mode=mode, seed=0) for some in (labelled, converted(labelled)))
    for one, two in zip(tested, converted(tested), strict=True):
        found, wanted = task.outcome(other, two), task.outcome(plain, one)
        for name in set(dir(wanted)) & {"scores", "predicted", "risk", "shares", "average_precision"}:
            assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5, abs=1e-7)


def test_a_head_rests_on_disk_with_its_ruler_and_says_the_same(tmp_path: Path) -> None:
    labelled = patients(20, 1, "each")
    for example in labelled:
        example.features.scan[0] = 5.0  # does not vary: its scale is infinite
    head = Classify().fit(labelled, ("large", "small"), mode="knn", seed=0)
    save_file(head.arrays, tmp_path / "head.safetensors")
    back = replace(head, arrays=load_file(tmp_path / "head.safetensors"))
    assert math.isinf(back.arrays["ruler_scale"][0])
    for one in patients(5, 2, "each"):
        assert np.array_equal(Classify().answer(back, one.features), Classify().answer(head, one.features))
