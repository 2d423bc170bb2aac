from __future__ import annotations

import io
import struct

import gdcm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from voxelstem.errors import IngestError
from voxelstem.sources.header import open_picture
from voxelstem.sources.pixels import layout, planes

ROWS, COLUMNS = 6, 5


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


def stored(frames=1, *, bits=16, signed=True):
    """Stored values (frame, row, column), each different."""
    kind = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    low = -40 if signed else 0
    return (np.arange(frames * ROWS * COLUMNS) + low).astype(kind).reshape(frames, ROWS, COLUMNS)


def large(frames=1):
    """Values of a picture that every encoder takes."""
    return np.random.default_rng(0).integers(0, 4000, (frames, 64, 48)).astype(np.uint16)


def dataset(values, syntax=uid.ExplicitVRLittleEndian, **more):
    """A picture with these values; `more` overrides what its header says."""
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = syntax
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = uid.CTImageStorage
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = "1.2.3"
    frames, one.Rows, one.Columns = values.shape
    if frames > 1:
        one.NumberOfFrames = frames
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated = one.BitsStored = values.itemsize * 8
    one.HighBit = one.BitsAllocated - 1
    one.PixelRepresentation = int(values.dtype.kind == "i")
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    one.PixelData = values.astype(values.dtype.newbyteorder(order)).tobytes()
    for keyword, value in more.items():
        setattr(one, keyword, value)
    return one


def file_of(one):
    syntax = one.file_meta.TransferSyntaxUID
    with io.BytesIO() as opened:
        one.save_as(
            opened,
            enforce_file_format=True,
            implicit_vr=syntax == uid.ImplicitVRLittleEndian,
            little_endian=syntax != uid.ExplicitVRBigEndian,
        )
        return opened.getvalue()


def unpack(data):
    picture = open_picture(data, name="image 1")
    return np.stack(list(planes(picture, layout(picture))))


def packed(values, syntax, tmp_path):
    """What GDCM makes of the values under another transfer syntax, as bytes of a file."""
    (tmp_path / "plain.dcm").write_bytes(file_of(dataset(values)))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(tmp_path / "plain.dcm"))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(tmp_path / "packed.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (tmp_path / "packed.dcm").read_bytes()


NATIVE = [
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
]


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("frames", [1, 3])
def test_plain_pixels_are_read_in_every_byte_order_and_deflated(syntax, signed, frames):
    values = stored(frames, signed=signed)
    found = unpack(file_of(dataset(values, syntax)))
    np.testing.assert_array_equal(found, values)
    assert found.dtype == values.dtype


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_values_of_every_width_are_read(bits):
    np.testing.assert_array_equal(unpack(file_of(dataset(stored(bits=bits)))), stored(bits=bits))


@pytest.mark.parametrize(
    ("syntax", "expected"),
    [
        (gdcm.TransferSyntax.JPEGLosslessProcess14, uid.JPEGLossless),
        (gdcm.TransferSyntax.JPEGLosslessProcess14_1, uid.JPEGLosslessSV1),
        (gdcm.TransferSyntax.JPEGLSLossless, uid.JPEGLSLossless),
        (gdcm.TransferSyntax.JPEG2000Lossless, uid.JPEG2000Lossless),
        (gdcm.TransferSyntax.RLELossless, uid.RLELossless),
    ],
)
def test_every_lossless_codec_gives_the_values_back(tmp_path, syntax, expected):
    values = large(3)
    data = packed(values, syntax, tmp_path)
    assert open_picture(data, name="image 1").syntax == expected
    np.testing.assert_array_equal(unpack(data), values)


@pytest.mark.parametrize(
    "syntax",
    [
        gdcm.TransferSyntax.JPEGLosslessProcess14,
        gdcm.TransferSyntax.JPEGLosslessProcess14_1,
        gdcm.TransferSyntax.JPEGLSLossless,
        gdcm.TransferSyntax.JPEG2000Lossless,
        gdcm.TransferSyntax.RLELossless,
    ],
)
def test_no_codec_cuts_bits_off_that_the_header_does_not_declare(tmp_path, syntax):
    values = large() * np.uint16(2)
    data = packed(values, syntax, tmp_path)
    for tag, number in ((b"\x28\0\x01\x01US\2\0", 12), (b"\x28\0\x02\x01US\2\0", 11)):
        data = data.replace(tag + struct.pack("<H", number + 4), tag + struct.pack("<H", number))
    picture = open_picture(data, name="image 1")
    assert layout(picture).bits_stored == 12
    np.testing.assert_array_equal(unpack(data), values)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), distinct=st.sampled_from([1, 2, 300]), bits=st.sampled_from([8, 16]))
def test_rle_by_pydicom_is_read_by_us(seed, distinct, bits):
    values = np.random.default_rng(seed).integers(0, distinct, (2, ROWS, COLUMNS)).astype(f"u{bits // 8}")
    one = dataset(values)
    one.compress(uid.RLELossless)
    np.testing.assert_array_equal(unpack(file_of(one)), values)


def rle(one, segment, count=2):
    """A dataset whose one frame has `count` equal segments."""
    offsets = [64 + index * len(segment) for index in range(count)]
    frame = struct.pack("<16I", count, *offsets, *[0] * (15 - count)) + segment * count
    one.file_meta.TransferSyntaxUID = uid.RLELossless
    one.PixelData = encapsulate([frame])
    one["PixelData"].VR = "OB"
    return file_of(one)


