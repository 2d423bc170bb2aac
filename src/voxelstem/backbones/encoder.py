"""One encoder class for every level: patches of a block, blocks of a scan, and MAE's decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from voxelstem.backbones.layers import Block, move_positions, place_code, rope_turns
from voxelstem.chance import Chance


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
    place_codes: int = 0
    """Waves along each axis that tell a token its own place, see `layers.place_code`; 0: rotary positions alone."""
    registers: int = 0
    """Extra tokens that belong to no place (Darcet et al. 2023)."""
    rope_shift: float = 0.0
    """The three changes of positions in training, see `layers.move_positions`; at 0, 1 and 1 there are none."""
    rope_jitter: float = 1.0
    rope_rescale: float = 1.0
    drop_path: float = 0.0
    """Chance that the last block's branches are left out for a row in training; it rises linearly from 0 at the first
    block (Huang et al. 2016, stochastic depth)."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a size out of range, or a head dimension that does not divide by 6 (three axes of pairs).
        """
        if min(self.dim, self.heads) < 1 or min(self.depth, self.registers, self.place_codes) < 0:
            raise ValueError(
                f"need dim >= 1, heads >= 1, depth >= 0, registers >= 0 and place_codes >= 0, got "
                f"{self.dim}, {self.heads}, {self.depth}, {self.registers}, {self.place_codes}"
            )
        if not (1 <= self.dim * self.mlp_ratio < math.inf and self.eps > 0 and self.rope_base > 0):
            raise ValueError(
                f"need mlp_ratio > 0, eps > 0 and rope_base > 0, got {self.mlp_ratio}, {self.eps}, {self.rope_base}"
            )
        if not (0 <= self.rope_shift < math.inf and min(self.rope_jitter, self.rope_rescale) >= 1):
            raise ValueError(
                f"need rope_shift >= 0, rope_jitter >= 1 and rope_rescale >= 1, got "
                f"{self.rope_shift}, {self.rope_jitter}, {self.rope_rescale}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path lies in [0, 1), got {self.drop_path}")
        if self.dim % self.heads or (self.dim // self.heads) % 6:
            raise ValueError(f"dim / heads must be a multiple of 6 for 3D RoPE, got {self.dim} / {self.heads}")


class Encoder(nn.Module):
    """Prepends cls and register tokens, runs the blocks, normalises."""

    def __init__(self, config: EncoderConfig) -> None:
        """Weights start as in ViT: truncated normal of 0.02, biases 0."""
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether activations are computed once more for the gradient instead of kept: less memory, more time."""
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
        self.place = nn.Linear(6 * config.place_codes, config.dim, bias=False) if config.place_codes else None
        nn.init.trunc_normal_(self.prefix, std=0.02)
        self.apply(init_linear)
        if self.place is not None:
            # As large as what tokens see: a third of a standardised number.
            nn.init.trunc_normal_(self.place.weight, std=0.35 / math.sqrt(3 * config.place_codes))

    def forward(
        self,
        x: Float[Tensor, "batch token dim"],
        positions: Float[Tensor, "#batch token 3"],
        *,
        chance: Chance | None = None,
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch token dim"]]:
        """Return the cls token and the other tokens; `positions` lie in (-1, 1).

        `chance` is for training: positions are changed and branches left out by it, as the config says.
        """
        if chance is not None and self._moves:
            positions = self._moved(positions, chance)
        for state in self._states(x, positions, chance):
            x = state
        return self._split(x)

    def intermediates(
        self,
        x: Float[Tensor, "batch token dim"],
        positions: Float[Tensor, "#batch token 3"],
        layers: Sequence[int],
    ) -> list[tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch token dim"]]]:
        """Normalised cls and tokens after the named blocks, counted from 1; the last equals `forward`.

        Raises:
            ValueError: there is no such block.
        """
        depth = len(self.blocks)
        if not all(1 <= layer <= depth for layer in layers):
            raise ValueError(f"layers are counted from 1 to {depth}, got {tuple(layers)}")
        wanted = {
            layer: self._split(state) for layer, state in enumerate(self._states(x, positions)) if layer in layers
        }
        return [wanted[layer] for layer in layers]

    def cls_attention(
        self, x: Float[Tensor, "batch token dim"], positions: Float[Tensor, "#batch token 3"]
    ) -> Float[Tensor, "batch head token"]:
        """How much the cls token looks at each token in the last block; cls and registers take the rest of 1.

        Raises:
            ValueError: the encoder has no block.
        """
        if not self.blocks:
            raise ValueError("an encoder of depth 0 has no attention")
        for state in islice(self._states(x, positions), len(self.blocks)):
            x = state  # as the last block meets it
        last: Any = self.blocks[-1]
        return last.attn.first_looks(last.norm1(x), self._turns(positions))[..., len(self.prefix) :]

    def _states(self, x: Tensor, positions: Tensor, chance: Chance | None = None) -> Iterator[Tensor]:
        """Prefix and tokens before the first block and after each."""
        keep = None if chance is None else self._kept(chance)
        turns = self._turns(positions)
        if self.place is not None:
            x = x + self.place(place_code(positions, self.config.place_codes).to(x.dtype))
        x = torch.cat([self.prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        yield x
        for index, block in enumerate(self.blocks):
            share = None if keep is None else keep[index].to(x.dtype)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, turns, share, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, turns, share)
            yield x

    def _kept(self, chance: Chance) -> Float[Tensor, "block row 2"] | None:
        """0 for a branch that is left out; the others count for more, so that the mean stays."""
        if not self.config.drop_path:
            return None
        depth = len(self.blocks)
        dropped = torch.linspace(0, self.config.drop_path, depth, device=chance.keys.device)[:, None, None]
        drawn = chance.purpose("drop path").uniform(2 * depth).unflatten(1, (depth, 2)).transpose(0, 1)
        return (drawn >= dropped) / (1 - dropped)

    def _turns(self, positions: Tensor) -> Tensor:
        # A prefix token lies nowhere: position 0 turns it by no angle, whatever the others' positions are.
        everywhere = F.pad(positions, (0, 0, len(self.prefix), 0))
        return rope_turns(everywhere, self.config.dim // self.config.heads, base=self.config.rope_base)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return x[:, 0], x[:, len(self.prefix) :]

    @property
    def _moves(self) -> bool:
        config = self.config
        return (config.rope_shift, config.rope_jitter, config.rope_rescale) != (0.0, 1.0, 1.0)

    def _moved(self, positions: Tensor, chance: Chance) -> Tensor:
        config = self.config
        return move_positions(
            positions, chance, shift=config.rope_shift, jitter=config.rope_jitter, rescale=config.rope_rescale
        )


def init_linear(module: nn.Module) -> None:
    """Truncated normal of 0.02 for weights, zero for biases (Dosovitskiy et al. 2020)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
