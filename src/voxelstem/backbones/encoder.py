"""One encoder class for every level: patches of a block, blocks of a scan, and MAE's decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.layers import Block, rope_turns


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Size of a transformer."""

    dim: int = 192
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    eps: float = 1e-5
    layer_scale: float = 1.0
    rope_base: float = 1000.0
    registers: int = 0
    """Extra tokens that belong to no place (Darcet et al. 2023)."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a size out of range, or a head dimension that does not divide by 6 (three axes of pairs).
        """
        if min(self.dim, self.heads) < 1 or min(self.depth, self.registers) < 0:
            raise ValueError(
                f"need dim >= 1, heads >= 1, depth >= 0 and registers >= 0, got "
                f"{self.dim}, {self.heads}, {self.depth}, {self.registers}"
            )
        if not (1 <= self.dim * self.mlp_ratio < math.inf and self.eps > 0 and self.rope_base > 0):
            raise ValueError(
                f"need mlp_ratio > 0, eps > 0 and rope_base > 0, got {self.mlp_ratio}, {self.eps}, {self.rope_base}"
            )
        if self.dim % self.heads or (self.dim // self.heads) % 6:
            raise ValueError(f"dim / heads must be a multiple of 6 for 3D RoPE, got {self.dim} / {self.heads}")


class Encoder(nn.Module):
    """Prepends cls and register tokens, runs the blocks, normalises."""

    def __init__(self, config: EncoderConfig) -> None:
        """Weights start as in ViT: truncated normal of 0.02, biases 0."""
        super().__init__()
        self.config = config
        self.prefix = nn.Parameter(torch.zeros(1 + config.registers, config.dim))
        self.blocks = nn.ModuleList(
            Block(
                config.dim,
                config.heads,
                mlp_ratio=config.mlp_ratio,
                eps=config.eps,
                layer_scale=config.layer_scale,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        nn.init.normal_(self.prefix, std=0.02)
        self.apply(init_linear)

    def forward(
        self, x: Float[Tensor, "batch token dim"], positions: Float[Tensor, "#batch token 3"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch token dim"]]:
        """Return the cls token and the other tokens; `positions` lie in (-1, 1)."""
        config = self.config
        count = len(self.prefix)
        # A prefix token lies nowhere: position 0 turns it by no angle, whatever the others' positions are.
        everywhere = F.pad(positions, (0, 0, count, 0))
        turns = rope_turns(everywhere, config.dim // config.heads, base=config.rope_base)
        x = torch.cat([self.prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x, turns)
        x = self.norm(x)
        return x[:, 0], x[:, count:]


def init_linear(module: nn.Module) -> None:
    """Truncated normal of 0.02 for weights, zero for biases (Dosovitskiy et al. 2020)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
