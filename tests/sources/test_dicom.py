from __future__ import annotations

import os
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.config import disable_value_validation
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

from voxelstem import sources
from voxelstem.errors import IngestError
from voxelstem.sources import dicom

DATA = Path(os.environ.get("VOXELSTEM_DATA", Path(__file__).parents[3] / "shared" / "data"))
real = pytest.mark.skipif(
    not ((DATA / "ct").is_dir() and (DATA / "dicom_odd").is_dir()),
    reason="the folder of real scans is absent (VOXELSTEM_DATA)",
)
STRAIGHT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
COUNT, ROWS, COLUMNS = 6, 5, 4


def voxels():
    """Stored values (slice, row, column), each different."""
    return np.arange(COUNT * ROWS * COLUMNS, dtype=np.int16).reshape(COUNT, ROWS, COLUMNS)


def series(axes=STRAIGHT, *, step_mm=2.5, positions=None):
    """Datasets of one CT series with pixels of 0.8 x 0.6 mm (row, column) from (-10, -20, 30)."""
    normal = np.cross(*axes)
    uid = generate_uid()
    made = []
    for index in range(COUNT):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = CTImageStorage
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
        one.SeriesInstanceUID, one.PatientID, one.Modality = uid, "Doe^Jane", "CT"
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.Rows, one.Columns, one.SamplesPerPixel = ROWS, COLUMNS, 1
        one.PhotometricInterpretation = "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept = 2 + index % 2, -1000
        one.PixelSpacing = [0.8, 0.6]
        one.ImageOrientationPatient = [*axes[0], *axes[1]]
        place = np.array([-10.0, -20.0, 30.0]) + normal * (step_mm * index if positions is None else positions[index])
        one.ImagePositionPatient = [f"{number:.6f}" for number in place]
        one.PixelData = voxels()[index].tobytes()
        made.append(one)
    return made


def save(folder, datasets, names=None):
    folder.mkdir(exist_ok=True)
    for index, one in enumerate(datasets):
        name = f"{index:03d}.dcm" if names is None else names[index]
        one.save_as(folder / name, enforce_file_format=True)
    return folder


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


def expected_hu():
    """(column, row, slice) of `series`, in LPS order."""
    slopes = np.array([2 + index % 2 for index in range(COUNT)])
    return (voxels() * slopes[:, None, None] - 1000).transpose(2, 1, 0).astype(np.float32)


def test_a_straight_series_is_placed_and_rescaled_slice_by_slice(tmp_path):
    study = dicom.read(save(tmp_path / "a", series()), subject="folder")
    volume = study.volumes[0]
    np.testing.assert_array_equal(volume.array[0], expected_hu()[::-1, ::-1])
    np.testing.assert_allclose(volume.spacing_mm, (0.6, 0.8, 2.5))
    # The last column and row are the first after the turn: -(-10 + 3 * 0.6) and -(-20 + 4 * 0.8).
    np.testing.assert_allclose(volume.affine_ras[:3, 3], [8.2, 16.8, 30.0])
    assert (study.subject, volume.modality, volume.provenance.orientation) == ("Doe^Jane", "CT", "LPS")


def test_the_order_of_files_does_not_matter(tmp_path):
    one = dicom.read(save(tmp_path / "a", series()), subject="s").volumes[0]
    other = dicom.read(save(tmp_path / "b", series()[::-1]), subject="s").volumes[0]
    np.testing.assert_array_equal(one.array, other.array)
    np.testing.assert_array_equal(one.affine_ras, other.affine_ras)


def test_an_oblique_series_keeps_its_obliqueness(tmp_path):
    angle = np.deg2rad(20.0)
    axes = ((1.0, 0.0, 0.0), (0.0, float(np.cos(angle)), float(np.sin(angle))))
    volume = dicom.read(save(tmp_path / "a", series(axes)), subject="s").volumes[0]
    np.testing.assert_allclose(volume.spacing_mm, (0.6, 0.8, 2.5), rtol=1e-5)
    # Every voxel by hand, from the vectors of its own slice.
    where = np.argwhere(expected_hu() > -2000)
    columns, rows, slices = where.T
    normal = np.cross(*axes)
    lps = (
        np.array([-10.0, -20.0, 30.0])
        + columns[:, None] * 0.6 * np.array(axes[0])
        + rows[:, None] * 0.8 * np.array(axes[1])
        + slices[:, None] * 2.5 * normal
    )
    ras = lps * [-1, -1, 1]
    index = (np.linalg.inv(volume.affine_ras) @ np.c_[ras, np.ones(len(ras))].T).T[:, :3]
    np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
    i, j, k = np.rint(index).astype(int).T
    np.testing.assert_array_equal(volume.array[0][i, j, k], expected_hu()[columns, rows, slices])


