from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelstem.engine.checkpoint import CheckpointConfig, checkpoints, read_checkpoint, resume, write_checkpoint
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
        return resume(folder, self.objective, self.optimizer)

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
    assert read_checkpoint(path, other.objective, other.optimizer) == 3
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


def test_no_pickle_is_written(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    names = sorted(path.name for path in trainee.write(tmp_path, 1).iterdir())
    assert names == ["manifest.json", "objective.safetensors", "optimizer.safetensors"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", ["objective.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_newest_one_leaves_the_one_before(make, tmp_path: Path, file: str, damage: Callable[[Path], None]):
    trainee = Trainee(make)
    trainee.train(0, 2)
    before = trainee.state()
    trainee.write(tmp_path, 2)
    trainee.train(2, 4)
    path = trainee.write(tmp_path, 4) / file
    if file == "manifest.json" and damage is flip:
        path.write_text(path.read_text().replace('"sha256"', '"sha257"'))
    else:
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
        flip(trainee.write(tmp_path, step) / "objective.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000002/objective.safetensors is damaged"):
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


def test_a_damaged_newest_one_is_told_once(make, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainee = Trainee(make)
    trainee.train(0, 1)
    for step in (2, 4, 6):
        trainee.write(tmp_path, step, keep=3)
    assert trainee.resume(tmp_path) == 6
    assert caplog.messages == []
    for step in (4, 6):
        flip(tmp_path / f"step-{step:08d}" / "objective.safetensors")
    assert trainee.resume(tmp_path) == 2
    assert caplog.messages == ["checkpoint step-00000006 is damaged: resuming from step 2"]


def test_files_that_claim_absurd_sizes_are_refused(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 1)
    path = trainee.write(tmp_path, 1)
    bomb = (2**63 - 1).to_bytes(8, "little") + b"{}"
    (path / "objective.safetensors").write_bytes(bomb)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["objective.safetensors"] = hashlib.sha256(bomb).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged"):
        trainee.resume(tmp_path)


def test_fewer_than_two_kept_are_refused():
    with pytest.raises(ValueError, match="keep >= 2"):
        CheckpointConfig(keep=1)


class Faults:
    """Makes the n-th call of fsync, rename, mkdir or write_text fail, as a disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.calls, self.n = 0, n
        for owner, name in [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text")]:
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))

    def failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.n:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call


def test_whichever_call_fails_the_newest_whole_one_is_loaded(make, tmp_path: Path):
    trainee = Trainee(make)
    trainee.train(0, 2)
    states = {2: trainee.state()}
    problems: list[str] = []
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        trainee.write(folder, 1)
        trainee.write(folder, 2)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, n)
            try:
                trainee.write(folder, 3)
            except CheckpointError as error:
                problems.append(error.problem)
        if faults.calls < n:
            break
        other = Trainee(make, seed=1)
        assert other.resume(folder) >= 2
        assert same(states[2], other.state())
        assert len(checkpoints(folder)) >= 2
        assert [path.name for path in folder.iterdir() if not path.name.startswith("step-")] == []
    assert len(problems) >= 8
    assert all("step-00000003" in problem and "No space left on device" in problem for problem in problems)


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
import torch
from voxelstem.engine.checkpoint import write_checkpoint
folder, n = Path(sys.argv[1]), int(sys.argv[2])
objective = torch.nn.Linear(3, 3)
optimizer = torch.optim.AdamW(objective.parameters())
calls = itertools.count(1)

def killing(real):
    def call(*args, **kwargs):
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

for owner, name in [(os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "rename"), (Path, "mkdir")]:
    setattr(owner, name, killing(getattr(owner, name)))
write_checkpoint(folder, 9, objective, optimizer, keep=2)
print("done", next(calls))
"""


def linear() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    objective = torch.nn.Linear(3, 3)
    return objective, torch.optim.AdamW(objective.parameters())


def test_wherever_the_process_is_killed_the_newest_whole_one_is_loaded(tmp_path: Path):
    # One interpreter that forks is much faster than one interpreter a kill.
    code = (
        "import os, sys\nimport torch, voxelstem.engine.checkpoint\n"
        "torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())\n"
        f"source = {KILLED!r}\n"
        "for n in range(1, 60):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        sys.argv = ['', os.path.join(sys.argv[1], str(n)), str(n)]\n"
        "        exec(source); sys.stdout.flush(); os._exit(0)\n"
        "    if os.waitpid(pid, 0)[1] == 0: break\n"
    )
    objective, optimizer = linear()
    for step in (4, 8):
        write_checkpoint(tmp_path / "1", step, objective, optimizer, keep=2)
    for n in range(2, 60):
        shutil.copytree(tmp_path / "1", tmp_path / str(n))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    kills = int(done.stdout.split()[1]) - 1
    assert kills >= 12
    for n in range(1, kills + 1):
        objective, optimizer = linear()
        folder = tmp_path / str(n)
        step = resume(folder, objective, optimizer)
        assert step == (9 if (folder / "step-00000009").exists() else 8)
        # What is left over was swept away, and whatever counts as a checkpoint is one.
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        assert [read_checkpoint(path, objective, optimizer) for path in checkpoints(folder)]


def test_a_full_disk_is_a_clear_error_and_the_one_before_stays(tmp_path: Path):
    objective, optimizer = torch.nn.Linear(100, 100), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    write_checkpoint(tmp_path, 1, objective, optimizer, keep=2)
    with at_most(4096), pytest.raises(CheckpointError, match="File too large") as caught:
        write_checkpoint(tmp_path, 2, objective, optimizer, keep=2)
    assert "step-00000002 (0.0 MB)" in caught.value.problem
    assert str(tmp_path) not in str(caught.value)
    assert resume(tmp_path, objective, optimizer) == 1
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
