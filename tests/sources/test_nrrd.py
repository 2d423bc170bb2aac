from __future__ import annotations

import nrrd as pynrrd
import numpy as np
import pytest

from voxelstem.errors import IngestError
from voxelstem.sources import nrrd

LPS = {
    "space": "left-posterior-superior",
    "space directions": np.array([[0.0, 1.5, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]),
    "space origin": np.array([10.0, -20.0, 30.0]),
}


def ct(dtype=np.int16):
    array = np.random.default_rng(0).integers(-200, 300, (6, 7, 8))
    array[0] = -1000
    return array.astype(dtype)


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


def edit(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    return path


def save(path, array=None, **header):
    pynrrd.write(str(path), ct() if array is None else array, {**LPS, "encoding": "gzip"} | header)
    return path


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("endian", ["little", "big"])
def test_voxels_equal_pynrrd_s(tmp_path, encoding, dtype, endian):
    path = save(tmp_path / "a.nrrd", ct(np.int16).clip(-128, 127).astype(dtype), encoding=encoding, endian=endian)
    raster = nrrd.parse(path)
    expected, _ = pynrrd.read(str(path))
    np.testing.assert_array_equal(raster.array, expected)
    assert raster.array.dtype.itemsize == np.dtype(dtype).itemsize


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1, 1)),
        ("LPS", (-1, -1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("RAS", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
    ],
)
def test_each_space_is_turned_to_ras(tmp_path, space, signs):
    raster = nrrd.parse(save(tmp_path / "a.nrrd", space=space))
    for axis in range(3):
        np.testing.assert_allclose(raster.affine_ras[:3, axis], LPS["space directions"][axis] * signs)
    np.testing.assert_allclose(raster.affine_ras[:3, 3], LPS["space origin"] * signs)


def test_a_study_comes_out_in_ras(tmp_path):
    study = nrrd.read(save(tmp_path / "a.nrrd"), subject="s")
    volume = study.volumes[0]
    assert (study.subject, volume.modality, volume.provenance.source_format) == ("s", "CT", "nrrd")
    assert volume.spacing_mm == (2.0, 1.5, 3.0)
    assert volume.provenance.orientation == "PRS"


def test_masks_keep_their_numbers(tmp_path):
    mask = np.zeros((6, 7, 8), np.int32)
    mask[2:5, 2:5, 2:5] = 4
    path = save(tmp_path / "a.nrrd", mask)
    assert (nrrd.read_labels(path).array == 4).sum() == 27
    with refused("label-map"):
        nrrd.read(path, subject="s")


def test_detached_data_is_refused_clearly(tmp_path):
    pynrrd.write(str(tmp_path / "a.nhdr"), ct(), LPS)
    with refused("unsupported") as caught:
        nrrd.read(tmp_path / "a.nhdr", subject="s")
    assert "another file" in caught.value.problem


@pytest.mark.parametrize("keep", [0.1, 0.6, 0.99])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_a_file_cut_short_is_refused(tmp_path, keep, encoding):
    path = save(tmp_path / "a.nrrd", encoding=encoding)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with refused("corrupt"):
        nrrd.read(path, subject="s")


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b"encoding: raw", b"encoding: hex", "unsupported"),
        (b"left-posterior-superior", b"scanner-xyz", "unsupported"),
        (b"space origin", b"space nowhere", "bad-affine"),
        (b"(10,-20,30)", b"(nan,1,1)", "bad-affine"),
        (b"(10,-20,30)", b"(one,1,1)", "corrupt"),
        (b"sizes: 6 7 8", b"sizes: 6 7 9", "corrupt"),
        (b"sizes: 6 7 8", b"sizes: 6 56", "corrupt"),
        (b"dimension: 3", b"sizes: 6 7 8", "corrupt"),
        (b"(0,1.5,0)", b"(0,0,0)", "bad-spacing"),
        (b"(0,1.5,0)", b"(0,nan,0)", "bad-spacing"),
        (b"(0,1.5,0)", b"(0,1.5,1)", "bad-affine"),
        (b"endian: little", b'space units: "in" "in" "in"\nendian: little', "unsupported"),
        (b"endian: little", b"data file: ../../x\nendian: little", "unsupported"),
        (b"type: int16", b"type: " + b"x" * 60_000, "unsupported-dtype"),
        (b"type: int16", b"type: \0", "unsupported-dtype"),
        (b"sizes: 6 7 8", b"sizes: 60000 60000 60000", "too-large"),
        (b"type: int16", b"type: block", "unsupported-dtype"),
        (b"endian: little", b"endian: middle", "corrupt"),
        (b"NRRD000", b"PNG\0\0\0\0", "corrupt"),
    ],
)
def test_each_fault_of_a_header_has_its_code(tmp_path, old, new, code):
    path = save(tmp_path / "a.nrrd", encoding="raw")
    before = path.read_bytes()
    edit(path, old, new)
    assert path.read_bytes() != before
    with refused(code) as caught:
        nrrd.read(path, subject="s")
    assert caught.value.problem.isprintable()
    assert len(caught.value.problem) < 300


def test_a_picture_is_no_scan(tmp_path):
    pynrrd.write(str(tmp_path / "a.nrrd"), ct()[0], {"encoding": "raw"})
    with refused("not-3d"):
        nrrd.read(tmp_path / "a.nrrd", subject="s")


def test_other_units_become_millimetres_with_a_note(tmp_path):
    volume = nrrd.read(save(tmp_path / "a.nrrd", **{"space units": ["cm", "cm", "cm"]}), subject="s").volumes[0]
    assert volume.spacing_mm == (20.0, 15.0, 30.0)
    assert "positions converted from cm to millimetres" in volume.provenance.notes
