"""Scan-level labels: a CSV file with one row a subject. Ids are hashed on reading; messages name the row."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from voxelstem.allowed import LONGEST_NAME
from voxelstem.errors import ConfigError
from voxelstem.store.subjects import pseudonym
from voxelstem.study import Survival

Kind = Literal["classify", "regress", "survive"]
Unknown = Literal["refused", "left_out"]
"""What becomes of labels of subjects without a scan: nothing is begun, or they are counted and left out."""
COLUMNS: dict[str, tuple[str, ...]] = {
    "classify": ("subject", "label"),
    "regress": ("subject", "value"),
    "survive": ("subject", "time", "event"),
}
FOLD = "fold"
"""A column that says who is held out together, if it is there."""
ROWS_NAMED = 5
"""So many rows a message names; the others it counts."""
_EVENTS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_YES, _NO = ("1", "yes", "true", "present", "positive"), ("0", "no", "false", "absent", "negative")
_UNKNOWN = ("", "-1", "nan", "na", "unknown", "uncertain")
_NOTHING = ("nan", "+nan", "-nan", "inf", "+inf", "-inf", "nat", "null", "<na>", "#n/a", "n/a")
"""What programs write where there is nothing: as a class it would be learned like any other."""
# As the OWASP page on CSV injection lists them, the wide forms too.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")

Label = str | float | Survival
Told = TypeVar("Told")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFile(Generic[Told]):
    """What a label file says, by the subjects' pseudonyms."""

    name: str
    labels: Mapping[str, Told]
    rows: Mapping[str, int]
    """The row that each was read from; row 1 names the columns."""
    folds: Mapping[str, int] = field(default_factory=dict)
    """Who is held out together, from 0 upwards; empty where the file does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched(Generic[Told]):
    """The labels of subjects that a store holds, and how many labels belong to nobody in it."""

    labels: Mapping[str, Told]
    folds: Mapping[str, int]
    left_out: int


def read_labels(path: Path, kind: Kind, key: bytes) -> LabelFile[Label]:
    """Read `labels.csv`: one label for each subject.

    Args:
        path: columns `subject,label` (classify), `subject,value` (regress) or `subject,time,event` (survive), and
            perhaps `fold`; other columns are ignored.
        kind: which of the three.
        key: the site key that the store was made with.

    Raises:
        ConfigError: no such file, a column is missing, a cell cannot be read or is a formula, a subject has two rows,
            a class is spelt in two ways, or folds are not numbered.
    """
    wanted = COLUMNS[kind]
    found = _Rows[Label](path)
    for row, cells in read_table(path, wanted, optional=(FOLD,)):
        found.add(row, pseudonym(cells["subject"], key), _label(cells, kind, row, path), cells.get(FOLD))
    _check_spellings(found)
    return found.file(f"{path.name} holds no labels", hint="below the line of column names, write one row a subject")


def read_findings(
    path: Path,
    key: bytes,
    named: Callable[[Sequence[str]], Mapping[str, str]],
    *,
    present: Sequence[str] = (),
    hint: str = "leave unknown ones empty",
) -> LabelFile[Mapping[str, bool]]:
    """Read a label file that says of many classes whether each is there: what nobody knows is not named.

    Cells say 1 or 0 (yes or no); empty or -1 means that nobody knows: Merlin's label files use -1 so.

    Args:
        path: columns `subject` and one for each class, and perhaps `fold`.
        key: the site key that the store was made with.
        named: gives of the columns' names those that count, each with the name of its class.
        present: words that say yes while all others say no; the usual ones if empty.
        hint: what to do about a cell that says neither.

    Raises:
        ConfigError: as `read_labels` and `named`, or nothing is said of any class.
    """
    found = _Rows[Mapping[str, bool]](path)
    columns: Mapping[str, str] = {}
    for row, cells in read_table(path, ("subject",), optional=(FOLD,)):
        if not columns:
            columns = named([name for name in cells if name not in ("subject", FOLD)])
            _check_names(columns.values(), path)
        told = {name: _yes(cells[column], present, f"{path.name}: row {row}", hint) for column, name in columns.items()}
        said = {name: bool(value) for name, value in told.items() if value is not None}
        found.add(row, pseudonym(cells["subject"], key), said, cells.get(FOLD))
    return found.file(f"{path.name} says nothing of any class", hint="write 1 or 0 below the name of a class")


def match(
    file: LabelFile[Told], subjects: Collection[str], *, others: Collection[str], scan: str, unknown: Unknown
) -> Matched[Told]:
    """Keep the labels of the `subjects` of a store.

    Args:
        file: The labels.
        subjects: Who has a scan that can be learned from.
        others: Who has scans of other kinds only.
        scan: What kind of scan is looked for, such as `CT`.
        unknown: Whether labels of anybody else are refused, or left out and counted.

    Raises:
        ConfigError: not one label belongs to one of the `subjects`; or one does not, and that is to be refused.
    """
    known, total = set(subjects), len(file.labels)
    kept = {subject: label for subject, label in file.labels.items() if subject in known}
    if not kept:
        raise ConfigError(
            f"none of the {total} labelled subjects is among the {len(known)} in the store",
            hint="the ids must be spelt as in the scans (in a BIDS data set `Name/sub-01`, by its "
            "dataset_description.json), and VOXELSTEM_KEY must name the key the store was made with",
        )
    strangers = [subject for subject in file.labels if subject not in known]
    if strangers and unknown == "refused":
        elsewhere = len(set(strangers) & set(others))
        raise ConfigError(
            f"{file.name}: {len(strangers)} of {total} labelled subjects have no {scan} scan in the store: "
            f"{_named(file.rows[subject] for subject in strangers)}"
            + (f"; {elsewhere} of them are in it with other scans" if elsewhere else ""),
            hint="spell the ids as in the scans, delete these rows, or ingest the scans; to learn from fewer subjects "
            "than were labelled, run `adapt` with unknown=left_out",
        )
    folds = {subject: fold for subject, fold in file.folds.items() if subject in kept}
    return Matched(labels=kept, folds=folds, left_out=len(strangers))


def says_many(path: Path) -> bool:
    """Whether a label file has columns of classes instead of one called `label`.

    Raises:
        ConfigError: it cannot be read.
    """
    names, _ = _read(path)
    return "subject" in names and "label" not in names and bool(set(names) - {"", "subject", FOLD})


def is_formula(text: str) -> bool:
    """Whether a spreadsheet would run a text instead of showing it; a number is none."""
    if not text.lstrip(" ").startswith(_FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def read_table(
    path: Path, columns: tuple[str, ...], *, optional: tuple[str, ...] = ()
) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file with a line of column names: each row's number in the file and its cells, blanks stripped.

    Args:
        path: The file.
        columns: Names that must be there, with no cell empty and none a formula.
        optional: Names of which the same is asked where they are there.

    Raises:
        ConfigError: no such file, not a text file, a column is missing, or two have one name; a cell of one is empty or
            a formula.
    """
    names, raw = _read(path)
    _check_columns(path, columns, names)
    wanted = (*columns, *(name for name in optional if name in names))
    for place, name in enumerate(names):
        if name and name in names[:place]:
            raise ConfigError(
                f"{path.name}: row 1 gives the columns {names.index(name) + 1} and {place + 1} one name",
                hint="keep one of them",
            )
    table: list[tuple[int, dict[str, str]]] = []
    for row, found in raw:
        cells = _strip(found, row, path)
        if not any(cells.values()):
            continue
        for name in wanted:
            if not cells[name]:
                raise ConfigError(f"{path.name}: row {row}: '{name}' is empty", hint="fill the cell or delete the row")
            if is_formula(str(found[name])):
                raise ConfigError(
                    f"{path.name}: row {row}: '{name}' begins like a formula, which spreadsheets would run",
                    hint="write it in words, such as `positive` for +",
                )
        table.append((row, cells))
    return table


