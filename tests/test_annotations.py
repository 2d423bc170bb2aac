from __future__ import annotations

import json

import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Image

from voxelstem.annotations import lay_mask, read_masks
from voxelstem.errors import ConfigError, IngestError
from voxelstem.study import Provenance, Study, Volume

KEY = bytes(32)
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def write_mask(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Nifti1Image(np.asarray(array, np.uint8), affine).to_filename(path)
    return path


@pytest.fixture
def ones():
    array = np.zeros((6, 5, 4))
    array[2:4, 2:4, 1:3] = 1
    array[0, 0, 0] = 2
    return array


@pytest.fixture
def study():
    array = np.arange(120, dtype=np.float32).reshape(1, 6, 5, 4)
    provenance = Provenance(source_format="nifti", sha256="", orientation="RAS")
    volume = Volume(array=array, affine_ras=AFFINE, modality="CT", provenance=provenance)
    return Study(subject="a", volumes=(volume,))


def test_a_mask_belongs_to_the_scan_at_the_same_place_whatever_their_endings(tmp_path, ones):
    write_mask(tmp_path / "a/ct.nii.gz", ones)
    write_mask(tmp_path / "dicom/series.nii.gz", ones)
    masks = read_masks(tmp_path)
    assert masks.take("a/ct.nrrd").name == "ct.nii.gz"
    assert masks.take("dicom/series").name == "series.nii.gz"
    assert masks.take("b/ct.nii.gz") is None
    assert masks.unused() == []


def test_labels_json_names_classes_and_masks_elsewhere(tmp_path, ones):
    write_mask(tmp_path / "x1.nii", ones)
    write_mask(tmp_path / "x2.nii", ones)
    text = json.dumps({"classes": {"1": "liver", "2": "spleen"}, "masks": {"a/ct.nii.gz": "x1.nii"}})
    (tmp_path / "labels.json").write_text(text)
    masks = read_masks(tmp_path)
    assert masks.classes == {1: "liver", 2: "spleen"}
    assert masks.take("a/ct.nii.gz").name == "x1.nii"
    assert [masks.relative(path) for path in masks.unused()] == ["x2.nii"]


def test_only_some_classes_were_looked_for_where_labels_json_says_so(tmp_path, ones):
    for place in ("a/ct.nii.gz", "tumours/b.nii.gz", "tumours/c/ct.nii.gz", "tumours2/d.nii.gz"):
        write_mask(tmp_path / place, ones)
    content = {
        "classes": {"1": "liver", "2": "spleen", "3": "lesion"},
        "annotated": {"tumours/": ["lesion"], "tumours/c/ct.nrrd": ["spleen", "lesion"]},
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    masks = read_masks(tmp_path)
    assert masks.names("a/ct.nii.gz") == {1: "liver", 2: "spleen", 3: "lesion"}
    assert masks.names("tumours/b.nrrd") == {3: "lesion"}
    assert masks.names("tumours/c/ct.nii.gz") == {2: "spleen", 3: "lesion"}
    assert masks.names("tumours2/d.nii.gz") == {1: "liver", 2: "spleen", 3: "lesion"}


def test_among_the_scans_only_named_masks_count(tmp_path, ones):
    write_mask(tmp_path / "scan.nii", ones)
    write_mask(tmp_path / "mask.nii", ones)
    with pytest.raises(ConfigError, match="holds no masks apart from the scans"):
        read_masks(tmp_path, [tmp_path])
    (tmp_path / "labels.json").write_text('{"masks": {"scan.nii": "mask.nii"}}')
    assert {path.name for path in read_masks(tmp_path, [tmp_path]).files} == {"mask.nii"}
    assert {path.name for path in read_masks(tmp_path, [tmp_path / "scan.nii"]).files} == {"mask.nii"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "'classes' must give each number a name"),
        ('{"classes": {"liver": "1"}}', "'classes' must give each number a name"),
        ('{"masks": ["a"]}', "'masks' must give scan paths"),
        ('{"masks": {"Miller.nii": "gone.nii"}}', "the mask of entry 1 of 'masks' is not there"),
        ("{", "cannot be read as JSON"),
        ('{"classes": {"7": "=SUM(A1)"}}', "the name of class 7 begins like a formula"),
        ('{"classes": {"1": "liver"}, "annotated": {"a": "liver"}}', "a list of classes"),
        ('{"classes": {"1": "liver"}, "annotated": {"a": []}}', "a list of classes"),
        ('{"classes": {"1": "liver"}, "annotated": {"a": ["livr"]}}', "did you mean 'liver'"),
        ('{"classes": {"1": "liver"}, "annotated": {"a": ["liver"], "Miller": ["liver"]}}', "entry 2 of 'annotated'"),
    ],
)
def test_a_labels_file_of_another_shape_is_a_clear_error(tmp_path, ones, text, said):
    write_mask(tmp_path / "a.nii", ones)
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_masks(tmp_path)
    assert "Miller" not in str(caught.value)


def test_no_masks_are_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="no folder of masks 'gone'"):
        read_masks(tmp_path / "gone")
    with pytest.raises(ConfigError, match="holds no masks"):
        read_masks(tmp_path)


def test_a_mask_on_the_same_grid_is_laid_on_its_scan_also_when_stored_otherwise(tmp_path, ones, study):
    path = write_mask(
        tmp_path / "mask.nii", ones[::-1], AFFINE @ np.diag([-1.0, 1, 1, 1]) + 5.0 * (np.eye(4)[:, :1] @ [[0, 0, 0, 1]])
    )
    laid = lay_mask(study, path, {0: "background", 1: "liver", 2: "spleen"})
    np.testing.assert_array_equal(laid.volumes[0].labels.array, ones)
    assert laid.volumes[0].labels.classes == {1: "liver", 2: "spleen"}
    assert lay_mask(study, path, {}).volumes[0].labels.classes == {1: "1", 2: "2"}


@pytest.mark.parametrize("shift", [0.01, 1.0])
def test_a_mask_that_lies_elsewhere_is_refused(tmp_path, ones, study, shift):
    moved = AFFINE.copy()
    moved[0, 3] += shift
    with pytest.raises(IngestError, match=f"{shift:g} mm from it") as caught:
        lay_mask(study, write_mask(tmp_path / "mask.nii", ones, moved), {})
    assert caught.value.code == "label-grid"


def test_a_mask_of_another_shape_is_refused(tmp_path, ones, study):
    with pytest.raises(IngestError, match=r"\(6, 5, 3\) does not lie .* of shape \(6, 5, 4\)") as caught:
        lay_mask(study, write_mask(tmp_path / "mask.nii", ones[:, :, :3]), {})
    assert caught.value.code == "label-grid"


def test_a_value_without_a_name_is_refused(tmp_path, ones, study):
    with pytest.raises(IngestError, match="the value 2") as caught:
        lay_mask(study, write_mask(tmp_path / "mask.nii", ones), {1: "liver"})
    assert caught.value.code == "label-values"
