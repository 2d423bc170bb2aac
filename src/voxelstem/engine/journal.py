"""One JSON line for each record of a run; the same numbers to TensorBoard where that is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """Appends to `journal.jsonl`. On resume, lines of steps that are going to be run again are dropped first."""

    def __init__(self, run: Path, *, resume_at: int) -> None:
        """Open `run`/journal.jsonl; keep lines with step < `resume_at`."""
        self.path = run / "journal.jsonl"
        kept = [line for line in read_journal(run) if line["step"] < resume_at]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_at)

    def append(self, record: dict[str, float]) -> None:
        """Write one record; it has a `step`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(record["step"]))

    def __enter__(self) -> Journal:
        """For `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_journal(run: Path) -> list[dict[str, float]]:
    """All whole records of a run; a last line cut off by a kill is left out."""
    path = run / "journal.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records
