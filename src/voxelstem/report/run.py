"""What the lines of a run's journal tell, as plain facts: how long, how fast, how healthy, and what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Facts = dict[str, Any]
Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sign:
    """How a health sign of the journal is called, and what it says."""

    name: str
    meaning: str


SIGNS = {
    "probe/patch_balanced_accuracy": Sign(
        "linear probe", "balanced accuracy of a linear map from frozen patch tokens to organs, on held-out subjects"
    ),
    "probe/patch_knn": Sign(
        "kNN probe", "balanced accuracy of the nearest labelled patches' vote, on held-out subjects"
    ),
    "effective_rank": Sign("rank of patches", "directions that patch tokens use; towards 1 means collapse"),
    "effective_rank/cls": Sign(
        "rank of blocks", "directions that block tokens use, at most as many as blocks were looked at"
    ),
    "spread/patch": Sign("spread of patches", "1: patch tokens point in all directions, 0: all the same way"),
    "spread/cls": Sign("spread of blocks", "1: block tokens point in all directions, 0: all the same way"),
    "entropy/patch": Sign("entropy of dimensions", "1: all dimensions vary alike, 0: a single one does"),
    "teacher_information": Sign(
        "what the teacher tells apart", "nats of mutual information between views and prototypes; 0: one answer to all"
    ),
    "gram_drift": Sign("drift of cosines", "mean squared change of the patches' cosines since the start"),
}
"""By their names in the journal, in the order of their weight."""


def summary(lines: Sequence[Line], *, batch: int = 0) -> Facts:
    """What happened in a run.

    Args:
        lines: Of the journal, in their order.
        batch: Samples of one step; 0 where it is not known.

    Returns:
        `steps_taken`, `samples`, `seconds` (of all starts together), `samples_per_s`; `signs` (first, last and
        difference of each health sign); `skipped`, `rolled_back`, `quarantined` (each a list of records); and, where
        they are known, `data_wait_share`, `kwh`, `energy` (where that number is from) and `look_seconds`.
    """
    taken = [line for line in curves(lines) if "loss" in line]
    seconds = _seconds(lines)
    facts: Facts = {
        "steps_taken": len(taken),
        "samples": len(taken) * batch,
        "seconds": round(seconds, 3),
        "samples_per_s": round(len(taken) * batch / seconds, 4) if seconds else 0.0,
        "signs": {name: found for name in SIGNS if (found := _first_last(lines, name))},
        "skipped": _those(lines, "skipped", ("samples",)),
        "rolled_back": _those(lines, "rolled_back_to", ("reason", "excluded")),
        "quarantined": _those(lines, "quarantined", ("reason",)),
    }
    for name in ("data_wait_share", "kwh", "energy", "look_seconds"):
        known = [line[name] for line in lines if name in line]
        facts |= {name: known[-1]} if known else {}
    return facts


def curves(lines: Iterable[Line]) -> list[dict[str, float]]:
    """The numbers of every step, in the order of steps; of a step that was run again, the last ones."""
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        step = int(line["step"])
        if "rolled_back_to" in line:
            steps = {before: numbers for before, numbers in steps.items() if before < int(line["rolled_back_to"])}
            continue
        numbers = {name: float(value) for name, value in line.items() if _is_number(value)}
        if len(numbers) > 1:
            steps[step] = steps.get(step, {}) | numbers
    return [steps[step] for step in sorted(steps)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _seconds(lines: Iterable[Line]) -> float:
    """Seconds of all starts of the run together: each start counts from zero."""
    total = last = 0.0
    for line in lines:
        now = float(line.get("seconds", last))
        total, last = total + (now - last if now >= last else now), now
    return total


def _first_last(lines: Iterable[Line], name: str) -> Facts:
    known = [float(line[name]) for line in lines if name in line]
    return {"first": known[0], "last": known[-1], "difference": known[-1] - known[0]} if known else {}


def _those(lines: Iterable[Line], mark: str, beside: tuple[str, ...]) -> list[Facts]:
    """Lines with this mark: the step, what the mark says and what stands beside it."""
    return [
        {"step": int(line["step"]), mark: line[mark], **{name: line[name] for name in beside if name in line}}
        for line in lines
        if mark in line
    ]
