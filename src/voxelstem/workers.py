"""Processes that work through a list of tasks. One that dies or hangs is replaced and takes nothing else with it.

`ahead` is the thread that makes the next things while these are used.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from voxelstem.errors import ConfigError

Task = TypeVar("Task")
Result = TypeVar("Result")
Item = TypeVar("Item")
AHEAD_FOR_EACH_WORKER = 2
SECONDS_TO_START = 300.0
"""On a busy machine and a slow disk, importing a large library may take minutes."""
SECONDS_TO_SEE_AN_INTERRUPT = 1.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""As many processes as cores, each with as many threads as cores, would only stand in each other's way."""
_CONTEXT = multiprocessing.get_context("spawn")  # fork copies locks that other threads hold, and nobody unlocks them
_environment = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """A task that killed its process twice, or held it beyond its time. Names nobody."""

    code: str
    """`worker-died` or `worker-hung`."""
    reason: str


class Workers(Generic[Task, Result]):
    """Processes that apply one function to tasks: `with Workers(function, 4) as workers: workers.map(tasks)`.

    A process that dies (killed, out of memory, a fault in a library) or takes longer than `timeout_s` over a task is
    replaced and the task is tried once more in a fresh one: after a death while all others rest, since memory may
    have run out. A task that fails twice becomes `Lost`; the others go on.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        count: int,
        *,
        timeout_s: float = 600.0,
        memory_bytes: int | None = None,
    ) -> None:
        """Name the work; the processes are started by `with`.

        Args:
            function: What to do with a task. It is sent to the processes once, so it may hold settings, and must be
                importable by name there, as must the types of tasks and results.
            count: How many processes. 0 works in this one, where nothing can be timed, limited or survived.
            timeout_s: Seconds that one task may take.
            memory_bytes: Address space that a process may use; asking for more is a `MemoryError` in it.

        Raises:
            ValueError: a negative count, or no time at all.
        """
        if count < 0 or not timeout_s > 0:
            raise ValueError(f"count must be >= 0 and timeout_s > 0, got {count} and {timeout_s}")
        self.function, self.count, self.timeout_s, self.memory_bytes = function, count, timeout_s, memory_bytes
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._alive: set[_Worker] = set()
        self._turn = _Turn()
        self._lock = threading.Lock()
        self._stopped = False

    def __enter__(self) -> Workers[Task, Result]:
        """Start the processes.

        Raises:
            ConfigError: they cannot be started from here.
        """
        if self.count:
            try:
                fresh = [self._start() for _ in range(self.count)]
                for worker in fresh:
                    worker.greet()
                    self._idle.put(worker)
            except BaseException:
                self._stop()
                raise
            self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="worker")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End every process, whatever it does."""
        if self.count:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._stop()
            self._threads.shutdown()

    def map(self, tasks: Iterable[Task], *, ahead: int = 0) -> Iterator[tuple[Task, Result | Lost]]:
        """Work through the tasks and give each with its result, in the order of the tasks.

        Tasks are taken one by one in the caller's thread, never more than `ahead` before the one whose result is
        waited for (0: two for each process), and worked on also while the caller does something else.

        Raises:
            Exception: whatever the function raised, when its task's turn comes.
            ConfigError: a process that had to be replaced could not be started.
        """
        if not self.count:
            for task in tasks:
                yield task, self.function(task)
            return
        waiting: deque[tuple[Task, Future[Result | Lost]]] = deque()
        try:
            for task in tasks:
                if len(waiting) >= (ahead or AHEAD_FOR_EACH_WORKER * self.count):
                    first, future = waiting.popleft()
                    yield first, _result(future)
                waiting.append((task, self._threads.submit(self._do, task)))
            while waiting:
                first, future = waiting.popleft()
                yield first, _result(future)
        finally:
            for _, future in waiting:
                future.cancel()

    def _do(self, task: Task) -> Result | Lost:
        with self._turn.beside():
            answer = self._ask(task)
        if not isinstance(answer, Lost):
            return answer
        with self._turn.beside() if answer.code == "worker-hung" else self._turn.alone():
            return self._ask(task)

    def _ask(self, task: Task) -> Result | Lost:
        worker = self._idle.get()
        try:
            return worker.ask(task, self.timeout_s)
        finally:
            # There are as many workers to take as there are threads, also when a fresh one cannot be had.
            try:
                if not worker.usable and not self._stopped:
                    worker = self._replace(worker)
            finally:
                self._idle.put(worker)

    def _replace(self, worker: _Worker) -> _Worker:
        worker.end()
        with self._lock:
            self._alive.discard(worker)
        fresh = self._start()
        fresh.greet()
        return fresh

    def _start(self) -> _Worker:
        with self._lock:
            if self._stopped:
                raise ConfigError("the workers were stopped", hint="use them inside their `with` block")
            worker = _Worker(self.function, self.memory_bytes)
            self._alive.add(worker)
            return worker

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            alive = tuple(self._alive)
        for worker in alive:
            worker.end()


