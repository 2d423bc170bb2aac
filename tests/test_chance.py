from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from voxelstem.chance import Chance


def naive_mix(value: int) -> int:
    whole = (1 << 64) - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & whole
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & whole
    return value ^ (value >> 31)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.integers(1, 7))
def test_the_numbers_are_splitmix64_of_key_and_counter(keys: list[int], count: int):
    drawn = Chance(torch.tensor(keys)).uniform(count)
    whole = (1 << 64) - 1
    for row, key in enumerate(keys):
        for column in range(count):
            mixed = naive_mix((key + (column + 1) * 0x9E3779B97F4A7C15) & whole)
            assert drawn[row, column] == (mixed >> 40) / (1 << 24)


@given(st.integers(0, 2**62), st.integers(1, 5), st.integers(1, 5))
def test_shares_of_the_rows_draw_what_all_rows_together_draw(seed: int, here: int, there: int):
    both = Chance.of(seed, count=here + there)
    first, second = Chance.of(seed, count=here), Chance.of(seed, first=here, count=there)
    assert torch.equal(torch.cat([first.uniform(4), second.uniform(4)]), both.uniform(4))
    assert torch.equal(both.part(here, here + there).keys, second.keys)


def test_rows_out_of_a_row_are_view_major_and_do_not_depend_on_the_other_rows():
    both = Chance.of(3, count=4)
    split = torch.stack([Chance.of(3, first=at, count=2).each(3).keys.view(3, 2) for at in (0, 2)], 1)
    assert torch.equal(both.each(3).keys.view(3, 2, 2), split)
    assert len(set(both.each(3).keys.tolist()) | set(both.keys.tolist())) == 16


def test_another_purpose_or_seed_draws_other_numbers():
    chance = Chance.of(0, count=8)
    assert not torch.equal(chance.uniform(3), chance.purpose("mask").uniform(3))
    assert not torch.equal(chance.uniform(3), Chance.of(1, count=8).uniform(3))
    assert torch.equal(chance.purpose("mask").uniform(3), Chance.of(0, count=8).purpose("mask").uniform(3))


@pytest.mark.parametrize("by_rows", [True, False])
def test_numbers_are_uniform_or_normal_along_rows_and_along_counters(by_rows: bool):
    chance = Chance.of(7, count=20000 if by_rows else 1)
    count = 1 if by_rows else 20000
    assert stats.kstest(chance.uniform(count).flatten().numpy(), "uniform").pvalue > 1e-3
    normal = chance.normal(count).flatten().numpy()
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert np.isfinite(normal).all()


def test_an_odd_number_of_normal_draws_is_the_wanted_number():
    assert Chance.of(1, count=2).normal(5).shape == (2, 5)


def test_each_row_has_a_generator_of_its_own():
    one, two = (torch.rand(3, generator=generator) for generator in Chance.of(5, count=2).generators())
    assert not torch.equal(one, two)
    assert torch.equal(two, torch.rand(3, generator=Chance.of(5, first=1).generators()[0]))
