from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelstem.engine.checkpoint import CheckpointConfig, Resumed, checkpoints, resume
from voxelstem.engine.journal import facts_of, read_journal
from voxelstem.engine.loop import LoopConfig, Surroundings, train
from voxelstem.engine.optim import OptimConfig
from voxelstem.engine.parallel import ParallelConfig, Trainee
from voxelstem.engine.watch import WatchConfig
from voxelstem.errors import CheckpointError
from voxelstem.protocols import Batch, StepOutput

OPTIM = OptimConfig(lr=1e-2, warm_up=0.25)
WATCH = WatchConfig(skips=1, suspects=1, roll_backs=1)


def trainee(objective: Any) -> Trainee:
    return Trainee(objective, OPTIM, ParallelConfig(), device=torch.device("cpu"), precision="fp32")


def loop(
    make: Any,
    run: Path,
    objective: Any,
    *,
    start: Resumed | None = None,
    steps: int = 6,
    batch: Callable[[int], Batch] | None = None,
    notes: Callable[[], list[dict[str, Any]]] = list,
    back: Callable[[Resumed], None] = lambda _: None,
    **settings: Any,
) -> list[tuple[int, dict[str, Any]]]:
    shown: list[tuple[int, dict[str, Any]]] = []

    def batches(first: int) -> Generator[Batch, None, None]:
        yield from ((batch or make.batch)(step) for step in range(first, steps))

    options = {"checkpoint": CheckpointConfig(every=2), "watch": WATCH, "monitor_every": 3} | settings
    around = Surroundings(
        batches=batches,
        monitor=lambda: {"health": 1.0},
        show=lambda step, told: shown.append((step, dict(told))),
        names=lambda step: [f"scan {step}"],
        notes=notes,
        facts=lambda: {"seen": len(shown)},
        back=back,
    )
    one = objective if isinstance(objective, Trainee) else trainee(objective)
    config = LoopConfig(steps=steps, batch=2, optim=OPTIM, **options)
    train(one, around, run=run, start=start or Resumed(), config=config)
    return shown


def test_the_journal_has_a_line_for_every_step_and_one_for_the_end(make, run: Path):
    shown = loop(make, run, make.objective())
    lines = read_journal(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert all({"loss", "lr", "grad_norm", "seconds"} <= line.keys() for line in lines[:-1])
    assert [line["step"] for line in lines if "health" in line] == [0, 3, 6]
    assert [{"step": step} | told for step, told in shown] == lines[:-1]


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
    every = CheckpointConfig(every=100)
    loop(make, run, objective, steps=30, batch=lambda _: make.batch(0), checkpoint=every)
    losses = [line["loss"] for line in read_journal(run)[:-1]]
    assert losses[-1] < 0.95 * losses[0]


class Breaks(torch.nn.Module):
    """Passes everything on to an objective and spoils the steps on some batches, in the loss or in its gradient."""

    def __init__(self, objective: Any, seeds: set[int], how: str) -> None:
        super().__init__()
        self.objective, self.seeds, self.how = objective, seeds, how
        self.after: list[float] = []

    @property
    def learner(self) -> Any:
        return self.objective.learner

    def after_step(self, *, progress: float) -> None:
        self.after.append(progress)
        self.objective.after_step(progress=progress)

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        output = self.objective.step(batch, progress=progress)
        if batch.seed not in self.seeds:
            return output
        if self.how == "loss":
            return StepOutput(loss=output.loss * math.inf)
        # sqrt has an infinite slope at 0: the loss is a number, its gradient is none.
        return StepOutput(loss=output.loss + (output.loss - output.loss.detach()).clamp(min=0.0).sqrt())


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_a_number_is_left_out_as_if_it_had_never_been(make, run: Path, how: str):
    objective = Breaks(make.objective(), {3}, how)
    loop(make, run, objective)
    assert all(tensor.isfinite().all() for tensor in objective.state_dict().values())
    line = next(line for line in read_journal(run) if line["step"] == 3)
    assert line["skipped"] == f"the {how} is not a number"
    assert line["samples"] == ["scan 3"]
    assert len(objective.after) == 5


def test_what_goes_wrong_again_and_again_goes_back_and_round_those_steps(make, run: Path):
    objective = Breaks(make.objective(), {4, 5}, "loss")
    told: list[Resumed] = []
    loop(make, run, objective, steps=8, back=told.append)
    assert [(start.step, start.facts["seen"]) for start in told] == [(2, 2)]
    lines = read_journal(run)
    (back,) = [line for line in lines if "rolled_back_to" in line]
    # Steps 4 and 5 are bad; the one before them is left out too, so the run goes back to the checkpoint before it.
    assert back["rolled_back_to"] == 2
    assert back["excluded"] == [3, 4, 5]
    assert [line["step"] for line in lines if "skipped" in line] == [3, 4, 5]
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2, 6, 7]
    assert all(tensor.isfinite().all() for tensor in objective.state_dict().values())


