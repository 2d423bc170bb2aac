from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from voxelstem.protocols import Example
from voxelstem.tasks.regress import Measured, Regress, pearson, ridge


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
    with pytest.raises(ValueError, match="at least two scans, each with a value"):
        Regress().fit(seen, (), mode="probe", seed=0)


def test_what_has_no_value_cannot_be_scored_and_modes_are_known() -> None:
    head = Regress().fit(examples(5), (), mode="probe", seed=0)
    with pytest.raises(ValueError, match="needs a value"):
        Regress().outcome(head, example(np.ones(6), None, 0))
    with pytest.raises(ValueError, match="no mode 'knn'"):
        Regress().fit(examples(5), (), mode="knn", seed=0)
    with pytest.raises(ValueError, match="positive"):
        Regress(strengths=())
