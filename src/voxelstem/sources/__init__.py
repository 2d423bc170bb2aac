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
from voxelstem.sources.raster import LabelGrid
from voxelstem.study import Study
from voxelstem.table import Table

SOURCES = Table(
    "source",
    {
        "nifti": "voxelstem.sources.nifti:read",
        "dicom": "voxelstem.sources.dicom:read",
        "nrrd": "voxelstem.sources.nrrd:read",
        "mha": "voxelstem.sources.mha:read",
    },
)
"""Each entry is a function `read(path, *, subject) -> Study`; `subject` stands in where the file knows none."""

MASKS = Table(
    "mask",
    {
        "nifti": "voxelstem.sources.nifti:read_labels",
        "nrrd": "voxelstem.sources.nrrd:read_labels",
        "mha": "voxelstem.sources.mha:read_labels",
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
    ".dcm": "dicom",
    ".ima": "dicom",
    ".zip": "dicom",
}
"""File endings and who reads them. DICOM files often have none; they are known by the word DICM inside."""

MOST_NAMED = 10  # studies that an error lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One scan that was found and not yet read: a file, or a folder with a DICOM series."""

    path: Path
    relative: str
    """Where it lies below the folder that was searched, with forward slashes."""
    kind: str
    """A name in `SOURCES`."""
    subject: str
    """The raw id by the folder's rule; a PatientID inside DICOM wins over it when the scan is read."""

    def read(self) -> Study:
        """Read it.

        Raises:
            IngestError: the scan was refused; `code` says why.
        """
        return SOURCES[self.kind](self.path, subject=self.subject)


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

    The DICOM files of one folder count as one scan. Hidden files and files of no known kind are skipped.

    Raises:
        IngestError: `missing`, `empty`, or `unknown-format` for a single file.
    """
    src = Path(src)
    if src.is_file():
        kind = _kind(src)
        if kind is None:
            raise _unknown(src)
        yield Source(path=src, relative=src.name, kind=kind, subject=raw_subject(src.name))
        return
    if not src.is_dir():
        raise IngestError(f"there is no file or folder '{src.name}'", code="missing", hint="check the path")
    count = 0
    for folder, below, names in os.walk(src):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for source in _in_folder(src, Path(folder), sorted(names)):
            count += 1
            yield source
    if not count:
        raise IngestError(
            f"no scan was found in the folder '{src.name}'",
            code="empty",
            hint=f"scans are DICOM folders or files ending in {', '.join(sorted(KINDS))}",
        )


def _in_folder(src: Path, folder: Path, names: list[str]) -> Iterator[Source]:
    series = False
    for name in names:
        path = folder / name
        kind = None if name.startswith(".") else _kind(path)
        if kind == "dicom" and ending(name) != ".zip":
            series = True
        elif kind is not None:
            relative = path.relative_to(src).as_posix()
            yield Source(path=path, relative=relative, kind=kind, subject=raw_subject(relative))
    if series:
        relative = folder.relative_to(src).as_posix() if folder != src else src.resolve().name
        yield Source(path=folder, relative=relative, kind="dicom", subject=raw_subject(relative))


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


def _kind(path: Path) -> str | None:
    known = KINDS.get(ending(path.name))
    if known is not None or not path.is_file():
        return known
    try:
        with path.open("rb") as handle:
            start = handle.read(132)
    except OSError:
        return None  # a file that nobody may read is nobody's scan; a named one is refused by its reader
    return "dicom" if start[128:] == b"DICM" else None


def _unknown(path: Path) -> IngestError:
    return IngestError(
        f"'{path.name}' is no scan of a known kind",
        code="unknown-format" if path.exists() else "missing",
        hint=f"known: DICOM, and files ending in {', '.join(sorted(KINDS))}",
    )
