from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_together
from torch.distributed.checkpoint.filesystem import FileSystem

from voxelstem.engine.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    check_checkpoint,
    checkpoints,
    read_checkpoint,
    resume,
    write_checkpoint,
)
from voxelstem.engine.journal import Journal, facts_of, read_journal
from voxelstem.engine.optim import OptimConfig, make_optimizer
from voxelstem.errors import CheckpointError

CONFIG = OptimConfig(lr=1e-2, warm_up=0.0)


class Trainee:
    """An objective with its optimiser, and steps that depend on the step's number only."""

    def __init__(self, make: Any, *, seed: int = 0, dim: int = 12) -> None:
        self.make, self.objective = make, make.objective(seed, dim=dim)
        self.optimizer = make_optimizer(self.objective, self.objective.learner.param_groups(), CONFIG)

    def train(self, start: int, stop: int) -> list[bytes]:
        losses = []
        for step in range(start, stop):
            loss = self.objective.step(self.make.batch(step), progress=0.0).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach().numpy().tobytes())
        return losses

    def write(self, folder: Path, step: int, keep: int = 2) -> Path:
        return write_checkpoint(folder, step, self.objective, self.optimizer, keep=keep)

    def resume(self, folder: Path) -> int:
        return resume(folder, self.objective, self.optimizer).step

    def state(self) -> list[torch.Tensor]:
        state = self.optimizer.state_dict()["state"]
        moments = [value for index in sorted(state) for _, value in sorted(state[index].items())]
        return copy.deepcopy([*self.objective.state_dict().values(), *moments])


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_weights_and_optimiser_come_back_to_the_last_bit(make, tmp_path: Path):
    one, other = Trainee(make), Trainee(make, seed=1)
    one.train(0, 3)
    path = one.write(tmp_path, 3)
    assert read_checkpoint(path, other.objective, other.optimizer).step == 3
    assert same(one.state(), other.state())


def test_three_steps_and_three_after_a_resume_equal_six(make, tmp_path: Path):
    whole, first, second = Trainee(make), Trainee(make), Trainee(make, seed=9)
    losses = whole.train(0, 6)
    assert first.train(0, 3) == losses[:3]
    first.write(tmp_path, 3)
    assert second.resume(tmp_path) == 3
    assert second.train(3, 6) == losses[3:]
    assert same(whole.state(), second.state())


def test_nothing_to_resume_from_is_step_zero(make, tmp_path: Path):
    trainee = Trainee(make)
    before = trainee.state()
    assert trainee.resume(tmp_path / "not there") == 0
    assert same(before, trainee.state())


