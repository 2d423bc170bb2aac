from __future__ import annotations

import csv

import pytest

from voxelstem.errors import VoxelstemError
from voxelstem.ingest import ingest, note_volumes
from voxelstem.sources.brain import BrainConfig, brain_subject
from voxelstem.sources.brain_anatomy import CLASSES
from voxelstem.sources.brain_files import brain_files, relative_path
from voxelstem.store import Store
from voxelstem.store.labels import read_labels
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import INTRACRANIAL


@pytest.fixture
def studies():
    like = BrainConfig(seed=0, shape_ijk=(20, 24, 20), spacing_mm=(8.0, 8.0, 8.0))
    return [study for seed in (1, 2) for study in brain_subject(seed, sessions=2, contrasts=("T1w", "DWI"), like=like)]


def test_written_brains_come_back_through_ingest_as_they_were_drawn(tmp_path, studies):
    files = brain_files(tmp_path / "made", studies)
    report = ingest([files.scans], tmp_path / "store", labels=files.labels)
    assert (report.kept, report.refused, report.subjects) == (8, 0, 2)
    noted = note_volumes([files.scans], tmp_path / "store", volumes=[files.volumes], qc=[files.qc])
    assert (noted.scans, noted.unusable, noted.unmatched) == (8, 0, 0)
    store, key = Store.open(tmp_path / "store"), site_key()
    drawn = {
        (pseudonym(f"brain phantoms/sub-{one.subject.replace('-', '')}", key), said.session, said.contrast): one
        for one in studies
        for said in [one.volumes[0].acquisition]
    }
    found = {(one.subject, one.acquisition.session, one.acquisition.contrast): one for one in store}
    assert set(found) == set(drawn)
    for place, record in found.items():
        study = drawn[place]
        truth, said = study.volumes[0], study.volumes[0].acquisition
        assert record.modality == "MR"
        assert (store.volume(record.key).array == truth.array).all()
        assert (store.labels(record.key).array == truth.labels.array).all()
        assert dict(record.classes) == CLASSES
        assert (record.acquisition.age_years, record.acquisition.sex) == (said.age_years, said.sex)
        wanted = {name: size for name, size in study.labels.items() if name.startswith("volume:")}
        assert dict(record.labels) == wanted


def test_sessions_and_their_contrasts_belong_together_and_days_keep_their_distance(tmp_path, studies):
    files = brain_files(tmp_path / "made", studies)
    ingest([files.scans], tmp_path / "store")
    visits = {}
    for record in Store.open(tmp_path / "store"):
        visits.setdefault((record.subject, record.acquisition.session), set()).add(record.study)
    assert len(visits) == 4
    assert all(len(one) == 1 for one in visits.values())


def test_tables_of_facts_have_one_row_a_person(tmp_path, studies):
    files, key = brain_files(tmp_path, studies), site_key()
    told = read_labels(files.pathology, "classify", key).labels
    assert len(told) == 2
    for study in studies:
        who = pseudonym(f"brain phantoms/sub-{study.subject.replace('-', '')}", key)
        assert told[who] == study.labels["pathology"]
    assert set(read_labels(files.ages, "regress", key).labels) == set(told)


def test_rows_are_matched_by_path_or_by_a_name_that_one_scan_alone_has(tmp_path, studies):
    files = brain_files(tmp_path / "made", studies)
    ingest([files.scans], tmp_path / "store")
    path, name = relative_path(studies[0]), relative_path(studies[3]).rpartition("/")[2]
    table = tmp_path / "some.csv"
    with table.open("w", newline="") as file:
        rows = [("csf", "subject", INTRACRANIAL), ("2", path, "2000"), ("3", name, "3000"), ("4", "nobody", "4000")]
        csv.writer(file).writerows([*rows, ("5", "empty", "5")])
    noted = note_volumes([files.scans], tmp_path / "store", volumes=[table])
    assert (noted.scans, noted.unusable, noted.unmatched) == (2, 1, 1)
    said = sorted(record.labels.get("volume:csf", "") for record in Store.open(tmp_path / "store"))
    assert said == [*[""] * 6, "2", "3"]


def test_a_name_that_two_scans_share_gives_neither_of_them_volumes(tmp_path, studies):
    sources = [brain_files(tmp_path / place, [study]).scans for place, study in (("a", studies[0]), ("b", studies[4]))]
    one, other = (next(source.rglob("*.nii.gz")) for source in sources)
    for number, (path, source) in enumerate(zip((one, other), sources, strict=True)):
        (source / f"case{number}").mkdir()
        path.rename(source / f"case{number}" / "t1.nii.gz")
    ingest(sources, tmp_path / "store")
    table = tmp_path / "some.csv"
    table.write_text(f"subject,{INTRACRANIAL}\nt1,1000000\n")
    noted = note_volumes(sources, tmp_path / "store", volumes=[table])
    assert (noted.scans, noted.unmatched) == (0, 1)


def test_a_second_ingest_keeps_the_volumes(tmp_path, studies):
    files = brain_files(tmp_path / "made", studies)
    for _ in range(2):
        ingest([files.scans], tmp_path / "store")
        note_volumes([files.scans], tmp_path / "store", volumes=[files.volumes])
    ingest([files.scans], tmp_path / "store", labels=files.labels)
    assert all(f"volume:{INTRACRANIAL}" in record.labels for record in Store.open(tmp_path / "store"))


def test_a_folder_that_cannot_be_written_is_said(tmp_path, studies):
    (tmp_path / "made").write_text("a file")
    with pytest.raises(VoxelstemError, match="cannot be written into 'made'"):
        brain_files(tmp_path / "made", studies)


def test_a_name_that_scans_of_two_people_have_tells_of_neither(tmp_path, studies):
    one, two = (brain_files(tmp_path / name, studies[:1]) for name in ("one", "two"))
    ingest([one.scans], tmp_path / "store")
    noted = note_volumes([one.scans, two.scans], tmp_path / "store", volumes=[one.volumes])
    assert (noted.scans, noted.unmatched) == (0, 1)
