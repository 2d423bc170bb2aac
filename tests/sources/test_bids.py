from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from voxelstem import sources
from voxelstem.errors import ConfigError, IngestError
from voxelstem.sources import bids, nifti

T1 = "sub-01/ses-02/anat/sub-01_ses-02_ce-gadolinium_T1w.nii.gz"


def scan():
    return np.random.default_rng(0).integers(0, 900, (6, 7, 8)).astype(np.int16)


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row.split()) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path):
    """Two people; the first came twice."""
    (tmp_path / "dataset_description.json").write_text('{"Name": "made up", "BIDSVersion": "1.10.0"}')
    table(tmp_path / "participants.tsv", "participant_id age sex", "sub-01 34 F", "02 n/a male")
    table(tmp_path / "sub-01" / "sub-01_sessions.tsv", "session_id age acq_time", "ses-01 34.5 2009-06-15T13:45:30")
    table(
        tmp_path / "sub-01" / "ses-02" / "sub-01_ses-02_scans.tsv",
        "filename acq_time",
        "anat/sub-01_ses-02_ce-gadolinium_T1w.nii.gz 2011-01-02T10:00:00",
    )
    for relative in (T1, "sub-01/ses-01/anat/sub-01_ses-01_FLAIR.nii.gz", "sub-02/anat/sub-02_part-phase_bold.nii.gz"):
        nifti.write(tmp_path / relative, scan(), np.eye(4))
    return tmp_path


def acquisition(root, relative):
    study = nifti.read(root / relative, subject=sources.raw_subject(relative))
    return bids.annotate(study, relative, bids.read_dataset(root)).volumes[0].acquisition


def test_names_and_tables_become_the_acquisition(root):
    with_contrast = acquisition(root, T1)
    assert (with_contrast.session, with_contrast.contrast, with_contrast.sex) == ("02", "T1w", "F")
    assert with_contrast.age_years == 34.0  # the session's own age is not known: the participant's
    assert with_contrast.date == "2011-01-02"
    assert with_contrast.study == "made up_sub-01_ses-02"
    assert with_contrast.facts["ContrastBolusAgent"] == "enhanced"
    flair = acquisition(root, "sub-01/ses-01/anat/sub-01_ses-01_FLAIR.nii.gz")
    assert (flair.session, flair.contrast, flair.age_years, flair.date) == ("01", "FLAIR", 34.5, "2009-06-15")
    phase = acquisition(root, "sub-02/anat/sub-02_part-phase_bold.nii.gz")
    assert (phase.session, phase.contrast, phase.age_years, phase.sex) == ("", "phase", None, "M")


def test_near_copies_share_a_group_and_others_do_not():
    def group(name):
        parts, suffix = bids.entities(name)
        return bids._acquisition(name, parts, suffix, bids.Bids(root=bids.Path("nowhere"))).group

    assert group("sub-01_rec-norm_T1w.nii.gz") == group("sub-01_T1w.nii.gz") == group("sub-01_echo-2_T1w.nii.gz")
    names = ("sub-01_T1w", "sub-01_T2w", "sub-01_run-2_T1w", "sub-01_ses-2_T1w", "sub-02_T1w", "sub-01_ce-gad_T1w")
    assert len({group(f"{name}.nii.gz") for name in names}) == len(names)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"Name": "A"}, {"Name": "B"}, False),
        ({"Name": "A", "DatasetDOI": "doi:10.1/a"}, {"Name": "A", "DatasetDOI": "doi:10.1/b"}, False),
        ({"Name": "A", "DatasetDOI": "doi:10.1/a"}, {"Name": "A 2", "DatasetDOI": "doi:10.1/a"}, True),
        ({"Name": "A" * 70 + "1"}, {"Name": "A" * 70 + "2"}, False),
        ({"Name": 7, "DatasetDOI": " "}, {}, True),
    ],
)
def test_sub_01_of_two_data_sets_is_not_one_acquisition(tmp_path, one, other, same):
    told = []
    for number, described in enumerate((one, other)):
        root = tmp_path / str(number)
        nifti.write(root / "sub-01/anat/sub-01_T1w.nii.gz", scan(), np.eye(4))
        (root / "dataset_description.json").write_text(json.dumps(described))
        told.append(acquisition(root, "sub-01/anat/sub-01_T1w.nii.gz"))
    assert (told[0].group == told[1].group) is same
    assert (told[0].study == told[1].study) is same
    assert max(len(found.study) for found in told) < 100


