"""Which patches are hidden from the network: in which views, how many of them, and where.

Nothing here depends on how a batch is shared out among processes: a view is judged by its number in the whole batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from voxelstem.chance import Chance

Background = Literal["counts", "ignored"]
Triple = tuple[int, int, int]
DIGITS = 24
"""Binary digits of a stratified number."""
AT_ONCE, NEVER = 32, 1 << 40
"""Cuboids drawn together for a row, and the number of one that is never laid."""


def draw_ratios(
    seed: int, shape: tuple[int, int], *, first: int = 0, share: float, ratios: tuple[float, float]
) -> Float[Tensor, "view sample"]:
    """How much of each view is hidden: something from `ratios` for a `share` of the views, nothing of the others.

    `shape` says how many views and samples there are; the samples are number `first` and following of the whole batch
    of that seed. All views lie in one row, sample by sample, each sample's own in an order of its chance, and every
    1/share-th of them is taken from a drawn start on: of n views of a whole batch share * n, if that is a whole number,
    or else a neighbour of it. Those taken get ratios in strata, as in DINOv2 (Oquab et al. 2023): where 2^m of them are
    taken, each 2^m-th part of the range holds one. It is van der Corput's sequence, its digits turned over by chance.

    A sample's answer follows from its own number. Ranking the draws of the whole batch would be exact for any number
    of views, and would ask every process for the others' draws.
    """
    both = Chance.of(seed).purpose("masked views")
    start, turn = both.uniform(2)[0].double()
    views, samples = shape
    order = (Chance.of(seed, first=first, count=samples).purpose("masked order").uniform(1)[:, 0] * views).long()
    at = (torch.arange(views)[:, None] + order) % views + torch.arange(first, first + samples) * views
    before, after = (at * share + start).floor(), ((at + 1) * share + start).floor()
    low, high = ratios
    spread = low + (high - low) * _stratified(before.long() ^ int(turn * (1 << DIGITS)))
    return torch.where(after > before, spread, 0.0).float()


def _stratified(numbers: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The binary digits of whole numbers, mirrored at the point: neighbours lie far apart in [0, 1)."""
    digits = [((numbers >> digit) & 1) * 0.5 ** (digit + 1) for digit in range(DIGITS)]
    return torch.stack(digits).sum(dim=0)


def draw_cuboids(
    chance: Chance, grid: tuple[int, int, int], *, ratios: Float[Tensor, " rows"]
) -> Bool[Tensor, "rows patch"]:
    """Hide exactly `round(ratio * patches)` patches of each row of `chance`, in cuboids rather than salt and pepper.

    Cuboids of random shapes are laid down one after another until the ratio is reached; of the last one only as
    many patches are taken as are still owed. The 3D form of the block-wise masks of BEiT (Bao et al. 2021, Alg. 1).
    On the device of `chance`; on the CPU nothing waits for a GPU.
    """
    total = grid[0] * grid[1] * grid[2]
    device = chance.keys.device
    wanted = (ratios.double().to(device) * total).round().long().clamp(0, total)
    masks = torch.zeros(len(chance), total, dtype=torch.bool, device=device)
    rows = wanted.nonzero()[:, 0]
    if len(rows):
        order = _covered(Chance(chance.keys[rows]).purpose("cuboids"), grid, wanted[rows])
        last = order.sort(dim=1).values.gather(1, wanted[rows, None] - 1)
        masks[rows] = order <= last
    return masks


def _covered(chance: Chance, grid: tuple[int, int, int], wanted: Int64[Tensor, " rows"]) -> Int64[Tensor, "rows patch"]:
    """The order in which cuboids cover the patches of each row, for the first `wanted` of them at least.

    Cuboids that only other rows still need come later in this row's order, and so change nothing for it.
    """
    first = torch.full((len(chance), *grid), NEVER, device=wanted.device)
    laid = 0
    while bool(((first < NEVER).flatten(1).sum(dim=1) < wanted).any()):
        i, j, k = _cuboids(chance.purpose(str(laid)), grid)
        fresh = torch.full_like(first, NEVER)
        for number in reversed(range(AT_ONCE)):
            inside = i[:, number, :, None, None] & j[:, number, None, :, None] & k[:, number, None, None, :]
            fresh.masked_fill_(inside, laid + number)
        first = torch.minimum(first, fresh)
        laid += AT_ONCE
    patches = first[0].numel()
    return first.flatten(1) * patches + torch.arange(patches, device=first.device)


def _cuboids(chance: Chance, grid: tuple[int, int, int]) -> list[Bool[Tensor, "rows cuboid side"]]:
    """Some cuboids in each row as their extent on each axis, every edge between one patch and half the grid's."""
    drawn = chance.uniform(6 * AT_ONCE).unflatten(1, (AT_ONCE, 6))
    inside: list[Tensor] = []
    for axis, side in enumerate(grid):
        length = 1 + (drawn[:, :, axis] * max(1, side // 2)).long()
        start = (drawn[:, :, 3 + axis] * (side - length + 1)).long()
        at = torch.arange(side, device=drawn.device)
        inside.append((at >= start[..., None]) & (at < (start + length)[..., None]))
    return inside


def draw_blocks(chance: Chance, grid: Triple, *, ratio: float) -> Bool[Tensor, "row block"]:
    """Hide exactly `round(ratio * blocks)` of the blocks of each row of `chance`, any as likely as another."""
    blocks = math.prod(grid)
    order = chance.purpose("blocks").uniform(blocks).argsort(dim=1, stable=True)
    masked = torch.zeros(len(chance), blocks, dtype=torch.bool, device=order.device)
    return masked.scatter_(1, order[:, : round(ratio * blocks)], value=True)


def draw_voxels(chance: Chance, size_ijk: Triple, *, block_ijk: Triple, ratio: float) -> Bool[Tensor, "row 1 i j k"]:
    """Hide blocks of voxels: exactly the share `ratio` of the blocks that a view of `size_ijk` has (`draw_blocks`).

    Raises:
        ValueError: blocks of `block_ijk` voxels do not fill the view.
    """
    if any(size % block for size, block in zip(size_ijk, block_ijk, strict=True)):
        raise ValueError(f"blocks of {block_ijk} voxels must fill a view, got one of {size_ijk}")
    i, j, k = (size // block for size, block in zip(size_ijk, block_ijk, strict=True))
    voxels = draw_blocks(chance, (i, j, k), ratio=ratio).unflatten(1, (1, i, j, k))
    for axis, block in enumerate(block_ijk, start=2):
        voxels = voxels.repeat_interleave(block, dim=axis)
    return voxels


def above_lowest(views: Float[Tensor, "row channel i j k"]) -> Bool[Tensor, "row channel i j k"]:
    """Which voxels of a view are more than the lowest value in it.

    Air that was set to one value, a face that was removed and all that lies outside of a scan hold the scan's lowest
    value. A view in which there is nothing of the kind loses a voxel or two.
    """
    return views > views.amin(dim=(1, 2, 3, 4), keepdim=True)


def countable(
    views: Float[Tensor, "row channel i j k"],
    flags: Float[Tensor, "row channel i j k"] | None = None,
    *,
    background: Background,
) -> Bool[Tensor, "row channel i j k"] | None:
    """Which voxels count in a loss; None: all of them.

    Where background is ignored, those at the lowest value of their view do not (`above_lowest`), and those whose flag
    is 0 never do: a face that was blurred, whatever a mask that came with the scan leaves out.
    """
    found = None if flags is None else (flags > 0).expand_as(views)
    if background == "counts":
        return found
    above = above_lowest(views)
    return above if found is None else above & found
