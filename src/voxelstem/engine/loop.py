"""The training loop: it knows `step` and `after_step` of an objective, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from voxelstem.engine.checkpoint import CheckpointConfig, Checkpoints, Resumed, resume
from voxelstem.engine.journal import Journal
from voxelstem.engine.optim import OptimConfig, set_rate
from voxelstem.engine.parallel import Trainee
from voxelstem.engine.watch import Verdict, Watch, WatchConfig
from voxelstem.errors import CheckpointError
from voxelstem.protocols import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long, how often something is written down, and what is done about a step that went wrong."""

    steps: int
    batch: int
    """Samples of one step over all processes."""
    optim: OptimConfig
    checkpoint: CheckpointConfig
    watch: WatchConfig = field(default_factory=WatchConfig)
    monitor_every: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the loop asks of others while it runs."""

    batches: Callable[[int], Generator[Batch, None, None]]
    """The batches from a step on, to the end of the run."""
    monitor: Callable[[], dict[str, float]]
    """Health signs; every process calls it at the same steps."""
    show: Callable[[int, Mapping[str, Any]], None]
    """Tells the user how far the run is."""
    names: Callable[[int], list[str]] = lambda step: []  # noqa: ARG005
    """First letters of the keys of a step's scans."""
    notes: Callable[[], list[dict[str, Any]]] = list
    """What the loader has to say since it was last asked: lines for the journal."""
    facts: Callable[[], dict[str, Any]] = dict
    """What else a checkpoint must hold, as JSON."""
    back: Callable[[Resumed], None] = lambda start: None  # noqa: ARG005
    """Is told when the run goes back, and to where: what was learnt since is to be forgotten."""


def train(trainee: Trainee, around: Surroundings, *, run: Path, start: Resumed, config: LoopConfig) -> None:
    """Run the steps from `start` to `config.steps`, writing the journal and checkpoints into `run`.

    A step whose loss or gradient is no number, or far out of range, is left out as if it had never been. Where that
    happens again and again the run goes back to its newest checkpoint and leaves those steps out on its way.

    Raises:
        CheckpointError: going back did not help, there is nothing to go back to, or the disk is full.
    """
    watch = Watch(config.watch, start.facts.get("watch"))
    folder = run / "checkpoints"
    with (
        torch.random.fork_rng(devices=[]),
        Journal(run, resume_at=start.step) as journal,
        Checkpoints(folder, keep=config.checkpoint.keep) as checkpoints,
    ):
        loop = _Loop(trainee, around, journal, checkpoints, config)
        while (verdict := loop.run_from(start.step, watch)).action == "roll_back":
            checkpoints.wait()
            start = resume(folder, trainee.objective, trainee.optimizer, before=verdict.back_to)
            if not start.step:
                raise CheckpointError(
                    f"step {verdict.back_to} and those after it went wrong ({verdict.reason}), "
                    "and there is no checkpoint to go back to",
                    hint="lower optim.lr, or look at the scans that the journal names",
                )
            watch.roll_back(start.facts.get("watch", {}))
            around.back(start)
            journal.rewind(start.step)
            told = {"rolled_back_to": start.step, "reason": verdict.reason, "excluded": sorted(watch.excluded)}
            loop.tell(start.step, told)
        journal.append({"step": config.steps} | around.monitor())


class _Loop:
    """One stretch after another, until the end or until the watch sends the run back."""

    def __init__(
        self, trainee: Trainee, around: Surroundings, journal: Journal, checkpoints: Checkpoints, config: LoopConfig
    ) -> None:
        self.trainee, self.around, self.config = trainee, around, config
        self.journal, self.checkpoints = journal, checkpoints
        self.began, self.samples = time.monotonic(), 0

    def run_from(self, start: int, watch: Watch) -> Verdict:
        """Train from this step on; the verdict on the last step, or on the one for which the run must go back."""
        verdict = Verdict(action="take")
        with closing(self.around.batches(start)) as batches:
            for step, batch in zip(range(start, self.config.steps), batches, strict=True):
                for note in self.around.notes():
                    self.tell(step, note)
                verdict = self._take(step, batch, watch)
                if verdict.action == "roll_back":
                    return verdict
                done = step + 1
                if done % self.config.checkpoint.every == 0 or done == self.config.steps:
                    facts = {"watch": watch.facts()} | self.around.facts()
                    self.checkpoints.save(done, self.trainee.objective, self.trainee.optimizer, facts)
                    if not self.config.checkpoint.background:
                        self.checkpoints.wait()
        return verdict

    def tell(self, step: int, told: Mapping[str, Any]) -> None:
        """Write it down and show it."""
        self.journal.append({"step": step} | dict(told))
        self.around.show(step, told)

    def _take(self, step: int, batch: Batch, watch: Watch) -> Verdict:
        """One step, unless it must not reach the weights."""
        trainee, progress = self.trainee, step / self.config.steps
        health = self.around.monitor() if step % self.config.monitor_every == 0 else {}
        if step in watch.excluded:
            verdict = Verdict(action="skip", reason="left out after the run went back")
            self._leave_out(step, verdict.reason, health)
            return verdict
        rate = set_rate(trainee.optimizer, self.config.optim, progress=progress, batch=self.config.batch)
        # Whatever a plug-in draws from torch itself is then a function of the step too, and a resume needs no state.
        torch.manual_seed((batch.seed + batch.first) % 2**62)
        output = trainee.backward(batch, progress=progress)
        loss, norm = float(output.loss), trainee.clip(self.config.optim.clip_norm)
        verdict = watch.judge(step, loss, norm)
        if verdict.action == "take":
            trainee.update()
            trainee.objective.after_step(progress=progress)
            seconds = time.monotonic() - self.began
            self.samples += self.config.batch
            told = {"loss": loss, "lr": rate, "grad_norm": norm, "seconds": seconds}
            told |= {"samples_per_s": self.samples / seconds}
            self.tell(step, told | output.scalars | health)
            return verdict
        trainee.drop()
        self._leave_out(step, verdict.reason, health)
        return verdict

    def _leave_out(self, step: int, reason: str, health: Mapping[str, Any]) -> None:
        self.tell(step, {"skipped": reason, "samples": self.around.names(step)} | dict(health))
