"""Blocks of several scans packed into one pass of the network. Blocks of one value are computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Windowed blocks (row, channel, i, j, k) to cls (row, dim) and patch tokens (row, patch, dim)."""
MOST_KNOWN = 16
"""Constant blocks that are remembered: nearly all hold air, or what the window clips."""


class Taker(Protocol):
    """Whose blocks they are: gets each one's tokens, in any order."""

    def take(self, index: int, cls: Float[Tensor, " dim"], patches: Float[Tensor, "patch dim"]) -> None:
        """Take the tokens of block `index`. They stand in memory that is not to be kept."""
        ...


class Packer:
    """Collects blocks and sends them through the network `per_pass` at a time."""

    def __init__(self, encode: Encode, *, per_pass: int) -> None:
        """Name the network.

        Raises:
            ValueError: passes of no block.
        """
        if per_pass < 1:
            raise ValueError(f"per_pass must be at least 1, got {per_pass}")
        self.encode, self.per_pass = encode, per_pass
        self.computed = self.reused = 0
        """Blocks that went through the network, and constant ones that did not have to."""
        self._waiting: list[tuple[Taker, int, Tensor]] = []
        self._known: OrderedDict[tuple[float, tuple[int, ...]], tuple[Tensor, Tensor]] = OrderedDict()

    def put(self, taker: Taker, start: int, blocks: Float[Tensor, "n channel i j k"]) -> None:
        """Add blocks that are numbers `start` and up of their scan; run every pass that is full."""
        flat = blocks.flatten(1)
        least, most = flat.amin(dim=1), flat.amax(dim=1)
        for index, (block, low, high) in enumerate(zip(blocks, least.tolist(), most.tolist(), strict=True), start):
            if low == high:
                taker.take(index, *self._constant(block, low))
                continue
            self._waiting.append((taker, index, block))
            if len(self._waiting) == self.per_pass:
                self.flush()

    def flush(self) -> None:
        """Run what waits as a pass of its own."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        cls, patches = self.encode(torch.stack([block for _, _, block in waiting]))
        self.computed += len(waiting)
        for row, (taker, index, _) in enumerate(waiting):
            taker.take(index, cls[row].float(), patches[row].float())

    def _constant(self, block: Tensor, value: float) -> tuple[Tensor, Tensor]:
        """Tokens of a block of one value: from a pass of its own, so that they never depend on who asked first."""
        place = value, tuple(block.shape)
        found = self._known.get(place)
        if found is None:
            cls, patches = self.encode(block[None])
            self.computed += 1
            found = self._known[place] = cls[0].float(), patches[0].float()
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        else:
            self.reused += 1
        return found
