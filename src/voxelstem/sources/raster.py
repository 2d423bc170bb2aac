"""What every file reader hands on: numbers on a grid, and the checks that all formats share."""

from __future__ import annotations

import errno
import hashlib
import math
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16, Shaped

from voxelstem import geometry
from voxelstem.errors import IngestError
from voxelstem.sources import gates
from voxelstem.study import Provenance, Study, Volume

MOST_BYTES = 4 * 2**30
"""A file may declare this many bytes of voxels; refused before anything of that size is reserved."""

GZIP, ZLIB = 31, 15
"""zlib's numbers for the two packed formats."""

CHUNK_BYTES = 2**20
DEFLATE_RATIO = 1100  # deflate packs at most 1032 to 1 (zlib, "Technical Details"); a little more for small files
FRAME_BYTES = 2**24  # what a file may hold beside its voxels: headers and their extensions
NAME_LENGTH = 120  # characters of a file's name that a message repeats
HEADER_BYTES = 2**16  # what a text header may take before its end must have come

THREE = 3
MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001}
FINEST_MM, COARSEST_MM = 0.005, 50.0  # a voxel's edge outside is a wrong unit, not a scan


@dataclass(frozen=True, kw_only=True, slots=True)
class Raster:
    """A file's voxels as stored (after its own slope and intercept), and where they lie."""

    array: Shaped[np.ndarray, "i j k"]
    affine_ras: Float[np.ndarray, "4 4"]
    source_format: str
    sha256: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelGrid:
    """An expert's mask as a file has it, turned to RAS+; not yet tied to a scan or to class names."""

    array: Int16[np.ndarray, "i j k"]
    affine_ras: Float[np.ndarray, "4 4"]
    sha256: str


def read_bytes(path: Path) -> bytes:
    """The whole file.

    Raises:
        IngestError: `missing`, `too-large`, or `corrupt` when the disk cannot read it.
    """
    name = shown(path.name)
    try:
        # A name that no disk can hold (64 kB, or with a NUL inside) is an error of its own to some systems.
        if not path.is_file():
            raise IngestError(f"there is no file '{name}'", code="missing", hint="check the path")
        size = path.stat().st_size
        if size > MOST_BYTES + FRAME_BYTES:
            raise too_large(name, f"is {size / 2**30:.1f} GiB large")
        return path.read_bytes()
    except OSError as problem:
        if problem.errno == errno.ENAMETOOLONG:
            raise IngestError(f"there is no file '{name}'", code="missing", hint="check the path") from problem
        raise corrupt(name, f"it cannot be read ({problem.strerror})") from problem


def shown(name: str) -> str:
    """A file's name as messages repeat it: on one line, printable and not endless."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in name[: NAME_LENGTH + 1])
    return clean if len(clean) <= NAME_LENGTH else f"{clean[:NAME_LENGTH]}…"


def corrupt(name: str, what: str) -> IngestError:
    """The refusal of damaged bytes, said the same way everywhere."""
    return IngestError(f"'{name}' is damaged: {what}", code="corrupt", hint="copy or export the file again")


def too_large(name: str, what: str) -> IngestError:
    """The refusal of more than `MOST_BYTES`."""
    return IngestError(
        f"'{name}' {what}; at most {MOST_BYTES / 2**30:g} GiB of voxels are read",
        code="too-large",
        hint="if the scan is really this large, split it; otherwise its header is wrong",
    )


def check_size(name: str, shape: tuple[int, ...], itemsize: int) -> int:
    """How many bytes of voxels a header promises.

    Raises:
        IngestError: `corrupt` when an edge is not positive, `too-large` above `MOST_BYTES`.
    """
    if not shape or min(shape) < 1:
        raise corrupt(name, f"its header declares the shape {shape}")
    size = math.prod(int(edge) for edge in shape) * itemsize
    if size > MOST_BYTES:
        raise too_large(name, f"declares {size / 2**30:.1f} GiB of voxels {shape}")
    return size


def spatial_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The three edges of a scan; further axes of length one are dropped.

    Raises:
        IngestError: `not-3d` for a picture, a time series or a vector field.
    """
    if len(shape) < THREE or min(shape[:THREE]) < 2 or math.prod(shape[THREE:]) != 1:  # noqa: PLR2004 - one slice is 2-D
        raise IngestError(
            f"'{name}' has the shape {shape}; a scan has three axes with at least two voxels each",
            code="not-3d",
            hint="give one 3-D volume; split a time series into its volumes",
        )
    return shape[0], shape[1], shape[2]


