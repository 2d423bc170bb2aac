from __future__ import annotations

import logging
import warnings

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.uid import MRImageStorage
from tests.clinic import (
    PLANES,
    SECRETS,
    WEIGHTS,
    complaints,
    enhanced,
    given_back,
    labels,
    numbered_uids,
    read,
    result,
    save,
    series,
)

from voxelstem.errors import ConfigError
from voxelstem.outputs import seg
from voxelstem.outputs.result import Mask
from voxelstem.study import LabelMap

PATIENT = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
    "StudyInstanceUID",
)


def masks_of(path, affine_ras, shape_ijk):
    """Which voxels of our grid each segment covers: every pixel placed by its own frame's vectors, read by pydicom."""
    one = pydicom.dcmread(path)
    inverse = np.linalg.inv(affine_ras)
    shared = one.SharedFunctionalGroupsSequence[0]
    along_row, along_column = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float).reshape(
        2, 3
    )
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    found = {item.SegmentLabel: np.zeros(shape_ijk, bool) for item in one.SegmentSequence}
    names = {item.SegmentNumber: item.SegmentLabel for item in one.SegmentSequence}
    frames = one.pixel_array.reshape(one.NumberOfFrames, one.Rows, one.Columns)
    for groups, frame in zip(one.PerFrameFunctionalGroupsSequence, frames, strict=True):
        start = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        name = names[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        for row, column in np.argwhere(frame):
            lps = start + along_row * between_columns * column + along_column * between_rows * row
            index = inverse @ [-lps[0], -lps[1], lps[2], 1.0]
            nearest = np.rint(index[:3]).astype(int)
            assert np.abs(index[:3] - nearest).max() < 1e-3
            assert not found[name][tuple(nearest)], "no voxel is drawn twice"
            found[name][tuple(nearest)] = True
    return found


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("plane", PLANES)
def test_each_segment_covers_the_voxels_of_its_class_and_no_others(tmp_path, plane, backwards):
    volume, found, done = given_back(tmp_path, "seg", series(plane, backwards=backwards))
    masks = masks_of(done.files[0], volume.affine_ras, volume.shape_ijk)
    assert set(masks) == set(found.mask.labels.classes.values())
    for value, name in found.mask.labels.classes.items():
        np.testing.assert_array_equal(masks[name], found.mask.labels.array == value)


@pytest.mark.parametrize("plane", PLANES)
def test_highdicom_reads_the_same_voxels(tmp_path, plane):
    volume, found, done = given_back(tmp_path, "seg", series(plane))
    there = highdicom.seg.segread(done.files[0]).get_volume(combine_segments=True)
    numbers = dict(enumerate(sorted(found.mask.labels.classes), start=1))
    ours = np.zeros(volume.shape_ijk, np.int16)
    for index in np.argwhere(there.array):
        lps = there.affine @ [*index, 1.0]
        place = np.linalg.inv(volume.affine_ras) @ (lps * [-1, -1, 1, 1])
        ours[tuple(np.rint(place[:3]).astype(int))] = numbers[int(there.array[tuple(index)])]
    np.testing.assert_array_equal(ours, found.mask.labels.array)


@pytest.mark.parametrize("plane", ["axial", "sagittal", "twice oblique"])
def test_a_frame_refers_to_the_image_whose_pixels_it_covers(tmp_path, plane):
    """No affine is asked: the values under the mask are those of the volume under the label map."""
    datasets = series(plane)
    volume, found, done = given_back(tmp_path, "seg", datasets)
    images = {one.SOPInstanceUID: one for one in datasets}
    one = pydicom.dcmread(done.files[0])
    seen = {number: [] for number in done.segments.values()}
    for groups, frame in zip(one.PerFrameFunctionalGroupsSequence, one.pixel_array, strict=True):
        reference = groups.DerivationImageSequence[0].SourceImageSequence[0]
        image = images[reference.ReferencedSOPInstanceUID]
        assert image.ImagePositionPatient == groups.PlanePositionSequence[0].ImagePositionPatient
        stored = np.frombuffer(image.PixelData, np.int16).reshape(image.Rows, image.Columns)
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        seen[number] += [int(value) - 1000 for value in stored[frame.astype(bool)]]
    for value, name in found.mask.labels.classes.items():
        expected = volume.array[0][found.mask.labels.array == value]
        assert sorted(seen[done.segments[name]]) == sorted(expected.astype(int))


@pytest.mark.parametrize("plane", ["axial", "coronal", "oblique"])
def test_one_image_of_many_frames_is_drawn_on_as_well(tmp_path, plane):
    volume, found, done = given_back(tmp_path, "seg", enhanced(plane))
    masks = masks_of(done.files[0], volume.affine_ras, volume.shape_ijk)
    for value, name in found.mask.labels.classes.items():
        np.testing.assert_array_equal(masks[name], found.mask.labels.array == value)
    assert not complaints(done.files[0])


@pytest.mark.parametrize(
    ("plane", "modality"), [("axial", "CT"), ("sagittal", "CT"), ("twice oblique", "CT"), ("coronal", "MR")]
)
def test_dciodvfy_has_nothing_against_it(tmp_path, plane, modality):
    _, _, done = given_back(tmp_path, "seg", series(plane, modality=modality))
    assert complaints(done.files[0]) == []


def test_it_says_that_it_is_preliminary_and_made_by_a_machine(tmp_path):
    _, _, done = given_back(tmp_path, "seg", series())
    one = pydicom.dcmread(done.files[0])
    assert (one.Modality, one.SegmentationType, one.SegmentsOverlap) == ("SEG", "BINARY", "NO")
    assert one.ContentLabel == "PRELIMINARY"
    assert one.ContentDescription == "PRELIMINARY, UNVERIFIED: not a medical device"
    assert "not a medical device" in one.ImageComments
    assert (one.Manufacturer, one.SoftwareVersions, one.DeviceSerialNumber) == ("voxelstem", "1.2.3", "ab" * 32)
    for segment in one.SegmentSequence:
        assert (segment.SegmentAlgorithmType, segment.SegmentAlgorithmName) == ("AUTOMATIC", "voxelstem")
        used = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert used.AlgorithmVersion == "1.2.3"
        assert "ab" * 32 in used.AlgorithmParameters


def test_classes_are_coded_with_their_side_and_organ(tmp_path):
    _, _, done = given_back(tmp_path, "seg", series())
    liver, kidney, lesion = pydicom.dcmread(done.files[0]).SegmentSequence
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert liver.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Anatomical Structure"
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeMeaning, kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning) == ("Kidney", "Left")
    assert lesion.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Morphologically Abnormal Structure"
    assert lesion.AnatomicRegionSequence[0].CodeMeaning == "Liver"
    assert len({tuple(item.RecommendedDisplayCIELabValue) for item in (liver, kidney, lesion)}) == 3


