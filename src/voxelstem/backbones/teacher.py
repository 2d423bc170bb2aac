"""A teacher is an exponential moving average of its student, made only here."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class Teacher(nn.Module, Generic[Network]):
    """Equal to the student at step 0 and never trained by gradient (Tarvainen and Valpola 2017)."""

    def __init__(self, student: Network) -> None:
        """Copy the student."""
        super().__init__()
        self.network = copy.deepcopy(student)
        self.network.requires_grad_(False)
        self.network.eval()

    def train(self, mode: bool = True) -> Teacher[Network]:
        """Stay in evaluation mode, whatever the student does."""
        super().train(mode)
        self.network.eval()
        return self

    @torch.no_grad()
    def follow(self, student: Network, *, momentum: float) -> None:
        """Set teacher = momentum * teacher + (1 - momentum) * student, for every parameter.

        Buffers, such as the statistics of a batch normalisation, are averages already: they are taken over.
        """
        for mine, theirs in zip(self.network.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs, 1.0 - momentum)
        for mine, theirs in zip(self.network.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)
