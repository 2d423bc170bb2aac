"""What a block says of its places, for networks whose blocks always lie at the same places of the body."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.errors import ConfigError

Triple = tuple[int, int, int]
SCALE, MIDDLE = 200.0, 2.0
"""Chosen, not measured: flat voxels give -2, noise of a hundredth of the window about -0.9, edges more than 0."""


class PlaceReadout(nn.Module):
    """What the tokens of a block say, each read by where it lies: a few channels of each, one matrix over all places.

    A mean over the tokens keeps what there is and loses where, and attention reads few places at a time. It is as
    much as a linear layer on the whole block can tell, of what tokens have made of its voxels.
    """

    def __init__(self, dim: int, channels: int, *, places: int, beside: int = 0) -> None:
        """`channels` of `dim` are read out of each of `places` tokens, and `beside` numbers that lie there too."""
        super().__init__()
        self.places = places
        self.channels = nn.Linear(dim, channels)
        self.over_places = nn.Linear((channels + beside) * places, dim, bias=False)
        for layer in (self.channels, self.over_places):
            # As loud as cls from the first step on, whose channels are standardised.
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.channels.bias)

    def forward(
        self, tokens: Float[Tensor, "row place dim"], beside: Float[Tensor, "row place number"] | None = None
    ) -> Float[Tensor, "row dim"]:
        """One vector for each row.

        Raises:
            ConfigError: other tokens than those of the grid that it was made for.
        """
        if tokens.shape[1] != self.places:
            raise ConfigError(
                f"place_readout was made for {self.places} tokens of a block and there are {tokens.shape[1]}",
                hint="feed whole blocks of the size that the weights were trained on, or set place_readout=0",
            )
        read = self.channels(tokens)
        return self.over_places(
            (read if beside is None else torch.cat([read, beside.to(read.dtype)], dim=2)).flatten(1)
        )


def texture(
    patches: Float[Tensor, "row patch voxel"], patch_ijk: Triple, *, cells: Sequence[int]
) -> Float[Tensor, "row patch number"]:
    """How rough each cell of a patch is: log(1 + 200 r) - 2, r the root mean square of its second differences.

    Something small in a large organ changes the mean of a patch less than a breath does; it makes its cell rough.

    Args:
        patches: Voxels in [0, 1], each patch as (channel, i, j, k).
        patch_ijk: Its edges in voxels.
        cells: Edges of the cells in voxels; all cells of the first size, then of the next. They divide the patch.
    """
    row, patch, voxels = patches.shape
    x = patches.reshape(row * patch, voxels // math.prod(patch_ijk), *patch_ijk)
    wide = F.pad(x, (1,) * 6, mode="replicate")
    rough = 6 * x
    for axis in (2, 3, 4):
        across = wide
        for other in {2, 3, 4} - {axis}:
            across = across.narrow(other, 1, x.shape[other])
        rough = rough - across.narrow(axis, 0, x.shape[axis]) - across.narrow(axis, 2, x.shape[axis])
    squares = (rough / 6).square().mean(dim=1, keepdim=True)
    found = [F.avg_pool3d(squares, cell).flatten(1) for cell in cells]
    return (torch.cat(found, dim=1).sqrt() * SCALE).log1p().sub(MIDDLE).unflatten(0, (row, patch))


def count_cells(patch_ijk: Triple, cells: Sequence[int]) -> int:
    """Numbers that `texture` gives for each patch."""
    return sum(math.prod(edge // cell for edge in patch_ijk) for cell in cells)
