from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from voxelstem.errors import IngestError
from voxelstem.sources import mha

DATA = Path(os.environ.get("VOXELSTEM_DATA", Path(__file__).parents[3] / "shared" / "data"))


def ct(dtype="<i2"):
    array = np.random.default_rng(0).integers(-200, 300, (6, 7, 8))
    array[0] = -1000
    return array.astype(dtype)


def save(path, array=None, *, packed=False, replace=("", "")):
    """Write a MetaImage by hand, as its page describes it."""
    array = ct() if array is None else array
    types = {"i1": "CHAR", "i2": "SHORT", "i4": "INT", "f4": "FLOAT", "f8": "DOUBLE", "u1": "UCHAR"}
    body = array.tobytes(order="F")
    body = zlib.compress(body) if packed else body
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\n"
        f"BinaryDataByteOrderMSB = {array.dtype.byteorder == '>'}\nCompressedData = {packed}\n"
        "TransformMatrix = 0 1 0 -1 0 0 0 0 1\nOffset = 10 -20 30\nElementSpacing = 1.5 2 3\n"
        f"DimSize = {' '.join(str(edge) for edge in array.shape)}\n"
        f"ElementType = MET_{types[array.dtype.str[1:]]}\nElementDataFile = LOCAL\n"
    )
    assert replace[0] in header
    path.write_bytes(header.replace(*replace).encode() + body)
    return path


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<i4", ">f4", "<f8"])
def test_voxels_come_back(tmp_path, packed, dtype):
    raster = mha.parse(save(tmp_path / "a.mha", ct(dtype), packed=packed))
    np.testing.assert_array_equal(raster.array, ct())


def test_directions_spacing_and_offset_place_voxels_in_lps(tmp_path):
    affine = mha.parse(save(tmp_path / "a.mha")).affine_ras
    # First axis: direction (0, 1, 0) in LPS, 1.5 mm: to the back.
    np.testing.assert_allclose(affine[:3, 0], [0.0, -1.5, 0.0])
    np.testing.assert_allclose(affine[:3, 1], [2.0, 0.0, 0.0])
    np.testing.assert_allclose(affine[:3, 2], [0.0, 0.0, 3.0])
    np.testing.assert_allclose(affine[:3, 3], [-10.0, 20.0, 30.0])


def test_a_study_comes_out_in_ras(tmp_path):
    volume = mha.read(save(tmp_path / "a.mha", packed=True), subject="s").volumes[0]
    assert (volume.modality, volume.provenance.source_format, volume.provenance.orientation) == ("CT", "mha", "PRS")
    assert volume.spacing_mm == (2.0, 1.5, 3.0)


def test_masks_keep_their_numbers(tmp_path):
    mask = np.zeros((6, 7, 8), "u1")
    mask[2:5, 2:5, 2:5] = 4
    assert (mha.read_labels(save(tmp_path / "a.mha", mask)).array == 4).sum() == 27


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("LOCAL", "a.raw", "unsupported"),
        ("MET_SHORT", "MET_STRING", "unsupported-dtype"),
        ("NDims = 3", "ElementNumberOfChannels = 3", "unsupported-dtype"),
        ("Offset", "Nowhere", "bad-affine"),
        ("ElementSpacing = 1.5", "ElementSpacing = 0", "bad-spacing"),
        ("ElementSpacing = 1.5", "ElementSpacing = nan", "bad-spacing"),
        ("TransformMatrix = 0 1 0", "TransformMatrix = 0.3 1 0", "bad-affine"),
        ("BinaryData = True", "BinaryData = False", "unsupported"),
        ("BinaryData = True", "HeaderSize = -1", "unsupported"),
        ("BinaryData = True", "DistanceUnits = inch", "unsupported"),
        ("BinaryData = True", "ElementToIntensityFunctionSlope = 2", "unsupported"),
        ("BinaryData = True", "Position = 10 -20 31", "affine-conflict"),
        ("BinaryData = True", "Offset = 10 -20 30", "corrupt"),
        ("NDims = 3", "NDims = 2", "corrupt"),
        ("NDims = 3", "NDims = three", "corrupt"),
        ("LOCAL", "../../x", "unsupported"),
        ("LOCAL", "x" * 70_000, "corrupt"),
        ("MET_SHORT", "MET_\0", "unsupported-dtype"),
        ("Offset = 10", "Offset = ten", "corrupt"),
        ("DimSize = 6 7 8", "DimSize = 6 7 9", "corrupt"),
        ("DimSize = 6 7 8", "DimSize = 6 56", "corrupt"),
        ("DimSize = 6 7 8", "DimSize = 9999 99999 9999", "too-large"),
        ("ObjectType = Image", "\0\0\0", "corrupt"),
    ],
)
def test_each_fault_of_a_header_has_its_code(tmp_path, old, new, code):
    with refused(code) as caught:
        mha.read(save(tmp_path / "a.mha", replace=(old, new)), subject="s")
    assert caught.value.problem.isprintable()
    assert len(caught.value.problem) < 300


def test_a_picture_is_no_scan(tmp_path):
    path = save(tmp_path / "a.mha", ct()[0], replace=("NDims = 3", "NDims = 2"))
    with refused("not-3d"):
        mha.read(path, subject="s")


def test_other_units_become_millimetres_with_a_note(tmp_path):
    path = save(tmp_path / "a.mha", replace=("BinaryData = True", "DistanceUnits = cm"))
    volume = mha.read(path, subject="s").volumes[0]
    assert volume.spacing_mm == (20.0, 15.0, 30.0)
    assert "positions converted from cm to millimetres" in volume.provenance.notes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [0.01, 0.6, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, keep, packed):
    path = save(tmp_path / "a.mha", packed=packed)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with refused("corrupt"):
        mha.read(path, subject="s")


@pytest.mark.skipif(not (DATA / "ct" / "3DCT_lung.mha").is_file(), reason="the real scan is absent (VOXELSTEM_DATA)")
def test_a_real_chest_and_its_mask_lie_on_one_grid():
    volume = mha.read(DATA / "ct" / "3DCT_lung.mha", subject="s").volumes[0]
    mask = mha.read_labels(DATA / "ct" / "3DCT_lung_baseline_mask.mha")
    assert volume.modality == "CT"
    assert mask.array.shape == volume.shape_ijk
    np.testing.assert_allclose(mask.affine_ras, volume.affine_ras, atol=1e-3)
    assert volume.array[0][mask.array > 0].mean() < -500
