"""Read a store: whole volumes, and crops of which only the touched blocks are decoded."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
from jaxtyping import Float32, Int16

from voxelstem.errors import StoreError
from voxelstem.store.catalogue import Catalogue, is_store
from voxelstem.store.records import Record, Refusal, Triple
from voxelstem.store.selection import Selection, Wanted
from voxelstem.store.splits import DEFAULT_FRACTIONS, Fractions, Split
from voxelstem.study import LabelMap, Volume

MAX_OPEN_FILES = 128
"""Files that each thread keeps open; the longest unused one is closed first."""
MAX_RECORDS = 4096
"""Records that are kept in memory; the longest unused one goes first."""
EVERYTHING = Wanted()
Box = tuple[slice, ...]
Crops = Float32[np.ndarray, "crop channel i j k"]


class Store:
    """The volumes of a store, as they were when it was opened; iterate for records, ask by key for voxels.

    Volumes that are added later are not seen before `refresh`, and a store that travels to another process sees the
    same volumes there: a training or its plan never changes under way. What is said of a volume (labels, a report)
    is read when it is first asked for. Records are read as they are needed, so a store of 250,000 volumes opens at
    once. Any number of threads and processes may read, also while `ingest` adds to the store.
    """

    def __init__(self, path: Path) -> None:
        """Look at the catalogue; use `open` or `create` instead."""
        self.path = path
        self.fractions: Fractions = DEFAULT_FRACTIONS
        self._open_files = threading.local()
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Record] = OrderedDict()
        self._last = self._count = 0
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
            self._look(catalogue, catalogue.last())

    def _look(self, catalogue: Catalogue, last: int) -> None:
        self.fractions = catalogue.fractions()
        self._last, self._count = last, catalogue.count(last)
        with self._lock:
            self._known.clear()

    def __getstate__(self) -> tuple[Path, int]:
        """Travel to another process as a path and a mark: open files cannot."""
        return self.path, self._last

    def __setstate__(self, state: tuple[Path, int]) -> None:
        """Open again on the other side, and see the same volumes."""
        path, last = state
        self.__init__(path)
        with Catalogue.read(path) as catalogue:
            self._look(catalogue, last)

    def __len__(self) -> int:
        """How many volumes there are."""
        return self._count

    def __iter__(self) -> Iterator[Record]:
        """Records of all volumes, ordered by key: the same order on every machine. Few are in memory at once."""
        after = ""
        while True:
            # A page at a time: a reader that stayed in the catalogue would keep its log from being tidied up.
            with Catalogue.read(self.path) as catalogue:
                page = catalogue.page(after, self._last)
            yield from page
            if not page:
                return
            after = page[-1].key

    def record(self, key: str) -> Record:
        """Return what the catalogue says of one volume.

        Raises:
            StoreError: no volume has this key.
        """
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        with Catalogue.read(self.path) as catalogue:
            record = catalogue.record(key, self._last)
        if record is None:
            raise StoreError(f"the store holds no volume '{key[:16]}'", hint="iterate over the store for its keys")
        with self._lock:
            self._known[key] = record
            if len(self._known) > MAX_RECORDS:
                self._known.popitem(last=False)
        return record

    def select(self, wanted: Wanted = EVERYTHING) -> Selection:
        """Return the volumes that are wanted as columns, ordered by key: all 250,000 in a second."""
        with Catalogue.read(self.path) as catalogue:
            return catalogue.select(wanted, self._last)

    def subjects(self, split: Split | None = None) -> tuple[str, ...]:
        """Return the pseudonyms of all subjects, or of those in one split, in order."""
        with Catalogue.read(self.path) as catalogue:
            return catalogue.subjects(split, self._last)

    def duplicates(self) -> tuple[tuple[str, ...], ...]:
        """Return the keys of volumes with equal voxel values, a tuple for each set of equals.

        The writer refuses equals of two subjects, so these are copies within a subject whose headers differ.
        """
        with Catalogue.read(self.path) as catalogue:
            return catalogue.duplicates(self._last)

    def thumbnails(self) -> Iterator[tuple[str, bytes]]:
        """Yield key and thumbnail of all volumes that have one, in the order in which they came."""
        with Catalogue.read(self.path) as catalogue:
            yield from catalogue.thumbnails(self._last)

    def tally(self, what: Literal["source_format", "language", "classes"]) -> dict[str, int]:
        """Count volumes by the source's format, the report's language (where known), or classes of voxel labels."""
        with Catalogue.read(self.path) as catalogue:
            return catalogue.tally(what, self._last)

    def files(self) -> tuple[tuple[str, str, str, int], ...]:
        """Return key of the volume, folder, name and bytes of every file, as the catalogue has them."""
        with Catalogue.read(self.path) as catalogue:
            return tuple(catalogue.files(self._last))

    def refusals(self) -> tuple[Refusal, ...]:
        """Return the ledger as it is now: what did not get in, and why."""
        with Catalogue.read(self.path) as catalogue:
            return tuple(catalogue.refusals())

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
            acquisition=record.acquisition,
            labels=self.labels(key),
        )

    def native(self, key: str) -> Volume:
        """Read a whole scan as it was before it was resampled, with the voxel labels on its own grid if there are any.

        Raises:
            StoreError: no such volume, its native scan was not kept, or its file is missing or damaged.
        """
        record = self.record(key)
        native = record.native
        if native is None:
            raise StoreError(
                f"the native scan of volume '{key[:16]}' was not kept", hint="ingest it again and keep native scans"
            )
        labels = None
        if native.label_key:
            masks = self._slice(record, "labels", native.label_key, _EVERYTHING)[0]
            labels = LabelMap(array=masks, classes=dict(record.classes))
        return Volume(
            array=decode(self._slice(record, "native", native.key, _EVERYTHING), native.slope, native.intercept),
            affine_ras=native.affine_ras.copy(),
            modality=record.modality,
            provenance=record.provenance,
            acquisition=record.acquisition,
            labels=labels,
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
        return self.crops(key, (start_ijk,), size_ijk)[0]

    def crops(self, key: str, starts_ijk: Sequence[Triple], size_ijk: Triple, *, out: Crops | None = None) -> Crops:
        """Read several boxes into one piece of memory, `out` if it is given: new memory can cost as much as decoding.

        Raises:
            StoreError: as `crop`.
            ValueError: `out` is not float32 of shape (crop, channel, i, j, k).
        """
        record = self.record(key)
        boxes = [_box(record, start, size_ijk) for start in starts_ijk]
        shape = (len(boxes), record.channels, *size_ijk)
        found = np.empty(shape, np.float32) if out is None else out
        if (found.shape, found.dtype) != (shape, np.float32):
            raise ValueError(f"out must be float32 of shape {shape}, got {found.dtype} of shape {found.shape}")
        for crop, stored in zip(found, self._slices(record, "volumes", key, boxes), strict=True):
            decode(stored, record.slope, record.intercept, out=crop)
        return found

    def label_crop(self, key: str, start_ijk: Triple, size_ijk: Triple) -> Int16[np.ndarray, "i j k"]:
        """Read a box of a volume's voxel labels.

        Raises:
            StoreError: as `crop`, or the volume has no voxel labels.
        """
        record = self.record(key)
        if not record.has_labels:
            raise StoreError(f"volume '{key[:16]}' has no voxel labels", hint="ask `record.has_labels` first")
        return self._slice(record, "labels", record.label_key, _box(record, start_ijk, size_ijk))[0]

    def check(self, key: str) -> None:
        """Read all files of a volume, and compare them with the digests taken when they were written.

        Raises:
            StoreError: a file is missing, or not one bit may differ and one does.
        """
        for kind, name in files_of(self.record(key)):
            self.check_file(key, kind, name)

    def check_file(self, key: str, kind: str, name: str) -> None:
        """Check one of the files of a volume, as `check` does.

        Raises:
            StoreError: it is missing or damaged.
        """
        record = self.record(key)
        _, slope, intercept, voxels = files_of(record)[kind, name]
        if digest(self._slice(record, kind, name, _EVERYTHING), slope, intercept) != voxels:
            raise StoreError(f"the file of {_WHAT[kind]} '{name[:16]}' is damaged: its voxels changed", hint=_HEAL)

    def _slice(self, record: Record, kind: str, name: str, box: Box) -> Int16[np.ndarray, "channel i j k"]:
        return next(self._slices(record, kind, name, (box,)))

    def _slices(
        self, record: Record, kind: str, name: str, boxes: Sequence[Box]
    ) -> Iterator[Int16[np.ndarray, "channel i j k"]]:
        """Decode boxes of one size. Each stands in the same memory, until the next is asked for."""
        size = files_of(record)[kind, name][0]
        native = record.native
        scan = native if native is not None and name in (native.key, native.label_key) else record
        shape = (1 if kind == "labels" else scan.channels, *scan.shape_ijk)
        path = file_path(self.path, kind, name)
        edges = [[part.indices(extent)[:2] for part, extent in zip(box, shape, strict=True)] for box in boxes]
        stored = np.empty([stop - start for start, stop in edges[0]], np.int16) if edges else None
        try:
            file = self._file(path, size, shape)
            for box in edges:
                # What `file[box]` comes down to, without its time to understand any index.
                yield file.get_slice_numpy(stored, tuple(zip(*box, strict=True)))
        except (OSError, RuntimeError, ValueError) as error:
            what = f"the file of {_WHAT[kind]} '{name[:16]}'"
            raise StoreError(f"{what} is missing or damaged: {error}", hint=_HEAL) from error

    def _file(self, path: Path, size: int, shape: tuple[int, ...]) -> Any:
        """Open a file, or take it from those that this thread has open: blosc2's handles are not for sharing."""
        files: OrderedDict[Path, Any] | None = getattr(self._open_files, "by_path", None)
        if files is None:
            files = self._open_files.by_path = OrderedDict()
        if path in files:
            files.move_to_end(path)
            return files[path]
        # A cut-off file would end the process with SIGBUS when its missing end is touched through the memory map.
        check_size(path, size)
        how: dict[str, Any] = {"mmap_mode": "r", "dparams": blosc2.DParams(nthreads=1)}
        opened: Any = blosc2.open(str(path), **how)
        # A header with one wrong bit may promise petabytes, blocks of no size, or something other than an array.
        if not isinstance(opened, blosc2.NDArray) or (opened.shape, opened.dtype) != (shape, np.int16):
            raise ValueError("its header does not say what the catalogue says")
        parts: tuple[tuple[int, ...], ...] = (opened.chunks, opened.blocks)
        if any(not 0 < edge <= extent for part in parts for edge, extent in zip(part, shape, strict=True)):
            raise ValueError("its header names impossible blocks")
        files[path] = opened
        if len(files) > MAX_OPEN_FILES:
            files.popitem(last=False)
        return opened


