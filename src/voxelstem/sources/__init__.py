"""The outside world: finds scans in files and folders and reads each into a `Study`.

A reader is one file and one line in `SOURCES`. The phantom is a source too, without files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from voxelstem.errors import IngestError
from voxelstem.sources.bids import NOT_RAW, SUBJECT, home, is_dataset, is_scan
from voxelstem.sources.raster import LabelGrid, shown
from voxelstem.sources.series import Finder, Glance, Series, glance, in_zip
from voxelstem.study import Study
from voxelstem.table import Table

SOURCES = Table(
    "source",
    {
        "nifti": "voxelstem.sources.nifti:read",
        "dicom": "voxelstem.sources.dicom:read",
        "nrrd": "voxelstem.sources.nrrd:read",
        "mha": "voxelstem.sources.mha:read",
        "b2nd": "voxelstem.sources.b2nd:read",
    },
)
"""Each entry is a function `read(path, *, subject) -> Study`; `subject` stands in where the file knows none. DICOM's
takes more: which files, which series, whether to repair."""

MASKS = Table(
    "mask",
    {
        "nifti": "voxelstem.sources.nifti:read_labels",
        "nrrd": "voxelstem.sources.nrrd:read_labels",
        "mha": "voxelstem.sources.mha:read_labels",
        "b2nd": "voxelstem.sources.b2nd:read_labels",
    },
)
"""Each entry is a function `read_labels(path) -> LabelGrid`."""

KINDS = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "mha",
    ".mhd": "mha",
    ".b2nd": "b2nd",
    ".dcm": "dicom",
    ".ima": "dicom",
    ".zip": "dicom",
}
"""File endings and who reads them. DICOM files often have none; they are known by the word DICM inside."""

MOST_NAMED = 10  # studies that an error lists
STORE_FILE = "catalogue.sqlite"
"""What a store holds at its top (`store.catalogue.FILE_NAME`, which readers of the outside world do not import)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One scan that was found and not yet read: a file, or a folder with a DICOM series."""

    path: Path
    relative: str
    """Where it lies below the folder that was searched, with forward slashes."""
    kind: str
    """A name in `SOURCES`."""
    subject: str
    """The raw id by the folder's rule, unique within `dataset`; a PatientID inside DICOM wins over it."""
    dataset: str = ""
    """What tells the BIDS data set that it lies in from others, in which this subject is somebody else."""
    series: str = ""
    """SeriesInstanceUID, where a folder or a zip holds more DICOM than this series."""
    files: tuple[Path, ...] = ()
    """The series' files, where not all DICOM pictures of the folder belong to it, or some lie in others."""
    members: tuple[str, ...] = ()
    """The same for a zip: the names inside."""
    unreadable: bool = False
    """It, or a file of it, cannot be opened: it is refused when it is read, instead of being lost without a word."""

    @property
    def person(self) -> str:
        """The raw id, told apart from people of other data sets."""
        return f"{self.dataset}/{self.subject}" if self.dataset else self.subject

    def read(self, *, repair: bool = False) -> Study:
        """Read it.

        Args:
            repair: Resample a DICOM series with gantry tilt or uneven slices instead of refusing it.

        Raises:
            IngestError: the scan was refused; `code` says why.
        """
        if self.unreadable:
            raise IngestError(
                "it cannot be opened, or a file of it cannot",
                code="unreadable",
                hint="check its rights, where its links lead, and that it is no pipe",
            )
        reader = SOURCES[self.kind]
        if self.kind != "dicom":
            return reader(self.path, subject=self.person)
        return reader(
            self.path, subject=self.person, files=self.files, members=self.members, series=self.series, repair=repair
        )

    def all_files(self) -> tuple[Path, ...]:
        """Every file that decides what is read, in a stable order; none where one cannot be opened."""
        if self.unreadable:
            return ()
        if self.files or not self.path.is_dir():
            return self.files or (self.path,)
        return tuple(sorted(entry for entry in self.path.iterdir() if entry.is_file()))


