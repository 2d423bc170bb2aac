"""One scan's way into the store: read, check, lay its mask, resample, take identities away, encode.

The same function for every scan, whichever process or machine it runs in; `ingest` hands out the tasks and writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from voxelstem.annotations import lay_mask
from voxelstem.deidentify import deidentify
from voxelstem.errors import IngestError
from voxelstem.sources import Source, bids, ct_rate, fomo, nnssl
from voxelstem.sources.bids import Bids
from voxelstem.sources.fomo import Fomo
from voxelstem.sources.header import UNREADABLE
from voxelstem.sources.nnssl import Nnssl
from voxelstem.sources.raster import shown
from voxelstem.sources.told import Told, tell
from voxelstem.store.encoding import Encoded, EncodedStudy, Prepared, prepare
from voxelstem.store.spacing import resample_volume
from voxelstem.study import Study, Volume

SHORTEST_NAME = 4
"""Names shorter than this are only removed from a message where it quotes them: a folder may be called `1`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IntakeConfig:
    """What is done with every scan of an ingest."""

    modality: str | None = None
    """`CT` or `MR` refuses all others."""
    spacing_mm: tuple[float, float, float] | None = None
    """Resample every scan to this spacing (along R, A, S); as it is if none."""
    keep_native: bool = False
    """Keep the scan as it was beside the resampled one."""
    repair: bool = False
    """Resample gantry tilt and uneven slices instead of refusing them."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a spacing without extent, or a native scan to keep where nothing is resampled.
        """
        if self.spacing_mm is not None and not all(0 < edge < math.inf for edge in self.spacing_mm):
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        if self.keep_native and self.spacing_mm is None:
            raise ValueError("keep_native needs a spacing_mm: without one the scan is kept as it is")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One source to be read, maybe on another machine."""

    source: Source
    name: str
    """The ledger's name for it."""
    known: str = ""
    """Its fingerprint when it got in before; empty if it did not."""
    mask: Path | None = None
    classes: dict[int, str] = field(default_factory=dict)
    dataset: int = 0
    """Which of the intake's datasets it belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a task: a study, or why there is none. Holds nobody's name."""

    fingerprint: str = ""
    study: EncodedStudy | None = None
    code: str = ""
    reason: str = ""
    mask_code: str = ""
    mask_reason: str = ""


Described = Bids | Fomo | Nnssl
"""What a folder's own tables say of its scans."""