_HEAL = "ingest its scan again; the rest of the store is not affected"
_WHAT = {"volumes": "volume", "labels": "voxel labels", "native": "native scan"}
_EVERYTHING = (slice(None),) * 4
Expected = tuple[int, float, float, str]
"""Of a file: its bytes, slope and intercept, and the digest of its voxels."""


def files_of(record: Record) -> dict[tuple[str, str], Expected]:
    """List the files of a volume by folder and name, with what is known of each."""
    files = {("volumes", record.key): (record.volume_bytes, record.slope, record.intercept, record.voxels)}
    if record.has_labels:
        files["labels", record.label_key] = (record.label_bytes, 1.0, 0.0, record.label_key)
    native = record.native
    if native is not None:
        files["native", native.key] = (native.bytes, native.slope, native.intercept, native.voxels)
        if native.label_key:
            files["labels", native.label_key] = (native.label_bytes, 1.0, 0.0, native.label_key)
    return files


def file_path(root: Path, kind: str, name: str) -> Path:
    """Say where the file of a volume or label map lies: two letters deep, so that no folder grows too long."""
    if not re.fullmatch(r"[0-9a-f]{64}", name):
        raise StoreError("the catalogue names a file that is no digest", hint="was it edited? restore it from a backup")
    return root / kind / name[:2] / f"{name}.b2nd"


def check_size(path: Path, size: int) -> None:
    """Compare a file's size with the catalogue's.

    Raises:
        StoreError: they differ, or there is no such file.
    """
    try:
        seen = path.stat().st_size
    except OSError as error:
        raise StoreError(f"the file '{path.stem[:16]}' is missing or damaged: {error.strerror}", hint=_HEAL) from error
    if seen != size:
        raise StoreError(f"the file '{path.stem[:16]}' is damaged: it has {seen} of {size} bytes", hint=_HEAL)


def decode(
    stored: Int16[np.ndarray, "channel i j k"], slope: float, intercept: float, *, out: np.ndarray | None = None
) -> Float32[np.ndarray, "channel i j k"]:
    """Turn stored numbers back into HU or intensity, in the memory `out` if it is given."""
    values: Float32[np.ndarray, "channel i j k"] = np.empty(stored.shape, np.float32) if out is None else out
    values[...] = stored
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