@pytest.mark.parametrize(
    ("described", "found"),
    [
        ({"Name": " A  study\n", "DatasetDOI": "doi:10.1/a.v2"}, "A study"),
        ({"Name": "A/B"}, "A/B"),
        ({}, ""),
    ],
)
def test_a_data_set_is_told_by_its_name_whatever_its_version(tmp_path, described, found):
    (tmp_path / "dataset_description.json").write_text(json.dumps(described))
    assert bids.home(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz") == found
    assert bids.home(tmp_path / "sub-01") == bids.home(tmp_path / "sub-01_T1w.nii.gz") == found


def test_a_data_set_without_a_name_is_told_by_what_else_it_says_and_never_by_its_place(tmp_path):
    def of(folder, text):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dataset_description.json").write_text(text)
        return bids.home(tmp_path / folder / "sub-01/sub-01_T1w.nii.gz")

    one = of("a", '{"Name": " ", "BIDSVersion": "1"}')
    assert one == of("b", '{"BIDSVersion": "1",\n"Name": " "}')
    assert one != of("c", '{"Name": " ", "BIDSVersion": "2"}')
    assert len(one) == 16


def test_a_name_that_changes_is_read_again(tmp_path):
    path, place = tmp_path / "dataset_description.json", tmp_path / "sub-01/sub-01_T1w.nii.gz"
    path.write_text('{"Name": "A"}')
    assert bids.home(place) == "A"
    path.write_text('{"Name": "Other"}')
    assert bids.home(place) == "Other"


def test_a_derivative_is_of_the_people_of_the_data_set_around_it(tmp_path):
    inner = tmp_path / "ds/derivatives/prog"
    inner.mkdir(parents=True)
    (inner / "dataset_description.json").write_text('{"Name": "prog"}')
    place = inner / "sub-01/anat/sub-01_desc-brain_T1w.nii.gz"
    assert bids.home(place) == "prog"
    (tmp_path / "ds/dataset_description.json").write_text('{"Name": "A"}')
    assert bids.home(place) == "A"


def test_a_description_that_is_no_json_is_told(root):
    (root / "dataset_description.json").write_text("{")
    with pytest.raises(ConfigError, match=r"dataset_description\.json cannot be used: it is no JSON from line 1"):
        bids.read_dataset(root)


def test_sidecars_are_inherited_cleaned_and_in_dicom_s_units(root):
    (root / "T1w.json").write_text(json.dumps({"MagneticFieldStrength": 3, "EchoTime": 0.003, "FlipAngle": 9}))
    (root / "ses-99_T1w.json").write_text(json.dumps({"FlipAngle": 1}))
    (root / "T2w.json").write_text(json.dumps({"FlipAngle": 2}))
    sidecar = {"FlipAngle": 8.0, "Manufacturer": "Siemens", "ImageType": ["ORIGINAL", "PRIMARY"], "PatientName": "Doe"}
    sidecar |= {"InstitutionName": "Clinic", "ScanOptions": "J. Miller", "RepetitionTime": "soon"}
    (root / T1).with_name("sub-01_ses-02_ce-gadolinium_T1w.json").write_text(json.dumps(sidecar))
    assert acquisition(root, T1).facts == {
        "MagneticFieldStrength": "3",
        "EchoTime": "3",
        "FlipAngle": "8",
        "Manufacturer": "Siemens",
        "ImageType": "ORIGINAL\\PRIMARY",
        "ContrastBolusAgent": "enhanced",
    }


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\ufeff\ud800"], ids=["open", "list", "deep", "no text"])
def test_a_damaged_sidecar_refuses_its_scan_and_says_nothing_of_it(root, text):
    (root / T1).with_name("sub-01_T1w.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(IngestError) as caught:
        acquisition(root, T1)
    assert caught.value.code == "bad-sidecar"
    assert "sub-01" not in str(caught.value)


@pytest.mark.parametrize("name", ["sub-01_label-lesion_mask", "sub-01_dseg", "sub-01_desc-brain_probseg"])
def test_a_mask_is_no_scan(root, name):
    relative = f"sub-01/anat/{name}.nii.gz"
    assert not bids.is_scan(relative)
    nifti.write(root / relative, scan(), np.eye(4))
    with pytest.raises(IngestError) as caught:
        acquisition(root, relative)
    assert caught.value.code == "label-map"


@pytest.mark.parametrize("folder", bids.NOT_RAW)
def test_what_was_made_from_scans_is_no_scan(folder):
    assert not bids.is_scan(f"{folder}/sub-01/anat/sub-01_T1w.nii.gz")
    assert bids.is_scan(f"sub-01/{folder}/sub-01_T1w.nii.gz")


@pytest.mark.parametrize(
    "name", ["ct.nii.gz", "case_T1w.nii.gz", "sub-01.nii.gz", "sub-_T1w.nii.gz", "../../x", "a\0b"]
)
def test_names_that_are_none_of_bids_change_nothing(root, name):
    assert bids.entities(name) == ({}, "")
    study = nifti.read(root / T1, subject="s")
    assert bids.annotate(study, name, bids.read_dataset(root)) is study
    assert bids.annotate(study, T1, None) is study


def test_a_name_of_64_kb_takes_no_time():
    name = "sub-01_" + "a-b_" * 16_000
    assert bids.entities(name) == ({}, "")
    assert len(bids.entities(name + "T1w.nii")[0]) == 2


def test_other_folders_are_no_data_set(tmp_path):
    assert bids.read_dataset(tmp_path) is None
    assert bids.read_dataset(tmp_path / "nowhere") is None
    (tmp_path / "sub-01").mkdir()
    dataset = bids.read_dataset(tmp_path)
    assert dataset is not None
    assert not dataset.people


def test_a_data_set_travels_between_processes(root):
    dataset = bids.read_dataset(root)
    assert pickle.loads(pickle.dumps(dataset)) == dataset


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("id\tage\nsub-01\t3\n", 1),
        ("participant_id\tage\tage\nsub-01\t3\t4\n", 1),
        ("participant_id\tage\nsub-01\t30\nsub-secret\n", 3),
        ("participant_id\tage\nsub-01\t30\nsub-secret\told\n", 3),
        ("participant_id\tage\n\nsub-secret\t-3\n", 3),
        ("participant_id\tage\nsub-secret\t1999\n", 2),
        ("participant_id\tage\nsub-secret\t1\nsecret\t2\n", 3),
        ("participant_id\tage\n\t30\n", 2),
        ("", 1),
        ("participant_id\tage\nsub-secret\0\t" + "3" * 200_000 + "\n", 1),
    ],
)
def test_a_malformed_table_is_refused_with_its_row_and_without_the_id(root, text, row):
    (root / "participants.tsv").write_text(text)
    with pytest.raises(ConfigError, match=rf"row {row} of participants\.tsv") as caught:
        bids.read_dataset(root)
    assert "secret" not in str(caught.value)


