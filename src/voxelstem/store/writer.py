"""Write a store. A volume is named after its content, so it is there once, and writing it again repeats its bytes."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import blosc2
import numpy as np
from jaxtyping import Float, Int16

from voxelstem.errors import IngestError, StoreError
from voxelstem.store.catalogue import Catalogue, Record, Refusal
from voxelstem.store.reader import Store, Triple, decode, digest, file_path
from voxelstem.store.splits import split_of
from voxelstem.store.subjects import PSEUDONYM
from voxelstem.study import LabelMap, Provenance, Report, Study, Volume

CHUNKS = (1, 128, 128, 64)
BLOCKS = (1, 32, 32, 16)
"""Measured on random crops (`benchmarks/crops.py`): larger chunks read too much, smaller ones compress less."""
AIR_HU = -500.0
"""Halfway between air and water: what is denser belongs to the patient (or the table)."""
INT16 = np.iinfo(np.int16)
SLAB = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A label map as the store keeps it."""

    key: str
    frame: bytes
    classes: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """A volume as the store keeps it. Made from the volume alone, so it can be made in another process."""

    key: str
    voxels: str
    frame: bytes
    """The bytes of its `.b2nd` file."""
    modality: str
    channels: int
    shape_ijk: Triple
    spacing_mm: tuple[float, float, float]
    affine_ras: Float[np.ndarray, "4 4"]
    body_start_ijk: Triple
    body_size_ijk: Triple
    slope: float
    intercept: float
    provenance: Provenance
    labels: Packed | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedStudy:
    """A study ready to be written. `subject` is a pseudonym."""

    subject: str
    volumes: tuple[Encoded, ...]
    report: Report | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


