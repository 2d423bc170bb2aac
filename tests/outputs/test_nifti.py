from __future__ import annotations

import gzip
import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.clinic import PLANES, SECRETS, WEIGHTS, given_back, labels, series

from voxelstem.outputs.nifti import encode
from voxelstem.outputs.result import Mask
from voxelstem.sources import nifti as reader
from voxelstem.study import LabelMap


@pytest.mark.parametrize("plane", PLANES)
def test_the_label_map_reads_back_on_the_grid_of_its_volume(tmp_path, plane):
    volume, found, done = given_back(tmp_path, "nifti", series(plane))
    ours = reader.read_labels(done.files[0])
    np.testing.assert_array_equal(ours.array, found.mask.labels.array)
    np.testing.assert_allclose(ours.affine_ras, volume.affine_ras, atol=1e-4)


def test_both_places_are_scanner_coordinates_and_say_the_same(tmp_path):
    volume, _, done = given_back(tmp_path, "nifti", series("oblique"))
    image = nib.load(done.files[0])
    for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        np.testing.assert_allclose(affine, volume.affine_ras, atol=1e-4)
        assert code == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header.get_intent()[0] == "label"


@settings(max_examples=25)
@given(hnp.arrays(np.int16, st.tuples(*[st.integers(1, 5)] * 3), elements=st.integers(0, 400)))
def test_numbers_up_to_255_take_one_byte_and_all_come_back(array):
    classes = {int(value): f"class {value}" for value in np.unique(array) if value}
    mask = Mask(labels=LabelMap(array=array, classes=classes), affine_ras=np.eye(4), weights=WEIGHTS)
    packed = encode(mask, version="1.2.3")
    image = nib.Nifti1Image.from_bytes(gzip.decompress(packed))
    np.testing.assert_array_equal(np.asarray(image.dataobj), array)
    assert image.get_data_dtype() == (np.uint8 if array.max() <= 255 else np.int16)
    assert packed == encode(mask, version="1.2.3")


def test_the_names_of_the_classes_lie_beside_it(tmp_path):
    _, _, done = given_back(tmp_path, "nifti", series())
    image, beside = done.files
    told = json.loads(beside.read_text())
    assert beside.name == image.name.replace(".nii.gz", ".json")
    assert told["mask"] == image.name
    assert told["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert told["classes"] == {"1": "liver", "3": "kidney_left", "4": "liver_lesion"}
    assert told["status"] == "preliminary, unverified"
    assert "not a medical device" in told["notice"]
    assert told["weights"]["sha256"] == WEIGHTS.sha256


def test_classes_without_voxels_are_named(tmp_path):
    datasets = series()
    found = labels((5, 6, 7), classes={2: "spleen"})
    found = LabelMap(array=found.array, classes={2: "spleen", 1: "liver"})
    _, _, done = given_back(tmp_path, "nifti", datasets, mask=found)
    assert done.left_out == ("liver",)


def test_nothing_of_the_patient_is_in_the_header_or_the_names(tmp_path):
    _, _, done = given_back(tmp_path, "nifti", series())
    header = nib.load(done.files[0]).header
    assert bytes(header["descrip"].item()).startswith(b"voxelstem 1.2.3: preliminary, unverified; not a medical")
    told = bytes(header.binaryblock).decode("latin-1") + done.files[1].read_text() + done.files[0].name
    assert not [secret for secret in SECRETS if secret in told]
