"""What objectives read out of the maps of a convolutional network; thrown away after pretraining."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.convolution import draw_convolutions
from voxelstem.backbones.disentangled import Latents, Rise

POOLED = 2
"""Cells along each axis that a map is averaged to."""
WIDEST, NARROW = 4096, 256


class Progressive(nn.Module):
    """Numbers out of some channels of a bottleneck, by way of a wide and a narrow layer.

    As SSL3D's winner reads volumes and health: averaged to 2 x 2 x 2 cells, strung together, a linear layer to the
    next power of two (4096 at most), one to 256 and one to the answer, each of the first two with layer norm and ReLU.
    """

    def __init__(self, channels: int, outputs: int, *, last_norm: bool) -> None:
        """`last_norm`: the answer passes a layer norm too, as where only its direction is asked for."""
        super().__init__()
        cells = channels * POOLED**3
        wide = min(2 ** math.ceil(math.log2(cells)), WIDEST)
        self.layers = nn.Sequential(
            *(nn.Linear(cells, wide), nn.LayerNorm(wide), nn.ReLU()),
            *(nn.Linear(wide, NARROW), nn.LayerNorm(NARROW), nn.ReLU()),
            nn.Linear(NARROW, outputs),
            *([nn.LayerNorm(outputs)] if last_norm else []),
        )

    def forward(self, maps: Float[Tensor, "row channel a b c"]) -> Float[Tensor, "row output"]:
        """Return the answer of each row."""
        return self.layers(F.adaptive_avg_pool3d(maps, POOLED).flatten(1))


class Sides(nn.Module):
    """Latents of subject and contrast out of a U-Net's maps, and a decoder without skips that paints from them.

    They turn any network with `features` into one that can tell apart whose brain it is and how it was scanned, in
    the way of `backbones.disentangled`; of the network itself nothing is asked but its maps.
    """

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...], *, latent: int, channels: int) -> None:
        """`widths` and `strides` are those of the maps, from fine to coarse; `channels` are painted.

        Raises:
            ValueError: a stride that the decoder cannot undo by doubling.
        """
        super().__init__()
        if set(strides) - {1, 2} or strides[0] != 1:
            raise ValueError(f"sides are painted by doubling: strides must be 1 or 2 and begin with 1, got {strides}")
        self.heads = nn.ModuleList(nn.Conv3d(sum(widths), latent, 1) for _ in range(4))
        doubled = [width for width, stride in zip(widths[:-1], strides[1:], strict=True) if stride == 2]  # noqa: PLR2004
        self.rises = nn.ModuleList(Rise(*ends) for ends in pairwise((2 * latent, *doubled[::-1])))
        self.out = nn.Conv3d(doubled[0], channels, 1)
        draw_convolutions(self)
        for head in list(self.heads)[1::2]:
            # Every variance begins at 1: drawn like the others, some would begin in the hundreds.
            nn.init.zeros_(head.get_parameter("weight"))

    def latents(self, features: list[Tensor]) -> Latents:
        """Read both sides out of all maps, averaged to the grid of the coarsest."""
        i, j, k = features[-1].shape[-3:]
        pooled = torch.cat([F.adaptive_avg_pool3d(each, (i, j, k)) for each in features], dim=1)
        subject, subject_logvar, contrast, contrast_logvar = (head(pooled) for head in self.heads)
        return Latents(
            subject_mean=subject,
            contrast_mean=contrast,
            subject_logvar=subject_logvar,
            contrast_logvar=contrast_logvar,
        )

    def reconstruct(
        self, subject: Float[Tensor, "row latent a b c"], contrast: Float[Tensor, "row latent a b c"]
    ) -> Float[Tensor, "row channel i j k"]:
        """Paint a scan of this subject in this contrast."""
        x = torch.cat((subject, contrast), dim=1)
        for rise in self.rises:
            x = rise(x)
        return self.out(x)