def read(path: str | Path) -> Study:
    """Read the one scan that a file, a DICOM folder or a zip of one holds.

    Raises:
        IngestError: `several-studies` when there is more than one (it lists them), `missing`, `empty`,
            `unknown-format`, or why the scan was refused.
    """
    found = list(iterate(Path(path)))
    if len(found) > 1:
        named = ", ".join(source.relative for source in found[:MOST_NAMED])
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise IngestError(
            f"the folder holds {len(found)} scans: {named}{more}",
            code="several-studies",
            hint="name one of them, or take them all with `voxelstem ingest`",
        )
    return found[0].read()


def read_labels(path: str | Path) -> LabelGrid:
    """Read a mask of class numbers from a NIfTI, NRRD or MetaImage file, turned to RAS+.

    Raises:
        IngestError: `missing`, `unknown-format`, `not-labels`, or why the file was refused.
    """
    path = Path(path)
    kind = KINDS.get(ending(path.name))
    if kind is None or kind not in MASKS:
        raise _unknown(path)
    return MASKS[kind](path)


def iterate(src: str | Path) -> Iterator[Source]:
    """Find scans below a folder, or take one file; in a stable order and without reading voxels.

    DICOM is found by SeriesInstanceUID, whatever files and folders are called: each series of a folder or a zip is a
    scan, and one that is spread over folders is one scan. Its `relative` is the folder that holds it all, followed by
    `#` and a piece of the UID's digest where that folder holds more. Series come after other files of their folder,
    and only when all folders that may hold more of them were seen (`series.MOST_HELD`). Every file is opened once.

    Links to folders are followed after all else, so that a scan keeps the name of where it lies. What cannot be
    opened or listed is a source too, which is refused when it is read.

    Hidden files and files of no known kind are skipped, and so are DICOM files that are no pictures, copies of part
    of a series, stores, `_seg.b2nd` masks beside their scan, and of a BIDS data set derivatives, source data and
    masks (`bids.is_scan`).

    Raises:
        IngestError: `missing`, `empty`, or `unknown-format` for a single file.
        ConfigError: the description of a BIDS data set is malformed.
    """
    src = Path(src)
    if src.is_file():
        yield from _one_file(src)
        return
    if not src.is_dir():
        raise IngestError(f"there is no file or folder '{shown(src.name)}'", code="missing", hint="check the path")
    count = 0
    for source in _below(src):
        count += 1
        yield source
    if not count:
        raise IngestError(
            f"no scan was found in the folder '{shown(src.name)}'",
            code="empty",
            hint=f"scans are DICOM folders or files ending in {', '.join(sorted(KINDS))}",
        )


def _one_file(path: Path) -> Iterator[Source]:
    kind = KINDS.get(ending(path.name))
    if kind is None and glance(path) is not None:
        kind = "dicom"
    if kind is None:
        raise _unknown(path)
    yield from _file(path, path.name, kind)


def _below(src: Path) -> Iterator[Source]:
    finder, in_bids = Finder(), is_dataset(src)
    for folder, names in _folders(src, skipped=NOT_RAW if in_bids else ()):
        if names is None:
            yield _series(src, Series(path=folder, series="", unreadable=True))
            continue
        dicom: list[tuple[str, Glance]] = []
        for name in names:
            path = folder / name
            kind = KINDS.get(ending(name))
            if kind is not None and (kind != "dicom" or ending(name) == ".zip"):
                relative = path.relative_to(src).as_posix()
                if not _is_mask(name, names) and (not in_bids or is_scan(relative)):
                    yield from _file(path, relative, kind)
                continue
            seen = glance(path)
            if seen is not None:
                dicom.append((name, seen))
        for found in finder.add(folder, dicom):
            yield _series(src, found)
    for found in finder.rest():
        yield _series(src, found)


def _is_mask(name: str, names: list[str]) -> bool:
    """Whether it is the mask of a preprocessed scan beside it, as nnU-Net names it."""
    return name.endswith("_seg.b2nd") and f"{name.removesuffix('_seg.b2nd')}.b2nd" in names


