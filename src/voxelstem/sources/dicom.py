"""One CT or MR series, single-frame or multi-frame, from a folder, files or a zip, placed by its own vectors only.

Every file is read once and its header parsed once; every slice is decoded straight into its place of the volume.
Where slices lie is proved in `grid`, what pictures are refused stands in `gates`, how pixels are stored in `pixels`.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pydicom.config import disable_value_validation
from pydicom.uid import UID, UID_dictionary

from voxelstem import geometry
from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.frames import Slice, slices_of
from voxelstem.sources.gates import FEWEST_VOXELS, ImageFacts, check_hu, check_image, check_mr
from voxelstem.sources.grid import Grid, place
from voxelstem.sources.header import UNREADABLE, Header, Picture, is_dicom, lacks, open_picture
from voxelstem.sources.keep import acquisition_of
from voxelstem.sources.pixels import LOSSY, Layout, layout, planes
from voxelstem.sources.repair import straighten
from voxelstem.sources.series import ENDINGS, NO_PICTURES, members
from voxelstem.sources.values import AIR_HU, Reading, may_be_wrong, stray_bits
from voxelstem.study import Provenance, Study, Volume

MOST_FILES = 20_000
FEWEST_STRAY = 100
"""Values beyond the declared bits that prove a wrong declaration rather than damage."""
FEWEST_ALIKE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is to be decoded, and to where."""

    pictures: list[Picture | None]
    """In the order of their slices; a file is let go when nothing needs its bytes any longer."""
    stored: list[Layout]
    slices: list[Slice]
    grid: Grid
    modality: str
    patient: str
    """PatientID of all pictures that have one; empty where none has."""
    doubts: tuple[str, ...]
    """What is odd in the headers and no reason to refuse."""


def read(
    path: Path,
    *,
    subject: str,
    files: Sequence[Path] = (),
    members: Sequence[str] = (),
    series: str = "",
    repair: bool = False,
) -> Study:
    """Read one CT or MR series.

    Padding of a CT (PixelPaddingValue) becomes -1024 HU, that of an MR the lowest value beside it; the provenance
    says so.

    Args:
        path: A folder (its subfolders are other series), one file, or a zip.
        subject: Used where the series has no PatientID.
        files: Which files to read, where not all of the folder's belong to the series.
        members: The same for a zip: names inside it.
        series: Read only pictures with this SeriesInstanceUID.
        repair: Resample gantry tilt and uneven slices to an even grid instead of refusing them.

    Raises:
        IngestError: `missing`, `empty`, `corrupt`, `several-series`, `several-volumes`, `several-patients`,
            `unsupported` (colour, codec, a lookup table), `no-geometry`, `bad-affine`,
            `mixed-orientation`, `mixed-size`, `mixed-pixels`, `too-few-slices`, `duplicate-slices`, `tilt`,
            `slice-gaps`, `no-rescale` (CT), `not-hu`, `stray-bits`, `wrapped`, `too-large` or `constant`;
            and what `gates.check_image`, `check_hu` and `check_mr` refuse.
    """
    # pydicom's warnings and log lines quote header values, which may name the patient.
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        plan = _plan(_pictures(path, files, members, series), repair=repair)
        return _assemble(plan, subject)


