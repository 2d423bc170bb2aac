"""Small volumes and studies that the store's tests write."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelstem.store import Store, write
from voxelstem.store.catalogue import FILE_NAME
from voxelstem.store.subjects import pseudonym
from voxelstem.study import LabelMap, Provenance, Report, Study, Volume

SHAPE = (20, 17, 9)
TABLES_OF_1 = """
CREATE TABLE volumes (
    key TEXT PRIMARY KEY, voxels TEXT NOT NULL, subject TEXT NOT NULL, study TEXT NOT NULL, modality TEXT NOT NULL,
    shape TEXT NOT NULL, spacing TEXT NOT NULL, affine TEXT NOT NULL, body TEXT NOT NULL,
    dtype TEXT NOT NULL, slope REAL NOT NULL, intercept REAL NOT NULL,
    split TEXT NOT NULL, bytes INTEGER NOT NULL,
    label_key TEXT NOT NULL, label_bytes INTEGER NOT NULL, classes TEXT NOT NULL,
    labels TEXT NOT NULL, report TEXT, provenance TEXT NOT NULL, ingested TEXT NOT NULL
);
INSERT INTO volumes SELECT key, voxels, subject, study, modality, json_array(channels, size_i, size_j, size_k),
    json_array(spacing_i, spacing_j, spacing_k), affine, body, dtype, slope, intercept, split, bytes, label_key,
    label_bytes, classes, labels, json_extract(report, '$.rest_text'), provenance, ingested
    FROM now JOIN details USING (number) ORDER BY number;
DROP TABLE details; DROP TABLE thumbnails; DROP TABLE now;
CREATE INDEX volumes_by_voxels ON volumes (voxels);
PRAGMA user_version = 1;
"""


class Make:
    """Factories for small things."""

    alice, bob = (pseudonym(name, bytes(32)) for name in ("alice", "bob"))

    def volume(self, array: Any = None, *, seed: int = 0, modality: str = "CT", labels: Any = None) -> Volume:
        if array is None:
            array = np.random.default_rng(seed).integers(-1024, 3072, size=(1, *SHAPE))
        return Volume(
            array=np.asarray(array, dtype=np.float32),
            affine_ras=np.array([[1.0, 0, 0, -3], [0, 1.5, 0, 4], [0, 0, 2.0, 5], [0, 0, 0, 1]]),
            modality=modality,
            provenance=Provenance(source_format="phantom", sha256="0" * 64, orientation="RAS"),
            labels=labels,
        )

    def mask(self, *, seed: int = 0) -> LabelMap:
        array = np.random.default_rng(seed).integers(0, 3, size=SHAPE).astype(np.int16)
        return LabelMap(array=array, classes={1: "liver", 2: "spleen"})

    def study(self, *volumes: Volume, subject: str = alice, **rest: Any) -> Study:
        return Study(subject=subject, volumes=volumes or (self.volume(),), **rest)

    def digests(self, folder: Path) -> dict[str, str]:
        """Digests of everything below a folder but the catalogue's own files."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent != folder]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()


@pytest.fixture
def format_1(make, tmp_path):
    """A store as 0.1 left it: the tables are put back into the shape that they had."""
    store = Store.create(tmp_path / "old")
    write(
        store, make.study(make.volume(labels=make.mask()), report=Report(rest_text="a cyst"), labels={"lesion": "no"})
    )
    write(store, make.study(make.volume(np.full((2, 5, 6, 7), 0.5), modality="MR"), subject=make.bob))
    with sqlite3.connect(store.path / FILE_NAME) as connection:
        connection.executescript("DROP INDEX volumes_by_voxels; ALTER TABLE volumes RENAME TO now;" + TABLES_OF_1)
    connection.close()
    return store.path
