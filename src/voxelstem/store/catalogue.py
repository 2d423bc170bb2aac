"""The store's list of what it holds: one SQLite file. A row is written once the file it speaks of is safe on disk."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from voxelstem.errors import StoreError
from voxelstem.store.splits import Fractions, Split
from voxelstem.study import Provenance, Report

FORMAT_VERSION = 1
"""Raised when an older version of voxelstem could no longer read what a newer one writes."""
FILE_NAME = "catalogue.sqlite"
ROOM_FOR_A_LOG = 1 << 20
"""Bytes; with less free, a failing read or write of the catalogue is a full disk's fault."""
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE volumes (
    key TEXT PRIMARY KEY, voxels TEXT NOT NULL, subject TEXT NOT NULL, study TEXT NOT NULL, modality TEXT NOT NULL,
    shape TEXT NOT NULL, spacing TEXT NOT NULL, affine TEXT NOT NULL, body TEXT NOT NULL,
    dtype TEXT NOT NULL, slope REAL NOT NULL, intercept REAL NOT NULL,
    split TEXT NOT NULL, bytes INTEGER NOT NULL,
    label_key TEXT NOT NULL, label_bytes INTEGER NOT NULL, classes TEXT NOT NULL,
    labels TEXT NOT NULL, report TEXT, provenance TEXT NOT NULL, ingested TEXT NOT NULL
);
CREATE INDEX volumes_by_voxels ON volumes (voxels);
CREATE TABLE refusals (source TEXT PRIMARY KEY, code TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE sources (source TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, keys TEXT NOT NULL);
"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Record:
    """What the catalogue knows of one volume, without touching its voxels."""

    key: str
    """SHA-256 of the volume's content; also its file's name."""
    voxels: str
    """SHA-256 of the voxel values alone: equal for two copies of a scan whose headers differ."""
    subject: str
    """A pseudonym, see `store.subjects`."""
    study: str
    """Volumes of one examination share this."""
    modality: str
    channels: int
    shape_ijk: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine_ras: Float[np.ndarray, "4 4"]
    body_start_ijk: tuple[int, int, int]
    """The box that holds the patient (CT: all voxels above -500 HU); the whole volume for other modalities."""
    body_size_ijk: tuple[int, int, int]
    dtype: str
    slope: float
    """Value = stored number * slope + intercept, in HU for CT."""
    intercept: float
    split: Split
    bytes: int
    """On disk, voxel labels included."""
    label_key: str
    """Name of the file with the voxel labels; empty where there are none."""
    label_bytes: int
    classes: Mapping[int, str]
    """Names of the voxel labels' values."""
    labels: Mapping[str, str]
    """Scan-level facts, such as `lesion: yes`."""
    report: Report | None
    provenance: Provenance
    ingested: str
    """When, ISO 8601 in UTC."""

    @property
    def has_labels(self) -> bool:
        """Whether there are voxel labels."""
        return bool(self.label_key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A line of the ledger: a source that did not get in, and why. `source` names nobody (`subjects.source_name`)."""

    source: str
    code: str
    reason: str


class Catalogue:
    """An open catalogue. Every change is one transaction; whoever opens it for writing is alone in doing so."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Wrap an open connection; use `create`, `read` or `write` instead."""
        connection.row_factory = sqlite3.Row
        self._connection = connection

    @classmethod
    def create(cls, root: Path, fractions: Fractions) -> None:
        """Make an empty catalogue in the folder `root`; one that a kill left empty is made whole.

        Raises:
            StoreError: there is one already, or the folder cannot be written.
        """
        with _explained(root), closing(sqlite3.connect(root / FILE_NAME, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            if _version(connection) != 0:
                raise StoreError(f"'{root}' already holds a store", hint="open it, or choose another folder")
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            made_so = json.dumps(asdict(fractions), sort_keys=True)
            connection.execute("INSERT INTO meta VALUES ('fractions', ?)", (made_so,))
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            connection.execute("COMMIT")

    @classmethod
    @contextmanager
    def read(cls, root: Path) -> Generator[Catalogue, None, None]:
        """Open for reading, also in a folder that cannot be written.

        Raises:
            StoreError: no catalogue, a newer one, or a damaged one.
        """
        with _explained(root), closing(_connect_to_read(root)) as connection:
            _check_version(connection, root)
            yield cls(connection)

    @classmethod
    @contextmanager
    def write(cls, root: Path) -> Generator[Catalogue, None, None]:
        """Open for writing and keep every other writer out until done.

        Raises:
            StoreError: as `read`, or another process is writing.
        """
        with _explained(root), closing(_take_lock(root)), closing(_connect(root, "rw")) as connection:
            _check_version(connection, root)
            connection.execute("PRAGMA synchronous = FULL")
            yield cls(connection)

    @contextmanager
    def transaction(self) -> Generator[None, None, None]:
        """Make the changes of the block together or not at all."""
        with self._connection:
            yield

    def meta(self, name: str) -> str | None:
        """Return a fact about the store itself."""
        row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, name: str, value: str) -> None:
        """Note a fact about the store itself."""
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def fractions(self) -> Fractions:
        """Return the shares of the splits with which the store was made."""
        return Fractions(**json.loads(self.meta("fractions") or "{}"))

    def records(self) -> list[Record]:
        """Return all volumes, ordered by key."""
        return [_to_record(row) for row in self._connection.execute("SELECT * FROM volumes ORDER BY key")]

    def file_names(self) -> dict[str, set[str]]:
        """Return the names that rows speak of: under `volumes` and under `labels`."""
        rows = self._connection.execute("SELECT key, label_key FROM volumes").fetchall()
        return {"volumes": {key for key, _ in rows}, "labels": {label_key for _, label_key in rows}}

    def record(self, key: str) -> Record | None:
        """Return one volume, if it is here."""
        row = self._connection.execute("SELECT * FROM volumes WHERE key = ?", (key,)).fetchone()
        return None if row is None else _to_record(row)

    def owners(self, voxels: str) -> set[str]:
        """Return the subjects of all volumes with these voxel values."""
        return {row[0] for row in self._connection.execute("SELECT subject FROM volumes WHERE voxels = ?", (voxels,))}

    def put(self, record: Record) -> None:
        """Insert a volume, or replace what is known of it."""
        row = _to_row(record)
        places = ", ".join("?" * len(row))
        self._connection.execute(
            f"INSERT OR REPLACE INTO volumes ({', '.join(row)}) VALUES ({places})",
            list(row.values()),
        )

    def refusals(self) -> list[Refusal]:
        """Return the ledger, ordered by source."""
        rows = self._connection.execute("SELECT source, code, reason FROM refusals ORDER BY source")
        return [Refusal(source=source, code=code, reason=reason) for source, code, reason in rows]

    def refuse(self, refusal: Refusal) -> None:
        """Write a line of the ledger in place of the source's former one."""
        row = (refusal.source, refusal.code, refusal.reason)
        self._connection.execute("INSERT OR REPLACE INTO refusals VALUES (?, ?, ?)", row)

    def forgive(self, source: str) -> None:
        """Strike the source's line from the ledger."""
        self._connection.execute("DELETE FROM refusals WHERE source = ?", (source,))

    def done(self, source: str) -> tuple[str, tuple[str, ...]] | None:
        """Return the fingerprint and the keys of a source that got in before."""
        row = self._connection.execute("SELECT fingerprint, keys FROM sources WHERE source = ?", (source,)).fetchone()
        return None if row is None else (row[0], tuple(json.loads(row[1])))

    def note_done(self, source: str, fingerprint: str, keys: tuple[str, ...]) -> None:
        """Remember that a source got in, so that a rerun need not read it again."""
        row = (source, fingerprint, json.dumps(keys))
        self._connection.execute("INSERT OR REPLACE INTO sources VALUES (?, ?, ?)", row)


def is_store(path: Path) -> bool:
    """Tell whether a folder holds a catalogue."""
    return (path / FILE_NAME).is_file()


def _connect(root: Path, mode: str) -> sqlite3.Connection:
    if not is_store(root):
        raise StoreError(
            f"there is no store in '{root}'", hint="make one with `voxelstem ingest SRC --store DIR`, or check the path"
        )
    # A path may hold '?' or '#', which mean something in a URI; as_uri escapes them.
    return sqlite3.connect(f"{(root / FILE_NAME).absolute().as_uri()}?mode={mode}", uri=True, timeout=30)


def _connect_to_read(root: Path) -> sqlite3.Connection:
    """Open as a reader who leaves nothing behind.

    A catalogue in WAL mode needs two small files beside it while it is open. Where they cannot be made, it can still be
    read as a file that never changes, unless it holds rows that were not yet moved into the main file.
    """
    for mode in ("rw", "ro"):
        connection = _connect(root, mode)
        try:
            _version(connection)
        except sqlite3.OperationalError:
            connection.close()
        else:
            return connection
    log = root / f"{FILE_NAME}-wal"
    if log.exists() and log.stat().st_size:
        raise StoreError(
            f"the store in '{root}' was not closed properly and its folder cannot be written",
            hint="open it once where it can be written",
        )
    return _connect(root, "ro&immutable=1")


def _take_lock(root: Path) -> sqlite3.Connection:
    """Keep other writers out. SQLite's lock works on every system, and a killed process lets go of it."""
    lock = sqlite3.connect(root / "writer.lock", timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        raise StoreError(
            f"another process is writing to the store in '{root}'", hint="wait until it is done, or use another store"
        ) from error
    return lock


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _check_version(connection: sqlite3.Connection, root: Path) -> None:
    version = _version(connection)
    if version > FORMAT_VERSION:
        raise StoreError(
            f"the store in '{root}' was made by a newer version of voxelstem (format {version}; this one reads "
            f"up to {FORMAT_VERSION})",
            hint="upgrade voxelstem, or make the store again with this version",
        )
    if version < 1:
        raise StoreError(f"the store in '{root}' was never finished", hint="run `voxelstem ingest` on it again")


@contextmanager
def _explained(root: Path) -> Generator[None, None, None]:
    """Turn what SQLite says into a sentence."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        # Beside a full disk SQLite fails in several ways, mostly as an "I/O error" of the small files of its log.
        cramped = name.startswith("SQLITE_IOERR") and shutil.disk_usage(root).free < ROOM_FOR_A_LOG
        if name == "SQLITE_FULL" or cramped:
            raise StoreError(
                f"the disk is full: the catalogue of the store in '{root}' cannot grow",
                hint="free some space and run the same command again; what is in the store is whole",
            ) from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise StoreError(f"the store in '{root}' cannot be written", hint="check the folder's rights") from error
        raise StoreError(
            f"the catalogue of the store in '{root}' cannot be used: {error}",
            hint="if the file is damaged, restore it from a backup or ingest the scans into a new store",
        ) from error


def _to_row(record: Record) -> dict[str, Any]:
    return {
        "key": record.key,
        "voxels": record.voxels,
        "subject": record.subject,
        "study": record.study,
        "modality": record.modality,
        "shape": json.dumps([record.channels, *record.shape_ijk]),
        "spacing": json.dumps(record.spacing_mm),
        "affine": json.dumps(record.affine_ras.tolist()),
        "body": json.dumps([record.body_start_ijk, record.body_size_ijk]),
        "dtype": record.dtype,
        "slope": record.slope,
        "intercept": record.intercept,
        "split": record.split,
        "bytes": record.bytes - record.label_bytes,
        "label_key": record.label_key,
        "label_bytes": record.label_bytes,
        "classes": json.dumps({str(value): name for value, name in sorted(record.classes.items())}),
        "labels": json.dumps(dict(record.labels), sort_keys=True),
        "report": None if record.report is None else json.dumps(asdict(record.report)),
        "provenance": json.dumps(asdict(record.provenance), sort_keys=True),
        "ingested": record.ingested,
    }


def _to_record(row: sqlite3.Row) -> Record:
    cells = dict(row)
    channels, *shape_ijk = json.loads(cells.pop("shape"))
    start, size = json.loads(cells.pop("body"))
    affine = np.array(json.loads(cells.pop("affine")), dtype=np.float64)
    affine.flags.writeable = False
    provenance = json.loads(cells.pop("provenance"))
    provenance["notes"] = tuple(provenance["notes"])
    said = cells.pop("report")
    cells["bytes"] += cells["label_bytes"]
    cells["labels"] = json.loads(cells["labels"])
    cells["classes"] = {int(value): name for value, name in json.loads(cells["classes"]).items()}
    return Record(
        channels=channels,
        shape_ijk=tuple(shape_ijk),
        spacing_mm=tuple(json.loads(cells.pop("spacing"))),
        affine_ras=affine,
        body_start_ijk=tuple(start),
        body_size_ijk=tuple(size),
        provenance=Provenance(**provenance),
        report=None if said is None else Report(**json.loads(said)),
        **cells,
    )
