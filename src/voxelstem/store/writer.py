"""Write a store. A volume is named after its content, so it is there once, and writing it again repeats its bytes."""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from voxelstem.errors import IngestError, StoreError
from voxelstem.store.catalogue import Catalogue
from voxelstem.store.encoding import Encoded, EncodedStudy, encode_study
from voxelstem.store.reader import Store, file_path, files_of
from voxelstem.store.records import Native, Record, Refusal
from voxelstem.store.splits import split_of
from voxelstem.store.subjects import PSEUDONYM
from voxelstem.study import Acquisition, Study

DRAFT = ".draft-"
"""How the name of a file begins that is not whole yet."""


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

        A report, scan-level labels, voxel labels, what the source says of the acquisition, and the native scan
        replace those of an earlier visit; where the study brings none, the earlier ones stay. Only a native scan's
        voxel labels go when other labels come without it. With `source` and `fingerprint` the catalogue remembers
        where it came from.

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
            for (kind, name), frame in _frames(volume).items():
                self._keep_file(kind, name, frame)
        examination = hashlib.sha256("\n".join(sorted(volumes)).encode()).hexdigest()[:16]
        with self.catalogue.transaction():
            self.catalogue.put(*(self._merge(volume, study, examination) for volume in volumes.values()))
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
        files = ((file_path(self.path, kind, name), size) for (kind, name), (size, *_) in files_of(record).items())
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
        said = volume.acquisition
        if known is not None and said == Acquisition():
            said = known.acquisition
        native = _native(volume, known)
        beside = native.bytes + native.label_bytes if native else 0
        fresh = Record(
            key=volume.key,
            voxels=volume.voxels,
            subject=study.subject,
            study=said.study or (known.study if known else examination),
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
            bytes=len(volume.frame) + label_bytes + beside,
            label_key=packed.key if packed else known.label_key if known else "",
            label_bytes=label_bytes,
            classes=packed.classes if packed else known.classes if known else {},
            labels=study.labels,
            report=study.report,
            provenance=volume.provenance,
            ingested=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            acquisition=said,
            thumbnail=volume.thumbnail,
            native=native,
        )
        if known is None:
            return fresh
        return replace(
            fresh,
            labels={**known.labels, **study.labels},
            report=known.report if study.report is None else study.report,
            provenance=known.provenance,
            ingested=known.ingested,
        )

    def _sweep(self) -> None:
        """Remove drafts, and files that no row speaks of: their writer was killed before the row was written."""
        for kind, names in self.catalogue.file_names().items():
            for path in (self.path / kind).glob("??/*"):
                if path.name.startswith(DRAFT) or (path.suffix == ".b2nd" and path.stem not in names):
                    try:
                        path.unlink()
                    except OSError as error:
                        raise _explain(error, path, 0) from error


def _frames(volume: Encoded) -> dict[tuple[str, str], bytes]:
    """List the files of a volume by folder and name."""
    frames = {("volumes", volume.key): volume.frame}
    if volume.labels is not None:
        frames["labels", volume.labels.key] = volume.labels.frame
    if volume.native is not None:
        frames["native", volume.native.key] = volume.native.frame
        if volume.native.labels is not None:
            frames["labels", volume.native.labels.key] = volume.native.labels.frame
    return frames


def _native(volume: Encoded, known: Record | None) -> Native | None:
    """The native scan to keep, with labels of the same visit as the volume's: their classes are said once for both."""
    scan, before, packed = volume.native, known.native if known else None, volume.labels
    if scan is None:
        same = packed is None or known is None or (packed.key, packed.classes) == (known.label_key, known.classes)
        return before if before is None or same else replace(before, label_key="", label_bytes=0)
    if before is not None and before.key == scan.key and packed is None:
        return before
    return Native(
        key=scan.key,
        voxels=scan.voxels,
        bytes=len(scan.frame),
        channels=scan.channels,
        shape_ijk=scan.shape_ijk,
        affine_ras=scan.affine_ras,
        slope=scan.slope,
        intercept=scan.intercept,
        label_key=scan.labels.key if scan.labels else "",
        label_bytes=len(scan.labels.frame) if scan.labels else 0,
    )


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


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is either whole, and survives a power cut, or not there.

    Raises:
        StoreError: the disk is full, or the folder cannot be written. Nothing is left behind.
    """
    draft = path.with_name(DRAFT + path.name)
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