def test_a_malformed_table_of_sessions_does_not_name_its_subject(root):
    table(root / "sub-01" / "sub-01_sessions.tsv", "session_id age", "ses-01 old")
    with pytest.raises(ConfigError, match=r"row 2 of a sessions\.tsv") as caught:
        bids.read_dataset(root)
    assert "sub-01" not in str(caught.value)


def test_the_columns_description_gives_units_and_codes(root):
    described = {"age": {"Units": "months"}, "sex": {"Levels": {"1": "male", "2": {"Description": "female"}}}}
    (root / "participants.json").write_text(json.dumps(described))
    table(root / "participants.tsv", "participant_id age sex", "sub-01 18 2", "sub-02 6y 1", "sub-03 7 9")
    people = bids.read_dataset(root).people
    assert [people[f"sub-0{n}"] for n in (1, 2, 3)] == [
        bids.Person(age_years=1.5, sex="F"),
        bids.Person(age_years=6.0, sex="M"),
        bids.Person(age_years=0.58, sex=""),
    ]
    (root / "participants.json").write_text("{")
    with pytest.raises(ConfigError, match=r"participants\.json"):
        bids.read_dataset(root)


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("34", 34.0),
        (" 34.26 ", 34.26),
        ("89+", 90.0),
        ("> 89", 90.0),
        ("90+ years", 90.0),
        ("65+", 65.0),
        ("95", 95.0),
        ("024M", 2.0),
        ("6 mo", 0.5),
        ("10 weeks", 0.19),
        ("100d", 0.27),
        ("N/A", None),
        ("", None),
    ],
)
def test_ages_as_tables_write_them(text, years):
    assert bids.age_years(text) == years


@pytest.mark.parametrize("text", ["-1", "old", "34 dogs", "1e3", "200", "34,5", "3 4", "٣"])
def test_what_is_no_age_is_not_guessed(text):
    with pytest.raises(ValueError, match=r"number|years"):
        bids.age_years(text)


@pytest.mark.parametrize("raw", ["rawdata", "."])
def test_what_was_made_of_a_data_set_has_its_people_described_or_not(tmp_path: Path, raw: str) -> None:
    for folder in (raw, "derivatives/strip"):
        (tmp_path / folder / "sub-01/anat").mkdir(parents=True)
    made = tmp_path / "derivatives/strip"
    (made / "dataset_description.json").write_text('{"Name": "stripped"}')
    assert bids.home(made / "sub-01/anat/sub-01_T1w.nii.gz") == ""
    (tmp_path / raw / "dataset_description.json").write_text('{"Name": "Raw"}')
    people = {bids.home(place / "sub-01/anat/sub-01_T1w.nii.gz") for place in (tmp_path / raw, made)}
    assert people == {"Raw"}
