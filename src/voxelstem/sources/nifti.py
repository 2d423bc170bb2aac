"""NIfTI-1 and NIfTI-2, read to the last byte: `.nii` and `.nii.gz`."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from voxelstem.errors import IngestError
from voxelstem.sources import gates, raster
from voxelstem.sources.raster import LabelGrid, Raster
from voxelstem.study import Study

UNITS = {0: "mm", 1: "m", 2: "mm", 3: "um"}  # codes of xyzt_units; 0 says nothing
CONFLICT_SHARE = 0.25  # of the smallest voxel edge
SPACING_SHARE = 0.01  # by which pixdim may differ from the sform's columns; some tools round it
PLACEMENTS = range(6)  # codes of qform and sform
MOST_AXES = 7
LEVELS = 256  # grey levels that must survive a slope
HU_INTERCEPT = -500.0  # an intercept below turns stored numbers into Hounsfield units
AIR_HU = (-1100.0, -850.0)  # where air's median lies in values that are Hounsfield units already

# Intent codes (nifti1.h) of what is no scan. An unknown code says nothing, and nothing follows from it.
STATISTICS = dict.fromkeys(range(2, 25), "a statistical map")
FIELDS = {1004: "a matrix field", 1005: "a matrix field", 1006: "a displacement field", 1007: "a vector field"}
SHAPES = {1008: "a set of points", 1009: "a set of triangles", 1010: "a quaternion field", 1011: "no image"}
SURFACES = {2002: "a surface's nodes", 2003: "colours", 2004: "colours", 2005: "a shape"}
FSL_FIELDS = dict.fromkeys([*range(2006, 2010), *range(2016, 2019)], "a displacement field")
LABELS = {1002: "a label map", 1003: "a map of named regions"}
INTENTS = STATISTICS | FIELDS | SHAPES | SURFACES | FSL_FIELDS


def read(path: Path, *, subject: str) -> Study:
    """Read one CT or MR volume.

    The gzip trailer is checked, the declared size is capped before memory is reserved, and nothing is
    guessed: a file that does not say where its voxels lie is refused.

    Raises:
        IngestError: `missing`, `corrupt`, `unsupported` (one half of a pair, Analyze 7.5), `too-large`, `not-3d`,
            `colour`, `unsupported-dtype`, `bad-affine`, `bad-spacing`, `affine-conflict`, `bad-scaling`,
            `rescaled-twice`, `not-a-scan` (by its intent), `not-finite`, `constant` or `label-map`.
    """
    name = raster.shown(path.name)
    return raster.to_study(_parse(path, LABELS), name=name, subject=subject)


def read_labels(path: Path) -> LabelGrid:
    """Read a mask of class numbers, turned to RAS+.

    Raises:
        IngestError: as for `read`, and `not-labels`.
    """
    return raster.to_labels(parse(path), name=raster.shown(path.name))


def write(path: Path, array: Shaped[np.ndarray, "i j k"], affine_ras: Float[np.ndarray, "4 4"]) -> None:
    """Write a `.nii.gz` in millimetres, whole or not at all; the same voxels give the same bytes."""
    image = Nifti1Image(array, affine_ras)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine_ras, code=1)
    image.set_sform(affine_ras, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    # No clock in the gzip header. Level 1: noise hardly shrinks further.
    try:
        part.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def parse(path: Path) -> Raster:
    """Read the voxels with their slope and intercept applied, on the grid of the file."""
    return _parse(path, {})


def _parse(path: Path, labels: Mapping[int, str]) -> Raster:
    name = raster.shown(path.name)
    packed = raster.read_bytes(path)
    sha256 = raster.digest(packed)
    data: bytes | Shaped[np.ndarray, "bytes"] = packed
    if packed[:2] == b"\x1f\x8b":
        data = raster.inflate(packed, name=name, limit=lambda start: _declared(start, name)[1], wbits=raster.GZIP)
    del packed  # from here on there is one copy of the voxels, as they are stored
    header, _ = _declared(bytes(data[: raster.HEADER_BYTES]), name)
    _check_intent(int(header["intent_code"]), labels, name)
    stored = _shape(header)
    shape = raster.spatial_shape(name, stored)
    affine, notes = _affine(header, shape, name)
    notes += _check_extensions(data, header, name)
    array = raster.voxels(data, name=name, offset=_offset(header), shape=stored, dtype=header.get_data_dtype())
    array, said = _scaled(array.reshape(shape, order="F"), header, name)
    return Raster(array=array, affine_ras=affine, source_format="nifti", sha256=sha256, notes=(*notes, *said))


def _offset(header: Nifti1Header) -> int:
    return int(header["vox_offset"])  # a float in NIfTI-1: NaN and infinity raise


def _shape(header: Nifti1Header) -> tuple[int, ...]:
    """The edges as the file has them; nibabel's own reading puts other fields in place of negative ones."""
    axes = int(header["dim"][0])
    if not 1 <= axes <= MOST_AXES:
        raise ValueError(f"{axes} axes")
    return tuple(int(edge) for edge in header["dim"][1 : axes + 1])


