"""The training loop of fine-tuning: patches of few labelled scans, two learning rates, one progress."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.chance import Chance
from voxelstem.engine.device import autocast
from voxelstem.errors import AuditError
from voxelstem.finetune.cases import Case
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.dynunet import ScratchUnet
from voxelstem.finetune.network import Tuned
from voxelstem.losses.binary import balanced_binary_entropy, kind_weights
from voxelstem.losses.overlap import overlap
from voxelstem.schedules import tuning
from voxelstem.study import Survival

Net = Tuned | ScratchUnet
"""What can be trained: a pretrained network with what is new above it, or one that begins with nothing."""
Loss = Callable[[Tensor, Tensor], Tensor]
Report = Callable[[float], None]
"""Hears the loss of every step."""
Pick = Callable[[Sequence[Case]], Callable[[int, np.random.Generator], Iterator[Case]]]
"""From all cases: what draws so many of them for a batch."""


def in_turns(cases: Sequence[Case]) -> Callable[[int, np.random.Generator], Iterator[Case]]:
    """Each case as often as any other; of several classes of scans each class."""
    turns = turns_of(cases)

    def pick(count: int, rng: np.random.Generator) -> Iterator[Case]:
        for _ in range(count):
            group = turns[int(rng.integers(len(turns)))]
            yield group[int(rng.integers(len(group)))]

    return pick


def fit(
    net: Net,
    cases: Sequence[Case],
    config: FinetuneConfig,
    *,
    loss: Loss,
    seed: int,
    report: Report | None = None,
    held: Sequence[Case] = (),
    pick: Pick = in_turns,
) -> None:
    """Train the network in place, where it lies; the same seed draws the same patches.

    Args:
        net: Left in evaluation mode.
        cases: What it learns from. Classes of scans (a `target` that is no float) are drawn equally often.
        config: How.
        loss: Of logits and truth, see `loss_of`.
        seed: Of the patches, and of dropout.
        report: Hears of every step.
        held: Cases that nothing is learned from. Their loss says which step is kept and when to stop; see `Watch`.
        pick: How the cases of a batch are drawn.
    """
    device = next(net.parameters()).device
    net.train().requires_grad_(False)
    watch = Watch(net, held, config, loss, seed, pick=pick) if held else None
    rng = np.random.default_rng([seed, 17])
    encoder, rest = net.groups()
    for parameter in rest:
        parameter.requires_grad_(True)
    solver = _solver(net, config)
    drawing = pick(cases)
    for step in range(config.steps):
        shares = tuning(step / config.steps, kind=config.schedule, warm_up=config.warm_up)
        for group in solver.param_groups:
            group["lr"] = config.lr * shares[group["part"]] * group["pace"]
        for parameter in encoder:
            parameter.requires_grad_(shares[0] > 0)
        drawn = [cut(case, config, net, rng) for case in drawing(config.batch, rng)]
        images, truths = (torch.stack(side).to(device) for side in zip(*drawn, strict=True))
        keys = Chance.of(seed, first=step * config.batch, count=config.batch).to(device)
        with autocast(device, "auto" if device.type == "cuda" else "fp32"):
            logits = net(images, keys=keys)
        value = loss(logits.float(), truths)
        solver.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], config.clip)
        solver.step()
        if not torch.isfinite(value):
            raise AuditError(f"training diverged at step {step + 1}: the loss is no number", hint="use a lower full.lr")
        if report is not None:
            report(value.item())
        if watch is not None and watch.is_enough(step + 1):
            break
    if watch is not None:
        watch.take_best()
    net.eval().requires_grad_(requires_grad=False)


class Watch:
    """Asks held-out cases every now and then, and keeps what was best.

    The same patches are asked every time (as many as there were looks, in whole batches), without jitter, so that looks
    are comparable.
    """

    def __init__(
        self, net: Net, held: Sequence[Case], config: FinetuneConfig, loss: Loss, seed: int, *, pick: Pick = in_turns
    ) -> None:
        """Draw the patches."""
        rng, drawing = np.random.default_rng([seed, 23]), pick(held)
        still = dataclasses.replace(config, jitter=0.0, mirror=())
        # A batch that belongs together is asked together.
        batches = -(-max(config.looks, config.batch) // config.batch)
        drawn = [cut(case, still, net, rng) for _ in range(batches) for case in drawing(config.batch, rng)]
        self.net, self.config, self.loss = net, config, loss
        self.images, self.truths = (torch.stack(side) for side in zip(*drawn, strict=True))
        self.every = max(1, config.steps // config.looks)
        self.best, self.step, self.worse = math.inf, 0, 0
        self.kept: dict[str, Tensor] = {}

    def is_enough(self, step: int) -> bool:
        """Look, if it is time to after so many steps; true once looks no longer get better."""
        if step % self.every and step < self.config.steps:
            return False
        found = self._ask()
        if found < self.best:
            self.best, self.step, self.worse = found, step, 0
            self.kept = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
        else:
            self.worse += 1
        return self.worse >= self.config.patience

    def take_best(self) -> None:
        """Give the network back what it was at the best look.

        Raises:
            AuditError: no look gave a finite loss.
        """
        if not self.kept:
            raise AuditError(
                "training diverged: no look at the held-out scans gave a finite loss", hint="use a lower full.lr"
            )
        self.net.load_state_dict(self.kept)

    @torch.no_grad()
    def _ask(self) -> float:
        self.net.eval()
        device = next(self.net.parameters()).device
        losses = [
            self.loss(self.net(images.to(device)).float(), truths.to(device)).item()
            for images, truths in zip(
                self.images.split(self.config.batch), self.truths.split(self.config.batch), strict=True
            )
        ]
        self.net.train()
        found = float(np.mean(losses))
        return found if math.isfinite(found) else math.inf


def loss_of(task: str, config: FinetuneConfig, cases: Sequence[Case] = ()) -> Loss:
    """The loss of a task: an overlap and cross entropy, cross entropy, or Huber's on standardised numbers.

    Of `findings` it is binary cross entropy, in which both kinds of a class weigh alike among `cases`.
    """
    match task:
        case "segment":
            return lambda logits, truth: overlap(logits, truth, kind=config.loss)
        case "findings":
            weights = kind_weights(torch.tensor([case.target for case in cases]))
            return lambda logits, truth: balanced_binary_entropy(logits, truth, weights)
        case "classify":
            return lambda logits, truth: F.cross_entropy(logits, truth.long())
        case _:
            return lambda logits, truth: F.smooth_l1_loss(logits[:, 0], truth.float())


def turns_of(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases by their class; all together where voxels or numbers are learned."""
    if cases[0].truth is not None or isinstance(cases[0].target, float | Survival | tuple):
        return [list(cases)]
    kinds = sorted({int(case.target) for case in cases if not isinstance(case.target, Survival | tuple)})
    return [[case for case in cases if case.target == kind] for kind in kinds]