@pytest.mark.parametrize(
    ("segment", "whole"),
    [
        (bytes([257 - ROWS * COLUMNS, 7]), True),
        (bytes([257 - ROWS * COLUMNS, 7, 128]), True),  # 128 says nothing
        (bytes([257 - ROWS * COLUMNS + 1, 7]), False),  # one byte short
        (bytes([129, 7]), False),  # 128 bytes where 30 belong
        (bytes([257 - ROWS * COLUMNS, 7]) * 2, False),  # a second plane behind the first
        (bytes([ROWS * COLUMNS - 1, 7, 7]), False),  # the bytes end before the run
        (b"", False),
    ],
)
def test_an_rle_segment_must_fill_its_plane_exactly(segment, whole):
    data = rle(dataset(stored()), segment)
    if whole:
        assert (unpack(data) == 7 * 257).all()
    else:
        with refused("corrupt"):
            unpack(data)


def test_an_rle_frame_has_a_segment_for_every_byte():
    with refused("corrupt"):
        unpack(rle(dataset(stored()), bytes([257 - ROWS * COLUMNS, 7]), count=3))


@pytest.mark.parametrize(
    "lie",
    [
        {"Rows": ROWS - 1},
        {"Rows": ROWS + 1},
        {"Columns": 50_000},
        {"NumberOfFrames": 2},
        {"NumberOfFrames": 0},
        {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7},
        {"PixelData": bytes(ROWS * COLUMNS * 2 + 2)},
        {"PixelData": b""},
        {"BitsStored": 17},
        {"HighBit": 16},
        {"BitsStored": 0},
    ],
)
def test_a_header_that_lies_about_plain_pixels_is_refused(lie):
    with refused("corrupt"):
        unpack(file_of(dataset(stored(), **lie)))


@pytest.mark.parametrize("syntax", [gdcm.TransferSyntax.JPEGLosslessProcess14_1, gdcm.TransferSyntax.JPEG2000Lossless])
@pytest.mark.parametrize("edge", ["Rows", "Columns"])
def test_a_header_that_disagrees_with_the_codestream_is_refused_before_it_is_unpacked(tmp_path, syntax, edge):
    data = packed(large(), syntax, tmp_path)
    was = 64 if edge == "Rows" else 48
    tag = b"\x28\0\x10\0" if edge == "Rows" else b"\x28\0\x11\0"
    for lie in (was - 1, was + 1, 40_000):
        spoilt = data.replace(tag + b"US\2\0" + struct.pack("<H", was), tag + b"US\2\0" + struct.pack("<H", lie))
        assert spoilt != data
        with refused("corrupt") as caught:
            unpack(spoilt)
        assert "packs" in caught.value.problem


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("syntax", [gdcm.TransferSyntax.JPEGLSLossless, gdcm.TransferSyntax.JPEG2000Lossless])
def test_packed_pixels_without_their_end_are_refused(tmp_path, syntax, keep):
    data = packed(large(), syntax, tmp_path)
    start = open_picture(data, name="image 1").start
    with refused("corrupt"):
        unpack(data[: start + int((len(data) - start) * keep)])


def test_frames_in_several_pieces_follow_the_offset_table():
    one = dataset(stored(2))
    one.compress(uid.RLELossless)
    picture = open_picture(file_of(one), name="image 1")
    at = picture.data.index(b"\xfe\xff\x00\xe0", picture.start + 12) + 8 + 8  # behind the table
    frames = []
    while picture.data[at : at + 4] == b"\xfe\xff\x00\xe0":
        (length,) = struct.unpack_from("<I", picture.data, at + 4)
        frames.append(picture.data[at + 8 : at + 8 + length])
        at += 8 + length
    one.PixelData = encapsulate(frames, fragments_per_frame=2, has_bot=True)
    np.testing.assert_array_equal(unpack(file_of(one)), stored(2))
    one.PixelData = encapsulate(frames, fragments_per_frame=2, has_bot=False)
    with refused("corrupt"):
        unpack(file_of(one))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SamplesPerPixel": 3}, "colour"),
        ({"BitsAllocated": 64, "BitsStored": 64, "HighBit": 63}, "64 bits"),
    ],
)
def test_what_is_not_read_is_called_unsupported(change, words):
    with refused("unsupported") as caught:
        unpack(file_of(dataset(stored(), **change)))
    assert words in caught.value.problem


@pytest.mark.parametrize(
    ("syntax", "words"), [(uid.HTJ2KLossless, "High-Throughput"), ("1.2.3.4.5.6.7.8.9", "does not know")]
)
def test_an_unknown_codec_is_named_only_if_the_standard_does(syntax, words):
    data = file_of(dataset(stored()))
    plain = uid.ExplicitVRLittleEndian.encode() + b"\0"
    at = data.index(b"\x02\0\x10\0UI")
    (length,) = struct.unpack_from("<H", data, at + 6)
    assert data[at + 8 : at + 8 + length] == plain
    name = syntax.encode() + b"\0" * (len(syntax) % 2)
    size = struct.unpack_from("<I", data, 140)[0] + len(name) - length
    data = (
        data[:140]
        + struct.pack("<I", size)
        + data[144:at]
        + b"\x02\0\x10\0UI"
        + struct.pack("<H", len(name))
        + (name + data[at + 8 + length :])
    )
    with refused("unsupported") as caught:
        unpack(data)
    assert words in caught.value.problem
    assert "1.2.3.4.5" not in str(caught.value)


def test_a_declared_size_beyond_the_cap_is_refused_before_anything_is_read():
    with refused("too-large"):
        unpack(file_of(dataset(stored(), Rows=65_000, Columns=65_000, NumberOfFrames=9)))
