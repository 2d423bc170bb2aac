"""BIDS folders: what file names, tables and sidecars say of a scan beside its voxels.

Standard: Brain Imaging Data Structure 1.10, https://bids-specification.readthedocs.io: "Common principles" (entities,
inheritance), "Data summary files" (participants, sessions, scans).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from voxelstem.errors import ConfigError, IngestError
from voxelstem.sources import keep
from voxelstem.study import Acquisition, Study

NAME = re.compile(r"((?:[A-Za-z0-9]+-[A-Za-z0-9+]+_)+)([A-Za-z0-9]+)")
SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
DESCRIPTION = "dataset_description.json"
LABELS = ("mask", "dseg", "probseg", "defacemask", "roi")
"""Suffixes of files that hold an expert's or a program's regions."""
NOT_RAW = ("code", "derivatives", "phenotype", "sourcedata", "stimuli")
"""Folders at the top of a data set that hold no scans of it: what programs made, and what the scans were made from."""
NEAR_COPIES = ("desc", "den", "echo", "flip", "inv", "label", "mt", "part", "rec", "res", "space")
"""Entities in which images of one acquisition differ."""
IN_SECONDS = ("EchoTime", "InversionTime", "RepetitionTime")  # milliseconds in DICOM, whose words the facts use
ABSENT = ("", "n/a", "na", "nan", "none", "unknown")
YEARS = {
    **dict.fromkeys(["y", "yr", "year"], 1.0),
    **dict.fromkeys(["m", "mo", "month"], 1 / 12),
    **dict.fromkeys(["w", "wk", "week"], 7 / 365.25),
    **dict.fromkeys(["d", "day"], 1 / 365.25),
}
TOP_AGE = 89.0  # BIDS writes 89+ for everybody older
MOST_TABLE_BYTES, MOST_SIDECAR_BYTES = 64 * 2**20, 4 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """One row of participants.tsv."""

    age_years: float | None = None
    sex: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bids:
    """The tables of a data set, read once."""

    root: Path
    name: str = ""
    """What tells it from others, in which `sub-01` is somebody else: its DatasetDOI, else its Name."""
    people: Mapping[str, Person] = field(default_factory=dict)
    """By `sub-…`."""
    ages: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Age in years at a session, by `sub-…` and `ses-…`."""
    days: Mapping[str, str] = field(default_factory=dict)
    """`YYYY-MM-DD`, by a file's place below the root or by `sub-…/ses-…`."""


def read_dataset(root: Path) -> Bids | None:
    """Read the tables of the BIDS data set that a folder holds.

    Returns:
        None where the folder is none: no dataset_description.json, no participants.tsv, no folder `sub-…`.

    Raises:
        ConfigError: a table or a JSON file beside it is malformed; the message names a row, never what it says.
    """
    if not is_dataset(root):
        return None
    people: dict[str, Person] = {}
    table = root / "participants.tsv"
    described = _described(root / "participants.json")
    for row, cells in rows(table, "participant_id") if table.is_file() else ():
        subject = _prefixed("sub-", cells["participant_id"])
        if subject in people:
            raise _malformed(table, row, "names a participant for the second time")
        levels = {word: _level(told) for word, told in _part(_part(described, "sex"), "Levels").items()}
        said = cells.get("sex", "")
        people[subject] = Person(age_years=_age(table, row, cells, described), sex=keep.sex(levels.get(said, said)))
    ages: dict[tuple[str, str], float] = {}
    days: dict[str, str] = {}
    for table in sorted(root.glob("sub-*/sub-*_sessions.tsv")):
        described = _described(table.with_suffix(".json")) or _described(root / "sessions.json")
        for row, cells in rows(table, "session_id"):
            session = _prefixed("ses-", cells["session_id"])
            age = _age(table, row, cells, described)
            if age is not None:
                ages[table.parent.name, session] = age
            days[f"{table.parent.name}/{session}"] = _day(cells)
    for pattern in ("sub-*/sub-*_scans.tsv", "sub-*/ses-*/sub-*_scans.tsv"):
        for table in sorted(root.glob(pattern)):
            place = table.parent.relative_to(root).as_posix()
            days |= {f"{place}/{cells['filename']}": _day(cells) for _, cells in rows(table, "filename")}
    days = {place: day for place, day in days.items() if day}
    return Bids(root=root, name=_name(root), people=people, ages=ages, days=days)


