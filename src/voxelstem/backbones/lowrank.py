"""Low-rank changes beside frozen linear layers (Hu et al. 2021, LoRA): W x + alpha / rank * B (A x).

The base stays apart from what is learned, so checkpoints hold A and B alone and the base can be shared. A begins as
torch's own linear layers do and B at zero: before the first step nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.chance import Chance
from voxelstem.errors import ConfigError
from voxelstem.table import closest


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankConfig:
    """Size of the changes; the defaults are SPECTRE's."""

    rank: int = 16
    alpha: float = 64.0
    dropout: float = 0.05
    """Chance that an input of A is left out in training; the others count for more, so that the mean stays."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a rank below 1, an alpha that is not positive, or a dropout outside [0, 1).
        """
        if self.rank < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(
                f"need rank >= 1, alpha > 0 and 0 <= dropout < 1, got {self.rank}, {self.alpha}, {self.dropout}"
            )

    @property
    def scaling(self) -> float:
        """By what the product B A is multiplied."""
        return self.alpha / self.rank


class Draws:
    """What the changes of one network draw their dropout from while a pass runs; nothing is dropped without."""

    def __init__(self) -> None:
        """No pass runs yet."""
        self.chance: Chance | None = None

    @contextmanager
    def of(self, chance: Chance | None) -> Generator[None]:
        """One key for each row, for passes inside."""
        before, self.chance = self.chance, chance
        try:
            yield
        finally:
            self.chance = before

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: a pass that is repeated for its gradient drops what it dropped at first."""
        return nullcontext(), self.of(self.chance)


class LowRank(nn.Module):
    """The change of one layer. `lora_A` (rank, in) and `lora_B` (out, rank), as in the files of others."""

    def __init__(self, name: str, layer: nn.Linear, config: LowRankConfig, draws: Draws) -> None:
        """`name` is the layer's in its network: each draws numbers of its own."""
        super().__init__()
        self.name, self.config, self.draws = name, config, draws
        self.lora_A = nn.Parameter(torch.empty(config.rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """What is to be added to the layer's output."""
        return self.config.scaling * F.linear(F.linear(self._dropped(x), self.lora_A), self.lora_B)

    def _dropped(self, x: Tensor) -> Tensor:
        chance, share = self.draws.chance, self.config.dropout
        if chance is None or not share or not self.training:
            return x
        # A row draws its tokens in order, so tokens that fill up its end change nothing for those before.
        drawn = chance.to(x.device).purpose("lowrank").purpose(self.name).uniform(x.numel() // len(chance))
        return x * (drawn.view_as(x) >= share) / (1 - share)


class Changed(nn.Module):
    """A linear layer with its change beside it."""

    def __init__(self, layer: nn.Linear, change: LowRank) -> None:
        """Both stay what they are."""
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """W x + alpha / rank * B (A x)."""
        return self.layer(x) + self.change(x)


def put_beside(network: nn.Module, targets: Sequence[str], config: LowRankConfig, draws: Draws) -> nn.Module:
    """Freeze `network`, put a change beside each linear layer that `targets` names, and give back the changes.

    A target is a layer's name or the end of it (`q_proj`, `attention.output.dense`). The module that comes back holds
    the changes under the names of their layers: its `state_dict` is `layers.0.self_attn.q_proj.lora_A` and so on.

    Raises:
        ConfigError: no target, or one that no linear layer is called.
    """
    network.requires_grad_(requires_grad=False)
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    named = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in targets}
    if idle := [target for target, names in named.items() if not names] or [""] * (not targets):
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"no linear layer of this network is called '{idle[0]}'",
            hint=f"{closest(idle[0], kinds)}; its layers are {', '.join(kinds)}" if kinds else "it has none",
        )
    wanted = {name for names in named.values() for name in names}
    changes = nn.Module()
    for name, layer in linear.items():
        if name in wanted:
            change = LowRank(name, layer, config, draws)
            path, _, last = name.rpartition(".")
            setattr(network.get_submodule(path), last, Changed(layer, change))
            _grow(changes, name, change)
    return changes


@torch.no_grad()
def fold(network: nn.Module) -> None:
    """Add every change to the layer that it stands beside, W + alpha / rank * B A, and leave the layers alone there."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Changed):
            change = module.change
            module.layer.weight += change.config.scaling * change.lora_B @ change.lora_A
            path, _, last = name.rpartition(".")
            setattr(network.get_submodule(path), last, module.layer)


def _grow(root: nn.Module, name: str, leaf: nn.Module) -> None:
    """Register `leaf` under a dotted name."""
    *path, last = name.split(".")
    at: Any = root
    for part in path:
        if part not in at._modules:
            at.add_module(part, nn.Module())
        at = at.get_submodule(part)
    at.add_module(last, leaf)
