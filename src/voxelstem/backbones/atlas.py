"""What is usual at each place of a block, for networks whose blocks always lie at the same places of the body.

Something small changes little of what a patch shows: where an organ ends, how deep the breath was and how large the
patient is change far more, and gradients follow what changes most. Here the texture of each place is compared with that
of the same place in other scans, as normative maps of populations do (Marquand et al. 2016), and what is left is turned
so that every direction is equally loud (Kessy et al. 2018, PCA whitening). All that is measured once, before the first
step, and is not learned; what is made of it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

Triple = tuple[int, int, int]
_FLOOR = 0.005
"""Added to a spread before its logarithm, in units of the window: less is noise of the number format or of reading."""
_LOUDEST = 4.0
"""Deviations count up to here: one metal clip is not sixteen times as telling as a nodule."""
_LEAST_SPREAD, _LEAST_SHARE, _QUIET, _EMPTY, _TINY = 0.05, 0.05, 0.01, 1e-3, 1e-6
"""Added to spreads of log textures; to a number's spread, as a share of the mean one; to a direction's variance before
it is made 1; the variance below which a direction stays silent; against a division by 0. Chosen, not measured."""
KINDS = 2
"""Of texture: the logarithms of the spread of a cell's voxels, and of the root mean square of second differences."""


