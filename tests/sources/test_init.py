from __future__ import annotations

import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem import sources
from voxelstem.errors import IngestError
from voxelstem.sources import iterate, nifti
from voxelstem.store.catalogue import FILE_NAME
from voxelstem.store.reader import Store


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


def scan(path):
    array = np.random.default_rng(0).integers(-200, 300, (5, 5, 5)).astype(np.int16)
    array[0] = -1000
    nifti.write(path, array, np.eye(4))
    return path


@pytest.fixture
def folder(tmp_path):
    """A mixed folder: BIDS, a folder for each subject, loose files, DICOM, and what is no scan."""
    scan(tmp_path / "sub-02" / "ses-1" / "anat" / "sub-02_ses-1_T1w.nii.gz")
    scan(tmp_path / "case7" / "late" / "ct.nii.gz")
    scan(tmp_path / "loose.nii.gz")
    (tmp_path / "case7" / "series").mkdir()
    for index in range(2):
        (tmp_path / "case7" / "series" / f"IM{index}").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "case7" / "old").mkdir()
    (tmp_path / "case7" / "old" / "a.DCM").write_bytes(b"")
    (tmp_path / "case8").mkdir()
    (tmp_path / "case8" / "x.mha").write_bytes(b"")
    (tmp_path / "case8" / "Y.NRRD").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no scan")
    shutil.copy(tmp_path / "loose.nii.gz", tmp_path / "._loose.nii.gz")
    scan(tmp_path / ".cache" / "ct.nii.gz")
    return tmp_path


def test_every_scan_is_found_once_with_its_kind_and_subject(folder):
    found = {source.relative: (source.kind, source.subject) for source in sources.iterate(folder)}
    assert found == {
        "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz": ("nifti", "sub-02"),
        "case7/late/ct.nii.gz": ("nifti", "case7"),
        "case7/series": ("dicom", "case7"),
        "case7/old": ("dicom", "case7"),
        "case8/x.mha": ("mha", "case8"),
        "case8/Y.NRRD": ("nrrd", "case8"),
        "loose.nii.gz": ("nifti", "loose"),
    }


def test_the_order_is_the_same_every_time(folder):
    first = [source.relative for source in sources.iterate(folder)]
    assert first == [source.relative for source in sources.iterate(folder)]
    assert first[0] == "loose.nii.gz"
    assert [name for name in first if name.startswith("case7")] == ["case7/late/ct.nii.gz", "case7/old", "case7/series"]


def test_a_source_reads_itself_under_its_subject(folder):
    source = next(source for source in sources.iterate(folder) if source.subject == "sub-02")
    assert source.read().subject == "sub-02"


@given(subject=st.from_regex(r"[A-Za-z0-9]{1,8}", fullmatch=True), lead=st.sampled_from(["", "site/", "a/b/"]))
def test_the_bids_entity_wins_over_the_folder(subject, lead):
    assert sources.raw_subject(f"{lead}sub-{subject}/anat/sub-{subject}_T1w.nii.gz") == f"sub-{subject}"
    assert sources.raw_subject(f"{lead}sub-{subject}_ct.nii.gz") == f"sub-{subject}"


def test_a_word_that_only_ends_in_sub_is_no_bids_entity():
    assert sources.raw_subject("notsub-1/ct.nii.gz") == "notsub-1"


@pytest.mark.parametrize(
    ("name", "stem"), [("a.b.nii.gz", "a.b"), ("a.NII", "a"), ("scan.v1.mha", "scan.v1"), ("IM001", "IM001")]
)
def test_a_loose_file_s_subject_is_its_name_without_the_known_ending(name, stem):
    assert sources.raw_subject(name) == stem


def test_one_file_is_one_source(folder):
    (source,) = sources.iterate(folder / "loose.nii.gz")
    assert (source.relative, source.subject) == ("loose.nii.gz", "loose")
    assert sources.read(folder / "loose.nii.gz").volumes[0].modality == "CT"
    assert sources.read(str(folder / "case7" / "late")).volumes[0].shape_ijk == (5, 5, 5)


def test_a_folder_with_several_scans_is_refused_with_their_names(folder):
    with refused("several-studies") as caught:
        sources.read(folder)
    assert "7 scans" in caught.value.problem
    assert "case7/series" in caught.value.problem
    assert str(folder) not in str(caught.value)


