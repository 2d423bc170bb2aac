"""Small stores of invented brains: noise where no picture is needed, so that they are made in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym
from voxelstem.study import Acquisition, Provenance, Study, Volume

SHAPE = (16, 16, 16)


def scan(
    who: str,
    contrast: str = "T1w",
    *,
    session: str = "01",
    date: str = "",
    age: float | None = None,
    labels: dict[str, str] | None = None,
    affine: np.ndarray | None = None,
) -> Study:
    """One scan, whose voxels tell its place: twice the R coordinate, three times A, five times S, all in mm."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    index = np.indices(SHAPE).reshape(3, -1)
    places = affine[:3, :3] @ index + affine[:3, 3:]
    array = (np.array([2.0, 3.0, 5.0]) @ places).reshape(1, *SHAPE).astype(np.float32)
    # Two scans of equal voxels would be one.
    array[0, 0, 0, 0] = 1 + hash_of(who, contrast, session)
    volume = Volume(
        array=array,
        affine_ras=affine,
        modality="MR",
        provenance=Provenance(source_format="phantom", sha256="0" * 64, orientation="RAS"),
        acquisition=Acquisition(contrast=contrast, session=session, date=date, age_years=age),
    )
    return Study(subject=pseudonym(who, bytes(32)), volumes=(volume,), labels=labels or {})


def hash_of(*words: str) -> int:
    """A number below 200 that the words decide."""
    return sum((at + 1) * ord(letter) for at, letter in enumerate("/".join(words))) % 199


def filled(path: Path, scans: Iterable[Study]) -> Store:
    """A store of these, all to train on."""
    store = Store.create(path, fractions=Fractions(train=1.0, validation=0.0, test=0.0))
    for study in scans:
        write(store, study)
    return store


def key_of(store: Store, contrast: str, session: str = "01", who: str = "") -> str:
    """The key of the one scan that is so."""
    (key,) = [
        record.key
        for record in store
        if (record.acquisition.contrast, record.acquisition.session) == (contrast, session)
        and who in ("", next(name for name in "abcdefgh" if pseudonym(name, bytes(32)) == record.subject))
    ]
    return key
