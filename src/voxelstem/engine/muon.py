"""Muon: matrices move by their momentum made orthogonal, all else by AdamW (Jordan et al. 2024; Liu et al. 2025).

Where two networks must find each other, as a scan's and a report's, a direction grows by the product of what both make
of it: what varies little in the voxels waits for hundreds of steps behind what varies much. An orthogonal step moves
all directions of a matrix alike. `torch.optim.Muon` computes in bf16, which a processor without it does many times
slower, and takes nothing but matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steepest at 0, it sends all singular values near 1 and none to it exactly."""
_LEAST = 1e-7
_EPS = 1e-8


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter maps many numbers to many: kernels of convolutions do, tokens and gains do not."""
    return parameter.ndim > 1 and min(len(parameter), math.prod(parameter.shape[1:])) > 1


def orthogonal(matrices: Float[Tensor, "matrix row column"]) -> Float[Tensor, "matrix row column"]:
    """Near to U V^T of each matrix U S V^T, by Newton and Schulz's iteration; several of one shape at once."""
    first, third, fifth = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x)[:, None, None] + _LEAST)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """One optimiser for both kinds of parameters; groups with `matrix` are those that `is_matrix` says yes to."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        matrix_scale: float,
        betas: tuple[float, float],
    ) -> None:
        """`matrix_scale`: how many times the group's rate a matrix moves by, whose steps have singular values of 1."""
        defaults = {"lr": lr, "momentum": momentum, "matrix_scale": matrix_scale, "betas": betas, "weight_decay": 0.0}
        super().__init__(list(groups), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every parameter that has a gradient; `closure` is torch's and not used."""
        del closure
        for group in self.param_groups:
            entry: dict[str, Any] = group
            moving = [parameter for parameter in entry["params"] if parameter.grad is not None]
            (self._turn if entry["matrix"] else self._adapt)(moving, entry)

    def _turn(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Nesterov's momentum made orthogonal; all matrices of one shape in one go."""
        rate, kept = group["lr"] * group["matrix_scale"], group["momentum"]
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for matrix in matrices:
            state, gradient = self.state[matrix], _gradient(matrix)
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            momentum: Tensor = state["momentum_buffer"]
            momentum.lerp_(gradient, 1 - kept)
            move = _whole(gradient.lerp(momentum, kept)).flatten(1).float()
            alike.setdefault((len(move), move.shape[1]), []).append((matrix, move))
        for (rows, columns), members in alike.items():
            turned = orthogonal(torch.stack([move for _, move in members]))
            size = math.sqrt(max(1.0, rows / columns))
            for (matrix, _), move in zip(members, turned, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(_shared(move.view(matrix.shape), matrix).to(matrix.dtype), alpha=-rate * size)

    def _adapt(self, others: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW (Loshchilov and Hutter 2017)."""
        first, second = group["betas"]
        for parameter in others:
            state, gradient = self.state[parameter], _gradient(parameter)
            if "step" not in state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            count = float(state["step"])
            state["exp_avg"].lerp_(gradient, 1 - first)
            state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
            spread = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(_EPS)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcdiv_(state["exp_avg"], spread, value=-group["lr"] / (1 - first**count))


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise AssertionError("only parameters with a gradient move")
    return parameter.grad


def _whole(value: Tensor) -> Tensor:
    """A matrix that is shared out among processes, put together: no part of it can be turned by itself."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _shared(value: Tensor, like: Tensor) -> Tensor:
    """Shared out again as `like` is."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