def _folders(src: Path, *, skipped: tuple[str, ...]) -> Iterator[tuple[Path, list[str] | None]]:
    """A folder and all below it, with the sorted names of their files, or None where one cannot be listed.

    Neither hidden ones nor stores, nor those at the top that are `skipped`. Links come last, and only to where the
    walk has not been, nor to what it lies in.
    """
    seen = {_place(parent) for parent in src.resolve().parents}
    waiting, links = [src], list[Path]()
    linked = False
    while waiting or links:
        if not waiting:
            waiting, links, linked = links[::-1], [], True
        folder = waiting.pop()
        try:
            place = _place(folder)
            # Folders that no link led to are never asked: some file systems have no numbers to tell them apart.
            if linked and place in seen:
                continue
            seen.add(place)
            with os.scandir(folder) as listed:
                entries = sorted((one for one in listed if not one.name.startswith(".")), key=lambda one: one.name)
        except OSError:
            yield folder, None
            continue
        if any(entry.name == STORE_FILE for entry in entries):
            continue
        names: list[str] = []
        below: list[Path] = []
        for entry in entries:
            if not os.path.isdir(entry.path) if entry.is_symlink() else not entry.is_dir(follow_symlinks=False):
                names.append(entry.name)
            elif folder != src or entry.name not in skipped:
                (links if entry.is_symlink() else below).append(folder / entry.name)
        waiting += reversed(below)
        yield folder, names


def _place(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _file(path: Path, relative: str, kind: str) -> Iterator[Source]:
    """One file: one scan, or each series in a zip."""
    subject = raw_subject(relative)
    unreadable = not os.path.isfile(path)  # a pipe, or a link to nowhere
    if unreadable or ending(path.name) != ".zip":
        yield Source(
            path=path,
            relative=relative,
            kind=kind,
            subject=subject,
            dataset=_dataset(path, subject),
            unreadable=unreadable,
        )
        return
    for found in in_zip(path):
        yield Source(
            path=path,
            relative=_marked(relative, found),
            kind=kind,
            subject=subject,
            dataset=_dataset(path, subject),
            series=found.series if found.mark else "",
            members=found.members,
        )


def _series(src: Path, found: Series) -> Source:
    relative = found.path.relative_to(src).as_posix() if found.path != src else src.resolve().name
    subject = raw_subject(relative)
    return Source(
        path=found.path,
        relative=_marked(relative, found),
        kind="dicom",
        subject=subject,
        dataset=_dataset(found.path, subject),
        series=found.series if found.mark else "",
        files=found.files,
        unreadable=found.unreadable,
    )


def _marked(relative: str, found: Series) -> str:
    return f"{relative}#{found.mark}" if found.mark else relative


def _dataset(path: Path, subject: str) -> str:
    return home(path) if SUBJECT.fullmatch(subject) else ""


def raw_subject(relative: str) -> str:
    """Whose scan this is, by its place alone: BIDS `sub-…`, else the folder below SRC, else the file's stem.

    >>> [raw_subject(p) for p in ("a/sub-07/anat/sub-07_T1w.nii.gz", "case3/ct.nii.gz", "case4.nii.gz")]
    ['sub-07', 'case3', 'case4']
    """
    entity = re.search(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", relative)
    if entity:
        return entity.group(1)
    first, slash, _ = relative.partition("/")
    return first if slash else stem(first)


def ending(name: str) -> str:
    """The last suffix in small letters; `.nii.gz` counts as one."""
    low = name.lower()
    return ".nii.gz" if low.endswith(".nii.gz") else Path(low).suffix


def stem(name: str) -> str:
    """A file's name without its known ending."""
    return name[: -len(ending(name))] if ending(name) in KINDS else name


def _unknown(path: Path) -> IngestError:
    return IngestError(
        f"'{shown(path.name)}' is no scan of a known kind",
        code="unknown-format" if path.exists() else "missing",
        hint=f"known: DICOM, and files ending in {', '.join(sorted(KINDS))}",
    )
