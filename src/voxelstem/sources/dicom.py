"""One DICOM series of single-frame images, from a folder or a zip, placed by its own vectors only.

Every geometry that would make a distorted volume is refused with its own code. Nothing here reads
SliceThickness, SpacingBetweenSlices, SliceLocation or GantryDetectorTilt: they are descriptions, and the
standard places an image by position and orientation alone (PS3.3, C.7.6.2).
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Float
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.uid import UID

from voxelstem import geometry
from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.study import Provenance, Study, Volume

FEWEST_SLICES = 3  # with two, nothing says whether one is missing between them
MOST_FILES = 20_000
PATIENT_MODALITIES = ("CT", "MR")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
NO_PICTURES = ("SR", "KO", "PR", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG", "SEG")

# Scanners write positions with few digits, so gaps are equal to 0.01 mm or 1 % of a gap, not exactly: an
# error of 1 % is far below what resampling sees, and the smallest real fault, a missing slice, is 100 %.
TOLERANCE_MM = 0.01
TOLERANCE_SHARE = 0.01
TILT_SHARE = 0.1  # of a pixel: how far slices may slide sideways over the whole series
COSINE_TOLERANCE = 1e-3  # orientations are written with 6 digits or fewer

UNREADABLE = (
    InvalidDicomError,
    BytesLengthException,
    AttributeError,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)
"""What pydicom and its decoders raise on damaged files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slice:
    name: str
    """Its number among the files, by name."""
    open: Callable[[], bytes]
    header: Dataset

    def values(self, keyword: str) -> list[object]:
        """What a header holds under a keyword, decoded; empty where it holds nothing."""
        try:
            value = self.header[keyword].value if keyword in self.header else None
            return [] if value in (None, "") else list(value) if isinstance(value, MultiValue) else [value]
        except UNREADABLE as problem:
            raise raster.corrupt(self.name, f"its {keyword} cannot be decoded") from problem

    def text(self, keyword: str) -> str:
        """A header's text; empty where it has none."""
        return "\\".join(map(str, self.values(keyword)))

    def numbers(self, keyword: str) -> Float[np.ndarray, "n"]:
        """A header's numbers. A message names the keyword, never the value, which may be anything."""
        try:
            numbers = np.array([float(str(value)) for value in self.values(keyword)])
        except ValueError as problem:
            raise raster.corrupt(self.name, f"its {keyword} is not a number") from problem
        if not np.isfinite(numbers).all():
            raise raster.corrupt(self.name, f"its {keyword} is not a finite number")
        return numbers

    def number(self, keyword: str, default: float | None = None) -> float:
        """A header's one number, or `default` where it has none."""
        numbers = self.numbers(keyword)
        if not numbers.size and default is not None:
            return default
        if numbers.size != 1:
            raise raster.corrupt(self.name, f"{keyword} must hold one number")
        return float(numbers[0])

    def vector(self, keyword: str, count: int) -> Float[np.ndarray, "n"]:
        """A header's numbers, or the refusal of a series that lacks them."""
        numbers = self.numbers(keyword)
        if not numbers.size:
            raise IngestError(
                f"{self.name} lacks {keyword}, so the series has no place in the patient",
                code="no-geometry",
                hint="export the original series from the archive",
            )
        if numbers.shape != (count,):
            raise raster.corrupt(self.name, f"{keyword} must hold {count} numbers")
        return numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """Where a series lies: array axes are column, row, slice."""

    slices: tuple[_Slice, ...]
    affine_ras: Float[np.ndarray, "4 4"]
    shape: tuple[int, int, int]


def read(path: Path, *, subject: str) -> Study:
    """Read one CT or MR series.

    Args:
        path: The folder (its subfolders are other series) or a zip.
        subject: Used where the series has no PatientID.

    Raises:
        IngestError: `missing`, `empty`, `corrupt`, `several-series`, `localizer`, `unsupported` (multi-frame,
            colour, other modality), `no-geometry`, `mixed-orientation`, `mixed-size`, `too-few-slices`,
            `duplicate-slices`, `tilt`, `slice-gaps`, `no-rescale` (CT), `too-large` or `constant`.
    """
    # pydicom's warnings and log lines quote header values, which may name the patient.
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        slices = _collect(path)
        _check_kind(slices)
        grid = _place(slices)
        return _assemble(grid, subject)


