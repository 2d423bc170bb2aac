from __future__ import annotations

import math
import mmap
import resource
import subprocess
import sys

import pytest

from voxelstem.room import GIB, LIBRARIES, at_most, left_bytes

TAKES_ALL = """
import sys
import numpy as np
from voxelstem.room import at_most, left_bytes

held = []
try:
    with at_most(0.75):
        while True:
            held.append(np.ones(1 << 21))  # 16 MiB, each of them written to
except MemoryError:
    pass
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(len(held), int(status["VmHWM"].split()[0]) * 1024)
"""


def test_without_a_limit_there_is_room_for_anything() -> None:
    assert left_bytes() == math.inf
    with at_most(0.0):
        assert left_bytes() == math.inf


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts so")
def test_a_limit_leaves_what_is_not_held_and_is_lifted_again() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with at_most(8.0):
        left = left_bytes()
        assert 0 < left < 8 * GIB - LIBRARIES
        # Not an array: malloc may give that out of what the process held and has set free.
        with mmap.mmap(-1, 1 << 28, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
            assert left - left_bytes() == pytest.approx(1 << 28, rel=0.1)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts so")
def test_who_takes_all_there_is_stays_below_the_limit_by_resident_size() -> None:
    done = subprocess.run([sys.executable, "-c", TAKES_ALL], capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count > 10
    assert 0.5 * GIB < peak <= 0.75 * GIB


@pytest.mark.parametrize(
    "words", ["DefaultCPUAllocator: can't allocate memory", "could not create a primitive", "not enough memory"]
)
def test_what_libraries_say_of_memory_is_told_as_such(words: str) -> None:
    def fail(said: str) -> None:
        raise RuntimeError(said)

    with pytest.raises(MemoryError), at_most(64.0):
        fail(words)
    with pytest.raises(MemoryError), at_most(0.0):  # memory may end without a limit too
        fail(words)
    with pytest.raises(RuntimeError, match="shapes"), at_most(64.0):
        fail("shapes differ")


def test_a_limit_below_what_is_held_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, resource.RLIM_INFINITY))
    assert left_bytes() == 0