def test_the_side_of_a_lesion_is_the_side_of_its_organ_and_other_names_are_private(tmp_path):
    found = labels((5, 6, 7), classes={1: "lung_nodule_right", 2: "flux capacitor"})
    _, _, done = given_back(tmp_path, "seg", series(), mask=found)
    one = pydicom.dcmread(done.files[0])
    nodule, other = one.SegmentSequence
    assert nodule.AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0].CodeMeaning == "Right"
    kind = other.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodingSchemeDesignator, kind.CodeMeaning) == ("99VOXELSTEM", "flux capacitor")
    assert one.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99VOXELSTEM"
    assert complaints(done.files[0]) == []


def test_classes_without_voxels_are_left_out_and_named(tmp_path):
    array = np.zeros((5, 6, 7), np.int16)
    array[1, 2, 3], array[4, 4, 4] = 9, 200
    classes = {3: "spleen", 9: "liver", 200: "lung_left", 201: "heart"}
    volume, _, done = given_back(tmp_path, "seg", series(), mask=LabelMap(array=array, classes=classes))
    assert done.left_out == ("spleen", "heart")
    assert dict(done.segments) == {"liver": 1, "lung_left": 2}
    masks = masks_of(done.files[0], volume.affine_ras, volume.shape_ijk)
    assert {name: np.argwhere(mask).tolist() for name, mask in masks.items()} == {
        "liver": [[1, 2, 3]],
        "lung_left": [[4, 4, 4]],
    }
    assert pydicom.dcmread(done.files[0]).NumberOfFrames == 2


