"""The parts of a transformer: 3D rotary positions, attention, a block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.chance import Chance


def grid_positions(grid: tuple[int, int, int]) -> Float[Tensor, "cells 3"]:
    """Centres of the cells of a grid, each axis scaled to (-1, 1); C-order, last axis fastest."""
    axes = [(torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1 for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def place_code(positions: Float[Tensor, "*batch token 3"], count: int) -> Float[Tensor, "*batch token codes"]:
    """Sines and cosines of places in (-1, 1), `count` of each along each axis, from a quarter to two periods in all.

    After Vaswani et al. 2017, in three dimensions. Rotary positions tell a token where others lie; this tells it where
    it lies itself.
    """
    frequencies = math.pi * torch.logspace(-2, 2, count, base=2.0, device=positions.device)
    angles = (positions[..., None].float() * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def move_positions(
    positions: Float[Tensor, "#batch token 3"], chance: Chance, *, shift: float, jitter: float, rescale: float
) -> Float[Tensor, "rows token 3"]:
    """Places of the tokens of as many samples as `chance` has rows, each sample's changed by a draw of its own.

    In the order of DINOv3 (Siméoni et al. 2025) and SPECTRE: each axis is moved by uniform(-shift, shift), then
    stretched by log-uniform [1 / jitter, jitter], then all three together by log-uniform [1 / rescale, rescale].
    Shift 0, jitter 1 and rescale 1 change nothing.
    """
    drawn = (2 * chance.purpose("positions").uniform(7) - 1)[:, None]
    moved, axes, whole = drawn[..., :3] * shift, drawn[..., 3:6] * math.log(jitter), drawn[..., 6:] * math.log(rescale)
    return (positions + moved) * (axes + whole).exp()


def pair_order(head_dim: int) -> list[int]:
    """Where each row of a head stands in the half-split form of RoPE: neighbours (2d, 2d + 1) are its (d, d + half)."""
    half = head_dim // 2
    return [row for pair in range(half) for row in (pair, pair + half)]


def rope_turns(positions: Float[Tensor, "*rows 3"], head_dim: int, *, base: float) -> Complex[Tensor, "*rows half"]:
    """Unit complex numbers by which the pairs of a head are turned: a third of them for each axis.

    3D rotary embedding after SPECTRE (arXiv 2511.17209): period base^(2k / (head_dim / 3)). `half` is
    head_dim / 2; head_dim must divide by 6.
    """
    count = head_dim // 6
    exponent = 2 * torch.arange(count, dtype=torch.float32, device=positions.device) / (head_dim // 3)
    angles = (2 * math.pi * positions[..., None] / base**exponent).flatten(-2)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(
    x: Float[Tensor, "*lead head token dim"], turns: Complex[Tensor, "#batch token half"]
) -> Float[Tensor, "*lead head token dim"]:
    """Turn the pairs (x[2d], x[2d + 1]) (Su et al. 2021).

    Pairs are neighbours because one complex product is several times faster on a CPU than the half-split
    form; both are equal up to one permutation of the query and key rows, which cancels in their product.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions on queries and keys."""

    def __init__(self, dim: int, heads: int) -> None:
        """`dim` is shared out evenly over `heads`."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch token dim"],
        turns: Complex[Tensor, "#batch token half"],
        scale: Float[Tensor, " dim"],
    ) -> Float[Tensor, "batch token dim"]:
        """Every token looks at every token; the result is multiplied by `scale`."""
        query, key, value = self._project(x, turns)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return scaled_linear(mixed.transpose(1, 2).flatten(2), self.proj, scale)

    def first_looks(
        self, x: Float[Tensor, "batch token dim"], turns: Complex[Tensor, "#batch token half"]
    ) -> Float[Tensor, "batch head token"]:
        """How much the first token looks at each token, in each head; the shares of a head add up to 1."""
        query, key, _ = self._project(x, turns)
        scores = (query[:, :, :1] @ key.transpose(-1, -2)).squeeze(2)
        return (scores.float() / math.sqrt(query.shape[-1])).softmax(dim=-1)

    def _project(self, x: Tensor, turns: Tensor) -> Sequence[Tensor]:
        """Query, key and value, each (batch, head, token, head_dim); the first two turned."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return *rotate(qkv[:2], turns).unbind(0), qkv[2]


def scaled_linear(
    x: Float[Tensor, "*rows in"], layer: nn.Linear, scale: Float[Tensor, " out"]
) -> Float[Tensor, "*rows out"]:
    """Return scale * layer(x), with the scale applied to the small matrix instead of the many rows."""
    return F.linear(x, layer.weight * scale[:, None], layer.bias * scale)


class Block(nn.Module):
    """Pre-norm transformer block with a learned scale on each branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float, eps: float, layer_scale: float) -> None:
        """`eps` is LayerNorm's; `layer_scale` the first value of the branch scales."""
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(
        self,
        x: Float[Tensor, "batch token dim"],
        turns: Complex[Tensor, "#batch token half"],
        keep: Float[Tensor, "batch 2"] | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        """Attend, then think. `keep` says by how much each row's two branches count: all by 1 if left out."""
        attended = self.attn(self.norm1(x), turns, self.scale1)
        x = x + (attended if keep is None else attended * keep[:, :1, None])
        thought = scaled_linear(F.gelu(self.fc1(self.norm2(x))), self.fc2, self.scale2)
        return x + (thought if keep is None else thought * keep[:, 1:, None])
