"""Scan-level labels: a CSV file with one row a subject. Ids are hashed on reading; messages name the row."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from voxelstem.errors import ConfigError
from voxelstem.store.subjects import pseudonym
from voxelstem.study import Survival

Kind = Literal["classify", "regress", "survive"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "classify": ("subject", "label"),
    "regress": ("subject", "value"),
    "survive": ("subject", "time", "event"),
}
_EVENTS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


Label = str | float | Survival


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """The labels of subjects that a store holds, and how many labels belong to nobody in it."""

    labels: Mapping[str, Label]
    missing: int


def read_labels(path: Path, kind: Kind, key: bytes) -> dict[str, Label]:
    """Read `labels.csv` and return a label for each subject's pseudonym.

    Args:
        path: columns `subject,label` (classify), `subject,value` (regress) or `subject,time,event` (survive);
            other columns are ignored.
        kind: which of the three.
        key: the site key that the store was made with.

    Raises:
        ConfigError: no such file, a column is missing, a cell cannot be read, or one subject has two labels.
    """
    labels: dict[str, Label] = {}
    rows: dict[str, int] = {}
    for row, cells in read_table(path, COLUMNS[kind]):
        label = _label(cells, kind, row, path)
        subject = pseudonym(cells["subject"], key)
        if labels.setdefault(subject, label) != label:
            raise ConfigError(
                f"{path.name}: rows {rows[subject]} and {row} label the same subject differently",
                hint="keep one row for each subject",
            )
        rows.setdefault(subject, row)
    if not labels:
        raise ConfigError(
            f"{path.name} holds no labels", hint="below the line of column names, write one row a subject"
        )
    return labels


def match(labels: Mapping[str, Label], subjects: Collection[str]) -> Matched:
    """Keep the labels of the `subjects` of a store and count the others.

    Raises:
        ConfigError: not one label belongs to a subject of the store.
    """
    known = set(subjects)
    kept = {subject: label for subject, label in labels.items() if subject in known}
    if not kept:
        raise ConfigError(
            f"none of the {len(labels)} labelled subjects is among the {len(known)} in the store",
            hint="the ids must be spelt as in the scans (in a BIDS data set `Name/sub-01`, by its "
            "dataset_description.json), and VOXELSTEM_KEY must name the key the store was made with",
        )
    return Matched(labels=kept, missing=len(labels) - len(kept))


def read_table(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file with a line of column names: each row's number in the file and its cells, blanks stripped.

    Raises:
        ConfigError: no such file, not a text file, or a column is missing or a cell of it empty.
    """
    try:
        # Spreadsheets put a byte order mark in front; utf-8-sig takes it away.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="", strict=True)
            names = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = names
            _check_columns(path, columns, names)
            table = [(reader.line_num, cells) for cells in reader]
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file '{path.name}'", hint="check the path") from error
    except OSError as error:
        raise ConfigError(
            f"{path.name} cannot be read: {error.strerror}", hint="check the path and its rights"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{path.name} cannot be read as CSV: {error}", hint="save it as CSV, UTF-8, commas"
        ) from error
    table = [(row, _strip(cells, row, path)) for row, cells in table]
    table = [(row, cells) for row, cells in table if any(cells.values())]
    for row, cells in table:
        empty = [name for name in columns if not cells[name]]
        if empty:
            raise ConfigError(f"{path.name}: row {row}: '{empty[0]}' is empty", hint="fill the cell or delete the row")
    return table


def _strip(cells: Mapping[str | None, str | list[str]], row: int, path: Path) -> dict[str, str]:
    surplus = [cell for cell in cells.get(None, ()) if cell.strip()]
    if surplus:
        raise ConfigError(
            f"{path.name}: row {row} has {len(cells) - 1 + len(surplus)} cells, row 1 names {len(cells) - 1}",
            hint="write decimals with a point, and put quotes round a text that holds a comma",
        )
    return {name: str(cell).strip() for name, cell in cells.items() if name is not None}


def _check_columns(path: Path, columns: tuple[str, ...], names: list[str]) -> None:
    if not set(columns) <= set(names):
        # With a wrong separator the whole line is one name, and a file without names shows a subject's id here.
        seen = ", ".join(names) if set(columns) & set(names) else f"{len(names)} unknown name(s)"
        raise ConfigError(
            f"{path.name}: row 1 must name the columns {','.join(columns)}; it has {seen}",
            hint="separate columns by commas and name them in the first row",
        )


def _label(cells: Mapping[str, str], kind: Kind, row: int, path: Path) -> Label:
    if kind == "classify":
        return cells["label"]
    if kind == "regress":
        return _number(cells, "value", row, path)
    time = _number(cells, "time", row, path)
    event = _EVENTS.get(cells["event"].lower().removesuffix(".0"))  # as pandas writes it beside empty cells
    if time < 0 or event is None:
        name, wanted = ("time", "a number >= 0") if time < 0 else ("event", "0 or 1")
        raise ConfigError(f"{path.name}: row {row}: '{name}' must be {wanted}, got '{cells[name][:20]}'")
    return Survival(time=time, event=event)


def _number(cells: Mapping[str, str], name: str, row: int, path: Path) -> float:
    try:
        number = float(cells[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"{path.name}: row {row}: '{name}' must be a number, got '{cells[name][:20]}'",
            hint="write decimals with a point; delete rows without a value",
        )
    return number