class Atlas(nn.Module):
    """Reads how a block's texture deviates from what is usual at each place, and what its parts show, into one vector.

    Until `measure` was called nothing is usual and the vector is 0.
    """

    usual: Tensor
    spread: Tensor
    middle: Tensor
    turn: Tensor

    def __init__(self, patch_ijk: Triple, *, places: int, cell: int, directions: tuple[int, int], dim: int) -> None:
        """For blocks of `places` patches in cells of `cell` voxels; `directions` of deviations and of voxels."""
        super().__init__()
        self.patch_ijk, self.cell, self.directions = patch_ijk, cell, directions
        fine, self.coarse = (math.prod(edge // size for edge in patch_ijk) for size in (cell, 2 * cell))
        numbers = places * (2 * KINDS + self.coarse)
        self.register_buffer("usual", torch.zeros(places, KINDS, fine))
        self.register_buffer("spread", torch.ones(places, KINDS, fine))
        self.register_buffer("middle", torch.zeros(numbers))
        self.register_buffer("turn", torch.zeros(sum(directions), numbers))
        self.read = nn.Linear(sum(directions), dim, bias=False)
        nn.init.trunc_normal_(
            self.read.weight, std=self.read.in_features**-0.5
        )  # as loud as cls, whose channels are standardised

    @property
    def is_measured(self) -> bool:
        """Whether it was told what is usual."""
        return bool(self.turn.any())

    def forward(
        self,
        patches: Float[Tensor, "row patch voxel"],
        *,
        masked: Bool[Tensor, "row patch"] | None = None,
        noise: Float[Tensor, "row direction"] | None = None,
    ) -> Float[Tensor, "row dim"]:
        """One vector for each block; `masked` patches count as usual, and `noise` is added to the directions."""
        # Logarithms and small differences of large sums: not in half precision.
        with torch.autocast(patches.device.type, enabled=False):
            apart = self.numbers(patches.float()) - self.middle
            if masked is not None:
                each = (KINDS, KINDS, self.coarse)
                hidden = torch.cat([masked.repeat_interleave(count, dim=1) for count in each], dim=1)
                apart = apart.masked_fill(hidden, 0.0)
            found = F.linear(apart, self.turn)
        return self.read(found if noise is None else found + noise)

    def numbers(self, patches: Float[Tensor, "row patch voxel"]) -> Float[Tensor, "row number"]:
        """Mean deviation of each patch's cells, mean square of the rougher ones; then its coarse voxels."""
        deviation = (texture(patches, self.patch_ijk, cell=self.cell) - self.usual) / self.spread
        deviation = deviation.clamp(-_LOUDEST, _LOUDEST)
        rougher = deviation.relu().square()
        coarse = F.avg_pool3d(_volumes(patches, self.patch_ijk), 2 * self.cell).mean(dim=1)
        shown = coarse.flatten(1).unflatten(0, patches.shape[:2])
        return torch.cat([part.flatten(1) for part in (deviation.mean(dim=3), rougher.mean(dim=3), shown)], dim=1)

    @torch.no_grad()
    def measure(self, patches: Sequence[Float[Tensor, "row patch voxel"]]) -> None:
        """Learn what is usual from blocks of many scans, given a few at a time; more scans than directions are best.

        Directions beyond what these blocks span stay silent.
        """
        seen = torch.cat([texture(part.float(), self.patch_ijk, cell=self.cell) for part in patches])
        self.usual.copy_(seen.mean(dim=0))
        self.spread.copy_(seen.std(dim=0, correction=0) + _LEAST_SPREAD)
        del seen
        rows = torch.cat([self.numbers(part.float()) for part in patches]).double()
        self.middle.copy_(rows.mean(dim=0))
        rows -= rows.mean(dim=0)
        self.turn.zero_()
        # Apart: there are more coarse voxels than deviations, and together they would take nearly all directions.
        borders = (0, len(self.usual) * 2 * KINDS, rows.shape[1])
        first = 0
        for (start, stop), count in zip(pairwise(borders), self.directions, strict=True):
            found = _whitening(rows[:, start:stop], count).to(self.turn.dtype)
            self.turn[first : first + len(found), start:stop] = found
            first += count


def _whitening(rows: Float[Tensor, "row number"], count: int) -> Float[Tensor, "direction number"]:
    """At most `count` directions along which centred rows vary most, each scaled to vary by about 1."""
    loud = rows.std(dim=0, correction=0)
    unit = loud + _LEAST_SHARE * loud.mean() + _TINY  # what hardly varies says little
    # No covariance is needed of more numbers than rows: a thin decomposition of the rows.
    _, size, axes = torch.linalg.svd(rows / unit / len(rows) ** 0.5, full_matrices=False)
    variance = size.square()
    gain = torch.where(variance > _EMPTY, (variance + _QUIET).rsqrt(), 0.0)
    # Signs of axes are arbitrary: the largest entry is positive.
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    return (gain[:, None] * axes / unit)[:count]


def texture(
    patches: Float[Tensor, "row patch voxel"], patch_ijk: Triple, *, cell: int
) -> Float[Tensor, "row patch kind cell"]:
    """Logarithms of a cell's spread and of the root mean square of its second differences, each with a floor.

    Args:
        patches: Voxels in [0, 1], each patch as (channel, i, j, k).
        patch_ijk: Its edges in voxels; beyond them the outermost voxels go on.
        cell: Edge of the cells in voxels; it divides the patch.
    """
    x = _volumes(patches, patch_ijk)
    wide = F.pad(x, (1,) * 6, mode="replicate")
    rough = 6 * x
    for axis in (2, 3, 4):
        across = wide
        for other in {2, 3, 4} - {axis}:
            across = across.narrow(other, 1, x.shape[other])
        rough = rough - across.narrow(axis, 0, x.shape[axis]) - across.narrow(axis, 2, x.shape[axis])
    # About the cell's own middle, or nothing would be left of small spreads of large values in fp32.
    middle = F.avg_pool3d(x, cell)
    for axis in (2, 3, 4):
        middle = middle.repeat_interleave(cell, dim=axis)
    squares = torch.stack([(x - middle).square().mean(dim=1), (rough / 6).square().mean(dim=1)], dim=1)
    return (F.avg_pool3d(squares, cell).flatten(2).sqrt() + _FLOOR).log().unflatten(0, patches.shape[:2])


def _volumes(patches: Tensor, patch_ijk: Triple) -> Tensor:
    """Each patch as a small volume (row * patch, channel, i, j, k)."""
    return patches.reshape(-1, patches.shape[-1] // math.prod(patch_ijk), *patch_ijk)