def inflate(
    data: bytes | memoryview, *, name: str, limit: Callable[[bytes], int], wbits: int
) -> Shaped[np.ndarray, "..."]:
    """Unpack zlib or gzip data to its very end, so that the checksum in the trailer is compared.

    Args:
        data: The packed bytes.
        name: What to call the file in a message.
        limit: Says from the first unpacked bytes how many there may be in all; only so many are reserved, once.
        wbits: `GZIP` or `ZLIB`.

    Returns:
        The unpacked bytes (uint8).

    Raises:
        IngestError: `corrupt` when the data is cut, flipped, longer than it should be or followed by anything else.
    """
    view = memoryview(data)
    unpacked = np.empty(0, np.uint8)
    size, offset = 0, 0
    while True:
        stream = zlib.decompressobj(wbits)
        while not stream.eof:
            piece: bytes | memoryview = stream.unconsumed_tail
            if not piece:
                piece = view[offset : offset + CHUNK_BYTES]
                offset += len(piece)
            try:
                part = stream.decompress(piece, CHUNK_BYTES)
            except zlib.error as problem:
                raise corrupt(name, f"unpacking failed ({problem})") from problem
            if part and not size:
                unpacked = _reserve(limit(part), len(view), name)
            if size + len(part) > unpacked.size:
                raise corrupt(name, f"it holds more than the {unpacked.size} bytes that its header declares")
            unpacked[size : size + len(part)] = np.frombuffer(part, np.uint8)
            size += len(part)
            if not part and not piece and not stream.eof:
                raise corrupt(name, "it is cut off before its end")
        offset -= len(stream.unused_data)
        if wbits == GZIP and view[offset : offset + 2] == b"\x1f\x8b":
            continue  # gzip may consist of several members
        if bytes(view[offset:]).strip(b"\0"):  # zeros are allowed as padding
            raise corrupt(name, f"{len(view) - offset} bytes follow its end")
        return unpacked[:size]


def _reserve(declared: int, packed: int, name: str) -> Shaped[np.ndarray, "bytes"]:
    """Room for what is declared, unless so few packed bytes could never hold it."""
    if declared > DEFLATE_RATIO * packed:
        raise corrupt(name, f"its header declares {declared} bytes, and {packed} packed bytes cannot hold so many")
    return np.empty(declared, np.uint8)


def to_study(raster: Raster, *, name: str, subject: str) -> Study:
    """Turn a file's voxels to RAS+ float32, decide the modality, and refuse what is no scan.

    Raises:
        IngestError: `not-finite`, `constant`, `label-map`, `bad-affine`, or what `gates.check_hu` (CT) and
            `gates.check_mr` (anything else) refuse.
    """
    check_values(raster, name=name)
    kind, reason = gates.tell_kind(raster.array)
    if kind == "label-map":
        raise IngestError(
            f"'{name}' looks like a mask, not a scan: {reason}",
            code="label-map",
            hint="give masks with --labels, beside the scans",
        )
    turned, affine = geometry.to_ras(raster.array, raster.affine_ras, np.float32)
    if kind == "CT":
        gates.check_hu(turned, name=name)
    elif turned.min() <= gates.LOWEST_HU and _is_padded_ct(turned, name):
        kind, reason = "CT", "taken for CT: Hounsfield units round a padding below -4000"
    notes = [*raster.notes, reason]
    stored, _ = geometry.turn_to_ras(raster.array, raster.affine_ras)
    if not np.can_cast(stored.dtype, np.float32) and not np.array_equal(turned, stored):
        notes.append(f"{stored.dtype} rounded to float32")
    provenance = Provenance(
        source_format=raster.source_format,
        sha256=raster.sha256,
        orientation=geometry.orientation(raster.affine_ras),
        notes=tuple(notes),
    )
    volume = Volume(array=turned[None], affine_ras=affine, modality=kind, provenance=provenance)
    return Study(subject=subject, volumes=(volume,))


def _is_padded_ct(array: Float[np.ndarray, "i j k"], name: str) -> bool:
    """Whether values that reach below any Hounsfield unit are some beside their padding (some sets pad with -8192).

    Raises:
        IngestError: as `gates.check_mr` calls it where they were before an intercept was added once too often.
    """
    try:
        gates.check_mr(array, name=name)
    except IngestError as error:
        if error.code == "wrong-modality":
            return True
        raise
    return False


