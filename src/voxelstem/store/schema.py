"""The tables of a catalogue, `docs/reference/store.md` in SQL, and the way from the former format to this one."""

from __future__ import annotations

import sqlite3

FORMAT_VERSION = 2
"""Raised when an older version of voxelstem could no longer read what a newer one writes."""
OLDEST_VERSION = 1

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE refusals (source TEXT PRIMARY KEY, code TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE sources (source TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, keys TEXT NOT NULL);
"""
_VOLUMES = """
CREATE TABLE volumes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE, voxels TEXT NOT NULL, subject TEXT NOT NULL, study TEXT NOT NULL, split TEXT NOT NULL,
    modality TEXT NOT NULL, channels INTEGER NOT NULL,
    size_i INTEGER NOT NULL, size_j INTEGER NOT NULL, size_k INTEGER NOT NULL,
    spacing_i REAL NOT NULL, spacing_j REAL NOT NULL, spacing_k REAL NOT NULL,
    dtype TEXT NOT NULL, slope REAL NOT NULL, intercept REAL NOT NULL, bytes INTEGER NOT NULL,
    label_key TEXT NOT NULL, label_bytes INTEGER NOT NULL,
    native_key TEXT NOT NULL, native_bytes INTEGER NOT NULL,
    native_label_key TEXT NOT NULL, native_label_bytes INTEGER NOT NULL,
    reported INTEGER NOT NULL, language TEXT NOT NULL, source_format TEXT NOT NULL,
    series TEXT NOT NULL, acq_study TEXT NOT NULL, acq_group TEXT NOT NULL, session TEXT NOT NULL,
    contrast TEXT NOT NULL, date TEXT NOT NULL, age_years REAL, sex TEXT NOT NULL, ingested TEXT NOT NULL
);
CREATE TABLE details (
    number INTEGER PRIMARY KEY REFERENCES volumes, affine TEXT NOT NULL, body TEXT NOT NULL,
    classes TEXT NOT NULL, labels TEXT NOT NULL, report TEXT, provenance TEXT NOT NULL, facts TEXT NOT NULL, native TEXT
);
CREATE TABLE thumbnails (number INTEGER PRIMARY KEY REFERENCES volumes, thumbnail BLOB NOT NULL);
CREATE INDEX volumes_by_voxels ON volumes (voxels, subject, key);
CREATE INDEX volumes_by_split ON volumes (split, subject);
CREATE INDEX volumes_by_group ON volumes (acq_group);
"""

# What 0.1 wrote, told in the words of today. Both reading and upgrading use these, so they cannot differ.
_VOLUMES_OF_1 = """
SELECT rowid AS number, key, voxels, subject, study, split, modality,
    json_extract(shape, '$[0]') AS channels, json_extract(shape, '$[1]') AS size_i,
    json_extract(shape, '$[2]') AS size_j, json_extract(shape, '$[3]') AS size_k,
    json_extract(spacing, '$[0]') AS spacing_i, json_extract(spacing, '$[1]') AS spacing_j,
    json_extract(spacing, '$[2]') AS spacing_k,
    dtype, slope, intercept, bytes, label_key, label_bytes,
    '' AS native_key, 0 AS native_bytes, '' AS native_label_key, 0 AS native_label_bytes,
    report IS NOT NULL AS reported, '' AS language, json_extract(provenance, '$.source_format') AS source_format,
    '' AS series, '' AS acq_study, '' AS acq_group, '' AS session, '' AS contrast, '' AS date,
    NULL AS age_years, '' AS sex, ingested
FROM {table}
"""
_DETAILS_OF_1 = """
SELECT rowid AS number, affine, body, classes, labels,
    CASE WHEN report IS NULL THEN NULL ELSE json_object(
        'findings_text', '', 'impression_text', '', 'language', '', 'rest_text', report) END AS report,
    provenance, '{{}}' AS facts, NULL AS native
FROM {table}
"""


def make_tables(connection: sqlite3.Connection) -> None:
    """Make all tables, within the caller's transaction."""
    _execute_all(connection, _SCHEMA)
    _execute_all(connection, _VOLUMES)
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def version(connection: sqlite3.Connection) -> int:
    """Return the format of the catalogue; 0 where nothing was ever written."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def upgrade(connection: sqlite3.Connection) -> None:
    """Bring the tables of format 1 into this one, all or nothing; volumes keep their numbers."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DROP INDEX volumes_by_voxels")
        connection.execute("ALTER TABLE volumes RENAME TO volumes_of_1")
        _execute_all(connection, _VOLUMES)
        for name, query in (("volumes", _VOLUMES_OF_1), ("details", _DETAILS_OF_1)):
            told = query.format(table="volumes_of_1")
            columns = ", ".join(row[1] for row in connection.execute(f"PRAGMA table_info({name})"))
            connection.execute(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM ({told})")
        connection.execute("DROP TABLE volumes_of_1")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")


def show_as_current(connection: sqlite3.Connection) -> None:
    """Let a reader see the tables of format 1 as those of this one; nothing is written."""
    connection.execute("PRAGMA temp_store = MEMORY")
    for name, query in (("volumes", _VOLUMES_OF_1), ("details", _DETAILS_OF_1)):
        connection.execute(f"CREATE TEMP VIEW {name} AS {query.format(table='main.volumes')}")
    connection.execute("CREATE TEMP VIEW thumbnails AS SELECT 0 AS number, x'' AS thumbnail WHERE 0")


def _execute_all(connection: sqlite3.Connection, statements: str) -> None:
    for statement in filter(str.strip, statements.split(";")):
        connection.execute(statement)