def _files(path: Path) -> list[tuple[str, Callable[[], bytes]]]:
    if path.is_dir():
        found = [entry for entry in sorted(path.iterdir()) if entry.is_file() and not entry.name.startswith(".")]
        return [(entry.name, entry.read_bytes) for entry in found]
    if path.suffix.lower() != ".zip":
        return [(path.name, lambda: raster.read_bytes(path))]
    if not path.is_file():
        raise IngestError(f"there is no file '{path.name}'", code="missing", hint="check the path")
    try:
        with zipfile.ZipFile(path) as packed:
            members = sorted((m for m in packed.infolist() if not m.is_dir()), key=lambda m: m.filename)
    except UNREADABLE as problem:
        raise raster.corrupt(path.name, f"the zip cannot be opened ({problem})") from problem
    raster.check_size(path.name, (max(sum(m.file_size for m in members), 1),), 1)

    def opener(member: zipfile.ZipInfo) -> Callable[[], bytes]:
        def unpack() -> bytes:
            # zipfile stops at the declared size and compares the checksum.
            with zipfile.ZipFile(path) as packed:
                return packed.read(member)

        return unpack

    return [(Path(member.filename).name, opener(member)) for member in members]


def _collect(path: Path) -> list[_Slice]:
    """Every image's header; reports, structures and directories are passed over."""
    files = _files(path)
    if len(files) > MOST_FILES:
        raise IngestError(
            f"'{path.name}' holds {len(files)} files; one series has at most {MOST_FILES}",
            code="too-large",
            hint="give one series",
        )
    found: list[_Slice] = []
    for number, (file_name, opener) in enumerate(files, start=1):
        name = f"image {number}"  # archives name files by UID, which may lead to the patient
        try:
            data = opener()
            named = file_name.lower().endswith((".dcm", ".ima"))
            if data and data[128:132] != b"DICM" and not named:
                continue
            header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
            picture = _may_be_picture(header)
        except UNREADABLE as problem:
            raise raster.corrupt(name, "it cannot be read as DICOM") from problem
        if picture and "Rows" not in header:  # dropping it would make a shorter volume that looks whole
            raise raster.corrupt(name, "it holds no picture, or its header is cut off")
        if picture:
            found.append(_Slice(name=name, open=opener, header=header))
    if not found:
        raise IngestError(
            f"'{path.name}' holds no DICOM image", code="empty", hint="give the folder that holds the series' images"
        )
    return found


def _may_be_picture(header: FileDataset) -> bool:
    """Only what surely is something else (a report, a directory) may be passed over."""
    stored = str(header.file_meta.get("MediaStorageSOPClassUID", ""))
    name = UID(stored).name
    other = name != stored and "Image Storage" not in name
    return not other and str(header.get("Modality", "")) not in NO_PICTURES


def _check_kind(slices: list[_Slice]) -> None:
    """Refuse what is no plain CT or MR acquisition, before any geometry."""
    # De-identified series may have no number at all; they count as one.
    series = {one.text("SeriesInstanceUID") for one in slices}
    if len(series) > 1:
        raise IngestError(
            f"the folder holds {len(series)} series in {len(slices)} images",
            code="several-series",
            hint="put each series into its own folder",
        )
    for one in slices:
        modality = one.text("Modality")
        words = [str(word).upper() for word in one.values("ImageType")]
        capture = one.text("SOPClassUID").startswith(SECONDARY_CAPTURE)
        if "LOCALIZER" in words or capture or words[:2] == ["DERIVED", "SECONDARY"]:
            raise IngestError(
                f"{one.name} is a localizer or a derived picture, not part of an acquired volume",
                code="localizer",
                hint="export the original axial series",
            )
        if modality not in PATIENT_MODALITIES:
            raise IngestError(
                f"{one.name} has the modality '{modality}'; read are {' and '.join(PATIENT_MODALITIES)}",
                code="unsupported",
                hint="give a CT or MR series",
            )
        if one.number("NumberOfFrames", 1.0) > 1:
            raise IngestError(
                f"{one.name} is a multi-frame image",
                code="unsupported",
                hint="export the series as single-frame images",
            )
        if one.number("SamplesPerPixel", 1.0) != 1:
            raise IngestError(f"{one.name} is a colour picture", code="unsupported", hint="export the original series")
    if len(slices) < FEWEST_SLICES:
        raise IngestError(
            f"the series has {len(slices)} slices; a volume needs at least {FEWEST_SLICES}",
            code="too-few-slices",
            hint="export the whole series",
        )