def test_an_empty_label_map_makes_no_file_and_says_so(tmp_path):
    empty = LabelMap(array=np.zeros((5, 6, 7), np.int16), classes={1: "liver"})
    _, _, done = given_back(tmp_path, "seg", series(), mask=empty)
    assert (done.files, done.left_out, done.dataset) == ((), ("liver",), None)
    assert not (tmp_path / "out").exists()


def test_more_classes_than_a_byte_counts_come_back(tmp_path):
    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7) + 100
    classes = {int(value): f"class {value}" for value in array.ravel()}
    assert len(classes) == 210
    stack = seg.number(
        np.arange(300, dtype=np.int16).reshape(3, 10, 10), {value: str(value) for value in range(1, 300)}
    )
    assert stack.numbers.dtype == np.uint16
    assert stack.numbers.max() == 299
    volume, found, done = given_back(tmp_path, "seg", series(), mask=LabelMap(array=array, classes=classes))
    masks = masks_of(done.files[0], volume.affine_ras, volume.shape_ijk)
    assert all(np.array_equal(masks[name], found.mask.labels.array == value) for value, name in classes.items())


def test_patient_and_study_come_back_as_they_were(tmp_path):
    datasets = series()
    _, _, done = given_back(tmp_path, "seg", datasets)
    one = pydicom.dcmread(done.files[0])
    assert {word: one[word].value for word in PATIENT} == {word: datasets[0][word].value for word in PATIENT}
    done.dataset.PatientName = "Nobody^Else"
    assert datasets[0].PatientName == "Roe^Jane"
    assert one.FrameOfReferenceUID == datasets[0].FrameOfReferenceUID
    assert one.SeriesInstanceUID != datasets[0].SeriesInstanceUID
    references = {item.ReferencedSOPInstanceUID for item in one.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert references == {each.SOPInstanceUID for each in datasets}


@pytest.mark.parametrize(
    ("charset", "name"), [("ISO_IR 100", "Müller^Jürgen"), ("ISO_IR 192", "山田^太郎"), ("ISO_IR 144", "Люкceмбypг^A")]
)
def test_names_in_any_script_come_back(tmp_path, charset, name):
    datasets = series()
    for one in datasets:
        one.SpecificCharacterSet, one.PatientName = charset, name
    folder = save(tmp_path / "archive", datasets)
    from_disk = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    _, _, done = given_back(tmp_path, "seg", from_disk)
    one = pydicom.dcmread(done.files[0])
    assert (one.SpecificCharacterSet, str(one.PatientName)) == (charset, name)


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_odd_values_of_the_patient_come_back_as_odd_as_they_were(tmp_path, caplog):
    datasets = series()
    odd = {"PatientSex": "?", "PatientBirthDate": "unknown", "PatientName": "Roe", "StudyDate": "", "StudyTime": "noon"}
    with pydicom.config.disable_value_validation():
        for one in datasets:
            for keyword, value in odd.items():
                setattr(one, keyword, value)
            del one.AccessionNumber, one.ReferringPhysicianName
        _, _, done = given_back(tmp_path, "seg", datasets)
        one = pydicom.dcmread(done.files[0])
        assert {keyword: str(one[keyword].value) for keyword in odd} == odd
    assert (one.AccessionNumber, one.ReferringPhysicianName) == ("", "")
    assert "Roe" not in caplog.text


def test_nothing_of_the_patient_is_logged_warned_of_printed_or_in_a_name(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    datasets = series()
    for one in datasets:
        one.PatientName = "Roe Jane"  # highdicom warns of names without a caret, and quotes them
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        _, _, done = given_back(tmp_path, "seg", datasets)
    heard = "".join(str(one.message) for one in heard)
    told = caplog.text + "".join(capfd.readouterr()) + heard + "".join(path.name for path in done.files)
    assert not [secret for secret in (*SECRETS, str(tmp_path)) if secret in told]
    assert datasets[0].StudyInstanceUID not in told


def test_uids_come_from_the_generator_and_are_fresh_without_one(tmp_path):
    datasets = series()
    volume = read(tmp_path / "in", datasets)
    made = [
        seg.write(result(volume, datasets, new_uid=numbered_uids()), tmp_path / "out").dataset.SOPInstanceUID
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert made[0].startswith("2.25.")
    found = result(volume, datasets)
    fresh = [
        seg.write(type(found)(findings=found.findings, mask=found.mask, sources=found.sources), tmp_path / "out")
        for _ in range(2)
    ]
    assert fresh[0].dataset.SOPInstanceUID != fresh[1].dataset.SOPInstanceUID
    assert fresh[0].files != fresh[1].files


def test_names_that_dicom_cannot_spell_are_refused(tmp_path):
    found = labels((5, 6, 7), classes={1: "Größe"})
    with pytest.raises(ConfigError, match="cannot be written as DICOM"):
        given_back(tmp_path, "seg", series(), mask=found)


def test_a_segmentation_that_no_element_could_hold_is_refused_before_it_is_made(monkeypatch):
    plane = np.ones((2, 8, 8), np.int16)
    monkeypatch.setattr(seg, "MOST_PIXEL_BYTES", 2 * 8 * 8 / 8)
    assert seg.number(plane, {1: "liver"}).classes == ("liver",)
    monkeypatch.setattr(seg, "MOST_PIXEL_BYTES", 2 * 8 * 8 / 8 - 1)
    with pytest.raises(ConfigError, match="2 frames"):
        seg.number(plane, {1: "liver"})


def test_what_would_not_fit_into_the_memory_that_is_left_is_refused_before_it_is_made(monkeypatch):
    plane = np.ones((2, 8, 8), np.int16)
    need = 2 * seg.FRAME_BYTES + seg.COPIES * 2 * 8 * 8 / 8 + plane.size
    monkeypatch.setattr(seg, "left_bytes", lambda: need)
    assert seg.number(plane, {1: "liver"}).classes == ("liver",)
    monkeypatch.setattr(seg, "left_bytes", lambda: need - 1)
    with pytest.raises(ConfigError, match="2 frames") as caught:
        seg.number(plane, {1: "liver"})
    assert "allow more memory" in caught.value.hint


def test_a_resampled_label_map_is_refused(tmp_path):
    datasets = series()
    volume = read(tmp_path / "in", datasets)
    affine = volume.affine_ras @ np.diag([1.0, 1.0, 0.5, 1.0])
    mask = Mask(labels=labels((5, 6, 14)), affine_ras=affine, weights=WEIGHTS)
    found = result(volume, datasets)
    with pytest.raises(ConfigError, match="does not lie on the slices"):
        seg.write(type(found)(findings=found.findings, mask=mask, sources=found.sources), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_mr_is_drawn_on_as_well(tmp_path):
    datasets = series("coronal", modality="MR")
    assert datasets[0].SOPClassUID == MRImageStorage
    volume, found, done = given_back(tmp_path, "seg", datasets)
    masks = masks_of(done.files[0], volume.affine_ras, volume.shape_ijk)
    np.testing.assert_array_equal(masks["liver"], found.mask.labels.array == 1)
