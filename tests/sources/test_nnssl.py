from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxelstem.errors import ConfigError
from voxelstem.exchange import export_nifti
from voxelstem.ingest import ingest
from voxelstem.sources import nifti
from voxelstem.sources.nnssl import FILE, read_collection, said
from voxelstem.store import Store

PLACES = ("ds1/sub-1/t1.nii.gz", "ds1/sub-1/flair.nii.gz", "ds1/sub-1/later.nii.gz", "ds2/sub-1/t2.nii.gz")


def image(path: str, modality: str) -> dict[str, Any]:
    masks = {"anatomy_mask": f"{path}.anat.nii.gz", "anonymization_mask": None}
    name = path.rpartition("/")[2]
    return {"name": name, "image_path": path, "modality": modality, "image_info": {}, "associated_masks": masks}


def subject(info: dict[str, Any] | None, sessions: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    made = {name: {"session_id": name, "session_info": None, "images": images} for name, images in sessions.items()}
    return {"subject_id": "sub-1", "subject_info": info, "sessions": made}


def listed(prefix: str = "$nnssl_raw/Dataset001_Brains/") -> dict[str, Any]:
    one, two, three, four = (prefix + place for place in PLACES)
    first = {"ses-1": [image(one, "T1w"), image(two, "FLAIR")], "ses-2": [image(three, "T1w")]}
    healthy = {"age": 61, "sex": "male", "health_status": "healthy"}
    unknown = {"age": "n/a", "health_status": "unknown"}
    people = [{"sub-1": subject(healthy, first)}, {"sub-1": subject(unknown, {"ses-DEFAULT": [image(four, "MRI")]})}]
    sets = {
        str(at): {"dataset_index": at, "name": f"ds{at}", "subjects": each} for at, each in enumerate(people, start=1)
    }
    return {"collection_index": 1, "collection_name": "Brains", "datasets": sets}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("nnssl_raw", raising=False)
    root = tmp_path / "Dataset001_Brains"
    for number, place in enumerate(PLACES):
        array = np.random.default_rng(number).gamma(2, 200, (8, 8, 8)).astype(np.int16)
        nifti.write(root / place, array, np.diag([-1.0, -1.0, 1.0, 1.0]))
    nifti.write(root / f"{PLACES[0]}.anat.nii.gz", np.ones((8, 8, 8), np.int16), np.eye(4))
    write(root, listed())
    return root


def write(root: Path, content: object) -> None:
    (root / FILE).write_text(json.dumps(content))


def test_the_list_tells_subject_session_contrast_age_sex_and_health(folder: Path):
    found = read_collection(folder)
    assert found is not None
    told = [said(place, found) for place in PLACES]
    assert [each.subject for each in told if each] == ["Brains/1/sub-1"] * 3 + ["Brains/2/sub-1"]
    first, second, later, other = (each.acquisition for each in told if each)
    assert (first.contrast, first.session, first.age_years, first.sex) == ("T1w", "1", 61.0, "M")
    assert first.study == second.study != later.study
    # The word for the modality is no contrast, and nnssl's word for no session is none.
    assert (other.contrast, other.session, other.age_years) == ("", "", None)
    # What nobody knows of a person's health is no illness.
    assert [each.labels for each in told if each] == [{"pathology": "no"}] * 3 + [{}]


def test_what_a_session_leaves_open_its_person_s_entry_says(folder: Path):
    content = listed()
    content["datasets"]["1"]["subjects"]["sub-1"]["sessions"]["ses-1"]["session_info"] = {"age": None, "sex": "female"}
    write(folder, content)
    told = said(PLACES[0], read_collection(folder))
    assert told is not None
    assert (told.acquisition.age_years, told.acquisition.sex, told.labels) == (61.0, "F", {"pathology": "no"})


def test_people_of_two_lists_without_a_name_are_told_apart_by_their_folders(folder: Path):
    write(folder, {name: part for name, part in listed().items() if name != "collection_name"})
    told = said(PLACES[0], read_collection(folder))
    assert told is not None
    assert told.subject == "Dataset001_Brains/1/sub-1"


def test_a_path_that_no_file_can_have_is_refused(folder: Path):
    content = listed()
    content["datasets"]["1"]["subjects"]["sub-1"]["sessions"]["ses-1"]["images"][0]["image_path"] = "a\0b.nii.gz"
    write(folder, content)
    with pytest.raises(ConfigError, match="does not lie below"):
        read_collection(folder)


def test_images_are_ingested_and_their_masks_are_not(folder: Path, tmp_path: Path):
    done = ingest([folder], tmp_path / "store")
    assert (done.kept, done.refused, done.subjects) == (4, 0, 2)
    opened = Store.open(tmp_path / "store")
    assert sorted(record.acquisition.contrast for record in opened) == ["", "FLAIR", "T1w", "T1w"]
    assert {len({r.split for r in opened if r.subject == one}) for one in opened.subjects()} == {1}
    assert ingest([folder], tmp_path / "store").skipped == 4


def with_mask(path: str) -> dict[str, Any]:
    """The list, with an anonymisation mask of the first image."""
    content = listed()
    first = content["datasets"]["1"]["subjects"]["sub-1"]["sessions"]["ses-1"]["images"][0]
    first["associated_masks"]["anonymization_mask"] = path
    return content


def test_what_was_taken_off_an_image_becomes_a_voxel_label(folder: Path, tmp_path: Path):
    face = np.zeros((8, 8, 8), np.int16)
    face[:, 5:] = 1
    nifti.write(folder / "ds1/sub-1/t1_anon.nii.gz", face, np.diag([-1.0, -1.0, 1.0, 1.0]))
    write(folder, with_mask("$nnssl_raw/Dataset001_Brains/ds1/sub-1/t1_anon.nii.gz"))
    done = ingest([folder], tmp_path / "store")
    assert (done.kept, done.refused) == (4, 0)
    store = Store.open(tmp_path / "store")
    (record,) = (one for one in store if one.has_labels)
    assert (record.acquisition.contrast, record.classes) == ("T1w", {1: "removed"})
    # Stored voxels run along +R, +A and +S.
    assert (store.labels(record.key).array == face[::-1, ::-1]).all()


def test_what_was_drawn_on_a_scan_outlives_the_mask_of_its_face(folder: Path, tmp_path: Path):
    face = np.zeros((8, 8, 8), np.int16)
    face[:, 5:] = 1
    nifti.write(folder / "ds1/sub-1/t1_anon.nii.gz", face, np.diag([-1.0, -1.0, 1.0, 1.0]))
    write(folder, with_mask("ds1/sub-1/t1_anon.nii.gz"))
    nifti.write(tmp_path / "drawn" / PLACES[0], 1 - face, np.diag([-1.0, -1.0, 1.0, 1.0]))
    (tmp_path / "drawn/labels.json").write_text('{"classes": {"1": "tumour"}}')
    done = ingest([folder], tmp_path / "store", labels=tmp_path / "drawn")
    assert (done.kept, done.refused) == (4, 0)
    for _ in range(2):
        again = ingest([folder], tmp_path / "store")
        assert (again.kept, again.refused) == (0, 0)
        (record,) = (one for one in Store.open(tmp_path / "store") if one.has_labels)
        assert record.classes == {1: "tumour"}


def test_images_may_share_a_mask_and_none_is_one_itself(folder: Path, tmp_path: Path):
    content = with_mask(PLACES[1])
    write(folder, content)
    with pytest.raises(ConfigError, match="an image is listed as a mask too"):
        read_collection(folder)
    for image_ in content["datasets"]["1"]["subjects"]["sub-1"]["sessions"]["ses-1"]["images"]:
        image_["associated_masks"]["anonymization_mask"] = "ds1/face.nii.gz"
    write(folder, content)
    nifti.write(folder / "ds1/face.nii.gz", np.ones((8, 8, 8), np.int16), np.diag([-1.0, -1.0, 1.0, 1.0]))
    done = ingest([folder], tmp_path / "store")
    assert (done.kept, done.refused) == (4, 0)
    assert sum(record.has_labels for record in Store.open(tmp_path / "store")) == 2


def test_a_mask_that_is_not_there_is_a_line_of_the_ledger_and_its_scan_is_kept(folder: Path, tmp_path: Path):
    write(folder, with_mask("$nnssl_raw/Dataset001_Brains/ds1/nowhere.nii.gz"))
    done = ingest([folder], tmp_path / "store")
    assert (done.kept, done.refused) == (4, 1)
    assert "sub-1" not in done.refusals[0].reason
    assert ingest([folder], tmp_path / "store").skipped == 4
    assert len(list(Store.open(tmp_path / "store").refusals())) == 1
    nifti.write(folder / "ds1/nowhere.nii.gz", np.ones((8, 8, 8), np.int16), np.diag([-1.0, -1.0, 1.0, 1.0]))
    assert ingest([folder], tmp_path / "store").kept == 1
    assert not list(Store.open(tmp_path / "store").refusals())
    write(folder, with_mask("../elsewhere.nii.gz"))
    with pytest.raises(ConfigError, match="image 1 has a mask that does not lie below its folder"):
        read_collection(folder)


@pytest.mark.parametrize("prefix", ["$nnssl_raw/Dataset001_Brains/", "", "./", "$nnssl_raw/Dataset001_Brains/ds9/../"])
def test_paths_may_begin_with_the_variable_or_with_nothing(folder: Path, prefix: str):
    write(folder, listed(prefix))
    found = read_collection(folder)
    assert found is not None
    assert sorted(found.images) == sorted(PLACES)


def test_the_environment_s_folder_counts_where_it_is_set(folder: Path, monkeypatch: pytest.MonkeyPatch):
    write(folder, listed("$nnssl_raw/"))
    monkeypatch.setenv("nnssl_raw", str(folder))
    found = read_collection(folder)
    assert found is not None
    assert sorted(found.images) == sorted(PLACES)
    write(folder, listed(f"{folder}/"))
    assert read_collection(folder) == found


@pytest.mark.parametrize("prefix", ["../", "/etc/", "$nnssl_raw/", "$HOME/", "ds1/../../", "$nnssl_raw/Other/"])
def test_a_list_that_leads_out_of_its_folder_is_refused_without_naming_anybody(folder: Path, prefix: str):
    write(folder, listed(prefix))
    with pytest.raises(ConfigError, match=r"image 1 does not lie below its folder") as caught:
        read_collection(folder)
    assert "sub-1" not in str(caught.value)


def test_an_image_that_is_not_there_is_a_line_of_the_ledger(folder: Path, tmp_path: Path):
    (folder / PLACES[1]).unlink()
    done = ingest([folder], tmp_path / "store")
    assert (done.kept, done.refused) == (3, 1)
    assert done.refusals[0].code == "unreadable"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"datasets": []}, "datasets"),
        (
            lambda content: content["datasets"]["1"]["subjects"]["sub-1"]["sessions"]["ses-1"].update(images="x"),
            "images",
        ),
        (
            lambda content: content["datasets"]["1"]["subjects"]["sub-1"]["sessions"]["ses-1"].update(images=[3]),
            "image_path",
        ),
        (lambda content: content["datasets"]["1"]["subjects"].update({"sub-1": "x"}), "sessions|subject_info"),
        (lambda _: 7, "datasets"),
    ],
)
def test_a_list_of_another_shape_is_refused(folder: Path, change, message):
    content = listed()
    write(folder, change(content) or content)
    with pytest.raises(ConfigError, match=message):
        read_collection(folder)


