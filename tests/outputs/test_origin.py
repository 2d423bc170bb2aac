from __future__ import annotations

import logging
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid
from tests.clinic import PLANES, SECRETS, SHAPE, WEIGHTS, enhanced, labels, read, series

from voxelstem.errors import ConfigError, IngestError
from voxelstem.outputs.origin import SHOWN, check_series, need_highdicom, quiet, to_slices
from voxelstem.outputs.result import Mask
from voxelstem.study import LabelMap


def placed(found, affine):
    return Mask(labels=found, affine_ras=affine, weights=WEIGHTS)


def by_hand(datasets, mask):
    """What each image must show, one voxel after another: its place in the patient, looked up in the label map."""
    inverse = np.linalg.inv(mask.affine_ras)
    frames = []
    for one in datasets:
        rows, columns = one.Rows, one.Columns
        along_row, along_column = np.array(one.ImageOrientationPatient, float).reshape(2, 3)
        between_rows, between_columns = map(float, one.PixelSpacing)
        frame = np.zeros((rows, columns), np.int16)
        for row, column in np.ndindex(rows, columns):
            lps = np.array(one.ImagePositionPatient, float)
            lps = lps + along_row * between_columns * column + along_column * between_rows * row
            index = inverse @ [-lps[0], -lps[1], lps[2], 1.0]
            nearest = np.rint(index[:3]).astype(int)
            assert np.abs(index[:3] - nearest).max() < 1e-3
            frame[row, column] = mask.labels.array[tuple(nearest)]
        frames.append(frame)
    return np.array(frames)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("plane", PLANES)
def test_each_image_gets_what_lies_at_its_places(tmp_path, plane, backwards):
    datasets = series(plane, backwards=backwards)
    volume = read(tmp_path, datasets)
    mask = placed(labels(volume.array.shape[1:]), volume.affine_ras)
    np.testing.assert_array_equal(to_slices(mask, check_series(datasets)), by_hand(datasets, mask))


def turned(quaternion):
    """A rotation by a quaternion of any length; its first two columns are the directions of rows and columns."""
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


quaternions = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1)


@settings(max_examples=15)
@given(quaternions, st.booleans(), st.integers(0, 99))
def test_any_orientation_in_any_order_finds_back(quaternion, backwards, seed):
    axes = turned(quaternion).T[:2]
    datasets = series(tuple(map(tuple, axes)), backwards=backwards, seed=seed)
    origin = check_series(datasets)
    shape, affine = origin.turned()
    mask = placed(labels(shape, seed), affine)
    np.testing.assert_array_equal(to_slices(mask, origin), by_hand(datasets, mask))


@pytest.mark.parametrize("plane", ["axial", "sagittal", "oblique"])
def test_the_frames_of_one_image_get_the_same_as_single_images(tmp_path, plane):
    single, (multi,) = series(plane), enhanced(plane)
    volume = read(tmp_path, [multi])
    mask = placed(labels(volume.array.shape[1:]), volume.affine_ras)
    np.testing.assert_array_equal(to_slices(mask, check_series([multi])), by_hand(single, mask))


def test_where_the_volume_lies_is_what_the_reader_says(tmp_path):
    datasets = series("twice oblique")
    volume = read(tmp_path, datasets)
    shape, affine = check_series(datasets).turned()
    assert shape == volume.shape_ijk
    np.testing.assert_array_equal(affine, volume.affine_ras)


@pytest.mark.parametrize(("off_mm", "fits"), [(0.009, True), (0.011, False)])
def test_a_grid_may_be_off_by_a_hundredth_of_a_millimetre(off_mm, fits):
    origin = check_series(series())
    shape, affine = origin.turned()
    moved = affine.copy()
    moved[1, 3] += off_mm
    if fits:
        assert to_slices(placed(labels(shape), moved), origin).shape == (SHAPE[2], SHAPE[1], SHAPE[0])
        return
    with pytest.raises(ConfigError, match=r"a corner lies 0\.011 mm away") as caught:
        to_slices(placed(labels(shape), moved), origin)
    assert "resampled" in caught.value.hint


@pytest.mark.parametrize("change", ["spacing", "flip", "turn"])
def test_another_grid_of_the_same_size_is_refused(change):
    origin = check_series(series())
    shape, affine = origin.turned()
    other = affine.copy()
    if change == "spacing":
        other[2, 2] *= 1.01
    elif change == "flip":
        other[:3, 3] += other[:3, 0] * (shape[0] - 1)
        other[:3, 0] *= -1
    else:
        other[:3, :3] = turned((1.0, 0.01, 0.0, 0.0)) @ other[:3, :3]
    with pytest.raises(ConfigError, match="does not lie on the slices"):
        to_slices(placed(labels(shape), other), origin)


