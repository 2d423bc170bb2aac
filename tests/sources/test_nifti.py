from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from voxelstem.errors import IngestError
from voxelstem.sources import nifti

DATA = Path(os.environ.get("VOXELSTEM_DATA", Path(__file__).parents[3] / "shared" / "data"))
real = pytest.mark.skipif(not (DATA / "starter").is_dir(), reason="the folder of real scans is absent (VOXELSTEM_DATA)")
AFFINE = np.array([[0.0, -2.0, 0.0, 50.0], [1.5, 0.0, 0.0, -20.0], [0.0, 0.0, 3.0, 7.0], [0.0, 0.0, 0.0, 1.0]])


def ct(shape=(6, 7, 8), dtype=np.int16):
    array = np.random.default_rng(0).integers(-200, 300, shape)
    array[0] = -1000
    return array.astype(dtype)


def save(path, array, affine=AFFINE, change=lambda _: None, kind=nib.Nifti1Image):
    image = kind(array, affine, dtype=array.dtype)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    change(image)
    nib.save(image, path)
    return path


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxels_and_places_equal_nibabel_s(tmp_path, dtype, ending, kind):
    path = save(tmp_path / f"a.{ending}", ct(dtype=dtype), kind=kind)
    study = nifti.read(path, subject="s")
    volume = study.volumes[0]
    oracle = nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(volume.array[0], oracle.get_fdata().astype(np.float32))
    np.testing.assert_allclose(volume.affine_ras, oracle.affine, atol=1e-6)
    assert (study.subject, volume.modality, volume.provenance.orientation) == ("s", "CT", "ALS")


def test_slope_and_intercept_are_applied(tmp_path):
    def stored(image):
        image.header.set_slope_inter(2.0, -1024.0)

    image = nib.Nifti1Image(np.abs(ct()), AFFINE)
    stored(image)
    path = tmp_path / "a.nii"
    nib.save(image, path)
    volume = nifti.read(path, subject="s").volumes[0]
    np.testing.assert_array_equal(volume.array[0], nib.as_closest_canonical(nib.load(path)).get_fdata())


def test_a_big_endian_file_reads_the_same(tmp_path):
    little = save(tmp_path / "a.nii", ct())
    image = nib.load(little)
    big = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header.as_byteswapped(">"))
    nib.save(big, tmp_path / "b.nii")
    one, other = (nifti.read(tmp_path / name, subject="s").volumes[0] for name in ("a.nii", "b.nii"))
    np.testing.assert_array_equal(one.array, other.array)


def test_metres_and_microns_become_millimetres_with_a_note(tmp_path):
    for unit, factor in (("meter", 1000.0), ("micron", 0.001)):
        placed = np.diag([1 / factor, 1 / factor, 1 / factor, 1.0]) @ AFFINE

        def measure(image, unit=unit):
            image.header.set_xyzt_units(unit, "msec")  # the unit of time says nothing about space

        volume = nifti.read(save(tmp_path / "a.nii", ct(), placed, measure), subject="s").volumes[0]
        np.testing.assert_allclose(volume.spacing_mm, [2.0, 1.5, 3.0], rtol=1e-5)
        assert any("millimetres" in note for note in volume.provenance.notes)


@pytest.mark.parametrize("unit", ["meter", "micron"])
def test_a_unit_that_makes_voxels_of_metres_or_microns_is_refused(tmp_path, unit):
    path = save(tmp_path / "a.nii", ct(), change=lambda image: image.header.set_xyzt_units(unit))
    with refused("bad-spacing"):
        nifti.read(path, subject="s")


def test_no_unit_means_millimetres_and_a_note_and_an_unknown_one_is_refused(tmp_path):
    path = save(tmp_path / "a.nii", ct())
    volume = nifti.read(patch(path, UNITS, 0, "u1"), subject="s").volumes[0]
    assert volume.spacing_mm == pytest.approx((2.0, 1.5, 3.0))
    assert any("no unit" in note for note in volume.provenance.notes)
    with refused("corrupt"):
        nifti.read(patch(path, UNITS, 5, "u1"), subject="s")


