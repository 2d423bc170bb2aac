"""One DICOM file: its header, read once and typed, and where its pixels begin; nothing is unpacked unbounded.

What a header says may be anything, and may name the patient: messages name the keyword, never the value.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import pydicom
from jaxtyping import Float
from pydicom.dataelem import RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from voxelstem.errors import IngestError
from voxelstem.sources import raster

PREAMBLE = 128
MARK = b"DICM"
HEADER_BYTES = 32 * 2**20
"""Of a deflated file at most this much is unpacked before its header must have said how large its pixels are."""
TRAILER_BYTES = 2**20  # what may follow the pixels of a deflated file

PLAIN_VRS = frozenset(("CS", "DS", "IS", "SS", "UI", "US"))
"""Values whose meaning hangs on nothing but their own bytes, as texts do on the character set."""
MOST_DECODED = 4096

UNREADABLE = (
    InvalidDicomError,
    BytesLengthException,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What pydicom and its decoders raise on damaged files."""


class Unpacker(Protocol):
    """What `zlib.decompressobj` gives."""

    @property
    def eof(self) -> bool:
        """Whether the end was reached."""
        ...

    @property
    def unconsumed_tail(self) -> bytes:
        """What was not yet unpacked."""
        ...

    def decompress(self, data: bytes, max_length: int = 0, /) -> bytes:
        """Unpack at most so many bytes."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A header, or one item of a sequence in it, with typed access."""

    name: str
    """What messages call the picture: its number among the files."""
    dataset: Dataset

    def values(self, keyword: str) -> list[object]:
        """What a header holds under a keyword, decoded; empty where it holds nothing.

        Raises:
            IngestError: `corrupt`.
        """
        try:
            element = self.dataset.get_item(keyword)
            if element is None:
                return []
            if isinstance(element, RawDataElement) and element.VR in PLAIN_VRS and element.value is not None:
                return [*_decoded(element.tag, element.VR, element.value, element.is_little_endian)]
            return _listed(self.dataset[element.tag].value)
        except UNREADABLE as problem:
            raise raster.corrupt(self.name, f"its {keyword} cannot be decoded") from problem

    def text(self, keyword: str) -> str:
        """A header's text; empty where it has none."""
        return "\\".join(map(str, self.values(keyword)))

    def numbers(self, keyword: str) -> Float[np.ndarray, "n"]:
        """A header's numbers.

        Raises:
            IngestError: `corrupt` when they are none, or not finite.
        """
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

    def whole(self, keyword: str, default: int | None = None) -> int:
        """A header's one whole number, or `default` where it has none."""
        number = self.number(keyword, default)
        if number != int(number):
            raise raster.corrupt(self.name, f"{keyword} must hold a whole number")
        return int(number)

    def vector(self, keyword: str, count: int) -> tuple[float, ...]:
        """A header's numbers: `count` of them, or none where it has none."""
        numbers = self.numbers(keyword)
        if numbers.size not in (0, count):
            raise raster.corrupt(self.name, f"{keyword} must hold {count} numbers")
        return tuple(map(float, numbers))

    def items(self, keyword: str) -> list[Header]:
        """The items of a sequence; empty where it has none."""
        try:
            items: Sequence[Dataset] = self.dataset[keyword].value if keyword in self.dataset else ()
            return [Header(name=self.name, dataset=item) for item in items or ()]
        except UNREADABLE as problem:
            raise raster.corrupt(self.name, f"its {keyword} cannot be decoded") from problem


@lru_cache(MOST_DECODED)
def _decoded(tag: BaseTag, vr: str, value: bytes, little_endian: bool) -> tuple[object, ...]:
    """Decode a value. The slices of a series repeat most of theirs, and decoding took longer than their pixels."""
    raw = RawDataElement(tag, vr, len(value), value, 0, False, little_endian)
    return tuple(_listed(convert_raw_data_element(raw).value))