def test_what_is_no_json_an_unknown_kind_and_a_second_mention_are_refused(folder: Path):
    (folder / FILE).write_text("{")
    with pytest.raises(ConfigError, match="JSON"):
        read_collection(folder)
    (folder / FILE).write_text(json.dumps(listed()).replace("flair.nii.gz", "flair.pkl"))
    with pytest.raises(ConfigError, match="image 2 is of no known kind"):
        read_collection(folder)
    (folder / FILE).write_text(json.dumps(listed()).replace("flair.nii.gz", "t1.nii.gz"))
    with pytest.raises(ConfigError, match="image 2 is listed for the second time"):
        read_collection(folder)


def test_what_was_written_for_nnssl_comes_back_with_contrasts_and_sessions(folder: Path, tmp_path: Path):
    ingest([folder], tmp_path / "store")
    store = Store.open(tmp_path / "store")
    export_nifti(store, tmp_path / "out")
    assert ingest([tmp_path / "out"], tmp_path / "copy").kept == 4
    copy = Store.open(tmp_path / "copy")
    assert sorted(r.acquisition.contrast or "MR" for r in copy) == ["FLAIR", "MR", "T1w", "T1w"]
    assert len(copy.subjects()) == 2


def test_the_same_scan_under_another_name_is_refused(folder: Path, tmp_path: Path):
    """Two lists may call one person by two names: the voxels tell, and nobody comes into two splits."""
    ingest([folder], tmp_path / "store")
    (folder / FILE).unlink()
    done = ingest([folder / "ds1"], tmp_path / "store")
    assert {refused.code for refused in done.refusals} >= {"duplicate"}
    assert len(Store.open(tmp_path / "store")) == 4