def test_a_trailing_axis_of_one_is_no_obstacle(tmp_path):
    path = save(tmp_path / "a.nii.gz", ct()[..., None])
    assert nifti.read(path, subject="s").volumes[0].shape_ijk == (7, 6, 8)


def test_write_then_read_gives_the_same_voxels_and_bytes(tmp_path):
    nifti.write(tmp_path / "a.nii.gz", ct(), AFFINE)
    nifti.write(tmp_path / "b.nii.gz", ct(), AFFINE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    raster = nifti.parse(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(raster.array, ct())
    np.testing.assert_array_equal(raster.affine_ras, AFFINE)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_masks_keep_their_numbers(tmp_path):
    mask = np.zeros((6, 7, 8), np.uint8)
    mask[1:4, 2:5, 3:6] = 117
    grid = nifti.read_labels(save(tmp_path / "a.nii.gz", mask))
    assert grid.array.dtype == np.int16
    assert (grid.array == 117).sum() == 27
    with refused("label-map"):
        nifti.read(tmp_path / "a.nii.gz", subject="s")


def test_a_missing_file_is_refused(tmp_path):
    with refused("missing"):
        nifti.read(tmp_path / "none.nii", subject="s")


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    for name in ("a.nii", "a.nii.gz"):
        whole = save(tmp_path / name, ct((20, 20, 20))).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(len(whole) * keep)])
        with refused("corrupt"):
            nifti.read(tmp_path / name, subject="s")


def test_a_wrong_checksum_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", ct())
    packed = bytearray(path.read_bytes())
    packed[-6] ^= 1
    path.write_bytes(bytes(packed))
    with refused("corrupt"):
        nifti.read(path, subject="s")


def test_more_voxels_than_declared_are_refused(tmp_path):
    for name, pack in (("a.nii", bytes), ("a.nii.gz", gzip.compress)):
        save(tmp_path / "whole.nii", ct())
        (tmp_path / name).write_bytes(pack((tmp_path / "whole.nii").read_bytes() + b"more"))
        with refused("corrupt"):
            nifti.read(tmp_path / name, subject="s")


def test_an_absurd_size_is_refused_without_reserving_it(tmp_path):
    path = save(tmp_path / "a.nii", ct())
    data = bytearray(path.read_bytes())
    data[42:48] = np.array([32_000, 32_000, 32_000], "<i2").tobytes()
    for name, pack in (("a.nii", bytes), ("a.nii.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(bytes(data)))
        with refused("too-large"):
            nifti.read(tmp_path / name, subject="s")


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 1), (6, 7, 8, 3)])
def test_pictures_and_series_are_refused(tmp_path, shape):
    with refused("not-3d"):
        nifti.read(save(tmp_path / "a.nii", ct(shape)), subject="s")


def test_colours_and_complex_numbers_are_refused(tmp_path):
    colours = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with refused("colour"):
        nifti.read(save(tmp_path / "a.nii", colours), subject="s")
    with refused("unsupported-dtype"):
        nifti.read(save(tmp_path / "a.nii", np.zeros((4, 4, 4), np.complex64)), subject="s")


def patch(path, offset, values, dtype):
    """Change a field of a little-endian header where it lies: nibabel would mend it."""
    data = bytearray(path.read_bytes())
    new = np.array(values, dtype).tobytes()
    data[offset : offset + len(new)] = new
    path.write_bytes(bytes(data))
    return path


# Where the fields of NIfTI-1 lie (nifti1.h).
DIM, INTENT, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SLOPE, UNITS = 40, 68, 70, 72, 76, 108, 112, 123
CODES, QUATERN, SROW_X, SROW_Y, SROW_Z, MAGIC, EXTENSION = 252, 256, 280, 296, 312, 344, 348