def test_a_sagittal_series_is_turned(tmp_path):
    axes = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
    volume = dicom.read(save(tmp_path / "a", series(axes)), subject="s").volumes[0]
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 0.6, 0.8))
    assert volume.shape_ijk == (COUNT, COLUMNS, ROWS)


def test_a_zip_reads_like_its_folder(tmp_path):
    folder = save(tmp_path / "a", series())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for path in sorted(folder.iterdir()):
            packed.write(path, f"deep/er/{path.name}")
        packed.writestr("README.txt", "not an image")
    one, other = (dicom.read(path, subject="s") for path in (folder, tmp_path / "a.zip"))
    np.testing.assert_array_equal(one.volumes[0].array, other.volumes[0].array)
    assert one.volumes[0].provenance == other.volumes[0].provenance


def test_files_without_an_ending_and_other_files_beside_them_are_fine(tmp_path):
    folder = save(tmp_path / "a", series(), names=[f"IM{index}" for index in range(COUNT)])
    (folder / "notes.txt").write_text("nothing")
    (folder / ".hidden.dcm").write_text("nothing")
    assert dicom.read(folder, subject="s").volumes[0].shape_ijk == (COLUMNS, ROWS, COUNT)


def test_a_series_without_patient_id_gets_the_folder_s_subject(tmp_path):
    datasets = series()
    for one in datasets:
        one.PatientID = ""
        del one.SeriesInstanceUID
    assert dicom.read(save(tmp_path / "a", datasets), subject="folder").subject == "folder"


@pytest.mark.parametrize("lacking", [0, COUNT - 1])
def test_a_patient_id_that_some_slices_lack_is_still_the_subject(tmp_path, lacking):
    datasets = series()
    datasets[lacking].PatientID = ""
    datasets[1].PatientID = "\0Doe^Jane"
    assert dicom.read(save(tmp_path / "a", datasets), subject="folder").subject == "Doe^Jane"


def test_a_missing_slice_is_refused_with_its_place(tmp_path):
    datasets = series()
    del datasets[3]
    with refused("slice-gaps") as caught:
        dicom.read(save(tmp_path / "a", datasets), subject="s")
    assert "after slice 3" in caught.value.problem


def test_a_doubled_slice_is_refused(tmp_path):
    datasets = series()
    with refused("duplicate-slices"):
        dicom.read(save(tmp_path / "a", [*datasets, datasets[2]]), subject="s")


@pytest.mark.parametrize(("error_mm", "code"), [(0.004, None), (0.02, None), (0.2, "slice-gaps")])
def test_gaps_are_equal_to_one_hundredth(tmp_path, error_mm, code):
    positions = [2.5 * index + (error_mm if index == 3 else 0.0) for index in range(COUNT)]
    folder = save(tmp_path / "a", series(positions=positions))
    if code is None:
        assert dicom.read(folder, subject="s").volumes[0].spacing_mm[2] == pytest.approx(2.5, abs=1e-3)
    else:
        with refused(code):
            dicom.read(folder, subject="s")


def test_a_gantry_tilt_is_refused_with_its_angle(tmp_path):
    datasets = series()
    for index, one in enumerate(datasets):
        x, y, z = (float(number) for number in one.ImagePositionPatient)
        one.ImagePositionPatient = [x, y + 2.5 * index * np.tan(np.deg2rad(15.0)), z]
    with refused("tilt") as caught:
        dicom.read(save(tmp_path / "a", datasets), subject="s")
    assert "15.0 degrees" in caught.value.problem


def change(**values):
    def apply(datasets):
        for keyword, value in values.items():
            setattr(datasets[1], keyword, value)
        return datasets

    return apply


