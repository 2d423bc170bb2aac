"""How answers, refusals and errors are said at a terminal, and the exit codes that go with them."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

DONE, WRONG, SOME_REFUSED, INTERRUPTED = 0, 2, 3, 130


@runtime_checkable
class Refusal(Protocol):
    """What a verb says of a scan that it did not take."""

    @property
    def relative(self) -> str:
        """Where the scan lies below the folder that was given."""
        ...

    @property
    def code(self) -> str:
        """The short reason that the ledger counts."""
        ...

    @property
    def reason(self) -> str:
        """The sentence."""
        ...


def answer(data: Any, text: str, *, as_json: bool) -> None:
    """Say a result on stdout."""
    sys.stdout.write((json.dumps(data, indent=2, default=str) if as_json else text) + "\n")


def tell(problem: str, hint: str) -> int:
    """Say on stderr what is wrong and what to do; return the exit code for it."""
    sys.stderr.write(f"error: {problem}\n" + (f"  hint: {hint}\n" if hint else ""))
    return WRONG


def explain(error: OSError) -> tuple[str, str]:
    """Turn what the system says into a cause and a next step."""
    name = f": '{Path(str(error.filename)).name}'" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full", "free some space and run the same command again: what was finished is kept"
        case errno.ENOENT:
            return f"no such file or folder{name}", "check the path"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"no permission{name}", "check who may read and write there"
        case _:
            return f"{error.strerror or error}{name}".lower(), ""


def refused(refusals: Iterable[Refusal]) -> list[str]:
    """One line a refused scan. It names the scan's place: the terminal belongs to whoever gave the scans."""
    return [f"refused ({line.code}) {line.relative}: {line.reason}" for line in refusals]


def listed(refusals: Iterable[Refusal]) -> list[dict[str, str]]:
    """The same as plain data."""
    return [{"scan": line.relative, "code": line.code, "reason": line.reason} for line in refusals]


def verdict(through: int, refusals: int, hint: str) -> int:
    """The exit code of a command that takes many scans: all refused is refused input, not a job half done."""
    if refusals and not through:
        return tell("nothing got in: every scan was refused", hint)
    return SOME_REFUSED if refusals else DONE
