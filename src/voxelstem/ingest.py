"""Sources -> checks -> store: read every scan, keep what is sound, and write down why the rest was refused."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from voxelstem import exchange
from voxelstem.annotations import FACES, Laid, Masks, read_masks
from voxelstem.cluster import Cluster
from voxelstem.deidentify import deidentify
from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.intake import Intake, IntakeConfig, Outcome, Task, describe
from voxelstem.progress import Advance, progress
from voxelstem.reports import Reports, read_reports
from voxelstem.sources import Source, iterate, stem
from voxelstem.sources.nnssl import REMOVED, read_collection
from voxelstem.store.catalogue import SUBJECTS, Refusal, is_store
from voxelstem.store.reader import Store
from voxelstem.store.subjects import key_mark, site_key, source_name
from voxelstem.store.volumes import read_volumes
from voxelstem.store.writer import Writer, encode_study
from voxelstem.study import Study
from voxelstem.workers import Lost, Workers

AS_IT_IS = IntakeConfig()
_log = logging.getLogger(__name__)
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
    reports_empty: int
    """Rows of the reports' file without a text."""
    refusals: tuple[Refused, ...]


def ingest(
    sources: Sequence[Path | str],
    store: Path | str,
    *,
    workers: int = 1,
    cluster: str | None = None,
    labels: Path | None = None,
    reports: Path | None = None,
    config: IntakeConfig = AS_IT_IS,
    show: Show = progress,
) -> IngestReport:
    """Read all scans below `sources` into a store, which is made where there is none.

    One bad scan stops nothing: it becomes a line of the store's ledger. Run again, it skips what has not changed,
    tries again what was refused, and finishes what was interrupted.

    Args:
        sources: Files, DICOM folders, or folders with many of either.
        store: The store's folder.
        workers: Processes that read and compress; one process writes.
        cluster: Address of a Ray cluster that reads in their place, see `cluster.Cluster`.
        labels: Folder of masks, see `annotations.read_masks`.
        reports: A `.jsonl`, `.csv` or `.xlsx` file, see `reports.read_reports`. Its text is kept as it is.
        config: What is done with every scan. All scans of a store have one `spacing_mm`.
        show: How to show progress.

    Raises:
        IngestError: a path is missing, or there is no scan in it.
        ConfigError: the masks' or reports' description cannot be read, or workers cannot be started.
        StoreError: the store cannot be opened or written, or was made with another site key or spacing.
    """
    key = site_key()
    masks = read_masks(labels, sources) if labels else Masks()
    texts = read_reports(reports, key) if reports else Reports()
    laid = Laid(masks)
    found = _find(sources, laid)
    _check_places(found, laid, texts)
    intake = Intake(key=key, config=config, datasets=tuple(describe(Path(path)) for path in sources))
    readers = Cluster(intake, cluster) if cluster else Workers(intake, workers if workers > 1 else 0)
    root = Path(store)
    if not is_store(root):
        Store.create(root)
    run = _Run(key, laid, texts)
    with Writer(root) as writer, show("ingest", len(found)) as advance:
        check_key(writer, key)
        _check_spacing(writer, config)
        found = _as_before(found, writer)
        with readers:
            tasks = (_task(source, dataset, writer, laid, key) for source, dataset in found)
            for task, outcome in readers.map(tasks):
                lost = isinstance(outcome, Lost)
                told = Outcome(code=outcome.code, reason=outcome.reason) if lost else outcome
                advance(1, run.keep(writer, task, told))
        for path, relative in laid.unused():
            run.refuse(writer, _name(path, key), relative, "label-without-scan", "no scan lies at the mask's place")
    subjects = Store.open(root).subjects()
    return run.report(subjects=len(subjects), texts=texts)


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
        _check_spacing(writer, AS_IT_IS)
        for study in studies:
            keys += writer.add(encode_study(deidentify(study, key)))
    return keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Noted:
    """What came of tables of volumes."""

    scans: int
    """Scans of the store that have volumes of these tables now."""
    unusable: int
    """Scans in the tables that have no volume inside the skull, and got none."""
    unmatched: int
    """Scans in the tables that are none of the sources', or are not in the store."""


