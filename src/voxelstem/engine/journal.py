"""One JSON line for each record of a run; the same numbers to TensorBoard where that is installed."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from voxelstem.errors import CheckpointError


class Journal:
    """Appends to `journal.jsonl`. On resume, lines of steps that are going to be run again are dropped first."""

    def __init__(self, run: Path, *, resume_at: int) -> None:
        """Open `run`/journal.jsonl; keep lines with step < `resume_at`.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        self.path = run / "journal.jsonl"
        kept = [line for line in read_journal(run) if line["step"] < resume_at]
        self._board: Any = None
        try:
            unfinished = run / ".journal.jsonl.unfinished"
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            unfinished.replace(self.path)
            # Unbuffered: what a full disk refused must not be tried once more when the file is closed.
            self._file = self.path.open("ab", buffering=0)
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_at)
        except OSError as error:
            raise _full(error) from error

    def append(self, record: Mapping[str, float | str]) -> None:
        """Write one record; it has a `step`, numbers and perhaps words.

        Raises:
            CheckpointError: the disk is full.
        """
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._board is not None:
                for name, value in record.items():
                    if name != "step" and not isinstance(value, str):
                        self._board.add_scalar(name, value, int(record["step"]))
        except OSError as error:
            raise _full(error) from error

    def __enter__(self) -> Journal:
        """For `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both files."""
        self._file.close()
        try:
            if self._board is not None:
                self._board.close()
        except OSError as problem:
            raise _full(problem) from problem


def _full(error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the run's journal cannot be written: {error.strerror}",
        hint="free some space and start the same command again; it resumes from the newest whole checkpoint",
    )


def read_journal(run: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a last line cut off by a kill is left out.

    Raises:
        CheckpointError: another line is damaged.
    """
    path = run / "journal.jsonl"
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [_parse(line, number) for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, number: int) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        int(record["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"line {number} of journal.jsonl is damaged",
            hint="delete this line: the journal only reports, a run resumes from its checkpoints",
        ) from error
    return record