def test_a_run_that_went_back_and_is_resumed_equals_one_that_was_not(make, tmp_path: Path):
    def trained(run: Path, *, stop: int | None) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        objective = Breaks(make.objective(), {4, 5}, "loss")
        count = itertools.count()

        def stopping(step: int) -> Batch:
            if next(count) == stop:
                raise KeyboardInterrupt
            return make.batch(step)

        run.mkdir()
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                loop(make, run, objective, steps=8, batch=stopping)
            objective = Breaks(make.objective(1), {4, 5}, "loss")
        one = trainee(objective)
        loop(make, run, one, steps=8, start=resume(run / "checkpoints", objective, one.optimizer))
        return facts_of(read_journal(run)), objective.state_dict()

    lines, state = trained(tmp_path / "whole", stop=None)
    for stop in (5, 7, 9):
        again, other = trained(tmp_path / str(stop), stop=stop)
        assert again == lines
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_without_a_checkpoint_to_go_back_to_the_run_ends(make, run: Path):
    with pytest.raises(CheckpointError, match="no checkpoint to go back to") as caught:
        loop(make, run, Breaks(make.objective(), {0, 1}, "loss"), checkpoint=CheckpointConfig(every=4))
    assert "optim.lr" in caught.value.hint


def test_a_run_that_keeps_going_wrong_ends_with_whole_checkpoints(make, run: Path):
    with pytest.raises(CheckpointError):
        loop(make, run, Breaks(make.objective(), set(range(3, 12)), "gradient"), steps=12)
    objective = make.objective(1)
    wrapped = Breaks(objective, set(), "loss")
    assert resume(run / "checkpoints", wrapped, trainee(wrapped).optimizer).step
    assert all(tensor.isfinite().all() for tensor in wrapped.state_dict().values())


def test_batches_that_end_too_soon_are_noticed(make, run: Path):
    around = Surroundings(batches=lambda _: (make.batch(step) for step in range(1)), monitor=dict, show=lambda *_: None)
    config = LoopConfig(steps=3, batch=2, optim=OPTIM, checkpoint=CheckpointConfig())
    with pytest.raises(ValueError, match="shorter"):
        train(trainee(make.objective()), around, run=run, start=Resumed(), config=config)


def test_what_the_loader_says_stands_before_the_step_at_which_it_said_it(make, run: Path):
    said = iter([[{"reader": "mmap"}], [], [{"quarantined": "0f", "reason": "cut off"}]])
    loop(make, run, make.objective(), steps=3, notes=lambda: next(said), checkpoint=CheckpointConfig(every=3))
    lines = read_journal(run)
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 2, 3]
    assert (lines[0]["reader"], lines[3]["quarantined"], "loss" in lines[4]) == ("mmap", "0f", True)


class Restless(torch.nn.Module):
    """Draws from torch's own generator, as a plug-in with dropout does."""

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective = objective

    @property
    def learner(self) -> Any:
        return self.objective.learner

    def after_step(self, *, progress: float) -> None:
        self.objective.after_step(progress=progress)

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        output = self.objective.step(batch, progress=progress)
        return StepOutput(loss=output.loss * (1 + torch.rand(())))


def test_what_a_plug_in_draws_from_torch_itself_comes_again_after_a_resume(make, tmp_path: Path):
    states: list[dict[str, torch.Tensor]] = []
    for name, first in (("whole", 6), ("halves", 4)):
        run = tmp_path / name
        run.mkdir()
        with torch.random.fork_rng(devices=[]):
            objective = Restless(make.objective())
            if first < 6:
                with pytest.raises(KeyboardInterrupt):
                    loop(make, run, objective, batch=lambda step: make.batch(step) if step < 4 else _stop())
                torch.manual_seed(99)
                objective = Restless(make.objective(1))
            one = trainee(objective)
            loop(make, run, one, start=resume(run / "checkpoints", objective, one.optimizer))
        states.append(objective.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def _stop() -> Batch:
    raise KeyboardInterrupt
