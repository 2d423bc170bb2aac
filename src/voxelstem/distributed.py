"""Processes that train together: which of them this one is, and what all of them know together.

The only file that speaks torch.distributed's collectives. Alone, every function gives back what it was given.

A loss is written for this process's share so that the MEAN over processes is the loss of the whole batch; gradients
are averaged over processes alike. `rows` makes that true for losses that compare every row with every other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch import distributed as dist

from voxelstem.errors import ConfigError

Item = TypeVar("Item")


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


def here() -> Ranks:
    """Which process this is of those that were joined; 0 of 1 before, and alone."""
    return Ranks(rank=dist.get_rank(), count=dist.get_world_size()) if _joined() else Ranks()


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
