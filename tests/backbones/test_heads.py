from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from voxelstem.backbones.heads import AlignHead, PooledHead, Projector, ProjectorConfig, SkipDecoder, TokenPainter
from voxelstem.chance import Chance

CONFIG = ProjectorConfig(hidden=16, bottleneck=6, prototypes=9)


@pytest.fixture
def projector() -> Projector:
    torch.manual_seed(0)
    return Projector(12, CONFIG)


def test_logits_are_cosines_to_the_prototypes(projector: Projector) -> None:
    x = torch.randn(4, 12)
    logits = projector(x).detach()
    assert logits.shape == (4, 9)
    bottleneck = projector.mlp(x)
    for row in range(4):
        for prototype in range(9):
            a, b = bottleneck[row].tolist(), projector.prototypes[prototype].tolist()
            dot = sum(p * q for p, q in zip(a, b, strict=True))
            assert float(logits[row, prototype]) == pytest.approx(dot / (math.hypot(*a) * math.hypot(*b)), abs=1e-5)


def test_the_length_of_a_prototype_does_not_matter(projector: Projector) -> None:
    x = torch.randn(4, 12)
    before = projector(x)
    with torch.no_grad():
        projector.prototypes.mul_(torch.linspace(0.1, 9, 9)[:, None])
    torch.testing.assert_close(projector(x), before)


def test_any_number_of_leading_axes_is_projected_alike(projector: Projector) -> None:
    x = torch.randn(2, 3, 4, 12)
    torch.testing.assert_close(projector(x)[1, 2], projector(x[1, 2]))


def test_every_weight_gets_a_gradient(projector: Projector) -> None:
    projector(torch.randn(5, 12)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())


@pytest.mark.parametrize("name", ["hidden", "bottleneck", "prototypes"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        ProjectorConfig(**{name: 0})


def test_an_eps_outside_zero_and_one_is_refused() -> None:
    for eps in (0.0, -1e-6, 1.0):
        with pytest.raises(ValueError, match="eps"):
            ProjectorConfig(eps=eps)


def test_what_is_shorter_than_eps_is_not_stretched() -> None:
    projector = Projector(12, ProjectorConfig(hidden=16, bottleneck=6, prototypes=9, eps=0.5))
    for parameter in projector.mlp.parameters():
        torch.nn.init.constant_(parameter, 1e-6)
    length = projector.mlp(torch.ones(1, 12)).norm()
    assert length < 0.5
    assert projector(torch.ones(1, 12)).abs().max() <= length / 0.5 + 1e-6


def test_an_align_head_is_an_mlp_and_a_weight_normalised_layer() -> None:
    torch.manual_seed(0)
    head = AlignHead(6, hidden=5, bottleneck=4, out=3).requires_grad_(False)
    head.gain.copy_(torch.tensor([[1.0], [2.0], [0.5]]))
    x = torch.randn(7, 6)
    inside = head.mlp(x)
    for out in range(3):
        direction = head.direction[out] / head.direction[out].square().sum().sqrt()
        torch.testing.assert_close(head(x)[:, out], head.gain[out] * (inside @ direction))


def test_an_align_head_has_the_sizes_of_the_released_ones() -> None:
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in AlignHead(2160).parameters()]
    assert (512, 1) in shapes
    assert (512, 256) in shapes
    assert (2048, 2160) in shapes


def test_the_head_over_four_contrasts_has_as_many_parameters_as_the_published_one() -> None:
    head = PooledHead(256 * 5, 2)
    assert sum(parameter.numel() for parameter in head.parameters()) == 821_122


def test_the_decoder_for_two_classes_has_as_many_parameters_as_the_published_one() -> None:
    decoder = SkipDecoder((32, 64, 128, 256, 512), 2)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 6_094_786


def test_a_skip_decoder_comes_back_to_the_finest_grid() -> None:
    maps = [torch.randn(1, width, *[8 // 2**level] * 3) for level, width in enumerate((4, 8, 16))]
    assert SkipDecoder((4, 8, 16), 3)(maps[2], maps[:2]).shape == (1, 3, 8, 8, 8)


def test_a_pooled_head_leaves_features_out_only_where_chance_is_given_and_the_same_ones_each_time() -> None:
    head, rows = PooledHead(64, 3), torch.randn(5, 64)
    keys = Chance.of(3, count=5)
    assert torch.equal(head(rows, keys), head(rows, keys))
    assert not torch.equal(head(rows, keys), head(rows))
    assert torch.allclose(head(rows, keys)[2:3], head(rows[2:3], keys.part(2, 3)), atol=1e-6)


def test_cells_of_a_patch_lie_where_their_numbers_stand_in_the_answer() -> None:
    torch.manual_seed(0)
    head, grid = TokenPainter(5, 3, sub=2), (2, 3, 1)
    tokens = torch.randn(2, 6, 5)
    logits = head(tokens, grid, (4, 6, 2))  # as many voxels as cells: nothing to interpolate
    said = head.answer(tokens)
    for patch, (i, j, k) in enumerate(np.ndindex(*grid)):
        for cell, (a, b, c) in enumerate(np.ndindex(2, 2, 2)):
            for kind in range(3):
                wanted = said[:, patch, kind * 8 + cell]
                torch.testing.assert_close(logits[:, kind, 2 * i + a, 2 * j + b, 2 * k + c], wanted)
    assert head(tokens, grid, (8, 12, 4)).shape == (2, 3, 8, 12, 4)
