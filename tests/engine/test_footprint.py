from __future__ import annotations

import pytest
import torch

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import ProjectorConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.engine.cost import SampleCost
from voxelstem.engine.footprint import MARGIN, PROCESS_BYTES, Network, memory_of, network_bytes, ram_bytes, view_bytes
from voxelstem.engine.hardware import Fleet
from voxelstem.engine.loader import LoaderConfig
from voxelstem.engine.optim import OptimConfig, make_optimizer
from voxelstem.engine.parallel import ParallelConfig
from voxelstem.objectives.dino import Dino, DinoConfig
from voxelstem.views.crop import ViewKind
from voxelstem.views.multicrop import ViewsConfig

COSTS = SampleCost(
    forward_flops=1.0,
    backward_flops=2.0,
    block_flops=0.5,
    kept_bytes=100.0,
    kept_recomputing_bytes=30.0,
    scaled_bytes=7.0,
    cast_bytes=11.0,
)
NETWORK = Network(held=1000, learned=400, largest_block=50, outside=200)
DDP, FSDP = ParallelConfig(kind="ddp"), ParallelConfig(kind="fsdp")


@pytest.fixture
def dino() -> Dino:
    size = EncoderConfig(dim=12, depth=2, heads=2)
    backbone = ScanVit(ScanVitConfig(block_ijk=(8, 8, 8), block=size, scan=EncoderConfig(depth=0)))
    return Dino(DinoConfig(projector=ProjectorConfig(hidden=8, bottleneck=4, prototypes=6)), backbone)


def test_numbers_are_counted_as_torch_holds_them(dino: Dino):
    network = Network.of(dino)
    assert network.held == sum(value.numel() for value in dino.state_dict().values())
    assert network.learned == sum(p.numel() for p in dino.student.parameters())
    block = dino.student.backbone.block_encoder.blocks[0]
    assert network.largest_block == sum(p.numel() for p in block.parameters())
    # Two blocks of the student, two of the teacher.
    assert network.outside == sum(p.numel() for p in dino.parameters()) - 4 * network.largest_block


def test_alone_the_bytes_are_those_that_training_allocates(dino: Dino):
    optimizer = make_optimizer(dino, dino.learner.param_groups(), OptimConfig())
    for parameter in dino.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    memory = memory_of(Network.of(dino), COSTS, DDP, gpus=1, share=1, views=0.0, bf16=False)
    assert memory.weights == sum(value.nbytes for value in dino.state_dict().values())
    assert memory.gradients == sum(p.grad.nbytes for p in dino.parameters() if p.grad is not None)
    moments = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    assert memory.optimiser == sum(value.nbytes for value in moments)


def test_ddp_holds_everything_and_fsdp_its_share_and_what_it_gathers():
    whole = memory_of(NETWORK, COSTS, DDP, gpus=8, share=3, views=5.0, bf16=True)
    assert (whole.weights, whole.gradients, whole.optimiser) == (4000, 1600, 3200)
    assert (whole.copies, whole.activations, whole.views) == (7 + 11, 300, 15)
    assert whole.total == pytest.approx(MARGIN * (4000 + 1600 + 3200 + 18 + 300 + 15))
    part = memory_of(NETWORK, COSTS, FSDP, gpus=8, share=3, views=5.0, bf16=True)
    assert (part.weights, part.gradients, part.optimiser) == (500, 200, 400)
    assert part.copies == 7 + 2 * (2 * 50 + 200)
    alone = memory_of(NETWORK, COSTS, FSDP, gpus=1, share=3, views=5.0, bf16=True)
    assert alone.weights == whole.weights


def test_recomputing_keeps_less_and_micro_batches_keep_the_views_of_all():
    config = ParallelConfig(recompute=True, accumulate=4)
    memory = memory_of(NETWORK, COSTS, config, gpus=1, share=3, views=5.0, bf16=False)
    assert (memory.activations, memory.views) == (90, 60)


def naive_ring(gpus: int, size: float) -> float:
    """What one of a ring sends until all know the sum of `size` bytes: every part but its own, twice round."""
    part = size / gpus
    return sum(part for _ in range(gpus - 1)) + sum(part for _ in range(gpus - 1))


@pytest.mark.parametrize("gpus", [1, 2, 32, 256])
def test_gradients_go_round_a_ring(gpus: int):
    assert network_bytes(NETWORK, DDP, gpus=gpus, bf16=True) == pytest.approx(naive_ring(gpus, 4 * 400))


def test_fsdp_gathers_student_twice_and_teacher_once_in_each_micro_batch():
    config = ParallelConfig(kind="fsdp", accumulate=3)
    expected = 31 / 32 * (3 * (2 * 400 * 2 + 600 * 2) + 400 * 4)
    assert network_bytes(NETWORK, config, gpus=32, bf16=True) == pytest.approx(expected)


def test_views_and_readers_are_counted_for_one_machine():
    views = ViewsConfig(
        global_=ViewKind(count=2, size_ijk=(8, 8, 4)), local=ViewKind(count=8, size_ijk=(4, 4, 2)), region_scale=1.0
    )
    assert view_bytes(views) == 4 * (2 * 256 + 8 * 32)
    loader = LoaderConfig(batch=64, ahead=4, samples_per_open=2, workers=3)
    assert ram_bytes(loader, Fleet(), views=10.0) == 64 * 6 * 10 + 4 * PROCESS_BYTES
    # 16 GPUs on two machines: 8 processes with 4 samples each.
    assert ram_bytes(loader, Fleet(gpus=16), views=10.0) == 8 * (4 * 6 * 10 + 4 * PROCESS_BYTES)
