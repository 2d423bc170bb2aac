"""FOMO's layout of brain MRI: `PT005_IXI/sub_12/ses_1/t1.nii.gz`, contrasts by file name, with tables above.

Llambias et al. 2025, arXiv 2506.14432 (FOMO60K, FOMO45K and FOMO300K; files of the first also lie without the folder
of their data set): scans of a session are co-registered and skull-stripped; tables are `participants.tsv`
(`dataset`, `participant_id`, `session_id`, `sex`, `age`, `group`) and, which is not read here, `mri_info.tsv`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from voxelstem.errors import IngestError
from voxelstem.sources import bids, keep
from voxelstem.sources.told import Told, acquisition, age, health
from voxelstem.study import Acquisition

PLACE = re.compile(
    r"(?:(?:^|.*/)(?P<dataset>[^/]+)/)?(?P<subject>sub_[^/]+)/(?P<session>ses_[^/]+)/(?P<name>[^/]+?)\.nii(?:\.gz)?"
)
DATASET = re.compile(r"PT\d+_.+", re.ASCII)
"""How FOMO names the folder of one of its data sets."""
TABLE = "participants.tsv"
CONTRASTS = {
    "t1": "T1w",
    "t1c": "T1w_ce",
    "t1ce": "T1w_ce",
    "t1w": "T1w",
    "t2": "T2w",
    "t2s": "T2starw",
    "t2star": "T2starw",
    "t2w": "T2w",
    "pd": "PDw",
    "pdw": "PDw",
    "mra": "angio",
}
"""What files are called, and BIDS's word for it; other words are taken as they are, in capitals."""
_RUN = re.compile(r"_\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What the table says of a person at a session, as far as it is read."""

    age_years: float | None = None
    sex: str = ""
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fomo:
    """A folder in FOMO's layout, and what its table says."""

    root: Path
    rows: Mapping[tuple[str, str, str], frozenset[Row]] = field(default_factory=dict)
    """By data set, subject and session; the first empty where the table does not name it. Several where rows differ."""
    flat: Mapping[tuple[str, str], frozenset[Row]] = field(default_factory=dict)
    """By subject and session, whichever data set the table names: for scans without the folder of their data set."""
    table: Path | None = None
    """The folder that the table lies in."""


def read_folder(root: Path) -> Fomo | None:
    """Read the table of a folder in FOMO's layout: the whole of it, one data set, a subject or a session.

    Returns:
        None for a folder of another kind.

    Raises:
        ConfigError: the table is malformed; the message names a row, never what it says.
    """
    top = Path(os.path.abspath(root))
    if not _is_fomo(top):
        return None
    # The whole may be four folders up, where a file is read by itself.
    tables = [folder / TABLE for folder in (top, *list(top.parents)[:4])]
    table = next((path for path in tables if path.is_file()), None)
    rows: dict[tuple[str, str, str], frozenset[Row]] = {}
    flat: dict[tuple[str, str], frozenset[Row]] = {}
    for _, cells in bids.rows(table, "participant_id") if table else ():
        dataset, who = cells.get("dataset", ""), (cells["participant_id"], cells.get("session_id", ""))
        row = Row(
            age_years=age(cells.get("age", "")),
            sex=keep.sex(cells.get("sex", "")),
            labels=tuple(health(cells.get("group")).items()),
        )
        rows[dataset, *who] = rows.get((dataset, *who), frozenset()) | {row}
        flat[who] = flat.get(who, frozenset()) | {row}
    return Fomo(root=top, rows=rows, flat=flat, table=table.parent if table else None)


def said(relative: str, dataset: object) -> Told | None:
    """What a file's place, its name and the table say of it; None for one of another layout.

    The same file gives the same subject whether the whole folder, its data set or its subject is ingested.

    Raises:
        IngestError: `table-conflict` when rows of the table that are meant for it say different things.
    """
    if not isinstance(dataset, Fomo):
        return None
    place = f"{dataset.root.as_posix()}/{relative}" if dataset.root.is_dir() else dataset.root.as_posix()
    found = PLACE.fullmatch(place)
    if found is None:
        return None
    named = found["dataset"] or ""
    # The folder above a subject is FOMO's data set, or where a site put everybody: both count from sub_1.
    person = (named,) if named else ()
    subject, session = found["subject"], found["session"]
    row = _row(dataset, Path(place).parents[2], subject, session)
    kind = _RUN.sub("", found["name"])
    facts = Acquisition(
        age_years=row.age_years,
        sex=row.sex,
        contrast=CONTRASTS.get(kind.lower(), kind.upper()),
    )
    who = (*person, subject)
    told = acquisition(who, session.removeprefix("ses_"), name=found["name"], facts=facts)
    return Told(subject="/".join(who), acquisition=told, labels=dict(row.labels))


def _row(dataset: Fomo, above: Path, subject: str, session: str) -> Row:
    """What the table says of a subject that lies in the folder `above`, at a session.

    A table beside the subjects speaks of them, whichever data sets it names: without their folders, ids differ.
    """
    found = dataset.rows.get((above.name, subject, session)) or dataset.rows.get(("", subject, session))
    if found is None and above == dataset.table:
        found = dataset.flat.get((subject, session))
    if found is not None and len(found) > 1:
        raise IngestError(
            f"{len(found)} rows of {TABLE} are meant for this scan and say different things of it",
            code="table-conflict",
            hint="keep the row that is true, or put the scans under the folder of their data set",
        )
    return next(iter(found)) if found else Row()


def _is_fomo(top: Path) -> bool:
    """Whether a folder is one of FOMO's four kinds, or a file lies in one."""
    if not top.is_dir():
        return PLACE.fullmatch(top.as_posix()) is not None
    if top.name.startswith("sub_"):
        return any(top.glob("ses_*/*.nii*"))
    if top.name.startswith("ses_") and top.parent.name.startswith("sub_"):
        return any(top.glob("*.nii*"))
    below = (top, *(folder for folder in top.glob("PT*_*/") if DATASET.fullmatch(folder.name)))
    return any(any(folder.glob("sub_*/ses_*/*.nii*")) for folder in below)
