from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.processes import free_port, run_together

from voxelstem import distributed
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


def numbers(rank: int) -> torch.Tensor:
    return torch.arange(6.0).reshape(3, 2) ** (1 + rank)


def spread(rows: torch.Tensor) -> torch.Tensor:
    """A loss in which every row meets every other."""
    return (rows @ rows.T).tanh().sum()


def talk() -> dict[str, Any]:
    here = distributed.here()
    mine = (numbers(here.rank) / 100).requires_grad_()
    loss = spread(distributed.rows(mine))
    loss.backward()
    before = time.monotonic()
    if here.rank == 0:
        time.sleep(0.3)
    distributed.barrier()
    return {
        "here": (here.rank, here.count),
        "total": distributed.total(numbers(here.rank)),
        "mean": distributed.mean(numbers(here.rank)),
        "rows": distributed.rows(numbers(here.rank)),
        "loss": loss.detach(),
        "gradient": mine.grad,
        "first": distributed.first(numbers(here.rank)),
        "agree": [distributed.agree(flag) for flag in (False, here.rank == 1, True)],
        "said": distributed.said({"who": here.rank, "words": ["Ä", None, 1.5]}),
        "waited": time.monotonic() - before,
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_together(talk, 2, tmp_path_factory.mktemp("talk"))


def test_every_process_knows_its_number(told: list[dict[str, Any]]):
    assert [answer["here"] for answer in told] == [(0, 2), (1, 2)]


def test_statistics_are_of_all_processes(told: list[dict[str, Any]]):
    both = torch.stack([numbers(0), numbers(1)])
    for answer in told:
        assert torch.equal(answer["total"], both.sum(0))
        assert torch.equal(answer["mean"], both.mean(0))
        assert torch.equal(answer["rows"], both.flatten(0, 1))


def test_all_hold_what_process_0_holds(told: list[dict[str, Any]]):
    assert all(torch.equal(answer["first"], numbers(0)) for answer in told)


def test_a_loss_of_all_rows_has_the_gradient_of_one_process_that_holds_them(told: list[dict[str, Any]]):
    whole = (torch.cat([numbers(0), numbers(1)]) / 100).requires_grad_()
    loss = spread(whole)
    loss.backward()
    assert whole.grad is not None
    for rank, answer in enumerate(told):
        assert torch.allclose(answer["loss"], loss.detach())
        # Gradients of parameters are averaged over processes: what reaches a row is two times its share.
        assert torch.allclose(answer["gradient"] / 2, whole.grad[3 * rank : 3 * rank + 3], rtol=1e-5)


def test_what_one_process_must_do_all_do(told: list[dict[str, Any]]):
    assert [answer["agree"] for answer in told] == [[False, True, True]] * 2


def test_all_hear_what_process_0_says(told: list[dict[str, Any]]):
    assert [answer["said"] for answer in told] == [{"who": 0, "words": ["Ä", None, 1.5]}] * 2


def test_a_barrier_waits_for_the_last(told: list[dict[str, Any]]):
    assert told[1]["waited"] >= 0.25


def test_alone_everything_comes_back_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    value = torch.tensor([1.0, 2.0])
    assert distributed.here() == Ranks()
    assert torch.equal(distributed.total(value), value)
    assert torch.equal(distributed.rows(value), value)
    assert torch.equal(distributed.first(value), value)
    assert distributed.agree(True)
    assert not distributed.agree(False)
    assert distributed.said({"a": (1, 2)}) == {"a": [1, 2]}
    with distributed.joined(torch.device("cpu"), timeout_s=1.0) as alone:
        distributed.barrier()
        assert alone == Ranks()


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    named = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (named | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def refusal(device: str = "cpu") -> str:
    with (
        pytest.raises(ConfigError) as error,
        distributed.joined(torch.device(device), timeout_s=1.0),
    ):
        pass
    return str(error.value)


@pytest.mark.parametrize("absent", ["MASTER_ADDR", "MASTER_PORT"])
def test_processes_without_a_place_to_meet_are_refused(second_of_two: pytest.MonkeyPatch, absent: str):
    second_of_two.delenv(absent)
    assert f"{absent} to meet them at is not set" in refusal()


def test_a_process_whose_others_do_not_come_gives_up(second_of_two: pytest.MonkeyPatch):
    assert "process 1 of 2 could not meet the others within 1 s" in refusal()


def test_a_gpu_that_is_not_there_is_refused(second_of_two: pytest.MonkeyPatch):
    if torch.cuda.device_count() > 1:
        pytest.skip("there is a second GPU here")
    assert "process 1 of this machine has no GPU" in refusal("cuda")


def test_the_first_process_of_a_machine_is_the_one_that_torchrun_numbers_so() -> None:
    assert distributed.first_on_machine({})
    assert distributed.first_on_machine({"LOCAL_RANK": "0", "RANK": "8"})
    assert not distributed.first_on_machine({"LOCAL_RANK": "1", "RANK": "1"})
