"""NIfTI-1 and NIfTI-2, read to the last byte: `.nii` and `.nii.gz`."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.raster import LabelGrid, Raster
from voxelstem.study import Study

MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}  # codes of xyzt_units: metre, millimetre, micron
CONFLICT_SHARE = 0.25  # of the smallest voxel edge


def read(path: Path, *, subject: str) -> Study:
    """Read one CT or MR volume.

    The gzip trailer is checked, the declared size is capped before memory is reserved, and nothing is
    guessed: a file that does not say where its voxels lie is refused.

    Raises:
        IngestError: `missing`, `corrupt`, `too-large`, `not-3d`, `unsupported-dtype`, `bad-affine`,
            `affine-conflict`, `not-finite`, `constant` or `label-map`.
    """
    return raster.to_study(parse(path), name=path.name, subject=subject)


def read_labels(path: Path) -> LabelGrid:
    """Read a mask of class numbers, turned to RAS+.

    Raises:
        IngestError: as for `read`, and `not-labels`.
    """
    return raster.to_labels(parse(path), name=path.name)


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
    packed = raster.read_bytes(path)
    name = path.name
    data = packed
    if packed[:2] == b"\x1f\x8b":
        data = raster.inflate(packed, name=name, limit=lambda start: _declared(start, name)[1], wbits=raster.GZIP)
    header, _ = _declared(data, name)
    dtype = header.get_data_dtype()
    stored = tuple(int(edge) for edge in header.get_data_shape())
    shape = raster.spatial_shape(name, stored)
    array = raster.voxels(data, name=name, offset=_offset(header), shape=stored, dtype=dtype).reshape(shape, order="F")
    slope, intercept = header.get_slope_inter()
    if slope is not None and intercept is not None and (slope, intercept) != (1.0, 0.0):
        array = array.astype(np.float64) * slope + intercept
    affine, notes = _affine(header, shape, name)
    return Raster(
        array=array, affine_ras=affine, source_format="nifti", sha256=raster.digest(packed), notes=tuple(notes)
    )


def _offset(header: Nifti1Header) -> int:
    return int(header.get_data_offset())


def _declared(data: bytes, name: str) -> tuple[Nifti1Header, int]:
    """Parse the header and say how long the whole file must be."""
    try:
        header = _header(data, name)
        shape = tuple(int(edge) for edge in header.get_data_shape())
        dtype = header.get_data_dtype()
        header.get_slope_inter()
        start = _offset(header)
    except (HeaderDataError, WrapStructError, ValueError, OverflowError, KeyError, struct.error) as problem:
        raise raster.corrupt(name, f"its header is not valid NIfTI ({problem})") from problem
    if dtype.names is not None or dtype.kind not in "iuf" or dtype.itemsize > 8:  # noqa: PLR2004 - float64 and int64
        raise IngestError(
            f"'{name}' stores colours, complex or extended numbers ({dtype})",
            code="unsupported-dtype",
            hint="give one real number for each voxel",
        )
    if start < header.template_dtype.itemsize:
        raise raster.corrupt(name, f"its voxels would begin inside the header, at byte {start}")
    return header, start + raster.check_size(name, shape, dtype.itemsize)


def _header(data: bytes, name: str) -> Nifti1Header:
    for kind in (Nifti1Header, Nifti2Header):
        size = kind.template_dtype.itemsize
        if len(data) >= size and size in struct.unpack("<i", data[:4]) + struct.unpack(">i", data[:4]):
            header = kind(data[:size], check=False)
            if bytes(header["magic"].item())[:3] not in (b"n+1", b"n+2"):
                raise raster.corrupt(name, "it is one half of a header and image pair, or not NIfTI")
            return header
    raise raster.corrupt(name, "it does not begin with a NIfTI header")


def _affine(header: Nifti1Header, shape: tuple[int, int, int], name: str) -> tuple[Float[np.ndarray, "4 4"], list[str]]:
    """The placement in millimetres; sform before qform, and both must agree where both are given."""
    try:
        sform = np.array(header.get_sform(), np.float64) if int(header["sform_code"]) > 0 else None
        qform = np.array(header.get_qform(), np.float64) if int(header["qform_code"]) > 0 else None
    except HeaderDataError as problem:
        raise IngestError(
            f"'{name}' has an invalid orientation quaternion ({problem})",
            code="bad-affine",
            hint="convert the scan again from its DICOM series",
        ) from problem
    affine = sform if sform is not None else qform
    if affine is None:
        raise IngestError(
            f"'{name}' does not say where its voxels lie: neither sform nor qform is set",
            code="bad-affine",
            hint="convert the scan again from its DICOM series",
        )
    raster.check_placed(affine, name=name)
    if sform is not None and qform is not None:
        _check_agreement(sform, qform, shape, name)
    notes: list[str] = []
    unit = int(header["xyzt_units"]) & 7
    factor = MILLIMETRES.get(unit, 1.0)
    if factor != 1.0:
        affine = np.diag([factor, factor, factor, 1.0]) @ affine
        notes.append(f"positions converted from {'metres' if unit == 1 else 'microns'} to millimetres")
    return affine, notes


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
