"""Which of several processes this one is, as torchrun says it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

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
