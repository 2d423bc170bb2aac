"""MetaImage with local data (`.mha`), raw or zlib-compressed.

Format: https://itk.org/Wiki/ITK/MetaIO/Documentation. Positions are LPS, as everywhere in ITK.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from voxelstem import geometry
from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.raster import LabelGrid, Raster
from voxelstem.study import Study

DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def read(path: Path, *, subject: str) -> Study:
    """Read one CT or MR volume.

    Raises:
        IngestError: `missing`, `corrupt`, `unsupported` (detached data), `too-large`, `not-3d`,
            `unsupported-dtype`, `bad-affine`, `not-finite`, `constant` or `label-map`.
    """
    return raster.to_study(parse(path), name=path.name, subject=subject)


def read_labels(path: Path) -> LabelGrid:
    """Read a mask of class numbers, turned to RAS+.

    Raises:
        IngestError: as for `read`, and `not-labels`.
    """
    return raster.to_labels(parse(path), name=path.name)


def parse(path: Path) -> Raster:
    """Read the voxels on the grid of the file."""
    data = raster.read_bytes(path)
    name = path.name
    fields, start = _header(data, name)
    try:
        shape = tuple(int(edge) for edge in fields["DimSize"].split())
        kind = fields["ElementType"]
        channels = int(fields.get("ElementNumberOfChannels", "1"))
    except (KeyError, ValueError) as problem:
        raise raster.corrupt(name, f"its header lacks a readable field ({problem})") from problem
    if kind not in DTYPES or channels != 1:
        raise IngestError(
            f"'{name}' stores {channels} x '{kind}'", code="unsupported-dtype", hint="give one real number a voxel"
        )
    big = _yes(fields, "BinaryDataByteOrderMSB") or _yes(fields, "ElementByteOrderMSB")
    dtype = np.dtype(DTYPES[kind]).newbyteorder(">" if big else "<")
    size = raster.check_size(name, shape, dtype.itemsize)
    spatial = raster.spatial_shape(name, shape)
    affine = _affine(fields, name)
    body = data[start:]
    if _yes(fields, "CompressedData"):
        body = raster.inflate(body, name=name, limit=lambda _: size, wbits=raster.ZLIB)
    array = raster.voxels(body, name=name, offset=0, shape=shape, dtype=dtype).reshape(spatial, order="F")
    return Raster(array=array, affine_ras=affine, source_format="mha", sha256=raster.digest(data))


def _yes(fields: dict[str, str], key: str) -> bool:
    return fields.get(key, "False").lower() == "true"


def _header(data: bytes, name: str) -> tuple[dict[str, str], int]:
    """The header's fields and where the data begins: behind the line `ElementDataFile = LOCAL`."""
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = data.find(b"\n", start, raster.HEADER_BYTES)
        key, equals, value = data[start : max(end, start)].decode("latin-1").partition("=")
        if end < 0 or not equals:
            raise raster.corrupt(name, "it has no MetaImage header, or one without an end")
        fields[key.strip()] = value.strip()
        start = end + 1
    if fields["ElementDataFile"].upper() != "LOCAL":
        raise IngestError(
            f"'{name}' keeps its voxels in another file", code="unsupported", hint="save it as one .mha file"
        )
    return fields, start


def _affine(fields: dict[str, str], name: str) -> Float[np.ndarray, "4 4"]:
    matrix = next((fields[key] for key in ("TransformMatrix", "Rotation", "Orientation") if key in fields), "")
    origin = next((fields[key] for key in ("Offset", "Position", "Origin") if key in fields), "")
    spacing = fields.get("ElementSpacing", fields.get("ElementSize", ""))
    if not (matrix and origin and spacing):
        raise IngestError(
            f"'{name}' does not say where its voxels lie: TransformMatrix, Offset or ElementSpacing is absent",
            code="bad-affine",
            hint="convert the scan again from its DICOM series",
        )
    affine = np.eye(4)
    try:
        # The file lists one direction after the other: each is a column of the affine.
        columns = np.array([float(number) for number in matrix.split()]).reshape(3, 3).T
        affine[:3, :3] = columns * np.array([float(number) for number in spacing.split()])
        affine[:3, 3] = [float(number) for number in origin.split()]
    except ValueError as problem:
        raise raster.corrupt(name, f"its placement cannot be read ({problem})") from problem
    affine = geometry.LPS_TO_RAS @ affine
    raster.check_placed(affine, name=name)
    return affine