@pytest.mark.parametrize(
    ("codes", "offset", "values", "code"),
    [
        ([0, 0], SROW_X, [0, -2, 0, 50], "bad-affine"),
        ([0, 1], SROW_Z, [0, 0, 0, 0], "bad-spacing"),
        ([0, 1], SROW_X, [np.nan, -2, 0, 50], "bad-spacing"),
        ([0, 1], SROW_X, [0, -2, 0, np.nan], "bad-affine"),
        ([0, 1], SROW_X, [0, -2, 0, np.inf], "bad-affine"),
        ([0, 1], SROW_X, [2, -2, 0, 50], "bad-affine"),
        ([0, 1], PIXDIM + 4, [0], "bad-spacing"),
        ([1, 0], PIXDIM + 4, [np.nan], "bad-spacing"),
        ([1, 0], PIXDIM + 8, [np.inf], "bad-spacing"),
        ([1, 0], PIXDIM + 8, [-2], "bad-affine"),
        ([1, 0], PIXDIM, [0.5], "bad-affine"),
        ([1, 0], QUATERN, [2, 2, 2], "bad-affine"),
        ([1, 1], QUATERN, [np.nan], "affine-conflict"),
        ([0, 1], PIXDIM + 4, [1.6], "affine-conflict"),
        ([0, 77], SROW_X, [0, -2, 0, 50], "corrupt"),
    ],
)
def test_a_file_that_does_not_say_where_it_lies_is_refused(tmp_path, codes, offset, values, code):
    path = patch(patch(save(tmp_path / "a.nii", ct()), CODES, codes, "<i2"), offset, values, "<f4")
    with refused(code):
        nifti.read(path, subject="s")


def test_a_mirrored_scan_is_legal_and_turns_the_right_way(tmp_path):
    mirrored = AFFINE * [-1.0, 1.0, 1.0, 1.0]  # the columns: the first axis runs the other way
    assert np.linalg.det(mirrored[:3, :3]) * np.linalg.det(AFFINE[:3, :3]) < 0
    path = save(tmp_path / "a.nii", ct(), mirrored)
    volume = nifti.read(path, subject="s").volumes[0]
    np.testing.assert_array_equal(volume.array[0], nib.as_closest_canonical(nib.load(path)).get_fdata())


def test_a_qfac_of_zero_means_one(tmp_path):
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    path = patch(patch(save(tmp_path / "a.nii", ct(), affine), CODES, [1, 0], "<i2"), PIXDIM, 0, "<f4")
    np.testing.assert_allclose(nifti.read(path, subject="s").volumes[0].affine_ras, affine)


SCALED = ct() + 1024  # numbers from 24 to 1323, as scanners store them


@pytest.mark.parametrize(
    ("array", "slope", "intercept", "code"),
    [
        (SCALED, np.nan, 0, "bad-scaling"),
        (SCALED, np.inf, 0, "bad-scaling"),
        (SCALED, 1, np.nan, "bad-scaling"),
        (SCALED, 1, -np.inf, "bad-scaling"),
        (SCALED, 1e-30, -1024, "bad-scaling"),
        (SCALED, 1e-44, 0, "bad-scaling"),
        (SCALED, 1, 1e30, "bad-scaling"),
        (SCALED.astype(np.float32), 1e38, 0, "bad-scaling"),
        (ct(), 1, -1024, "rescaled-twice"),
        (ct(), 1, -8192, "rescaled-twice"),
        (ct(dtype=np.float32), 1, -1000, "rescaled-twice"),
    ],
)
def test_a_slope_or_intercept_that_spoils_the_values_is_refused(tmp_path, array, slope, intercept, code):
    path = patch(save(tmp_path / "a.nii", array), SLOPE, [slope, intercept], "<f4")
    with refused(code):
        nifti.read(path, subject="s")


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "stored_as"),
    [
        (np.int16, 1, -1024, np.int16),
        (np.uint16, 1, -1024, np.int16),
        (np.int16, -30, 7, np.int32),
        (np.int16, 1 / 3, -1024, np.float32),
        (np.float32, 2, -1024, np.float32),
        (np.int64, 1, 2**40, np.float32),
    ],
)
def test_scaled_values_equal_their_naive_twin_and_are_noted(tmp_path, dtype, slope, intercept, stored_as):
    array = SCALED.astype(dtype) * (2**30 if dtype is np.int64 else 1)
    path = patch(save(tmp_path / "a.nii", array), SLOPE, [slope, intercept], "<f4")
    read = nifti.parse(path)
    assert read.array.dtype == stored_as
    exact = array.astype(np.float64) * float(np.float32(slope)) + float(np.float32(intercept))
    np.testing.assert_array_equal(read.array, exact.astype(stored_as))
    assert any("applied" in note for note in read.notes)


