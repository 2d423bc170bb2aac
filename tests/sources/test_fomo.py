from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from voxelstem.errors import ConfigError, IngestError
from voxelstem.ingest import ingest
from voxelstem.sources import nifti
from voxelstem.sources.fomo import read_folder, said
from voxelstem.store import Store

TABLE = """dataset\tparticipant_id\tsession_id\tsex\tage\thandedness\tgroup
PT001_OASIS1\tsub_1\tses_1\tF\t74\tR\tDemented
PT001_OASIS1\tsub_1\tses_2\tF\tnan\tR\tDemented
PT005_IXI\tsub_1\tses_1\tM\t31.5\t\tControl
PT005_IXI\tsub_2\tses_1\t\t\t\t
"""
FILES = (
    "PT001_OASIS1/sub_1/ses_1/t1.nii.gz",
    "PT001_OASIS1/sub_1/ses_1/t1_2.nii.gz",
    "PT001_OASIS1/sub_1/ses_2/flair.nii.gz",
    "PT005_IXI/sub_1/ses_1/t2s.nii.gz",
    "PT005_IXI/sub_2/ses_1/dwi.nii.gz",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "FOMO60K"
    for number, place in enumerate(FILES):
        array = np.random.default_rng(number).gamma(2, 200, (8, 8, 8)).astype(np.int16)
        nifti.write(root / place, array, np.diag([-1.0, -1.0, 1.0, 1.0]))
    (root / "participants.tsv").write_text(TABLE)
    return root


def test_places_names_and_the_table_tell_subject_session_contrast_age_sex_and_health(folder: Path):
    found = read_folder(folder)
    first = said(FILES[0], found)
    assert first is not None
    assert first.subject == "PT001_OASIS1/sub_1"
    told = first.acquisition
    assert (told.session, told.contrast, told.age_years, told.sex) == ("1", "T1w", 74.0, "F")
    assert first.labels == {"pathology": "yes"}
    rest = [said(place, found) for place in FILES[1:]]
    assert [each.acquisition.contrast for each in rest if each] == ["T1w", "FLAIR", "T2starw", "DWI"]
    assert [each.acquisition.age_years for each in rest if each] == [74.0, None, 31.5, None]
    assert [each.labels.get("pathology") for each in rest if each] == ["yes", "yes", "no", None]


def test_subjects_of_two_data_sets_with_one_name_are_two_people(folder: Path):
    found = read_folder(folder)
    assert len({said(place, found).subject for place in FILES}) == 3


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_a_file_tells_the_same_whichever_folder_above_it_is_read(folder: Path, depth: int):
    parts = FILES[3].split("/")
    top, relative = folder.joinpath(*parts[:depth]), "/".join(parts[depth:]) or parts[-1]
    assert said(relative, read_folder(top)) == said(FILES[3], read_folder(folder))


def test_a_folder_without_data_sets_above_the_subjects_is_read_too(tmp_path: Path):
    place = tmp_path / "FOMO" / "sub_7" / "ses_1" / "t1.nii.gz"
    nifti.write(place, np.zeros((4, 4, 4), np.int16), np.eye(4))
    found = said("sub_7/ses_1/t1.nii.gz", read_folder(tmp_path / "FOMO"))
    assert found is not None
    assert found.subject == "FOMO/sub_7"


def flat(root: Path) -> Path:
    """The same files without the folders of their data sets, where ids count on."""
    for number, place in enumerate(FILES[:3]):
        array = np.random.default_rng(number).gamma(2, 200, (8, 8, 8)).astype(np.int16)
        nifti.write(root / place.partition("/")[2], array, np.diag([-1.0, -1.0, 1.0, 1.0]))
    (root / "participants.tsv").write_text(TABLE.replace("PT005_IXI\tsub_1\t", "PT005_IXI\tsub_3\t"))
    return root


@pytest.mark.parametrize("below", ["", "sub_1", "sub_1/ses_1", "sub_1/ses_1/t1.nii.gz"])
def test_a_flat_folder_finds_its_scans_in_a_table_that_names_data_sets(tmp_path: Path, below: str):
    top = flat(tmp_path / "FOMO60K") / below
    place = "sub_1/ses_1/t1.nii.gz"
    found = said(place.removeprefix(below).removeprefix("/") or place.rpartition("/")[2], read_folder(top))
    assert found is not None
    assert (found.acquisition.age_years, found.acquisition.sex) == (74.0, "F")
    assert found.labels == {"pathology": "yes"}


def test_a_table_of_data_sets_says_nothing_of_a_folder_that_it_does_not_lie_in(folder: Path):
    place = "site/sub_1/ses_1/t1.nii.gz"
    nifti.write(folder / place, np.zeros((4, 4, 4), np.int16), np.eye(4))
    (folder / "participants.tsv").write_text(TABLE.replace("PT005_IXI\tsub_1\t", "PT005_IXI\tsub_3\t"))
    found = said(place, read_folder(folder))
    assert found is not None
    assert found.acquisition.age_years is None
    assert found.labels == {}


@pytest.mark.parametrize(
    ("again", "agrees"),
    [
        ("F\t74.0\tL\tdemented", True),
        ("F\t75\tR\tDemented", False),
        ("M\t74\tR\tDemented", False),
        ("F\t74\tR\tControl", False),
    ],
)
def test_rows_of_one_scan_that_differ_refuse_it_and_equal_ones_do_not(folder: Path, again: str, agrees: bool):
    (folder / "participants.tsv").write_text(f"{TABLE}PT001_OASIS1\tsub_1\tses_1\t{again}\n")
    found = read_folder(folder)
    if agrees:
        assert said(FILES[0], found) is not None
    else:
        with pytest.raises(IngestError, match=r"2 rows of participants\.tsv") as caught:
            said(FILES[0], found)
        assert caught.value.code == "table-conflict"
        assert "sub_1" not in str(caught.value)
    assert said(FILES[2], found) is not None, "scans of other rows stay"


def test_a_scan_with_rows_that_differ_is_a_line_of_the_ledger_and_the_others_get_in(tmp_path: Path):
    # Without their folders, sub_1 of two data sets cannot be told apart.
    top = flat(tmp_path / "FOMO60K")
    (top / "participants.tsv").write_text(TABLE)
    report = ingest([top], tmp_path / "store")
    assert [refused.code for refused in report.refusals] == ["table-conflict"] * 2
    assert (report.kept, report.refused) == (1, 2)


def test_other_folders_and_other_files_mean_nothing(folder: Path, tmp_path: Path):
    (tmp_path / "bids" / "sub-01").mkdir(parents=True)
    assert read_folder(tmp_path / "bids") is None
    assert said("readme.nii.gz", read_folder(folder)) is None
    assert said(FILES[0], None) is None


def test_a_table_that_cannot_be_read_is_refused_by_its_row(folder: Path):
    (folder / "participants.tsv").write_text("dataset\tparticipant_id\nPT001_OASIS1\n")
    with pytest.raises(ConfigError, match="row 2"):
        read_folder(folder)


def test_ingesting_the_whole_and_then_a_part_puts_nobody_into_two_splits(folder: Path, tmp_path: Path):
    store = tmp_path / "store"
    assert ingest([folder], store).kept == 5
    assert ingest([folder / "PT005_IXI"], store).kept == 0
    opened = Store.open(store)
    assert len(opened) == 5
    assert len(opened.subjects()) == 3
    splits: dict[str, set[str]] = {}
    for record in opened:
        splits.setdefault(record.subject, set()).add(record.split)
    assert all(len(each) == 1 for each in splits.values())
    contrasts = sorted(record.acquisition.contrast for record in opened)
    assert contrasts == ["DWI", "FLAIR", "T1w", "T1w", "T2starw"]
    assert {record.labels.get("pathology") for record in opened} == {"yes", "no", None}
    assert "sub_1" not in "".join(repr(record) for record in opened)


def test_a_table_that_changes_is_read_again(folder: Path, tmp_path: Path):
    ingest([folder], tmp_path / "store")
    (folder / "participants.tsv").write_text(TABLE.replace("31.5", "32.5"))
    ingest([folder], tmp_path / "store")
    ages = {record.acquisition.age_years for record in Store.open(tmp_path / "store")}
    assert ages == {74.0, None, 32.5}