def cut(
    case: Case, config: FinetuneConfig, net: Net, rng: np.random.Generator
) -> tuple[Float[Tensor, "contrast i j k"], Tensor]:
    """One patch of a case and its truth: of voxels, a class, a number, or time and event."""
    patch = config.patch_ijk or (net.block_ijk if isinstance(net, ScratchUnet) else net.backbone.config.block_ijk)
    corner = _corner(case, patch, config.foreground, rng)
    box = tuple(slice(low, low + side) for low, side in zip(corner, patch, strict=True))
    flips = [axis for axis in config.mirror if rng.random() < 0.5]  # noqa: PLR2004
    image = _changed(case.seen.image[(slice(None), *box)], config.jitter, rng).flip([1 + axis for axis in flips])
    if isinstance(case.target, Survival):
        return image, torch.tensor([case.target.time, float(case.target.event)], dtype=torch.float64)
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


def _solver(net: Net, config: FinetuneConfig) -> Any:
    """An optimiser whose groups know their `part` (0 the encoder, 1 the rest) and the `pace` of their layer."""
    encoder, rest = net.groups()
    above = net.depths() if config.layer_decay < 1 else {}
    by_depth: dict[int, list[nn.Parameter]] = {}
    for parameter in encoder:
        by_depth.setdefault(above.get(parameter, 0), []).append(parameter)
    settings = [
        {"params": group, "lr": config.lr, "part": 0, "pace": config.layer_decay**depth}
        for depth, group in sorted(by_depth.items())
    ]
    settings.append({"params": rest, "lr": config.lr, "part": 1, "pace": 1.0})
    if config.optimiser == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=0.99, nesterov=True, weight_decay=config.weight_decay)
    return torch.optim.AdamW(settings, lr=config.lr, weight_decay=config.weight_decay)
