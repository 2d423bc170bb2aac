from __future__ import annotations

import io

import pytest
from rich.console import Console

from voxelstem import progress as room
from voxelstem.progress import progress


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
