"""The cache of fetched weights: what came at the first fetch is recorded, and what lies there compared with that."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from voxelstem.card import digest
from voxelstem.errors import CheckpointError

RECORD = "fetched.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What was seen at the first fetch."""

    repo: str
    commit: str
    """Empty: the files were put there by hand."""
    files: dict[str, str]
    """SHA-256 of every file as it came, by name."""
    weights: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the card made from them, which in turn holds those of all tensors."""


def cache_home() -> Path:
    """Where fetched weights are kept: VOXELSTEM_CACHE, else `voxelstem` in the platform's cache folder."""
    if named := os.environ.get("VOXELSTEM_CACHE", ""):
        return Path(named).expanduser()
    match platform.system():
        case "Darwin":
            home = "~/Library/Caches"
        case "Windows":
            home = os.environ.get("LOCALAPPDATA", "") or "~/AppData/Local"
        case _:
            home = os.environ.get("XDG_CACHE_HOME", "") or "~/.cache"
    return Path(home).expanduser() / "voxelstem"


def compare(folder: Path, recorded: Mapping[str, str], *, name: str, place: Path) -> None:
    """Check that the files of `folder` are those that the record of `name`, kept in `place`, holds.

    Raises:
        CheckpointError: one is absent or has other bytes; all such are named, with both digests.
    """
    found = {file: digest(folder / file) if (folder / file).is_file() else "absent" for file in recorded}
    if odd := [file for file in recorded if found[file] != recorded[file]]:
        lines = [f"\n  {file}: sha256 {found[file]}, recorded {recorded[file]}" for file in odd]
        raise CheckpointError(
            f"files of '{name}' are not those of the first fetch, which {RECORD} records:{''.join(lines)}",
            hint="the copy here was damaged or the publisher put other bytes in its place. To fetch afresh and record "
            f"anew, remove {shown(place)}; results made before may then no longer be reproduced",
        )


def read_record(place: Path) -> Record | None:
    """The record in `place`, or None before the first fetch.

    Raises:
        CheckpointError: it is damaged.
    """
    path = place / RECORD
    if not path.is_file():
        return None
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        if not all(isinstance(value, dict) for value in (record.files, record.weights)):
            raise TypeError("not a record")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"the record of fetched weights is damaged ({RECORD})", hint=f"remove {shown(place)} and fetch again"
        ) from error
    return record


def write_record(place: Path, record: Record) -> None:
    """Write the record whole, or leave the old one."""
    draft = place / f".{RECORD}"
    draft.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    draft.replace(place / RECORD)


def shown(path: Path) -> str:
    """A path in our cache without the user's own folders."""
    home = "$VOXELSTEM_CACHE" if os.environ.get("VOXELSTEM_CACHE") else "voxelstem in your cache folder"
    return f"{home}/{path.relative_to(cache_home()).as_posix()}"