def home(path: Path) -> str:
    """What tells the people of a file's data set from those of others, where `sub-01` is somebody else.

    Args:
        path: A file, or a folder with a DICOM series, of a subject `sub-…`.

    Returns:
        The Name in the dataset_description.json beside the `sub-…` folder, or beside a file in none; without a Name 16
        digits of what else it says. Below `derivatives` the data set around counts, or its `rawdata`. Else empty.

    Raises:
        ConfigError: the description is malformed.
    """
    above = Path(os.path.abspath(path)).parents
    made_from = [above[at + 1] for at, folder in enumerate(above) if folder.name == "derivatives"]
    beside = [folder.parent for folder in above if SUBJECT.fullmatch(folder.name)]
    around = [raw for folder in reversed(made_from) for raw in (folder, folder / "rawdata") if is_dataset(raw)]
    for folder in around[:1] or (*beside[:1], above[0]):
        try:
            found = (folder / DESCRIPTION).stat()
        except OSError:
            continue
        return _identity(folder / DESCRIPTION, found.st_mtime_ns, found.st_size)
    return ""


@lru_cache(maxsize=256)
def _identity(path: Path, _changed_ns: int, _size: int) -> str:
    described = _described(path)
    if isinstance(name := described.get("Name"), str) and name.strip():
        return " ".join(name.split())
    said = json.dumps(described, sort_keys=True).encode()
    return hashlib.sha256(said).hexdigest()[:16] if described else ""


def _name(root: Path) -> str:
    described = _described(root / DESCRIPTION)
    told = (described.get(field) for field in ("DatasetDOI", "Name"))
    return keep.short(next((text for text in told if isinstance(text, str) and text.strip()), ""))


def is_dataset(root: Path) -> bool:
    """Whether a folder is a BIDS data set: it has a description, a table of participants, or folders `sub-…`."""
    marks = (root / DESCRIPTION, root / "participants.tsv")
    return root.is_dir() and (any(mark.is_file() for mark in marks) or any(root.glob("sub-*/")))


def is_scan(relative: str) -> bool:
    """Whether a file of a BIDS data set can be one of its scans, by its place and name alone.

    >>> [is_scan(f"{p}.nii.gz") for p in ("sub-1/anat/sub-1_T1w", "derivatives/x/sub-1_T1w", "sub-1/anat/sub-1_mask")]
    [True, False, False]
    """
    return relative.split("/", maxsplit=1)[0] not in NOT_RAW and entities(relative)[1] not in LABELS


def entities(relative: str) -> tuple[dict[str, str], str]:
    """The entities and the suffix in a file's name; nothing and an empty word where it is no name of BIDS.

    >>> entities("sub-01/ses-2/anat/sub-01_ses-2_ce-gad_T1w.nii.gz")
    ({'sub': '01', 'ses': '2', 'ce': 'gad'}, 'T1w')
    """
    found = NAME.fullmatch(relative.rpartition("/")[2].partition(".")[0])
    if found is None or not found[1].startswith("sub-"):
        return {}, ""
    pairs = (part.partition("-") for part in found[1].rstrip("_").split("_"))
    return {key: value for key, _, value in pairs}, found[2]


def annotate(study: Study, relative: str, dataset: Bids | None) -> Study:
    """Add to a scan what its BIDS name, the tables and its sidecars say of session, age, sex and contrast.

    Args:
        study: As its reader made it.
        relative: Its place below the data set's root, with forward slashes.
        dataset: The tables, or None: then nothing changes.

    Returns:
        The study with `acquisition` filled in; unchanged where the name is none of BIDS.

    Raises:
        IngestError: `label-map` when the name is a mask's, `bad-sidecar` when a JSON file for this scan is damaged.
    """
    acquisition = said(relative, dataset)
    if acquisition is None:
        return study
    volumes = tuple(replace(volume, acquisition=acquisition) for volume in study.volumes)
    return replace(study, volumes=volumes)