def drop(keyword):
    def apply(datasets):
        delattr(datasets[1], keyword)
        return datasets

    return apply


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (change(ImageOrientationPatient=[0.0, 1.0, 0.0, 0.0, 0.0, -1.0]), "mixed-orientation"),
        (change(PixelSpacing=[0.9, 0.6]), "mixed-size"),
        (change(Rows=4, PixelData=voxels()[1, :4].tobytes()), "mixed-size"),
        (change(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
        (change(ImageType=["DERIVED", "SECONDARY", "MPR"]), "derived"),
        (change(BurnedInAnnotation="YES"), "burned-in"),
        (change(SeriesInstanceUID=generate_uid()), "several-series"),
        (change(Modality="US"), "wrong-modality"),
        (change(NumberOfFrames=3), "unsupported"),
        (change(SamplesPerPixel=3), "unsupported"),
        (change(PixelData=b"\0\0"), "corrupt"),
        (drop("PixelData"), "corrupt"),
        (drop("RescaleIntercept"), "no-rescale"),
        (drop("ImagePositionPatient"), "no-geometry"),
        (drop("ImageOrientationPatient"), "no-geometry"),
        (lambda datasets: datasets[:2], "too-few-slices"),
        (lambda _: [], "empty"),
    ],
)
def test_each_fault_has_its_code(tmp_path, spoil, code):
    with refused(code):
        dicom.read(save(tmp_path / "a", spoil(series())), subject="s")


@pytest.mark.parametrize(
    "keyword",
    [
        "NumberOfFrames",
        "SamplesPerPixel",
        "Rows",
        "Columns",
        "RescaleSlope",
        "RescaleIntercept",
        "PixelSpacing",
        "ImagePositionPatient",
        "ImageOrientationPatient",
    ],
)
@pytest.mark.parametrize("value", ["JaneDoe", "nan", "1e999"])
def test_a_header_value_that_is_no_number_is_refused_by_its_keyword_only(tmp_path, keyword, value):
    with disable_value_validation():
        datasets = series()
        datasets[1][keyword] = DataElement(keyword, "LO", value)
        folder = save(tmp_path / "a", datasets)
    with refused("corrupt") as caught:
        dicom.read(folder, subject="s")
    assert f"{keyword} is not a" in caught.value.problem
    assert value not in str(caught.value).replace("is not a number", "")


def test_a_number_cut_in_half_is_refused(tmp_path):
    folder = save(tmp_path / "a", series())
    victim = folder / "001.dcm"
    rows = b"US" + b"\2\0" + bytes([ROWS, 0])  # the first short number after the header's texts
    whole = victim.read_bytes()
    at = whole.index(b"\x28\0\x10\0" + rows)
    victim.write_bytes(whole[: at + 4] + b"US" + b"\3\0" + bytes([ROWS, 0, 0]) + whole[at + 10 :])
    with refused("corrupt"):
        dicom.read(folder, subject="s")


def test_an_image_type_of_one_word_is_read_as_a_word(tmp_path):
    datasets = series()
    datasets[1].ImageType = "LOCALIZER"
    with refused("localizer"):
        dicom.read(save(tmp_path / "a", datasets), subject="s")


def test_an_mr_needs_no_rescale(tmp_path):
    datasets = series()
    for one in datasets:
        one.Modality, one.SOPClassUID = "MR", MRImageStorage
        del one.RescaleSlope, one.RescaleIntercept
    volume = dicom.read(save(tmp_path / "a", datasets), subject="s").volumes[0]
    assert volume.modality == "MR"
    assert volume.array.max() == voxels().max()


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.2, 0.5, 0.7, 0.95, 0.999])
def test_a_truncated_file_is_refused(tmp_path, keep):
    folder = save(tmp_path / "a", series())
    victim = folder / "005.dcm"  # the last slice: without it the others still look whole
    victim.write_bytes(victim.read_bytes()[: int(victim.stat().st_size * keep)])
    with refused("corrupt"):
        dicom.read(folder, subject="s")


def test_a_broken_zip_is_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 and nothing more")
    with refused("corrupt"):
        dicom.read(tmp_path / "a.zip", subject="s")
    with refused("missing"):
        dicom.read(tmp_path / "b.zip", subject="s")


