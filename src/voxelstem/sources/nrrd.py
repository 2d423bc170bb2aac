"""NRRD with attached data (`.nrrd`): raw and gzip encodings, three spatial axes.

Format: http://teem.sourceforge.net/nrrd/format.html
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.raster import LabelGrid, Raster
from voxelstem.study import Study

DTYPES = {
    **dict.fromkeys(["signed char", "int8", "int8_t"], "i1"),
    **dict.fromkeys(["uchar", "unsigned char", "uint8", "uint8_t"], "u1"),
    **dict.fromkeys(["short", "short int", "signed short", "signed short int", "int16", "int16_t"], "i2"),
    **dict.fromkeys(["ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"], "u2"),
    **dict.fromkeys(["int", "signed int", "int32", "int32_t"], "i4"),
    **dict.fromkeys(["uint", "unsigned int", "uint32", "uint32_t"], "u4"),
    **dict.fromkeys(["longlong", "long long", "long long int", "signed long long", "int64", "int64_t"], "i8"),
    **dict.fromkeys(["ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"], "u8"),
    "float": "f4",
    "double": "f8",
}
TO_RAS = {
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
}
SHORT = {"ras": "right-anterior-superior", "las": "left-anterior-superior", "lps": "left-posterior-superior"}


def read(path: Path, *, subject: str) -> Study:
    """Read one CT or MR volume.

    Raises:
        IngestError: `missing`, `corrupt`, `unsupported` (detached data, other encodings or spaces), `too-large`,
            `not-3d`, `unsupported-dtype`, `bad-affine`, `bad-spacing`, `not-finite`, `constant` or `label-map`.
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
    try:
        shape = tuple(int(edge) for edge in fields["sizes"].split())
        kind = fields["type"].lower()
        encoding = fields["encoding"].lower()
        axes = int(fields.get("dimension", len(shape)))
    except (KeyError, ValueError) as problem:
        raise raster.corrupt(name, f"its header lacks a readable field ({problem})") from problem
    if axes != len(shape):
        raise raster.corrupt(name, f"its header says {axes} axes and gives the sizes of {len(shape)}")
    if kind not in DTYPES:
        raise IngestError(
            f"'{name}' stores '{raster.shown(kind)}'", code="unsupported-dtype", hint="give one real number a voxel"
        )
    dtype = np.dtype(DTYPES[kind])
    if dtype.itemsize > 1:
        if fields.get("endian") not in ("little", "big"):
            raise raster.corrupt(name, "its header does not say the byte order")
        dtype = dtype.newbyteorder("<" if fields["endian"] == "little" else ">")
    size = raster.check_size(name, shape, dtype.itemsize)
    _check_plain(fields, encoding, name)
    spatial = raster.spatial_shape(name, shape)
    affine, notes = _affine(fields, name)
    body: memoryview | Shaped[np.ndarray, "bytes"] = memoryview(data)[start:]
    del data  # a packed file is given back as soon as it is unpacked
    if encoding in ("gzip", "gz"):
        body = raster.inflate(body, name=name, limit=lambda _: size, wbits=raster.GZIP)
    array = raster.voxels(body, name=name, offset=0, shape=shape, dtype=dtype).reshape(spatial, order="F")
    return Raster(array=array, affine_ras=affine, source_format="nrrd", sha256=sha256, notes=notes)


def _header(data: bytes, name: str) -> tuple[dict[str, str], int]:
    """The header's fields (names in small letters) and where the data begins, behind an empty line."""
    if not data.startswith(b"NRRD000"):
        raise raster.corrupt(name, "it does not begin as an NRRD file")
    end = re.search(rb"\r?\n\r?\n", data)
    text = data[: end.start() if end else len(data)].decode("latin-1")
    fields: dict[str, str] = {}
    for line in text.splitlines()[1:]:
        key, colon, value = line.partition(":")
        if colon and not line.startswith("#") and not value.startswith("="):
            key = key.strip().lower()
            if key in fields:
                raise raster.corrupt(name, f"its header says '{raster.shown(key)}' twice")
            fields[key] = value.strip()
    if "data file" in fields or "datafile" in fields:
        raise IngestError(
            f"'{name}' keeps its voxels in another file",
            code="unsupported",
            hint="save it as one .nrrd file with attached data",
        )
    if end is None:
        raise raster.corrupt(name, "its header has no end")
    return fields, end.end()


def _check_plain(fields: dict[str, str], encoding: str, name: str) -> None:
    if encoding not in ("raw", "gzip", "gz"):
        raise IngestError(
            f"'{name}' is encoded as '{raster.shown(encoding)}'",
            code="unsupported",
            hint="save it with raw or gzip encoding",
        )
    skips = [key for key in ("line skip", "lineskip", "byte skip", "byteskip") if fields.get(key, "0") != "0"]
    if skips:
        raise IngestError(f"'{name}' skips data ('{skips[0]}')", code="unsupported", hint="save it without skips")


def _affine(fields: dict[str, str], name: str) -> tuple[Float[np.ndarray, "4 4"], tuple[str, ...]]:
    """The placement in millimetres, and what was converted."""
    space = fields.get("space", "").lower()
    space = SHORT.get(space, space)
    vectors = re.findall(r"\(([^()]*)\)", fields.get("space directions", ""))
    origin = re.findall(r"\(([^()]*)\)", fields.get("space origin", ""))
    if not space or len(vectors) != 3 or len(origin) != 1:  # noqa: PLR2004 - one direction for each axis
        raise IngestError(
            f"'{name}' does not say where its voxels lie: space, space directions or space origin is absent",
            code="bad-affine",
            hint="convert the scan again from its DICOM series",
        )
    if space not in TO_RAS:
        raise IngestError(
            f"'{name}' lies in the space '{raster.shown(space)}'", code="unsupported", hint="save it in LPS or RAS"
        )
    affine = np.eye(4)
    try:
        columns = [[float(number) for number in text.split(",")] for text in (*vectors, *origin)]
        affine[:3, :] = np.array(columns).T
    except ValueError as problem:
        raise raster.corrupt(name, f"a vector of its header cannot be read ({problem})") from problem
    affine[:3] *= np.array(TO_RAS[space])[:, None]
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) or {"mm"}
    affine, notes = raster.to_millimetres(affine, units, name=name)
    raster.check_placed(affine, name=name)
    return affine, notes
