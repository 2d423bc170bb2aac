"""The only file that speaks Ray: the same work as `workers.Workers`, on the processes of many machines."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from voxelstem.errors import ConfigError
from voxelstem.workers import AHEAD_FOR_EACH_WORKER, ONE_THREAD, Lost

Task = TypeVar("Task")
Result = TypeVar("Result")
SECONDS_TO_ANSWER = 10.0
TRIES_AGAIN = 3
"""How often a task starts anew when its process or its machine dies under it."""


class Cluster(Generic[Task, Result]):
    """A Ray cluster that applies one function to tasks: `with Cluster(function, ADDRESS) as c: c.map(tasks)`.

    A task whose process or machine dies is started again elsewhere; one that kills `TRIES_AGAIN` + 1 processes, or
    takes longer than `timeout_s` once it is waited for, becomes `Lost`. Every machine needs voxelstem, and the tasks'
    files at the same paths. Ray asks nobody who they are: the cluster must be in a network that only you can reach.
    """

    def __init__(self, function: Callable[[Task], Result], address: str, *, timeout_s: float = 600.0) -> None:
        """Name the work and the cluster; it is joined by `with`.

        Args:
            function: What to do with a task; importable by name on every machine.
            address: `host:port` of Ray's head, `auto` for the one that runs on this machine, or `local` to start one
                for this process alone.
            timeout_s: Seconds that one task may take after all before it are done.
        """
        self.function, self.address, self.timeout_s = function, address, timeout_s

    def __enter__(self) -> Cluster[Task, Result]:
        """Join the cluster.

        Raises:
            ConfigError: Ray is not installed, or nobody answers at the address.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a hospital's machine tells nobody what it does
        try:
            import ray
        except ImportError as error:
            raise ConfigError("--cluster needs Ray", hint="pip install 'voxelstem[cluster]'") from error
        self._ray: Any = ray
        # Without the drivers's log, in which Ray repeats what other processes print.
        how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        how |= {"runtime_env": {"env_vars": ONE_THREAD}}
        how |= {"include_dashboard": False} if self.address == "local" else {"address": self.address}
        if "://" in self.address:
            raise ConfigError(
                f"'{self.address}' is an address for Ray's client, which voxelstem does not use",
                hint="give host:port of Ray's head, and run this on one of its machines",
            )
        try:
            _knock(self.address)
            ray.init(**how)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster answers at '{self.address}'",
                hint="start one with `ray start --head`, and give the address that it prints",
            ) from error
        self._call = ray.remote(max_retries=TRIES_AGAIN, num_cpus=1)(_apply)
        self._function = ray.put(self.function)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the cluster; what is still under way there is cancelled."""
        self._ray.shutdown()

    def map(self, tasks: Iterable[Task], *, ahead: int = 0) -> Iterator[tuple[Task, Result | Lost]]:
        """Work through the tasks and give each with its result, in the order of the tasks.

        Raises:
            Exception: whatever the function raised, when its task's turn comes.
        """
        waiting: deque[tuple[Task, Any]] = deque()
        for task in tasks:
            # Asked anew each time: machines may join and leave.
            while len(waiting) >= (ahead or AHEAD_FOR_EACH_WORKER * self._cores()):
                yield self._next(waiting)
            waiting.append((task, self._call.remote(self._function, task)))
        while waiting:
            yield self._next(waiting)

    def _cores(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def _next(self, waiting: deque[tuple[Task, Any]]) -> tuple[Task, Result | Lost]:
        task, promise = waiting.popleft()
        faults = self._ray.exceptions
        try:
            return task, self._ray.get(promise, timeout=self.timeout_s)
        except faults.GetTimeoutError:
            self._ray.cancel(promise, force=True)
            return task, Lost(code="worker-hung", reason=f"it took longer than {self.timeout_s:g} s")
        except faults.RayTaskError as error:
            raise error.cause from None
        except (faults.RaySystemError, faults.WorkerCrashedError, faults.NodeDiedError, faults.ObjectLostError):
            return task, Lost(code="worker-died", reason=f"the process that read it died {TRIES_AGAIN + 1} times")
        except faults.OutOfMemoryError:
            return task, Lost(code="worker-died", reason="its machine ran out of memory")


def _knock(address: str) -> None:
    """See whether anybody listens at `host:port`: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if colon:
        with socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_ANSWER):
            pass


def _apply(function: Callable[[Task], Result], task: Task) -> Result:
    return function(task)