def note_volumes(
    sources: Sequence[Path | str], store: Path | str, *, volumes: Sequence[Path], qc: Sequence[Path] = ()
) -> Noted:
    """Note in a store the volumes that a program measured in its scans, as scan-level labels `volume:<structure>`.

    Args:
        sources: What was ingested: the tables name files, and a store knows none.
        store: The store that they are in.
        volumes: Tables such as SynthSeg's, see `store.volumes.read_volumes`. A scan is named by its path below a
            source, or by its file's name, where only one scan has it.
        qc: Tables of scores for them, or none.

    Raises:
        ConfigError: a table cannot be read; the message names the row.
        IngestError: a path is missing, or there is no scan in it.
        StoreError: the store cannot be opened or written, or was made with another site key.
    """
    key, table = site_key(), read_volumes(volumes, qc)
    found = [source for source, _ in _find(sources, Laid(Masks()))]
    places = Counter(stem(source.relative) for source in found)
    names = Counter(stem(source.relative.rpartition("/")[2]) for source in found)
    used: set[str] = set()
    scans: set[str] = set()
    with Writer(Path(store)) as writer:
        check_key(writer, key)
        for source in found:
            place, name = stem(source.relative), stem(source.relative.rpartition("/")[2])
            # What two scans of different people may be called says nothing of either.
            told = table.find(
                tuple(each for each, count in ((place, places[place]), (name, names[name])) if count == 1)
            )
            done = writer.catalogue.done(_name(source.path, key, source.series))
            if told is None or done is None:
                continue
            used.add(told[0])
            records = [record for record in map(writer.catalogue.record, done[1]) if record is not None]
            with writer.catalogue.transaction():
                labels = told[1].labels()
                writer.catalogue.put(*(replace(record, labels={**record.labels, **labels}) for record in records))
            scans |= {record.key for record in records}
    return Noted(scans=len(scans), unusable=table.unusable, unmatched=len(table.by_scan) - len(used))


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


def _check_spacing(writer: Writer, config: IntakeConfig) -> None:
    """Hold a store to one spacing: the same scan at two spacings would be two scans that are one.

    Raises:
        StoreError: the store was made with another spacing.
    """
    wanted = json.dumps(config.spacing_mm)
    made = writer.catalogue.meta("spacing_mm")
    if made is None and not len(writer.catalogue.file_names()["volumes"]):
        with writer.catalogue.transaction():
            writer.catalogue.set_meta("spacing_mm", wanted)
    elif (made or "null") != wanted:
        named = "as it is" if made in (None, "null") else f"at {made} mm"
        raise StoreError(
            f"the store '{writer.path}' keeps every scan {named}, and now {wanted} is asked for",
            hint="leave --spacing as it was, or ingest into another store",
        )


def _as_before(found: list[tuple[Source, int]], writer: Writer) -> list[tuple[Source, int]]:
    """Leave subjects the ids that a store knows them by: one begun before data sets were told apart has bare ones."""
    if writer.catalogue.meta(SUBJECTS) is not None or not any(source.dataset for source, _ in found):
        return found
    _log.warning(
        "this store was begun before BIDS data sets were told apart: in it `sub-01` of one is `sub-01` of every other. "
        "Nobody in it becomes somebody else by that, but bring another data set into a new store"
    )
    return [(replace(source, dataset=""), number) for source, number in found]


def _find(paths: Sequence[Path | str], laid: Laid) -> list[tuple[Source, int]]:
    """List all scans and which of `paths` each was found in; each once, also where one path lies below another."""
    found: dict[tuple[Path, str], tuple[Source, int]] = {}
    for number, path in enumerate(paths):
        other = exchange.find(Path(path))
        if other is not None:
            laid.own[number] = other.masks
        for source in other.sources if other is not None else _listed(Path(path), number, laid):
            found.setdefault((source.path.resolve(), source.series), (source, number))
    masks = {path for masks in laid.all() for path in masks.files}
    return [(source, number) for (path, _), (source, number) in found.items() if path not in masks]


def _listed(path: Path, number: int, laid: Laid) -> Iterable[Source]:
    """The images that a folder's list names with their masks, or else all scans below it."""
    collection = read_collection(path)
    if collection is None:
        return iterate(path)
    root = path.resolve()
    masks = {scan: root / mask for scan, mask in collection.removed.items()}
    laid.own[number] = Masks(root=root, classes=FACES, by_scan=masks, files=set(masks.values()))
    return collection.sources()


