from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tests.draws import counts_of

from voxelstem.heads.attending import AttendConfig, score
from voxelstem.protocols import Example
from voxelstem.tasks.regress import Measured, Regress, huber, pearson, ridge


@dataclass(frozen=True)
class Row:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


def example(row: np.ndarray, value: float | None, index: int) -> Example:
    return Example(subject=f"s{index}", key=f"k{index}", features=Row(row), affine_ras=np.eye(4), value=value)


def examples(count: int, noise: float = 0.01) -> list[Example]:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, 6))
    values = 40 + rows @ np.array([3.0, -2.0, 0.0, 0.0, 1.0, 0.0]) + noise * rng.normal(size=count)
    return [example(row, float(value), index) for index, (row, value) in enumerate(zip(rows, values, strict=True))]


def test_a_line_through_the_features_is_found_in_the_unit_of_the_labels() -> None:
    task, seen = Regress(), examples(40)
    head = task.fit(seen[:30], (), mode="probe", seed=0)
    outcomes = [task.outcome(head, one) for one in seen[30:]]
    assert task.statistic("mae")(outcomes) < 0.3
    assert task.statistic("r")(outcomes) > 0.98


def test_more_features_than_scans_are_shrunk_not_refused() -> None:
    rng = np.random.default_rng(1)
    seen = [example(rng.normal(size=200), 50 + float(rng.normal()), index) for index in range(6)]
    head = Regress().fit(seen, (), mode="probe", seed=0)
    assert abs(Regress().predict(head, rng.normal(size=200)) - 50) < 5


def test_the_strength_is_the_one_that_predicts_left_out_scans_best() -> None:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(12, 4))
    rows -= rows.mean(axis=0)
    values = rows[:, 0] + rng.normal(size=12)
    values -= values.mean()

    def left_out(strength: float) -> float:
        total = 0.0
        for index in range(12):
            kept = np.arange(12) != index
            inputs = np.column_stack([rows[kept], np.ones(11)])
            penalty = np.diag([strength] * 4 + [0.0])
            fitted = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ values[kept])
            total += (values[index] - np.append(rows[index], 1.0) @ fitted) ** 2
        return total

    strengths = (0.1, 1.0, 10.0, 100.0)
    weight, chosen = ridge(rows, values, strengths)
    assert chosen == min(strengths, key=left_out)
    assert weight == pytest.approx(np.linalg.solve(rows.T @ rows + chosen * np.eye(4), rows.T @ values))


def test_pearson_is_numpys_and_undefined_where_nothing_varies() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(2, 9))
    assert pearson(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert math.isnan(pearson(np.ones(4), np.arange(4.0)))
    # In any unit: a constant whose mean is off by its last bit does not vary, and small numbers that do, do.
    assert math.isnan(pearson(1.4e6 + 1e5 * one, np.full(9, 1234567.1)))
    assert pearson(1e-10 * one, 1e-10 * other) == pytest.approx(np.corrcoef(one, other)[0, 1])


def test_several_scans_of_a_subject_are_averaged() -> None:
    joined = Regress().combine([Measured(truth=60.0, predicted=50.0), Measured(truth=60.0, predicted=60.0)])
    assert joined == Measured(truth=60.0, predicted=55.0)


@pytest.mark.parametrize("values", [[1.0], [1.0, None]])
def test_too_little_to_draw_a_line_is_refused(values: list[float | None]) -> None:
    seen = [example(np.ones(2), value, index) for index, value in enumerate(values)]
    with pytest.raises(ValueError, match="scans of two subjects at least, each with a value"):
        Regress().fit(seen, (), mode="probe", seed=0)


def test_what_has_no_value_cannot_be_scored_and_modes_are_known() -> None:
    head = Regress().fit(examples(5), (), mode="probe", seed=0)
    with pytest.raises(ValueError, match="needs a value"):
        Regress().outcome(head, example(np.ones(6), None, 0))
    with pytest.raises(ValueError, match="no mode 'tree'"):
        Regress().fit(examples(5), (), mode="tree", seed=0)
    with pytest.raises(ValueError, match="positive"):
        Regress(strengths=())


def naive_knn(task: Regress, seen: list[Example], row: np.ndarray) -> float:
    """The mean of the nearest, by loops."""
    told = []
    for one in seen:
        lengths = math.sqrt(sum(x * x for x in one.features.scan)) * math.sqrt(sum(x * x for x in row))
        told.append((sum(a * b for a, b in zip(one.features.scan, row, strict=True)) / lengths, one.value))
    near = sorted(told, key=lambda pair: -pair[0])[: task.neighbours]
    weights = [math.exp(cosine / task.temperature) for cosine, _ in near]
    return sum(weight * value for weight, (_, value) in zip(weights, near, strict=True)) / sum(weights)


@pytest.mark.parametrize("neighbours", [1, 4, 100])
def test_neighbours_say_their_weighted_mean(neighbours: int) -> None:
    task, seen = Regress(neighbours=neighbours, temperature=0.2), examples(24)
    head = task.fit(seen[:20], (), mode="knn", seed=0)
    for one in seen[20:]:
        assert task.answer(head, one.features) == pytest.approx(naive_knn(task, seen[:20], one.features.scan))


def test_neighbours_find_a_number_that_turns_the_embedding() -> None:
    rng = np.random.default_rng(6)
    angles = rng.uniform(0, math.pi, 60)
    rows = np.column_stack([np.cos(angles), np.sin(angles)]) + 0.05 * rng.normal(size=(60, 2))
    seen = [example(row, float(angle), at) for at, (row, angle) in enumerate(zip(rows, angles, strict=True))]
    task = Regress()
    head = task.fit(seen[:40], (), mode="knn", seed=0)
    outcomes = [task.outcome(head, one) for one in seen[40:]]
    chance = np.mean([abs(one.truth - angles[:40].mean()) for one in outcomes])
    assert task.statistic("mae")(outcomes) < 0.3 * chance
    again = task.fit(seen[:40], (), mode="knn", seed=9)
    assert all((again.arrays[name] == array).all() for name, array in head.arrays.items())


@pytest.mark.parametrize("changes", [{"neighbours": 0}, {"temperature": 0.0}])
def test_neighbours_without_sense_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="neighbours and temperature must be positive"):
        Regress(**changes)