def _read(path: Path) -> tuple[list[str], list[tuple[int, Mapping[str | None, str | list[str]]]]]:
    """The names in row 1, and the cells of every row as they are."""
    try:
        # Spreadsheets put a byte order mark in front; utf-8-sig takes it away.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="", strict=True)
            names = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = names
            return names, [(reader.line_num, cells) for cells in reader]
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file '{path.name}'", hint="check the path") from error
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}", hint="check its rights") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path.name} cannot be read as CSV: {error}", hint="save as CSV, UTF-8, commas") from error


class _Rows(Generic[Told]):
    """The rows of a label file, of which every subject may have one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels: dict[str, Told] = {}
        self.rows: dict[str, int] = {}
        self.folds: dict[str, int] = {}

    def add(self, row: int, subject: str, label: Told, fold: str | None) -> None:
        """Take a row.

        Raises:
            ConfigError: the subject has a row already, or the fold is no number from 0 upwards.
        """
        where = f"{self.path.name}: rows {self.rows.get(subject)} and {row}"
        if fold is not None and not (fold.isascii() and fold.isdecimal()):
            raise ConfigError(
                f"{self.path.name}: row {row}: '{FOLD}' must be a whole number from 0 upwards, got '{fold[:20]}'",
                hint="number the folds 0, 1, 2, or leave the column out: folds are then drawn",
            )
        if subject not in self.rows:
            self.labels[subject], self.rows[subject] = label, row
            self.folds |= {} if fold is None else {subject: int(fold)}
            return
        if fold is not None and int(fold) != self.folds[subject]:
            raise ConfigError(
                f"{where} put the same subject into the folds {self.folds[subject]} and {fold}",
                hint="keep one row for each subject: held out and learned from at once, it would be recognised",
            )
        if label != self.labels[subject]:
            raise ConfigError(f"{where} label the same subject differently", hint="keep one row for each subject")
        raise ConfigError(
            f"{where} say the same of the same subject",
            hint="keep one row for each subject; doubled rows often come from joining tables",
        )

    def file(self, nothing: str, *, hint: str) -> LabelFile[Told]:
        """All of them, without those that say nothing.

        Raises:
            ConfigError: there is `nothing`, or folds are not numbered from 0 without a gap.
        """
        labels = {subject: label for subject, label in self.labels.items() if label != {}}
        if not labels:
            raise ConfigError(nothing, hint=hint)
        numbers = sorted(set(self.folds.values()))
        if numbers and numbers != list(range(max(len(numbers), 2))):
            raise ConfigError(
                f"{self.path.name}: '{FOLD}' must number two folds or more from 0 without a gap, "
                f"it has {', '.join(map(str, numbers[:10]))}",
                hint="renumber them, or leave the column out: folds are then drawn",
            )
        return LabelFile(name=self.path.name, labels=labels, rows=self.rows, folds=self.folds)


def _check_spellings(found: _Rows[Label]) -> None:
    """See that no class is spelt in two ways, as `Yes` and `yes`, or `1` and `1.0`: it would become two classes."""
    first: dict[str | float, tuple[str, int]] = {}
    for subject, label in found.labels.items():
        if not isinstance(label, str):
            return
        row = found.rows[subject]
        spelt, before = first.setdefault(_sounds(label), (label, row))
        if spelt != label:
            raise ConfigError(
                f"{found.path.name}: rows {before} and {row} spell one class in two ways, '{spelt[:20]}' and "
                f"'{label[:20]}'",
                hint="spell it alike in all rows, or give two classes names that differ in more",
            )


def _sounds(name: str) -> str | float:
    """What a name says, however it is written."""
    try:
        return float(name)
    except ValueError:
        return " ".join(name.casefold().split())


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
            hint="name the columns in the first row, in small letters, and separate them by commas",
        )


def _label(cells: Mapping[str, str], kind: Kind, row: int, path: Path) -> Label:
    if kind == "classify":
        return _class_name(cells["label"], f"{path.name}: row {row}: 'label'")
    if kind == "regress":
        return _number(cells, "value", row, path)
    time = _number(cells, "time", row, path)
    event = _EVENTS.get(cells["event"].lower().removesuffix(".0"))  # as pandas writes it beside empty cells
    if time < 0 or event is None:
        name, wanted = ("time", "a number >= 0") if time < 0 else ("event", "0 or 1")
        raise ConfigError(
            f"{path.name}: row {row}: '{name}' must be {wanted}, got '{cells[name][:20]}'",
            hint="`time` counts from the scan on; `event` is 1 if it came at that time, 0 if not until then",
        )
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


def _class_name(name: str, where: str) -> str:
    """A name as findings, pages and DICOM can bear it."""
    if name.lower() in _NOTHING:
        raise ConfigError(f"{where} must name a class, got '{name}'", hint="delete rows without a label")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ConfigError(
            f"{where} must be one line of at most {LONGEST_NAME} printable characters",
            hint="give the class a short name",
        )
    return name


def _check_names(names: Iterable[str], path: Path) -> None:
    for name in names:
        if is_formula(name):
            raise ConfigError(
                f"{path.name}: row 1: the name of a column begins like a formula, which spreadsheets would run",
                hint="write it in words",
            )
        _class_name(name, f"{path.name}: row 1: the name of a class")


def _yes(cell: str, present: Sequence[str], where: str, hint: str) -> bool | None:
    said = cell.strip().lower().removesuffix(".0")
    if said in _UNKNOWN:
        return None
    if present:
        return said in [word.strip().lower().removesuffix(".0") for word in present]
    if said not in (*_YES, *_NO):
        raise ConfigError(f"{where}: '{cell[:20]}' is neither 1 nor 0", hint=hint)
    return said in _YES


def _named(rows: Iterable[int]) -> str:
    """Some rows by their numbers, and how many more there are."""
    numbers = sorted(rows)
    first = ", ".join(map(str, numbers[:ROWS_NAMED]))
    more = len(numbers) - ROWS_NAMED
    return f"row{'s' if len(numbers) > 1 else ''} {first}" + (f" and {more} more" if more > 0 else "")
