"""What one sample costs a network: multiplications and the bytes that are kept for the gradient.

A step of the objective is run in miniature: its views, masks and passes as they will be, its networks a few numbers
wide. What it asks of each part (how many rows of how many tokens, with or without a gradient) does not depend on the
width, so the full networks' costs follow by formulas, without one full-sized tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from voxelstem.backbones.disentangled import DisentangledConfig
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import Projector, ProjectorConfig
from voxelstem.backbones.layers import Block
from voxelstem.backbones.trajectory import TrajectoryConfig
from voxelstem.backbones.unet import UNetConfig
from voxelstem.engine.targets import blank_targets
from voxelstem.protocols import Batch

FLOAT = 4
"""Bytes of a number in fp32; in bf16 half of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One use of a part in a step."""

    part: str
    """Name of the module in the objective."""
    rows: float
    """Blocks for a transformer block or a convolution, vectors for a linear layer or a projector; of one sample."""
    tokens: int
    """Of each row; for a convolution the voxels of its output, or of its input where it makes the grid finer."""
    trained: bool
    """Whether a gradient will come back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleCost:
    """What one sample costs the full networks in one step."""

    forward_flops: float
    backward_flops: float
    """Twice the forward ones of everything that is trained."""
    block_flops: float
    """The part of the forward ones that recomputing does again: trained transformer blocks."""
    kept_bytes: float
    """Kept from the forward pass for the backward one."""
    kept_recomputing_bytes: float
    """The same if each transformer block is computed again for its gradient: their inputs and the largest block."""
    scaled_bytes: float
    """Kept whatever the batch: weights times LayerScale, prototypes of length 1."""
    cast_bytes: float
    """Copies of all weights in bf16, where they are cast."""

    def flops(self, *, recompute: bool) -> float:
        """Of a whole step, forward and back."""
        return self.forward_flops + self.backward_flops + (self.block_flops if recompute else 0.0)


_SMALL: dict[type, dict[str, float]] = {
    EncoderConfig: {"dim": 12, "heads": 2},
    ProjectorConfig: {"hidden": 8, "bottleneck": 4, "prototypes": 8},
    DisentangledConfig: {"width": 1, "latent": 2},
    # Of two channels each side keeps one.
    TrajectoryConfig: {"state_share": 0.5, "hidden": 2},
}


def miniature(config: Any) -> Any:
    """The same config with networks a few numbers wide; everything else, depths too, as it is."""
    if type(config) in _SMALL:
        return replace(config, **_SMALL[type(config)])
    if isinstance(config, UNetConfig):
        # Stages of equal width stay so: where it changes there are convolutions that are not elsewhere.
        widths = sorted(set(config.features))
        return replace(config, features=tuple(2 + widths.index(width) for width in config.features))
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    inner = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    return replace(config, **{name: miniature(value) for name, value in inner.items()})


def blank_batch(views: Any, samples: int, *, columns: int = 0) -> Batch:
    """A batch of noise with the views of a `ViewsConfig`; `columns` volumes where it names no structures."""
    kinds = views.kinds
    generator = torch.Generator().manual_seed(0)
    return Batch(
        views={
            name: torch.rand((samples, kind.count, 1, *kind.size_ijk), generator=generator)
            for name, kind in kinds.items()
        },
        places_mm={
            name: torch.tensor([[0.0] * 3, [100.0] * 3]).expand(samples, kind.count, 2, 3)
            for name, kind in kinds.items()
        },
        seed=0,
        texts=("a report",) * samples if views.report else (),
        targets={name: torch.from_numpy(told) for name, told in blank_targets(views.pair, samples, columns).items()}
        if views.pair
        else {},
    )


def observe(objective: Any, batch: Batch) -> tuple[Call, ...]:
    """Run one step of the objective and note what it asks of its parts. Its state stays as it was."""
    calls: list[Call] = []

    def note(part: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows, tokens = _asked(module, inputs[0])
            calls.append(
                Call(
                    part=part,
                    rows=rows / len(batch),
                    tokens=tokens,
                    trained=torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()),
                )
            )

        return hook

    with ExitStack() as hooks:
        for name, module in _parts(objective):
            handle = module.register_forward_pre_hook(note(name))
            hooks.callback(handle.remove)
        objective.step(batch, progress=0.5)
    return tuple(calls)


