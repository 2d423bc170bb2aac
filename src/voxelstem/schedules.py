"""Schedules are functions of progress in [0, 1], never of epochs."""

from __future__ import annotations

import math


def cosine(progress: float, *, start: float, end: float) -> float:
    """Glide from `start` to `end` while `progress` runs from 0 to 1."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def warm_up_cosine(progress: float, *, warm_up: float, peak: float, end: float) -> float:
    """Rise linearly from 0 to `peak` over the first `warm_up` share, then glide down to `end`."""
    if progress < warm_up:
        return peak * progress / warm_up
    return cosine((progress - warm_up) / (1 - warm_up), start=peak, end=end)


def linear(progress: float, *, start: float, end: float, share: float = 1.0) -> float:
    """Move from `start` to `end` over the first `share` of the run, then stay."""
    done = min(progress / share, 1.0) if share > 0 else 1.0
    return start + (end - start) * done