def test_the_newest_are_kept_and_nothing_else_lies_there(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    for step in (1, 2, 3, 4, 5):
        trainee.write(tmp_path, step, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (3, 4, 5)]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_lies_in_it(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    path = trainee.write(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == [".metadata", "__0_0.distcp", "manifest.json"]
    manifest = check_checkpoint(path)
    assert (manifest["step"], manifest["processes"], manifest["torch"]) == (1, 1, torch.__version__)
    assert manifest["bytes"] == sum((path / name).stat().st_size for name in manifest["sha256"])
    # The folder's own path can hold a person's name.
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in path.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_newest_one_leaves_the_one_before(make, tmp_path: Path, file: str, damage: Callable[[Path], None]):
    trainee = Trainee(make)
    trainee.train(0, 2)
    before = trainee.state()
    trainee.write(tmp_path, 2)
    trainee.train(2, 4)
    path = trainee.write(tmp_path, 4) / file
    damage(path)
    other = Trainee(make, seed=1)
    assert other.resume(tmp_path) == 2
    assert same(before, other.state())
    # The step can be reached and written once more.
    other.train(2, 4)
    other.write(tmp_path, 4)
    assert Trainee(make, seed=2).resume(tmp_path) == 4


def test_when_all_are_damaged_it_says_so_and_does_not_start_anew(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    for step in (1, 2):
        flip(trainee.write(tmp_path, step) / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"step-00000002/__0_0.distcp is damaged"):
        trainee.resume(tmp_path)


def test_another_architecture_is_a_clear_error(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    trainee.write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another architecture") as caught:
        Trainee(make, dim=24).resume(tmp_path)
    assert "config.toml" in caught.value.hint


def test_another_architecture_is_not_passed_over_for_an_older_checkpoint(make, tmp_path: Path):
    for step, dim in ((1, 12), (2, 24)):
        trainee = Trainee(make, dim=dim)
        trainee.train(0, 1)
        trainee.write(tmp_path, step)
    with pytest.raises(CheckpointError, match="step-00000002 holds another architecture"):
        Trainee(make).resume(tmp_path)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("voxelstem")]


def test_going_back_before_a_step_takes_one_that_has_not_seen_it_and_drops_the_newer(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    for step in (2, 4, 6, 8):
        trainee.write(tmp_path, step, keep=4)
    # The checkpoint of 4 steps has seen steps 0 to 3.
    assert resume(tmp_path, trainee.objective, trainee.optimizer, before=4).step == 4
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    flip(tmp_path / "step-00000004" / "__0_0.distcp")
    assert resume(tmp_path, trainee.objective, trainee.optimizer, before=5).step == 2
    # Where all have seen it, the oldest is the best there is.
    shutil.rmtree(tmp_path / "step-00000004")
    trainee.write(tmp_path, 6)
    assert resume(tmp_path, trainee.objective, trainee.optimizer, before=1).step == 2
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def test_a_damaged_newest_one_is_told_once(make, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainee = Trainee(make)
    trainee.train(0, 1)
    for step in (2, 4, 6):
        trainee.write(tmp_path, step, keep=3)
    assert trainee.resume(tmp_path) == 6
    assert told(caplog) == []
    for step in (4, 6):
        flip(tmp_path / f"step-{step:08d}" / "__0_0.distcp")
    assert trainee.resume(tmp_path) == 2
    assert told(caplog) == ["checkpoint step-00000006 is damaged: resuming from step 2"]


def test_every_changed_letter_of_a_manifest_is_noticed_or_changes_nothing(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    with Checkpoints(tmp_path, keep=2) as written:
        written.save(1, trainee.objective, trainee.optimizer, {"skipped": [3, 5], "loss": 0.25})
    path = tmp_path / "step-00000001"
    before, text = check_checkpoint(path), (path / "manifest.json").read_bytes()
    noticed = 0
    for place in range(len(text)):
        (path / "manifest.json").write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        try:
            assert check_checkpoint(path) == before
        except CheckpointError:
            noticed += 1
    assert noticed > 0.8 * len(text)


def test_a_manifest_that_points_elsewhere_is_refused(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    path = trainee.write(tmp_path, 1)
    (tmp_path / "outside").write_bytes(b"1")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["self"]
    manifest["sha256"]["../outside"] = hashlib.sha256(b"1").hexdigest()
    manifest["self"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside is damaged"):
        check_checkpoint(path)


def test_facts_come_back(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    facts = {"watch": {"losses": [0.1, float("inf")], "skipped": []}, "seen": 3}
    with Checkpoints(tmp_path, keep=2) as written:
        written.save(1, trainee.objective, trainee.optimizer, facts)
    assert resume(tmp_path, trainee.objective, trainee.optimizer).facts == facts


def test_training_goes_on_while_the_state_of_before_is_written(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainee, moved_on = Trainee(make), threading.Event()
    trainee.train(0, 2)
    before = trainee.state()
    opened = FileSystem.create_stream

    def when_moved_on(system: FileSystem, path: Path, mode: str) -> Any:
        assert moved_on.wait(60)
        return opened(system, path, mode)

    monkeypatch.setattr(FileSystem, "create_stream", when_moved_on)
    with Checkpoints(tmp_path, keep=2) as written:
        written.save(2, trainee.objective, trainee.optimizer)
        trainee.train(2, 4)
        assert checkpoints(tmp_path) == []
        moved_on.set()
        written.wait()
        assert len(checkpoints(tmp_path)) == 1
    other = Trainee(make, seed=1)
    other.resume(tmp_path)
    assert same(before, other.state())


def test_a_failure_in_the_thread_is_told_once_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = Checkpoints(tmp_path, keep=2)
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, 3, full)
        written.save(1, *linear())
        with pytest.raises(CheckpointError, match=r"step-00000001 .* No space left on device"):
            written.save(2, *linear())
    written.save(3, *linear())
    written.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_run_that_ends_by_an_error_ends_by_that_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def run() -> None:
        with Checkpoints(tmp_path, keep=2) as written, pytest.MonkeyPatch.context() as patch:
            Faults(patch, 3, full)
            written.save(1, *linear())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    # Unless the disk was quicker than the thread: then it was written.
    assert checkpoints(tmp_path) or "No space left on device" in caplog.text


def test_what_the_optimiser_never_touched_has_no_moments_after_a_resume(tmp_path: Path):
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        objective = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
        return objective, torch.optim.AdamW(objective.parameters())

    objective, optimizer = make()
    objective["used"](torch.ones(2)).sum().backward()
    optimizer.step()
    write_checkpoint(tmp_path, 1, objective, optimizer, keep=2)
    other, its_optimizer = make()
    resume(tmp_path, other, its_optimizer)
    touched = [its_optimizer.state[parameter] for parameter in other["used"].parameters()]
    assert all(float(state["step"]) == 1 and state["exp_avg"].abs().sum() > 0 for state in touched)
    assert not any(its_optimizer.state.get(parameter) for parameter in other["unused"].parameters())


def test_fewer_than_two_kept_are_refused():
    with pytest.raises(ValueError, match="keep >= 2"):
        CheckpointConfig(keep=1)


def linear() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A training of one number, after one step."""
    torch.manual_seed(0)
    objective = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(objective.parameters())
    objective(torch.ones(1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return objective, optimizer


class Stream:
    """A file that reports every write before it is done."""

    def __init__(self, file: Any, report: Callable[[], None]) -> None:
        self.file, self.report = file, report

    def write(self, data: Any) -> int:
        self.report()
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Faults:
    """Strikes at the n-th write, fsync, rename, mkdir or removal, whichever thread comes to it.

    Of the many small writes into one file every `stride`-th counts.
    """

    def __init__(self, patch: pytest.MonkeyPatch, n: int, strike: Callable[[], None], stride: int = 1) -> None:
        self.calls, self.n, self.strike = 0, n, strike
        self.writes, self.stride = 0, stride
        names = [(os, "fsync"), (os, "unlink"), (os, "rmdir")]
        names += [(Path, name) for name in ("rename", "mkdir", "write_text")]
        for owner, name in names:
            patch.setattr(owner, name, self.counting(getattr(owner, name)))
        opened = FileSystem.create_stream

        @contextmanager
        def create_stream(system: Any, path: Any, mode: str) -> Iterator[Any]:
            with opened(system, path, mode) as file:
                yield Stream(file, self.write)

        patch.setattr(FileSystem, "create_stream", create_stream)

    def write(self) -> None:
        self.writes += 1
        if self.writes % self.stride == 0:
            self.count()

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.n:
            self.strike()

    def counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return real(*args, **kwargs)

        return call


def full() -> None:
    raise OSError(28, "No space left on device")


STRIDES = pytest.mark.parametrize("stride", [67, pytest.param(1, marks=pytest.mark.slow)])


@STRIDES
def test_whichever_call_fails_the_newest_whole_one_is_loaded(tmp_path: Path, stride: int):
    objective, optimizer = linear()
    problems: list[str] = []
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        for step in (1, 2):
            write_checkpoint(folder, step, objective, optimizer, keep=2)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, n, full, stride)
            try:
                write_checkpoint(folder, 3, objective, optimizer, keep=2)
            except CheckpointError as error:
                problems.append(error.problem)
        if faults.calls < n:
            break
        assert resume(folder, *linear()).step >= 2
        assert len(checkpoints(folder)) >= 2
        assert [path.name for path in folder.iterdir() if not path.name.startswith("step-")] == []
    assert len(problems) >= (12 if stride > 1 else 150)
    assert all("step-00000003" in problem and "No space left on device" in problem for problem in problems)


def kill_at_every(folder: Path, most: int, stride: int) -> int:
    """Stand in a process of its own: fork, write, and be killed at the 1st, 2nd, … call; how often it came to that."""
    linear()
    for n in range(1, most):
        child = os.fork()
        if not child:
            objective, optimizer = linear()
            Faults(pytest.MonkeyPatch(), n, lambda: os.kill(os.getpid(), signal.SIGKILL), stride)
            write_checkpoint(folder / str(n), 9, objective, optimizer, keep=2)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return n - 1
    raise AssertionError("it never came to the end")


@STRIDES
def test_wherever_the_process_is_killed_the_newest_whole_one_is_loaded(tmp_path: Path, stride: int):
    most = 400 if stride == 1 else 60
    for step in (4, 8):
        write_checkpoint(tmp_path / "1", step, *linear(), keep=2)
    for n in range(2, most):
        shutil.copytree(tmp_path / "1", tmp_path / str(n))
    (kills,) = run_together(kill_at_every, 1, tmp_path / "alone", (tmp_path, most, stride), join=False)
    assert kills >= (15 if stride > 1 else 150)
    reached = []
    for n in range(1, kills + 1):
        folder = tmp_path / str(n)
        assert len([path for path in folder.iterdir() if not path.name.startswith("step-")]) <= 1
        reached.append(resume(folder, *linear()).step)
        assert reached[-1] == (9 if (folder / "step-00000009").exists() else 8)
        # What is left over was swept away, and whatever counts as a checkpoint is one.
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        assert all(check_checkpoint(path) for path in checkpoints(folder))
    assert reached == sorted(reached)
    assert set(reached) == {8, 9}


def test_a_full_disk_is_a_clear_error_and_the_one_before_stays(tmp_path: Path):
    objective = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(objective.parameters())
    write_checkpoint(tmp_path, 1, objective, optimizer, keep=2)
    with at_most(4096), pytest.raises(CheckpointError, match="File too large") as caught:
        write_checkpoint(tmp_path, 2, objective, optimizer, keep=2)
    assert "step-00000002 (0.0 MB)" in caught.value.problem
    assert str(tmp_path) not in str(caught.value)
    assert resume(tmp_path, objective, optimizer).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the kernel refuses the rest, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


STEPS, EVERY = 400, 5


def run_to_the_end(run: Path) -> None:
    """A training as the loop does it, of one number: journal, checkpoints, resume."""
    objective, optimizer = linear()
    start = resume(run / "checkpoints", objective, optimizer)
    with Journal(run, resume_at=start.step) as journal, Checkpoints(run / "checkpoints", keep=2) as written:
        for step in range(start.step, STEPS):
            torch.manual_seed(step)
            loss = (objective(torch.randn(4, 1)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            journal.append({"step": step, "loss": float(loss.detach()), "seconds": time.monotonic()})
            if (step + 1) % EVERY == 0:
                written.save(step + 1, objective, optimizer)


def kill_at_random(run: Path, kills: int) -> list[int]:
    """Start the run again and again, each time killed at a random moment; which step each start went on from."""
    rng, starts = random.Random(0), []
    # What torch imports late is imported before the first fork, or a child would do little else.
    resume(write_checkpoint(run.parent / "warm", 1, *linear(), keep=2).parent, *linear())
    with Journal(run.parent / "warm", resume_at=0) as journal:
        journal.append({"step": 0, "loss": 0.0})
    for _ in range(kills):
        child = os.fork()
        if not child:
            run_to_the_end(run)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines, objective = read_journal(run) if (run / "journal.jsonl").exists() else [], linear()
        starts.append(resume(run / "checkpoints", *objective).step)
        reached = max((line["step"] + 1 for line in lines), default=0)
        # Steps of no time at all: a checkpoint takes longer to write than its interval, and the next one waits for it.
        assert starts[-1] >= reached - 2 * EVERY, (starts[-1], reached)
        if starts[-1] == STEPS:
            shutil.rmtree(run)  # it has come to its end: once more from the beginning
            run.mkdir()
    run_to_the_end(run)
    return starts


@pytest.mark.parametrize("kills", [2, pytest.param(120, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tmp_path: Path, kills: int):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_to_the_end(tmp_path / "one")
    (starts,) = run_together(kill_at_random, 1, tmp_path / "alone", (tmp_path / "two", kills), join=False)
    assert len(starts) == kills
    assert kills < 100 or len(set(starts)) > 20, starts  # they came in the middle of it
    assert facts_of(read_journal(tmp_path / "one")) == facts_of(read_journal(tmp_path / "two"))
    ends = [linear(), linear()]
    for name, end in zip(("one", "two"), ends, strict=True):
        assert resume(tmp_path / name / "checkpoints", *end).step == STEPS
    (one, its), (two, others) = ends
    assert torch.equal(one.weight, two.weight)
    assert all(torch.equal(value, its.state[one.weight][name]) for name, value in others.state[two.weight].items())
