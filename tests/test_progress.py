from __future__ import annotations

import io

import pytest
from rich.console import Console

from voxelstem import progress as room
from voxelstem.progress import progress, tell


def lines_of(total: int, notes: list[str]) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    with progress("ingest", total, console=console) as advance:
        for note in notes:
            advance(1, note=note)
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def test_without_a_terminal_a_quick_step_is_one_line():
    (line,) = lines_of(3, ["one", "two", "three"])
    assert line.startswith("ingest 3/3 ")
    assert line.endswith("three")


def test_without_a_terminal_a_long_step_speaks_now_and_then(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "SECONDS_BETWEEN_LINES", 0.0)
    assert [line.split()[1] for line in lines_of(3, ["", "", ""])] == ["1/3", "2/3", "3/3"]


def test_without_a_terminal_a_long_step_says_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "SECONDS_BETWEEN_LINES", 0.0)
    moments = iter([100.0, 110.0, 120.0, 140.0])
    monkeypatch.setattr(room.time, "monotonic", lambda: next(moments))
    first, second, last = lines_of(4, ["loss 1", "", ""])
    assert first == "ingest 1/4 10 s loss 1, about 30 s left"
    assert second == "ingest 2/4 20 s, about 20 s left"
    assert last == "ingest 3/4 40 s, about 13 s left"


def test_what_is_told_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]):
    tell("adapt: 12.3 s [and more]")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "adapt: 12.3 s [and more]\n")


def test_a_note_in_brackets_is_shown_as_it_is():
    assert lines_of(1, ["loss [0.5]"])[0].endswith("loss [0.5]")


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress("ingest", 2, console=console) as advance:
        advance(2, note="kept")
    assert "2/2" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_by_default_nothing_reaches_stdout(capsys: pytest.CaptureFixture[str]):
    with progress("ingest", 1) as advance:
        advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "ingest 1/1" in captured.err
