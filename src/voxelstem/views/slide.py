"""A window that slides over a scan: places that cover all of it, and what is said there joined to one answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Triple = tuple[int, int, int]
Look = Callable[[Float[Tensor, "row channel i j k"]], Float[Tensor, "row kind i j k"]]
SIGMA = 0.125
"""Width of the weights' bell, as a share of the window (nnU-Net, Isensee et al. 2021)."""
VALUES_AT_ONCE = 1 << 24
"""How many answers a slab holds (64 MiB), one row at least."""
LEAST = 1e-3
"""Least weight of a voxel: at the scan's corners nothing else says anything."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Slab:
    """What is said of some rows of a scan, from `start` on along one axis."""

    start: int
    values: Float[Tensor, "kind i j k"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stripe:
    """Some rows of a scan, from `start` up to, but not with, `stop` along one axis."""

    axis: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no such axis, or no rows.
        """
        if self.axis not in range(3) or not 0 <= self.start < self.stop:
            raise ValueError(
                f"a stripe is rows along axis 0, 1 or 2, got {self.start} to {self.stop} along {self.axis}"
            )


def starts(size: int, window: int, *, overlap: float) -> list[int]:
    """Where windows begin along one axis: as few as cover it, evenly spread, overlapping by at least the share.

    >>> starts(10, 4, overlap=0.5), starts(3, 4, overlap=0.5)
    ([0, 2, 4, 6], [0])

    Raises:
        ValueError: a window without extent, or an overlap outside [0, 1).
    """
    if window < 1 or not 0 <= overlap < 1:
        raise ValueError(f"need a window of at least 1 voxel and 0 <= overlap < 1, got {window} and {overlap}")
    left = max(size - window, 0)
    steps = -(-left // max(int(window * (1 - overlap)), 1))
    return [round(left * step / max(steps, 1)) for step in range(steps + 1)]


def pad(image: Float[Tensor, "channel i j k"], window: Triple, *, outside: float) -> Float[Tensor, "channel a b c"]:
    """The image, filled up behind with `outside` to at least a window along each axis."""
    short = [max(want - have, 0) for have, want in zip(image.shape[1:], window, strict=True)]
    return F.pad(image, [0, short[2], 0, short[1], 0, short[0]], value=outside) if any(short) else image


def places(shape_ijk: Triple, window: Triple, *, overlap: float) -> list[Triple]:
    """The low corner of every window over a scan that is at least as large as one."""
    over_i, over_j, over_k = (starts(size, side, overlap=overlap) for size, side in zip(shape_ijk, window, strict=True))
    return list(itertools.product(over_i, over_j, over_k))


def bell(window: Triple) -> Float[Tensor, "i j k"]:
    """Weights of a window's voxels: 1 in its middle, falling off as a Gaussian, nowhere below `LEAST`."""
    sides = [torch.exp(-0.5 * ((torch.arange(side) - (side - 1) / 2) / (SIGMA * side)).square()) for side in window]
    return torch.einsum("i,j,k->ijk", *sides).clamp_min(LEAST)


def slide(
    look: Look,
    image: Float[Tensor, "channel i j k"],
    window: Triple,
    *,
    overlap: float = 0.5,
    outside: float = 0.0,
) -> Float[Tensor, "kind i j k"]:
    """What `look` says of every voxel: its answers at all windows, averaged under `bell`.

    Args:
        look: Gives values on the grid of the window that it is shown.
        image: One scan, on any device; a scan smaller than the window is padded, and the answer cut again.
        window: Voxels along each axis.
        overlap: Share of a window that the next one sees too.
        outside: What padding holds.
    """
    whole = roll(look, image, window, axis=0, overlap=overlap, outside=outside)
    return torch.cat([slab.values for slab in whole], dim=1)


def roll(
    look: Look,
    image: Float[Tensor, "channel i j k"],
    window: Triple,
    *,
    axis: int,
    overlap: float = 0.5,
    outside: float = 0.0,
    stripe: Stripe | None = None,
) -> Iterator[Slab]:
    """`slide`, a slab at a time along an axis: what no later window sees is given away, few rows at a time.

    Never more than a window's length of answers is held, which for a hundred kinds of a long scan is the difference
    between fitting into memory and not. Where that is still too much, a `stripe` along another axis holds less: the
    same windows lie at the same places, so the answers are the same too, and those over an edge are looked at twice.

    Args:
        look: As for `slide`.
        image: As for `slide`.
        window: As for `slide`.
        axis: Along which slabs follow one another.
        overlap: As for `slide`.
        outside: As for `slide`.
        stripe: The rows that slabs hold along another axis; None for all.

    Raises:
        ValueError: the stripe runs along `axis` itself, or beyond the scan.
    """
    whole = pad(image, window, outside=outside)
    shape, device = list(whole.shape[1:]), whole.device
    weights = bell(window).to(image)
    limits = _limits(image, axis, stripe)
    by_start: dict[int, list[Triple]] = {}
    for low in places((shape[0], shape[1], shape[2]), window, overlap=overlap):
        by_start.setdefault(low[axis], []).append(low)
    begins = sorted(by_start)
    held = [window[place] if place == axis else high - low for place, (low, high) in enumerate(limits)]
    total, weight = torch.zeros(0, device=device), torch.zeros(held, device=device, dtype=whole.dtype)
    for begin, after in zip(begins, [*begins[1:], shape[axis]], strict=True):
        limits[axis] = (begin, begin + window[axis])
        for low in by_start[begin]:
            here, there = zip(*(_common(*place) for place in zip(low, window, limits, strict=True)), strict=True)
            if any(side.start >= side.stop for side in here):
                continue
            box = tuple(slice(start, start + side) for start, side in zip(low, window, strict=True))
            said = look(whole[(slice(None), *box)][None])[0].to(whole.dtype)
            if not len(total):
                total = whole.new_zeros((len(said), *held))
            total[(slice(None), *there)].addcmul_(said[(slice(None), *here)], weights[here])
            weight[there] += weights[here]
        rows, length = after - begin, min(after, image.shape[1 + axis]) - begin
        at_once = max(1, VALUES_AT_ONCE // max(1, total.numel() // window[axis]))
        for start in range(0, length, at_once):
            count = min(at_once, length - start)
            done = total.narrow(1 + axis, start, count) / weight.narrow(axis, start, count)
            yield Slab(start=begin + start, values=done)
        _move_on(total, rows, 1 + axis)
        _move_on(weight, rows, axis)


def _limits(image: Float[Tensor, "channel i j k"], axis: int, stripe: Stripe | None) -> list[tuple[int, int]]:
    """From which row to which answers are held along each axis; along that of the slabs the window says it."""
    limits = [(0, size) for size in image.shape[1:]]
    if stripe is not None:
        if stripe.axis == axis or stripe.stop > limits[stripe.axis][1]:
            raise ValueError(f"{stripe} does not lie across slabs along axis {axis} of a scan of {image.shape[1:]}")
        limits[stripe.axis] = (stripe.start, stripe.stop)
    return limits


def _common(start: int, side: int, limits: tuple[int, int]) -> tuple[slice, slice]:
    """What a window has in common with the rows from one limit to another: its own rows, and which of those they are.

    Where there is nothing in common, the first slice is empty.
    """
    low, high = max(start, limits[0]), min(start + side, limits[1])
    return slice(low - start, high - start), slice(low - limits[0], high - limits[0])


def _move_on(held: Tensor, rows: int, axis: int) -> None:
    """Let go of the first rows along an axis: the others move up, and what is new is 0."""
    size = held.shape[axis]
    for start in range(0, size - rows, rows):  # in steps that do not overlap: no copy of it all
        count = min(rows, size - rows - start)
        held.narrow(axis, start, count).copy_(held.narrow(axis, start + rows, count))
    held.narrow(axis, max(size - rows, 0), min(rows, size)).zero_()