def _check_places(found: Sequence[tuple[Source, int]], laid: Laid, texts: Reports) -> None:
    """See that a mask or a report that is meant for one scan cannot go to two, and let names count only where unique.

    Raises:
        ConfigError: scans of several folders lie at one place, and a mask or report names it.
    """
    places = Counter(source.relative for source, _ in found)
    twice = [place for place, count in places.items() if count > 1]
    meant = [place for place in twice if laid.masks.has(place) or place in texts.by_scan]
    if meant:
        raise ConfigError(
            f"{len(meant)} places hold a scan in each of several folders, and a mask or report is meant for one",
            hint="ingest the folders one after the other, each with its own --labels and --reports",
        )
    names = Counter(name for source, _ in found for name in texts.names(source.relative))
    texts.ambiguous = frozenset(name for name, count in names.items() if count > 1)


class _Run:
    """The counts of one ingest, and its one way into the store."""

    def __init__(self, key: bytes, masks: Laid, reports: Reports) -> None:
        self.key, self.masks, self.reports = key, masks, reports
        self.kept = self.skipped = 0
        self.refusals: list[Refused] = []

    def report(self, *, subjects: int, texts: Reports) -> IngestReport:
        return IngestReport(
            kept=self.kept,
            skipped=self.skipped,
            refused=len(self.refusals),
            subjects=subjects,
            reports_unused=texts.unused(),
            reports_empty=texts.empty,
            refusals=tuple(self.refusals),
        )

    def keep(self, writer: Writer, task: Task, outcome: Outcome) -> str:
        """Write what a task gave; return a word for the progress line."""
        source = task.source
        if outcome.mask_code and task.mask:
            relative = self.masks.relative(task.mask)
            self.refuse(writer, _name(task.mask, self.key), relative, outcome.mask_code, outcome.mask_reason)
        if outcome.code:
            self.refuse(writer, task.name, source.relative, outcome.code, outcome.reason)
            return "refused"
        news = False
        if outcome.study is None:
            done = writer.catalogue.done(task.name)
            keys = done[1] if done else ()
        else:
            # Without a fingerprint it is read again next time, when its mask may have been put right. Whether it is
            # there at all is part of the fingerprint.
            fingerprint = "" if outcome.mask_code and task.mask and task.mask.is_file() else outcome.fingerprint
            before = _annotated(writer, (volume.key for volume in outcome.study.volumes))
            try:
                keys = writer.add(outcome.study, source=task.name, fingerprint=fingerprint)
            except IngestError as error:
                self.refuse(writer, task.name, source.relative, error.code, error.problem)
                return "refused"
            news = before != _annotated(writer, keys)
        self.kept += news
        self.skipped += not news
        self._note(writer, task, outcome, keys)
        return "kept" if news else "skipped"

    def refuse(self, writer: Writer, name: str, relative: str, code: str, reason: str) -> None:
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
            if task.mask and task.mask.is_file() and not outcome.mask_code:
                writer.catalogue.forgive(_name(task.mask, self.key))


def _annotated(writer: Writer, keys: Iterable[str]) -> dict[str, tuple[str, dict[int, str]] | None]:
    """Which of these volumes are in the store, and with which voxel labels."""
    records = {key: writer.catalogue.record(key) for key in keys}
    return {key: record and (record.label_key, dict(record.classes)) for key, record in records.items()}


def _name(path: Path, key: bytes, series: str = "") -> str:
    # The whole path: two hospitals' folders may both hold `case1/ct.nii.gz`.
    return source_name("\0".join(filter(None, (path.resolve().as_posix(), series))), key)


def _task(source: Source, dataset: int, writer: Writer, laid: Laid, key: bytes) -> Task:
    name = _name(source.path, key, source.series)
    done = writer.catalogue.done(name)
    known = done[0] if done and writer.holds(name, done[0]) else ""
    records = map(writer.catalogue.record, done[1]) if done and dataset in laid.own else ()
    drawn = any(record is not None and set(record.classes.values()) - {REMOVED} for record in records)
    mask, classes = laid.take(source.relative, dataset, drawn=drawn)
    return Task(source=source, name=name, known=known, mask=mask, classes=classes, dataset=dataset)