def to_labels(raster: Raster, *, name: str) -> LabelGrid:
    """Turn a mask to RAS+ and check that it holds class numbers.

    Raises:
        IngestError: `not-labels` when a value is not a whole number from 0 to 32767.
    """
    array = raster.array
    low, high = float(array.min()), float(array.max())  # NaN makes both NaN, and the test below fail
    whole = bool(np.isfinite(low)) and low >= 0 and high <= np.iinfo(np.int16).max
    if not whole or not np.array_equal(array.astype(np.int16), array):
        raise IngestError(
            f"'{name}' is no mask: its values run from {low:g} to {high:g} and must be whole numbers from 0 to 32767",
            code="not-labels",
            hint="export the mask as whole class numbers",
        )
    turned, affine = geometry.to_ras(array, raster.affine_ras, np.int16)
    return LabelGrid(array=turned, affine_ras=affine, sha256=raster.sha256)


def check_values(raster: Raster, *, name: str) -> None:
    """Refuse voxels that no scanner makes.

    Raises:
        IngestError: `not-finite` or `constant`.
    """
    array = raster.array
    low, high = float(array.min()), float(array.max())  # NaN makes both NaN
    most = float(np.finfo(np.float32).max)
    if not (-most <= low and high <= most):
        bad = int(np.count_nonzero(~(np.abs(array) <= most)))
        raise IngestError(
            f"'{name}' holds {bad} of {array.size} voxels that are not numbers (NaN or infinite) or beyond float32",
            code="not-finite",
            hint="export the scan again, or fill these voxels and say so",
        )
    if low == high:
        raise IngestError(f"every voxel of '{name}' is {low:g}", code="constant", hint="export the scan again")


def check_placed(affine_ras: Float[np.ndarray, "4 4"], *, name: str) -> None:
    """Refuse an affine that does not say where the voxels lie. A mirrored one (negative determinant) is legal.

    Raises:
        IngestError: `bad-spacing` when a voxel's edge is zero, not a number, or no size that a scanner makes;
            `bad-affine` when the affine is not finite or its axes are not perpendicular.
    """
    edges = geometry.spacing_mm(affine_ras)
    if np.isfinite(affine_ras[:3, 3]).all() and not all(FINEST_MM <= edge <= COARSEST_MM for edge in edges):
        raise IngestError(
            f"'{name}' says that a voxel measures {edges[0]:g} x {edges[1]:g} x {edges[2]:g} mm; "
            f"a scan's edges are {FINEST_MM:g} to {COARSEST_MM:g} mm",
            code="bad-spacing",
            hint="mend the spacing or its unit (micron, mm, metre), or convert the scan again from its DICOM series",
        )
    try:
        geometry.check_affine(affine_ras)
    except ValueError as problem:
        raise IngestError(
            f"'{name}' does not say where its voxels lie: {problem}",
            code="bad-affine",
            hint="convert the scan again from its DICOM series",
        ) from problem


def to_millimetres(
    affine_ras: Float[np.ndarray, "4 4"], units: Collection[str], *, name: str
) -> tuple[Float[np.ndarray, "4 4"], tuple[str, ...]]:
    """Convert a placement that a file gives in another unit, and say so.

    Raises:
        IngestError: `unsupported` when the unit is not known, or differs between axes.
    """
    unit = next(iter(units)).strip().lower() if len(units) == 1 else ""
    if unit not in MILLIMETRES:
        raise IngestError(
            f"'{name}' measures in '{shown(' and '.join(sorted(units)))}'",
            code="unsupported",
            hint=f"save it with distances in mm; known are {', '.join(MILLIMETRES)}",
        )
    factor = MILLIMETRES[unit]
    if factor == 1.0:
        return affine_ras, ()
    return affine_ras * np.array([[factor], [factor], [factor], [1.0]]), (
        f"positions converted from {unit} to millimetres",
    )


def digest(data: bytes) -> str:
    """The sha256 that provenance keeps."""
    return hashlib.sha256(data).hexdigest()


def voxels(
    data: bytes | memoryview | Shaped[np.ndarray, "bytes"],
    *,
    name: str,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> Shaped[np.ndarray, "..."]:
    """View voxels that lie with the first axis fastest, as NIfTI, NRRD and MetaImage store them.

    Raises:
        IngestError: `corrupt` when there are too few bytes or too many.
    """
    size = math.prod(shape) * dtype.itemsize
    found = len(data) - offset
    if found != size:
        raise corrupt(name, f"its header declares {size} bytes of voxels and {max(found, 0)} are there")
    return np.frombuffer(data, dtype, offset=offset).reshape(shape, order="F")