def sample_cost(calls: Iterable[Call], objective: nn.Module, *, bf16: bool) -> SampleCost:
    """The full networks' costs. `objective` is full-sized and may lie on the `meta` device."""
    parts = dict(_parts(objective))
    size = FLOAT // 2 if bf16 else FLOAT
    totals = dict.fromkeys(("forward", "backward", "blocks", "kept", "inside", "inputs", "largest", "scaled"), 0.0)
    for call in calls:
        module = parts[call.part]
        flops = call.rows * call.tokens * _flops(module, call.tokens)
        totals["forward"] += flops
        if isinstance(module, Projector):
            # The loss works in fp32: a trained row's logits are kept, and so is what the teacher's row became.
            totals["kept"] += call.rows * FLOAT * len(module.prototypes)
        if not call.trained:
            continue
        totals["backward"] += 2 * flops
        kept = call.rows * call.tokens * _kept(module) * size
        totals["scaled"] += _scaled(module) * size
        if isinstance(module, Block):
            totals["blocks"] += flops
            totals["inputs"] += call.rows * call.tokens * module.norm1.normalized_shape[0] * size
            totals["largest"] = max(totals["largest"], kept)
            totals["inside"] += kept
        else:
            totals["kept"] += kept
    cast = size * sum(p.numel() for p in objective.parameters() if p.ndim > 1) if bf16 else 0.0
    return SampleCost(
        forward_flops=totals["forward"],
        backward_flops=totals["backward"],
        block_flops=totals["blocks"],
        kept_bytes=totals["kept"] + totals["inside"],
        kept_recomputing_bytes=totals["kept"] + totals["inputs"] + totals["largest"],
        scaled_bytes=totals["scaled"],
        cast_bytes=cast,
    )


def _parts(objective: nn.Module) -> list[tuple[str, nn.Module]]:
    """Blocks, projectors, and linear layers and convolutions outside of both."""
    named = list(objective.named_modules())
    parts: list[tuple[str, nn.Module]] = [(name, m) for name, m in named if isinstance(m, Block | Projector)]
    inside = tuple(f"{name}." for name, _ in parts)
    simple = nn.Linear | nn.Conv3d | nn.ConvTranspose3d
    return parts + [(name, m) for name, m in named if isinstance(m, simple) and not name.startswith(inside)]


def _asked(module: nn.Module, x: torch.Tensor) -> tuple[float, int]:
    """Rows of the input, and tokens of each."""
    if isinstance(module, nn.Conv3d):
        # Padded so that a stride alone makes the grid coarser, as all of ours are.
        return len(x), math.prod(-(-size // step) for size, step in zip(x.shape[2:], module.stride, strict=True))
    if isinstance(module, nn.ConvTranspose3d):
        return len(x), math.prod(x.shape[2:])
    tokens = x.shape[1] if isinstance(module, Block) else 1
    return x.shape[:-1].numel() / tokens, tokens


def _flops(module: nn.Module, tokens: int) -> float:
    """Forward, of one token (vector): two for each multiplication by a weight, and attention's two products."""
    weights = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    if isinstance(module, Block):
        return 2 * weights + 4 * tokens * module.norm1.normalized_shape[0]
    return 2 * weights


def _kept(module: nn.Module) -> float:
    """Numbers kept for the gradient, of one token (vector)."""
    if isinstance(module, Block):
        dim, hidden = module.fc1.in_features, module.fc1.out_features
        # Of width dim: 2 inputs and 2 outputs of norms, query, key and value before (3) and turned (2), what attention
        # gives, and that with its heads side by side. Of the MLP's width: before and after GELU.
        return 11 * dim + 2 * hidden
    if isinstance(module, Projector):
        layers = [layer for layer in module.mlp if isinstance(layer, nn.Linear)]
        # Each layer's input, what comes before each GELU, the bottleneck before and after normalising.
        return sum(layer.in_features + layer.out_features for layer in layers) + layers[-1].out_features
    if isinstance(module, nn.Conv3d):
        # Its input, and its output as the input of the norm behind it; activations are made in place.
        return module.in_channels * math.prod(module.stride) + module.out_channels
    if isinstance(module, nn.ConvTranspose3d):
        return module.in_channels
    return math.prod(module.weight.shape[1:]) if isinstance(module, nn.Linear) else 0.0


def _scaled(module: nn.Module) -> float:
    """Weights of which a scaled copy is kept."""
    if isinstance(module, Block):
        return module.attn.proj.weight.numel() + module.fc2.weight.numel()
    return 2 * module.prototypes.numel() if isinstance(module, Projector) else 0.0
