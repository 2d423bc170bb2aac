from __future__ import annotations

import time

import pytest

from voxelstem.spent import Spent


def test_seconds_and_the_process_s_peak_are_measured() -> None:
    began = time.monotonic()
    held = bytearray(64 << 20)
    time.sleep(0.02)
    found = Spent.since(began)
    assert 0.02 <= found.seconds < 60
    assert len(held) / 2**30 < found.peak_gib < 1024
    assert Spent.since(began).peak_gib >= found.peak_gib


def test_facts_come_back_and_what_nobody_measured_is_none() -> None:
    one = Spent(seconds=12.3456, peak_gib=1.25)
    assert Spent.of(one.facts()) == Spent(seconds=12.346, peak_gib=1.25)
    assert Spent.of({"sub": 1.0, "seconds": 3.0}) is None
    assert str(one) == "12.3 s, process peak 1.2 GiB"


def test_nothing_takes_less_than_no_time() -> None:
    with pytest.raises(ValueError, match="not negative"):
        Spent(seconds=-1.0, peak_gib=0.0)