def test_nothing_is_logged_or_warned_that_quotes_a_header(tmp_path, caplog, recwarn):
    folder = save(tmp_path / "a", series())
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"-20.000000", b"-20.0000DJ"))
    with pytest.raises(IngestError):
        dicom.read(folder, subject="s")
    assert not caplog.text
    assert not recwarn.list


def test_a_report_beside_the_slices_is_passed_over(tmp_path):
    datasets = series()
    note = series()[0]
    note.Modality = "SR"
    note.SeriesInstanceUID = generate_uid()
    del note.Rows, note.PixelData
    assert dicom.read(save(tmp_path / "a", [*datasets, note]), subject="s").volumes[0].shape_ijk[2] == COUNT


def test_no_message_names_the_patient_the_file_or_a_uid(tmp_path):
    datasets = series()
    datasets[1].PixelData = b"\0\0"
    names = [f"Doe_Jane_{index}.dcm" for index in range(COUNT)]
    with refused("corrupt") as caught:
        dicom.read(save(tmp_path / "a", datasets, names), subject="s")
    assert "Doe" not in str(caught.value)
    assert str(datasets[1].SOPInstanceUID) not in str(caught.value)
    assert "image 2" in caught.value.problem


@real
def test_a_real_jpeg_2000_series_lies_on_the_grid_of_its_mask():
    study = dicom.read(DATA / "ct" / "ts_dicom_j2k", subject="s")
    volume = study.volumes[0]
    mask = nib.as_closest_canonical(nib.load(DATA / "ct" / "ts_dicom_j2k_labels.nii.gz"))
    np.testing.assert_allclose(volume.affine_ras, mask.affine, atol=1e-3)
    labels = np.asarray(mask.dataobj)
    assert volume.shape_ijk == labels.shape
    assert 60 < volume.array[0][labels == 5].mean() < 120  # the liver, with contrast medium
    assert (np.argwhere(labels == 5)[:, 0].mean() / labels.shape[0]) > 0.5  # on the patient's right


@real
def test_a_real_ge_series_agrees_with_its_resampled_copy():
    volume = dicom.read(DATA / "ct" / "crlm_1004_ge_dicom", subject="s").volumes[0]
    assert volume.shape_ijk == (512, 512, 41)
    np.testing.assert_allclose(volume.spacing_mm, (0.796875, 0.796875, 5.0))
    copy = nib.as_closest_canonical(nib.load(DATA / "starter" / "crlm_1004.nii.gz"))
    coarse = np.asarray(copy.dataobj)
    centre = np.array([[60, 80, 20, 1], [100, 90, 30, 1], [85, 70, 10, 1]])
    at = np.rint(np.linalg.inv(volume.affine_ras) @ copy.affine @ centre.T)[:3].astype(int)
    for (i, j, k), (a, b, c, _) in zip(at.T, centre, strict=True):
        fine = volume.array[0][i - 2 : i + 3, j - 2 : j + 3, k]
        assert fine.mean() == pytest.approx(coarse[a - 1 : a + 2, b - 1 : b + 2, c].mean(), abs=40)


@real
@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("gantry_tilt_ge", "tilt"),
        ("missing_duplicate", "duplicate-slices"),
        ("transfer_syntaxes", "several-series"),
        ("dicom2nifti_failing/gantrytilting/001", "tilt"),
        ("dicom2nifti_failing/sliceincrement/001", "slice-gaps"),
        ("dicom2nifti_failing/sliceorientation/001", "mixed-orientation"),
        ("dicom2nifti_failing/slicecount/001", "too-few-slices"),
    ],
)
def test_real_faulty_series_are_refused(folder, code):
    with refused(code):
        dicom.read(DATA / "dicom_odd" / folder, subject="s")


@real
@pytest.mark.parametrize(
    "how", ["compressed", "compressed_j2k", "compressed_jpeg", "compressed_jpegls", "compressed_rle"]
)
def test_every_lossless_compression_gives_the_true_voxels(how):
    root = DATA / "dicom_odd" / "compressed" / how
    volume = dicom.read(root / "001", subject="s").volumes[0]
    truth = nib.as_closest_canonical(nib.load(root / "001_ground_truth.nii.gz"))
    np.testing.assert_array_equal(volume.array[0], truth.get_fdata())
    np.testing.assert_allclose(volume.affine_ras, truth.affine, atol=1e-4)


