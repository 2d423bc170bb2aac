"""Random numbers by key: what a row draws depends on its key only, never on the rows beside it, process or device.

A generator hands out its numbers in order, so what a sample gets would depend on how a batch is shared out among
processes. Here every number is a hash of a key and a counter (Salmon et al. 2011, Parallel random numbers: as easy as
1, 2, 3), with the finalizer of SplitMix64 (Steele et al. 2014) as the hash.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GAMMA, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""SplitMix64's constants, as the signed integers that torch has."""


@dataclass(frozen=True, slots=True, eq=False)
class Chance:
    """One key for each row."""

    keys: Int64[Tensor, " row"]

    @classmethod
    def of(cls, seed: int, *, first: int = 0, count: int = 1) -> Chance:
        """Keys of rows number `first` to `first + count` of all that belong to this seed."""
        start = int.from_bytes(hashlib.sha256(f"voxelstem rows {seed}".encode()).digest()[:8], "little", signed=True)
        return cls(_mix(torch.arange(first, first + count) * _GAMMA + start))

    def __len__(self) -> int:
        """Rows."""
        return len(self.keys)

    def to(self, device: torch.device) -> Chance:
        """The same keys on the device, where everything drawn from them lies too."""
        return Chance(self.keys.to(device))

    def purpose(self, name: str) -> Chance:
        """Other numbers for the same rows. Draws for different purposes never meet."""
        salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
        return Chance(_mix(self.keys ^ salt))

    def part(self, start: int, stop: int) -> Chance:
        """Some of the rows."""
        return Chance(self.keys[start:stop])

    def each(self, count: int) -> Chance:
        """`count` rows out of every row: all rows' first, then all rows' second, and so on (view-major)."""
        return Chance(self._numbers(count).T.flatten())

    def blocks(self, count: int) -> Chance:
        """`count` rows out of every row, one row's next to each other (row-major)."""
        return Chance(self._numbers(count).flatten())

    def uniform(self, count: int) -> Float[Tensor, "row count"]:
        """`count` numbers in [0, 1) for every row."""
        return ((self._numbers(count) >> 40) & 0xFFFFFF).float() / (1 << 24)

    def normal(self, count: int) -> Float[Tensor, "row count"]:
        """`count` standard normal numbers for every row (Box and Muller 1958)."""
        half = (count + 1) // 2
        one, two = self.uniform(2 * half).split(half, dim=1)
        # 1 - u lies in (0, 1], whose logarithm is finite.
        radius, angle = (-2 * (1 - one).log()).sqrt(), 2 * math.pi * two
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]

    def generators(self) -> list[torch.Generator]:
        """A CPU generator for every row, for what is drawn one by one."""
        return [torch.Generator().manual_seed(key & (1 << 63) - 1) for key in self.keys.tolist()]

    def _numbers(self, count: int) -> Int64[Tensor, "row count"]:
        return _mix(self.keys[:, None] + torch.arange(1, count + 1, device=self.keys.device) * _GAMMA)


def _mix(values: Int64[Tensor, "*rows"]) -> Int64[Tensor, "*rows"]:
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Int64[Tensor, "*rows"], bits: int) -> Int64[Tensor, "*rows"]:
    """Shift to the right without a sign: torch shifts signed integers only."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
