"""What to do about a step that would do harm: leave it out, go back to a checkpoint, or stop the run.

Decisions rest on the step's number, its loss and the length of its gradient over all processes, and on nothing else:
the same run decides the same, resumed or not, on any number of processes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from voxelstem.errors import CheckpointError

_DEVIATION = 1.4826
"""Median distances from the median that make one standard deviation of normal numbers."""
_LEAST_SHARE = 0.01
"""A loss that hardly moves is taken to move by this share, or every breath would be far above it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """How much is borne before something is done. The usual values let every healthy run measured so far pass."""

    spike: float = 10.0
    """A step is a spike if its gradient is more than this many times the usual one, and its loss is more than this many
    standard deviations above the usual one. A long gradient alone is clipped and harms nothing. `inf`: no spikes."""
    window: int = 64
    """Steps taken last that say what is usual. Spikes are not judged before half of them were taken."""
    skips: int = 3
    """Bad steps within a window of steps that are only left out; the next one means going back."""
    suspects: int = 16
    """Steps taken just before the first bad one that are left out too once the run went back: without the bad steps
    alone, which changed nothing, it would come to the same place."""
    roll_backs: int = 2
    """How often a run goes back before it stops."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: one is out of range.
        """
        if not self.spike > 1:
            raise ValueError(f"watch.spike must be > 1, got {self.spike}")
        if self.window < 2 or self.suspects < 1:  # noqa: PLR2004 - half of it must be something
            raise ValueError(f"need watch.window >= 2 and watch.suspects >= 1, got {self.window} and {self.suspects}")
        if self.skips < 0 or self.roll_backs < 0:
            raise ValueError(f"watch.skips and watch.roll_backs are >= 0, got {self.skips} and {self.roll_backs}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is to be done with a step, and why."""

    action: Literal["take", "skip", "roll_back"]
    reason: str = ""
    """For the journal; empty for a step that is taken."""
    back_to: int | None = None
    """On `roll_back`: the first step that the weights must not have seen. A checkpoint of this step or an earlier one
    is wanted; the oldest one that is kept serves if there is none."""


class Watch:
    """Judges every step before it reaches the weights, and remembers which steps are never taken."""

    def __init__(self, config: WatchConfig, facts: Mapping[str, Any] | None = None) -> None:
        """Begin, or go on from the `facts` of a checkpoint."""
        facts = facts or {}
        self.config = config
        self.excluded: set[int] = set(facts.get("excluded", ()))
        """Steps that are never taken: the loop leaves them out without asking."""
        self.rolled_back = int(facts.get("rolled_back", 0))
        self._taken: deque[tuple[int, float, float]] = deque(maxlen=max(config.window, config.suspects))
        self._bad: list[int] = []
        self._recall(facts)

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Say whether this step may reach the weights; what is said is remembered.

        Args:
            step: Its number; numbers rise from call to call but for a roll back.
            loss: Of the whole batch, over all processes.
            grad_norm: Length of the gradient before it is clipped, over all processes.

        Raises:
            CheckpointError: the run went back as often as it may, and goes wrong again.
        """
        reason = self._complaint(loss, grad_norm)
        if not reason:
            self._taken.append((step, loss, grad_norm))
            return Verdict(action="take")
        self._bad = [*(bad for bad in self._bad if bad > step - self.config.window), step]
        if len(self._bad) <= self.config.skips:
            return Verdict(action="skip", reason=reason)
        return self._go_back(step, reason)

    def roll_back(self, facts: Mapping[str, Any]) -> None:
        """Remember only what was so at the checkpoint with these facts, and what must never be taken again."""
        self._recall(facts)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must keep so that all later decisions are the same: plain values for JSON."""
        return {
            "excluded": sorted(self.excluded),
            "rolled_back": self.rolled_back,
            "taken": [list(line) for line in self._taken],
            "bad": self._bad,
        }

    def _recall(self, facts: Mapping[str, Any]) -> None:
        self._taken.clear()
        self._taken.extend((int(step), float(loss), float(norm)) for step, loss, norm in facts.get("taken", ()))
        self._bad = [int(step) for step in facts.get("bad", ())]

    def _complaint(self, loss: float, grad_norm: float) -> str:
        """What is wrong with the step, or nothing."""
        for name, value in (("loss", loss), ("gradient", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is not a number"
        recent = list(self._taken)[-self.config.window :]
        if len(recent) < self.config.window / 2:
            return ""
        norm = median(length for _, _, length in recent)
        usual = median(value for _, value, _ in recent)
        spread = _DEVIATION * median(abs(value - usual) for _, value, _ in recent)
        high = usual + self.config.spike * max(spread, _LEAST_SHARE * abs(usual))
        if grad_norm > self.config.spike * norm and loss > high:
            return f"a spike: gradient {grad_norm:.3g} (usually {norm:.3g}), loss {loss:.3g} (usually {usual:.3g})"
        return ""

    def _go_back(self, step: int, reason: str) -> Verdict:
        if self.rolled_back >= self.config.roll_backs:
            raise CheckpointError(
                f"step {step}: {reason}; {len(self._bad)} of the last {self.config.window} steps were bad, and the run "
                f"went back {self.rolled_back} times before",
                hint="the checkpoints are whole: start a new run with a lower optim.lr, or look at the samples that "
                "the journal names",
            )
        before = [taken for taken, _, _ in self._taken if taken < self._bad[0]][-self.config.suspects :]
        self.rolled_back += 1
        self.excluded |= {*before, *self._bad}
        return Verdict(action="roll_back", reason=reason, back_to=min([*before, *self._bad]))