def describe(path: Path) -> Described | None:
    """Read what a folder to ingest says of its scans in tables; None where it says nothing.

    Raises:
        ConfigError: a table is malformed.
    """
    # FOMO's folder has a table that would make it one of BIDS.
    return nnssl.read_collection(path) or fomo.read_folder(path) or bids.read_dataset(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Intake:
    """Reads and encodes one source; whatever is wrong with it becomes the outcome's code and reason."""

    key: bytes = field(repr=False)
    config: IntakeConfig = field(default_factory=IntakeConfig)
    datasets: tuple[Described | None, ...] = (None,)
    """What each of the folders to ingest says about its scans in tables, where it has any."""

    def __call__(self, task: Task) -> Outcome:
        """Take one source in."""
        content = ""
        try:
            content = _content(task.source.all_files())
            fingerprint = f"{content}:{self._wishes(task)}"
            if task.known == fingerprint:
                return Outcome(fingerprint=fingerprint)
            return self._encode(task, fingerprint)
        except (IngestError, MemoryError, OSError, ValueError) as error:
            if isinstance(error, IngestError) and content and task.known.startswith(f"{content}:"):
                # The same bytes got in before, with other wishes. The scan stays, so the ledger has nothing to say.
                return Outcome(fingerprint=task.known)
            code, reason = _why(error, task.source)
            return Outcome(code=code, reason=reason)

    def _wishes(self, task: Task) -> str:
        """Digest what is done with the scan, and all that decides what gets into the store beside its own bytes."""
        relative, dataset = task.source.relative, self.datasets[task.dataset]
        said = bids.said(relative, dataset) if isinstance(dataset, Bids) else _told(relative, dataset)
        classes = sorted(task.classes.items()) if task.mask else None
        mask = _content(filter(Path.is_file, [task.mask])) if task.mask else ""
        wished = (self.config, said, classes, mask, *filter(None, [task.source.dataset]))
        return hashlib.sha256(repr(wished).encode()).hexdigest()

    def _encode(self, task: Task, fingerprint: str) -> Outcome:
        study = _choose(task.source.read(repair=self.config.repair), self.config.modality)
        relative, dataset = task.source.relative, self.datasets[task.dataset]
        table = dataset if isinstance(dataset, Bids) else None
        for source in (bids, ct_rate):
            study = source.annotate(study, relative, table)
        study = tell(study, _told(relative, dataset))
        mask_code = mask_reason = ""
        if task.mask:
            try:
                study = lay_mask(study, task.mask, task.classes)
            except IngestError as error:
                mask_code, mask_reason = error.code, scrub(error.problem, task.mask)
        study = deidentify(study, self.key)
        prepared = [self._fit(volume) for volume in study.volumes]
        study = replace(study, volumes=())  # the floats go before anything is packed
        encoded = EncodedStudy(
            subject=study.subject,
            volumes=tuple(_packed(scan, native) for scan, native in prepared),
            report=study.report,
            labels=study.labels,
        )
        return Outcome(fingerprint=fingerprint, study=encoded, mask_code=mask_code, mask_reason=mask_reason)

    def _fit(self, volume: Volume) -> tuple[Prepared, Prepared | None]:
        """Bring a volume to the wanted spacing; the second is the scan as it was, where it is kept beside that."""
        if self.config.spacing_mm is None:
            return prepare(volume), None
        fitted = resample_volume(volume, self.config.spacing_mm)
        keep = self.config.keep_native and fitted is not volume
        return prepare(fitted), prepare(volume) if keep else None


def _told(relative: str, dataset: Described | None) -> Told | None:
    return fomo.said(relative, dataset) or nnssl.said(relative, dataset)


def _packed(scan: Prepared, native: Prepared | None) -> Encoded:
    return replace(scan.packed(), native=native.packed() if native else None)


def _why(error: Exception, source: Source) -> tuple[str, str]:
    """The code and the sentence of what kept a scan out, without its name."""
    match error:
        case IngestError():
            return error.code, scrub(error.problem, source.path, source)
        case MemoryError():
            return "too-large", "there is not enough memory to read it"
        case OSError():
            return "unreadable", f"it cannot be read: {error.strerror}"
        case _:
            return "unreadable", scrub(str(error), source.path, source)


def _content(files: Iterable[Path]) -> str:
    """Digest every byte, file by file."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def _choose(study: Study, modality: str | None) -> Study:
    volumes = tuple(volume for volume in study.volumes if modality in (None, volume.modality))
    if not volumes:
        seen = " and ".join(sorted({volume.modality for volume in study.volumes})) or "nothing"
        raise IngestError(f"it holds {seen}, and {modality} is wanted", code="wrong-modality")
    return replace(study, volumes=volumes)


def scrub(message: str, path: Path, source: Source | None = None) -> str:
    """Take out of a message every name that may be a person's: of files, of folders, of members of a zip."""
    names = {str(path), str(path.resolve()), path.name, path.stem, path.name.split(".")[0]}
    if source is not None:
        names |= {source.subject, source.person, source.relative, *source.relative.split("/")}
        names |= {file.name for file in source.files}
    # What is damaged enough to be refused may not let itself be listed either.
    with contextlib.suppress(*UNREADABLE):
        if path.is_dir():
            names |= {entry.name for entry in path.iterdir()}
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as packed:
                names |= {Path(member).name for member in packed.namelist()}
    names |= {shown(name) for name in names}
    for name in sorted(filter(None, names), key=len, reverse=True):
        message = message.replace(f"'{name}'", "the file")
        if len(name) >= SHORTEST_NAME:
            message = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "the file", message)
    return message
