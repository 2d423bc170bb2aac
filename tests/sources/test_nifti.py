from __future__ import annotations

import gzip
import os
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
    image = kind(array, affine)
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
        path = save(tmp_path / "a.nii", ct(), change=lambda image, unit=unit: image.header.set_xyzt_units(unit))
        volume = nifti.read(path, subject="s").volumes[0]
        np.testing.assert_allclose(volume.spacing_mm, np.array([2.0, 1.5, 3.0]) * factor)
        assert any("millimetres" in note for note in volume.provenance.notes)


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
    rgb = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for array in (rgb, np.zeros((4, 4, 4), np.complex64)):
        with refused("unsupported-dtype"):
            nifti.read(save(tmp_path / "a.nii", array), subject="s")


def patch(path, offset, values, dtype):
    """Change a field of a little-endian header where it lies: nibabel would mend it."""
    data = bytearray(path.read_bytes())
    new = np.array(values, dtype).tobytes()
    data[offset : offset + len(new)] = new
    path.write_bytes(bytes(data))
    return path


CODES, SROW_X, SROW_Z = 252, 280, 312  # qform_code and sform_code; rows of the sform


@pytest.mark.parametrize(
    ("codes", "offset", "row"),
    [
        ([0, 0], SROW_X, [0, -2, 0, 50]),
        ([0, 1], SROW_Z, [0, 0, 0, 0]),
        ([0, 1], SROW_X, [np.nan, -2, 0, 50]),
        ([0, 1], SROW_X, [2, -2, 0, 50]),
    ],
    ids=["no placement", "no extent", "not a number", "sheared"],
)
def test_a_file_that_does_not_say_where_it_lies_is_refused(tmp_path, codes, offset, row):
    path = patch(patch(save(tmp_path / "a.nii", ct()), CODES, codes, "<i2"), offset, row, "<f4")
    with refused("bad-affine"):
        nifti.read(path, subject="s")


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


@real
@pytest.mark.skipif(not (DATA / "nifti_odd").is_dir(), reason="the folder of odd files is absent")
def test_one_image_in_all_48_orientations_is_one_image():
    scans = {
        path.name.split(".")[0]: nifti.read(path, subject="s").volumes[0]
        for path in (DATA / "nifti_odd" / "nifti_space").glob("*.nii.gz")
    }
    assert len(scans) == 48
    for volume in scans.values():
        np.testing.assert_array_equal(volume.array, scans["RAS"].array)
        np.testing.assert_allclose(volume.affine_ras, scans["RAS"].affine_ras, atol=1e-3)


@real
@pytest.mark.skipif(not (DATA / "nifti_odd").is_dir(), reason="the folder of odd files is absent")
def test_files_that_crashed_other_readers_are_refused_or_read():
    for path in sorted((DATA / "nifti_odd" / "nifti_rs" / "fuzz_artifacts").iterdir()):
        with pytest.raises(IngestError):
            nifti.read(path, subject="s")
