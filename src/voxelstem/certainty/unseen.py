"""What a head says of its own labelled subjects while they are held out, in the form that calibrators are fitted to.

Of voxels it is volumes. Their heads are fitted again for every fold and must mark every labelled scan: where that takes
longer than anybody would wait for it, it is given up and said.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from voxelstem.certainty.crossfit import Outcomes, answering, cross_fit
from voxelstem.certainty.folds import Folds
from voxelstem.certainty.thresholds import fewest_for
from voxelstem.certainty.volumes import Marker, Sized
from voxelstem.protocols import Example, Task

LONGEST_S = 1800.0
"""Cross-fitting of tasks that label voxels or boxes is given up when it would take longer, with what is left of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """Outcomes of all subjects as unseen, or none of them and why."""

    outcomes: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class _TooLongError(Exception):
    """The folds would take longer than they may."""


@dataclass(slots=True)
class _Patience:
    """Counts folds, and gives up once those that are left would end too late."""

    folds: int
    longest_s: float
    began: float
    done: int = 0

    def __call__(self, amount: int = 1, note: str = "") -> None:
        del note
        self.done += amount
        each = (time.monotonic() - self.began) / self.done
        if self.done < self.folds and each * self.folds > self.longest_s:
            raise _TooLongError(
                f"{self.folds} folds would take about {each * self.folds / 60:.0f} minutes, "
                f"{self.longest_s / 60:.0f} are the most"
            )


def hear(
    task: Task,
    examples: Sequence[Example],
    classes: tuple[str, ...],
    *,
    mode: str,
    seed: int,
    folds: Folds,
    level: float,
    longest_s: float = LONGEST_S,
) -> Heard:
    """Ask a head of the other folds about every labelled subject.

    Args:
        task: One that says something which can be calibrated.
        examples: The labelled scans.
        classes: What the head tells apart.
        mode: How it is fitted.
        seed: Of its own randomness.
        folds: Who is held out together.
        level: Of the intervals of volumes that the outcomes are for: with fewer subjects than these need, no voxel is
            marked.
        longest_s: So long, in seconds, may tasks on voxels take.

    Raises:
        ValueError: a fold cannot be learned from.
    """
    marks = hasattr(task, "mark")
    if marks and len(folds.subjects) < fewest_for(level):
        why = f"{len(folds.subjects)} labelled subjects are fewer than {fewest_for(level)}"
        return Heard(outcomes={}, notes=(f"volumes without intervals: {why}",))
    asked = cast(Task, Sized(task=cast(Marker, task))) if marks else task
    patience = _Patience(folds=len(folds.held), longest_s=longest_s, began=time.monotonic()) if task.voxels else None
    try:
        found = cross_fit(answering(asked, examples, classes, mode=mode), [folds], seed=seed, advance=patience)
    except _TooLongError as error:
        what = "volumes without intervals" if marks else "not calibrated"
        return Heard(outcomes={}, notes=(f"{what}: {error}",))
    outcomes: Outcomes = found.outcomes()
    return Heard(outcomes=outcomes)
