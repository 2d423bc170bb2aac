from __future__ import annotations

import hashlib
import hmac
import os
import stat
import uuid

import pytest

from voxelstem.errors import ConfigError
from voxelstem.store.subjects import (
    PSEUDONYM,
    key_mark,
    keyed_id,
    keyed_uid,
    pseudonym,
    shift_days,
    site_key,
    site_key_path,
    source_name,
)


def test_the_key_is_made_once_and_only_its_owner_reads_it(site_key_file, caplog):
    first = site_key()
    assert str(site_key_file) in caplog.text
    assert site_key() == first
    assert len(first) == 32
    assert stat.S_IMODE(os.stat(site_key_file).st_mode) == 0o600
    assert [path.name for path in site_key_file.parent.iterdir()] == ["site.key"]


def test_without_the_variable_the_key_lies_in_the_users_config_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("VOXELSTEM_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert site_key_path() == tmp_path / "voxelstem" / "site.key"


@pytest.mark.parametrize("text", ["", "abcd", "not hex", "00" * 31])
def test_a_broken_key_is_refused_and_not_replaced(site_key_file, text):
    site_key_file.write_text(text)
    with pytest.raises(ConfigError, match="key"):
        site_key()
    assert site_key_file.read_text() == text


@pytest.mark.parametrize("key", ["ab" * 32, "AB" * 32, "ab" * 32 + "\n"])
def test_a_key_in_place_of_a_path_makes_no_file_and_is_not_told(monkeypatch, tmp_path, key):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOXELSTEM_KEY", key)
    with pytest.raises(ConfigError, match="path of a file") as told:
        site_key()
    assert list(tmp_path.iterdir()) == []
    assert key.strip() not in str(told.value)


def test_a_key_file_may_be_called_as_it_likes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOXELSTEM_KEY", "cd" * 32)
    (tmp_path / ("cd" * 32)).write_text("01" * 32 + "\n")
    assert site_key() == bytes([1]) * 32


def test_a_key_that_cannot_be_made_is_a_clear_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path / "file" / "site.key"))
    with pytest.raises(ConfigError, match="cannot be read or made"):
        site_key()


def test_a_pseudonym_is_the_keyed_hash_of_the_id():
    key = bytes(range(32))
    plain = hmac.new(key, b"subject\0" + "Müller".encode(), hashlib.sha256).hexdigest()
    assert pseudonym("Müller", key) == "s" + plain[:24]
    assert PSEUDONYM.fullmatch(pseudonym("Müller", key))
    assert pseudonym(" Mu\u0308ller ", key) == pseudonym("Müller", key)
    assert pseudonym("Müller", bytes(32)) != pseudonym("Müller", key)


def test_nobody_has_no_pseudonym():
    with pytest.raises(ValueError, match="empty"):
        pseudonym("  ", bytes(32))


def test_the_mark_of_a_key_tells_keys_apart_and_is_not_the_key():
    assert key_mark(bytes(32)) != key_mark(bytes([1] * 32))
    assert key_mark(bytes(32)) not in bytes(32).hex()


@pytest.mark.parametrize(
    ("relative", "ending"),
    [("sub-Miller/scan.NII.gz", ".nii.gz"), ("a.nrrd", ".nrrd"), ("scan.Miller", ""), ("Miller", "")],
)
def test_the_ledgers_name_for_a_source_keeps_only_the_format(relative, ending):
    name = source_name(relative, bytes(32))
    assert name[16:] == ending
    assert set(name[:16]) <= set("0123456789abcdef")
    assert name != source_name(relative + "x", bytes(32))


def test_any_other_id_is_hashed_by_its_kind():
    key = bytes(range(32))
    plain = hmac.new(key, b"series\0" + b"1.2.3", hashlib.sha256).hexdigest()
    assert keyed_id("series", "1.2.3", key) == keyed_id("series", " 1.2.3\0", key) == plain[:24]
    assert keyed_id("study", "1.2.3", key) != plain[:24]
    assert keyed_id("series", "1.2.3", bytes(32)) != plain[:24]
    assert keyed_id("subject", "Anna", key) == pseudonym("Anna", key)[1:]  # kinds alone keep hashes apart
    assert keyed_id("series", " \0", key) == ""


def test_a_uid_becomes_a_uid_of_a_uuid():
    uids = {keyed_uid(f"1.2.{n}", bytes(32)) for n in range(50)}
    assert len(uids) == 50
    for uid in uids:
        root, _, number = uid.rpartition(".")
        assert root == "2.25"
        assert uuid.UUID(int=int(number)).variant == uuid.RFC_4122
    assert keyed_uid("1.2.3", bytes(32)) == keyed_uid("1.2.3 ", bytes(32)) != keyed_uid("1.2.3", bytes([1] * 32))


def test_days_are_shifted_to_both_sides_by_a_year_at_most_and_never_by_none():
    shifts = [shift_days(f"patient {n}", bytes(32)) for n in range(3_000)]
    assert min(shifts) >= -365
    assert max(shifts) <= 365
    assert 0 not in shifts
    assert len(set(shifts)) > 650
    assert 0.45 < sum(shift > 0 for shift in shifts) / len(shifts) < 0.55
    assert shift_days(" patient 1", bytes(32)) == shifts[1] != shift_days("patient 1", bytes([1] * 32))
    with pytest.raises(ValueError, match="empty"):
        shift_days(" ", bytes(32))
