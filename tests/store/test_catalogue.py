from __future__ import annotations

import sqlite3

import pytest

from voxelstem.errors import StoreError
from voxelstem.store.catalogue import FILE_NAME, FORMAT_VERSION, Catalogue, Refusal
from voxelstem.store.reader import Store
from voxelstem.store.splits import Fractions


def set_version(root, version):
    with sqlite3.connect(root / FILE_NAME) as connection:
        connection.execute(f"PRAGMA user_version = {version}")


def test_it_is_a_wal_database_with_a_version(tmp_path):
    Store.create(tmp_path)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (FORMAT_VERSION,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_newer_version_is_refused_by_reader_and_writer(tmp_path):
    Store.create(tmp_path)
    set_version(tmp_path, FORMAT_VERSION + 1)
    with pytest.raises(StoreError, match=r"made by a newer version .*(?s:.*)upgrade voxelstem"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="made by a newer version"), Catalogue.write(tmp_path):
        pass


def test_a_catalogue_that_a_kill_left_empty_is_not_a_store_and_can_be_made_whole(tmp_path):
    sqlite3.connect(tmp_path / FILE_NAME).execute("PRAGMA journal_mode = WAL").close()
    with pytest.raises(StoreError, match="never finished"):
        Store.open(tmp_path)
    assert len(Store.create(tmp_path)) == 0


def test_a_second_store_in_the_same_place_is_refused(tmp_path):
    Store.create(tmp_path)
    with pytest.raises(StoreError, match="already holds a store"):
        Store.create(tmp_path)


@pytest.mark.parametrize("content", [b"this is not a database" * 100, b"SQLite format 3\0" + bytes(200)])
def test_a_damaged_catalogue_is_a_clear_error(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(StoreError, match="cannot be used"):
        Store.open(tmp_path)


def test_two_writers_cannot_work_at_once_but_readers_can(tmp_path):
    Store.create(tmp_path)
    with Catalogue.write(tmp_path):
        with pytest.raises(StoreError, match="another process is writing"), Catalogue.write(tmp_path):
            pass
        assert len(Store.open(tmp_path)) == 0
    with Catalogue.write(tmp_path):
        pass


def test_reading_leaves_no_file_behind(tmp_path):
    Store.create(tmp_path)
    before = sorted(tmp_path.iterdir())
    Store.open(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_the_ledger_keeps_one_line_a_source_and_forgets_what_got_in(tmp_path):
    Store.create(tmp_path)
    with Catalogue.write(tmp_path) as catalogue, catalogue.transaction():
        catalogue.refuse(Refusal(source="b", code="corrupt", reason="first"))
        catalogue.refuse(Refusal(source="a", code="corrupt", reason="cut off"))
        catalogue.refuse(Refusal(source="b", code="not-3d", reason="second"))
    lines = [(line.source, line.code, line.reason) for line in Store.open(tmp_path).refusals()]
    assert lines == [("a", "corrupt", "cut off"), ("b", "not-3d", "second")]
    with Catalogue.write(tmp_path) as catalogue, catalogue.transaction():
        catalogue.forgive("b")
    assert [line.source for line in Store.open(tmp_path).refusals()] == ["a"]


def test_a_failed_transaction_changes_nothing(tmp_path):
    Store.create(tmp_path)
    with Catalogue.write(tmp_path) as catalogue, pytest.raises(KeyError), catalogue.transaction():  # noqa: PT012
        catalogue.refuse(Refusal(source="a", code="corrupt", reason=""))
        raise KeyError
    assert Store.open(tmp_path).refusals() == ()


def test_the_shares_given_at_the_start_stay(tmp_path):
    shares = Fractions(train=0.5, validation=0.0, test=0.5)
    Store.create(tmp_path, fractions=shares)
    assert Store.open(tmp_path).fractions == shares
