from __future__ import annotations

import csv
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from voxelstem.distributed import Ranks
from voxelstem.errors import ConfigError
from voxelstem.manifest import COLUMNS, add_rows, claim, read_rows, write_whole

ALONE = Ranks()
SETTINGS = {"weights": "abc", "precision": "fp32", "spacing_mm": (1.0, 1.0, 2.0)}


def take(out: Path, settings: dict[str, object] = SETTINGS, *, ranks: Ranks = ALONE, found: str = "lean") -> str:
    return claim(out, settings, lambda claimed: claimed or found, ranks)


def test_rows_that_come_later_keep_the_earlier_ones(tmp_path: Path):
    take(tmp_path)
    add_rows(tmp_path, [{"source": "a", "key": "1", "code": ""}, {"source": "b", "code": "corrupt"}])
    add_rows(tmp_path, [{"source": "b", "key": "2", "code": ""}, {"source": "c", "key": "3", "code": ""}])
    assert {name: row["key"] for name, row in read_rows(tmp_path).items()} == {"a": "1", "b": "2", "c": "3"}
    with (tmp_path / "manifest.csv").open(encoding="utf-8") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS


def test_a_table_of_before_without_the_newer_columns_is_read(tmp_path: Path):
    take(tmp_path)
    (tmp_path / "manifest.csv").write_text("source,key,code\na,1,\n", encoding="utf-8")
    add_rows(tmp_path, [{"source": "b", "key": "2"}])
    assert [row["stamp"] for row in read_rows(tmp_path).values()] == ["", ""]


def _write_many(out: Path, first: int) -> None:
    for number in range(first, first + 20):
        add_rows(out, [{"source": f"{number:03d}", "key": str(number)}])


def test_processes_that_write_at_once_lose_no_row(tmp_path: Path):
    take(tmp_path)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, first)) for first in (0, 20, 40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert list(read_rows(tmp_path)) == [f"{number:03d}" for number in range(60)]


def test_a_folder_remembers_how_it_was_made(tmp_path: Path):
    assert take(tmp_path / "out") == "lean"
    assert take(tmp_path / "out", found="reference") == "lean"
    assert json.loads((tmp_path / "out" / "embed.json").read_text()) == {
        "weights": "abc",
        "precision": "fp32",
        "spacing_mm": [1.0, 1.0, 2.0],
        "compute": "lean",
    }
    with pytest.raises(ConfigError, match="other settings: weights, precision"):
        take(tmp_path / "out", SETTINGS | {"weights": "b", "precision": "bf16"})


def test_a_mark_of_before_agrees_in_what_it_does_not_name(tmp_path: Path):
    (tmp_path / "embed.json").write_text('{"weights": "abc", "precision": "fp32"}')
    assert take(tmp_path) == "lean"
    with pytest.raises(ConfigError, match="other settings: weights"):
        take(tmp_path, SETTINGS | {"weights": "b"})


@pytest.mark.parametrize("damaged", [b"", b'{"weights": ', b"\xff\xfe", b"[]"])
def test_a_damaged_mark_is_refused_and_left_as_it_is(tmp_path: Path, damaged: bytes):
    (tmp_path / "embed.json").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"embed\.json in '.*' is damaged"):
        take(tmp_path)
    assert (tmp_path / "embed.json").read_bytes() == damaged


def test_other_processes_wait_for_the_first_and_do_as_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("voxelstem.manifest.SECONDS_FOR_FIRST", 0.05)
    with pytest.raises(ConfigError, match="did not begin"):
        take(tmp_path / "out", ranks=Ranks(rank=1, count=2))
    take(tmp_path / "out", ranks=Ranks(rank=0, count=2))
    assert take(tmp_path / "out", ranks=Ranks(rank=1, count=2), found="openvino") == "lean"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["embed.json"]


def test_a_file_is_whole_or_not_there(tmp_path: Path):
    write_whole(tmp_path / "a", b"old")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "a", b"new")
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_two_that_begin_at_once_the_slower_takes_the_way_of_the_faster(tmp_path: Path):
    def choose(claimed: str) -> str:
        if not claimed:  # the other one claims the folder while this one measures
            take(tmp_path, found="lean")
        return claimed or "reference"

    assert claim(tmp_path, SETTINGS, choose, ALONE) == "lean"


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b"key,code\n1,\n"])
def test_a_table_that_is_damaged_is_a_clear_error(tmp_path: Path, damaged: bytes):
    (tmp_path / "manifest.csv").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"manifest\.csv in '.*' is damaged"):
        read_rows(tmp_path)


def test_what_a_killed_process_left_is_cleared_after_an_hour(tmp_path: Path):
    take(tmp_path)
    kept = {"embed.json", "manifest.csv", "k.npz", ".k.npz.7.unfinished", ".notes"}
    gone = {".k.npz.8.unfinished", ".manifest.csv.8.unfinished", ".embed.json.8", "..embed.json.8.8.unfinished"}
    for name in (kept | gone) - {"embed.json"}:
        (tmp_path / name).write_bytes(b"half")
    before = time.time() - 3700
    for name in (kept | gone) - {".k.npz.7.unfinished"}:
        os.utime(tmp_path / name, (before, before))
    take(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_folder_should_be_is_named_as_such(tmp_path: Path, below: str):
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is a file, or lies below one") as error:
        take(tmp_path / "out" / below)
    assert "another --out" in error.value.hint
    with pytest.raises(ConfigError, match="is a file, or lies below one"):
        read_rows(tmp_path / "out" / below)
    assert (tmp_path / "out").read_bytes() == b"mine"
