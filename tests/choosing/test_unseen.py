from __future__ import annotations

import pytest

from voxelstem.choosing.unseen import NO_WIDTH, has_width, not_seen
from voxelstem.metrics import Interval


def of(estimate: float, low: float | None, high: float | None, note: str = "") -> Interval:
    return Interval(estimate=estimate, low=low, high=high, subjects=13, note=note)


@pytest.mark.parametrize(
    ("value", "wide"),
    [
        (of(0.9, 0.8, 1.0), True),
        (of(1.0, 1.0, 1.0), False),
        (of(1.0, 1.0 - 1e-15, 1.0), False),
        (of(1.0, None, None, "n=2, no interval"), False),
    ],
)
def test_only_an_interval_with_a_width_tells_of_errors_that_were_not_seen(value: Interval, wide: bool) -> None:
    assert has_width(value) is wide


def test_what_was_not_seen_is_said_and_what_would_show_it() -> None:
    end = "more labels or more test subjects would tell"
    perfect = f"by auroc no error was seen among 13 subjects, and {NO_WIDTH}: {end}"
    assert not_seen(of(1.0, 1.0, 1.0), "auroc") == perfect
    assert not_seen(of(0.0, 0.0, 0.0), "mae").startswith("by mae no error was seen among 13 subjects, and ")
    alike = f"all resamples of 13 subjects say dice 0.7, and {NO_WIDTH}: {end}"
    assert not_seen(of(0.7, 0.7, 0.7), "dice:liver") == alike.replace("dice", "dice:liver")
    assert not_seen(of(0.7, 0.6, 0.8), "dice", alike="the same").startswith(
        "all resamples of 13 subjects say the same,"
    )
    none = not_seen(of(1.0, None, None, "n=2, no interval"), "auroc")
    assert none.endswith(f"without an interval nobody knows how rare errors are: {end}")
