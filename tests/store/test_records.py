from __future__ import annotations

import dataclasses
import json
import sqlite3

import numpy as np
import pytest

from voxelstem.errors import StoreError
from voxelstem.store import Store, Writer, write
from voxelstem.store.catalogue import FILE_NAME
from voxelstem.store.encoding import encode, encode_study
from voxelstem.store.reader import file_path
from voxelstem.study import Acquisition, Report

SAID = Acquisition(
    series="a1",
    study="b2",
    group="c3",
    session="baseline",
    date="2020-02-03",
    age_years=61.5,
    sex="F",
    contrast="T1w",
    facts={"ConvolutionKernel": "B30f"},
)
REPORT = Report(
    findings_text="a cyst",
    impression_text="benign",
    rest_text="none",
    language="en",
    history_text="pain",
    technique_text="native",
    findings_rewrites=("one cyst", "cystic"),
    impression_rewrites=("harmless",),
    icd10=("Cyst of kidney",),
)


def with_native(make, *, subject=None):
    """A study whose volume was resampled from a finer scan with labels of its own."""
    fine = make.volume(np.random.default_rng(3).integers(-1000, 900, (1, 20, 17, 9)), labels=make.mask(seed=4))
    fitted = dataclasses.replace(make.volume(seed=8, labels=make.mask()), acquisition=SAID)
    study = encode_study(make.study(fitted, report=REPORT, **({"subject": subject} if subject else {})))
    return dataclasses.replace(study, volumes=(dataclasses.replace(study.volumes[0], native=encode(fine)),)), fine


@pytest.fixture
def kept(make, tmp_path):
    store = Store.create(tmp_path / "store")
    study, fine = with_native(make)
    with Writer(store.path) as writer:
        (key,) = writer.add(study)
    store.refresh()
    return store, key, fine


def test_a_record_comes_back_with_all_that_was_said(kept):
    store, key, _ = kept
    record = store.record(key)
    assert record.acquisition == SAID
    assert (record.study, record.group, record.report) == ("b2", "c3", REPORT)
    assert record.bytes == sum(path.stat().st_size for path in store.path.rglob("*.b2nd"))
    assert record.volume_bytes == file_path(store.path, "volumes", key).stat().st_size
    assert 0 < len(record.thumbnail) <= 1024
    assert store.volume(key).acquisition == SAID


def test_a_report_written_before_it_had_more_sections_reads(kept):
    store, key, _ = kept
    old = {"findings_text": "a cyst", "impression_text": "", "language": "en", "rest_text": "none"}
    with sqlite3.connect(store.path / FILE_NAME) as connection:
        connection.execute("UPDATE details SET report = ?", [json.dumps(old)])
    connection.close()
    store.refresh()
    assert store.record(key).report == Report(findings_text="a cyst", rest_text="none", language="en")


def test_a_report_with_the_old_sections_alone_is_written_as_it_always_was_read(make, tmp_path):
    store = Store.create(tmp_path)
    write(store, make.study(report=Report(findings_text="a cyst")))
    with sqlite3.connect(store.path / FILE_NAME) as connection:
        assert connection.execute("SELECT report FROM details").fetchone() == ('{"findings_text": "a cyst"}',)
    connection.close()


def test_the_native_scan_lies_beside_the_volume_with_its_own_labels(kept):
    store, key, fine = kept
    native = store.native(key)
    np.testing.assert_array_equal(native.array, fine.array)
    np.testing.assert_array_equal(native.labels.array, fine.labels.array)
    np.testing.assert_array_equal(native.affine_ras, fine.affine_ras)
    assert file_path(store.path, "native", store.record(key).native.key).is_file()


def test_a_native_scan_that_was_not_kept_is_a_clear_error(make, tmp_path):
    store = Store.create(tmp_path)
    (key,) = write(store, make.study())
    with pytest.raises(StoreError, match=r"native scan of volume .* was not kept"):
        store.native(key)


def test_a_damaged_native_scan_is_found_and_healed_like_any_file(make, kept):
    store, key, _ = kept
    path = file_path(store.path, "native", store.record(key).native.key)
    healthy = path.read_bytes()
    path.write_bytes(healthy[:-1])
    with pytest.raises(StoreError, match="damaged"):
        store.check(key)
    study, _ = with_native(make)
    with Writer(store.path) as writer:
        writer.add(study, source="a", fingerprint="1")
        assert writer.holds("a", "1")
        assert path.read_bytes() == healthy
        path.unlink()
        assert not writer.holds("a", "1")


def test_a_visit_that_says_nothing_takes_nothing_away_and_one_that_does_is_believed(make, kept):
    store, key, _ = kept
    bare = make.volume(seed=8)
    write(store, make.study(bare))
    record = store.record(key)
    assert record.acquisition == SAID
    assert record.native is not None
    write(store, make.study(dataclasses.replace(bare, acquisition=Acquisition(age_years=62.0))))
    assert store.record(key).acquisition.age_years == 62.0
    assert store.record(key).study == "b2"
