"""Projectors: an objective compares what they make of embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.encoder import init_linear


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
