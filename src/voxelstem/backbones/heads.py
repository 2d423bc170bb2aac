"""Projectors: used by an objective and then thrown away."""

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

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a size below 1.
        """
        if min(self.hidden, self.bottleneck, self.prototypes) < 1:
            raise ValueError(
                f"hidden, bottleneck and prototypes must be >= 1, got "
                f"{self.hidden}, {self.bottleneck}, {self.prototypes}"
            )


class Projector(nn.Module):
    """MLP, unit sphere, then cosine to each prototype (Caron et al. 2021, DINO, appendix C)."""

    def __init__(self, dim: int, config: ProjectorConfig) -> None:
        """`dim` is the embedding's."""
        super().__init__()
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
        return F.normalize(self.mlp(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).T
