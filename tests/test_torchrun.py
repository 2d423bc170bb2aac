"""Real runs under torchrun, whose processes are killed as a cluster kills them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from voxelstem.engine.journal import facts_of, read_journal
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym

pytestmark = pytest.mark.slow

STEPS = 12
SETTINGS = [
    f"steps={STEPS}",
    "precision=fp32",
    "device=cpu",
    "backbone.block.dim=24",
    "backbone.block.depth=2",
    "objective.projector.prototypes=32",
    "loader.batch=4",
    "checkpoint.every=4",
    "health.every=5",
    "health.blocks=4",
    "parallel.timeout_s=30",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun") / "store"
    store = Store.create(folder, fractions=Fractions(train=1.0, validation=0.0, test=0.0))
    for seed in range(4):
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(8.0, 8.0, 8.0)))
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32))))
    return folder


@contextmanager
def torchrun(store: Path, run: Path, *changes: str) -> Iterator[subprocess.Popen[bytes]]:
    """Two processes under an elastic agent that starts them again up to three times."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", "--monitor-interval", "0.2", "-m", "voxelstem"]
    command += ["pretrain", "tiny.dino", "--store", str(store), "--out", str(run), *SETTINGS, *changes]
    with (run.parent / f"{run.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def finish(process: subprocess.Popen[bytes], run: Path, timeout_s: float = 240) -> None:
    assert process.wait(timeout=timeout_s) == 0, (run.parent / f"{run.name}.log").read_text()[-4000:]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "journal.jsonl").exists() and any(line["step"] >= step for line in read_journal(run)):
            return
        time.sleep(0.05)
    raise AssertionError((run.parent / f"{run.name}.log").read_text()[-4000:])


def worker(process: subprocess.Popen[bytes], rank: int) -> int:
    """The process that the agent started as this rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(child) for child in children if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / "model.safetensors")


def same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    facts = [facts_of(read_journal(run)) for run in (one, other)]
    assert facts[0] == facts[1]
    assert [line["step"] for line in facts[0] if "loss" in line] == list(range(STEPS))


@pytest.fixture(scope="module")
def unhurt(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unhurt") / "run"
    with torchrun(store, run) as process:
        finish(process, run)
    return run


@pytest.mark.parametrize(("rank", "kind"), [(1, "ddp"), (0, "ddp"), (1, "fsdp")])
def test_a_killed_rank_restarts_with_the_same_result(rank: int, kind: str, store: Path, unhurt: Path, tmp_path: Path):
    run = tmp_path / "run"
    if kind == "fsdp":
        unhurt = tmp_path / "unhurt"
        with torchrun(store, unhurt, "parallel.kind=fsdp") as process:
            finish(process, unhurt)
    with torchrun(store, run, f"parallel.kind={kind}") as process:
        wait_for_step(run, 6, process)
        os.kill(worker(process, rank), signal.SIGKILL)
        finish(process, run)
    log = (tmp_path / "run.log").read_text()
    assert "exitcode: -9" in log
    assert "could not meet" not in log, "a restart was spent on the address of a process that is gone"
    same(run, unhurt)


def test_two_processes_end_where_one_ends(store: Path, unhurt: Path, tmp_path: Path):
    run = tmp_path / "alone"
    command = [sys.executable, "-m", "voxelstem", "pretrain", "tiny.dino", "--store", str(store), "--out", str(run)]
    subprocess.run([*command, *SETTINGS], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = ([line["loss"] for line in read_journal(path) if "loss" in line] for path in (run, unhurt))
    assert two == pytest.approx(one, abs=1e-4)
