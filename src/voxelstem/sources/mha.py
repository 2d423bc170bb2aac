"""MetaImage with local data (`.mha`), raw or zlib-compressed.

Format: https://itk.org/Wiki/ITK/MetaIO/Documentation. Positions are LPS, as everywhere in ITK.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

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
            `unsupported-dtype`, `bad-affine`, `bad-spacing`, `affine-conflict`, `not-finite`, `constant` or
            `label-map`.
    """
    return raster.to_study(parse(path), name=raster.shown(path.name), subject=subject)


def read_labels(path: Path) -> LabelGrid:
    """Read a mask of class numbers, turned to RAS+.

    Raises:
        IngestError: as for `read`, and `not-labels`.
    """
    return raster.to_labels(parse(path), name=raster.shown(path.name))


def parse(path: Path) -> Raster:
    """Read the voxels on the grid of the file."""
    data = raster.read_bytes(path)
    name = raster.shown(path.name)
    sha256 = raster.digest(data)
    fields, start = _header(data[: raster.HEADER_BYTES], name)
    _check_plain(fields, name)
    try:
        shape = tuple(int(edge) for edge in fields["DimSize"].split())
        axes = int(fields.get("NDims", len(shape)))
        kind = fields["ElementType"]
        channels = int(fields.get("ElementNumberOfChannels", "1"))
    except (KeyError, ValueError) as problem:
        raise raster.corrupt(name, f"its header lacks a readable field ({problem})") from problem
    if axes != len(shape):
        raise raster.corrupt(name, f"its header says {axes} axes and gives the sizes of {len(shape)}")
    if kind not in DTYPES or channels != 1:
        raise IngestError(
            f"'{name}' stores {channels} x '{raster.shown(kind)}'",
            code="unsupported-dtype",
            hint="give one real number a voxel",
        )
    big = _yes(fields, "BinaryDataByteOrderMSB") or _yes(fields, "ElementByteOrderMSB")
    dtype = np.dtype(DTYPES[kind]).newbyteorder(">" if big else "<")
    size = raster.check_size(name, shape, dtype.itemsize)
    spatial = raster.spatial_shape(name, shape)
    affine, notes = _affine(fields, name)
    body: memoryview | Shaped[np.ndarray, "bytes"] = memoryview(data)[start:]
    del data  # a packed file is given back as soon as it is unpacked
    if _yes(fields, "CompressedData"):
        body = raster.inflate(body, name=name, limit=lambda _: size, wbits=raster.ZLIB)
    array = raster.voxels(body, name=name, offset=0, shape=shape, dtype=dtype).reshape(spatial, order="F")
    return Raster(array=array, affine_ras=affine, source_format="mha", sha256=sha256, notes=notes)


def _yes(fields: dict[str, str], key: str) -> bool:
    return fields.get(key, "False").lower() == "true"


def _header(data: bytes, name: str) -> tuple[dict[str, str], int]:
    """The header's fields and where the data begins: behind the line `ElementDataFile = LOCAL`."""
    fields: dict[str, str] = {}
    start = 0
    while "ElementDataFile" not in fields:
        end = data.find(b"\n", start)
        key, equals, value = data[start : max(end, start)].decode("latin-1").partition("=")
        if end < 0 or not equals:
            raise raster.corrupt(name, "it has no MetaImage header, or one without an end")
        key = key.strip()
        if key in fields:
            raise raster.corrupt(name, f"its header says '{raster.shown(key)}' twice")
        fields[key] = value.strip()
        start = end + 1
    if fields["ElementDataFile"].upper() != "LOCAL":
        raise IngestError(
            f"'{name}' keeps its voxels in another file", code="unsupported", hint="save it as one .mha file"
        )
    return fields, start


def _check_plain(fields: dict[str, str], name: str) -> None:
    """Refuse what would change the voxels or their place in the file, and what nobody writes."""
    plain = {
        "BinaryData": ("true",),
        "HeaderSize": ("0",),
        "ElementToIntensityFunctionSlope": ("1", "1.0"),
        "ElementToIntensityFunctionOffset": ("0", "0.0"),
    }
    odd = [key for key, allowed in plain.items() if fields.get(key, allowed[0]).lower() not in allowed]
    if odd:
        raise IngestError(
            f"'{name}' sets {odd[0]} to something else than {plain[odd[0]][0]}",
            code="unsupported",
            hint="save it as one binary .mha file with its intensities as they are",
        )


def _one(fields: dict[str, str], keys: tuple[str, ...], name: str) -> str:
    """The value of a field that has several names, which must not contradict one another."""
    given = [key for key in keys if key in fields]
    said = {" ".join(fields[key].split()) for key in given}
    if len(said) > 1:
        raise IngestError(
            f"'{name}' says twice where its voxels lie, and {' and '.join(given)} differ",
            code="affine-conflict",
            hint="convert the scan again, or take the wrong line away",
        )
    return said.pop() if said else ""


def _affine(fields: dict[str, str], name: str) -> tuple[Float[np.ndarray, "4 4"], tuple[str, ...]]:
    """The placement in millimetres, and what was converted."""
    matrix = _one(fields, ("TransformMatrix", "Rotation", "Orientation"), name)
    origin = _one(fields, ("Offset", "Position", "Origin"), name)
    spacing = _one(fields, ("ElementSpacing",), name) or fields.get("ElementSize", "")
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
    affine, notes = raster.to_millimetres(geometry.LPS_TO_RAS @ affine, {fields.get("DistanceUnits", "mm")}, name=name)
    raster.check_placed(affine, name=name)
    return affine, notes