@dataclass(frozen=True)
class Patches:
    scan: np.ndarray
    tokens: np.ndarray
    tokens_affine_ras: np.ndarray


def speckled(count: int, seed: int) -> list[Example]:
    """Scans in which three marked patches hold the number, and the mean over patches is 0."""
    rng = np.random.default_rng(seed)
    seen = []
    for index in range(count):
        value = float(rng.uniform(-1, 1))
        tokens = rng.normal(size=(40, 8))
        at = rng.permutation(40)[:3]
        tokens[at, 0] += 6
        tokens[at, 1] += 4 * value
        tokens = (tokens - tokens.mean(axis=0)).reshape(2, 4, 5, 8).astype(np.float32)
        features = Patches(tokens.mean(axis=(0, 1, 2)), tokens, np.eye(4))
        seen.append(
            Example(
                subject=f"s{index}", key=f"k{index}", features=features, affine_ras=np.eye(4), value=50 + 10 * value
            )
        )
    return seen


def test_attention_reads_a_number_from_a_few_patches_in_the_unit_of_the_labels() -> None:
    train, held, found = speckled(60, 0), speckled(40, 1), {}
    for mode in ("probe", "attention"):
        head = Regress().fit(train, (), mode=mode, seed=0)
        outcomes = [Regress().outcome(head, one) for one in held]
        found[mode] = [Regress().statistic(metric)(outcomes) for metric in ("mae", "r")]
    assert found["attention"][0] < 0.8 * found["probe"][0]
    assert found["attention"][1] > 0.7
    assert Regress().answer(head, held[0].features) == score(head, held[0].features).logits[0]


def test_attention_to_nothing_says_the_mean() -> None:
    rng = np.random.default_rng(4)
    seen = [example(rng.normal(size=5), 70 + float(rng.normal()), index) for index in range(20)]
    head = Regress().fit(seen, (), mode="attention", seed=0)
    mean = np.mean([one.value for one in seen])
    assert abs(Regress().answer(head, Row(rng.normal(size=5))) - mean) < 1
    assert head.facts["bag"] == "scan"


def test_numbers_that_are_all_alike_are_what_attention_says() -> None:
    rng = np.random.default_rng(5)
    head = Regress().fit([example(rng.normal(size=3), 7.0, at) for at in range(4)], (), mode="attention", seed=0)
    assert Regress().answer(head, Row(rng.normal(size=3))) == pytest.approx(7.0)


def test_patches_are_asked_for_only_where_they_are_looked_at() -> None:
    assert Regress().looks_at_tokens("attention")
    assert not Regress().looks_at_tokens("probe")
    assert not Regress(attention=AttendConfig(bag="blocks")).looks_at_tokens("attention")


def test_attention_is_not_asked_of_one_vector() -> None:
    few = Regress(attention=AttendConfig(few_steps=1))
    head = few.fit(speckled(4, 0), (), mode="attention", seed=0)
    with pytest.raises(ValueError, match="not at the scan's one vector"):
        few.predict(head, np.zeros(8))


def test_huber_is_half_the_square_near_by_and_plain_far_off() -> None:
    values, logits, rows = np.array([0.0, 1.0, -2.0]), np.array([[0.4], [5.0]]), np.array([2, 0])
    gaps = [abs(logit[0] - values[row]) for logit, row in zip(logits, rows, strict=True)]
    slow = sum(gap - 0.5 if gap > 1 else gap**2 / 2 for gap in gaps) / 2
    assert float(huber(values)(torch.from_numpy(logits).float(), rows)) == pytest.approx(slow)


def of_subject(who: int, row: np.ndarray, value: float) -> Example:
    return replace(example(row, value, who), subject=f"s{who}")


def test_scans_of_one_subject_do_not_choose_the_penalty_for_each_other() -> None:
    rng = np.random.default_rng(0)
    rows, values = rng.normal(size=(20, 60)), rng.normal(size=20)
    several = [
        of_subject(who, rows[who] + 1e-3 * rng.normal(size=60), float(values[who]))
        for who in range(20)
        for _ in range(6)
    ]
    once = [of_subject(who, rows[who], float(values[who])) for who in range(20)]
    many, one = (Regress().fit(side, (), mode="probe", seed=0) for side in (several, once))
    # Nothing can be learned here: the strongest penalty is right, and near-equal scans would vote for the weakest.
    assert many.facts["strength"] == one.facts["strength"] == max(Regress().strengths)
    assert many.arrays["weight"] == pytest.approx(one.arrays["weight"], abs=1e-4)


def test_correlation_of_all_draws_at_once_is_that_of_each_draw() -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(size=6).round()
    said = truth + rng.normal(size=6)
    sample = [Measured(truth=float(a), predicted=float(b)) for a, b in zip(truth, said, strict=True)]
    picks = rng.integers(0, 6, (60, 6))
    picks[0] = 2
    found = Regress().statistic("r").of_draws(sample, counts_of(picks, 6))  # pyright: ignore[reportFunctionMemberAccess]
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = [np.corrcoef(truth[row], said[row])[0, 1] if np.ptp(truth[row]) else math.nan for row in picks]
    assert math.isnan(found[0])
    np.testing.assert_allclose(found, wanted, atol=1e-9)
