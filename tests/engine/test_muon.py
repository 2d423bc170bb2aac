from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from voxelstem.engine.muon import COEFFICIENTS, ITERATIONS, Muon, is_matrix, orthogonal
from voxelstem.engine.optim import OptimConfig, make_optimizer, set_rate
from voxelstem.engine.state import optimizer_state, put_optimizer_state


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_orthogonal(matrix: Tensor) -> Tensor:
    """The same polynomial, on the singular values alone."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = first * s + third * s**3 + fifth * s**5
    return (u * s) @ v


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_iteration_is_its_polynomial_of_the_singular_values(rows: int, columns: int, seed: int):
    matrices = noise(2, rows, columns, seed=seed)
    for matrix, turned in zip(matrices, orthogonal(matrices), strict=True):
        torch.testing.assert_close(turned.double(), naive_orthogonal(matrix), atol=2e-4, rtol=2e-4)


def test_small_and_large_directions_come_out_alike():
    u, _ = torch.linalg.qr(noise(6, 6))
    matrix = u @ torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.03]))
    found = torch.linalg.svdvals(orthogonal(matrix[None])[0])
    assert found.min() > 0.6
    assert found.max() < 1.3


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonal(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_kernels_are_matrices_and_tokens_and_gains_are_not():
    assert is_matrix(nn.Linear(3, 2).weight)
    assert is_matrix(nn.Conv3d(1, 4, 3).weight)
    assert not is_matrix(nn.Parameter(torch.zeros(1, 1, 8)))
    assert not is_matrix(nn.Linear(3, 1).weight)
    assert not is_matrix(nn.LayerNorm(4).weight)


class Small(nn.Module):
    """Two linear layers, a kernel and a token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.kernel = nn.Linear(5, 8), nn.Linear(8, 3), nn.Conv3d(1, 2, 2)
        self.prefix = nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.second(torch.tanh(self.first(x) + self.prefix[0]))
            + self.kernel(x[:, None, :2, None, None].expand(-1, -1, 2, 2, 2)).flatten(1).mean()
        )


def small() -> Small:
    torch.manual_seed(3)
    return Small()


def groups_of(module: nn.Module) -> list[tuple[int, list[tuple[str, nn.Parameter]]]]:
    return [(0, list(module.named_parameters()))]


MUON = OptimConfig(kind="muon", lr=0.01, momentum=0.95, matrix_scale=3.0, weight_decay=0.1)


def moved(module: nn.Module, config: OptimConfig, steps: int, *, optimizer: Any = None) -> Any:
    optimizer = optimizer or make_optimizer(module, groups_of(module), config)
    for step in range(steps):
        set_rate(optimizer, config, progress=step / 20)
        optimizer.zero_grad()
        module(noise(4, 5, seed=step)).square().mean().backward()
        optimizer.step()
    return optimizer


def test_a_matrix_moves_by_its_momentum_made_orthogonal_and_decays_by_the_rate():
    module = small()
    optimizer = make_optimizer(module, groups_of(module), MUON)
    set_rate(optimizer, MUON, progress=0.5)
    rate = next(group["lr"] for group in optimizer.param_groups if group["matrix"])
    weight = module.first.weight
    before, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for step in range(3):
        optimizer.zero_grad()
        module(noise(4, 5, seed=step)).square().mean().backward()
        assert weight.grad is not None
        momentum = 0.95 * momentum + 0.05 * weight.grad
        move = naive_orthogonal(0.05 * weight.grad + 0.95 * momentum).float() * (8 / 5) ** 0.5
        before = before * (1 - rate * 0.1) - rate * 3.0 * move
        optimizer.step()
    torch.testing.assert_close(weight.detach(), before, atol=1e-4, rtol=1e-4)


def test_what_is_no_matrix_moves_as_under_adamw():
    module, other = small(), small()
    for one in (module, other):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(parameter.ndim == 1 or name == "prefix")
    moved(module, MUON, 4)
    moved(other, OptimConfig(lr=0.01, weight_decay=0.1, fused=False), 4)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, dict(other.named_parameters())[name])


def test_torch_s_own_moves_matrices_the_same_way_as_far_as_bf16_goes():
    weight = nn.Parameter(noise(6, 9))
    peer = nn.Parameter(weight.detach().clone())
    ours = Muon([{"params": [weight], "matrix": True}], lr=0.02, momentum=0.9, matrix_scale=1.0, betas=(0.9, 0.99))
    theirs = torch.optim.Muon([peer], lr=0.02, momentum=0.9, weight_decay=0.0)
    for seed in range(3):
        weight.grad, peer.grad = noise(6, 9, seed=seed), noise(6, 9, seed=seed)
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight, peer, atol=5e-3, rtol=0)


def test_its_state_rests_and_comes_back_to_the_last_bit():
    whole, part = small(), small()
    moved(whole, MUON, 3)
    first = moved(part, MUON, 3)
    again = copy.deepcopy(part)
    second = make_optimizer(again, groups_of(again), MUON)
    put_optimizer_state(again, second, {name: value.clone() for name, value in optimizer_state(part, first).items()})
    for module, optimizer in ((part, first), (again, second)):
        moved(module, MUON, 2, optimizer=optimizer)
    for one, other in zip(part.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wrong", [{"matrix_scale": 0.0}, {"momentum": 1.0}])
def test_a_scale_or_momentum_out_of_range_is_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="momentum lies in"):
        OptimConfig(kind="muon", **wrong)  # type: ignore[arg-type]
