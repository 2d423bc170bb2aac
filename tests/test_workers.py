from __future__ import annotations

import _thread
import contextlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from voxelstem.errors import ConfigError, IngestError, VoxelstemError
from voxelstem.workers import Lost, Workers, ahead

FAULTS = """
import os, signal, sys, time
from pathlib import Path

def work(task):
    kind, _, path = task.partition(":")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)
    if kind == "leave":
        os._exit(3)
    if kind == "once" and not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "raise":
        raise KeyError(task)
    return kind.upper()

def pid(task):
    return os.getpid()

def pid_then_hang(task):
    if task == "hang":
        time.sleep(600)
    return os.getpid()

def allocate(count):
    return len(bytearray(count))

def unpicklable(task):
    return lambda: task

class StrangeError(Exception):
    def __init__(self, one, two):
        super().__init__("strange")

def strange(task):
    raise StrangeError(1, 2)
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory):
    # What travels by name must be importable on the other side, and tests are not.
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.py").write_text(FAULTS)
    sys.path.insert(0, str(folder))
    import faults  # pyright: ignore[reportMissingImports]

    yield faults
    sys.path.remove(str(folder))
    del sys.modules["faults"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_results_come_with_their_tasks_in_the_order_of_the_tasks(count: int):
    tasks = [3.0, 1.0, 2.0, 5.0, 4.0]
    with Workers(np.sqrt, count) as workers:
        assert list(workers.map(tasks)) == [(task, np.sqrt(task)) for task in tasks]
        assert list(workers.map([])) == []
        assert list(workers.map([9.0])) == [(9.0, 3.0)], "the same workers serve again"


def test_no_more_tasks_are_taken_than_the_look_ahead_says():
    taken = []

    def tasks():
        for task in range(20):
            taken.append(task)
            yield task

    with Workers(abs, 2) as workers:
        for task, _ in workers.map(tasks(), ahead=3):
            assert len(taken) <= task + 4


def test_a_process_that_dies_or_hangs_takes_only_its_own_task_with_it(faults, tmp_path: Path):
    tasks = ["a", "die", "b", "hang", f"once:{tmp_path / 'mark'}", "c", "leave", "d"]
    began = time.monotonic()
    with Workers(faults.work, 2, timeout_s=1.0) as workers:
        results = dict(workers.map(tasks))
    assert time.monotonic() - began < 60
    lost = {task: result.code for task, result in results.items() if isinstance(result, Lost)}
    assert lost == {"die": "worker-died", "hang": "worker-hung", "leave": "worker-died"}
    assert [results[task] for task in ("a", "b", tasks[4], "c", "d")] == ["A", "B", "ONCE", "C", "D"]
    assert results["die"].reason == "its process died, twice (signal 9: perhaps for want of memory)"
    assert results["leave"].reason == "its process died, twice (exit code 3)"
    assert results["hang"].reason == "its process did not finish within 1 seconds, twice"


def test_a_process_killed_while_it_rests_costs_no_task(faults):
    with Workers(faults.pid, 1) as workers:
        ((_, before),) = workers.map([0])
        os.kill(before, signal.SIGKILL)
        ((_, after),) = workers.map([0])
    assert before != after


def test_the_time_runs_for_each_task_and_not_while_waiting(faults):
    with Workers(faults.work, 1, timeout_s=1.0) as workers:
        results = []
        for _, result in workers.map(["a", "b", "c"]):
            results.append(result)
            time.sleep(1.2)
    assert results == ["A", "B", "C"]


@pytest.mark.parametrize("count", [0, 1])
def test_what_the_function_raises_comes_back_as_it_is(faults, count: int):
    with Workers(faults.work, count) as workers:
        results = workers.map(["a", "raise"])
        assert next(results) == ("a", "A")
        with pytest.raises(KeyError, match="raise") as caught:
            next(results)
        assert list(workers.map(["b"])) == [("b", "B")]
    assert not count or "in work" in caught.value.__notes__[0]


def test_our_errors_survive_the_journey_with_their_hint_and_code():
    error = pickle.loads(pickle.dumps(IngestError("cut short", code="corrupt", hint="copy it again")))
    assert (type(error), error.problem, error.code, error.hint) == (
        IngestError,
        "cut short",
        "corrupt",
        "copy it again",
    )
    assert str(error) == str(IngestError("cut short", code="corrupt", hint="copy it again"))
    assert isinstance(error, VoxelstemError)


def test_an_error_that_cannot_travel_comes_back_in_words(faults):
    with Workers(faults.strange, 1) as workers, pytest.raises(RuntimeError, match="StrangeError: strange"):
        list(workers.map([0]))


def test_a_result_that_cannot_travel_is_an_error_and_no_loss(faults):
    with Workers(faults.unpicklable, 1) as workers, pytest.raises((pickle.PicklingError, AttributeError)):
        list(workers.map([0]))


def test_memory_beyond_the_limit_is_a_memory_error_there_and_no_limit_here(faults):
    before = resource.getrlimit(resource.RLIMIT_AS)
    with Workers(faults.allocate, 1, memory_bytes=1 << 29) as workers:
        assert list(workers.map([1 << 20])) == [(1 << 20, 1 << 20)]
        with pytest.raises(MemoryError):
            list(workers.map([1 << 30]))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_libraries_over_there_use_one_thread_and_here_what_they_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with Workers(os.getenv, 1) as workers:
        assert dict(workers.map(["OMP_NUM_THREADS", "MKL_NUM_THREADS"])) == {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("wrong", [{"count": -1}, {"count": 1, "timeout_s": 0.0}])
def test_fewer_than_no_processes_and_no_time_are_refused(wrong):
    with pytest.raises(ValueError, match="count must be >= 0 and timeout_s > 0"):
        Workers(abs, **wrong)


def test_leaving_early_ends_every_process_at_once(faults):
    with Workers(faults.pid_then_hang, 2) as workers:
        pids = [pid for _, pid in workers.map(["", ""])]
        results = workers.map(["", "", "hang", "hang", "hang"], ahead=4)
        next(results)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_when_the_parent_is_interrupted_or_killed_no_process_stays(faults, tmp_path: Path, end: signal.Signals):
    code = f"""
