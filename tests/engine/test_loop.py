from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from voxelstem.engine.checkpoint import CheckpointConfig, checkpoints, resume
from voxelstem.engine.journal import read_journal
from voxelstem.engine.loop import LoopConfig, train
from voxelstem.engine.optim import OptimConfig, make_optimizer
from voxelstem.errors import CheckpointError
from voxelstem.protocols import Batch, StepOutput

OPTIM = OptimConfig(lr=1e-2, warm_up=0.25)


def loop(make, run: Path, objective: Any, *, start: int = 0, steps: int = 6, config: Any = None) -> list[str]:
    notes: list[str] = []
    train(
        objective,
        make_optimizer(objective, objective.learner.param_groups(), OPTIM),
        iter([make.batch(step) for step in range(start, steps)]),
        run=run,
        start=start,
        config=config
        or LoopConfig(
            steps=steps, optim=OPTIM, checkpoint=CheckpointConfig(every=2), precision="fp32", monitor_every=3
        ),
        monitor=lambda: {"health": 1.0},
        advance=lambda amount, note: notes.append(f"{amount} {note}"),
    )
    return notes


def test_the_journal_has_a_line_for_every_step_and_one_for_the_end(make, run: Path):
    notes = loop(make, run, make.objective())
    lines = read_journal(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert all({"loss", "lr", "grad_norm", "seconds"} <= line.keys() for line in lines[:-1])
    assert [line["step"] for line in lines if "health" in line] == [0, 3, 6]
    assert notes == [f"1 loss {line['loss']:.3f}" for line in lines[:-1]]


def test_checkpoints_come_every_so_often_and_at_the_end(make, run: Path):
    loop(make, run, make.objective(), steps=5)
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000004", "step-00000005"]


def test_the_rate_follows_the_schedule(make, run: Path):
    loop(make, run, make.objective(), steps=4)
    rates = [line["lr"] for line in read_journal(run)[:-1]]
    assert rates[0] == 0.0
    assert rates[1] == pytest.approx(OPTIM.lr)
    assert rates[1] > rates[2] > rates[3] > OPTIM.end_lr


def test_the_loss_falls_on_batches_that_repeat(make, run: Path):
    objective = make.objective()
    config = LoopConfig(steps=30, optim=OPTIM, checkpoint=CheckpointConfig(every=100), precision="fp32")
    train(
        objective,
        make_optimizer(objective, objective.learner.param_groups(), OPTIM),
        iter([make.batch(0)] * 30),
        run=run,
        start=0,
        config=config,
        monitor=dict,
        advance=lambda *_: None,
    )
    losses = [line["loss"] for line in read_journal(run)[:-1]]
    assert losses[-1] < 0.95 * losses[0]


class Breaks:
    """Passes everything on to an objective and spoils one step, in the loss or only in its gradient."""

    def __init__(self, objective: Any, step: int, how: str) -> None:
        self.objective, self.at, self.how, self.count = objective, step, how, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        output = self.objective.step(batch, progress=progress)
        self.count += 1
        if self.count - 1 != self.at:
            return output
        if self.how == "loss":
            return StepOutput(loss=output.loss * math.inf)
        # sqrt has an infinite slope at 0: the loss is a number, its gradient is none.
        return StepOutput(loss=output.loss + (output.loss - output.loss.detach()).clamp(min=0.0).sqrt())


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_what_is_not_a_number_stops_the_run_and_never_reaches_a_checkpoint(make, run: Path, how: str):
    with pytest.raises(CheckpointError, match=f"the {how} of step 3 is not a number"):
        loop(make, run, Breaks(make.objective(), 3, how))
    objective = make.objective(1)
    assert resume(run / "checkpoints", objective, make_optimizer(objective, objective.learner.param_groups(), OPTIM))
    assert all(tensor.isfinite().all() for tensor in objective.state_dict().values())
    assert [line["step"] for line in read_journal(run)] == [0, 1, 2]


def test_batches_that_end_too_soon_are_noticed(make, run: Path):
    objective = make.objective()
    config = LoopConfig(steps=3, optim=OPTIM, checkpoint=CheckpointConfig())
    with pytest.raises(ValueError, match="shorter"):
        train(
            objective,
            make_optimizer(objective, objective.learner.param_groups(), OPTIM),
            iter([make.batch(0)]),
            run=run,
            start=0,
            config=config,
            monitor=dict,
            advance=lambda *_: None,
        )


def test_what_the_loader_says_stands_before_the_step_at_which_it_said_it(make, run: Path):
    said = iter([[{"reader": "mmap"}], [], [{"quarantined": "0f", "reason": "cut off"}]])
    config = LoopConfig(
        steps=3,
        optim=OPTIM,
        checkpoint=CheckpointConfig(every=3),
        precision="fp32",
        monitor_every=3,
        notes=lambda: next(said),
    )
    loop(make, run, make.objective(), steps=3, config=config)
    lines = read_journal(run)
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 2, 3]
    assert (lines[0]["reader"], lines[3]["quarantined"], "loss" in lines[4]) == ("mmap", "0f", True)