def said(relative: str, dataset: Bids | None) -> Acquisition | None:
    """What the name, the tables and the sidecars say of a scan; None where the name is none of BIDS.

    Raises:
        IngestError: as `annotate`.
    """
    parts, suffix = entities(relative)
    if dataset is None or not suffix:
        return None
    if suffix in LABELS:
        raise IngestError(
            f"'_{suffix}' is a mask by its BIDS name, not a scan",
            code="label-map",
            hint="give masks with --labels, beside the scans",
        )
    return _acquisition(relative, parts, suffix, dataset)


def _acquisition(relative: str, parts: Mapping[str, str], suffix: str, dataset: Bids) -> Acquisition:
    subject, session = f"sub-{parts['sub']}", f"ses-{parts['ses']}" if "ses" in parts else ""
    person = dataset.people.get(subject, Person())
    visit = f"{subject}/{session}"
    named = [dataset.name] if dataset.name else []
    same = [f"{key}-{value}" for key, value in parts.items() if key not in NEAR_COPIES]
    sidecar = _sidecar(relative, parts, suffix, dataset.root)
    facts = {keyword: text for keyword in keep.FACTS if (text := _fact(keyword, sidecar.get(keyword)))}
    if "ce" in parts:
        facts["ContrastBolusAgent"] = keep.clean("ContrastBolusAgent", parts["ce"])
    day = keep.parse_day(str(sidecar.get("AcquisitionDateTime", "")))
    return Acquisition(
        study="_".join(filter(None, [*named, subject, session])),
        group="_".join([*named, *same, suffix]),
        session=parts.get("ses", ""),
        date=dataset.days.get(relative) or dataset.days.get(visit) or (day.isoformat() if day else ""),
        age_years=dataset.ages.get((subject, session), person.age_years),
        sex=person.sex,
        contrast="phase" if parts.get("part") == "phase" else suffix,
        facts=facts,
    )


def _fact(keyword: str, value: object) -> str:
    """A sidecar's value in DICOM's form and unit, as far as the keep-list lets it go on."""
    values: list[object] = list(value) if isinstance(value, list) else [value]
    factor = 1000 if keyword in IN_SECONDS else 1
    texts = [
        one if isinstance(one, str) else f"{one * factor:.8g}" for one in values if isinstance(one, str | int | float)
    ]
    if len(texts) != len(values):
        return ""
    text = "\\".join(texts)
    return keep.short(text) if keep.KEPT[keyword].act is keep.Act.HASH else keep.clean(keyword, text)


def _sidecar(relative: str, parts: Mapping[str, str], suffix: str, root: Path) -> dict[str, Any]:
    """All JSON files that speak of a scan; one in a lower folder, or with more entities, wins (inheritance)."""
    told: dict[str, Any] = {}
    folder = root
    for below in ("", *relative.split("/")[:-1]):
        folder = folder / below
        for path in sorted(folder.glob(f"*{suffix}.json"), key=lambda path: (path.name.count("_"), path.name)):
            named = path.name.partition(".")[0].split("_")
            if named[-1] == suffix and all(parts.get(key) == value for key, value in _pairs(named[:-1])):
                told |= _read_sidecar(path)
    return told


def _pairs(named: list[str]) -> Iterator[tuple[str, str]]:
    for one in named:
        key, _, value = one.partition("-")
        yield key, value


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        return _json(path)
    except ValueError as problem:
        raise IngestError(
            f"a JSON file that describes this scan cannot be used: {problem}",
            code="bad-sidecar",
            hint="mend the sidecar, or take it away where nothing of it is needed",
        ) from problem


