"""Read a store: whole volumes, and crops of which only the touched blocks are decoded."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from operator import index
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from jaxtyping import Float, Float32, Int16

from voxelstem.errors import StoreError
from voxelstem.store.catalogue import Catalogue, Record, Refusal, is_store
from voxelstem.store.splits import DEFAULT_FRACTIONS, Fractions, Split
from voxelstem.study import LabelMap, Volume

Triple = tuple[int, int, int]
MAX_OPEN_FILES = 128
"""Files that each thread keeps open; the longest unused one is closed first."""


class Store:
    """The volumes of a store, as they were when it was opened; iterate for records, ask by key for voxels.

    Any number of threads and processes may read at once, also while `ingest` adds to the store.
    """

    def __init__(self, path: Path) -> None:
        """Load the catalogue; use `open` or `create` instead."""
        self.path = path
        self._open_files = threading.local()
        self._records: dict[str, Record] = {}
        self._refusals: tuple[Refusal, ...] = ()
        self.fractions: Fractions = DEFAULT_FRACTIONS
        self.refresh()

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Open the store in the folder `path`, which may be read-only.

        Raises:
            StoreError: there is none, it is damaged, or a newer version of voxelstem made it.
        """
        return cls(Path(path))

    @classmethod
    def create(cls, path: Path | str, *, fractions: Fractions = DEFAULT_FRACTIONS) -> Store:
        """Make an empty store in `path`. Its `fractions` hold for everything that is ever added.

        Raises:
            StoreError: the folder holds something else already, or cannot be made.
        """
        root = Path(path)
        try:
            root.mkdir(parents=True, exist_ok=True)
            foreign = not is_store(root) and any(root.iterdir())
        except OSError as error:
            raise StoreError(f"no store can be made in '{root}': {error.strerror}", hint="check the path") from error
        if foreign:
            raise StoreError(f"'{root}' holds other files already", hint="choose a folder that is empty or not there")
        Catalogue.create(root, fractions)
        return cls(root)

    def refresh(self) -> None:
        """Look again at the catalogue, to see what was added since."""
        with Catalogue.read(self.path) as catalogue:
            self._records = {record.key: record for record in catalogue.records()}
            self._refusals = tuple(catalogue.refusals())
            self.fractions = catalogue.fractions()

    def __getstate__(self) -> Path:
        """Travel to another process as a path: open files cannot."""
        return self.path

    def __setstate__(self, path: Path) -> None:
        """Open again on the other side."""
        self.__init__(path)

    def __len__(self) -> int:
        """How many volumes there are."""
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        """Records of all volumes, ordered by key: the same order on every machine."""
        return iter(self._records.values())

    def record(self, key: str) -> Record:
        """Return what the catalogue says of one volume.

        Raises:
            StoreError: no volume has this key.
        """
        if key not in self._records:
            raise StoreError(f"the store holds no volume '{key[:16]}'", hint="iterate over the store for its keys")
        return self._records[key]

    def subjects(self, split: Split | None = None) -> tuple[str, ...]:
        """Return the pseudonyms of all subjects, or of those in one split, in order."""
        return tuple(sorted({record.subject for record in self if split in (None, record.split)}))

    def refusals(self) -> tuple[Refusal, ...]:
        """Return the ledger: what did not get in, and why."""
        return self._refusals

    def volume(self, key: str) -> Volume:
        """Read a whole volume, in HU or intensity, with its voxel labels if there are any.

        Raises:
            StoreError: no such volume, or its file is missing or damaged.
        """
        record = self.record(key)
        return Volume(
            array=self.crop(key, (0, 0, 0), record.shape_ijk),
            affine_ras=record.affine_ras.copy(),
            modality=record.modality,
            provenance=record.provenance,
            labels=self.labels(key),
        )

    def labels(self, key: str) -> LabelMap | None:
        """Read a whole volume's voxel labels, if there are any."""
        record = self.record(key)
        if not record.has_labels:
            return None
        array = self.label_crop(key, (0, 0, 0), record.shape_ijk)
        return LabelMap(array=array, classes=dict(record.classes))

    def crop(self, key: str, start_ijk: Triple, size_ijk: Triple) -> Float32[np.ndarray, "channel i j k"]:
        """Read a box of a volume, in HU or intensity, decoding only the blocks that it touches.

        Raises:
            StoreError: no such volume, a box that is empty or leaves it, or a damaged file.
        """
        record = self.record(key)
        box = _box(record, start_ijk, size_ijk)
        return decode(
            self._slice("volumes", key, record.bytes - record.label_bytes, box), record.slope, record.intercept
        )

    def label_crop(self, key: str, start_ijk: Triple, size_ijk: Triple) -> Int16[np.ndarray, "i j k"]:
        """Read a box of a volume's voxel labels.

        Raises:
            StoreError: as `crop`, or the volume has no voxel labels.
        """
        record = self.record(key)
        if not record.has_labels:
            raise StoreError(f"volume '{key[:16]}' has no voxel labels", hint="ask `record.has_labels` first")
        return self._slice("labels", record.label_key, record.label_bytes, _box(record, start_ijk, size_ijk))[0]

    def check(self, key: str) -> None:
        """Read a whole volume and its voxel labels, and compare them with the digests taken when they were written.

        Raises:
            StoreError: a file is missing, or not one bit may differ and one does.
        """
        record = self.record(key)
        everything = (slice(None),) * 4
        stored = self._slice("volumes", key, record.bytes - record.label_bytes, everything)
        healthy = digest(stored, record.slope, record.intercept) == record.voxels
        if record.has_labels:
            masks = self._slice("labels", record.label_key, record.label_bytes, everything)
            healthy = healthy and digest(masks, 1.0, 0.0) == record.label_key
        if not healthy:
            raise StoreError(f"the file of volume '{key[:16]}' is damaged: its voxels changed", hint=_HEAL)

    def _slice(self, kind: str, name: str, size: int, box: tuple[slice, ...]) -> Int16[np.ndarray, "channel i j k"]:
        path = file_path(self.path, kind, name)
        try:
            return self._file(path, size)[box]
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError(
                f"the file of {kind[:-1]} '{name[:16]}' is missing or damaged: {error}",
                hint=_HEAL,
            ) from error

    def _file(self, path: Path, size: int) -> Any:
        """Open a file, or take it from those that this thread has open: blosc2's handles are not for sharing."""
        files: OrderedDict[Path, Any] | None = getattr(self._open_files, "by_path", None)
        if files is None:
            files = self._open_files.by_path = OrderedDict()
        if path in files:
            files.move_to_end(path)
            return files[path]
        # A cut-off file would end the process with SIGBUS when its missing end is touched through the memory map.
        if (seen := path.stat().st_size) != size:
            raise ValueError(f"it has {seen} of {size} bytes")
        how: dict[str, Any] = {"mmap_mode": "r", "dparams": blosc2.DParams(nthreads=1)}
        files[path] = blosc2.open(str(path), **how)
        if len(files) > MAX_OPEN_FILES:
            files.popitem(last=False)
        return files[path]


