"""What the records of `findings` may hold: finite numbers, shares, intervals, levels, names and keys."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

LONGEST_NAME = 64
"""Characters: what DICOM's LO holds, so that a name is the same in every format."""

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_numbers(record: Any) -> None:
    """Accept records of Python's own numbers alone, finite ones, so that every format writes the same.

    Raises:
        ValueError: a field holds anything else.
    """
    for one in dataclasses.fields(record):
        value = getattr(record, one.name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, str | int | float | None) or (
                isinstance(number, float) and not math.isfinite(number)
            ):
                raise ValueError(f"{one.name} must be a finite number")


def check_share(name: str, share: float) -> None:
    """Accept a share or probability.

    Raises:
        ValueError: it lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {share}")


def check_interval(value: float, low: float | None, high: float | None) -> None:
    """Accept an interval that holds its value, or none.

    Raises:
        ValueError: one end alone, or ends that leave the value out.
    """
    if (low is None) != (high is None):
        raise ValueError("an interval has two ends, low and high")
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"the interval from {low} to {high} leaves out {value}")


def check_level(level: float | None, *, wanted: bool) -> None:
    """Accept a level strictly between 0 and 1; it is `wanted` where something is made to cover a share of cases.

    Raises:
        ValueError: it is wanted and missing, or outside (0, 1).
    """
    if wanted and level is None:
        raise ValueError("an interval or a conformal set needs the level that it is made to cover")
    if level is not None and not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def check_name(name: str, text: str, *, most: int = LONGEST_NAME) -> None:
    """Accept one printable line of at most `most` characters.

    Raises:
        ValueError: it is empty, longer, or not one printable line.
    """
    if not (0 < len(text) <= most and text.isprintable() and text.strip() == text):
        raise ValueError(f"{name} must be 1 to {most} printable characters on one line")


def check_key(name: str, key: str) -> None:
    """Accept a pseudonymous key or a UID: nothing that could be a name or a path.

    Raises:
        ValueError: it is none.
    """
    # Neither a person's name (it has a caret, a comma or a space) nor a path gets through.
    if not _KEY.fullmatch(key):
        raise ValueError(f"{name} must be a pseudonymous key or a UID: at most 64 letters, digits, dots, - and _")
