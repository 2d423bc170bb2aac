"""How a run goes, while it goes: a panel on a terminal, a line every few seconds elsewhere. Always on stderr."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from voxelstem.distributed import here
from voxelstem.progress import Advance, progress

Fact = object
_NOTES = 5
"""Lines about what happened, the newest last, that stay in sight."""
_IN_LINE = ("loss", "lr", "grad_norm", "probe/patch_balanced_accuracy", "effective_rank", "samples_per_s", "kwh")
_GROUPS = {
    "learning": ("loss", "lr", "grad_norm"),
    "health": ("effective_rank", "spread", "entropy", "gram_drift", "probe"),
    "cost": ("samples_per_s", "data_wait_share", "data_wait_s", "kwh", "read_gb", "read_gb_per_s", "look_seconds"),
}
"""Which names, and all that begin with them and a `/`, stand together; what belongs nowhere is learning's."""


class Show(Protocol):
    """Tell the facts of a step: what its line in the journal holds."""

    def __call__(self, step: int, facts: Mapping[str, Fact]) -> None:
        """Numbers replace those of the same name; words are something that happened, and stay in sight a while."""
        ...


@contextmanager
def dashboard(title: str, total: int, *, start: int = 0, console: Console | None = None) -> Generator[Show]:
    """Show a run of `total` steps, of which `start` were done before, while the block runs.

    Of several processes that train together only the first one speaks.

    >>> with dashboard("pretrain tiny", 2) as show:
    ...     show(0, {"loss": 0.7, "lr": 1e-3})
    ...     show(1, {"loss": 0.6, "probe/patch_knn": 0.31})
    """
    console = console or Console(stderr=True, highlight=False)
    if here().rank != 0:
        yield _silent
    elif console.is_terminal:
        panel = _Panel(title, total, start)
        with Live(get_renderable=panel.drawn, console=console, refresh_per_second=2):
            yield panel
    else:
        with progress(title, total, console=console) as advance:
            yield _Lines(title, start, advance, console)


def _silent(step: int, facts: Mapping[str, Fact]) -> None:
    del step, facts


class _Lines:
    """A line for what happened at once, for the numbers every few seconds."""

    def __init__(self, title: str, start: int, advance: Advance, console: Console) -> None:
        self._title, self._advance, self._console = title, advance, console
        self._done = 0
        self._last: dict[str, float] = {}
        self._move(start, "")

    def __call__(self, step: int, facts: Mapping[str, Fact]) -> None:
        if note := happened(facts):
            self._console.print(f"{self._title} step {step}: {note}", markup=False, soft_wrap=True)
        self._last |= _numbers(facts)
        if "loss" in facts:
            told = (f"{_short(name)} {_say(self._last[name])}" for name in _IN_LINE if name in self._last)
            self._move(step + 1, "  ".join(told))

    def _move(self, done: int, note: str) -> None:
        # Backwards where the run went back to a checkpoint.
        amount, self._done = done - self._done, done
        if amount:
            self._advance(amount, note)


class _Panel:
    """The numbers of now in groups, each beside what it was when it was first told."""

    def __init__(self, title: str, total: int, start: int) -> None:
        self._title = title
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._energy = ""
        self._notes: deque[str] = deque(maxlen=_NOTES)
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
        self._bar = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=False), expand=True)
        self._task = self._bar.add_task(title, total=total, completed=start)

    def __call__(self, step: int, facts: Mapping[str, Fact]) -> None:
        numbers = _numbers(facts)
        self._first = numbers | self._first
        self._last |= numbers
        # How it was found out, without the details in brackets.
        self._energy = re.sub(r" \([^)]*\)", "", str(facts.get("energy", self._energy)))
        if note := happened(facts):
            self._notes.append(f"{time.strftime('%H:%M:%S')} step {step}: {note}")
        if "loss" in facts:
            self._bar.update(self._task, completed=step + 1)

    def drawn(self) -> Panel:
        """Draw it; this is only done as often as the screen is renewed."""
        table = Table.grid(padding=(0, 3), expand=True)
        groups = self._groups()
        for _ in groups:
            table.add_column(ratio=1)
        table.add_row(*(self._group(name, numbers) for name, numbers in groups.items()))
        notes = [Text(note, style="yellow", overflow="ellipsis", no_wrap=True) for note in self._notes]
        return Panel(Group(self._bar, Text(), table, *notes), title=Text(self._title), title_align="left")

    def _groups(self) -> dict[str, list[str]]:
        placed: dict[str, list[str]] = {group: [] for group in _GROUPS}
        for name in self._last:
            family = name.partition("/")[0]
            placed[next((group for group, names in _GROUPS.items() if family in names), "learning")].append(name)
        return {group: names for group, names in placed.items() if names}

    def _group(self, title: str, names: list[str]) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_row(Text(title, style="bold"))
        for name in names:
            began = f"was {_say(self._first[name])}" if title == "health" else self._beside(name)
            table.add_row(Text(_short(name), style="dim"), _say(self._last[name], name), Text(began, style="dim"))
        return table

    def _beside(self, name: str) -> str:
        return self._energy if name == "kwh" else ""


def happened(facts: Mapping[str, Fact]) -> str:
    """Something that is worth a line: words among the facts, and where a run went back to; else nothing."""
    words = [f"{name} {value}" for name, value in facts.items() if isinstance(value, str) and name != "energy"]
    if not words and "rolled_back_to" not in facts:
        return ""
    lists = [
        f"{name} {', '.join(map(str, value))}"  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        for name, value in facts.items()
        if isinstance(value, list | tuple)
    ]
    back = [f"went back to step {facts['rolled_back_to']}"] if "rolled_back_to" in facts else []
    return "; ".join(back + words + lists)


def _numbers(facts: Mapping[str, Fact]) -> dict[str, float]:
    plain = {name: value for name, value in facts.items() if name not in ("step", "seconds", "rolled_back_to")}
    return {n: float(v) for n, v in plain.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _short(name: str) -> str:
    short = name.removeprefix("loss/").replace("patch_balanced_accuracy", "patch").replace("_", " ")
    return short.replace("kwh", "kWh").replace("gb", "GB")


def _say(value: float, name: str = "") -> str:
    return f"{value:.1%}" if name == "data_wait_share" else f"{value:.4g}"
