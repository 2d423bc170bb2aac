"""What every file reader hands on: numbers on a grid, and the checks that all formats share."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16, Shaped

from voxelstem import geometry
from voxelstem.errors import IngestError
from voxelstem.study import Provenance, Study, Volume

MOST_BYTES = 4 * 2**30
"""A file may declare this many bytes of voxels; refused before anything of that size is reserved."""

GZIP, ZLIB = 31, 15
"""zlib's numbers for the two packed formats."""

CHUNK_BYTES = 2**20
HEADER_BYTES = 2**16  # what a text header may take before its end must have come

AIR_HU = -500.0
LOWEST_HU = -4000.0  # GE pads with -3024; phase images of MR begin at -4096
AIR_SHARE = 0.005
BONE_HU = 300.0
MOST_CLASSES = 256
FLAT_SHARE = 0.85  # measured: expert masks 0.977 and more, 8-bit MR 0.66 and less
THREE = 3


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
        IngestError: `missing`, or `corrupt` when the disk cannot read it.
    """
    if not path.is_file():
        raise IngestError(f"there is no file '{path.name}'", code="missing", hint="check the path")
    try:
        return path.read_bytes()
    except OSError as problem:
        raise corrupt(path.name, f"it cannot be read ({problem.strerror})") from problem


def corrupt(name: str, what: str) -> IngestError:
    """The refusal of damaged bytes, said the same way everywhere."""
    return IngestError(f"'{name}' is damaged: {what}", code="corrupt", hint="copy or export the file again")


def check_size(name: str, shape: tuple[int, ...], itemsize: int) -> int:
    """How many bytes of voxels a header promises.

    Raises:
        IngestError: `corrupt` when an edge is not positive, `too-large` above `MOST_BYTES`.
    """
    if not shape or min(shape) < 1:
        raise corrupt(name, f"its header declares the shape {shape}")
    size = math.prod(int(edge) for edge in shape) * itemsize
    if size > MOST_BYTES:
        raise IngestError(
            f"'{name}' declares {size / 2**30:.1f} GiB of voxels {shape}; at most {MOST_BYTES / 2**30:g} GiB are read",
            code="too-large",
            hint="if the scan is really this large, split it; otherwise its header is wrong",
        )
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


def inflate(data: bytes, *, name: str, limit: Callable[[bytes], int], wbits: int) -> bytes:
    """Unpack zlib or gzip data to its very end, so that the checksum in the trailer is compared.

    Args:
        data: The packed bytes.
        name: What to call the file in a message.
        limit: Says from the first unpacked bytes how many there may be in all.
        wbits: `GZIP` or `ZLIB`.

    Raises:
        IngestError: `corrupt` when the data is cut, flipped, longer than it should be or followed by anything else.
    """
    parts: list[bytes] = []
    view = memoryview(data)
    size, offset, allowed = 0, 0, -1
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
            size += len(part)
            parts.append(part)
            if allowed < 0 and part:
                allowed = limit(part)
            if 0 <= allowed < size:
                raise corrupt(name, f"it holds more than the {allowed} bytes that its header declares")
            if not part and not piece and not stream.eof:
                raise corrupt(name, "it is cut off before its end")
        offset -= len(stream.unused_data)
        if wbits == GZIP and view[offset : offset + 2] == b"\x1f\x8b":
            continue  # gzip may consist of several members
        if bytes(view[offset:]).strip(b"\0"):  # zeros are allowed as padding
            raise corrupt(name, f"{len(view) - offset} bytes follow its end")
        return b"".join(parts)


def tell_kind(array: Shaped[np.ndarray, "i j k"]) -> tuple[str, str]:
    """Decide from the values alone what files without a modality hold: `CT`, `MR` or `label-map`.

    A CT has an air peak: its minimum lies between -4000 and -500 HU and either 0.5 % of the voxels are below
    -500 or the values run from below -900 to above 300. A label map has few whole numbers from zero up, and
    neighbours inside its regions are equal. Everything else counts as MR.

    Returns:
        The word and the reason for it, for the provenance.
    """
    low, high = float(array.min()), float(array.max())
    if LOWEST_HU < low <= AIR_HU:
        share = float(np.count_nonzero(array < AIR_HU)) / array.size
        if share >= AIR_SHARE or (low <= -900.0 and high > BONE_HU):  # noqa: PLR2004 - air, as in the docstring
            return "CT", f"taken for CT: values {low:g} to {high:g}, {share:.1%} below {AIR_HU:g}"
    if low >= 0 and _is_label_map(array, high):
        return "label-map", f"few whole numbers from {low:g} to {high:g} in even regions"
    return "MR", f"taken for MR: values {low:g} to {high:g}, no air peak of a CT"


def _is_label_map(array: Shaped[np.ndarray, "i j k"], high: float) -> bool:
    if high > np.iinfo(np.int16).max:
        return False
    whole = array.astype(np.int16)
    if array.dtype.kind == "f" and not np.array_equal(whole, array):
        return False
    if np.count_nonzero(np.bincount(whole.ravel())) > MOST_CLASSES:
        return False
    equal = pairs = 0
    for axis in range(THREE):
        lines = np.moveaxis(whole, axis, 0)
        both = (lines[1:] > 0) & (lines[:-1] > 0)
        pairs += int(np.count_nonzero(both))
        equal += int(np.count_nonzero(both & (lines[1:] == lines[:-1])))
    return equal >= FLAT_SHARE * pairs


def to_study(raster: Raster, *, name: str, subject: str) -> Study:
    """Turn a file's voxels to RAS+ float32, decide the modality, and refuse what is no scan.

    Raises:
        IngestError: `not-finite`, `constant`, `label-map` or `bad-affine`.
    """
    check_values(raster, name=name)
    kind, reason = tell_kind(raster.array)
    if kind == "label-map":
        raise IngestError(
            f"'{name}' looks like a mask, not a scan: {reason}",
            code="label-map",
            hint="give masks with --labels, beside the scans",
        )
    single = raster.array.astype(np.float32)
    notes = [*raster.notes, reason]
    exact = np.can_cast(raster.array.dtype, np.float32) or np.array_equal(single, raster.array)
    if not exact:
        notes.append(f"{raster.array.dtype} rounded to float32")
    turned, affine = geometry.to_ras(single, raster.affine_ras)
    provenance = Provenance(
        source_format=raster.source_format,
        sha256=raster.sha256,
        orientation=geometry.orientation(raster.affine_ras),
        notes=tuple(notes),
    )
    volume = Volume(array=turned[None], affine_ras=affine, modality=kind, provenance=provenance)
    return Study(subject=subject, volumes=(volume,))


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
    turned, affine = geometry.to_ras(array.astype(np.int16), raster.affine_ras)
    return LabelGrid(array=turned, affine_ras=affine, sha256=raster.sha256)


def check_values(raster: Raster, *, name: str) -> None:
    """Refuse voxels that no scanner makes.

    Raises:
        IngestError: `not-finite` or `constant`.
    """
    array = raster.array
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise IngestError(
                f"'{name}' holds {bad} of {array.size} voxels that are not numbers (NaN or infinite)",
                code="not-finite",
                hint="export the scan again, or fill these voxels and say so",
            )
    if array.min() == array.max():
        raise IngestError(
            f"every voxel of '{name}' is {array.flat[0]:g}", code="constant", hint="export the scan again"
        )


def check_placed(affine_ras: Float[np.ndarray, "4 4"], *, name: str) -> None:
    """Refuse an affine that does not say where the voxels lie.

    Raises:
        IngestError: `bad-affine`.
    """
    try:
        geometry.check_affine(affine_ras)
    except ValueError as problem:
        raise IngestError(
            f"'{name}' does not say where its voxels lie: {problem}",
            code="bad-affine",
            hint="convert the scan again from its DICOM series",
        ) from problem


def digest(data: bytes) -> str:
    """The sha256 that provenance keeps."""
    return hashlib.sha256(data).hexdigest()


def voxels(
    data: bytes, *, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype
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
