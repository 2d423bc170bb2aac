from __future__ import annotations

import pytest
import torch

from voxelstem.errors import ConfigError
from voxelstem.finetune.dynunet import ScratchUnet, plan_unet


# Followed by hand: at 0.8 x 0.8 x 5 mm the third axis waits until the others are 3.2 mm, and 4 cells are left of each.
@pytest.mark.parametrize(
    ("spacing", "patch", "strides", "kernels"),
    [
        (
            (1.0, 1.0, 1.0),
            (64, 64, 64),
            [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)],
            [(3, 3, 3)] * 5,
        ),
        (
            (0.8, 0.8, 5.0),
            (128, 128, 16),
            [(1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1)],
            [(3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)],
        ),
        (
            (1.0, 1.0, 1.0),
            (40, 56, 40),
            [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)],
            [(3, 3, 3)] * 4,
        ),
    ],
)
def test_levels_follow_nnu_net_s_rule(
    spacing: tuple[float, float, float],
    patch: tuple[int, int, int],
    strides: list[tuple[int, int, int]],
    kernels: list[tuple[int, int, int]],
) -> None:
    found = plan_unet(spacing, patch)
    assert list(found.strides) == strides
    assert list(found.kernels) == kernels
    assert found.channels == tuple(min(32 * 2**level, 320) for level in range(len(strides)))


@pytest.mark.parametrize("patch", [(16, 16, 16), (48, 24, 20), (36, 20, 100), (32, 32, 7)])
def test_every_patch_comes_out_as_large_as_it_went_in(patch: tuple[int, int, int]) -> None:
    net = ScratchUnet(contrasts=2, out=3, spacing_mm=(1.0, 1.0, 2.5), patch_ijk=patch, seed=0).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 2, *patch)).shape == (1, 3, *patch)


def test_the_seed_draws_the_network_and_everything_is_trained_alike() -> None:
    def weights(seed: int) -> torch.Tensor:
        net = ScratchUnet(contrasts=1, out=2, spacing_mm=(1.0, 1.0, 1.0), patch_ijk=(16, 16, 16), seed=seed)
        encoder, rest = net.groups()
        assert not encoder
        assert len(rest) == len(list(net.parameters()))
        assert net.depths() == {}
        return torch.cat([parameter.detach().flatten() for parameter in rest])

    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.rand(1), before)  # nobody else's random numbers moved


def test_a_patch_too_small_for_a_u_net_is_refused() -> None:
    with pytest.raises(ConfigError, match="too few for a U-Net"):
        ScratchUnet(contrasts=1, out=2, spacing_mm=(1.0, 1.0, 1.0), patch_ijk=(8, 8, 8), seed=0)
    with pytest.raises(ValueError, match="must be positive"):
        plan_unet((1.0, 0.0, 1.0), (16, 16, 16))
