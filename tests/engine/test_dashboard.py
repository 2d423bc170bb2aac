from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from voxelstem import progress as room
from voxelstem.engine.dashboard import Show, dashboard, happened


def shown(tell: Callable[[Show], None], *, terminal: bool, total: int = 10, start: int = 0) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=130, height=40, color_system=None, legacy_windows=False)
    with dashboard("pretrain tiny", total, start=start, console=console) as show:
        tell(show)
    return file.getvalue()


def test_without_a_terminal_a_quick_run_is_one_line_with_its_last_numbers():
    def tell(show: Show) -> None:
        show(0, {"loss": 0.75, "lr": 0.001, "effective_rank": 23.456})
        show(1, {"loss": 0.5, "lr": 0.002})

    (line,) = shown(tell, terminal=False, total=2).splitlines()
    assert line.startswith("pretrain tiny 2/2 ")
    assert line.endswith("loss 0.5  lr 0.002  effective rank 23.46")


def test_without_a_terminal_what_happened_is_told_at_once():
    def tell(show: Show) -> None:
        show(3, {"skipped": "the loss is not a number", "samples": ["3fa2", "77b1"]})
        show(3, {"step": 3, "rolled_back_to": 2})

    assert shown(tell, terminal=False).splitlines() == [
        "pretrain tiny step 3: skipped the loss is not a number; samples 3fa2, 77b1",
        "pretrain tiny step 3: went back to step 2",
    ]


def test_a_run_that_went_back_counts_its_steps_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "SECONDS_BETWEEN_LINES", 0.0)

    def tell(show: Show) -> None:
        for step in (5, 6, 5, 6):
            show(step, {"loss": 1.0})

    lines = shown(tell, terminal=False, start=5).splitlines()
    assert [line.split()[2] for line in lines] == ["5/10", "6/10", "7/10", "6/10", "7/10"]


def test_a_terminal_shows_the_numbers_of_now_in_groups():
    def tell(show: Show) -> None:
        show(0, {"loss": 0.75, "loss/ibot": 0.25, "probe/patch_knn": 0.2, "kwh": 0.001, "data_wait_share": 0.5})
        show(1, {"loss": 0.625, "energy": "estimated (10 W per busy core)", "probe/patch_knn": 0.375})
        show(4, {"quarantined": "3fa277b1", "reason": "[damaged]"})

    screen = shown(tell, terminal=True)
    for part in ("2/10", "learning", "health", "cost", "loss", "0.625", "ibot", "0.25", "50.0%"):
        assert part in screen
    assert "probe/patch knn 0.375 was 0.2" in screen
    assert "kWh             0.001 estimated" in screen
    assert "step 4: quarantined 3fa277b1; reason [damaged]" in screen


def test_a_terminal_shows_a_run_that_says_nothing_yet():
    assert "0/10" in shown(lambda _: None, terminal=True)


def test_only_words_and_a_way_back_are_worth_a_line():
    assert happened({"loss": 1.0, "samples": ["a"], "energy": "measured (NVML)"}) == ""
    assert happened({"step": 3, "reader": "blosc2 mmap"}) == "reader blosc2 mmap"


def test_nothing_reaches_stdout(capsys: pytest.CaptureFixture[str]):
    with dashboard("pretrain", 1) as show:
        show(0, {"loss": 1.0})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pretrain 1/1" in captured.err