def _listed(value: object) -> list[object]:
    return [] if value in (None, "") else [*value] if isinstance(value, MultiValue) else [value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A file that holds a picture."""

    header: Header
    syntax: str
    """UID of the transfer syntax."""
    data: bytes
    """The whole file, unpacked where it was deflated."""
    start: int
    """Where the element with the pixels begins; the end of the data where there is none."""


def is_dicom(start: bytes) -> bool:
    """Whether a file's first bytes are DICOM's."""
    return start[PREAMBLE : PREAMBLE + len(MARK)] == MARK


def open_picture(data: bytes, *, name: str) -> Picture:
    """Parse a file's header up to its pixels.

    Raises:
        IngestError: `corrupt`, or `too-large` for a deflated file that unpacks to more than `raster.MOST_BYTES`.
    """
    try:
        if is_deflated(data):
            data = _inflate(data, name=name)
        stream = io.BytesIO(data)
        dataset = pydicom.dcmread(stream, stop_before_pixels=True)
        syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    except UNREADABLE as problem:
        raise raster.corrupt(name, "it cannot be read as DICOM") from problem
    return Picture(header=Header(name=name, dataset=dataset), syntax=syntax, data=data, start=stream.tell())


def is_deflated(data: bytes) -> bool:
    """Whether the file meta information names the deflated transfer syntax (PS3.5, A.5)."""
    found = re.compile(rb"\x02\x00\x10\x00UI(..)", re.DOTALL).search(data, PREAMBLE, PREAMBLE + 4096)
    if not found or not is_dicom(data):
        return False
    (length,) = struct.unpack("<H", found[1])
    return data[found.end() : found.end() + length].rstrip(b"\0 ").decode("ascii", "replace") == (
        DeflatedExplicitVRLittleEndian
    )


def inflate_start(data: bytes, most: int) -> tuple[bytes, bytes, Unpacker]:
    """The beginning of a deflated file: its file meta information, changed to say it is not, and unpacked bytes.

    Returns:
        Both, and what unpacks the rest.

    Raises:
        ValueError, struct.error, zlib.error: the file is damaged.
    """
    at = PREAMBLE + len(MARK)
    # (0002,0000) comes first and says how long the group is (PS3.10, 7.1).
    tag, length = struct.unpack_from("<I4xI", data, at)
    if tag != 0x00000002:  # noqa: PLR2004 - (0002,0000) as little-endian words
        raise ValueError("the file meta information does not begin with its length")
    end = at + 12 + length
    meta = pydicom.dcmread(io.BytesIO(data[:end]), force=True).file_meta
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    plain = io.BytesIO()
    empty = FileDataset("", {}, preamble=data[:PREAMBLE], file_meta=meta)
    pydicom.dcmwrite(plain, empty, enforce_file_format=False, implicit_vr=False, little_endian=True)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    return plain.getvalue(), stream.decompress(memoryview(data)[end:], most), stream


def _inflate(data: bytes, *, name: str) -> bytes:
    """Unpack a deflated file: the header first, then no more than its pixels may take."""
    meta, body, stream = inflate_start(data, HEADER_BYTES)
    if not stream.eof:
        opened = io.BytesIO(meta + body)
        header = Header(name=name, dataset=pydicom.dcmread(opened, stop_before_pixels=True))
        allowed = opened.tell() + declared_bytes(header) + TRAILER_BYTES
        rest = stream.decompress(stream.unconsumed_tail, max(allowed - len(meta) - len(body), 1))
        if not stream.eof:
            raise raster.corrupt(name, "it unpacks to more than its header declares, or is cut off")
        body += rest
    return meta + body


def declared_bytes(header: Header) -> int:
    """How many bytes of unpacked pixels a header promises.

    Raises:
        IngestError: `corrupt` or `too-large`, before anything of that size is reserved.
    """
    frames = header.whole("NumberOfFrames", 1)
    shape = (frames, header.whole("Rows"), header.whole("Columns"), header.whole("SamplesPerPixel", 1))
    bits = header.whole("BitsAllocated")
    return raster.check_size(header.name, shape, max(bits // 8, 1))


def lacks(what: str, *, name: str) -> IngestError:
    """The refusal of a picture without something that the standard demands."""
    return raster.corrupt(name, f"it holds no {what}, or its header is cut off")
