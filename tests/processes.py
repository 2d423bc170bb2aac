"""Starts several processes that train together, as torchrun would, and brings back what a function gave in each.

def work(seed: int) -> float:
    return float(distributed.total(torch.tensor(seed)))

def test_it(tmp_path):
    assert run_together(work, 2, tmp_path, (3,)) == [6.0, 6.0]
"""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tests.processes import work; work(*sys.argv[1:])"


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process, and one thread for it."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    named = {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return dict(os.environ) | named


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_together(
    function: Callable[..., Any],
    count: int,
    tmp_path: Path,
    args: tuple[Any, ...] = (),
    *,
    join: bool = True,
    timeout_s: float = 240.0,
) -> list[Any]:
    """Call `function(*args)` in `count` fresh processes and return what each gave, by rank.

    `function` stands at the top of a test module. With `join` the processes form a group (gloo) around the call.

    Raises:
        AssertionError: one of them failed or took longer than `timeout_s`; the end of what they wrote is in it.
    """
    folder = tmp_path / f"together-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    (folder / "args").write_bytes(pickle.dumps(args))
    port, command = free_port(), [sys.executable, "-c", CHILD, str(ROOT)]
    asked = [function.__module__, function.__qualname__, str(folder), "join" if join else "alone"]
    children: list[subprocess.Popen[bytes]] = []
    for rank in range(count):
        with (folder / f"log-{rank}").open("wb") as log:
            children.append(
                subprocess.Popen([*command, *asked], env=environment(rank, count, port), stdout=log, stderr=log)
            )
    failed = _wait(children, time.monotonic() + timeout_s)
    if failed:
        logs = [f"-- rank {rank}:\n{(folder / f'log-{rank}').read_text()[-3000:]}" for rank in range(count)]
        raise AssertionError("\n".join([failed, *logs]))
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(count)]


def _wait(children: list[subprocess.Popen[bytes]], deadline: float) -> str:
    """Wait for all; when one fails or time is up, end the others and say which."""
    failed = ""
    while not failed and any(child.poll() is None for child in children):
        time.sleep(0.02)
        if time.monotonic() > deadline:
            failed = "the processes took too long"
        failed = failed or _first_failure(children)
    for child in children:
        child.kill()
        child.wait()
    return failed or _first_failure(children)


def _first_failure(children: list[subprocess.Popen[bytes]]) -> str:
    bad = [f"rank {rank} ended with {child.poll()}" for rank, child in enumerate(children) if child.poll()]
    return bad[0] if bad else ""


def work(module: str, name: str, folder: str, join: str) -> None:
    """Stand in a child: call the function and leave its result as a file."""
    import torch

    from voxelstem.distributed import joined

    torch.set_num_threads(1)
    function = getattr(importlib.import_module(module), name)
    args = pickle.loads((Path(folder) / "args").read_bytes())
    if join == "join":
        with joined(torch.device("cpu"), timeout_s=60.0):
            result = function(*args)
    else:
        result = function(*args)
    (Path(folder) / f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(result))