def _described(path: Path) -> dict[str, Any]:
    """What a table's JSON file says of its columns; empty where there is none."""
    try:
        return _json(path) if path.is_file() else {}
    except ValueError as problem:
        raise ConfigError(
            f"{_kind(path)} cannot be used: {problem}",
            hint="mend it: it says which data set this is, or in which unit ages are",
        ) from problem


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_SIDECAR_BYTES:
            raise ValueError(f"it is larger than {MOST_SIDECAR_BYTES // 2**20} MiB")
        told = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise ValueError("it is not UTF-8") from problem
    except json.JSONDecodeError as problem:
        raise ValueError(f"it is no JSON from line {problem.lineno} on") from problem
    except (OSError, RecursionError) as problem:
        raise ValueError("it cannot be read") from problem
    if not isinstance(told, dict):
        raise ValueError("it holds no names with values")
    return told


def _part(described: object, name: str) -> dict[str, Any]:
    part = described.get(name) if isinstance(described, dict) else None
    return part if isinstance(part, dict) else {}


def _level(told: object) -> str:
    """What a code stands for; newer files put the word into an object."""
    return str(told.get("Description", "")) if isinstance(told, dict) else str(told)


def rows(table: Path, first: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row's number in a table of tabs, and its cells by column.

    Args:
        table: The file.
        first: The column that no row may leave empty.

    Raises:
        ConfigError: it is malformed; the message names a row, never what it says.
    """
    try:
        if table.stat().st_size > MOST_TABLE_BYTES:
            raise _malformed(table, 1, f"is part of more than {MOST_TABLE_BYTES // 2**20} MiB")
        lines = table.read_text(encoding="utf-8-sig").splitlines()
        parsed = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise _malformed(table, 1, "or a later one cannot be read as text in UTF-8") from problem
    header = [cell.strip() for cell in parsed[0]] if parsed else []
    if first not in header or len(set(header)) != len(header):
        raise _malformed(table, 1, f"must name each column once, and one of them '{first}'")
    for row, cells in enumerate(parsed[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise _malformed(table, row, f"has {len(cells)} cells for {len(header)} columns")
        named = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        if not named[first]:
            raise _malformed(table, row, f"has no '{first}'")
        yield row, named


def _malformed(table: Path, row: int, what: str) -> ConfigError:
    return ConfigError(f"row {row} of {_kind(table)} {what}", hint="mend the table, or take it away")


def _kind(path: Path) -> str:
    """The file's name without the subject's."""
    return path.name if not path.name.startswith("sub-") else f"a {path.name.rpartition('_')[2]}"


def _prefixed(prefix: str, label: str) -> str:
    return label if label.startswith(prefix) else prefix + label


def _day(cells: Mapping[str, str]) -> str:
    day = keep.parse_day(cells.get("acq_time", ""))
    return day.isoformat() if day else ""


def _age(table: Path, row: int, cells: Mapping[str, str], described: Mapping[str, Any]) -> float | None:
    try:
        return age_years(cells.get("age", ""), unit=str(_part(described, "age").get("Units", "")))
    except ValueError as problem:
        raise _malformed(table, row, f"has an age that is {problem}") from problem


def age_years(text: str, *, unit: str = "") -> float | None:
    """An age as tables write it: a number with or without its unit, `89+` for all above, or nothing.

    Args:
        text: The cell.
        unit: The column's unit, for cells without their own; years where neither says anything.

    Raises:
        ValueError: it is no age of a person.

    >>> age_years("34"), age_years("18", unit="months"), age_years("6 months"), age_years("89+"), age_years("n/a")
    (34.0, 1.5, 0.5, 90.0, None)
    """
    plain = text.strip().lower()
    if plain in ABSENT:
        return None
    found = re.fullmatch(r"(>?)\s*(\d{1,5}(?:\.\d+)?)\s*(\+?)\s*([a-z]*)\.?", plain, re.ASCII)
    word = (found[4] if found else "") or unit.strip().lower() or "year"
    factor = YEARS.get(word) or YEARS.get(word.rstrip("s"))
    if found is None or factor is None:
        raise ValueError("no number with a known unit")
    years = float(found[2]) * factor
    if (found[1] or found[3]) and years >= TOP_AGE:
        return TOP_AGE + 1
    if years > keep.OLDEST_YEARS:
        raise ValueError(f"above {keep.OLDEST_YEARS:g} years")
    return round(years, 2)
