from __future__ import annotations

import dataclasses

import pytest

from voxelstem.errors import ConfigError
from voxelstem.tasks import TASKS


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_line_is_a_frozen_dataclass_with_modes_and_metrics(name: str) -> None:
    task = TASKS[name]()
    assert dataclasses.is_dataclass(task)
    assert task.modes
    assert task.metrics
    assert all(callable(task.statistic(metric)) for metric in task.metrics)


def test_a_misspelt_task_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'segment'"):
        TASKS["segmet"]
