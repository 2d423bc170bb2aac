from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.store.plans import epoch_order

MASK = 2**64 - 1
GOLDEN = [2, 1, 5, 3, 0, 7, 4, 6]


def mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_the_hash_is_splitmix64():
    # The first numbers of Vigna's splitmix64.c for seed 0.
    assert [mixed(n * 0x9E3779B97F4A7C15 & MASK) for n in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(st.integers(0, 300), st.integers(0, 2**62), st.integers(0, 1000))
def test_an_epoch_visits_every_place_once(count, seed, epoch):
    assert sorted(epoch_order(count, seed=seed, epoch=epoch).tolist()) == list(range(count))


def test_the_order_is_the_one_that_loops_find():
    key = hashlib.sha256(b"voxelstem epoch 7 3").digest()
    first, second = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")
    wanted = sorted(range(200), key=lambda at: mixed(mixed(at ^ first) ^ second))
    assert epoch_order(200, seed=7, epoch=3).tolist() == wanted


def test_the_order_never_changes():
    assert epoch_order(8, seed=1, epoch=0).tolist() == GOLDEN


def test_epochs_and_seeds_are_unlike():
    orders = [epoch_order(2000, seed=seed, epoch=epoch) for seed in (1, 2) for epoch in (0, 1)]
    for at, one in enumerate(orders):
        for two in orders[at + 1 :]:
            assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
        assert abs(np.corrcoef(one, np.arange(2000))[0, 1]) < 0.1


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count must be >= 0"):
        epoch_order(-1, seed=0, epoch=0)
