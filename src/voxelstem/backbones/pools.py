"""Many tokens -> one vector."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.encoder import init_linear

Pool = Literal["cls-mean", "cls", "mean"]
POOLS: tuple[Pool, ...] = get_args(Pool)


def mean(
    tokens: Float[Tensor, "row token dim"], share: Float[Tensor, "row token"] | None = None
) -> Float[Tensor, "row dim"]:
    """Mean of the tokens, each counted by its share (of real voxels, say); without shares all count alike.

    A row whose shares are all 0 has nothing to average: its mean is 0.
    """
    if share is None:
        return tokens.mean(dim=1)
    total = share.sum(dim=1, keepdim=True)
    weight = share / torch.where(total > 0, total, torch.ones_like(total))
    return (tokens * weight[..., None].to(tokens.dtype)).sum(dim=1)


def pool(
    cls: Float[Tensor, "row dim"],
    tokens: Float[Tensor, "row token dim"],
    kind: Pool = "cls-mean",
    *,
    share: Float[Tensor, "row token"] | None = None,
) -> Float[Tensor, "row out"]:
    """The cls token, the mean of the others, or both side by side (out = 2 dim, SPECTRE's descriptor of a block).

    Raises:
        ValueError: no such pool.
    """
    match kind:
        case "cls":
            return cls
        case "mean":
            return mean(tokens, share)
        case "cls-mean":
            return torch.cat([cls, mean(tokens, share)], dim=-1)
    raise ValueError(f"pool must be one of {', '.join(POOLS)}, got '{kind}'")


class AttentionPool(nn.Module):
    """A learned query looks at all tokens, then an MLP (the multihead attention pool of Lee et al. 2019)."""

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 4.0) -> None:
        """Weights start as in ViT.

        Raises:
            ValueError: `heads` does not divide `dim`.
        """
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got {heads} and {dim}")
        hidden = round(dim * mlp_ratio)
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        nn.init.trunc_normal_(self.query, std=0.02)
        self.apply(init_linear)

    def forward(
        self, tokens: Float[Tensor, "row token dim"], share: Float[Tensor, "row token"] | None = None
    ) -> Float[Tensor, "row dim"]:
        """Tokens whose share is 0 are not looked at; a row must have one that is above."""
        rows, count, dim = tokens.shape
        query = self.q(self.query).view(1, self.heads, 1, -1).expand(rows, -1, -1, -1)
        key, value = self.kv(tokens).view(rows, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        looked_at = None if share is None else (share > 0)[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=looked_at).reshape(rows, dim)
        x = self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))