def _place(slices: list[_Slice]) -> _Grid:
    """Sort slices along their common normal and check that they fill a straight, even grid."""
    first = slices[0]
    cosines = np.array([one.vector("ImageOrientationPatient", 6) for one in slices])
    pixel = np.array([one.vector("PixelSpacing", 2) for one in slices])
    sizes = {(int(one.number("Rows")), int(one.number("Columns"))) for one in slices}
    odd = int(np.count_nonzero(np.abs(cosines - cosines[0]).max(axis=1) > COSINE_TOLERANCE))
    if odd:
        raise IngestError(
            f"{odd} of {len(slices)} slices point in another direction than {first.name}",
            code="mixed-orientation",
            hint="give one stack of parallel slices in its own folder",
        )
    if len(sizes) > 1 or np.abs(pixel - pixel[0]).max() > TOLERANCE_SHARE * pixel[0].min():
        raise IngestError(
            "the slices of the series differ in rows, columns or pixel spacing",
            code="mixed-size",
            hint="give one reconstruction in its own folder",
        )
    along_row, along_column = cosines[0, :3], cosines[0, 3:]
    normal = np.cross(along_row, along_column)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = along_row * pixel[0, 1], along_column * pixel[0, 0], normal
    raster.check_placed(affine, name=first.name)  # zero pixel spacing, cosines that are none
    normal /= np.linalg.norm(normal)
    positions = np.array([one.vector("ImagePositionPatient", 3) for one in slices])
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    step = _step_mm(positions, normal, float(pixel[0].min()))
    # The straight line through the ends: what the checks above just proved all slices to lie on.
    affine[:3, 2] = normal * step
    affine[:3, 3] = positions[0]
    rows, columns = sizes.pop()
    shape = (columns, rows, len(slices))
    raster.check_size("the series", shape, 4)
    return _Grid(slices=tuple(slices[index] for index in order), affine_ras=geometry.LPS_TO_RAS @ affine, shape=shape)


def _step_mm(positions: Float[np.ndarray, "slice 3"], normal: Float[np.ndarray, "3"], pixel_mm: float) -> float:
    """The distance between slices, when there is one: refuses duplicates, tilt and gaps."""
    heights = positions @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    tolerance = max(TOLERANCE_MM, TOLERANCE_SHARE * usual)
    doubled = np.flatnonzero(gaps < TOLERANCE_MM)
    if doubled.size:
        raise IngestError(
            f"{doubled.size} of {len(heights)} slices lie where another one lies; the first is slice {doubled[0] + 2}",
            code="duplicate-slices",
            hint="export the series again; two phases or reconstructions may share its number",
        )
    sideways = positions - np.outer(heights, normal)
    slide = float(np.linalg.norm(sideways - sideways[0], axis=1).max())
    if slide > max(TOLERANCE_MM, TILT_SHARE * pixel_mm):
        degrees = float(np.degrees(np.arctan2(slide, heights[-1] - heights[0])))
        raise IngestError(
            f"the slices slide sideways by up to {slide:.1f} mm: a gantry tilt of about {degrees:.1f} degrees",
            code="tilt",
            hint="a sheared volume is not read as if it were straight; reformat the series without tilt",
        )
    odd = np.flatnonzero(np.abs(gaps - usual) > tolerance)
    if odd.size:
        raise IngestError(
            f"{odd.size} of {gaps.size} slice gaps differ from {usual:.2f} mm; "
            f"the first, after slice {odd[0] + 1}, is {gaps[odd[0]]:.2f} mm",
            code="slice-gaps",
            hint="a slice is missing, or two series are mixed; export the series again",
        )
    return float(heights[-1] - heights[0]) / (len(heights) - 1)


def _assemble(grid: _Grid, subject: str) -> Study:
    """Decode every slice in order, rescale each by its own numbers, and turn the volume to RAS+ once."""
    first = grid.slices[0]
    modality = first.text("Modality")
    columns, rows, count = grid.shape
    array = np.empty((columns, rows, count), np.float32)
    content = hashlib.sha256()
    for index, one in enumerate(grid.slices):
        try:
            data = one.open()
            content.update(data)
            pixels = np.asarray(pydicom.dcmread(io.BytesIO(data)).pixel_array)
        except UNREADABLE as problem:
            raise raster.corrupt(one.name, "its pixels cannot be decoded") from problem
        if pixels.shape != (rows, columns):
            raise raster.corrupt(one.name, f"it declares {rows} x {columns} pixels and holds {pixels.shape}")
        slope, intercept = _rescale(one, modality)
        array[:, :, index] = (pixels * slope + intercept).T
    if array.min() == array.max():
        raise IngestError(f"every voxel of the series is {array.flat[0]:g}", code="constant", hint="export it again")
    turned, affine = geometry.to_ras(array, grid.affine_ras)
    provenance = Provenance(
        source_format="dicom", sha256=content.hexdigest(), orientation=geometry.orientation(grid.affine_ras)
    )
    volume = Volume(array=turned[None], affine_ras=affine, modality=modality, provenance=provenance)
    return Study(subject=first.text("PatientID").strip() or subject, volumes=(volume,))


def _rescale(one: _Slice, modality: str) -> tuple[float, float]:
    """Slope and intercept of one slice; a CT without them has no Hounsfield units."""
    if not (one.values("RescaleSlope") and one.values("RescaleIntercept")):
        if modality == "CT":
            raise IngestError(
                f"{one.name} has no rescale slope and intercept, so its values are not Hounsfield units",
                code="no-rescale",
                hint="export the original series",
            )
        return 1.0, 0.0
    return one.number("RescaleSlope"), one.number("RescaleIntercept")
