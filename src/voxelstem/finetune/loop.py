"""The training loop of fine-tuning: patches of few labelled scans, two learning rates, one progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.chance import Chance
from voxelstem.engine.device import autocast
from voxelstem.finetune.cases import Case
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.network import Tuned
from voxelstem.losses.overlap import overlap
from voxelstem.schedules import tuning

Loss = Callable[[Tensor, Tensor], Tensor]
Report = Callable[[float], None]
"""Hears the loss of every step."""


def fit(
    net: Tuned,
    cases: Sequence[Case],
    config: FinetuneConfig,
    *,
    loss: Loss,
    seed: int,
    report: Report | None = None,
) -> None:
    """Train the network in place, where it lies; the same seed draws the same patches.

    Args:
        net: Left in evaluation mode.
        cases: What it learns from. Classes of scans (a `target` that is no float) are drawn equally often.
        config: How.
        loss: Of logits and truth, see `loss_of`.
        seed: Of the patches, and of dropout.
        report: Hears of every step.
    """
    device = next(net.parameters()).device
    net.train().requires_grad_(requires_grad=True)
    rng = np.random.default_rng([seed, 17])
    encoder, rest = net.groups()
    solver = _solver([encoder, rest], config)
    groups = turns_of(cases)
    for step in range(config.steps):
        shares = tuning(step / config.steps, kind=config.schedule, warm_up=config.warm_up)
        for group, share in zip(solver.param_groups, shares, strict=True):
            group["lr"] = config.lr * share
        for parameter in encoder:
            parameter.requires_grad_(shares[0] > 0)
        drawn = [draw(groups, config, net, rng) for _ in range(config.batch)]
        images, truths = (torch.stack(side).to(device) for side in zip(*drawn, strict=True))
        keys = Chance.of(seed, first=step * config.batch, count=config.batch).to(device)
        with autocast(device, "auto" if device.type == "cuda" else "fp32"):
            logits = net(images, keys=keys)
        value = loss(logits.float(), truths)
        solver.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], config.clip)
        solver.step()
        if report is not None:
            report(value.item())
    net.eval().requires_grad_(requires_grad=False)


def loss_of(task: str, config: FinetuneConfig) -> Loss:
    """The loss of a task: an overlap and cross entropy, cross entropy, or Huber's on standardised numbers."""
    match task:
        case "segment":
            return lambda logits, truth: overlap(logits, truth, kind=config.loss)
        case "classify":
            return lambda logits, truth: F.cross_entropy(logits, truth.long())
        case _:
            return lambda logits, truth: F.smooth_l1_loss(logits[:, 0], truth.float())


def turns_of(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases by their class; all together where voxels or numbers are learned."""
    if cases[0].truth is not None or isinstance(cases[0].target, float):
        return [list(cases)]
    return [[case for case in cases if case.target == kind] for kind in sorted({case.target for case in cases})]


def draw(
    turns: Sequence[Sequence[Case]], config: FinetuneConfig, net: Tuned, rng: np.random.Generator
) -> tuple[Float[Tensor, "contrast i j k"], Tensor]:
    """One patch and its truth. Of several classes of scans each is drawn equally often."""
    group = turns[int(rng.integers(len(turns)))]
    case = group[int(rng.integers(len(group)))]
    patch = config.patch_ijk or net.backbone.config.block_ijk
    corner = _corner(case, patch, config.foreground, rng)
    box = tuple(slice(low, low + side) for low, side in zip(corner, patch, strict=True))
    flips = [axis for axis in config.mirror if rng.random() < 0.5]  # noqa: PLR2004
    image = _changed(case.seen.image[(slice(None), *box)], config.jitter, rng).flip([1 + axis for axis in flips])
    if case.truth is None:
        return image, torch.tensor(case.target)
    return image, case.truth[box].flip(flips)


def _corner(
    case: Case, patch: tuple[int, int, int], foreground: float, rng: np.random.Generator
) -> Int[np.ndarray, "3"]:
    """Where a patch begins: anywhere, or so that a voxel of a class lies somewhere within it."""
    room = np.array(case.seen.image.shape[1:], dtype=np.int64) - np.array(patch)
    if not case.marked or rng.random() >= foreground:
        return rng.integers(0, room + 1)
    places = case.marked[int(rng.integers(len(case.marked)))]
    voxel = np.unravel_index(int(places[int(rng.integers(len(places)))]), case.seen.image.shape[1:])
    return np.clip(np.array(voxel) - rng.integers(0, np.array(patch)), 0, room)


def _changed(
    image: Float[Tensor, "contrast i j k"], jitter: float, rng: np.random.Generator
) -> Float[Tensor, "contrast i j k"]:
    """Each contrast a little flatter or steeper, darker or brighter."""
    gain, lift = (torch.from_numpy(rng.uniform(-jitter, jitter, len(image)).astype(np.float32)) for _ in range(2))
    middle, spread = image.mean(dim=(1, 2, 3)), image.std(dim=(1, 2, 3))
    shape = (-1, 1, 1, 1)
    return image + (image - middle.view(shape)) * gain.view(shape) + (lift * spread).view(shape)


def _solver(groups: Sequence[list[nn.Parameter]], config: FinetuneConfig) -> Any:
    settings = [{"params": group, "lr": config.lr} for group in groups]
    if config.optimiser == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=0.99, nesterov=True, weight_decay=config.weight_decay)
    return torch.optim.AdamW(settings, lr=config.lr, weight_decay=config.weight_decay)
