from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.spaces import PLANTED, aligned_weights, reported_store

from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.index import Index
from voxelstem.indexer import build
from voxelstem.recall import text_of
from voxelstem.search import Search
from voxelstem.sources import nifti
from voxelstem.store import Store
from voxelstem.study import Study


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of six scans of three people, and its index."""
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        reported_store(folder / "store", scans=6)
        build(folder / "index", [folder / "store"], weights=aligned_weights(folder / "weights"))
    return folder


@pytest.fixture
def store(home: Path) -> Store:
    return Store.open(home / "store")


@pytest.fixture
def search(home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Search:
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
    return Search(home / "index")


def test_a_text_finds_scans_in_the_order_of_their_cosines(search: Search):
    found = search.find("a large liver lesion", top=4)
    vector = search.aligned.embed_texts(["a large liver lesion"])[0].astype(np.float64)
    index = search.index
    wanted = sorted((-float(index.vector(row).astype(np.float64) @ vector), index.key(row)) for row in range(6))[:4]
    assert (found.asked, found.among, found.pool) == ("text", "scans", 6)
    assert [hit.key for hit in found.hits] == [key for _, key in wanted]
    np.testing.assert_allclose([hit.score for hit in found.hits], [-score for score, _ in wanted], atol=1e-9)


def test_a_report_finds_itself_among_reports(search: Search, store: Store, tmp_path: Path):
    for record in store:
        assert record.report is not None
        said = text_of(record.report, "full")
        (tmp_path / "report.txt").write_text(said)
        for question in (said, tmp_path / "report.txt", str(tmp_path / "report.txt")):
            assert search.find(question, among="reports").hits[0].key == record.key


def test_a_scan_of_the_index_finds_others_by_its_key_and_never_itself(search: Search, store: Store):
    for record in store:
        found = search.find(record.key[:12], top=9)
        assert found.asked == "scan"
        assert found.pool == len(found.hits) == 5
        assert record.key not in {hit.key for hit in found.hits}


def test_other_scans_of_the_patient_can_be_left_out(search: Search, store: Store):
    for record in store:
        found = search.find(record.key, exclude_same_patient=True)
        assert {hit.key for hit in found.hits} == {other.key for other in store if other.subject != record.subject}
        reports = search.find(record.key, exclude_same_patient=True, among="reports")
        assert {hit.key for hit in reports.hits} == {hit.key for hit in found.hits}


def test_a_scan_finds_reports_its_own_among_them(search: Search, store: Store):
    first = next(iter(store))
    assert {hit.key for hit in search.find(first.key, among="reports").hits} == {record.key for record in store}


def test_a_scan_s_file_asks_like_the_scan_of_the_store(search: Search, store: Store, tmp_path: Path):
    record = next(iter(store))
    volume = store.volume(record.key)
    nifti.write(tmp_path / "scan.nii.gz", volume.array[0].astype(np.int16), volume.affine_ras)
    by_file = search.find(tmp_path / "scan.nii.gz")
    by_study = search.find(Study(subject=record.subject, volumes=(volume,)))
    by_key = search.find(record.key)
    # The file says nothing of a patient; its voxels are known.
    others = {hit.key for hit in search.find(tmp_path / "scan.nii.gz", exclude_same_patient=True).hits}
    assert others == {other.key for other in store if other.subject != record.subject}
    for found in (by_file, by_study):
        assert [hit.key for hit in found.hits] == [hit.key for hit in by_key.hits]
        np.testing.assert_allclose([hit.score for hit in found.hits], [hit.score for hit in by_key.hits], atol=2e-3)


def test_wrong_questions_are_refused_and_their_words_not_repeated(search: Search, tmp_path: Path):
    (tmp_path / f"{PLANTED}.txt").write_bytes(b"\xff\xfe\xfa")
    for question, told in (
        ("  ", "empty"),
        ("", "empty"),
        (f"scans/{PLANTED}.nii.gz", "no scan at that path"),
        (Path(PLANTED), "no scan at that path"),
        (tmp_path / f"{PLANTED}.txt", "as UTF-8"),
        ("0123456789abcdef", "no indexed scan has a key"),
    ):
        with pytest.raises(ConfigError, match=told) as error:
            search.find(question)
        assert PLANTED not in str(error.value)
    with pytest.raises(ConfigError, match="a text has no patient"):
        search.find("effusion", exclude_same_patient=True)
    with pytest.raises(ConfigError, match="at least 1"):
        search.find("effusion", top=0)
    (tmp_path / "noise.nii.gz").write_bytes(b"no scan")
    with pytest.raises(IngestError):
        search.find(tmp_path / "noise.nii.gz")


def test_words_that_are_long_or_look_like_a_key_are_texts(search: Search):
    for question in ("effaced", "facadedeface", "effusion " * 400, "effusion\non the left"):
        assert search.find(question).asked == "text"


def test_nothing_that_was_asked_is_written_or_logged(search: Search, home: Path, caplog, capfd):
    search.find(f"{PLANTED} has a nodule")
    assert PLANTED not in "".join((*capfd.readouterr(), caplog.text))
    assert all(PLANTED.encode() not in path.read_bytes() for path in (home / "index").rglob("*") if path.is_file())


def test_other_weights_than_made_the_index_are_refused_and_a_key_needs_none(home: Path, store: Store, tmp_path: Path):
    other = Search(home / "index", weights=aligned_weights(tmp_path / "w", seed=3))
    with pytest.raises(ConfigError, match="made by other weights"):
        other.find("effusion")
    assert len(other.find(next(iter(store)).key).hits) == 5
    with pytest.raises(StoreError, match="no index"):
        Search(tmp_path)


def test_an_index_without_reports_says_so(search: Search, tmp_path: Path):
    Index.create(tmp_path / "index", space="5" * 64, out=4)
    with pytest.raises(ConfigError, match="holds no reports"):
        Search(tmp_path / "index").find("effusion", among="reports")


def test_a_protocol_compares_each_study_s_report_with_the_indexed_scans(search: Search, store: Store):
    found = search.measure("ct-rate-full-report", store)
    assert (found.protocol.name, found.studies, found.not_indexed, found.without_text) == (
        "ct-rate-full-report-1",
        6,
        0,
        0,
    )
    assert [(line.k, line.pool, line.queries) for line in found.recalls] == [(k, 6, 6) for k in (5, 10, 50, 100)]
    # By hand: how many reports have their scan among the first five of the six.
    hits = []
    for record in store:
        assert record.report is not None
        five = search.find(text_of(record.report, "full"), top=5).hits
        hits.append(record.key in {hit.key for hit in five})
    assert found.recalls[0].value.estimate == pytest.approx(np.mean(hits))
    assert found.recalls[0].value.subjects == 3
    assert found.recalls[1].value.estimate == 1


def test_a_protocol_counts_what_it_leaves_out(search: Search, tmp_path: Path):
    larger = reported_store(tmp_path / "store", scans=8)
    found = search.measure("ct-rate-full-report", larger)
    assert (found.studies, found.not_indexed) == (6, 2)
    with pytest.raises(ConfigError, match="needs pools of 32 scans with reports, there are 6"):
        search.measure("merlin-findings", larger)


def test_of_several_series_of_a_study_one_takes_part(search: Search, home: Path, tmp_path: Path):
    store = reported_store(tmp_path / "store", scans=2)
    coarse = reported_store(tmp_path / "coarse", scans=2, spacing_mm=25.0)
    build(tmp_path / "index", [store.path, coarse.path], weights=home / "weights")
    both = Store.create(tmp_path / "both")
    from voxelstem.store import write

    for source in (store, coarse):
        for record in source:
            volume = source.volume(record.key)
            write(both, Study(subject=record.subject, volumes=(volume,), report=record.report))
    both.refresh()
    assert len(both) == 4
    assert Search(tmp_path / "index").measure("ct-rate-full-report", both).studies == 2
