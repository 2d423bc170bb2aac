"""The store's list of what it holds: one SQLite file. A row is written once the file it speaks of is safe on disk."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from voxelstem.errors import StoreError
from voxelstem.store import schema
from voxelstem.store.records import Record, Refusal, to_record, to_rows
from voxelstem.store.schema import FORMAT_VERSION
from voxelstem.store.selection import Selection, Wanted, select
from voxelstem.store.splits import Fractions, Split

FILE_NAME = "catalogue.sqlite"
SUBJECTS = "subjects"
"""Fact about a store: by what subjects are told apart. Stores begun by version 0.6.0 or before do not have it."""
ROOM_FOR_A_LOG = 1 << 20
"""Bytes; with less free, a failing read or write of the catalogue is a full disk's fault."""
PAGE = 512
"""Records that are fetched at once."""
_RECORDS = """
SELECT v.*, d.affine, d.body, d.classes, d.labels, d.report, d.provenance, d.facts, d.native, t.thumbnail
FROM volumes v JOIN details d ON d.number = v.number LEFT JOIN thumbnails t ON t.number = v.number
"""

_TALLIES = {
    "source_format": "SELECT {what}, COUNT(*) FROM volumes WHERE number <= ? GROUP BY {what} ORDER BY {what}",
    "language": "SELECT {what}, COUNT(*) FROM volumes WHERE number <= ? AND reported GROUP BY {what} ORDER BY {what}",
    "classes": "SELECT j.value, COUNT(*) FROM volumes v JOIN details d ON d.number = v.number, json_each(d.classes) j "
    "WHERE v.number <= ? GROUP BY j.value ORDER BY j.value",
}


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
            if schema.version(connection) != 0:
                raise StoreError(f"'{root}' already holds a store", hint="open it, or choose another folder")
            schema.make_tables(connection)
            made_so = json.dumps(asdict(fractions), sort_keys=True)
            told_apart = (SUBJECTS, "data set")
            connection.executemany("INSERT INTO meta VALUES (?, ?)", [("fractions", made_so), told_apart])
            connection.execute("COMMIT")

    @classmethod
    @contextmanager
    def read(cls, root: Path) -> Generator[Catalogue, None, None]:
        """Open for reading, also in a folder that cannot be written.

        Raises:
            StoreError: no catalogue, a newer one, or a damaged one.
        """
        with _explained(root), closing(_connect_to_read(root)) as connection:
            if _check_version(connection, root) < FORMAT_VERSION:
                schema.show_as_current(connection)
            yield cls(connection)

    @classmethod
    @contextmanager
    def write(cls, root: Path) -> Generator[Catalogue, None, None]:
        """Open for writing and keep every other writer out until done; an older format is brought up to date first.

        Raises:
            StoreError: as `read`, or another process is writing.
        """
        with _explained(root), closing(_take_lock(root)), closing(_connect(root, "rw")) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            if _check_version(connection, root) < FORMAT_VERSION:
                schema.upgrade(connection)
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

    def last(self) -> int:
        """Return the highest number of a volume. Numbers only grow, so this marks what is here now."""
        return int(self._connection.execute("SELECT COALESCE(MAX(number), 0) FROM volumes").fetchone()[0])

    def count(self, last: int) -> int:
        """Return how many volumes there are up to a mark."""
        return int(self._connection.execute("SELECT COUNT(*) FROM volumes WHERE number <= ?", (last,)).fetchone()[0])

    def page(self, after: str, last: int) -> list[Record]:
        """Return the next volumes up to a mark, ordered by key, whose keys come after `after`."""
        found = self._connection.execute(
            f"{_RECORDS} WHERE v.key > ? AND v.number <= ? ORDER BY v.key LIMIT {PAGE}", (after, last)
        )
        return [to_record(row) for row in found]

    def record(self, key: str, last: int | None = None) -> Record | None:
        """Return one volume, if it is here (and was at the mark `last`)."""
        row = self._connection.execute(f"{_RECORDS} WHERE v.key = ?", (key,)).fetchone()
        return None if row is None or (last is not None and row["number"] > last) else to_record(row)

    def select(self, wanted: Wanted, last: int) -> Selection:
        """Return the volumes that are wanted, up to a mark, as columns."""
        return select(self._connection, wanted, last)

    def subjects(self, split: Split | None, last: int) -> tuple[str, ...]:
        """Return the subjects of all splits or one, in order."""
        only, given = ("", (last,)) if split is None else ("split = ? AND", (split, last))
        query = f"SELECT DISTINCT subject FROM volumes WHERE {only} number <= ? ORDER BY subject"
        return tuple(row[0] for row in self._connection.execute(query, given))

    def duplicates(self, last: int) -> tuple[tuple[str, ...], ...]:
        """Return the keys of volumes with equal voxel values, a tuple for each set of equals."""
        rows = self._connection.execute(
            "SELECT voxels, key FROM volumes WHERE number <= ?1 AND voxels IN "
            "(SELECT voxels FROM volumes WHERE number <= ?1 GROUP BY voxels HAVING COUNT(*) > 1) ORDER BY voxels, key",
            (last,),
        )
        groups: dict[str, list[str]] = {}
        for voxels, key in rows:
            groups.setdefault(voxels, []).append(key)
        return tuple(map(tuple, groups.values()))

    def thumbnails(self, last: int) -> Generator[tuple[str, bytes]]:
        """Yield key and thumbnail of all volumes that have one, in the order in which they came."""
        yield from map(
            tuple,
            self._connection.execute(
                "SELECT v.key, t.thumbnail FROM thumbnails t JOIN volumes v ON v.number = t.number "
                "WHERE t.number <= ? ORDER BY t.number",
                (last,),
            ),
        )

    def tally(self, what: Literal["source_format", "language", "classes"], last: int) -> dict[str, int]:
        """Count volumes by the source's format, the report's language, or the classes of voxel labels."""
        rows = self._connection.execute(_TALLIES[what].format(what=what), (last,))
        return {word: count for word, count in rows if word}

    def files(self, last: int) -> Generator[tuple[str, str, str, int]]:
        """Yield key of the volume, folder, name and bytes of every file."""
        for key, size, *others in self._connection.execute(
            "SELECT key, bytes, label_key, label_bytes, native_key, native_bytes, native_label_key, native_label_bytes "
            "FROM volumes WHERE number <= ? ORDER BY number",
            (last,),
        ):
            yield key, "volumes", key, size
            for kind, name, count in zip(("labels", "native", "labels"), others[::2], others[1::2], strict=True):
                if name:
                    yield key, kind, name, count

    def file_names(self) -> dict[str, set[str]]:
        """Return the names that rows speak of, by the folder in which their files lie."""
        names: dict[str, set[str]] = {"volumes": set(), "labels": set(), "native": set()}
        for key, label, native, mask in self._connection.execute(
            "SELECT key, label_key, native_key, native_label_key FROM volumes"
        ):
            names["volumes"].add(key)
            names["labels"].update((label, mask))
            names["native"].add(native)
        return names

    def owners(self, voxels: str) -> set[str]:
        """Return the subjects of all volumes with these voxel values."""
        return {row[0] for row in self._connection.execute("SELECT subject FROM volumes WHERE voxels = ?", (voxels,))}

    def put(self, *records: Record) -> None:
        """Insert volumes, or replace what is known of them; a volume keeps the number with which it came."""
        for record in records:
            narrow, wide = to_rows(record)
            self._connection.execute(_insert("volumes", narrow, key="key"), list(narrow.values()))
            (number,) = self._connection.execute("SELECT number FROM volumes WHERE key = ?", (record.key,)).fetchone()
            wide["number"] = number
            self._connection.execute(_insert("details", wide, key="number"), list(wide.values()))
            if record.thumbnail:
                cells = {"number": number, "thumbnail": record.thumbnail}
                self._connection.execute(_insert("thumbnails", cells, key="number"), list(cells.values()))

    def lines(self) -> Generator[str]:
        """Yield every row as a line of JSON, without numbers and times, in an order that depends on nothing else."""
        tables = (
            ("meta", "SELECT * FROM meta ORDER BY name"),
            ("volumes", f"{_RECORDS} ORDER BY v.key"),
            ("refusals", "SELECT * FROM refusals ORDER BY source"),
            ("sources", "SELECT * FROM sources ORDER BY source"),
        )
        for table, query in tables:
            for row in self._connection.execute(query):
                cells = {name: row[name] for name in row.keys() if name not in ("number", "ingested")}  # noqa: SIM118
                yield table + " " + json.dumps(cells, sort_keys=True, default=bytes.hex)

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


