"""How much memory the process may still take, where somebody set a limit, and how such a limit is set."""

from __future__ import annotations

import math
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from voxelstem.errors import IngestError

GIB = 1 << 30
LIBRARIES = 1 << 27
"""Pages of libraries that are resident only once they are used, beyond those that are when a limit is set."""
_FAILED = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a memory",
    "could not create a primitive",
    "bad_alloc",
)
"""What torch and the libraries below it say where memory was refused them."""


@contextmanager
def at_most(gib: float) -> Generator[None]:
    """Let the process hold no more memory than this while it lasts; what needs more raises MemoryError.

    Linux refuses what is written to and not shared (RLIMIT_DATA). Pages of files, libraries above all, are resident
    beside that: room for them is taken off, so that the resident size stays below the limit. 0 sets no limit; what
    torch says where there is no memory left becomes MemoryError all the same.
    """
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    if gib:
        wanted = max(int(gib * GIB) - _status("RssFile", "RssShmem") - LIBRARIES, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _FAILED):
            raise
        raise MemoryError from error
    finally:
        if gib:
            resource.setrlimit(resource.RLIMIT_DATA, (before, most))


def left_bytes() -> float:
    """How much more the process may take before memory is refused; infinity where no limit is set."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return math.inf if limit == resource.RLIM_INFINITY else max(float(limit - _status("VmData")), 0.0)


def check_room(need: float, gib: float) -> None:
    """Refuse at once what surely needs more bytes than are left; `gib` is the limit that was set, 0 without one.

    Raises:
        IngestError: `out-of-memory`.
    """
    if need > (left := left_bytes()):
        raise IngestError(
            f"it needs {need / GIB:.1f} GiB more, and of {allowed(gib)} {left / GIB:.1f} GiB are left",
            code="out-of-memory",
            hint="allow more memory, or crop the scan",
        )


def allowed(gib: float) -> str:
    """Whose limit of memory it is, in words."""
    return f"the {gib:g} GiB that --max-ram allows" if gib else "the memory there is here"


def _status(*names: str) -> int:
    """The sum of these sizes that the kernel tells of this process, in bytes; 0 where it tells none."""
    told = Path("/proc/self/status")
    lines = told.read_text().splitlines() if told.exists() else []
    held = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return sum(int(held[name].split()[0]) << 10 for name in names if name in held)
