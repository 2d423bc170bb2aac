from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.distributed import Ranks, ranks
from voxelstem.errors import ConfigError


@given(st.integers(1, 9), st.integers(0, 40))
def test_the_shares_of_all_ranks_are_everything_once(count: int, size: int):
    items = list(range(size))
    shares = [Ranks(rank=rank, count=count).share(items) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_torchrun_s_environment_is_read():
    assert ranks({"RANK": "2", "WORLD_SIZE": "4"}) == Ranks(rank=2, count=4)


@pytest.mark.parametrize("environ", [{}, {"RANK": "1"}, {"WORLD_SIZE": "4"}, {"RANK": "", "WORLD_SIZE": ""}])
def test_without_both_a_process_is_alone(environ: dict[str, str]):
    assert ranks(environ) == Ranks(rank=0, count=1)


@pytest.mark.parametrize(("rank", "count"), [("2", "2"), ("x", "2"), ("0", "-1"), ("0", "0"), ("1.5", "2")])
def test_an_impossible_rank_is_a_clear_error(rank: str, count: str):
    with pytest.raises(ConfigError, match="no process among several"):
        ranks({"RANK": rank, "WORLD_SIZE": count})
