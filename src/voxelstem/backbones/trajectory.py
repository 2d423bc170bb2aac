"""What of a subject stays and what changes: identity and state, where the state will be, and what lies between two.

The subject's latent is cut by channels: the first hold the identity, the rest the state. The state alone moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

TENSORS, FACTS = "trajectory.safetensors", "trajectory.json"
"""Files beside the network's in a weights folder."""
AGE_YEARS = 50.0
"""Ages enter as (age - 50) / 50, so that a life lies about between -1 and 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryConfig:
    """Sizes of the networks that follow a subject through time."""

    state_share: float = 0.5
    """Share of the subject's channels that may change with time."""
    hidden: int = 128
    columns: int = 0
    """Structures whose change is asked for; 0: the batch's volumes say how many, which only a recipe can know."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: one is out of range.
        """
        if not 0 < self.state_share < 1:
            raise ValueError(f"state_share lies in (0, 1), got {self.state_share}")
        if self.hidden < 1 or self.columns < 0:
            raise ValueError(f"hidden must be >= 1 and columns >= 0, got {self.hidden} and {self.columns}")


class Antisymmetric(nn.Module):
    """g(a, b) = phi(a, b) - phi(b, a), so that g(b, a) is -g(a, b) to the last bit, and g(a, a) is 0."""

    def __init__(self, dim: int, hidden: int, outputs: int) -> None:
        """`dim` of each of the two sides."""
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(2 * dim, hidden), nn.GELU(), nn.Linear(hidden, outputs, bias=False))

    def forward(self, a: Float[Tensor, "row dim"], b: Float[Tensor, "row dim"]) -> Float[Tensor, "row output"]:
        """Compute it from two calls of one shape: rows of one larger product could be added up in another order."""
        return self.phi(torch.cat([a, b], dim=-1)) - self.phi(torch.cat([b, a], dim=-1))


class Trajectory(nn.Module):
    """Latent dynamics of the state, and antisymmetric heads for time and for volumes."""

    Config = TrajectoryConfig

    def __init__(self, config: TrajectoryConfig, channels: int) -> None:
        """`channels` of the subject's latent. The step begins at 0: an untrained network foresees that nothing changes.

        Raises:
            ValueError: no channel is left for the identity or for the state.
        """
        super().__init__()
        self.config = config
        self.state_channels = round(config.state_share * channels)
        self.identity_channels = channels - self.state_channels
        if min(self.state_channels, self.identity_channels) < 1:
            raise ValueError(f"state_share {config.state_share} of {channels} channels leaves one side empty")
        last = nn.Conv3d(config.hidden, self.state_channels, 1)
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
        first = nn.Conv3d(self.state_channels + 3, config.hidden, 3, padding=1)
        self.move = nn.Sequential(first, nn.GELU(), last)
        self.time = Antisymmetric(2 * self.state_channels, config.hidden, 1)
        self.change = Antisymmetric(2 * self.state_channels, config.hidden, max(config.columns, 1))

    def split(
        self, subject: Float[Tensor, "row channel a b c"]
    ) -> tuple[Float[Tensor, "row identity a b c"], Float[Tensor, "row state a b c"]]:
        """Identity and state of a subject's latent."""
        identity, state = subject.split([self.identity_channels, self.state_channels], dim=1)
        return identity, state

    def foresee(
        self, state: Float[Tensor, "row state a b c"], years: Float[Tensor, "row 1"], age: Float[Tensor, "row 1"]
    ) -> Float[Tensor, "row state a b c"]:
        """f(state, years, age): the state `years` later; after no time it is the state itself, exactly.

        Args:
            state: At the first scan.
            years: Time to the second one; negative looks back. NaN (nobody knows) counts as none.
            age: At the first scan in years, NaN where nobody knows: the network is told so.
        """
        years = years.nan_to_num(0.0)
        facts = torch.cat([years, age_code(age)], dim=1)
        told = facts[:, :, None, None, None].expand(-1, -1, *state.shape[2:])
        step = self.move(torch.cat([state, told.to(state)], dim=1))
        return state + years[:, :, None, None, None].to(state) * step

    def years_between(
        self, first: Float[Tensor, "row state a b c"], second: Float[Tensor, "row state a b c"]
    ) -> Float[Tensor, "row 1"]:
        """Years from the first to the second scan as their states tell it; below 0: the second came before."""
        return self.time(_summary(first), _summary(second))

    def volume_change(
        self, first: Float[Tensor, "row state a b c"], second: Float[Tensor, "row state a b c"]
    ) -> Float[Tensor, "row column"]:
        """How much each structure's volume changed between the scans, in the unit it is supervised in."""
        return self.change(_summary(first), _summary(second))

    def follow_up(
        self, subject: Float[Tensor, "row channel a b c"], years: Float[Tensor, "row 1"], age: Float[Tensor, "row 1"]
    ) -> Float[Tensor, "row channel a b c"]:
        """The subject's whole latent `years` later: the same identity with the foreseen state."""
        identity, state = self.split(subject)
        return torch.cat([identity, self.foresee(state, years, age)], dim=1)


def age_code(age: Float[Tensor, "row 1"]) -> Float[Tensor, "row 2"]:
    """An age as the network is told it: its place in a life, and whether it is known at all."""
    known = age.isfinite()
    return torch.cat([torch.where(known, age.nan_to_num(AGE_YEARS) / AGE_YEARS - 1, 0.0), known.to(age)], dim=1)


def _summary(latent: Float[Tensor, "row channel a b c"]) -> Float[Tensor, "row 2*channel"]:
    """Mean and spread over the cells: growth moves values between cells as well as all of them."""
    cells = latent.to(torch.promote_types(latent.dtype, torch.float32)).flatten(2)
    mean = cells.mean(dim=2)
    spread = F.relu(cells.var(dim=2, unbiased=False)).add(1e-6).sqrt()
    return torch.cat([mean, spread], dim=1)
