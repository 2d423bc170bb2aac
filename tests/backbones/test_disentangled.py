from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig, Latents
from voxelstem.chance import Chance
from voxelstem.config import flatten, overlay
from voxelstem.testing import check_backbone

SMALL = DisentangledConfig(width=2, levels=3, latent=4, block_ijk=(8, 8, 8))


def drawn(config: DisentangledConfig = SMALL, seed: int = 0) -> Disentangled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Disentangled(config)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def count(*modules: nn.Module | None) -> int:
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())


def told_apart(network: Disentangled, blocks: Tensor) -> list[Tensor]:
    """What else than an embedding it makes of blocks."""
    latents = network.latents(blocks)
    painted = network.reconstruct(latents.subject_mean, latents.contrast_mean)
    spread = (latents.subject_logvar, latents.contrast_logvar)
    return [painted, *(one for one in spread if one is not None)]


@pytest.mark.parametrize("vae", [True, False])
def test_it_keeps_the_contract_of_backbones(vae: bool) -> None:
    check_backbone(lambda: Disentangled(replace(SMALL, vae=vae)), beyond=told_apart)


def test_as_it_stands_it_has_the_released_parameters_and_tensors() -> None:
    with torch.device("meta"):
        network = Disentangled(DisentangledConfig())
    assert sum(network.config.widths) == 992
    assert count(network.levels) == 14_134_944
    assert count(network.rises, network.out) == 3_744_673
    heads = [network.subject_mean, network.subject_logvar, network.contrast_mean, network.contrast_logvar]
    assert count(*heads) == 1_016_832
    assert count(network) == 18_896_449
    assert len(network.state_dict()) == 74
    assert (network.dim, network.patch_ijk) == (512, (16, 16, 16))


def by_hand(network: Disentangled, x: Tensor) -> tuple[Tensor, Tensor]:
    """Its means, written out with torch's own functions."""

    def convolved(layer: nn.Module, x: Tensor) -> Tensor:
        x = F.instance_norm(F.conv3d(x, layer.conv.weight, layer.conv.bias, padding=1))
        weight, bias = (part[:, None, None, None] for part in (layer.norm.weight, layer.norm.bias))
        return F.leaky_relu(x * weight + bias, 0.01)

    levels: list[Tensor] = []
    for number, level in enumerate(network.levels):
        x = F.max_pool3d(x, 2) if number else x
        x = convolved(level.conv2, convolved(level.conv1, x))
        levels.append(x)
    pooled = torch.cat([F.adaptive_avg_pool3d(one, levels[-1].shape[2:]) for one in levels], dim=1)
    heads = [network.subject_mean, network.contrast_mean]
    subject, contrast = (
        torch.einsum("oc,bcijk->boijk", head.weight[:, :, 0, 0, 0], pooled) + head.bias[:, None, None, None]
        for head in heads
    )
    return subject, contrast


def test_means_are_read_from_all_levels_at_the_coarsest_grid() -> None:
    network, x = drawn(), noise(2, 1, 8, 12, 16)
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    latents = network.latents(x)
    subject, contrast = by_hand(network, x)
    torch.testing.assert_close(latents.subject_mean, subject, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latents.contrast_mean, contrast, atol=1e-5, rtol=1e-4)
    cls, tokens = network.encode_blocks(x)
    torch.testing.assert_close(
        tokens.transpose(1, 2), torch.cat((subject, contrast), 1).flatten(2), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(cls, tokens.mean(1))


def test_maps_run_from_the_blocks_own_grid_to_the_latents() -> None:
    maps = drawn().features(noise(1, 1, 8, 12, 16))
    assert [tuple(one.shape[1:]) for one in maps] == [(2, 8, 12, 16), (4, 4, 6, 8), (8, 2, 3, 4)]


def test_a_scan_is_painted_from_subject_and_contrast_alone() -> None:
    network = drawn()
    latents = network.latents(noise(2, 1, 8, 8, 8))
    subject, contrast = latents.subject_mean, latents.contrast_mean
    painted = network.reconstruct(subject, contrast)
    assert painted.shape == (2, 1, 8, 8, 8)
    assert not torch.equal(painted, network.reconstruct(subject, contrast.flip(0)))
    assert not torch.equal(painted, network.reconstruct(subject.flip(0), contrast))


def test_drawn_latents_follow_their_distribution_row_by_row() -> None:
    rows, shape = 3, (4, 5, 5, 5)
    mean = torch.arange(rows).float()[:, None, None, None, None].expand(rows, *shape)
    logvar = torch.full((rows, *shape), 0.25).log()
    latents = Latents(subject_mean=mean, subject_logvar=logvar, contrast_mean=mean, contrast_logvar=logvar)
    chance = Chance.of(1, count=rows)
    subject, contrast = latents.drawn(chance)
    for row in range(rows):
        assert subject[row].mean().item() == pytest.approx(row, abs=0.1)
        assert subject[row].std().item() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(subject, contrast)
    assert not torch.equal(subject[0], subject[1] - 1)
    part = Latents(
        subject_mean=mean[1:], subject_logvar=logvar[1:], contrast_mean=mean[1:], contrast_logvar=logvar[1:]
    ).drawn(chance.part(1, rows))
    assert torch.equal(part[0], subject[1:])
    assert torch.equal(part[1], contrast[1:])


def test_without_variances_the_means_are_drawn() -> None:
    latents = drawn(replace(SMALL, vae=False)).latents(noise(1, 1, 8, 8, 8))
    assert latents.subject_logvar is None
    assert latents.contrast_logvar is None
    subject, contrast = latents.drawn(Chance.of(0))
    assert torch.equal(subject, latents.subject_mean)
    assert torch.equal(contrast, latents.contrast_mean)


def test_depth_grows_from_voxels_to_what_is_painted() -> None:
    depths = {name: depth for depth, members in drawn().param_groups() for name, _ in members}
    in_order = ["levels.0.conv1.conv.weight", "levels.2.conv2.norm.bias", "contrast_mean.weight"]
    in_order += ["rises.0.upsample.weight", "rises.1.conv.conv.weight", "out.bias"]
    assert [depths[name] for name in in_order] == [0, 2, 3, 4, 5, 6]


def test_settings_replay() -> None:
    assert overlay(DisentangledConfig(), flatten(SMALL)) == SMALL


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"levels": 1}, "levels >= 2"),
        ({"latent": 0}, "must be >= 1"),
        ({"block_ijk": (8, 8, 6)}, "must fill block_ijk"),
    ],
)
def test_a_network_that_cannot_be_is_refused(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **change)


def test_a_block_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="patches of 4 x 4 x 4 voxels must fill a block"):
        drawn().latents(noise(1, 1, 8, 8, 6))
