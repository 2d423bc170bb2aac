"""Which patches are hidden from the network. Drawn with exact ratios, so that every row of a batch is equally long."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from voxelstem.chance import Chance


def draw_cuboids(
    chance: Chance, grid: tuple[int, int, int], *, ratios: Float[Tensor, " rows"]
) -> Bool[Tensor, "rows patch"]:
    """Hide exactly `round(ratio * patches)` patches of each row of `chance`, in cuboids rather than salt and pepper.

    A cuboid of a random shape is laid down again and again until the ratio is reached; of the last one only as
    many patches are taken as are still owed. The 3D form of the block-wise masks of BEiT (Bao et al. 2021, Alg. 1).
    """
    total = grid[0] * grid[1] * grid[2]
    masks = torch.zeros(len(chance), *grid, dtype=torch.bool)
    for mask, ratio, generator in zip(masks, ratios.tolist(), chance.purpose("cuboids").generators(), strict=True):
        wanted = min(total, round(ratio * total))
        while (missing := wanted - int(mask.sum())) > 0:
            size = [int(torch.randint(1, max(2, side // 2 + 1), (1,), generator=generator)) for side in grid]
            start = [
                int(torch.randint(0, side - length + 1, (1,), generator=generator))
                for side, length in zip(grid, size, strict=True)
            ]
            box = tuple(slice(begin, begin + length) for begin, length in zip(start, size, strict=True))
            fresh = torch.zeros_like(mask)
            fresh[box] = True
            hidden = (fresh & ~mask).flatten().nonzero()[:missing, 0]
            mask.view(-1)[hidden] = True
    return masks.flatten(1)
