"""One JSON line for each record of a run; the same numbers to TensorBoard where that is installed.

A record holds facts of the run, which a run that was interrupted and resumed has to the last bit like one that was
not, and what a clock said, which no two runs share. `facts_of` parts them.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from voxelstem import distributed
from voxelstem.errors import CheckpointError

CLOCK = ("seconds", "_s", "_gb", "kwh", "energy", "wait_share", "reader")
"""Endings of the names of what depends on the machine and the moment: times, rates, ways to read, energy, waiting."""


class Journal:
    """Appends to `journal.jsonl`. On resume, lines of steps that are going to be run again are dropped first.

    Of processes that train together number 0 writes, for the numbers are those of the whole batch; the others' journal
    takes records and keeps none.
    """

    def __init__(self, run: Path, *, resume_at: int) -> None:
        """Open `run`/journal.jsonl; keep lines with step < `resume_at`.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        self.path = run / "journal.jsonl"
        self._board: Any = None
        self._file: Any = None
        if distributed.here().rank == 0:
            self._open(resume_at)

    def _open(self, step: int) -> None:
        try:
            self._file = _keep(self.path.parent, before=step)
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step)
        except OSError as error:
            raise _full(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it has a `step`, numbers and perhaps words.

        Raises:
            CheckpointError: the disk is full.
        """
        if self._file is None:
            return
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._board is not None:
                for name, value in record.items():
                    if name != "step" and isinstance(value, int | float):
                        self._board.add_scalar(name, value, int(record["step"]))
        except OSError as error:
            raise _full(error) from error

    def rewind(self, step: int) -> None:
        """Drop the lines of this step and later ones: they are going to be run again.

        Raises:
            CheckpointError: the disk is full.
        """
        if self._file is None:
            return
        self._close()
        self._open(step)

    def __enter__(self) -> Journal:
        """For `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both files."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        try:
            if self._board is not None:
                self._board.close()
        except OSError as problem:
            raise _full(problem) from problem


def _keep(run: Path, *, before: int) -> Any:
    """Open the journal for more lines, without those of step `before` and later ones."""
    kept = [line for line in read_journal(run) if line["step"] < before]
    unfinished = run / ".journal.jsonl.unfinished"
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    unfinished.replace(run / "journal.jsonl")
    # Unbuffered: what a full disk refused must not be tried once more when the file is closed.
    return (run / "journal.jsonl").open("ab", buffering=0)


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


def is_clock(name: str) -> bool:
    """Whether a number of this name depends on the machine and the moment rather than on the run."""
    return name.endswith(CLOCK)


def facts_of(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records without what a clock said: the same for the same run, however often it was interrupted."""
    kept = [{name: value for name, value in record.items() if not is_clock(name)} for record in records]
    # Every start of a run says anew how it reads.
    return [record for record in kept if record.keys() > {"step"}]


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