class Writer:
    """The one process that may write to a store: `with Writer(path) as writer: writer.add(study)`."""

    def __init__(self, path: Path | str) -> None:
        """Name the store; it is opened by `with`."""
        self.path = Path(path)
        self._stack = ExitStack()

    def __enter__(self) -> Writer:
        """Lock the store and clear away what a killed writer left.

        Raises:
            StoreError: no store, a newer one, a damaged one, or another process is writing.
        """
        with ExitStack() as stack:
            self.catalogue = stack.enter_context(Catalogue.write(self.path))
            self._fractions = self.catalogue.fractions()
            self._sweep()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let go of the store."""
        self._stack.__exit__(kind, error, at)

    def add(self, study: EncodedStudy, *, source: str = "", fingerprint: str = "") -> tuple[str, ...]:
        """Write a study; the files first, then all its rows at once. What is there already is not written twice.

        A report, scan-level labels and voxel labels replace those of an earlier visit; where the study brings none,
        the earlier ones stay. With `source` and `fingerprint` the catalogue remembers where it came from.

        Returns:
            The keys of the volumes.

        Raises:
            IngestError: another subject has a volume with the same voxels (code `duplicate`).
            StoreError: the subject is not a pseudonym, the disk is full, or the folder cannot be written.
        """
        if not PSEUDONYM.fullmatch(study.subject):
            raise StoreError(
                "a subject's id would enter the store as it is", hint="replace it first: store.subjects.pseudonym"
            )
        volumes = {volume.key: volume for volume in study.volumes}
        for volume in volumes.values():
            if self.catalogue.owners(volume.voxels) - {study.subject}:
                raise IngestError(
                    "the same voxels are in the store under another subject, who may be in another split",
                    code="duplicate",
                    hint="find out whose scan it is and keep one copy",
                )
        for volume in volumes.values():
            self._keep_file("volumes", volume.key, volume.frame)
            if volume.labels is not None:
                self._keep_file("labels", volume.labels.key, volume.labels.frame)
        examination = hashlib.sha256("\n".join(sorted(volumes)).encode()).hexdigest()[:16]
        with self.catalogue.transaction():
            for volume in volumes.values():
                self.catalogue.put(self._merge(volume, study, examination))
            if source:
                self.catalogue.note_done(source, fingerprint, tuple(volumes))
                self.catalogue.forgive(source)
        return tuple(volumes)

    def refuse(self, refusal: Refusal) -> None:
        """Write a line of the ledger."""
        with self.catalogue.transaction():
            self.catalogue.refuse(refusal)

    def holds(self, source: str, fingerprint: str) -> bool:
        """Tell whether a source got in before, has not changed since, and its files are still whole."""
        done = self.catalogue.done(source)
        return done is not None and done[0] == fingerprint and all(map(self._is_whole, done[1]))

    def _is_whole(self, key: str) -> bool:
        record = self.catalogue.record(key)
        if record is None:
            return False
        files = [(file_path(self.path, "volumes", key), record.bytes - record.label_bytes)]
        if record.has_labels:
            files.append((file_path(self.path, "labels", record.label_key), record.label_bytes))
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    def _keep_file(self, kind: str, name: str, frame: bytes) -> None:
        path = file_path(self.path, kind, name)
        # Equal content has equal bytes, so a file that differs is damaged: coming by again heals it.
        if not path.is_file() or path.read_bytes() != frame:
            write_durably(path, frame)

    def _merge(self, volume: Encoded, study: EncodedStudy, examination: str) -> Record:
        known = self.catalogue.record(volume.key)
        packed = volume.labels
        label_bytes = len(packed.frame) if packed else known.label_bytes if known else 0
        fresh = Record(
            key=volume.key,
            voxels=volume.voxels,
            subject=study.subject,
            study=examination,
            modality=volume.modality,
            channels=volume.channels,
            shape_ijk=volume.shape_ijk,
            spacing_mm=volume.spacing_mm,
            affine_ras=volume.affine_ras,
            body_start_ijk=volume.body_start_ijk,
            body_size_ijk=volume.body_size_ijk,
            dtype="int16",
            slope=volume.slope,
            intercept=volume.intercept,
            split=split_of(study.subject, self._fractions),
            bytes=len(volume.frame) + label_bytes,
            label_key=packed.key if packed else known.label_key if known else "",
            label_bytes=label_bytes,
            classes=packed.classes if packed else known.classes if known else {},
            labels=study.labels,
            report=study.report,
            provenance=volume.provenance,
            ingested=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        if known is None:
            return fresh
        return replace(
            fresh,
            study=known.study,
            labels={**known.labels, **study.labels},
            report=known.report if study.report is None else study.report,
            provenance=known.provenance,
            ingested=known.ingested,
        )

    def _sweep(self) -> None:
        """Remove drafts, and files that no row speaks of: their writer was killed before the row was written."""
        for kind, names in self.catalogue.file_names().items():
            for path in (self.path / kind).glob("??/*"):
                if path.name.startswith(_DRAFT) or (path.suffix == ".b2nd" and path.stem not in names):
                    try:
                        path.unlink()
                    except OSError as error:
                        raise _explain(error, path, 0) from error


def write(store: Store, study: Study) -> list[str]:
    """Write one study, whose subject is already a pseudonym, and let `store` see it.

    Returns:
        The keys of its volumes.

    Raises:
        IngestError: a volume holds values that are not finite, or another subject's voxels.
        StoreError: the store cannot be written.
    """
    with Writer(store.path) as writer:
        keys = writer.add(encode_study(study))
    store.refresh()
    return list(keys)


def encode_study(study: Study) -> EncodedStudy:
    """Bring a study into the form in which it is stored."""
    return EncodedStudy(
        subject=study.subject,
        volumes=tuple(encode(volume) for volume in study.volumes),
        report=study.report,
        labels=study.labels,
    )


def encode(volume: Volume) -> Encoded:
    """Bring a volume into the form in which it is stored: int16, exact where its values allow it.

    Raises:
        IngestError: a value is not finite (code `not-finite`).
    """
    stored, slope, intercept, note = quantise(volume.array)
    affine = np.round(volume.affine_ras.astype(np.float64), 4) + 0.0  # + 0.0 turns -0.0 into 0.0
    voxels = digest(stored, slope, intercept)
    header = {"voxels": voxels, "affine": affine.tolist(), "modality": volume.modality, "dtype": "int16"}
    start, size = body_box(volume)
    notes = volume.provenance.notes + ((note,) if note else ())
    return Encoded(
        key=hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest(),
        voxels=voxels,
        frame=pack(stored),
        modality=volume.modality,
        channels=volume.array.shape[0],
        shape_ijk=volume.shape_ijk,
        spacing_mm=volume.spacing_mm,
        affine_ras=volume.affine_ras.astype(np.float64),
        body_start_ijk=start,
        body_size_ijk=size,
        slope=slope,
        intercept=intercept,
        provenance=replace(volume.provenance, notes=notes),
        labels=None if volume.labels is None else _encode_labels(volume.labels),
    )


def quantise(
    array: Float[np.ndarray, "channel i j k"],
) -> tuple[Int16[np.ndarray, "channel i j k"], float, float, str]:
    """Fit values into int16: as they are, shifted, or rounded to 65536 steps between the least and the greatest.

    Returns:
        The stored numbers, slope, intercept, and a note on the largest rounding error ("" where it is exact).

    Raises:
        IngestError: a value is not finite.
    """
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise IngestError(
            "the volume holds values that are not finite (NaN or infinite)",
            code="not-finite",
            hint="export it again, or replace them before ingesting",
        )
    # Slab by slab, so that a whole scan needs no second copy in float64.
    slabs = [(slice(None), slice(at, at + SLAB)) for at in range(0, array.shape[1], SLAB)]
    fits = max(-low, high) < 2**24 and high - low <= INT16.max - INT16.min
    if fits and all((np.rint(array[slab]) == array[slab]).all() for slab in slabs):
        # Whole numbers below 2^24 are exact in float32, so the shift rounds nothing.
        intercept = 0.0 if low >= INT16.min and high <= INT16.max else low - INT16.min
        return (array - np.float32(intercept)).astype(np.int16), 1.0, intercept, ""
    slope = (high - low) / (INT16.max - INT16.min) or 1.0
    intercept = low - INT16.min * slope if high > low else low
    stored, error = np.empty(array.shape, np.int16), 0.0
    for slab in slabs:
        steps = np.rint((array[slab].astype(np.float64) - intercept) / slope)
        stored[slab] = np.clip(steps, INT16.min, INT16.max)
        apart = decode(stored[slab], slope, intercept).astype(np.float64) - array[slab]
        error = max(error, float(np.abs(apart).max()))
    return stored, slope, intercept, f"stored as int16 in steps of {slope:.6g}; largest rounding error {error:.6g}"


def body_box(volume: Volume) -> tuple[Triple, Triple]:
    """Find the box of all voxels of a CT denser than -500 HU, as start and size; else the whole volume."""
    whole = (0, 0, 0), volume.shape_ijk
    if volume.modality != "CT":
        return whole
    dense: Any = volume.array > AIR_HU
    if not dense.any():
        return whole
    over_k = dense.any(axis=3)
    sides = [
        np.flatnonzero(side) for side in (over_k.any(axis=(0, 2)), over_k.any(axis=(0, 1)), dense.any(axis=(0, 1, 2)))
    ]
    i, j, k = ((int(side[0]), int(side[-1] - side[0] + 1)) for side in sides)
    return (i[0], j[0], k[0]), (i[1], j[1], k[1])


def pack(stored: Int16[np.ndarray, "channel i j k"]) -> bytes:
    """Compress to the bytes of a `.b2nd` file. One thread and fixed settings: equal input gives equal bytes."""
    contiguous: Any = np.ascontiguousarray(stored)
    packed: Any = blosc2.asarray(
        contiguous,
        chunks=tuple(map(min, CHUNKS, stored.shape)),
        blocks=tuple(map(min, BLOCKS, stored.shape)),
        cparams=blosc2.CParams(
            codec=blosc2.Codec.LZ4,
            clevel=5,
            typesize=2,
            nthreads=1,
            filters=[blosc2.Filter.BITSHUFFLE],  # never with DELTA: the two did not round-trip together
            filters_meta=[0],
        ),
    )
    return bytes(packed.to_cframe())


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is either whole, and survives a power cut, or not there.

    Raises:
        StoreError: the disk is full, or the folder cannot be written. Nothing is left behind.
    """
    draft = path.with_name(_DRAFT + path.name)
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            _sync_folder(path.parent.parent)
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync_folder(path.parent)
    except OSError as error:
        if path.parent.is_dir():
            draft.unlink(missing_ok=True)
        raise _explain(error, path, len(data)) from error


_DRAFT = ".draft-"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: OSError, path: Path, size: int) -> StoreError:
    root = path.parents[2]
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(root).free
        return StoreError(
            f"the disk is full: the next scan needs {size} bytes in the store '{root}', {free} are free",
            hint="free some space and run the same command again; what is in the store is whole",
        )
    return StoreError(f"the store '{root}' cannot be written: {error.strerror}", hint="check the folder's rights")


def _encode_labels(labels: LabelMap) -> Packed:
    stored = np.ascontiguousarray(labels.array[None], dtype=np.int16)
    return Packed(key=digest(stored, 1.0, 0.0), frame=pack(stored), classes=dict(labels.classes))