def _result(future: Future[Result]) -> Result:
    """Wait in short spells: a Ctrl-C that comes just before a wait begins is seen only after it."""
    while not future.done():
        wait([future], timeout=SECONDS_TO_SEE_AN_INTERRUPT)
    return future.result()


class _Worker:
    """One process, seen from here."""

    def __init__(self, function: Callable[[Any], Any], memory_bytes: int | None) -> None:
        self.usable = True
        self._hung = False
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, function, memory_bytes), daemon=True)
        with _environment:
            # Libraries read these when they are imported, which is before any line of ours runs over there.
            before = {name: os.environ.get(name) for name in ONE_THREAD}
            os.environ.update(ONE_THREAD)
            try:
                self._process.start()
            finally:
                for name, value in before.items():
                    if value is None:
                        del os.environ[name]
                    else:
                        os.environ[name] = value
        theirs.close()

    def greet(self) -> None:
        """Wait until it has started.

        Raises:
            ConfigError: it has not.
        """
        try:
            if self._pipe.poll(SECONDS_TO_START):
                self._pipe.recv_bytes()
                return
        except (EOFError, OSError):
            pass
        self.end()
        raise ConfigError(
            "worker processes cannot be started from here",
            hint='use one worker, or run this from a script below `if __name__ == "__main__":`',
        )

    def ask(self, task: Any, timeout_s: float) -> Any:
        """Have a task done; `Lost` if that cost the process.

        Raises:
            Exception: what the function raised.
        """
        packed = pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
        # A clock beside us: also a half-sent task or answer may block for ever.
        clock = threading.Timer(timeout_s, self._give_up)
        clock.daemon = True
        clock.start()
        try:
            self._pipe.send_bytes(packed)
            answer = self._pipe.recv_bytes()
        except (EOFError, OSError):
            self.usable = False
            return self._lost(timeout_s)
        finally:
            clock.cancel()
        good, value = pickle.loads(answer)
        if not good:
            raise value
        return value

    def _give_up(self) -> None:
        self._hung, self.usable = True, False
        self._process.kill()

    def _lost(self, timeout_s: float) -> Lost:
        if self._hung:
            return Lost(code="worker-hung", reason=f"its process did not finish within {timeout_s:g} seconds, twice")
        self._process.join()
        ended = self._process.exitcode or 0
        how = f"signal {-ended}" if ended < 0 else f"exit code {ended}"
        why = ": perhaps for want of memory" if ended == -signal.SIGKILL else ""
        return Lost(code="worker-died", reason=f"its process died, twice ({how}{why})")

    def end(self) -> None:
        """End it, whatever it does."""
        self.usable = False
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()


class _Turn:
    """Lets many run beside one another, or one alone. Who wants to be alone goes before those who come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._closed = False

    @contextmanager
    def beside(self) -> Generator[None, None, None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Generator[None, None, None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: self._running == 0)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


def _serve(pipe: Connection, function: Callable[[Any], Any], memory_bytes: int | None) -> None:
    """Answer task after task, until the other end is closed."""
    # Ctrl-C reaches every process of a terminal; the one that started this will end it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if memory_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    pipe.send_bytes(b"ready")
    while True:
        try:
            task = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        pipe.send_bytes(_answer(function, task))


def _answer(function: Callable[[Any], Any], task: bytes) -> bytes:
    try:
        return pickle.dumps((True, function(pickle.loads(task))), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever it is, it belongs to whoever asked, as it would without processes
        error.add_note("in a worker process:\n" + "".join(traceback.format_tb(error.__traceback__)))
        return _pack(error)


def _pack(error: Exception) -> bytes:
    try:
        packed = pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)
        pickle.loads(packed)
    except Exception:  # classes may fail in any way at being rebuilt
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return packed


def _leave_with_parent() -> None:
    """End also when the parent was killed and can end nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def ahead(items: Iterable[Item], depth: int) -> Generator[Iterator[Item]]:
    """Make items in a background thread from now on: `depth` wait in line and one more is being made.

    Leaving the block ends the thread after the item that it is at. Whatever making an item raised is raised by the
    iterator, in its turn.
    """
    ready: queue.Queue[Item | None] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Item | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            all(put(item) for item in items)
        finally:
            put(None)

    def give() -> Iterator[Item]:
        while (item := ready.get()) is not None:
            yield item
        made.result()

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        made = pool.submit(make)
        try:
            yield give()
        finally:
            closed.set()
