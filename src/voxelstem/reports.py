"""Reports in a file of their own (`.csv`, `.xlsx` or `.jsonl`): whose they are, and their sections."""

from __future__ import annotations

import datetime
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from voxelstem.errors import ConfigError
from voxelstem.sources import stem
from voxelstem.store.labels import read_table
from voxelstem.store.subjects import pseudonym
from voxelstem.study import Report

MOST_BYTES = 2 * 2**30
"""What a workbook may unpack to; 250,000 reports of 4,000 letters are half of it."""
_BETWEEN_CODES = re.compile(r"[;\n]")
Rows = Iterable[tuple[int, dict[str, str]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Which columns of a file say what. A text in several columns is joined in this order."""

    name: str
    scan: tuple[str, ...] = ()
    """Columns with the scan's path below SRC, or the name of its file."""
    subject: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    impression: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    technique: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()
    findings_rewrites: tuple[str, ...] = ()
    impression_rewrites: tuple[str, ...] = ()
    icd10: tuple[str, ...] = ()
    """Short descriptions of diagnoses; several in a cell are parted by `;` or a line's end."""
    whole: tuple[str, ...] = ()
    """Columns with a text whose sections stand under headings."""
    language: str = ""

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether a file with these columns has this layout."""
        known = set(columns)
        said = {*self.findings, *self.impression, *self.whole}
        return bool(known & {*self.scan, *self.subject}) and bool(known & said)


LAYOUTS = (
    # The numbered columns are rewrites, spelt as SPECTRE's tables spell them; one that is absent or empty is none.
    Layout(
        name="CT-RATE",
        scan=("VolumeName",),
        findings=("Findings_EN",),
        impression=("Impressions_EN",),
        history=("ClinicalInformation_EN",),
        technique=("Technique_EN",),
        findings_rewrites=("Findings_EN_1", "Findings_EN_2", "Findings_EN_3"),
        impression_rewrites=("Impressions_EN_1", "Impressions_EN_2", "Impressions_EN_3"),
        language="en",
    ),
    # Its column of findings holds the whole report, with headings. The `_EN` columns are those of its derivatives.
    Layout(
        name="Merlin",
        scan=("study id",),
        findings=("Findings_EN",),
        impression=("Impressions_EN",),
        whole=("Findings",),
        findings_rewrites=("Findings_EN_1", "Findings_EN_2", "Findings_EN_3"),
        impression_rewrites=("Impressions_EN_1", "Impressions_EN_2", "Impressions_EN_3"),
        icd10=("FULL ICD10 Cleaned",),
        language="en",
    ),
    Layout(
        name="voxelstem",
        scan=("scan",),
        subject=("subject",),
        findings=("findings",),
        impression=("impression",),
        history=("history",),
        technique=("technique",),
        rest=("rest",),
        whole=("report",),
        findings_rewrites=("findings_rewrites",),
        impression_rewrites=("impression_rewrites",),
        icd10=("icd10",),
    ),
)
"""Known by their columns; the first that fits is taken."""

# Headings as radiologists write them, in the four languages that the sections are known in.
HEADINGS = {
    "findings_text": ("findings", "finding", "befund", "befunde", "bevindingen", "verslag", "résultats", "resultats"),
    "impression_text": (
        *("impression", "impressions", "conclusion", "conclusions", "opinion", "summary"),
        *("beurteilung", "zusammenfassung", "conclusie", "synthèse"),
    ),
    "history_text": (
        *("history", "clinical history", "clinical information", "indication", "clinical indication"),
        *("reason for exam", "reason for examination", "anamnese", "klinische angaben", "indikation", "fragestellung"),
        *("klinische gegevens", "indicatie", "vraagstelling", "renseignements cliniques", "antécédents"),
    ),
    "technique_text": ("technique", "protocol", "technik", "untersuchungstechnik", "techniek", "protocole"),
    "rest_text": (
        *("comparison", "procedure", "exam", "examination", "study"),
        *("vergleich", "voruntersuchung", "vergelijking", "comparaison", "examen"),
    ),
}
_SECTION = {heading: section for section, headings in HEADINGS.items() for heading in headings}
_WORDS = "|".join(sorted(map(re.escape, _SECTION), key=len, reverse=True))
# With a colon at the start of a line or sentence, or alone on a line.
_HEADING = re.compile(
    rf"(?:^|(?<=[.;?!]))[ \t]*(?P<said>{_WORDS})[ \t]*:|^[ \t]*(?P<alone>{_WORDS})[ \t]*$", re.IGNORECASE | re.MULTILINE
)


def sections(text: str) -> Report:
    """Part a report at its headings, which stand at the start of a line or sentence and end with a colon.

    Text before the first heading, and under headings of no section of its own such as "Comparison", is the rest.
    """
    marks = list(_HEADING.finditer(text))
    parts: dict[str, list[str]] = {name: [] for name in HEADINGS}
    parts["rest_text"].append(text[: marks[0].start() if marks else len(text)].strip())
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=False):
        heading = mark["said"] or mark["alone"]
        section = _SECTION[heading.lower()]
        said = text[mark.end() : end].strip()
        parts[section].append(f"{heading}: {said}" if section == "rest_text" and said else said)
    joined = {name: "\n".join(filter(None, said)) for name, said in parts.items()}
    return replace(Report(), **joined)


@dataclass(kw_only=True, slots=True)
class Reports:
    """Reports, and which of them found a scan."""

    by_scan: dict[str, Report] = field(default_factory=dict)
    """By path below SRC, or by the name of the scan's file."""
    by_subject: dict[str, Report] = field(default_factory=dict)
    ambiguous: frozenset[str] = frozenset()
    """Names of files that several scans have."""
    empty: int = 0
    """Rows that say whose they are and nothing else; they are left out."""
    used: set[tuple[str, str]] = field(default_factory=set)

    @staticmethod
    def names(relative: str) -> tuple[str, ...]:
        """What a file may call the scan beside its path below SRC."""
        name = relative.rpartition("/")[2]
        return tuple(dict.fromkeys((name, stem(name))))

    def find(self, relative: str, subject: str) -> Report | None:
        """Return the report of a scan: by its path below SRC, by its file's name, else by its subject's pseudonym.

        The name counts only where one scan alone has it.
        """
        names = (name for name in self.names(relative) if name not in self.ambiguous)
        for kind, texts, place in (
            *(("scan", self.by_scan, place) for place in dict.fromkeys((relative, stem(relative), *names))),
            ("subject", self.by_subject, subject),
        ):
            if place in texts:
                self.used.add((kind, place))
                return texts[place]
        return None

    def unused(self) -> int:
        """Count the reports whose scan did not come by."""
        return len(self.by_scan) + len(self.by_subject) - len(self.used)


def read_reports(path: Path, key: bytes) -> Reports:
    """Read reports, one a row, from a `.csv`, `.xlsx` or `.jsonl` file.

    Known by their columns are CT-RATE's and Merlin's files, and ours: `scan` (path below SRC, or the file's name) or
    `subject` says whose report it is; the text stands in `report`, which is parted at its headings, or in `findings`,
    `impression`, `history`, `technique` and `rest`; `language`, `findings_rewrites`, `impression_rewrites` (a text, or
    a list in a .jsonl or as JSON in a cell) and `icd10` (parted by `;`) are kept. A row without a text is counted and
    left out. Texts are kept as they are: they must not name the patient.

    Raises:
        ConfigError: no such file, a row cannot be read, or no row has a text; the message names the row.
    """
    reports = Reports()
    layout: Layout | None = None
    first_empty = 0
    for row, cells in _rows(path):
        # One layout a table; the lines of a .jsonl may differ, so a line that lacks its columns is asked again.
        if layout is None or not layout.fits(cells):
            layout = _layout(path.name, row, cells)
        scan, subject = _first(layout.scan, cells), _first(layout.subject, cells)
        if not (scan or subject):
            raise ConfigError(f"{path.name}: row {row} does not say whose report it is", hint=_ROW)
        report = _report(layout, cells)
        if not report.text:
            reports.empty += 1
            first_empty = first_empty or row
            continue
        texts, whose = (reports.by_scan, scan) if scan else (reports.by_subject, pseudonym(subject, key))
        if texts.setdefault(whose, report) != report:
            raise ConfigError(
                f"{path.name}: row {row} gives another report to a scan or subject that has one already",
                hint="keep one row for each; for several scans of a subject, name the scans",
            )
    if layout is not None and first_empty and not (reports.by_scan or reports.by_subject):
        raise ConfigError(f"{path.name}: row {first_empty} has no text in {_named(layout)}, nor has any", hint=_ROW)
    return reports


_ROW = (
    'a row is {"scan" or "subject": …, "report": …} or {…, "findings": …, "impression": …} as JSON, the same names as '
    "columns of a table, or CT-RATE's or Merlin's columns"
)


def _rows(path: Path) -> Rows:
    match path.suffix.lower():
        case ".csv":
            return read_table(path, ())
        case ".xlsx":
            return _read_workbook(path)
        case _:
            return _read_lines(path)


def _layout(name: str, row: int, columns: Mapping[str, str]) -> Layout:
    for layout in LAYOUTS:
        if layout.fits(columns):
            return layout
    ours = LAYOUTS[-1]
    whose = set(columns) & {column for layout in LAYOUTS for column in (*layout.scan, *layout.subject)}
    lacks = f"has no text in {_named(ours)}" if whose else "does not say whose report it is"
    raise ConfigError(f"{name}: row {row} {lacks}", hint=_ROW)


def _named(layout: Layout) -> str:
    columns = [f"'{column}'" for column in (*layout.whole, *layout.findings, *layout.impression)]
    return ", ".join(columns[:-1]) + f" or {columns[-1]}"


def _first(columns: Iterable[str], cells: Mapping[str, str]) -> str:
    return next((cells[column].strip() for column in columns if cells.get(column, "").strip()), "")


def _join(columns: Iterable[str], cells: Mapping[str, str]) -> list[str]:
    return [cells[column].strip() for column in columns if cells.get(column, "").strip()]


def _report(layout: Layout, cells: Mapping[str, str]) -> Report:
    """Sections that have a column of their own win over those found in the whole text."""
    own = {name: "\n".join(_join(getattr(layout, name), cells)) for name in ("findings", "impression")}
    whole = sections("\n".join([] if all(own.values()) else _join(layout.whole, cells)))
    # A column called findings that has no headings holds findings, not the rest.
    bare = layout.name == "Merlin" and not (whole.findings_text or whole.impression_text)
    return Report(
        findings_text=own["findings"] or (whole.rest_text if bare else whole.findings_text),
        impression_text=own["impression"] or whole.impression_text,
        history_text="\n".join(_join(layout.history, cells)) or whole.history_text,
        technique_text="\n".join(_join(layout.technique, cells)) or whole.technique_text,
        rest_text="\n".join(filter(None, [*_join(layout.rest, cells), "" if bare else whole.rest_text])),
        findings_rewrites=_list(layout.findings_rewrites, cells),
        impression_rewrites=_list(layout.impression_rewrites, cells),
        icd10=_list(layout.icd10, cells, _BETWEEN_CODES),
        language=cells.get("language", "").strip().lower() or layout.language,
    )


def _list(columns: Iterable[str], cells: Mapping[str, str], between: re.Pattern[str] | None = None) -> tuple[str, ...]:
    """Texts of several columns, and of cells that hold a JSON list or are parted by `between`; each text once."""
    said: list[str] = []
    for cell in _join(columns, cells):
        listed = _unpacked(cell)
        said += listed if listed is not None else between.split(cell) if between else [cell]
    return tuple(dict.fromkeys(text.strip() for text in said if text.strip()))


def _unpacked(cell: str) -> list[str] | None:
    """What a cell holds that is a JSON list of texts, as the lines of a .jsonl bring it; None if it is no list."""
    try:
        told = json.loads(cell) if cell.startswith("[") else None
    except ValueError:
        return None
    return told if isinstance(told, list) and all(isinstance(text, str) for text in told) else None


def _read_lines(path: Path) -> Rows:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file '{path.name}'", hint="check the path after --reports") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} cannot be read as UTF-8 text", hint=_ROW) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            cells: Any = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path.name}: row {number} is not JSON", hint=_ROW) from error
        if not isinstance(cells, dict):
            raise ConfigError(f"{path.name}: row {number} is not a JSON object", hint=_ROW)
        # Numbers as ids are common: 7 and "7" are one subject.
        yield (
            number,
            {
                name: json.dumps(cell) if isinstance(cell, list) else str(cell)
                for name, cell in cells.items()
                if isinstance(cell, str | int | list)
            },
        )