def test_each_wrong_path_has_its_code(folder):
    with refused("missing"):
        list(sources.iterate(folder / "nothing"))
    with refused("unknown-format"):
        list(sources.iterate(folder / "notes.txt"))
    (folder / "bare").mkdir()
    with refused("empty"):
        list(sources.iterate(folder / "bare"))
    with refused("missing"):
        sources.read(folder / "nothing.nii")


def test_masks_are_read_by_their_ending(folder):
    mask = np.zeros((5, 5, 5), np.uint8)
    mask[2, 2, 2] = 3
    nifti.write(folder / "mask.nii.gz", mask, np.eye(4))
    assert sources.read_labels(folder / "mask.nii.gz").array[2, 2, 2] == 3
    with refused("unknown-format"):
        sources.read_labels(folder / "notes.txt")
    with refused("missing"):
        sources.read_labels(folder / "none.txt")


def test_every_kind_has_a_reader():
    assert set(sources.KINDS.values()) == set(sources.SOURCES)
    assert all(callable(sources.SOURCES[kind]) for kind in sources.SOURCES)


def test_of_a_bids_data_set_only_scans_are_found(tmp_path):
    for name in ("sub-1/anat/sub-1_T1w", "sub-1/anat/sub-1_mask", "derivatives/x/sub-1/anat/sub-1_T1w"):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert [source.relative for source in iterate(tmp_path)] == ["sub-1/anat/sub-1_T1w.nii.gz"]


def test_of_a_bids_data_set_the_dicom_of_other_folders_is_no_scan(tmp_path):
    for name in ("sub-1/dicom/1.dcm", "sourcedata/sub-1/1.dcm", "derivatives/x/1.dcm", "sub-1/sourcedata/1.dcm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [source.relative for source in iterate(tmp_path)] == ["sub-1/dicom", "sub-1/sourcedata"]


def test_a_store_among_the_scans_is_passed_over(tmp_path):
    scan(tmp_path / "a.nii.gz")
    Store.create(tmp_path / "store")
    scan(tmp_path / "store" / "volumes" / "x.nii.gz")
    assert sources.STORE_FILE == FILE_NAME
    assert [source.relative for source in iterate(tmp_path)] == ["a.nii.gz"]


def test_the_mask_beside_a_preprocessed_scan_is_no_scan(tmp_path):
    for name in ("x.b2nd", "x_seg.b2nd", "alone_seg.b2nd"):
        (tmp_path / name).write_bytes(b"")
    assert [source.relative for source in iterate(tmp_path)] == ["alone_seg.b2nd", "x.b2nd"]


def test_links_to_folders_are_followed_once_and_after_all_else(tmp_path):
    scan(tmp_path / "elsewhere" / "deep" / "one.nii.gz")
    scan(tmp_path / "src" / "z" / "two.nii.gz")
    links = {
        "a": "../elsewhere",
        "b": "../elsewhere",
        "c": "z",
        "z/loop": "..",
        "up": "../..",
        "../elsewhere/deep/l": "..",
    }
    for name, target in links.items():
        (tmp_path / "src" / name).symlink_to(target, target_is_directory=True)
    found = [source.relative for source in islice(iterate(tmp_path / "src"), 9)]
    assert found == ["z/two.nii.gz", "a/deep/one.nii.gz"]


def test_no_folder_is_lost_where_a_file_system_does_not_number_them(tmp_path, monkeypatch):
    scan(tmp_path / "a" / "b" / "one.nii.gz")
    real_stat = Path.stat

    def unnumbered(path, **options):
        found = real_stat(path, **options)
        return os.stat_result((found.st_mode, 0, 0, *found[3:]))

    monkeypatch.setattr(Path, "stat", unnumbered)
    assert [source.relative for source in iterate(tmp_path)] == ["a/b/one.nii.gz"]


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path, monkeypatch):
    scan(tmp_path / "a" / "one.nii.gz")
    scan(tmp_path / "b" / "c" / "two.nii.gz")
    real_scandir = os.scandir

    def guarded(path):  # rights alone do not stop the administrator, who may run the tests
        if str(path) == str(tmp_path / "b" / "c"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    first, second = iterate(tmp_path)
    assert (first.relative, second.relative, second.subject) == ("a/one.nii.gz", "b/c", "b")
    with refused("unreadable") as caught:
        second.read()
    assert "b" not in caught.value.problem.split()