def dump(root: Path | str) -> str:
    """Tell all that a catalogue says, but not when it was said: one line a row, sorted, so that stores can be compared.

    Raises:
        StoreError: as `Catalogue.read`.
    """
    with Catalogue.read(Path(root)) as catalogue:
        return "\n".join(catalogue.lines()) + "\n"


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
            schema.version(connection)
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


def _check_version(connection: sqlite3.Connection, root: Path) -> int:
    version = schema.version(connection)
    if version > FORMAT_VERSION:
        raise StoreError(
            f"the store in '{root}' was made by a newer version of voxelstem (format {version}; this one reads "
            f"up to {FORMAT_VERSION})",
            hint="upgrade voxelstem, or make the store again with this version",
        )
    if version < schema.OLDEST_VERSION:
        raise StoreError(f"the store in '{root}' was never finished", hint="run `voxelstem ingest` on it again")
    return version


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


def _insert(table: str, cells: dict[str, Any], *, key: str) -> str:
    """Write the statement that inserts a row, or brings the row with the same key up to date."""
    fresh = ", ".join(f"{name} = excluded.{name}" for name in cells if name != key)
    return (
        f"INSERT INTO {table} ({', '.join(cells)}) VALUES ({', '.join('?' * len(cells))}) "
        f"ON CONFLICT ({key}) DO UPDATE SET {fresh}"
    )