_HEAL = "ingest its scan again; the rest of the store is not affected"


def file_path(root: Path, kind: str, name: str) -> Path:
    """Say where the file of a volume or label map lies: two letters deep, so that no folder grows too long."""
    if not re.fullmatch(r"[0-9a-f]{64}", name):
        raise StoreError("the catalogue names a file that is no digest", hint="was it edited? restore it from a backup")
    return root / kind / name[:2] / f"{name}.b2nd"


def decode(
    stored: Int16[np.ndarray, "channel i j k"], slope: float, intercept: float
) -> Float32[np.ndarray, "channel i j k"]:
    """Turn stored numbers back into HU or intensity."""
    values: Float[np.ndarray, "channel i j k"] = stored.astype(np.float32)
    if slope != 1.0:
        values *= np.float32(slope)
    if intercept != 0.0:
        values += np.float32(intercept)
    return values


def digest(stored: Int16[np.ndarray, "channel i j k"], slope: float, intercept: float) -> str:
    """Compute the SHA-256 of what stored numbers mean, independent of how they are compressed."""
    meaning = json.dumps({"shape": stored.shape, "slope": slope, "intercept": intercept}, sort_keys=True)
    total = hashlib.sha256(meaning.encode() + b"\0")
    total.update(np.ascontiguousarray(stored, dtype="<i2").data)
    return total.hexdigest()


def _box(record: Record, start_ijk: Triple, size_ijk: Triple) -> tuple[slice, ...]:
    axes = list(zip(start_ijk, size_ijk, record.shape_ijk, strict=True))
    if any(size < 1 for _, size, _ in axes):
        raise StoreError(f"a crop has at least one voxel along each axis, got size {tuple(size_ijk)}")
    if any(start < 0 or start + size > extent for start, size, extent in axes):
        raise StoreError(
            f"the crop from {tuple(start_ijk)} of size {tuple(size_ijk)} leaves the volume of shape {record.shape_ijk}",
            hint="draw it inside, or pad the volume after reading",
        )
    return (slice(None), *(slice(index(start), index(start + size)) for start, size, _ in axes))
