"""What a head has made of a batch, standardised number by number, before it is compared (Ioffe and Szegedy 2015).

A contrastive loss over a small batch and fresh networks is at first best off where all embeddings are alike, and stays
there: nothing is left to pull apart. Standardised over the batch they cannot become alike (Chen, Xie and He 2021, MoCo
v3, does so in its heads). Once trained, the running statistics go into the head's own layers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from voxelstem import distributed
from voxelstem.backbones.heads import AlignHead

MOMENTUM = 0.95
"""Of what a step finds the running statistics take a twentieth; of the first step all."""
_LEAST = 1e-5


class Standard(nn.Module):
    """Over the batch of all processes in training, by running statistics otherwise."""

    mean: Tensor
    variance: Tensor
    begun: Tensor

    def __init__(self, dim: int) -> None:
        """Nothing is known yet: outside training what comes in goes out."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("begun", torch.zeros(()))

    def forward(self, x: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
        """Less the mean and over the spread; in training the gradient knows that both are the batch's."""
        x = x.float()
        if not self.training:
            return (x - self.mean) * (self.variance + _LEAST).rsqrt()
        everyone = distributed.rows(x)
        mean = everyone.mean(dim=0)
        return (x - mean) * ((everyone - mean).square().mean(dim=0) + _LEAST).rsqrt()

    @staticmethod
    def sums(x: Float[Tensor, "row dim"]) -> Float[Tensor, " sums"]:
        """What some rows add to the statistics: sums, sums of squares and their number. They can be added."""
        rows = x.detach().double()
        return torch.cat([rows.sum(dim=0), rows.square().sum(dim=0), rows.new_tensor([len(rows)])])

    @torch.no_grad()
    def move(self, sums: Float[Tensor, " sums"]) -> None:
        """Let the running statistics follow the sums of a whole batch."""
        total, squares, count = sums.split([len(self.mean), len(self.mean), 1])
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        share = 1 - MOMENTUM if self.begun else 1.0
        self.mean.lerp_(mean.to(self.mean.dtype), share)
        self.variance.lerp_(variance.to(self.variance.dtype), share)
        self.begun.fill_(1.0)

    @torch.no_grad()
    def within(self, head: AlignHead) -> dict[str, Tensor]:
        """The head's tensors with the running statistics in the last layer of its MLP."""
        tensors = {name: _whole(value).clone() for name, value in head.state_dict().items()}
        last = f"mlp.{len(head.mlp) - 1}"
        scale = (self.variance + _LEAST).rsqrt()
        tensors[f"{last}.weight"] *= scale[:, None]
        tensors[f"{last}.bias"] = (tensors[f"{last}.bias"] - self.mean) * scale
        return tensors


def _whole(value: Tensor) -> Tensor:
    """A tensor that is shared out among processes, put together; all of them ask for it at once."""
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()