KEPT = {
    "anatomical/001_implicit": (),
    "anatomical/002_non_isotropic": (),
    "compressed/001": (),
    "compressed_j2k/001": (),
    "compressed_jpeg/001": (),
    "compressed_jpegls/001": (),
    "compressed_rle/001": (),
    "anatomical/001": (),
    "ct-3slice": ("167316 voxels of padding set to -1024 HU",),
    "enhanced_multiframe": (),
    "ct/crlm_1004_ge_dicom": ("2286652 voxels of padding set to -1024 HU",),
    "ct/ts_dicom_j2k": (),
}
REFUSED = {  # slicecount/001 is left out: a copy of half of anatomical/001
    "compressed/rgb/001",
    "gantrytilting/001",
    "notavolume/001",
    "sliceincrement/001",
    "sliceincrement/002",
    "sliceorientation/001",
    "gantry_tilt_ge",
    "missing_duplicate",
    "transfer_syntaxes",
}


@real
def test_every_real_folder_is_kept_with_its_notes_or_refused_with_a_code():
    kept, lost = {}, {}
    for source in [*sources.iterate(DATA / "dicom_odd"), *sources.iterate(DATA / "ct")]:
        if source.kind != "dicom":
            continue
        name = source.path.relative_to(DATA).as_posix()
        try:
            kept[name] = source.read().volumes[0].provenance.notes
        except IngestError as problem:
            lost.setdefault(name, set()).add(problem.code)
    assert all(any(name.endswith(end) and notes == kept[name] for end, notes in KEPT.items()) for name in kept)
    assert len(kept) == len(KEPT)
    assert all(any(name.endswith(end) for end in REFUSED) for name in lost)
    assert len(lost) == len(REFUSED)


@real
@pytest.mark.parametrize(("folder", "code"), [("gantry_tilt_ge", None), ("missing_duplicate", "slice-gaps")])
def test_repair_straightens_what_can_be_and_says_so(folder, code):
    if code:
        with refused(code):
            dicom.read(DATA / "dicom_odd" / folder, subject="s", repair=True)
        return
    volume = dicom.read(DATA / "dicom_odd" / folder, subject="s", repair=True).volumes[0]
    assert any("repaired a gantry tilt" in note for note in volume.provenance.notes)
    assert -1024 <= volume.array.min() < -900


def all_slices(**values):
    def apply(datasets):
        for one in datasets:
            for keyword, value in values.items():
                setattr(one, keyword, value)
        return datasets

    return apply


def wrapped(datasets):
    """Bone of 1500 to 2000 HU, stored in 12 bits and declared signed by mistake."""
    values = np.linspace(2524, 3024, ROWS * COLUMNS).astype(np.int16)
    values[:5] = 24
    return all_slices(BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=-1024, PixelData=values.tobytes())(
        datasets
    )


def test_a_sign_that_is_provably_wrong_is_put_right_and_noted(tmp_path):
    volume = dicom.read(save(tmp_path / "a", wrapped(series())), subject="s").volumes[0]
    assert (volume.array.min(), volume.array.max()) == (-1000.0, 2000.0)
    assert "read as unsigned numbers against the header" in volume.provenance.notes[0]


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (change(PatientID="Doe^John"), "several-patients"),
        (change(PixelRepresentation=0), "mixed-pixels"),
        (change(BitsStored=12, HighBit=11), "mixed-pixels"),
        (all_slices(BitsStored=6, HighBit=5), "stray-bits"),
        (all_slices(RescaleSlope=30_000, RescaleIntercept=0), "wrapped"),
        (all_slices(RescaleType="MGML"), "not-hu"),
        (all_slices(PixelData=bytes(2 * ROWS * COLUMNS)), "constant"),
    ],
)
def test_each_fault_of_values_has_its_code(tmp_path, spoil, code):
    datasets = spoil(series())
    if code == "constant":
        for one in datasets:
            one.RescaleSlope = 1
    with refused(code):
        dicom.read(save(tmp_path / "a", datasets), subject="s")


