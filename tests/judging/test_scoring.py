from __future__ import annotations

from typing import Any, cast

import pytest

from voxelstem.judging.contest import Contest, Repeats
from voxelstem.judging.scoring import table_of
from voxelstem.tasks.classify import Classify, Guess
from voxelstem.tasks.segment import Segment
from voxelstem.truth import Truth


def contest(task: Any, classes: tuple[str, ...]) -> Contest:
    return Contest(
        store=cast(Any, None),
        truth=Truth(records=(), labels={}, classes=classes),
        task=task,
        mode="probe",
        classes=classes,
        labelled=(),
        tested=(),
        seed=0,
    )


def organs(liver: float, spleen: float, count: int) -> Repeats:
    return {f"s{place}": ({"liver": liver + place / 100, "spleen": spleen},) for place in range(count)}


def test_everybody_is_put_beside_the_references_subject_by_subject() -> None:
    repeats = {
        "run": organs(0.8, 0.6, 12),
        "scratch": organs(0.5, 0.6, 12),
        "intensity": organs(0.3, 0.3, 12),
        "atlas": organs(0.9, 0.9, 12),
    }
    told = table_of(contest(Segment(), ("liver", "spleen")), repeats, task="t", budget=3)
    lines = {line.name: line for line in told if line.metric == "dice"}
    run = lines["run"]
    assert run.value.estimate == pytest.approx((0.8 + 0.055 + 0.6) / 2)
    assert run.over_scratch is not None
    # The subjects differ, the difference does not: a paired interval has no width.
    assert (run.over_scratch.low, run.over_scratch.high) == (pytest.approx(0.15), pytest.approx(0.15))
    assert run.over_intensity is not None
    assert run.over_intensity.estimate == pytest.approx(0.4)
    assert lines["scratch"].over_scratch is None
    assert lines["atlas"].over_scratch is not None
    assert run.parts["spleen"].estimate == pytest.approx(0.6)
    assert run.budget == 3
    assert run.each == ()


def test_too_few_subjects_show_each_figure_instead_of_an_interval() -> None:
    line = table_of(contest(Segment(), ("liver", "spleen")), {"run": organs(0.8, 0.6, 2)}, task="t", budget=1)[0]
    assert line.value.low is None
    assert line.each == (pytest.approx(0.7), pytest.approx(0.705))


def test_every_metric_of_a_task_has_its_lines() -> None:
    own = {f"s{place}": (Guess(truth=place % 2, scores=(0.5, 0.5)),) for place in range(10)}
    lines = table_of(contest(Classify(), ("no", "yes")), {"run": own}, task="t", budget=None)
    assert [line.metric for line in lines] == list(Classify.metrics)
    assert lines[0].value.estimate == pytest.approx(0.5)
