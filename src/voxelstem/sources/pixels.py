"""Stored pixels of DICOM pictures: checked against the header first, then unpacked frame by frame.

Uncompressed values are read straight from the file's bytes, RLE by a bounded reader of our own, and every other
codec by GDCM, after the size that the codestream itself declares was compared with the header's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.header import UNREADABLE, Picture, declared_bytes, lacks

Plane = Integer[np.ndarray, "row column"]

NATIVE = (
    "",  # files of old archives do not say; they are plain
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000)
JPEG = (uid.JPEGBaseline8Bit, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless)
LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGLSNearLossless)
WIDTHS = (8, 16, 32)  # bits that a value may take

PIXEL_DATA = 0x7FE00010
ITEM, ITEM_END = 0xFFFEE000, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
LONG_VR = (b"OB", b"OW", b"UN", b"OL", b"OV")

START_OF_FRAME = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7)
FIRST_SEGMENT = 0xC0  # markers below are reserved
STANDALONE = tuple(range(0xD0, 0xDA))  # JPEG markers without a length; none belongs before the pixels
START_OF_SCAN = 0xDA


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a picture's values are stored."""

    rows: int
    columns: int
    frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    @property
    def dtype(self) -> np.dtype:
        """Of one value, in the machine's byte order."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


def layout(picture: Picture) -> Layout:
    """Read how the pixels are stored, and check that it is possible before anything is unpacked.

    Raises:
        IngestError: `corrupt`, `too-large`, or `unsupported` (colour, a codec or width that is not read).
    """
    header, name = picture.header, picture.header.name
    if picture.syntax not in (*NATIVE, *JPEG_2000, *JPEG, uid.RLELossless):
        known = picture.syntax in uid.UID_dictionary
        said = f"'{uid.UID(picture.syntax).name}'" if known else "a codec that the standard does not know"
        raise _unsupported(f"{name} is packed with {said}")
    if header.whole("SamplesPerPixel", 1) != 1:
        raise _unsupported(f"{name} is a colour picture")
    declared_bytes(header)
    bits = header.whole("BitsAllocated")
    stored = header.whole("BitsStored", bits)
    found = Layout(
        rows=header.whole("Rows"),
        columns=header.whole("Columns"),
        frames=header.whole("NumberOfFrames", 1),
        bits_allocated=bits,
        bits_stored=stored,
        high_bit=header.whole("HighBit", stored - 1),
        signed=header.whole("PixelRepresentation", 0) == 1,
    )
    if bits not in WIDTHS or (bits == WIDTHS[0] and picture.syntax == uid.ExplicitVRBigEndian):
        raise _unsupported(f"{name} has {bits} bits a value")
    if not 0 < found.bits_stored <= found.high_bit + 1 <= bits:
        raise raster.corrupt(name, f"{found.bits_stored} bits up to bit {found.high_bit} do not fit into {bits}")
    return found


def _unsupported(problem: str) -> IngestError:
    return IngestError(problem, code="unsupported", hint="export the original series, uncompressed or lossless")


def planes(picture: Picture, stored: Layout) -> Iterator[Plane]:
    """Unpack one frame after another, as stored.

    Raises:
        IngestError: `corrupt` when the bytes and the header disagree in any way.
    """
    name = picture.header.name
    try:
        start, length = _element(picture)
        if picture.syntax in NATIVE:
            yield from _native(picture, stored, start, length)
            return
        if length != UNDEFINED:
            raise raster.corrupt(name, "its packed pixels are not cut into items")
        for frame in _frames(picture, stored.frames, start):
            if picture.syntax == uid.RLELossless:
                yield _unpack_rle(frame, stored, name=name)
            else:
                yield _unpack(frame, picture, stored)
    except UNREADABLE as problem:
        raise raster.corrupt(name, "its pixels cannot be decoded") from problem


def _element(picture: Picture) -> tuple[int, int]:
    """Where the value of the element with the pixels begins, and its length."""
    data, at = picture.data, picture.start
    order = ">" if picture.syntax == uid.ExplicitVRBigEndian else "<"
    group, element = struct.unpack_from(f"{order}HH", data, at) if at + 4 <= len(data) else (0, 0)
    if (group << 16) + element != PIXEL_DATA:
        raise lacks("pixels", name=picture.header.name)
    if data[at + 4 : at + 6] in LONG_VR:
        return at + 12, struct.unpack_from(f"{order}I", data, at + 8)[0]
    return at + 8, struct.unpack_from(f"{order}I", data, at + 4)[0]


def _native(picture: Picture, stored: Layout, start: int, length: int) -> Iterator[Plane]:
    count = stored.rows * stored.columns
    needed = stored.frames * count * stored.dtype.itemsize
    found = min(length, len(picture.data) - start)
    # The standard pads to an even length; anything else means that a size is wrong.
    if not needed <= length <= needed + needed % 2 or found < needed:
        raise raster.corrupt(
            picture.header.name,
            f"it declares {stored.frames} x {stored.rows} x {stored.columns} values in {needed} bytes "
            f"and holds {max(found, 0)}",
        )
    dtype = stored.dtype.newbyteorder(">" if picture.syntax == uid.ExplicitVRBigEndian else "<")
    for index in range(stored.frames):
        offset = start + index * count * dtype.itemsize
        values = np.frombuffer(picture.data, dtype, count, offset).reshape(stored.rows, stored.columns)
        yield values.astype(stored.dtype, copy=False)


def _frames(picture: Picture, count: int, start: int) -> Iterator[bytes]:
    """The packed frames, in order (PS3.5, A.4): one item each, or as the offset table says."""
    name = picture.header.name
    table, *items = _items(picture.data, start, name=name)
    if count == 1:
        yield b"".join(picture.data[at : at + length] for at, length in items)
        return
    begins = [at - 8 for at, _ in items]
    if len(items) != count:
        offsets = struct.unpack_from(f"<{table[1] // 4}I", picture.data, table[0])
        wanted = [begins[0] + offset for offset in offsets]
        if len(wanted) != count or any(at not in begins for at in wanted) or wanted != sorted(set(wanted)):
            raise raster.corrupt(name, f"it declares {count} frames and holds {len(items)} pieces without a table")
        begins = wanted
    for index, begin in enumerate(begins):
        end = begins[index + 1] if index + 1 < count else len(picture.data)
        yield b"".join(picture.data[at : at + length] for at, length in items if begin <= at - 8 < end)


def _items(data: bytes, at: int, *, name: str) -> list[tuple[int, int]]:
    """Walk the items of packed pixels to their very end: start and length of each, the offset table first."""
    found: list[tuple[int, int]] = []
    while at + 8 <= len(data):
        group, element, length = struct.unpack_from("<HHI", data, at)
        tag, at = (group << 16) + element, at + 8
        if tag == ITEM_END and len(found) > 1:
            return found
        if tag != ITEM or at + length > len(data):
            break
        found.append((at, length))
        at += length
    raise raster.corrupt(name, "its packed pixels are cut off before their end")


def _unpack_rle(data: bytes, stored: Layout, *, name: str) -> Plane:
    """One RLE frame: a segment for each byte of a value, the highest first (PS3.5, annex G).

    A run grows to at most 64 times its size, so a segment stops being read where its plane is full.
    """
    count, width = stored.rows * stored.columns, stored.dtype.itemsize
    segments, *offsets = struct.unpack_from("<16I", data)
    if segments != width:
        raise raster.corrupt(name, f"its RLE frame has {segments} segments for {width} bytes a value")
    bytes_of = np.empty((count, width), np.uint8)
    ends = [*offsets[1:width], len(data)]
    for index in range(width):
        plain = _unpack_segment(data[offsets[index] : ends[index]], count, name=name)
        bytes_of[:, index] = np.frombuffer(plain, np.uint8, count)
    return bytes_of.view(stored.dtype.newbyteorder(">")).astype(stored.dtype).reshape(stored.rows, stored.columns)


def _unpack_segment(data: bytes, count: int, *, name: str) -> bytearray:
    plain, at, end = bytearray(), 0, len(data)
    while len(plain) < count and at < end:
        control = data[at]
        if control < 128:  # noqa: PLR2004 - so many bytes follow, and one more
            plain += data[at + 1 : at + 2 + control]
            at += control + 2
        else:
            if control > 128:  # noqa: PLR2004 - 128 says nothing; above it the next byte is repeated
                plain += data[at + 1 : at + 2] * (257 - control)
            at += 1 + (control > 128)  # noqa: PLR2004
    # A run may reach one byte over an odd plane; whatever else is left can only be the padding to even length.
    if not count <= len(plain) <= count + 1 or at > end or end - at > 1:
        raise raster.corrupt(name, f"an RLE segment unpacks to {len(plain)} bytes for {count} pixels")
    return plain


def _unpack(data: bytes, picture: Picture, stored: Layout) -> Plane:
    name = picture.header.name
    rows, columns, count, bits = _head_2000(data) if picture.syntax in JPEG_2000 else _head_jpeg(data)
    if (rows, columns) != (stored.rows, stored.columns):
        raise raster.corrupt(name, f"it declares {stored.rows} x {stored.columns} pixels and packs {rows} x {columns}")
    # GDCM ends the whole process over a width that it cannot hold.
    if count != 1 or bits < 1 or min([width for width in WIDTHS if width >= bits], default=0) != stored.bits_allocated:
        raise raster.corrupt(
            name, f"it declares one value of {stored.bits_allocated} bits a pixel and packs {count} of {bits} bits"
        )
    options: dict[str, Any] = {
        "rows": stored.rows,
        "columns": stored.columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "pixel_representation": int(stored.signed),
        "bits_allocated": stored.bits_allocated,
        # GDCM cuts off what lies above, without a word: whether it counts is for `values` to find out.
        "bits_stored": max(stored.bits_stored, bits),
        "pixel_keyword": "PixelData",
    }
    decoder = get_decoder(uid.UID(picture.syntax))
    values, _ = decoder.as_array(encapsulate([data]), index=0, raw=True, decoding_plugin="gdcm", **options)
    if values.shape != (stored.rows, stored.columns):
        raise raster.corrupt(name, f"it declares {stored.rows} x {stored.columns} pixels and holds {values.shape}")
    return values


def _head_jpeg(data: bytes) -> tuple[int, int, int, int]:
    """What a JPEG or JPEG-LS stream declares: rows, columns, values a pixel, bits a value (ITU T.81, B.2; T.87, C.2).

    Every segment up to the packed pixels must be one that may stand there: over another GDCM ends the process.
    """
    at, found = data.index(b"\xff\xd8") + 2, None
    while True:
        if data[at] != 0xFF:  # noqa: PLR2004 - every marker begins so
            raise ValueError("no marker where a segment ends")
        kind = data[at + 1]
        if kind == 0xFF:  # noqa: PLR2004 - filling
            at += 1
            continue
        if kind == START_OF_SCAN:
            break
        if kind < FIRST_SEGMENT or kind in STANDALONE or (kind in START_OF_FRAME and found):
            raise ValueError("a marker that may not stand before the pixels")
        if kind in START_OF_FRAME:
            bits, rows, columns, count = struct.unpack_from(">BHHB", data, at + 4)
            found = rows, columns, count, bits
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    if found is None:
        raise ValueError("no start of frame")
    return found


def _head_2000(data: bytes) -> tuple[int, int, int, int]:
    """The same of a JPEG 2000 codestream, from its SIZ segment (ITU T.800, A.5.1)."""
    at = data.index(b"\xff\x4f\xff\x51") + 4
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 4)
    count, depth = struct.unpack_from(">HB", data, at + 36)
    return bottom - top, right - left, count, (depth & 0x7F) + 1
