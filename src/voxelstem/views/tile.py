"""A whole scan as a grid of blocks and back. Padding is marked; `cover` cuts nothing away."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Blocks of `block_ijk` side by side over a scan of `shape_ijk`; made by `cover` or `centre_crop`."""

    shape_ijk: Triple
    block_ijk: Triple
    grid: Triple
    """Blocks along each axis."""
    origin_ijk: Triple = (0, 0, 0)
    """The scan's voxel at which the first block begins; below 0 where padding comes first."""

    @property
    def padding(self) -> list[int]:
        """What `torch.nn.functional.pad` adds at both ends of each axis, last axis first; negative where it cuts."""
        pairs = [
            (-origin, grid * block + origin - shape)
            for origin, grid, block, shape in zip(
                self.origin_ijk, self.grid, self.block_ijk, self.shape_ijk, strict=True
            )
        ]
        return [amount for pair in reversed(pairs) for amount in pair]

    def slices(self, place: Triple) -> tuple[slice, slice, slice]:
        """The scan's voxels in the block at `place` of the grid, without padding."""
        i, j, k = (
            slice(max(origin + at * block, 0), min(origin + (at + 1) * block, shape))
            for at, origin, block, shape in zip(place, self.origin_ijk, self.block_ijk, self.shape_ijk, strict=True)
        )
        return i, j, k


def cover(shape_ijk: Triple, block_ijk: Triple) -> Tiling:
    """The grid that sees every voxel once: from the low corner on, the last block of each axis padded at its end."""
    i, j, k = (math.ceil(size / block) for size, block in zip(shape_ijk, block_ijk, strict=True))
    return Tiling(shape_ijk=shape_ijk, block_ijk=block_ijk, grid=(i, j, k))


def centre_crop(shape_ijk: Triple, block_ijk: Triple) -> Tiling:
    """The grid of `spectre-fm`: as many whole blocks as fit, from the middle; what is left over is cut away.

    Along an axis shorter than a block the scan is padded on both sides, the odd voxel behind.
    """

    def place(size: int, block: int) -> tuple[int, int]:
        count = size // block
        return (count, size // 2 - count * block // 2) if count else (1, -((block - size) // 2))

    (a, i), (b, j), (c, k) = (place(size, block) for size, block in zip(shape_ijk, block_ijk, strict=True))
    return Tiling(shape_ijk=shape_ijk, block_ijk=block_ijk, grid=(a, b, c), origin_ijk=(i, j, k))


def split_blocks(
    array: Shaped[Tensor, "*lead i j k"], block_ijk: tuple[int, int, int]
) -> Shaped[Tensor, "n *lead bi bj bk"]:
    """Cut an array of whole blocks into them; block order is C-order, k fastest."""
    lead = array.ndim - 3
    bi, bj, bk = block_ijk
    gi, gj, gk = array.shape[-3] // bi, array.shape[-2] // bj, array.shape[-1] // bk
    parts = array.reshape(*array.shape[:-3], gi, bi, gj, bj, gk, bk)
    axes = [lead, lead + 2, lead + 4, *range(lead), lead + 1, lead + 3, lead + 5]
    return parts.permute(axes).reshape(gi * gj * gk, *array.shape[:-3], bi, bj, bk)


def join_blocks(
    blocks: Shaped[Tensor, "n *lead bi bj bk"], grid: tuple[int, int, int]
) -> Shaped[Tensor, "*lead i j k"]:
    """Undo `split_blocks`."""
    lead = blocks.ndim - 4
    bi, bj, bk = blocks.shape[-3:]
    gi, gj, gk = grid
    parts = blocks.reshape(gi, gj, gk, *blocks.shape[1:])
    axes = [*range(3, 3 + lead), 0, 3 + lead, 1, 4 + lead, 2, 5 + lead]
    return parts.permute(axes).reshape(*blocks.shape[1 : 1 + lead], gi * bi, gj * bj, gk * bk)


def tile(
    array: Shaped[Tensor, "channel i j k"], tiling: Tiling, *, fill: float
) -> Shaped[Tensor, "n channel bi bj bk"]:
    """Blocks of the scan in C-order; padding holds `fill`."""
    return split_blocks(F.pad(array, tiling.padding, value=fill), tiling.block_ijk)


def seen(tiling: Tiling) -> Bool[Tensor, "n bi bj bk"]:
    """True where a block's voxel belongs to the scan, False where it is padding."""
    return tile(torch.ones(1, *tiling.shape_ijk), tiling, fill=0.0)[:, 0].bool()


def patch_share(tiling: Tiling, patch_ijk: Triple) -> Float[Tensor, "n patch"]:
    """Share of the voxels of each patch that belong to the scan: 1 inside, 0 for a patch of nothing but padding."""
    sides: list[Tensor] = []
    for size, block, count, origin, patch in zip(
        tiling.shape_ijk, tiling.block_ijk, tiling.grid, tiling.origin_ijk, patch_ijk, strict=True
    ):
        place = torch.arange(count * block) + origin
        inside = ((place >= 0) & (place < size)).float()
        sides.append(inside.view(count, block // patch, patch).mean(dim=2))
    # A box's share is the product of its sides': a mask of the whole scan would take as much memory as the scan.
    return torch.einsum("ap,bq,cr->abcpqr", *sides).reshape(math.prod(tiling.grid), -1)


def stitch(
    blocks: Shaped[Tensor, "n channel bi bj bk"], tiling: Tiling, *, fill: float = 0.0
) -> Shaped[Tensor, "channel i j k"]:
    """Inverse of `tile`: joins the blocks and takes the padding off; what a centre crop cut away holds `fill`."""
    return F.pad(join_blocks(blocks, tiling.grid), [-amount for amount in tiling.padding], value=fill)


def stitch_tokens(
    patches: Shaped[Tensor, "n patch dim"], tiling: Tiling, patch_ijk: tuple[int, int, int]
) -> Shaped[Tensor, "ti tj tk dim"]:
    """Tokens of all blocks laid out over the grid, one for each patch; the first lies at the tiling's origin."""
    pi, pj, pk = (block // patch for block, patch in zip(tiling.block_ijk, patch_ijk, strict=True))
    blocks = patches.reshape(len(patches), pi, pj, pk, -1).permute(0, 4, 1, 2, 3)
    return join_blocks(blocks, tiling.grid).permute(1, 2, 3, 0)
