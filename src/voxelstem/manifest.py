"""The folder of embeddings: how they were made (embed.json), and a table of them (manifest.csv) that many may write."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from voxelstem.distributed import Ranks
from voxelstem.errors import ConfigError
from voxelstem.whole import write_whole

__all__ = ["COLUMNS", "TABLE", "Row", "add_rows", "claim", "read_rows", "write_whole"]

MARK, TABLE = "embed.json", "manifest.csv"
COLUMNS = (
    "source",
    "key",
    "subject",
    "modality",
    "coverage",
    "weights",
    "code",
    "grid",
    "seen_mm",
    "spacing_mm",
    "effective_rank",
    "hu",
    "compute",
    "precision",
    "relative_error",
    "warnings",
    "stamp",
)
SECONDS_FOR_FIRST = 900.0
"""How long the other processes wait for the first to load the weights and claim the folder."""
SECONDS_UNTIL_STALE = 3600.0
"""After which a file that was never finished is nobody's."""
Row = dict[str, str]


def read_rows(out: Path) -> dict[str, Row]:
    """The table's rows by source; none where there is no table yet. Columns that an older table lacks are empty.

    Raises:
        ConfigError: it is no such table, or `out` is a file.
        OSError: it cannot be read.
    """
    empty = dict.fromkeys(COLUMNS, "")
    try:
        rows = list(csv.DictReader(io.StringIO((out / TABLE).read_text(encoding="utf-8")), restval=""))
        return {row["source"]: empty | row for row in rows}
    except FileNotFoundError:
        return {}
    except NotADirectoryError as error:
        raise _no_folder(out) from error
    except (ValueError, KeyError, csv.Error) as error:  # the first: what is no UTF-8
        raise ConfigError(
            f"{TABLE} in '{out.name}' is damaged",
            hint="remove that file and run again: embeddings that are whole are listed anew",
        ) from error


def add_rows(out: Path, rows: Sequence[Row]) -> None:
    """Add rows to the table; a source that was listed before gets its new row, the others keep theirs.

    Processes that write at once wait for each other, so the table is the same whoever comes last.

    Raises:
        OSError: it cannot be written.
    """
    if not rows:
        return
    with _alone(out):
        listed = read_rows(out) | {row["source"]: row for row in rows}
        table = io.StringIO()
        writer: csv.DictWriter[str] = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(listed[name] for name in sorted(listed))
        write_whole(out / TABLE, table.getvalue().encode())


@contextlib.contextmanager
def _alone(out: Path) -> Generator[None]:
    """Hold the folder's mark, which nobody replaces, until the block ends."""
    with (out / MARK).open("rb") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        yield


def claim(out: Path, settings: Mapping[str, Any], choose: Callable[[str], str], ranks: Ranks) -> str:
    """Tie a folder to one way of embedding: rows that cannot be compared must not lie side by side.

    Args:
        out: The folder; made where there is none.
        settings: What decides the numbers: weights, precision, spacing and so on. What an older mark does not name
            is taken to agree.
        choose: Gets the way through the network that the mark names, or "", and returns the one that is taken.
        ranks: Of several processes the first chooses, and the others do as it did.

    Returns:
        The name of the way through the network.

    Raises:
        ConfigError: the folder was made in another way, its mark is damaged, the first process never came, or `out` is
            a file.
        OSError: it cannot be written.
    """
    _make(out)
    mark = out / MARK
    if ranks.rank and not mark.exists():
        _wait(mark)
    claimed = _read(mark) if mark.exists() else None
    if claimed is not None:
        _compare(out, claimed, settings)
        return choose(str(claimed.get("compute", "")))
    name = choose("")
    draft = mark.with_name(f".{MARK}.{os.getpid()}")
    try:
        write_whole(draft, json.dumps({**settings, "compute": name}).encode())
        os.link(draft, mark)  # unlike rename, this fails where another process was faster
    except FileExistsError:
        claimed = _read(mark)
        _compare(out, claimed, settings)
        return choose(str(claimed.get("compute", "")))
    finally:
        draft.unlink(missing_ok=True)
    return name


def _make(out: Path) -> None:
    """Make the folder, and free it of what processes that were killed left half written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise _no_folder(out) from error
    for path in [*out.glob(".*.unfinished"), *out.glob(f".{MARK}.*")]:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            # No file takes an hour to write: whoever wrote this one is gone, be it on another machine.
            if time.time() - path.stat().st_mtime > SECONDS_UNTIL_STALE:
                path.unlink()


def _no_folder(out: Path) -> ConfigError:
    problem = f"'{out.name}' is a file, or lies below one: no folder can be made there"
    return ConfigError(problem, hint="choose another --out")


def _wait(mark: Path) -> None:
    until = time.monotonic() + SECONDS_FOR_FIRST
    while not mark.exists():
        if time.monotonic() > until:
            raise ConfigError(
                f"the first process did not begin within {SECONDS_FOR_FIRST:g} s",
                hint="see what it says; all processes must reach the same --out",
            )
        time.sleep(0.1)


def _read(mark: Path) -> dict[str, Any]:
    try:
        claimed = json.loads(mark.read_text(encoding="utf-8"))
        if not isinstance(claimed, dict):
            raise TypeError
    except (ValueError, TypeError) as error:  # also what is no UTF-8
        raise ConfigError(
            f"{MARK} in '{mark.parent.name}' is damaged, so nobody knows which weights made the embeddings",
            hint="choose another --out, or delete this folder and embed again",
        ) from error
    return claimed


def _compare(out: Path, claimed: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    # As JSON gives them back: a tuple has become a list.
    now: dict[str, Any] = json.loads(json.dumps(settings))
    others = [name for name, value in now.items() if claimed.get(name, value) != value]
    if others:
        raise ConfigError(
            f"'{out.name}' holds embeddings made with other settings: {', '.join(others)}", hint="choose another --out"
        )