def test_a_slope_of_zero_means_unscaled(tmp_path):
    path = patch(save(tmp_path / "a.nii", ct()), SLOPE, [0, -1024], "<f4")
    read = nifti.parse(path)
    np.testing.assert_array_equal(read.array, ct())
    assert any("scl_slope is 0" in note for note in read.notes)


@pytest.mark.parametrize(
    ("offset", "values", "dtype", "code"),
    [
        (INTENT, 1002, "<i2", "label-map"),
        (INTENT, 1006, "<i2", "not-a-scan"),
        (INTENT, 1007, "<i2", "not-a-scan"),
        (INTENT, 2006, "<i2", "not-a-scan"),
        (INTENT, 5, "<i2", "not-a-scan"),
        (DIM, 0, "<i2", "corrupt"),
        (DIM, 9, "<i2", "corrupt"),
        (DIM + 2, -6, "<i2", "corrupt"),
        (DIM + 2, 7, "<i2", "corrupt"),
        (DATATYPE, 8, "<i2", "corrupt"),
        (DATATYPE, 5, "<i2", "corrupt"),
        (BITPIX, 8, "<i2", "corrupt"),
        (VOX_OFFSET, 0, "<f4", "corrupt"),
        (VOX_OFFSET, 349, "<f4", "corrupt"),
        (VOX_OFFSET, 368, "<f4", "corrupt"),
        (VOX_OFFSET, 1e30, "<f4", "corrupt"),
        (VOX_OFFSET, np.nan, "<f4", "corrupt"),
        (MAGIC, 0, "<u4", "unsupported"),
        (MAGIC, 0x0031696E, "<u4", "unsupported"),
        (MAGIC, 0x00313131, "<u4", "corrupt"),
        (0, 540, "<i4", "corrupt"),
    ],
)
def test_each_lie_of_a_header_has_its_code(tmp_path, offset, values, dtype, code):
    for name, pack in (("a.nii", bytes), ("a.nii.gz", gzip.compress)):
        path = patch(save(tmp_path / "raw.nii", ct()), offset, values, dtype)
        (tmp_path / name).write_bytes(pack(path.read_bytes()))
        with refused(code):
            nifti.read(tmp_path / name, subject="s")


def test_a_label_map_by_intent_is_a_mask(tmp_path):
    mask = np.zeros((6, 7, 8), np.uint8)
    mask[1:4, 2:5, 3:6] = 2
    path = patch(save(tmp_path / "a.nii", mask), INTENT, 1002, "<i2")
    assert (nifti.read_labels(path).array == 2).sum() == 27
    with refused("not-a-scan"):
        nifti.read_labels(patch(path, INTENT, 1007, "<i2"))


@pytest.mark.parametrize(
    ("blocks", "code"),
    [
        (struct.pack("<4Bii", 1, 0, 0, 0, 16, 6) + b"whoever ", ""),
        (struct.pack("<4Bii", 1, 0, 0, 0, 16, 6) + b"whoever " + bytes(16), ""),
        (struct.pack("<4Bii", 0, 0, 0, 0, 0, 0), ""),
        (struct.pack("<4Bii", 1, 0, 0, 0, 32, 6) + b"whoever ", "corrupt"),
        (struct.pack("<4Bii", 1, 0, 0, 0, -16, 6) + b"whoever ", "corrupt"),
        (struct.pack("<4Bi", 1, 0, 0, 0, 16), "corrupt"),
    ],
    ids=["one", "one and room", "none", "too long", "negative", "half"],
)
def test_header_extensions_must_fill_their_place_and_are_left_out(tmp_path, blocks, code):
    data = save(tmp_path / "a.nii", ct()).read_bytes()
    (tmp_path / "a.nii").write_bytes(data[:EXTENSION] + blocks + data[EXTENSION + 4 :])
    path = patch(tmp_path / "a.nii", VOX_OFFSET, EXTENSION + len(blocks), "<f4")
    if code:
        with refused(code):
            nifti.parse(path)
        return
    read = nifti.parse(path)
    np.testing.assert_array_equal(read.array, ct())
    assert not any("whoever" in note for note in read.notes)
    assert any("extension" in note for note in read.notes) == (blocks[0] == 1)


