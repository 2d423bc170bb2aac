"""Sources -> checks -> store: read every scan, keep what is sound, and write down why the rest was refused."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from voxelstem.annotations import Masks, Reports, lay_mask, read_masks, read_reports
from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.progress import Advance, progress
from voxelstem.sources import Source, iterate
from voxelstem.store.catalogue import Refusal, is_store
from voxelstem.store.reader import Store
from voxelstem.store.subjects import key_mark, pseudonym, site_key, source_name
from voxelstem.store.writer import EncodedStudy, Writer, encode_study
from voxelstem.study import Study

WAITING_FOR_EACH_WORKER = 2
SHORTEST_NAME = 4
"""Names shorter than this are only removed from a message where it quotes them: a folder may be called `1`."""
Show = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A scan or mask that did not get in, for the person who ran `ingest`; the store keeps no names."""

    relative: str
    """Where it lies below SRC (or below the folder of masks)."""
    source: str
    """Its name in the store's ledger."""
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestReport:
    """What came of an ingest."""

    kept: int
    """Sources that brought something: a scan, or labels for one."""
    skipped: int
    """Sources of which everything was in the store already."""
    refused: int
    """Lines that this run wrote into the ledger."""
    subjects: int
    """Subjects in the store now."""
    reports_unused: int
    """Reports of which no scan is in this ingest."""
    refusals: tuple[Refused, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One source to be read, maybe in another process."""

    source: Source
    name: str
    """The ledger's name for it."""
    known: str
    """Its fingerprint when it got in before; empty if it did not."""
    mask: Path | None
    classes: dict[int, str]
    modality: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a task: a study, or why there is none. Holds nobody's name."""

    fingerprint: str = ""
    study: EncodedStudy | None = None
    code: str = ""
    reason: str = ""
    mask_code: str = ""
    mask_reason: str = ""


def ingest(
    sources: Sequence[Path | str],
    store: Path | str,
    *,
    workers: int = 1,
    labels: Path | None = None,
    reports: Path | None = None,
    modality: str | None = None,
    show: Show = progress,
) -> IngestReport:
    """Read all scans below `sources` into a store, which is made where there is none.

    One bad scan stops nothing: it becomes a line of the store's ledger. Run again, it skips what has not changed,
    tries again what was refused, and finishes what was interrupted.

    Args:
        sources: Files, DICOM folders, or folders with many of either.
        store: The store's folder.
        workers: Processes that read and compress; one process writes.
        labels: Folder of masks, see `annotations.read_masks`.
        reports: A `.jsonl` or `.csv` file, see `annotations.read_reports`. Its text is kept as it is.
        modality: `CT` or `MR` refuses all others (code `wrong-modality`).
        show: How to show progress.

    Raises:
        IngestError: a path is missing, or there is no scan in it.
        ConfigError: the masks' or reports' description cannot be read, or workers cannot be started.
        StoreError: the store cannot be opened or written, or was made with another site key.
    """
    key = site_key()
    masks = read_masks(labels, sources) if labels else Masks()
    texts = read_reports(reports, key) if reports else Reports()
    found = _find(sources, masks)
    root = Path(store)
    if not is_store(root):
        Store.create(root)
    run = _Run(key, masks, texts)
    with Writer(root) as writer, show("ingest", len(found)) as advance:
        check_key(writer, key)
        tasks = [_task(source, writer, masks, key, modality) for source in found]
        with _read_all(tasks, key, workers) as outcomes:
            for task, outcome in outcomes:
                advance(1, run.keep(writer, task, outcome))
        for path in masks.unused():
            run.refuse(writer, path, masks.relative(path), "label-without-scan", "no scan lies at the mask's place")
    subjects = Store.open(root).subjects()
    return run.report(subjects=len(subjects), reports_unused=texts.unused())


def ingest_studies(studies: Iterable[Study], store: Path | str) -> list[str]:
    """Keep studies that are in memory, such as phantoms; their subjects' ids are replaced by pseudonyms.

    Returns:
        The keys of the volumes.

    Raises:
        IngestError: a volume holds values that are not finite, or another subject's voxels.
        StoreError: as `ingest`.
    """
    key = site_key()
    root = Path(store)
    if not is_store(root):
        Store.create(root)
    keys: list[str] = []
    with Writer(root) as writer:
        check_key(writer, key)
        for study in studies:
            keys += writer.add(encode_study(replace(study, subject=pseudonym(study.subject, key))))
    return keys


def check_key(writer: Writer, key: bytes) -> None:
    """Tie a new store to the site key; two keys would give one person two pseudonyms, maybe in two splits.

    Raises:
        StoreError: the store was made with another key.
    """
    mark = writer.catalogue.meta("key")
    if mark is None:
        with writer.catalogue.transaction():
            writer.catalogue.set_meta("key", key_mark(key))
    elif mark != key_mark(key):
        raise StoreError(
            f"the store '{writer.path}' was made with another site key: its pseudonyms are not yours",
            hint="set VOXELSTEM_KEY to the key it was made with, or use another store",
        )


def _find(paths: Sequence[Path | str], masks: Masks) -> list[Source]:
    """List all scans, each once, also where one path lies below another."""
    found = {source.path.resolve(): source for path in paths for source in iterate(Path(path))}
    return [source for path, source in found.items() if path not in masks.files]


class _Run:
    """The counts of one ingest, and its one way into the store."""

    def __init__(self, key: bytes, masks: Masks, reports: Reports) -> None:
        self.key, self.masks, self.reports = key, masks, reports
        self.kept = self.skipped = 0
        self.refusals: list[Refused] = []

    def report(self, *, subjects: int, reports_unused: int) -> IngestReport:
        return IngestReport(
            kept=self.kept,
            skipped=self.skipped,
            refused=len(self.refusals),
            subjects=subjects,
            reports_unused=reports_unused,
            refusals=tuple(self.refusals),
        )

    def keep(self, writer: Writer, task: Task, outcome: Outcome) -> str:
        """Write what a task gave; return a word for the progress line."""
        source = task.source
        if outcome.mask_code and task.mask:
            relative = self.masks.relative(task.mask)
            self.refuse(writer, task.mask, relative, outcome.mask_code, outcome.mask_reason)
        if outcome.code:
            self.refuse(writer, source.path, source.relative, outcome.code, outcome.reason)
            return "refused"
        news = False
        if outcome.study is None:
            done = writer.catalogue.done(task.name)
            keys = done[1] if done else ()
        else:
            # Without a fingerprint it is read again next time, when its mask may have been put right.
            fingerprint = "" if outcome.mask_code else outcome.fingerprint
            before = _annotated(writer, (volume.key for volume in outcome.study.volumes))
            try:
                keys = writer.add(outcome.study, source=task.name, fingerprint=fingerprint)
            except IngestError as error:
                self.refuse(writer, source.path, source.relative, error.code, error.problem)
                return "refused"
            news = before != _annotated(writer, keys)
        self.kept += news
        self.skipped += not news
        self._note(writer, task, outcome, keys)
        return "kept" if news else "skipped"

    def refuse(self, writer: Writer, path: Path, relative: str, code: str, reason: str) -> None:
        name = _name(path, self.key)
        writer.refuse(Refusal(source=name, code=code, reason=reason))
        self.refusals.append(Refused(relative=relative, source=name, code=code, reason=reason))

    def _note(self, writer: Writer, task: Task, outcome: Outcome, keys: tuple[str, ...]) -> None:
        """Add the report, and strike the line of a mask that is good now."""
        records = [record for record in map(writer.catalogue.record, keys) if record is not None]
        with writer.catalogue.transaction():
            for record in records:
                text = self.reports.find(task.source.relative, record.subject)
                if text is not None and text != record.report:
                    writer.catalogue.put(replace(record, report=text))
            if task.mask and not outcome.mask_code:
                writer.catalogue.forgive(_name(task.mask, self.key))


def _annotated(writer: Writer, keys: Iterable[str]) -> dict[str, tuple[str, dict[int, str]] | None]:
    """Which of these volumes are in the store, and with which voxel labels."""
    records = {key: writer.catalogue.record(key) for key in keys}
    return {key: record and (record.label_key, dict(record.classes)) for key, record in records.items()}


def _name(path: Path, key: bytes) -> str:
    # The whole path: two hospitals' folders may both hold `case1/ct.nii.gz`.
    return source_name(path.resolve().as_posix(), key)


def _task(source: Source, writer: Writer, masks: Masks, key: bytes, modality: str | None) -> Task:
    name = _name(source.path, key)
    done = writer.catalogue.done(name)
    known = done[0] if done and writer.holds(name, done[0]) else ""
    mask = masks.take(source.relative)
    classes = masks.names(source.relative)
    return Task(source=source, name=name, known=known, mask=mask, classes=classes, modality=modality)


@contextmanager
def _read_all(tasks: Sequence[Task], key: bytes, workers: int) -> Generator[Iterable[tuple[Task, Outcome]], None, None]:
    """Read all tasks, here or in `workers` processes; in order, so that the store does not depend on who was first."""
    if workers <= 1:
        yield ((task, read_task(task, key)) for task in tasks)
        return
    readers = _Readers(workers)
    try:
        yield readers.read(tasks, key)
    finally:
        readers.stop()


class _Readers:
    """Processes that read. One that dies, of a bad file or for want of memory, takes nothing else with it."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pool = _start(workers)

    def read(self, tasks: Sequence[Task], key: bytes) -> Generator[tuple[Task, Outcome], None, None]:
        waiting: deque[tuple[Task, Future[Outcome]]] = deque()
        for task in tasks:
            if len(waiting) >= WAITING_FOR_EACH_WORKER * self.workers:
                yield self._next(waiting, key)
            waiting.append((task, self._submit(task, key)))
        while waiting:
            yield self._next(waiting, key)

    def stop(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, task: Task, key: bytes) -> Future[Outcome]:
        try:
            return self.pool.submit(read_task, task, key)
        except BrokenProcessPool:
            self.stop()
            self.pool = _start(self.workers)
            return self.pool.submit(read_task, task, key)

    def _next(self, waiting: deque[tuple[Task, Future[Outcome]]], key: bytes) -> tuple[Task, Outcome]:
        task, future = waiting.popleft()
        try:
            return task, future.result()
        except BrokenProcessPool:
            # One of the tasks in hand killed its process, and nobody knows which: each is tried again alone.
            return task, _read_alone(task, key)


def _start(workers: int) -> ProcessPoolExecutor:
    # Not fork: a copy of a process whose threads hold locks may wait for them for ever.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool as error:
        raise ConfigError(
            "processes that read cannot be started from here",
            hint='use one worker, or run ingest from a script below `if __name__ == "__main__":`',
        ) from error
    return pool


def _read_alone(task: Task, key: bytes) -> Outcome:
    with _start(1) as pool:
        try:
            return pool.submit(read_task, task, key).result()
        except BrokenProcessPool:
            return Outcome(code="reader-died", reason="the process that read it died, perhaps for want of memory")


def read_task(task: Task, key: bytes) -> Outcome:
    """Read and encode one source; whatever is wrong with it becomes the outcome's code and reason."""
    names = (task.source.subject, *task.source.relative.split("/"))
    try:
        fingerprint = _fingerprint(task)
        if task.known == fingerprint:
            return Outcome(fingerprint=fingerprint)
        study = _choose(task.source.read(), task.modality)
        mask_code = mask_reason = ""
        if task.mask:
            try:
                study = lay_mask(study, task.mask, task.classes)
            except IngestError as error:
                mask_code, mask_reason = error.code, _scrub(error.problem, task.mask, ())
        encoded = encode_study(replace(study, subject=pseudonym(study.subject, key)))
        return Outcome(fingerprint=fingerprint, study=encoded, mask_code=mask_code, mask_reason=mask_reason)
    except IngestError as error:
        return Outcome(code=error.code, reason=_scrub(error.problem, task.source.path, names))
    except MemoryError:
        return Outcome(code="too-large", reason="there is not enough memory to read it")
    except OSError as error:
        return Outcome(code="unreadable", reason=f"it cannot be read: {error.strerror}")
    except ValueError as error:
        return Outcome(code="unreadable", reason=_scrub(str(error), task.source.path, names))


def _fingerprint(task: Task) -> str:
    """Digest every byte that decides what gets into the store, file by file."""
    total = hashlib.sha256(repr(sorted(task.classes.items())).encode() if task.mask else b"")
    path = task.source.path
    files = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    for file in [*files, *([task.mask] if task.mask else [])]:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def _choose(study: Study, modality: str | None) -> Study:
    volumes = tuple(volume for volume in study.volumes if modality in (None, volume.modality))
    if not volumes:
        seen = " and ".join(sorted({volume.modality for volume in study.volumes})) or "nothing"
        raise IngestError(f"it holds {seen}, and {modality} is wanted", code="wrong-modality")
    return replace(study, volumes=volumes)


def _scrub(message: str, path: Path, known: Iterable[str]) -> str:
    """Take out of a message every name that may be a person's: of files, of folders, of members of a zip."""
    names = {*known, str(path), str(path.resolve()), path.name, path.stem, path.name.split(".")[0]}
    if path.is_dir():
        names |= {entry.name for entry in path.iterdir()}
    elif path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            names |= {Path(member).name for member in packed.namelist()}
    for name in sorted(filter(None, names), key=len, reverse=True):
        message = message.replace(f"'{name}'", "the file")
        if len(name) >= SHORTEST_NAME:
            message = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "the file", message)
    return message