def _sources(path: Path, files: Sequence[Path], chosen: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The files' names and bytes, one after another, in the order of their names."""
    if files or path.is_dir():
        found = files or (entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        for entry in sorted(found):
            yield entry.name, _bytes(entry)
    elif path.suffix.lower() != ".zip":
        yield path.name, raster.read_bytes(path)
    elif not path.is_file():
        raise IngestError(f"there is no file '{raster.shown(path.name)}'", code="missing", hint="check the path")
    else:
        with zipfile.ZipFile(path) as packed:
            for member in sorted(members(packed), key=lambda one: one.filename):
                if not chosen or member.filename in chosen:
                    # zipfile stops at the declared size and compares the checksum.
                    yield Path(member.filename).name, packed.read(member)


def _bytes(path: Path) -> bytes:
    """A file's bytes; of one that is no DICOM only the first."""
    with path.open("rb", buffering=0) as opened:  # a buffer would be joined with the rest by one more copy
        start = opened.read(132)
        if not (is_dicom(start) or path.suffix.lower() in ENDINGS):
            return start
        opened.seek(0)
        return opened.read()


def _pictures(path: Path, files: Sequence[Path], chosen: Sequence[str], series: str) -> list[Picture]:
    """Every picture's bytes and header; reports, structures and directories are passed over."""
    found: list[Picture] = []
    total = number = 0
    sources = _sources(path, files, chosen)
    while True:
        number += 1
        name = f"image {number}"  # archives name files by UID, which may lead to the patient
        try:
            file_name, data = next(sources, ("", b""))
        except UNREADABLE as problem:
            raise raster.corrupt(name, "it cannot be read from disk") from problem
        if not file_name:
            break
        total += len(data)
        if number > MOST_FILES or total > raster.MOST_BYTES:
            raise raster.too_large("the series", f"has more than {number} files or {total / 2**30:.1f} GiB")
        named = file_name.lower().endswith(ENDINGS)
        if data and not is_dicom(data) and not named:
            continue
        picture = open_picture(data, name=name)
        own = picture.header.text("SeriesInstanceUID")
        if not _may_be_picture(picture.header) or (series and own and own != series):
            continue
        if "Rows" not in picture.header.dataset:  # dropping it would make a shorter volume that looks whole
            raise lacks("picture", name=name)
        found.append(picture)
    if not found:
        raise IngestError(
            f"'{raster.shown(path.name)}' holds no DICOM image",
            code="empty",
            hint="give the folder that holds the series' images",
        )
    return found


def _may_be_picture(header: Header) -> bool:
    """Only what surely is something else (a report, a directory) may be passed over."""
    sop_class = header.text("SOPClassUID")
    other = sop_class in UID_dictionary and "Image Storage" not in UID(sop_class).name
    return not other and header.text("Modality") not in NO_PICTURES


def _plan(pictures: list[Picture], *, repair: bool) -> _Plan:
    """Check what the pictures are before where they lie, and where they lie before anything is unpacked."""
    patient = _check_one_series([picture.header for picture in pictures])
    doubts = dict.fromkeys(doubt for picture in pictures for doubt in _check_kind(picture.header))
    stored = [layout(picture) for picture in pictures]
    if len({(one.bits_allocated, one.bits_stored, one.high_bit, one.signed) for one in stored}) > 1:
        raise IngestError(
            "the slices of the series store their values in different ways",
            code="mixed-pixels",
            hint="give one reconstruction in its own folder",
        )
    slices = [one for index, picture in enumerate(pictures) for one in slices_of(index, picture, stored[index])]
    if len({one.stack for one in slices}) > 1:
        raise IngestError(
            f"the series holds {len({one.stack for one in slices})} volumes (stacks, echoes, times or b-values)",
            code="several-volumes",
            hint="export each volume as a series of its own",
        )
    _check_rescale(slices)
    raster.check_size("the series", (len(slices), stored[0].rows, stored[0].columns), np.dtype(np.float32).itemsize)
    grid = place([one.frame for one in slices], repair=repair)
    ordered = [slices[index] for index in grid.order]
    # By their first slice, so that names of files mean nothing, also for the digest.
    files = list(dict.fromkeys(one.picture for one in ordered))
    # Without the frames: they hold on to their files.
    light = [replace(one, picture=files.index(one.picture), frame=replace(one.frame, digest=None)) for one in ordered]
    return _Plan(
        pictures=[pictures[index] for index in files],
        stored=[stored[index] for index in files],
        slices=light,
        grid=grid,
        modality=pictures[0].header.text("Modality"),
        patient=patient,
        doubts=tuple(doubts),
    )


def _check_one_series(headers: list[Header]) -> str:
    """Refuse pictures of different series or patients; return the PatientID, which some of them may lack."""
    # De-identified series may have no number at all; they count as one.
    if len({one.text("SeriesInstanceUID") for one in headers}) > 1:
        count = len({one.text("SeriesInstanceUID") for one in headers})
        raise IngestError(
            f"the folder holds {count} series in {len(headers)} images",
            code="several-series",
            hint="take them all with `voxelstem ingest`, or put each into its own folder",
        )
    patients = {one.text("PatientID").strip().strip("\0") for one in headers} - {""}
    if len(patients) > 1:
        raise IngestError(
            "the images of the series name different patients",
            code="several-patients",
            hint="ask the archive which patient the series belongs to",
        )
    return next(iter(patients), "")


def _check_rescale(slices: list[Slice]) -> None:
    """Refuse one slice with a rescale of its own: scanners give one to all slices or to each, damage to one."""
    counts = Counter((one.slope, one.intercept) for one in slices)
    if len(slices) >= FEWEST_ALIKE and len(counts) == 2 and min(counts.values()) == 1:  # noqa: PLR2004 - it and the rest
        raise IngestError(
            "one slice has another rescale slope or intercept than all others",
            code="mixed-pixels",
            hint="its header is damaged, or it belongs to another reconstruction: export the series again",
        )


def _check_kind(header: Header) -> tuple[str, ...]:
    """Refuse what is no plain CT or MR acquisition, before any geometry; return what is doubtful."""
    facts = ImageFacts(
        modality=header.text("Modality"),
        sop_class=header.text("SOPClassUID"),
        image_type=tuple(map(str, header.values("ImageType"))),
        burned_in=header.text("BurnedInAnnotation"),
        patient_position=header.text("PatientPosition"),
        orientation=header.vector("ImageOrientationPatient", 6),
    )
    doubts = check_image(facts, name=header.name)
    if header.items("ModalityLUTSequence"):
        raise IngestError(
            f"{header.name} gives its values by a lookup table", code="unsupported", hint="export the original series"
        )
    return doubts


def _assemble(plan: _Plan, subject: str) -> Study:
    """Decode every slice into its place, and turn the volume to RAS+ on the way."""
    first = plan.pictures[0]
    assert first is not None
    acquisition = acquisition_of(first.header.dataset)
    lossy = first.header.text("LossyImageCompression") == "01" or first.syntax in LOSSY
    filled = _fill(plan)
    notes = [*plan.doubts, *plan.grid.notes, *filled.notes, *(["pixels were compressed with loss"] if lossy else [])]
    turned, affine = filled.array, filled.affine_ras
    if plan.grid.repair is not None:
        straight, affine, repaired = straighten(turned, plan.grid)
        turned, affine = geometry.to_ras(straight, affine)
        notes += repaired
    if filled.stray:
        _check_stray(turned, filled.stray)
        notes.append(f"{filled.stray} values need more bits than the header declares: all bits read give HU")
    (check_hu if plan.modality == "CT" else check_mr)(turned)
    provenance = Provenance(
        source_format="dicom",
        sha256=filled.sha256,
        orientation=geometry.orientation(plan.grid.affine_ras),
        notes=tuple(notes),
    )
    volume = Volume(
        array=turned[None],
        affine_ras=affine,
        modality=plan.modality,
        provenance=provenance,
        acquisition=acquisition,
    )
    return Study(subject=plan.patient or subject, volumes=(volume,))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Filled:
    """The volume: RAS+, or (column, row, slice) where it must be repaired first."""

    array: Float[np.ndarray, "i j k"]
    affine_ras: Float[np.ndarray, "4 4"]
    sha256: str
    notes: tuple[str, ...]
    stray: int = 0
    """Values of a CT that need more bits than the header says were stored."""


def _fill(plan: _Plan) -> _Filled:
    """Decode the series as its headers say, and once more with the other sign where that proves to be wrong.

    Raises:
        IngestError: `wrapped` where values are impossible in both readings.
    """
    array, view, affine = _room(plan.grid)
    content = hashlib.sha256()
    reading = _decode(plan, view, content.update)
    notes = reading.notes()
    if reading.is_wrapped():
        plan = replace(plan, stored=[replace(one, signed=not one.signed) for one in plan.stored])
        if all(plan.pictures):
            reading = _decode(plan, view, hashlib.sha256().update)
        if reading.is_wrapped() or reading.low < AIR_HU:
            raise IngestError(
                "the values of the series overflowed: no reading of their sign gives Hounsfield units",
                code="wrapped",
                hint="export the original series",
            )
        word = "signed" if plan.stored[0].signed else "unsigned"
        notes = (*reading.notes(), f"read as {word} numbers against the header, which gives impossible HU")
    if not reading.low < reading.high:
        raise IngestError("every voxel of the series is the same", code="constant", hint="export it again")
    if reading.holes:
        array[np.isnan(array)] = reading.low
    plan.pictures.clear()
    _give_back()
    return _Filled(array=array, affine_ras=affine, sha256=content.hexdigest(), notes=notes, stray=reading.stray)


def _give_back() -> None:
    """Return the files' freed bytes to the system: glibc would keep them beside all that is made of the scan next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _check_stray(array: Float[np.ndarray, "i j k"], count: int) -> None:
    """Accept wider numbers than the header declares only where they prove to be Hounsfield units (metal, mostly).

    Other readers (pydicom, GDCM, SimpleITK, dcm2niix) cut such bits off without a word, which folds metal into tissue.
    """
    problem = f"{count} values of the series need more bits than the header says were stored"
    if array.size < FEWEST_VOXELS or count < FEWEST_STRAY:  # a few are damage
        raise stray_bits(problem)
    try:
        check_hu(array)
    except IngestError as reason:
        raise stray_bits(f"{problem}, and read with all bits they are no Hounsfield units") from reason


def _room(grid: Grid) -> tuple[Float[np.ndarray, "i j k"], Float[np.ndarray, "c r s"], Float[np.ndarray, "4 4"]]:
    """Memory for the volume in RAS+, a view of it as (column, row, slice), and its affine.

    It lies in memory slice after slice, as it is written: across it, every value would touch a page of its own.
    A series that is to be repaired is turned afterwards: both are then the same.
    """
    memory = np.empty(grid.shape[::-1], np.float32).T
    if grid.repair is not None:
        return memory, memory, grid.affine_ras
    _, affine = geometry.turn_to_ras(memory, grid.affine_ras)
    order, flips = geometry.axis_order(grid.affine_ras)
    array = memory.transpose(order)
    view = np.flip(array, tuple(axis for axis, flip in enumerate(flips) if flip))
    return array, view.transpose(np.argsort(order)), affine


def _decode(plan: _Plan, view: Float[np.ndarray, "c r s"], digest: Callable[[bytes], None]) -> Reading:
    """Decode file by file, each frame to its slice; a file is let go when its frames are done."""
    reading = Reading(plan.modality)
    places: dict[tuple[int, int], int] = {(one.picture, one.number): k for k, one in enumerate(plan.slices)}
    for index, stored in enumerate(plan.stored):
        picture = plan.pictures[index]
        assert picture is not None
        digest(picture.data)
        for number, values in enumerate(planes(picture, stored)):
            k = places.get((index, number))
            if k is not None:  # an exact duplicate is not
                one = plan.slices[k]
                plane = reading.values(values, stored, picture.header, slope=one.slope, intercept=one.intercept)
                view[:, :, k] = plane.T
        if plan.modality != "CT" or not may_be_wrong(stored):
            plan.pictures[index] = None
    return reading
