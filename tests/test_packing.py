from __future__ import annotations

import pytest
import torch
from torch import Tensor

from voxelstem.packing import MOST_KNOWN, Packer


class Network:
    """Says of a block its sum and its corner, and counts its passes."""

    def __init__(self) -> None:
        self.passes: list[int] = []

    def __call__(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        self.passes.append(len(blocks))
        return blocks.flatten(1).sum(1, keepdim=True), blocks[:, 0, :1, 0]


class Scan:
    def __init__(self) -> None:
        self.taken: dict[int, tuple[float, float]] = {}

    def take(self, index: int, cls: Tensor, patches: Tensor) -> None:
        assert index not in self.taken
        self.taken[index] = float(cls), float(patches[0, 0])


def blocks(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 2, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_blocks_of_several_scans_share_passes_and_come_back_to_their_own():
    network, one, two = Network(), Scan(), Scan()
    packer = Packer(network, per_pass=4)
    first, second = blocks(3, 0), blocks(6, 1)
    packer.put(one, 0, first)
    packer.put(two, 0, second[:2])
    packer.put(two, 2, second[2:])
    packer.flush()
    assert network.passes == [4, 4, 1]
    for scan, voxels in ((one, first), (two, second)):
        assert sorted(scan.taken) == list(range(len(voxels)))
        for index, (total, corner) in scan.taken.items():
            assert total == pytest.approx(float(voxels[index].sum()))
            assert corner == float(voxels[index, 0, 0, 0, 0])


def test_a_constant_block_is_computed_once_for_each_value_and_shape():
    network, scan = Network(), Scan()
    packer = Packer(network, per_pass=4)
    air, bone, other = torch.zeros(5, 1, 2, 2, 2), torch.ones(2, 1, 2, 2, 2), torch.zeros(1, 1, 4, 2, 2)
    packer.put(scan, 0, air)
    packer.put(scan, 5, bone)
    packer.put(scan, 7, other)
    packer.flush()
    assert network.passes == [1, 1, 1]
    assert (packer.computed, packer.reused) == (3, 5)
    assert [scan.taken[index][0] for index in range(8)] == [0, 0, 0, 0, 0, 8, 8, 0]


def test_only_a_few_constant_blocks_are_remembered():
    network, scan = Network(), Scan()
    packer = Packer(network, per_pass=4)
    for value in range(2 * MOST_KNOWN):
        packer.put(scan, value, torch.full((1, 1, 2, 2, 2), value / 64))
    assert len(packer._known) == MOST_KNOWN


def test_a_flush_of_nothing_asks_the_network_for_nothing():
    network = Network()
    Packer(network, per_pass=1).flush()
    assert network.passes == []


def test_passes_of_no_block_are_refused():
    with pytest.raises(ValueError, match="per_pass"):
        Packer(Network(), per_pass=0)