def _declared(data: bytes, name: str) -> tuple[Nifti1Header, int]:
    """Parse the header and say how long the whole file must be."""
    try:
        header = _header(data, name)
        shape = _shape(header)
        dtype = header.get_data_dtype()
        start = _offset(header)
    except (HeaderDataError, WrapStructError, ValueError, OverflowError, KeyError, struct.error) as problem:
        raise raster.corrupt(name, f"its header is not valid NIfTI ({problem})") from problem
    if dtype.names is not None:
        raise IngestError(
            f"'{name}' stores colours ({'+'.join(dtype.names)})",
            code="colour",
            hint="a scan has one number for each voxel; this is a picture made from one",
        )
    if dtype.kind not in "iuf" or dtype.itemsize > 8:  # noqa: PLR2004 - float64 and int64
        raise IngestError(
            f"'{name}' stores complex or extended numbers ({dtype})",
            code="unsupported-dtype",
            hint="give one real number for each voxel",
        )
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        raise raster.corrupt(name, f"its header says {dtype} and {int(header['bitpix'])} bits for a voxel")
    first = header.template_dtype.itemsize + 4
    if not first <= start <= raster.FRAME_BYTES:
        raise raster.corrupt(name, f"its voxels would begin at byte {start}")
    return header, start + raster.check_size(name, shape, dtype.itemsize)


def _header(data: bytes, name: str) -> Nifti1Header:
    for kind in (Nifti1Header, Nifti2Header):
        size = kind.template_dtype.itemsize
        if len(data) >= size and size in struct.unpack("<i", data[:4]) + struct.unpack(">i", data[:4]):
            header = kind(data[:size], check=False)
            magic = bytes(header["magic"].item())[:3]
            analyze = kind is Nifti1Header and not magic
            if analyze or magic in (b"ni1", b"ni2"):
                what = "an Analyze 7.5 header" if analyze else "the header of a pair, its voxels are in an .img file"
                raise IngestError(f"'{name}' is {what}", code="unsupported", hint="save the scan as one .nii.gz file")
            if magic not in (b"n+1", b"n+2"):
                raise raster.corrupt(name, "it begins like NIfTI, and its magic word is another")
            return header
    raise raster.corrupt(name, "it does not begin with a NIfTI header")


def _check_intent(code: int, labels: Mapping[int, str], name: str) -> None:
    """Refuse what the header itself calls something else than a scan."""
    if code in labels:
        raise IngestError(
            f"'{name}' is {labels[code]} by its intent code, not a scan",
            code="label-map",
            hint="give masks with --labels, beside the scans",
        )
    if code in INTENTS:
        raise IngestError(
            f"'{name}' is {INTENTS[code]} by its intent code, not a scan",
            code="not-a-scan",
            hint="leave it out; if it is a scan, set its intent code to 0",
        )


