"""From weights and labelled scans to a tuned network, and from a tuned network to what it says of scans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from voxelstem.backbones.lowrank import fold
from voxelstem.card import Card
from voxelstem.engine.device import choose
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.finetune.cases import Case, Seen, companions, labelled, see
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.loop import fit, loss_of
from voxelstem.finetune.network import Tuned, build, restore
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.protocols import Head, Task
from voxelstem.store import Record, Store
from voxelstem.study import InputSpec
from voxelstem.truth import Truth
from voxelstem.views import cells, slide
from voxelstem.views.winners import winners

OWN = "net."
"""Before the names of the tuned network's own tensors among a head's arrays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What a tuned network says of a scan, in the form of features: the head above it changes nothing."""

    scan: Float[np.ndarray, " out"]
    """Log-probabilities of classes, or the number in standard deviations; nothing where voxels are labelled."""
    tokens: Float[np.ndarray, "i j k kind"] | None = None
    """Logits of every voxel on the network's grid."""
    tokens_affine_ras: Float[np.ndarray, "4 4"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be learned: the task's name and kind, its classes, and what is known of whom."""

    task: str
    voxels: bool
    classes: tuple[str, ...]
    targets: Mapping[str, int | float]
    """Subject to class (counted in `classes`) or number; empty where voxels are labelled."""

    @classmethod
    def of(cls, name: str, task: Task, truth: Truth, classes: tuple[str, ...]) -> Asked:
        """What a task asks of subjects of whom this is known."""
        targets: dict[str, int | float] = dict(truth.values)
        targets |= {subject: classes.index(label) for subject, label in truth.labels.items() if label in classes}
        return cls(task=name, voxels=task.voxels, classes=classes, targets=targets)

    @property
    def out(self) -> int:
        """How many logits there are."""
        return len(self.classes) + 1 if self.voxels else max(len(self.classes), 1)


def tune(
    model: Model,
    store: Store,
    records: Sequence[Record],
    asked: Asked,
    config: FinetuneConfig,
    *,
    seed: int,
) -> tuple[Head, Card, dict[str, Tensor]]:
    """Fine-tune a model on labelled scans: the head, and card and tensors of the backbone that goes with it.

    Every scan is held in memory on the network's grid while it trains.

    Raises:
        ConfigError: a backbone or contrasts that this cannot be done with.
        IngestError: a scan that cannot be brought to the weights' spacing.
    """
    net, card = build(model, out=asked.out, config=config, voxels=asked.voxels, seed=seed)
    numbers = not asked.voxels and not asked.classes
    known = np.array([asked.targets[record.subject] for record in records]) if numbers else np.zeros(1)
    middle, spread = float(known.mean()), max(float(known.std()), 1e-6)
    cases: list[Case] = []
    held: list[Case] = []
    apart = hold_out([record.subject for record in records], asked, config.held, seed)
    for record, keys in _together(store, records, config):
        side = held if record.subject in apart else cases
        if asked.voxels:
            side.append(labelled(store, keys, card.spec, asked.classes))
            continue
        said = asked.targets[record.subject]
        target = (said - middle) / spread if numbers else int(said)
        side.append(Case(seen=see(store, keys, card.spec), target=target))
    net.to(choose("auto"))
    config = replace(config, patch_ijk=card.spec.block_ijk)
    with progress(f"{asked.task}: the whole network", config.steps) as advance:
        fit(
            net,
            cases,
            config,
            loss=loss_of(asked.task, config),
            seed=seed,
            report=lambda loss: advance(1, note=f"loss {loss:.3f}"),
            held=held,
        )
    net.cpu()
    fold(net.backbone)
    one, plain = np.eye(asked.out), asked.out
    arrays = {"middle": np.zeros(plain), "scale": np.ones(plain), "weight": one, "bias": np.zeros(plain)}
    if numbers:
        arrays |= {"weight": np.array([spread]), "bias": np.array([middle])}
    arrays |= {OWN + name: tensor.numpy() for name, tensor in net.own().items()}
    mode = "full" if config.changes == "all" else "adapters"
    head = Head(mode=mode, classes=asked.classes, arrays=arrays, facts={"sub": 1.0})
    what = "whole" if config.changes == "all" else "by low-rank changes, folded in"
    notes = f"fine-tuned {what} for {asked.task} on {len(cases)} labelled scans"
    notes += f"; {len(held)} more said when to stop" if held else ""
    card = replace(card, recipe=f"{card.recipe} + {mode}".strip(" +"), notes=(*card.notes, notes))
    return head, card, dict(net.backbone.state_dict())


def hold_out(subjects: Sequence[str], asked: Asked, share: float, seed: int) -> frozenset[str]:
    """Subjects whom training does not see: of each class a share, and never the last one.

    Raises:
        ConfigError: a share is wanted, and there is nobody to spare.
    """
    if not share:
        return frozenset()
    groups: dict[int | float, list[str]] = {}
    for subject in sorted(set(subjects)):
        kind = asked.targets.get(subject, 0) if asked.classes and not asked.voxels else 0
        groups.setdefault(kind, []).append(subject)
    rng, apart = np.random.default_rng([seed, 29]), set[str]()
    for _, group in sorted(groups.items()):
        count = min(round(share * len(group)), len(group) - 1)
        apart |= {group[place] for place in rng.permutation(len(group))[:count]}
    if not apart:
        raise ConfigError(
            f"full.held={share:g} of {len(set(subjects))} labelled subjects is nobody",
            hint="label more subjects, or leave full.held at 0: training then takes all its steps",
        )
    return frozenset(apart)


def tuned(model: Model, head: Head, asked: Asked, config: FinetuneConfig) -> Tuned:
    """The network of a finished run, in evaluation mode.

    Raises:
        CheckpointError: head and weights belong to different runs.
    """
    own = {name.removeprefix(OWN): torch.from_numpy(array) for name, array in head.arrays.items() if OWN in name}
    try:
        return restore(model, own, out=asked.out, config=config, voxels=asked.voxels)
    except RuntimeError as error:
        raise CheckpointError(
            "the head does not fit the weights beside it", hint="copy the whole run folder again"
        ) from error


@torch.inference_mode()
def say(net: Tuned, seen: Seen, spec: InputSpec, asked: Asked, config: FinetuneConfig) -> Said:
    """What a tuned network says of a scan: under windows as large as the patches it learned from.

    Voxels: Gaussian-weighted mean of logits. Classes: mean of log-probabilities over windows. Numbers: their median.
    """
    device = next(net.parameters()).device
    image, window = seen.image.to(device), spec.block_ijk
    if asked.voxels:
        logits = slide.slide(net, image, window, overlap=config.overlap).cpu()
        i, j, k = seen.shape_ijk
        tokens = logits[:, :i, :j, :k].permute(1, 2, 3, 0).numpy()
        return Said(scan=np.zeros(0), tokens=tokens, tokens_affine_ras=seen.affine_ras)
    i, j, k = image.shape[1:]
    rows: list[Tensor] = []
    for low in slide.places((i, j, k), window, overlap=config.overlap):
        box = tuple(slice(start, start + side) for start, side in zip(low, window, strict=True))
        rows.append(net(image[(slice(None), *box)][None])[0].float().cpu())
    answers = torch.stack(rows)
    joined = answers.log_softmax(dim=1).mean(dim=0) if asked.classes else answers.quantile(0.5, dim=0)
    return Said(scan=joined.numpy())


@torch.inference_mode()
def mark(
    net: Tuned,
    seen: Seen,
    spec: InputSpec,
    config: FinetuneConfig,
    affine_ras: Float[np.ndarray, "4 4"],
    shape_ijk: tuple[int, int, int],
) -> Int[np.ndarray, "i j k"]:
    """The class of every voxel of a scan on its own grid, 0 for background, as `say` and its head would have it.

    Logits live a window at a time, along the network grid's longest axis.
    """
    axis = int(np.argmax(seen.shape_ijk))
    image = seen.image.to(next(net.parameters()).device)
    grid = cells.lay(affine_ras, shape_ijk, seen.affine_ras, seen.shape_ijk)
    slabs = slide.roll(net, image, spec.block_ijk, axis=axis, overlap=config.overlap)
    return winners(_within(slabs, seen, axis), grid, axis=axis)


def _within(slabs: Iterable[slide.Slab], seen: Seen, axis: int) -> Iterator[slide.Slab]:
    """Slabs without what lies behind the scan, in memory of the processor."""
    i, j, k = seen.shape_ijk
    for slab in slabs:
        rows = min(slab.values.shape[1 + axis], seen.shape_ijk[axis] - slab.start)
        if rows > 0:
            values = slab.values.narrow(1 + axis, 0, rows)[:, :i, :j, :k]
            yield slide.Slab(start=slab.start, values=values.float().cpu())


class Speaker:
    """Says of any scan of a store what a tuned network makes of it: `features.FeaturesOf`."""

    def __init__(self, model: Model, head: Head, store: Store, asked: Asked, config: FinetuneConfig) -> None:
        """Take a run apart; the InputSpec is the card's.

        Raises:
            CheckpointError: head and weights belong to different runs.
        """
        self.net = tuned(model, head, asked, config).to(choose("auto"))
        self.spec, self.store, self.asked, self.config = model.spec, store, asked, config

    def __call__(self, key: str) -> Said:
        """Look at one scan and its companions."""
        ((_, keys),) = _together(self.store, [self.store.record(key)], self.config)
        return say(self.net, see(self.store, keys, self.spec), self.spec, self.asked, self.config)


def _together(store: Store, records: Sequence[Record], config: FinetuneConfig) -> list[tuple[Record, tuple[str, ...]]]:
    """Scans that are labelled, each with all that is seen beside it."""
    found = companions(store, records, config.contrasts)
    return [(record, found[record.key]) for record in records if record.key in found]
