"""The training loop: it knows `step` and `after_step` of an objective, and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from voxelstem.engine import device as devices
from voxelstem.engine.checkpoint import CheckpointConfig, write_checkpoint
from voxelstem.engine.journal import Journal
from voxelstem.engine.optim import OptimConfig, set_rate
from voxelstem.errors import CheckpointError
from voxelstem.protocols import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long, how often something is written down, and in which precision."""

    steps: int
    optim: OptimConfig
    checkpoint: CheckpointConfig
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "auto"
    monitor_every: int = 100
    notes: Callable[[], list[dict[str, Any]]] = list
    """What the loader has to say since it was last asked: lines for the journal."""


def train(
    objective: Any,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    *,
    run: Path,
    start: int,
    config: LoopConfig,
    monitor: Callable[[], dict[str, float]],
    advance: Callable[[int, str], None],
) -> None:
    """Run the steps from `start` to `config.steps`, writing the journal and checkpoints into `run`.

    `objective` is a module that satisfies `protocols.Objective`.

    Raises:
        CheckpointError: the loss or its gradient is not a number, or the disk is full.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    began = time.monotonic()
    with Journal(run, resume_at=start) as journal:
        for step, batch in zip(range(start, config.steps), batches, strict=True):
            for note in config.notes():
                journal.append({"step": step} | note)
            progress = step / config.steps
            rate = set_rate(optimizer, config.optim, progress=progress)
            health = monitor() if step % config.monitor_every == 0 else {}
            with devices.autocast(config.device, config.precision):
                output = objective.step(devices.move(batch, config.device), progress=progress)
            loss = _finite(float(output.loss.detach()), "loss", step)
            output.loss.backward()
            # Checked before it reaches the weights: no checkpoint may hold what cannot be trained on.
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm))
            _finite(norm, "gradient", step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            objective.after_step(progress=progress)
            seconds = time.monotonic() - began
            journal.append(
                {"step": step, "loss": loss, "lr": rate, "grad_norm": norm, "seconds": seconds}
                | output.scalars
                | health
            )
            advance(1, f"loss {loss:.3f}")
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
                write_checkpoint(run / "checkpoints", step + 1, objective, optimizer, keep=config.checkpoint.keep)
        journal.append({"step": config.steps} | monitor())


def _finite(value: float, what: str, step: int) -> float:
    if not math.isfinite(value):
        raise CheckpointError(
            f"the {what} of step {step} is not a number",
            hint="lower optim.lr; the checkpoints written so far are whole",
        )
    return value