def _check_extensions(data: bytes | Shaped[np.ndarray, "bytes"], header: Nifti1Header, name: str) -> list[str]:
    """Walk the blocks between header and voxels, which must fill their place; their texts are never kept."""
    at, start = header.template_dtype.itemsize, _offset(header)
    between = bytes(data[at:start])
    if not between[0]:  # the first of four bytes says whether blocks follow
        return []
    count, at = 0, 4
    while between[at:].strip(b"\0"):
        size = struct.unpack_from(f"{header.endianness}i", between, at)[0] if at + 8 <= len(between) else 0
        if size < 8 or at + size > len(between):  # noqa: PLR2004 - size and code come first
            raise raster.corrupt(name, "the extensions of its header do not fit between header and voxels")
        at += size
        count += 1
    return [f"{count} header extension{'s' * (count != 1)} left out"]


def _scaled(
    stored: Shaped[np.ndarray, "i j k"], header: Nifti1Header, name: str
) -> tuple[Shaped[np.ndarray, "i j k"], list[str]]:
    """Apply `scl_slope` and `scl_inter` (nifti1.h): whole numbers stay exact, others become float32."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0.0:
        unused = intercept != 0.0
        return stored, ["scl_slope is 0, so by the standard scl_inter is not applied"] if unused else []
    if not math.isfinite(slope) or not math.isfinite(intercept):
        raise _bad_scaling(name, slope, intercept, "is not a number")
    if (slope, intercept) == (1.0, 0.0):
        return stored, []
    low, high = float(stored.min()), float(stored.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return stored, []  # refused later, with a count of these voxels
    ends = sorted((low * slope + intercept, high * slope + intercept))
    _check_survivors(name, slope, intercept, high - low, ends)
    if intercept <= HU_INTERCEPT and slope > 0:
        _check_once(stored, intercept, name)
    notes = [f"slope {slope:g} and intercept {intercept:g} applied to {stored.dtype.name}"]
    reach = (*ends, low, high, low * slope, high * slope)
    whole = stored.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer()
    for dtype in (np.int16, np.int32) if whole else ():
        limits = np.iinfo(dtype)
        if limits.min <= min(reach) and max(reach) <= limits.max:
            return stored.astype(dtype, order="K") * dtype(slope) + dtype(intercept), notes
    scaled = np.empty(stored.shape, np.float32, order="F")
    for k in range(stored.shape[2]):  # slice by slice: float64 for all would take four times the file's room
        scaled[..., k] = stored[..., k].astype(np.float64) * slope + intercept
    return scaled, notes


def _check_survivors(name: str, slope: float, intercept: float, steps: float, ends: list[float]) -> None:
    """Refuse a slope after which float32 cannot tell the stored grey levels apart, or cannot hold them."""
    if not steps:
        return
    largest = max(abs(ends[0]), abs(ends[1]))
    if largest > float(np.finfo(np.float32).max):
        raise _bad_scaling(name, slope, intercept, "makes values beyond float32")
    apart = (ends[1] - ends[0]) / float(np.spacing(np.float32(largest)))
    if largest < float(np.finfo(np.float32).tiny) or apart < min(steps, LEVELS):
        raise _bad_scaling(name, slope, intercept, "leaves no difference between voxels")


def _bad_scaling(name: str, slope: float, intercept: float, what: str) -> IngestError:
    return IngestError(
        f"'{name}' scales its voxels by slope {slope:g} and intercept {intercept:g}, which {what}",
        code="bad-scaling",
        hint="write the scan again from its source; a slope of 1 and an intercept of 0 leave voxels as they are",
    )


def _check_once(stored: Shaped[np.ndarray, "i j k"], intercept: float, name: str) -> None:
    """Refuse an intercept for Hounsfield units on voxels that are in Hounsfield units already."""
    air = stored[stored < HU_INTERCEPT]
    if air.size < gates.AIR_SHARE * stored.size:
        return
    middle = float(np.median(air))
    if AIR_HU[0] <= middle <= AIR_HU[1]:
        raise IngestError(
            f"'{name}' stores Hounsfield units (air at {middle:g}), and its header would shift them "
            f"by {intercept:g} once more",
            code="rescaled-twice",
            hint="set scl_inter to 0 where the voxels are right as they are stored",
        )


def _affine(header: Nifti1Header, shape: tuple[int, int, int], name: str) -> tuple[Float[np.ndarray, "4 4"], list[str]]:
    """The placement in millimetres; sform before qform, and both must agree where both are given."""
    unit = int(header["xyzt_units"]) & 7  # the other bits are the unit of time
    if unit not in UNITS:
        raise raster.corrupt(name, f"its unit of length has the unknown code {unit}")
    _check_edges([float(edge) for edge in header["pixdim"][1:4]], name)
    sform, qform = _placements(header, name)
    affine = sform if sform is not None else qform
    if affine is None:
        raise _no_place(name, "neither sform nor qform is set")
    affine, notes = raster.to_millimetres(affine, {UNITS[unit]}, name=name)
    raster.check_placed(affine, name=name)
    if sform is not None:
        _check_pixdim(header, sform, name)
    if sform is not None and qform is not None:
        other, _ = raster.to_millimetres(qform, {UNITS[unit]}, name=name)
        _check_agreement(affine, other, shape, name)
    return affine, list(notes) if unit else ["no unit of length is given: taken for millimetres"]


def _no_place(name: str, what: str) -> IngestError:
    return IngestError(
        f"'{name}' does not say where its voxels lie: {what}",
        code="bad-affine",
        hint="convert the scan again from its DICOM series",
    )


def _check_edges(edges: list[float], name: str) -> None:
    if not all(math.isfinite(edge) and edge for edge in edges):
        raise IngestError(
            f"'{name}' gives its voxels the edges {', '.join(f'{edge:g}' for edge in edges)} (pixdim)",
            code="bad-spacing",
            hint="convert the scan again from its DICOM series, or set pixdim to the true spacing",
        )


def _placements(
    header: Nifti1Header, name: str
) -> tuple[Float[np.ndarray, "4 4"] | None, Float[np.ndarray, "4 4"] | None]:
    """What sform and qform say, in the file's unit; None where a code is 0."""
    codes = int(header["sform_code"]), int(header["qform_code"])
    if not all(code in PLACEMENTS for code in codes):
        raise raster.corrupt(name, f"sform and qform have the unknown codes {codes[0]} and {codes[1]}")
    if not header["pixdim"][0]:
        header["pixdim"][0] = 1.0  # the standard: a qfac of 0 means 1
    try:
        sform = np.array(header.get_sform(), np.float64) if codes[0] else None
        qform = np.array(header.get_qform(), np.float64) if codes[1] else None
    except (HeaderDataError, ValueError) as problem:
        raise _no_place(name, f"its orientation quaternion is invalid ({problem})") from problem
    return sform, qform