def test_padding_of_an_mr_takes_the_lowest_value_beside_it(tmp_path):
    datasets = all_slices(
        Modality="MR", SOPClassUID=MRImageStorage, RescaleSlope=1, RescaleIntercept=5, PixelPaddingValue=0
    )(series())
    volume = dicom.read(save(tmp_path / "a", datasets), subject="s").volumes[0]
    assert volume.array.min() == 6.0
    assert volume.provenance.notes == ("1 voxels of padding set to the lowest value beside them",)


def test_chosen_files_and_a_chosen_series_are_read_alone(tmp_path):
    one, other = series(), series()
    folder = save(tmp_path / "a", [*one, *other])
    files = [folder / f"{index:03d}.dcm" for index in range(COUNT)]
    chosen = dicom.read(folder, subject="s", files=files).volumes[0]
    named = dicom.read(folder, subject="s", series=str(other[0].SeriesInstanceUID)).volumes[0]
    assert chosen.acquisition.series == str(one[0].SeriesInstanceUID)
    assert named.acquisition.series == str(other[0].SeriesInstanceUID)
    np.testing.assert_array_equal(chosen.array, named.array)


NASTY = ["../../x", "<script>alert(1)</script>", "=cmd()", "A" * 65_000, "nul\0inside", "\N{SNOWMAN}"]


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize("spoil", [False, True])
def test_nasty_texts_neither_crash_nor_leak(tmp_path, value, spoil):
    with disable_value_validation():
        datasets = series()
        for one in datasets:
            one.SpecificCharacterSet = "ISO_IR 192"
            for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "Manufacturer", "SeriesDescription"):
                one[keyword] = DataElement(keyword, "UT", value)
        if spoil:
            datasets[1].PixelData = b"\0\0"
        folder = save(tmp_path / "a", datasets)
    if not spoil:
        assert dicom.read(folder, subject="s").volumes[0].shape_ijk == (COLUMNS, ROWS, COUNT)
        return
    with refused("corrupt") as caught:
        dicom.read(folder, subject="s")
    assert value[:20] not in str(caught.value)


def metal(hu):
    """Slices of a body in air, with a block of `hu`, stored as HU + 1024 and declared to take 12 bits."""
    _, j, i = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in (8, 48, 48)), indexing="ij", sparse=True)
    values = np.where(np.broadcast_to((i / 0.7) ** 2 + (j / 0.85) ** 2 < 1, (8, 48, 48)), 1064, 24)
    values = values + np.random.default_rng(0).integers(-20, 20, values.shape)
    for step in range(8):  # its edges are blurred, as every scanner's are
        values[1:-1, 20 + step // 2 : 30 - step // 2, 20 + step // 2 : 30 - step // 2] += (hu - 40) // 8
    return values


def declared_too_narrow(values):
    datasets = (series() + series())[: len(values)]
    for index, one in enumerate(datasets):
        one.SeriesInstanceUID, one.ImagePositionPatient = datasets[0].SeriesInstanceUID, [-10, -20, 2.5 * index]
        one.Rows, one.Columns = values.shape[1:]
        one.BitsStored, one.HighBit, one.PixelRepresentation = 12, 11, 0
        one.RescaleSlope, one.RescaleIntercept, one.PixelData = 1, -1024, values[index].astype(np.uint16).tobytes()
    return datasets


def test_a_ct_with_more_bits_than_declared_is_kept_where_they_give_hounsfield_units(tmp_path):
    values = metal(6000)
    assert np.count_nonzero(values > 4095) > 100
    volume = dicom.read(save(tmp_path / "a", declared_too_narrow(values)), subject="s").volumes[0]
    np.testing.assert_array_equal(volume.array[0], values.transpose(2, 1, 0)[::-1, ::-1] - 1024)
    assert "more bits than the header declares" in volume.provenance.notes[0]


def few(values):
    values[3, 5, 5:9] += 4096
    return values


def text(values):
    values[:, 2::3, 2:46:3] += 8192  # a drawing in unused bits that the header says nothing of
    return values


@pytest.mark.parametrize("spoil", [few, text, lambda values: values + 4096])
def test_a_ct_with_more_bits_than_declared_is_refused_where_they_prove_nothing(tmp_path, spoil):
    with refused("stray-bits"):
        dicom.read(save(tmp_path / "a", declared_too_narrow(spoil(metal(2000)))), subject="s")
