"""A whole scan as a grid of blocks and back. Padding is marked, nothing is ever cut away."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How a scan of `shape_ijk` is covered by blocks of `block_ijk`: padded at both ends to whole blocks."""

    shape_ijk: tuple[int, int, int]
    block_ijk: tuple[int, int, int]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks along each axis."""
        i, j, k = (math.ceil(s / b) for s, b in zip(self.shape_ijk, self.block_ijk, strict=True))
        return i, j, k

    @property
    def lead_ijk(self) -> tuple[int, int, int]:
        """Voxels of padding before the scan begins."""
        i, j, k = ((g * b - s) // 2 for g, b, s in zip(self.grid, self.block_ijk, self.shape_ijk, strict=True))
        return i, j, k

    @property
    def padding(self) -> list[int]:
        """Padding in the order that `torch.nn.functional.pad` wants: last axis first."""
        pairs = []
        for grid, block, shape, lead in zip(self.grid, self.block_ijk, self.shape_ijk, self.lead_ijk, strict=True):
            pairs.append([lead, grid * block - shape - lead])
        return [amount for pair in reversed(pairs) for amount in pair]


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
    """Blocks of the padded scan; padding holds `fill`."""
    return split_blocks(F.pad(array, tiling.padding, value=fill), tiling.block_ijk)


def seen(tiling: Tiling) -> Bool[Tensor, "n bi bj bk"]:
    """True where a block's voxel belongs to the scan, False where it is padding."""
    return tile(torch.ones(1, *tiling.shape_ijk), tiling, fill=0.0)[:, 0].bool()


def stitch(blocks: Shaped[Tensor, "n channel bi bj bk"], tiling: Tiling) -> Shaped[Tensor, "channel i j k"]:
    """Exact inverse of `tile`: joins the blocks and takes the padding off again."""
    whole = join_blocks(blocks, tiling.grid)
    slices = [slice(lead, lead + size) for lead, size in zip(tiling.lead_ijk, tiling.shape_ijk, strict=True)]
    return whole[(slice(None), *slices)]


def stitch_tokens(
    patches: Shaped[Tensor, "n patch dim"], tiling: Tiling, patch_ijk: tuple[int, int, int]
) -> Shaped[Tensor, "ti tj tk dim"]:
    """Tokens of all blocks laid out over the padded scan, one for each patch."""
    pi, pj, pk = (block // patch for block, patch in zip(tiling.block_ijk, patch_ijk, strict=True))
    blocks = patches.reshape(len(patches), pi, pj, pk, -1).permute(0, 4, 1, 2, 3)
    return join_blocks(blocks, tiling.grid).permute(1, 2, 3, 0)