def _check_pixdim(header: Nifti1Header, sform: Float[np.ndarray, "4 4"], name: str) -> None:
    """Readers on ITK take the spacing from pixdim and only the directions from the sform: both must agree."""
    said = np.abs(np.array(header["pixdim"][1:4], np.float64))
    columns = np.linalg.norm(sform[:3, :3], axis=0)
    if (np.abs(said / columns - 1.0) > SPACING_SHARE).any():
        raise IngestError(
            f"'{name}' says twice how large its voxels are: {np.round(said, 4).tolist()} by pixdim and "
            f"{np.round(columns, 4).tolist()} by its sform",
            code="affine-conflict",
            hint="convert the scan again, or set both to the spacing that is right",
        )


def _check_agreement(
    sform: Float[np.ndarray, "4 4"], qform: Float[np.ndarray, "4 4"], shape: tuple[int, int, int], name: str
) -> None:
    corners = np.array([[i, j, k, 1] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)])
    apart = np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max()
    smallest = float(np.linalg.norm(sform[:3, :3], axis=0).min())
    # The quaternion is float32: on large scans the two differ by a tenth of a millimetre without any fault.
    if not apart <= CONFLICT_SHARE * smallest:
        raise IngestError(
            f"'{name}' says twice where its voxels lie, and sform and qform differ by {apart:.2f} mm at a corner",
            code="affine-conflict",
            hint="convert the scan again, or set both to the placement that is right",
        )
