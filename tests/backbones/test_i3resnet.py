from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from voxelstem.backbones import i3resnet
from voxelstem.backbones.i3resnet import PATCH_IJK, Bottleneck, I3ResNet, I3ResNetConfig
from voxelstem.config import flatten, overlay
from voxelstem.testing import check_backbone

SMALL = I3ResNetConfig(width=2, depths=(1, 2, 1, 1), block_ijk=(64, 64, 32))


def drawn(config: I3ResNetConfig = SMALL, seed: int = 0) -> I3ResNet:
    """A network with weights and statistics of its own at every place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = I3ResNet(config)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_mean", "norm.bias")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        if name.endswith(("running_var", "norm.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> I3ResNet:
    return drawn()


def noise(rows: int, *sizes: int, seed: int = 1) -> Tensor:
    return torch.rand(rows, 1, *sizes, generator=torch.Generator().manual_seed(seed))


def test_it_keeps_the_contract_of_backbones() -> None:
    check_backbone(lambda: I3ResNet(SMALL), grid=(1, 1, 2))


def test_as_it_stands_it_is_resnet_152() -> None:
    with torch.device("meta"):
        network = I3ResNet(I3ResNetConfig())
    # 50 bottlenecks of three convolutions, the stem, and the classifier that ResNet counts too.
    assert 3 * sum(network.config.depths) + 2 == 152
    assert network.dim == 2048
    assert sum(parameter.numel() for parameter in network.parameters()) == 117_347_392


def test_a_bottleneck_is_three_convolutions_and_what_came_in() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = Bottleneck(8, 2, stride=1, branch_gain=0.5).double().eval()
        x = torch.randn(1, 8, 3, 4, 5, dtype=torch.float64)
    assert layer.shortcut is None
    # Written out: batch norm that has seen nothing divides by sqrt(1 + 1e-5).
    still = 1 / math.sqrt(1 + 1e-5)
    narrow = torch.einsum("oc,bcijk->boijk", layer.narrow.weight[:, :, 0, 0, 0], x).mul(still).clamp(min=0)
    padded = torch.nn.functional.pad(narrow, (1,) * 6)
    looked = torch.zeros_like(narrow)
    for i in range(3):
        for j in range(3):
            for k in range(3):
                part = padded[:, :, i : i + 3, j : j + 4, k : k + 5]
                looked += torch.einsum("oc,bcijk->boijk", layer.look.weight[:, :, i, j, k], part)
    looked = looked.mul(still).clamp(min=0)
    widened = torch.einsum("oc,bcijk->boijk", layer.widen.weight[:, :, 0, 0, 0], looked) * still * 0.5
    torch.testing.assert_close(layer(x), (widened + x).clamp(min=0))


def test_cls_is_the_mean_of_the_patches(network: I3ResNet) -> None:
    cls, patches = network.encode_blocks(noise(2, 64, 64, 32))
    torch.testing.assert_close(cls, patches.mean(dim=1))


def test_patches_lie_in_c_order(network: I3ResNet) -> None:
    cells = (5, 4, 3)
    blocks = torch.zeros(1, 1, 160, 128, 48)
    base = network.encode_blocks(blocks)[1]
    for lit in ((0, 0, 0), (4, 0, 0), (0, 3, 0), (0, 0, 2), (4, 3, 2)):
        bright = blocks.clone()
        i, j, k = (slice(at * patch, (at + 1) * patch) for at, patch in zip(lit, PATCH_IJK, strict=True))
        bright[:, :, i, j, k] = 1.0
        change = (network.encode_blocks(bright)[1] - base).detach().norm(dim=2)[0]
        brightest = np.unravel_index(int(change.argmax()), cells)
        # Strided convolutions look half a cell aside, so a neighbour may answer louder.
        assert max(abs(int(at) - wanted) for at, wanted in zip(brightest, lit, strict=True)) <= 1


def test_what_is_hidden_counts_as_air(network: I3ResNet) -> None:
    blocks = noise(1, 64, 64, 32)
    masked = torch.zeros(1, 8, dtype=torch.bool)
    masked[0, 5] = True
    emptied = blocks.clone()
    emptied[:, :, 32:, :32, 16:] = 0.0
    plain = network.encode_blocks(emptied)
    hidden = network.encode_blocks(blocks, masked=masked)
    assert torch.equal(hidden[0], plain[0])
    assert torch.equal(hidden[1], plain[1])


def test_many_blocks_are_looked_at_a_few_at_a_time(network: I3ResNet, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = noise(5, 32, 32, 16)
    together = network.encode_blocks(blocks)
    monkeypatch.setattr(i3resnet, "VOXELS_AT_ONCE", 2 * 32 * 32 * 16)
    apart = network.encode_blocks(blocks)
    torch.testing.assert_close(apart[0], together[0])
    torch.testing.assert_close(apart[1], together[1])


def test_in_training_batch_norm_sees_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i3resnet, "VOXELS_AT_ONCE", 1)
    network = drawn().train()
    network.encode_blocks(noise(3, 64, 64, 32))
    assert int(network.state_dict()["stem_norm.num_batches_tracked"]) == 1


def test_an_untrained_deep_network_has_outputs_of_ordinary_size() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deep = I3ResNet(I3ResNetConfig(width=4)).eval()
    cls = deep.encode_blocks(noise(2, 64, 64, 32))[0]
    assert 0.01 < float(cls.detach().std()) < 100


def test_there_is_no_scan_level(network: I3ResNet) -> None:
    assert not network.has_scan_level
    with pytest.raises(ValueError, match="no scan level"):
        network.look_at_scan(torch.zeros(1, 2, 2 * network.dim), (1, 1, 2))


def test_depths_run_from_the_stem_through_the_bottlenecks(network: I3ResNet) -> None:
    groups = dict(network.param_groups())
    assert sorted(groups) == list(range(1 + sum(SMALL.depths)))
    assert {name.split(".")[0] for name, _ in groups[0]} == {"stem", "stem_norm"}
    assert {name.rsplit(".", 2)[0] for name, _ in groups[3]} == {"stages.1.1"}


@pytest.mark.parametrize("sizes", [(31, 32, 16), (32, 33, 16), (32, 32, 8)])
def test_blocks_that_patches_do_not_fill_are_refused(network: I3ResNet, sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must fill a block"):
        network.encode_blocks(noise(1, *sizes))


@pytest.mark.parametrize(
    "changes",
    [{"width": 0}, {"channels": 0}, {"depths": (3, 0, 1, 1)}, {"block_ijk": (48, 32, 16)}, {"block_ijk": (0, 32, 16)}],
)
def test_impossible_sizes_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        dataclasses.replace(SMALL, **changes)


def test_its_config_comes_back_from_a_card() -> None:
    assert overlay(I3ResNetConfig(), flatten(SMALL)) == SMALL
    assert PATCH_IJK == I3ResNet(SMALL).patch_ijk
