"""Small volumes and studies that the store's tests write."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelstem.store.subjects import pseudonym
from voxelstem.study import LabelMap, Provenance, Study, Volume

SHAPE = (20, 17, 9)


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
