"""Bytes that a step holds on each device, and bytes that it sends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from voxelstem.backbones.layers import Block
from voxelstem.engine.cost import FLOAT, SampleCost
from voxelstem.engine.hardware import Fleet
from voxelstem.engine.parallel import ParallelConfig

MARGIN = 1.1
"""Memory is lost between allocations, and kernels need room to work in."""
PROCESS_BYTES = 0.35e9
"""Of a process that reads and makes samples, before it holds any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """How many numbers there are in a full-sized objective."""

    held: int
    """Parameters and buffers, the teacher's too."""
    learned: int
    largest_block: int
    """The largest transformer block: what `fsdp` gathers at once."""
    outside: int
    """Parameters that are in no transformer block."""

    @classmethod
    def of(cls, objective: nn.Module) -> Network:
        """Count; the objective may lie on the `meta` device."""
        blocks = [_count(module) for module in objective.modules() if isinstance(module, Block)]
        return cls(
            held=sum(tensor.numel() for tensor in objective.state_dict().values()),
            learned=sum(p.numel() for p in objective.parameters() if p.requires_grad),
            largest_block=max(blocks, default=0),
            outside=_count(objective) - sum(blocks),
        )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that one device holds at the peak of a step."""

    weights: float
    """Of student, teacher and heads, in fp32, and buffers."""
    gradients: float
    optimiser: float
    """AdamW's two moments."""
    copies: float
    """Weights in bf16 or scaled, and with `fsdp` what is gathered while it is needed."""
    activations: float
    """Kept for the gradient."""
    views: float

    @property
    def total(self) -> float:
        """With a margin for what lies between allocations."""
        parts = (self.weights, self.gradients, self.optimiser, self.copies, self.activations, self.views)
        return MARGIN * sum(parts)


def memory_of(
    network: Network,
    costs: SampleCost,
    parallel: ParallelConfig,
    *,
    gpus: int,
    share: int,
    views: float,
    bf16: bool,
    chunk: int | None = None,
) -> Memory:
    """What one of `gpus` devices holds, each with micro-batches of `share` samples of `views` bytes.

    Of these, `chunk` at a time (None: all) pass through the network and keep what the gradient needs.

    With `ddp` each holds everything; with `fsdp` a part of it, and gathers block by block what it needs.
    """
    sharded = parallel.kind == "fsdp" and gpus > 1
    parts = gpus if sharded else 1
    # Two blocks, because one comes while the other works; what is in no block stays as long as the step takes.
    gathered = (2 * network.largest_block + network.outside) * (FLOAT // 2 if bf16 else FLOAT)
    return Memory(
        weights=FLOAT * network.held / parts,
        gradients=FLOAT * network.learned / parts,
        optimiser=2 * FLOAT * network.learned / parts,
        copies=costs.scaled_bytes + (gathered if sharded else costs.cast_bytes),
        activations=(share if chunk is None else chunk)
        * (costs.kept_recomputing_bytes if parallel.recompute else costs.kept_bytes),
        views=share * parallel.accumulate * views,
    )


def network_bytes(network: Network, parallel: ParallelConfig, *, gpus: int, bf16: bool) -> float:
    """What each GPU sends in a step, by rings: a sum costs twice its size, gathering or scattering once."""
    away = (gpus - 1) / gpus
    if parallel.kind == "ddp":
        return 2 * away * FLOAT * network.learned
    weights = FLOAT // 2 if bf16 else FLOAT
    # The student's weights come for the forward and again for the backward pass, the teacher's once.
    gathered = weights * (network.held + network.learned)
    return away * (parallel.accumulate * gathered + FLOAT * network.learned)


def view_bytes(views: Any) -> float:
    """Of the views of one sample (a `ViewsConfig`), in fp32."""
    return FLOAT * sum(kind.count * math.prod(kind.size_ijk) for kind in views.kinds.values())


def ram_bytes(loader: Any, fleet: Fleet, *, views: float) -> float:
    """Of one machine: samples that are prepared ahead (a `LoaderConfig`), and the processes that prepare them."""
    processes = min(fleet.gpus, fleet.per_node) if fleet.gpus else 1
    samples = loader.batch / max(1, fleet.gpus) * (loader.ahead + loader.samples_per_open)
    return processes * (samples * views + (1 + loader.workers) * PROCESS_BYTES)