def _plain(cell: object) -> str:
    """A cell as text; a date that was typed as an id as its day."""
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    return "" if cell is None else str(cell)


def _read_workbook(path: Path) -> Rows:
    """The first sheet of a workbook, whose first row names the columns."""
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise ConfigError(
            f"{path.name}: reading .xlsx needs openpyxl", hint="pip install 'voxelstem[reports]', or save it as CSV"
        ) from error
    if not path.is_file():
        raise ConfigError(f"there is no file '{path.name}'", hint="check the path after --reports")
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(member.file_size for member in packed.infolist())
        if size > MOST_BYTES:
            raise ConfigError(
                f"{path.name} declares {size / 2**30:.1f} GiB; at most {MOST_BYTES / 2**30:g} are read",
                hint="save it as CSV",
            )
        book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        rows = book.worksheets[0].iter_rows(values_only=True)
        names = ["" if name is None else str(name).strip() for name in next(rows, ())]
        for number, cells in enumerate(rows, start=2):
            told = {name: _plain(cell) for name, cell in zip(names, cells, strict=False) if name}
            if any(cell.strip() for cell in told.values()):
                yield number, told
    except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile, InvalidFileException) as error:
        raise ConfigError(f"{path.name} cannot be read as a workbook", hint="save it as .xlsx or .csv again") from error
