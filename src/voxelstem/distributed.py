"""Processes that train together: how they meet, which of them this one is, and what all of them know together.

The only file that speaks torch.distributed's collectives. Alone, every function gives back what it was given.

A loss is written for this process's share so that the MEAN over processes is the loss of the whole batch; gradients
are averaged over processes alike. `rows` makes that true for losses that compare every row with every other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from voxelstem.errors import ConfigError

Item = TypeVar("Item")

_left: list[Any] = []
"""Groups outlive all who use them. If a DDP module is the last to let go of one, its end can wait for a thread of the
group that waits for the interpreter, which the module's end holds: for ever (seen with torch 2.13)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among `count`; one alone is number 0 of 1."""

    rank: int = 0
    count: int = 1

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every `count`-th of the items, from number `rank` on: together all of them, each once."""
        return list(items[self.rank :: self.count])


def ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Read RANK and WORLD_SIZE; without both this process is alone.

    Raises:
        ConfigError: they are no numbers, or no rank of that world.
    """
    rank, count = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    if not rank or not count:
        return Ranks()
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={count} in the environment name no process among several",
            hint="start the processes with torchrun, or unset both",
        )
    return Ranks(rank=int(rank), count=int(count))


@contextmanager
def joined(device: torch.device, *, timeout_s: float) -> Generator[Ranks]:
    """Join the processes that torchrun started with this one, and leave them at the end; alone, nothing is done.

    On GPUs each process takes the one of its number on its machine, and `cuda` means that one from here on. A process
    that waits longer than `timeout_s` for the others in any of the functions below gives up with an error.

    Raises:
        ConfigError: the environment names no meeting place, the others do not come, or there are too few GPUs.
    """
    wanted = ranks()
    if wanted.count == 1:
        yield wanted
        return
    _check_meeting()
    if device.type == "cuda":
        _take_gpu(int(os.environ.get("LOCAL_RANK", wanted.rank)))
    # Statistics lie where the batch lies, decisions and small words on the CPU.
    backend, timeout = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(rendezvous("env://", wanted.rank, wanted.count, timeout=timeout))
        # Torchrun's own store lives on when it starts the processes again, and still holds addresses of dead ones.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=wanted.rank, world_size=wanted.count, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        # A timeout, a name that does not resolve and a refused connection are all RuntimeErrors of torch.
        raise ConfigError(
            f"process {wanted.rank} of {wanted.count} could not meet the others within {timeout_s:g} s: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="start all of them with torchrun, and let their machines reach each other at MASTER_ADDR:MASTER_PORT",
        ) from error
    _left.append(dist.group.WORLD)
    try:
        yield wanted
    finally:
        dist.destroy_process_group()


def _check_meeting() -> None:
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise ConfigError(
            f"WORLD_SIZE says that there are other processes, but {' and '.join(absent)} to meet them at is not set",
            hint="start the processes with torchrun, or unset RANK and WORLD_SIZE",
        )


def _take_gpu(number: int) -> None:
    count = torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"process {number} of this machine has no GPU: torch sees {count}",
            hint="start at most one process for each GPU (torchrun --nproc-per-node), or set device=cpu",
        )
    torch.cuda.set_device(number)


def here() -> Ranks:
    """Which process this is of those that were joined; 0 of 1 before, and alone."""
    return Ranks(rank=dist.get_rank(), count=dist.get_world_size()) if _joined() else Ranks()


def first_on_machine(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of those that torchrun started on this machine; alone it is."""
    return environ.get("LOCAL_RANK", "0") == "0"


def total(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all processes, for statistics: no gradient flows."""
    value = value.detach().clone()
    if _joined():
        dist.all_reduce(value)
    return value


def mean(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The mean over all processes, for statistics: no gradient flows."""
    return total(value) / here().count


def rows(value: Shaped[Tensor, "row *rest"]) -> Shaped[Tensor, "all *rest"]:
    """The rows of all processes, in the order of their ranks; every process holds equally many.

    A loss that every process computes of all rows has, averaged over processes, the gradient of one process that
    holds them all: what each process's loss says about a row is summed on its way back.
    """
    if not _joined():
        return value
    gathered: Any = _Rows.apply(value)
    return gathered


def first(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """What process 0 holds, to all; the others' is not looked at."""
    value = value.detach().clone()
    if _joined():
        dist.broadcast(value, src=0)
    return value


def agree(flag: bool) -> bool:
    """Whether any process says yes: what one of them must do, all do."""
    return bool(total(torch.tensor(int(flag))) > 0)


def barrier() -> None:
    """Wait until every process is here."""
    agree(False)


def said(value: Any) -> Any:
    """What process 0 says, to all. `value` is small and made of what JSON knows; the others' is not looked at."""
    text = json.dumps(value).encode() if here().rank == 0 else b""
    if _joined():
        letters = torch.zeros(int(total(torch.tensor(len(text)))), dtype=torch.uint8)
        if text:
            letters = torch.tensor(list(text), dtype=torch.uint8)
        dist.broadcast(letters, src=0)
        text = bytes(letters.tolist())
    return json.loads(text)


def each(value: Any) -> list[Any]:
    """What every process says, to all, in the order of their ranks; small values made of what JSON knows."""
    everybody: list[Any] = [None] * here().count
    if not _joined():
        return [value]
    # Torch packs objects by pickle: words only are given to it.
    dist.all_gather_object(everybody, json.dumps(value))
    return [json.loads(words) for words in everybody]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.rows = len(value)
        parts = [torch.empty_like(value) for _ in range(here().count)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = here().rank * ctx.rows
        return gradient[start : start + ctx.rows]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