import signal
import sys
sys.path.insert(0, {str(Path(faults.__file__).parent)!r})
import faults
from voxelstem.workers import Workers

if __name__ == "__main__":
    # Tests that a shell runs in the background hand on that interrupts are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Workers(faults.pid_then_hang, 2) as workers:
        for _, pid in workers.map(["", "", "", "", "hang", "hang"]):
            print(pid, flush=True)
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = {int(parent.stdout.readline()) for _ in range(4)}
        parent.send_signal(end)
        _, error = parent.communicate(timeout=120)  # a busy machine
    assert ("KeyboardInterrupt" in error) == (end == signal.SIGINT)
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_an_interrupt_that_wakes_nobody_is_seen_all_the_same(faults):
    # As a signal does that comes between the last look for signals and the wait for a result.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore interrupts
    try:
        with Workers(faults.pid_then_hang, 1) as workers:
            results = workers.map(["hang"])
            clock = threading.Timer(0.5, _thread.interrupt_main)
            clock.start()
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                next(results)
            assert time.monotonic() - began < 20
    finally:
        signal.signal(signal.SIGINT, before)


def test_workers_that_cannot_start_are_a_config_error_with_a_hint():
    # A script that reaches a process by standard input cannot be read again by its workers.
    code = (
        "from voxelstem.errors import ConfigError\nfrom voxelstem.workers import Workers\n"
        "try:\n    Workers(abs, 2).__enter__()\n"
        "except ConfigError as error:\n    raise SystemExit(7 if '__main__' in error.hint else 1)\n"
    )
    answer = subprocess.run([sys.executable], input=code, text=True, capture_output=True, check=False)
    assert answer.returncode == 7


def test_work_that_no_process_can_be_sent_is_refused_at_once():
    with pytest.raises((pickle.PicklingError, AttributeError)), Workers(lambda task: task, 1):
        pass


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_items_are_made_in_another_thread_and_never_too_far_ahead():
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            assert threading.current_thread() is not threading.main_thread()
            made.append(item)
            yield item

    with ahead(items(), 2) as found:
        for item in found:
            assert len(made) <= item + 1 + 2 + 2  # in use, in line, being made and being put
    assert made == list(range(20))


def test_what_a_maker_raises_comes_in_its_turn():
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    with ahead(items(), 4) as found:
        assert next(found) == 1
        with pytest.raises(KeyError, match="two"):
            next(found)


def test_it_begins_before_anybody_asks():
    begun = threading.Event()

    def items() -> Iterator[int]:
        begun.set()
        yield 1

    with ahead(items(), 1):
        assert begun.wait(10)


def test_who_stops_early_leaves_no_thread_behind():
    with ahead(iter(range(1000)), 1) as found:
        assert next(found) == 0
    with contextlib.suppress(ConfigError), ahead(iter(range(1000)), 1):
        raise ConfigError("before the first one was asked for")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
