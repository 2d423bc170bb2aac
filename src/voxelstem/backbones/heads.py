"""Heads: projectors, whose results an objective compares, and what a fine-tuned network answers with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.convolution import ConvNorm
from voxelstem.backbones.encoder import init_linear
from voxelstem.chance import Chance


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """Size of DINO's head."""

    hidden: int = 384
    bottleneck: int = 96
    prototypes: int = 1024
    eps: float = 1e-12
    """What is shorter than this is not stretched to length 1; 1e-6 where the head runs in float16."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a size below 1, or an eps that is not above 0.
        """
        if min(self.hidden, self.bottleneck, self.prototypes) < 1:
            raise ValueError(
                f"hidden, bottleneck and prototypes must be >= 1, got "
                f"{self.hidden}, {self.bottleneck}, {self.prototypes}"
            )
        if not 0 < self.eps < 1:
            raise ValueError(f"eps lies in (0, 1), got {self.eps}")


class Projector(nn.Module):
    """MLP, unit sphere, then cosine to each prototype (Caron et al. 2021, DINO, appendix C).

    Cosines are what DINO's weight-normalised last layer gives with its gains held at 1. `optim.frozen_prototypes` is
    the share of a run over which that layer stays as it was drawn.
    """

    def __init__(self, dim: int, config: ProjectorConfig) -> None:
        """`dim` is the embedding's."""
        super().__init__()
        self.eps = config.eps
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.bottleneck))
        self.mlp.apply(init_linear)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows prototype"]:
        """Logits: cosines in [-1, 1], both sides normalised."""
        return F.normalize(self.mlp(x), dim=-1, eps=self.eps) @ F.normalize(self.prototypes, dim=-1, eps=self.eps).T


class AlignHead(nn.Module):
    """Brings scans and reports into one space: an MLP, then a weight-normalised layer (SPECTRE's SigLIP head).

    The last layer is gain * direction / |direction| for each output (Salimans and Kingma 2016), without a bias. Its
    outputs are not normalised: the loss and the cosine do that.
    """

    def __init__(self, dim: int, *, hidden: int = 2048, bottleneck: int = 256, out: int = 512) -> None:
        """`dim` is the embedding's: 2160 for SPECTRE's scans, 1024 for its texts."""
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.gain = nn.Parameter(torch.ones(out, 1))
        self.direction = nn.Parameter(torch.empty(out, bottleneck))
        nn.init.trunc_normal_(self.direction, std=0.02)
        self.mlp.apply(init_linear)

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows out"]:
        """Project embeddings."""
        return self.turn(self.mlp(x))

    def turn(self, narrow: Float[Tensor, "*rows bottleneck"]) -> Float[Tensor, "*rows out"]:
        """The last layer, of what the MLP made."""
        return F.linear(narrow, self.gain * self.direction / self.direction.norm(dim=1, keepdim=True))


class PooledHead(nn.Module):
    """What a whole scan is, from the mean of its features: half as wide, SiLU, dropout 0.1, the answer (FOMO25)."""

    DROP = 0.1

    def __init__(self, dim: int, out: int) -> None:
        """`dim` counts the pooled features."""
        super().__init__()
        self.narrow = nn.Linear(dim, dim // 2)
        self.answer = nn.Linear(dim // 2, out)

    def forward(self, x: Float[Tensor, "row dim"], chance: Chance | None = None) -> Float[Tensor, "row out"]:
        """Logits. With `chance`, a key for each row, features are dropped as in training."""
        hidden = F.silu(self.narrow(x))
        if chance is not None:
            kept = chance.uniform(hidden.shape[1]) >= self.DROP
            hidden = hidden * kept / (1 - self.DROP)
        return self.answer(hidden)


class TokenPainter(nn.Module):
    """Labels voxels from patch tokens: a linear map to the cells of each patch, and linearly between their centres."""

    def __init__(self, dim: int, out: int, *, sub: int = 2) -> None:
        """`sub` cells along each axis of a patch."""
        super().__init__()
        self.out, self.sub = out, sub
        self.answer = nn.Linear(dim, out * sub**3)

    def forward(
        self, tokens: Float[Tensor, "row patch dim"], grid: tuple[int, int, int], size_ijk: tuple[int, int, int]
    ) -> Float[Tensor, "row out i j k"]:
        """Logits of every voxel of blocks of `size_ijk` whose patches (C-order) make the `grid`."""
        sub = self.sub
        cells = self.answer(tokens).unflatten(2, (self.out, sub, sub, sub)).unflatten(1, grid)
        sides = [sub * side for side in grid]
        cells = cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(tokens.shape[0], self.out, *sides)
        return F.interpolate(cells, size=size_ijk, mode="trilinear", align_corners=False)


class SkipDecoder(nn.Module):
    """Labels voxels from a coarse map and the finer maps on the way to it: FOMO25's decoder for segmentations."""

    def __init__(self, widths: tuple[int, ...], out: int) -> None:
        """`widths` are the maps' channels from fine to coarse, each twice as fine as the next."""
        super().__init__()
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.rises = nn.ModuleList(nn.ConvTranspose3d(below, width, 2, 2) for below, width in pairs)
        self.joins = nn.ModuleList(ConvNorm(2 * width, width) for _, width in pairs)
        self.answer = nn.Conv3d(widths[0], out, 1)

    def forward(self, coarsest: Float[Tensor, "row dim a b c"], finer: list[Tensor]) -> Float[Tensor, "row out i j k"]:
        """Logits on the grid of the finest map; `finer` maps run from fine to coarse, without the coarsest."""
        x = coarsest
        for rise, join, skip in zip(self.rises, self.joins, finer[::-1], strict=True):
            x = join(torch.cat((rise(x), skip), dim=1))
        return self.answer(x)
