"""Say how far a long step is: a bar on a terminal, a line every few seconds elsewhere. Always on stderr."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    """Report `amount` more items done; `note` is a short fact, such as a loss, and never an identity."""

    def __call__(self, amount: int = 1, note: str = "") -> None:
        """Move on."""
        ...


@contextmanager
def progress(title: str, total: int, *, console: Console | None = None) -> Generator[Advance]:
    """Show the progress of `total` items under `title` while the block runs.

    >>> with progress("ingest", 3) as advance:
    ...     for _ in range(3):
    ...         advance(1, note="kept")
    """
    console = console or Console(stderr=True, highlight=False)
    if console.is_terminal:
        with _bar(title, total, console) as advance:
            yield advance
    else:
        yield _Lines(title, total, console)


def tell(line: str, *, console: Console | None = None) -> None:
    """Say one line beside the answer of a command: on stderr, as progress is."""
    (console or Console(stderr=True, highlight=False)).print(line, markup=False, soft_wrap=True)


@contextmanager
def _bar(title: str, total: int, console: Console) -> Generator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(amount: int = 1, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        yield advance


class _Lines:
    """One line at the end, and one every few seconds before it."""

    def __init__(self, title: str, total: int, console: Console) -> None:
        self.title, self.total, self.console = title, total, console
        self.done = 0
        self.began = self.spoke = time.monotonic()

    def __call__(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if self.done >= self.total or now - self.spoke >= SECONDS_BETWEEN_LINES:
            self.spoke = now
            spent = now - self.began
            left = spent / self.done * (self.total - self.done) if self.done else 0.0
            line = f"{self.title} {self.done}/{self.total} {spent:.0f} s {note}".rstrip()
            line += f", about {left:.0f} s left" if left >= 1 else ""
            self.console.print(line, markup=False, soft_wrap=True)
