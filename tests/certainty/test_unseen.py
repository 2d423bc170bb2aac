from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from tests.madeup import classed

from voxelstem.certainty.folds import Folds
from voxelstem.certainty.unseen import hear
from voxelstem.protocols import Example, Head, Task
from voxelstem.study import LabelMap


@dataclass(frozen=True)
class Marks:
    """Marks everything; notes which subjects each head was fitted to."""

    fitted: list[frozenset[str]] = field(default_factory=list)
    voxels: bool = True
    seconds: float = 0.0

    def fit(self, examples: Any, classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        time.sleep(self.seconds)
        self.fitted.append(frozenset(one.subject for one in examples))
        return Head(mode=mode, classes=classes, arrays={}, facts={"seed": float(seed)})

    def mark(self, *seen: Any) -> np.ndarray:
        return np.ones(seen[-1], np.int16)


def drawn(count: int) -> list[Example]:
    labels = LabelMap(array=np.ones((2, 2, 2), np.int16), classes={1: "liver"})
    return [
        Example(subject=f"s{at}", key=f"k{at}", features=cast(Any, None), affine_ras=np.eye(4), labels=labels)
        for at in range(count)
    ]


def folds_of(count: int, parts: int = 3) -> Folds:
    return Folds(held=tuple(frozenset(f"s{at}" for at in range(part, count, parts)) for part in range(parts)))


def heard(task: Any, count: int, **changes: Any) -> Any:
    settings = {"mode": "probe", "seed": 0, "folds": folds_of(count), "level": 0.9}
    return hear(cast(Task, task), drawn(count), ("liver",), **(settings | changes))


def test_volumes_are_heard_of_subjects_whom_the_head_had_not_seen() -> None:
    task = Marks()
    found = heard(task, 12)
    assert found.notes == ()
    assert sorted(found.outcomes) == sorted(f"s{at}" for at in range(12))
    assert {one.predicted_mm3["liver"] for one in found.outcomes.values()} == {8.0}
    assert task.fitted == [folds_of(12).subjects - held for held in folds_of(12).held]


def test_fewer_subjects_than_an_interval_needs_are_not_asked_at_all() -> None:
    task = Marks()
    found = heard(task, 8)
    assert found.outcomes == {}
    assert found.notes == ("volumes without intervals: 8 labelled subjects are fewer than 9",)
    assert task.fitted == []
    assert heard(Marks(), 9).outcomes


def test_what_takes_too_long_is_given_up_after_the_first_fold_and_said() -> None:
    task = Marks(seconds=0.02)
    found = heard(task, 12, longest_s=0.03)
    assert found.outcomes == {}
    assert found.notes[0].startswith("volumes without intervals: 3 folds would take about")
    assert len(task.fitted) == 1
    assert heard(Marks(), 12, longest_s=60.0).outcomes


def test_a_scan_level_task_is_asked_for_its_own_outcomes_however_long_it_takes() -> None:
    @dataclass(frozen=True)
    class Slow:
        voxels: bool = False

        def fit(self, examples: Any, classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
            del examples, seed
            return Head(mode=mode, classes=classes, arrays={})

        def outcome(self, head: Head, example: Example) -> str:
            return f"{head.mode} {example.subject}"

        def combine(self, outcomes: Any) -> Any:
            return outcomes[0]

    examples = classed(a=4, b=4)
    subjects = [one.subject for one in examples]
    folds = Folds(held=(frozenset(subjects[::2]), frozenset(subjects[1::2])))
    found = hear(cast(Task, Slow()), examples, ("a", "b"), mode="knn", seed=0, folds=folds, level=0.9, longest_s=0.0)
    assert found.outcomes == {subject: f"knn {subject}" for subject in subjects}


def test_a_fold_that_cannot_be_learned_from_is_passed_on() -> None:
    class Broken(Marks):
        def fit(self, examples: Any, classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
            raise ValueError(f"no class of {len(classes)} in {len(examples)} for {mode} {seed}")

    with pytest.raises(ValueError, match="no class"):
        heard(Broken(), 12)