def test_another_size_is_refused_before_anything_is_made():
    origin = check_series(series())
    large = LabelMap(array=np.zeros((200, 200, 100), np.int16), classes={1: "liver"})
    mask = placed(large, origin.turned()[1])
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"it has \(200, 200, 100\) voxels and the series \(5, 6, 7\)"):
        to_slices(mask, origin)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < large.array.nbytes / 20


def change(keyword, value, at=2):
    def apply(datasets):
        setattr(datasets[at], keyword, value)
        return datasets

    return apply


def without(keyword, at=2):
    def apply(datasets):
        delattr(datasets[at], keyword)
        return datasets

    return apply


def everywhere(keyword, value):
    def apply(datasets):
        for one in datasets:
            setattr(one, keyword, value)
        return datasets

    return apply


@pytest.mark.parametrize(
    ("apply", "code"),
    [
        (lambda _: [], "empty"),
        (lambda datasets: datasets * 3000, "too-large"),
        (lambda datasets: [*datasets, datasets[0]], "duplicate-slices"),
        (lambda datasets: datasets[:2], "too-few-slices"),
        (change("SeriesInstanceUID", generate_uid()), "several-series"),
        (change("StudyInstanceUID", generate_uid()), "several-series"),
        (change("FrameOfReferenceUID", generate_uid()), "several-series"),
        (change("PatientID", "MRN-4712"), "several-patients"),
        (without("FrameOfReferenceUID"), "corrupt"),
        (without("SOPInstanceUID"), "corrupt"),
        (without("Rows"), "corrupt"),
        (without("ImagePositionPatient"), "no-geometry"),
        (change("NumberOfFrames", 3), "unsupported"),
        (everywhere("SOPClassUID", SecondaryCaptureImageStorage), "unsupported"),
        (change("Rows", 5), "mixed-size"),
    ],
)
def test_what_is_not_one_series_is_refused_and_nobody_is_named(apply, code):
    with pytest.raises(IngestError) as caught:
        check_series(apply(series()))
    assert caught.value.code == code
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


def test_stacks_of_one_image_are_several_volumes():
    (multi,) = enhanced()
    for number, groups in enumerate(multi.PerFrameFunctionalGroupsSequence):
        content = type(multi)()
        content.StackID = str(number % 2)
        groups.FrameContentSequence = [content]
    with pytest.raises(IngestError) as caught:
        check_series([multi])
    assert caught.value.code == "several-volumes"


def test_a_tilted_series_has_no_grid_to_go_back_to():
    datasets = series()
    for one in datasets:
        x, y, z = map(float, one.ImagePositionPatient)
        one.ImagePositionPatient = [x, y + (z - 30) * 0.2, z]
    with pytest.raises(ConfigError, match="tilted or unevenly spaced"):
        check_series(datasets)


def test_highdicom_sees_nothing_of_the_patient_and_the_sources_stay_as_they_are():
    datasets = series()
    before = [one.to_json() for one in datasets]
    for image in check_series(datasets).images:
        told = image.to_json()
        assert not [secret for secret in SECRETS if secret in told]
        assert "PixelData" not in image
    assert [one.to_json() for one in datasets] == before
    assert not {"PatientID", "PatientName", "InstitutionName", "StudyDate"} & set(SHOWN)


def test_without_highdicom_the_message_says_how_to_get_it(monkeypatch):
    need_highdicom()
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ConfigError, match="need the package highdicom") as caught:
        need_highdicom()
    assert caught.value.hint == "pip install 'voxelstem[clinic]'"


def shout(logger):
    with quiet():
        logger.error("Roe^Jane")
        warnings.warn("Roe^Jane", stacklevel=1)
        raise RuntimeError("stop")


def test_libraries_are_silent_inside_and_as_loud_as_before_afterwards(caplog):
    caplog.set_level(logging.DEBUG)
    logger = logging.getLogger("highdicom.base")
    parent = logging.getLogger("highdicom")
    parent.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="stop"):
            shout(logger)
        logger.info("after")
    assert not heard
    assert caplog.messages == ["after"]
    assert parent.level == logging.INFO
    parent.setLevel(logging.NOTSET)
