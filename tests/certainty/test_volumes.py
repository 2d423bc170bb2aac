from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from voxelstem.certainty.volumes import Sized, Sizes, rows_of_sizes
from voxelstem.protocols import Example, Head
from voxelstem.study import LabelMap

AFFINE = np.array([[2.0, 0, 0, -10.0], [0, 1.5, 0, 0.0], [0, 0, 3.0, 5.0], [0, 0, 0, 1.0]])
HEAD = Head(mode="probe", classes=("liver", "spleen", "lesion"), arrays={})


@dataclass(frozen=True)
class Sloppy:
    """Marks whatever it is told to, and remembers what it was fitted to."""

    marks: np.ndarray

    def fit(self, examples: Any, classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        return Head(mode=f"{mode}{seed}", classes=classes, arrays={"of": np.array(len(examples))})

    def mark(self, head: Head, features: Any, affine_ras: np.ndarray, shape_ijk: tuple[int, int, int]) -> np.ndarray:
        del head, features, affine_ras
        assert shape_ijk == self.marks.shape
        return self.marks


def drawn(seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    array = rng.choice(np.array([0, 3, 7, 8]), size=(6, 5, 4)).astype(np.int16)
    labels = LabelMap(array=array, classes={3: "liver", 7: "spleen", 8: "liver", 9: "kidney"})
    return Example(subject="s", key="k", features=cast(Any, None), affine_ras=AFFINE, labels=labels)


def test_volumes_are_counted_voxel_by_voxel_on_both_sides() -> None:
    one = drawn()
    assert one.labels is not None
    marks = np.random.default_rng(5).integers(0, 4, (6, 5, 4)).astype(np.uint8)
    found = Sized(task=Sloppy(marks)).outcome(HEAD, one)
    assert set(found.true_mm3) == set(found.predicted_mm3) == {"liver", "spleen"}  # nobody drew lesions
    liver = spleen = marked = 0
    for value, mark in zip(one.labels.array.ravel().tolist(), marks.ravel().tolist(), strict=True):
        liver += value in (3, 8)
        spleen += value == 7
        marked += mark == 2
    assert found.true_mm3["liver"] == pytest.approx(liver * 9.0)
    assert found.true_mm3["spleen"] == pytest.approx(spleen * 9.0)
    assert found.predicted_mm3["spleen"] == pytest.approx(marked * 9.0)


def test_a_structure_that_is_named_but_has_no_voxel_is_of_no_volume() -> None:
    array = np.zeros((6, 5, 4), np.int16)
    labels = LabelMap(array=array, classes={300: "liver"})
    one = Example(subject="s", key="k", features=cast(Any, None), affine_ras=AFFINE, labels=labels)
    found = Sized(task=Sloppy(np.ones((6, 5, 4), np.int16))).outcome(HEAD, one)
    assert found.true_mm3 == {"liver": 0.0}
    assert found.predicted_mm3 == {"liver": pytest.approx(120 * 9.0)}


def test_it_is_fitted_like_the_task_itself() -> None:
    head = Sized(task=Sloppy(np.zeros((1, 1, 1)))).fit([drawn()], ("a",), mode="probe", seed=4)
    assert (head.mode, head.classes, int(head.arrays["of"])) == ("probe4", ("a",), 1)


def test_scans_of_a_subject_are_averaged_structure_by_structure() -> None:
    sized = Sized(task=Sloppy(np.zeros((1, 1, 1))))
    one = Sizes(predicted_mm3={"liver": 2.0, "spleen": 4.0}, true_mm3={"liver": 1.0, "spleen": 3.0})
    other = Sizes(predicted_mm3={"liver": 4.0}, true_mm3={"liver": 5.0})
    both = sized.combine([one, other])
    assert both.predicted_mm3 == {"liver": 3.0, "spleen": 4.0}
    assert both.true_mm3 == {"liver": 3.0, "spleen": 3.0}


def test_rows_are_those_that_were_found_and_a_false_find_counts_with_nothing() -> None:
    outcomes = {
        "b": Sizes(predicted_mm3={"liver": 2.0, "lesion": 0.5}, true_mm3={"liver": 1.0, "lesion": 0.0}),
        "a": Sizes(predicted_mm3={"liver": 0.0, "lesion": 1.0}, true_mm3={"liver": 9.0, "lesion": 2.0}),
    }
    rows = rows_of_sizes(outcomes)
    told = list(zip(rows.structures, rows.predicted_mm3.tolist(), rows.true_mm3.tolist(), strict=True))
    assert told == [("lesion", 1.0, 2.0), ("liver", 2.0, 1.0), ("lesion", 0.5, 0.0)]
    assert len(rows_of_sizes({}).structures) == 0


def test_a_scan_without_a_label_map_is_refused() -> None:
    one = Example(subject="s", key="k", features=cast(Any, None), affine_ras=AFFINE)
    with pytest.raises(ValueError, match="need voxel labels"):
        Sized(task=Sloppy(np.zeros((1, 1, 1)))).outcome(HEAD, one)
