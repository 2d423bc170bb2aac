"""Schedules are functions of progress in [0, 1], never of epochs."""

from __future__ import annotations

import math
from typing import Literal

Tuning = Literal["default", "warm_up", "frozen", "valley", "sawtooth"]
"""How the learning rates of a pretrained encoder and of what is new above it run, see `tuning`."""


def cosine(progress: float, *, start: float, end: float) -> float:
    """Glide from `start` to `end` while `progress` runs from 0 to 1."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def warm_up_cosine(progress: float, *, warm_up: float, peak: float, end: float) -> float:
    """Rise linearly from 0 to `peak` over the first `warm_up` share, then glide down to `end`."""
    if progress < warm_up:
        return peak * progress / warm_up
    return cosine((progress - warm_up) / (1 - warm_up), start=peak, end=end)


def warm_up_poly(progress: float, *, warm_up: float, peak: float, end: float, power: float = 0.9) -> float:
    """Rise linearly from 0 to `peak` over the first `warm_up` share, then fall to `end` as (1 - share)^power."""
    if progress < warm_up:
        return peak * progress / warm_up
    return end + (peak - end) * max(1 - (progress - warm_up) / (1 - warm_up), 0.0) ** power


def linear(progress: float, *, start: float, end: float, share: float = 1.0) -> float:
    """Move from `start` to `end` over the first `share` of the run, then stay."""
    done = min(progress / share, 1.0) if share > 0 else 1.0
    return start + (end - start) * done


def tuning(progress: float, *, kind: Tuning, warm_up: float) -> tuple[float, float]:
    """Shares of the peak rate for a pretrained encoder and for the rest, while the whole network is fine-tuned.

    Wald et al. 2025 (arXiv 2412.17041, fine-tuning schedules). `default` decays as `warm_up_poly` does; `frozen` too,
    with an encoder that stays; `warm_up` rises linearly over the share `warm_up` first. `valley` and `sawtooth` first
    teach the rest alone for another such share: falling to 0 in a valley, rising to the peak in a sawtooth.

    Raises:
        ValueError: phases that leave no room for the decay.
    """
    before = {"default": 0.0, "frozen": 0.0, "warm_up": warm_up}.get(kind, 2 * warm_up)
    if not 0 <= before < 1:
        raise ValueError(f"warm_up must leave a part of the run to {kind}, got {warm_up}")
    if progress >= before:
        rate = warm_up_poly((progress - before) / (1 - before), warm_up=0.0, peak=1.0, end=0.0)
        return (0.0 if kind == "frozen" else rate), rate
    if kind == "warm_up":
        return progress / warm_up, progress / warm_up
    if progress >= warm_up:
        return progress / warm_up - 1, progress / warm_up - 1
    alone = progress / warm_up
    return 0.0, (1 - alone if kind == "valley" else alone)
