from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from pydicom import dcmread, uid
from pydicom.dataset import Dataset, FileMetaDataset

from voxelstem.errors import IngestError
from voxelstem.sources import header as module
from voxelstem.sources.header import Header, is_deflated, is_dicom, open_picture


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


def header(**values):
    one = Dataset()
    for keyword, value in values.items():
        setattr(one, keyword, value)
    return Header(name="image 1", dataset=one)


def file_of(syntax=uid.ExplicitVRLittleEndian, pixels=b"\1\0\2\0\3\0\4\0", **values):
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = syntax
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = uid.CTImageStorage
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = "1.2.3"
    one.Rows = one.Columns = 2
    one.SamplesPerPixel, one.BitsAllocated = 1, 16
    for keyword, value in values.items():
        setattr(one, keyword, value)
    one.PixelData = pixels
    with io.BytesIO() as opened:
        one.save_as(opened, enforce_file_format=True)
        return opened.getvalue()


def test_values_are_typed():
    one = header(Rows=7, PixelSpacing=[0.5, 0.25], ImageType=["A", "B"], PatientID="")
    assert (one.whole("Rows"), one.whole("Columns", 3), one.text("ImageType"), one.text("PatientID")) == (
        7,
        3,
        "A\\B",
        "",
    )
    assert one.vector("PixelSpacing", 2) == (0.5, 0.25)
    assert one.vector("ImagePositionPatient", 3) == ()
    np.testing.assert_array_equal(one.numbers("PixelSpacing"), [0.5, 0.25])
    with refused("corrupt"):
        one.vector("PixelSpacing", 3)
    with refused("corrupt"):
        one.number("Columns")
    with refused("corrupt"):
        header(SliceThickness="1.5").whole("SliceThickness")


def test_the_items_of_a_sequence_are_headers():
    inner = Dataset()
    inner.Rows = 3
    assert [
        item.whole("Rows") for item in header(ReferencedImageSequence=[inner, inner]).items("ReferencedImageSequence")
    ] == [3, 3]
    assert header().items("ReferencedImageSequence") == []


def test_a_picture_begins_where_its_pixels_do():
    data = file_of()
    assert is_dicom(data)
    picture = open_picture(data, name="image 1")
    assert picture.data[picture.start : picture.start + 4] == b"\xe0\x7f\x10\0"
    assert picture.syntax == uid.ExplicitVRLittleEndian
    assert not is_deflated(data)


def test_a_deflated_file_is_unpacked_to_what_a_plain_one_holds():
    data = file_of(uid.DeflatedExplicitVRLittleEndian, PatientComments="x" * 1000)
    assert is_deflated(data)
    picture = open_picture(data, name="image 1")
    assert dcmread(io.BytesIO(picture.data)).PixelData == b"\1\0\2\0\3\0\4\0"
    assert picture.header.text("PatientComments") == "x" * 1000


@pytest.mark.parametrize("keep", [0.6, 0.9, 0.97])
def test_a_deflated_file_that_is_cut_is_refused(keep):
    pixels = np.random.default_rng(0).bytes(2 * 64 * 64)
    data = file_of(uid.DeflatedExplicitVRLittleEndian, pixels, Rows=64, Columns=64)
    with refused("corrupt"):
        open_picture(data[: int(len(data) * keep)], name="image 1")


def test_a_deflated_file_unpacks_to_no_more_than_its_header_declares(monkeypatch):
    monkeypatch.setattr(module, "HEADER_BYTES", 2**12)
    monkeypatch.setattr(module, "TRAILER_BYTES", 2**4)
    size = 2 * 64 * 64
    assert open_picture(file_of(uid.DeflatedExplicitVRLittleEndian, bytes(size), Rows=64, Columns=64), name="image 1")
    for data in (
        file_of(uid.DeflatedExplicitVRLittleEndian, bytes(4 * size), Rows=64, Columns=64),
        file_of(uid.DeflatedExplicitVRLittleEndian, PatientComments="x" * 2**14),
    ):
        with refused("corrupt"):
            open_picture(data, name="image 1")


def test_what_is_no_dicom_is_refused():
    for data in (b"", b"nothing", bytes(128) + b"DICM", zlib.compress(bytes(500))):
        with refused("corrupt"):
            found = open_picture(data, name="image 1")
            found.header.whole("Rows")