@pytest.mark.parametrize(("codes", "voxel_mm"), [([0, 1], 3.0), ([1, 0], 3.0)])
def test_either_placement_alone_is_enough(tmp_path, codes, voxel_mm):
    path = patch(save(tmp_path / "a.nii", ct()), CODES, codes, "<i2")
    volume = nifti.read(path, subject="s").volumes[0]
    assert volume.spacing_mm[2] == pytest.approx(voxel_mm)
    np.testing.assert_allclose(volume.affine_ras[:3, 3], [36.0 + 2.0, -20.0, 7.0], atol=1e-4)


def test_two_placements_that_disagree_are_refused(tmp_path):
    nifti.read(patch(save(tmp_path / "a.nii", ct()), SROW_X, [0, -2, 0, 50.1], "<f4"), subject="s")
    with refused("affine-conflict"):
        nifti.read(patch(save(tmp_path / "a.nii", ct()), SROW_X, [0, -2, 0, 55], "<f4"), subject="s")


def test_messages_name_the_file_and_no_folder(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"nothing")
    with refused("corrupt") as caught:
        nifti.read(tmp_path / "a.nii", subject="s")
    assert "a.nii" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@real
def test_the_modality_of_every_real_scan_is_told_from_its_values():
    for path in sorted((DATA / "starter").glob("*.nii.gz")):
        mask = any(word in path.name for word in ("gtv", "lesion", "GOLD", "seg"))
        if mask:
            with refused("label-map"):
                nifti.read(path, subject="s")
            assert nifti.read_labels(path).array.any()
        else:
            expected = "MR" if path.name.startswith(("stroke", "oms")) else "CT"
            assert nifti.read(path, subject="s").volumes[0].modality == expected, path.name


odd = pytest.mark.skipif(not (DATA / "nifti_odd").is_dir(), reason="the folder of odd files is absent")


@odd
def test_one_image_in_all_48_orientations_is_one_image():
    scans = {
        path.name.split(".")[0]: nifti.read(path, subject="s").volumes[0]
        for path in (DATA / "nifti_odd" / "nifti_space").glob("*.nii.gz")
    }
    assert len(scans) == 48
    for letters, volume in scans.items():
        assert volume.provenance.orientation == letters
        np.testing.assert_array_equal(volume.array, scans["RAS"].array)
        np.testing.assert_allclose(volume.affine_ras, scans["RAS"].affine_ras, atol=1e-3)


KEPT_ODD = ("27/*.nii", "avg152T1_LR_nifti.nii.gz", "f32.nii.gz")
REFUSED_ODD = {
    "minimal.nii": "bad-affine",
    "minimal.nii.gz": "bad-affine",
    "minimal_extended_hdr.nii": "not-3d",
    "zstat1.nii.gz": "not-a-scan",
    "rgb/3D.nii": "colour",
    "rgb/4D.nii": "colour",
    "rgba/4D.nii": "colour",
    "complex/*.nii": "unsupported-dtype",
    "*.hdr": "unsupported",
    "*.hdr.gz": "unsupported",
    "*.img": "corrupt",
    "*.img.gz": "corrupt",
    "fuzz_artifacts/*": "corrupt",
}


@odd
def test_every_odd_file_is_kept_or_has_its_reason():
    home = DATA / "nifti_odd" / "nifti_rs"
    answers = {path: code for pattern, code in REFUSED_ODD.items() for path in home.glob(pattern)}
    answers |= {path: "" for pattern in KEPT_ODD for path in home.glob(pattern)}
    assert set(answers) == {path for path in home.rglob("*") if path.is_file()}
    for path, code in answers.items():
        if code:
            with refused(code):
                nifti.read(path, subject="s")
            continue
        volume = nifti.read(path, subject="s").volumes[0]
        oracle = nib.as_closest_canonical(nib.load(path))
        np.testing.assert_array_equal(volume.array[0], oracle.get_fdata().astype(np.float32))
        np.testing.assert_allclose(volume.affine_ras, oracle.affine, atol=1e-4)
