"""What a block says of its places, for networks whose blocks always lie at the same places of the body."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from voxelstem.errors import ConfigError


class PlaceReadout(nn.Module):
    """What the tokens of a block say, each read by where it lies: a few channels of each, one matrix over all places.

    A mean over the tokens keeps what there is and loses where, and attention reads few places at a time. It is as
    much as a linear layer on the whole block can tell, of what tokens have made of its voxels.
    """

    def __init__(self, dim: int, channels: int, *, places: int) -> None:
        """`channels` of `dim` are read out of each of `places` tokens."""
        super().__init__()
        self.places = places
        self.channels = nn.Linear(dim, channels)
        self.over_places = nn.Linear(channels * places, dim, bias=False)
        for layer in (self.channels, self.over_places):
            # As loud as cls from the first step on, whose channels are standardised.
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.channels.bias)

    def forward(self, tokens: Float[Tensor, "row place dim"]) -> Float[Tensor, "row dim"]:
        """One vector for each row.

        Raises:
            ConfigError: other tokens than those of the grid that it was made for.
        """
        if tokens.shape[1] != self.places:
            raise ConfigError(
                f"place_readout was made for {self.places} tokens of a block and there are {tokens.shape[1]}",
                hint="feed whole blocks of the size that the weights were trained on, or set place_readout=0",
            )
        return self.over_places(self.channels(tokens).flatten(1))
