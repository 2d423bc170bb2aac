from __future__ import annotations

import sqlite3

import numpy as np
import pytest

from voxelstem.errors import StoreError
from voxelstem.store import Wanted, Writer
from voxelstem.store.catalogue import FILE_NAME, dump
from voxelstem.store.encoding import encode_study
from voxelstem.store.reader import Store
from voxelstem.store.schema import FORMAT_VERSION
from voxelstem.study import Acquisition, Report


def version(root):
    with sqlite3.connect(root / FILE_NAME) as connection:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return found


def test_a_store_of_format_1_is_read_and_not_changed(make, format_1):
    before = (format_1 / FILE_NAME).read_bytes()
    store = Store.open(format_1)
    ct = next(record for record in store if record.modality == "CT")
    assert (ct.report, ct.labels, ct.classes) == (
        Report(rest_text="a cyst"),
        {"lesion": "no"},
        {1: "liver", 2: "spleen"},
    )
    assert (ct.acquisition, ct.native, ct.thumbnail, ct.shape_ijk) == (Acquisition(), None, b"", (20, 17, 9))
    np.testing.assert_array_equal(store.volume(ct.key).array, make.volume().array)
    assert store.select(Wanted(modality="MR")).channels.tolist() == [2]
    assert set(store.subjects()) == {make.alice, make.bob}
    assert store.duplicates() == ()
    for record in store:
        store.check(record.key)
    assert (format_1 / FILE_NAME).read_bytes() == before
    assert version(format_1) == 1


def test_writing_upgrades_it_and_nothing_that_it_said_is_lost(make, format_1):
    store, before = Store.open(format_1), dump(format_1)
    with Writer(format_1) as writer:
        assert version(format_1) == FORMAT_VERSION
        assert dump(format_1) == before
        writer.add(encode_study(make.study(make.volume(seed=5))))
    assert len(store) == 2, "a store that was opened before sees what it saw"
    assert {record.modality for record in store} == {"CT", "MR"}
    assert len(Store.open(format_1)) == 3


def test_an_upgrade_that_fails_leaves_the_old_format(format_1):
    with sqlite3.connect(format_1 / FILE_NAME) as connection:
        connection.execute("UPDATE volumes SET shape = '[]' WHERE modality = 'MR'")
    connection.close()
    before = (format_1 / FILE_NAME).read_bytes()
    with pytest.raises(StoreError, match="cannot be used"), Writer(format_1):
        pass
    assert version(format_1) == 1
    assert (format_1 / FILE_NAME).read_bytes() == before


def test_a_scan_that_comes_by_again_brings_what_format_1_did_not_know(make, format_1):
    with Writer(format_1) as writer:
        study = make.study(make.volume())
        (key,) = writer.add(encode_study(study))
    record = Store.open(format_1).record(key)
    assert record.thumbnail
    assert record.report == Report(rest_text="a cyst")
