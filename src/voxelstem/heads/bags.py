"""A scan as a bag of frozen vectors: its blocks or its patches, for heads that look at them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from voxelstem.protocols import Features

Kind = Literal["blocks", "tokens", "scan"]
"""What a bag holds."""
Wanted = Literal["auto", "blocks", "tokens"]
"""What it is to hold; `auto` leaves that to `kind_of`."""


@runtime_checkable
class Blocked(Protocol):
    """Features of a scan that was seen in blocks; `embedding.Embedding` is one."""

    @property
    def blocks(self) -> Float[np.ndarray, "member dim"]:
        """One vector for each block, in grid order (C-order, k fastest)."""
        ...

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks along each axis."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bag:
    """The vectors of one scan, and how they lie in it."""

    kind: Kind
    members: Float[np.ndarray, "member dim"]
    grid: tuple[int, int, int]
    """Members along each axis, in C-order: `weights.reshape(grid)` lays their shares out as they lie in the scan."""


def kind_of(features: Sequence[Features], wanted: Wanted) -> Kind:
    """What the bags of these scans hold, the same for all of them.

    `auto`: blocks if more than half of the scans have several, else patch tokens. Of what is one vector and nothing
    else (volumes of structures, say) a bag holds that one, and attention is a linear head.

    Raises:
        ValueError: no scan, or not all of them have what it takes.
    """
    if not features:
        raise ValueError("attention needs at least one scan")
    blocked = [len(one.blocks) for one in features if isinstance(one, Blocked)]
    tokens = [one for one in features if one.tokens is not None]
    if not blocked and not tokens:
        return "scan"
    several = 2 * sum(count > 1 for count in blocked) > len(features)
    kind = ("blocks" if several else "tokens") if wanted == "auto" else wanted
    missing = len(features) - len(blocked if kind == "blocks" else tokens)
    if missing:
        what = "patch tokens" if kind == "tokens" else "blocks"
        raise ValueError(f"attention looks at {what} here, and {missing} of {len(features)} scans have none")
    return kind


def bag_of(features: Features, kind: Kind) -> Bag:
    """The bag of one scan.

    Raises:
        ValueError: the scan has no vectors of this kind.
    """
    if kind == "scan":
        return Bag(kind=kind, members=features.scan[None], grid=(1, 1, 1))
    if kind == "blocks" and isinstance(features, Blocked):
        return Bag(kind=kind, members=features.blocks, grid=features.grid)
    if kind == "tokens" and features.tokens is not None:
        ti, tj, tk, dim = features.tokens.shape
        return Bag(kind=kind, members=features.tokens.reshape(-1, dim), grid=(ti, tj, tk))
    what = "patch tokens" if kind == "tokens" else "blocks"
    raise ValueError(f"this head looks at {what}, and the scan has none")
