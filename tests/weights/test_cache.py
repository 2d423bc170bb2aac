from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from voxelstem.errors import CheckpointError
from voxelstem.weights.cache import Record, cache_home, compare, read_record, shown, write_record

RECORD = Record(repo="tue/scan", commit="a" * 40, files={"x.pt": "0" * 64}, weights={"config.json": "1" * 64})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VOXELSTEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_lies_where_the_platform_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert cache_home() == tmp_path / "cache"
    monkeypatch.delenv("VOXELSTEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    places = {"Linux": tmp_path / "xdg", "Darwin": Path.home() / "Library" / "Caches", "Windows": tmp_path / "local"}
    for system, place in places.items():
        monkeypatch.setattr("platform.system", lambda system=system: system)
        assert cache_home() == place / "voxelstem"


def test_a_place_is_shown_without_the_user_s_own_folders(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert shown(cache / "hub" / "tue") == "$VOXELSTEM_CACHE/hub/tue"
    monkeypatch.delenv("VOXELSTEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(tmp_path) not in shown(cache_home() / "hub")
    assert shown(cache_home() / "hub").endswith("/hub")


def test_a_record_comes_back_as_it_was_and_leaves_no_draft(tmp_path: Path):
    assert read_record(tmp_path) is None
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["fetched.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"repo": "x"}',
        b'{"repo": "x", "commit": "", "files": 3}',
        b'{"repo": "x", "mood": 1}',
    ],
)
def test_a_damaged_record_is_refused(cache: Path, content: bytes):
    cache.mkdir()
    (cache / "fetched.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="record of fetched weights is damaged"):
        read_record(cache)


def test_all_files_that_differ_from_the_record_are_named_with_both_digests(cache: Path):
    cache.mkdir()
    for name in "abc":
        (cache / name).write_text(name)
    recorded = {name: hashlib.sha256(name.encode()).hexdigest() for name in "abc"}
    compare(cache, recorded, name="hub:tue/scan", place=cache)
    (cache / "a").write_text("other")
    (cache / "c").unlink()
    with pytest.raises(CheckpointError, match="files of 'hub:tue/scan' are not those of the first fetch") as error:
        compare(cache, recorded, name="hub:tue/scan", place=cache)
    assert f"a: sha256 {hashlib.sha256(b'other').hexdigest()}, recorded {recorded['a']}" in error.value.problem
    assert f"c: sha256 absent, recorded {recorded['c']}" in error.value.problem
    assert recorded["b"] not in error.value.problem
