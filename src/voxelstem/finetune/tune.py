"""From weights and labelled scans to a tuned network, and from a tuned network to what it says of scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from voxelstem.backbones.lowrank import fold
from voxelstem.card import Card
from voxelstem.certainty import familiar
from voxelstem.engine.device import choose
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.finetune import fates
from voxelstem.finetune.cases import Case, Seen, companions, labelled, see
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.inside import vector_of
from voxelstem.finetune.loop import Net, fit, in_turns, loss_of
from voxelstem.finetune.network import Tuned, build, restore
from voxelstem.heads.manylabels import FACTS, answers_each
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.protocols import Features, Head, Task
from voxelstem.room import left_bytes
from voxelstem.store import Record, Store
from voxelstem.study import InputSpec, Survival
from voxelstem.tasks.survive import Survive
from voxelstem.truth import Truth
from voxelstem.views import cells, slide
from voxelstem.views.winners import shares, winners

OWN = "net."
"""Before the names of the tuned network's own tensors among a head's arrays."""
WINDOWS = 4
"""So many times a window's logits are what a network holds while it makes them, about; bounds the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What a tuned network says of a scan, in the form of features: the head above it changes nothing."""

    scan: Float[np.ndarray, " out"]
    """Log-probabilities of classes, the number in standard deviations, or the log of a risk; nothing where voxels are
    labelled."""
    tokens: Float[np.ndarray, "i j k kind"] | None = None
    """Logits of every voxel on the network's grid."""
    tokens_affine_ras: Float[np.ndarray, "4 4"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be learned: the task's name and kind, its classes, and what is known of whom."""

    task: str
    voxels: bool
    classes: tuple[str, ...]
    targets: Mapping[str, int | float | tuple[float, ...]]
    """Subject to class (counted in `classes`), to a number, or to 1, 0 or NaN for each class; empty where voxels are
    labelled."""
    each: bool = False
    """Each class is there or not, whatever the others are."""
    survival: Mapping[str, Survival] = field(default_factory=dict[str, Survival])
    """Subject to how long nothing happened, for `times`."""
    times: Survive | None = None
    """The task that learns from times, if it is one: it makes the head."""

    @classmethod
    def of(cls, name: str, task: Task, truth: Truth, classes: tuple[str, ...]) -> Asked:
        """What a task asks of subjects of whom this is known."""
        targets: dict[str, int | float | tuple[float, ...]] = dict(truth.values)
        targets |= {subject: classes.index(label) for subject, label in truth.labels.items() if label in classes}
        targets |= {who: tuple(float(told.get(n, math.nan)) for n in classes) for who, told in truth.findings.items()}
        times = task if isinstance(task, Survive) else None
        return cls(
            task=name,
            voxels=task.voxels,
            classes=classes,
            targets=targets,
            each=bool(truth.findings),
            survival=truth.survival,
            times=times,
        )

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
        ConfigError: a backbone, contrasts or settings that this cannot be done with.
        IngestError: a scan that cannot be brought to the weights' spacing.
        AuditError: training diverges, or of times nobody can be compared.
    """
    if asked.times is not None:
        fates.check(asked.times, config)
    net, card = build(model, out=asked.out, config=config, voxels=asked.voxels, seed=seed)
    unit = _Unit.of(asked, records)
    cases: list[Case] = []
    held: list[Case] = []
    apart = hold_out([record.subject for record in records], asked, config.held, seed)
    for record, keys in _together(store, records, config):
        side = held if record.subject in apart else cases
        if asked.voxels:
            side.append(labelled(store, keys, card.spec, asked.classes))
            continue
        target = unit.target(asked, record.subject)
        side.append(Case(seen=see(store, keys, card.spec), target=target, subject=record.subject))
    net.to(choose("auto"))
    config = replace(config, patch_ijk=card.spec.block_ijk)
    pick, loss = in_turns, loss_of("findings" if asked.each else asked.task, config, cases)
    if asked.times is not None:
        pick, loss = fates.way_of(asked.times, cases)
    with progress(f"{asked.task}: the whole network", config.steps) as advance:
        fit(
            net,
            cases,
            config,
            loss=loss,
            seed=seed,
            report=lambda loss: advance(1, note=f"loss {loss:.3f}"),
            held=held,
            pick=pick,
        )
    head = _head(net, [*cases, *held], card.spec, asked, config, unit)
    net.cpu()
    fold(net.backbone)
    head.arrays.update({OWN + name: tensor.numpy() for name, tensor in net.own().items()})
    what = "whole" if config.changes == "all" else "by low-rank changes, folded in"
    notes = f"fine-tuned {what} for {asked.task} on {len(cases)} labelled scans"
    notes += f"; {len(held)} more said when to stop" if held else ""
    card = replace(card, recipe=f"{card.recipe} + {head.mode}".strip(" +"), notes=(*card.notes, notes))
    return head, card, dict(net.backbone.state_dict())


def _head(
    net: Tuned, cases: Sequence[Case], spec: InputSpec, asked: Asked, config: FinetuneConfig, unit: _Unit
) -> Head:
    """The head above a network that is trained: of times the curves, of all else what changes nothing."""
    mode = "full" if config.changes == "all" else "adapters"
    if asked.times is not None:
        risks = [float(say(net, case.seen, spec, asked, config).scan[0]) for case in cases]
        return fates.head_of(asked.times, cases, risks, mode=mode)
    facts: dict[str, float | str] = {"sub": 1.0} | (FACTS if asked.each else {})
    return Head(mode=mode, classes=asked.classes, arrays=unit.arrays(asked.out), facts=facts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    """Numbers that are learned, in standard deviations about their mean; of all else nothing is changed."""

    middle: float = 0.0
    spread: float = 1.0
    numbers: bool = False

    @classmethod
    def of(cls, asked: Asked, records: Sequence[Record]) -> _Unit:
        if asked.voxels or asked.classes or asked.times is not None:
            return cls()
        known = np.array([asked.targets[record.subject] for record in records])
        return cls(middle=float(known.mean()), spread=max(float(known.std()), 1e-6), numbers=True)

    def target(self, asked: Asked, subject: str) -> int | float | Survival | tuple[float, ...]:
        if asked.times is not None:
            return asked.survival[subject]
        said = asked.targets[subject]
        if isinstance(said, tuple):
            return said
        return (said - self.middle) / self.spread if self.numbers else int(said)

    def arrays(self, out: int) -> dict[str, np.ndarray]:
        """A linear head that changes nothing, or brings a number back into its unit."""
        plain = {"middle": np.zeros(out), "scale": np.ones(out), "weight": np.eye(out), "bias": np.zeros(out)}
        return plain | ({"weight": np.array([self.spread]), "bias": np.array([self.middle])} if self.numbers else {})


def hold_out(subjects: Sequence[str], asked: Asked, share: float, seed: int) -> frozenset[str]:
    """Subjects whom training does not see: of each class, or of events and of the censored, a share; never the last.

    Raises:
        ConfigError: a share is wanted, and there is nobody to spare.
    """
    if not share:
        return frozenset()
    groups: dict[int | float | tuple[float, ...], list[str]] = {}
    for subject in sorted(set(subjects)) if not asked.each else ():
        kind = asked.targets.get(subject, 0) if asked.classes and not asked.voxels else 0
        kind = int(asked.survival[subject].event) if asked.times is not None else kind
        groups.setdefault(kind, []).append(subject)
    rng, apart = np.random.default_rng([seed, 29]), set[str]()
    if asked.each:
        apart = _spare(sorted(set(subjects)), asked, share, rng)
    for _, group in sorted(groups.items()):
        count = min(round(share * len(group)), len(group) - 1)
        apart |= {group[place] for place in rng.permutation(len(group))[:count]}
    if not apart:
        raise ConfigError(
            f"full.held={share:g} of {len(set(subjects))} labelled subjects is nobody",
            hint="label more subjects, or leave full.held at 0: training then takes all its steps",
        )
    return frozenset(apart)


def _spare(subjects: Sequence[str], asked: Asked, share: float, rng: np.random.Generator) -> set[str]:
    """A share of the subjects without whom every class is still shown both ways."""
    said = {subject: np.array(asked.targets[subject]) for subject in subjects}
    left = np.stack([sum(row == kind for row in said.values()) for kind in (0.0, 1.0)])
    apart = set[str]()
    for subject in (subjects[int(place)] for place in rng.permutation(len(subjects))):
        own = np.stack([said[subject] == kind for kind in (0.0, 1.0)])
        if len(apart) < round(share * len(subjects)) and (left - own)[own].min(initial=1) > 0:
            left = left - own
            apart.add(subject)
    return apart


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
def say(net: Net, seen: Seen, spec: InputSpec, asked: Asked, config: FinetuneConfig) -> Said:
    """What a tuned network says of a scan: under windows as large as the patches it learned from.

    Voxels: Gaussian-weighted mean of logits. Classes: mean of log-probabilities over windows, or where each is there or
    not, mean of logits, which is the same for yes and no. Numbers: their median.
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
    if asked.each:
        return Said(scan=answers.mean(dim=0).numpy())
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

    Logits live a window at a time, along the network grid's longest axis; where the process may not take the memory of
    that, also in stripes along the next one.

    Raises:
        MemoryError: not even one row of logits would fit.
    """
    across, axis = (int(place) for place in np.argsort(seen.shape_ijk, kind="stable")[1:])
    image = seen.image.to(next(net.parameters()).device)
    grid = cells.lay(affine_ras, shape_ijk, seen.affine_ras, seen.shape_ijk)
    found = np.empty(shape_ijk, dtype=np.int16)
    for share in shares(grid, axis=across, most=_rows_at_once(net, image, spec.block_ijk, axis, across)):
        slabs = slide.roll(net, image, spec.block_ijk, axis=axis, overlap=config.overlap, stripe=share.cells)
        rows = slice(share.voxels.start, share.voxels.stop)
        part = tuple(rows if place == across else slice(None) for place in range(3))
        found[part] = winners(_within(slabs, seen, axis), grid, axis=axis, share=share)
    return found


def _rows_at_once(
    net: Tuned, image: Float[Tensor, "contrast i j k"], window: tuple[int, int, int], axis: int, across: int
) -> int:
    """Of how many rows `across` the logits of one window's length along `axis` may be held together."""
    left = left_bytes()
    if math.isinf(left):
        return image.shape[1 + across]
    said = 4 * net.out * math.prod(window)
    row = 4 * net.out * window[axis] * image.shape[1 + (3 - axis - across)]
    # Half of what a window's own features and logits leave: the rest is the labels', and whoever comes after.
    if (most := int((left - WINDOWS * said) / 2 // row)) < 1:
        raise MemoryError
    return most


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
        self.spec, self.store, self.config = model.spec, store, config
        self.asked = replace(asked, each=answers_each(head))

    def __call__(self, key: str) -> Said:
        """Look at one scan and its companions."""
        return say(self.net, self._see(key), self.spec, self.asked, self.config)

    def inside(self, key: str) -> Float[np.ndarray, " dim"]:
        """The vector of one scan from inside the network: `inside.vector_of`."""
        return vector_of(self.net, self._see(key), self.spec)

    def _see(self, key: str) -> Seen:
        ((_, keys),) = _together(self.store, [self.store.record(key)], self.config)
        return see(self.store, keys, self.spec)


def strangeness_of(features: Callable[[str], Features], key: str) -> Float[np.ndarray, " dim"]:
    """The vector by which a scan is held against the labelled ones: of a tuned network that from inside of it."""
    return features.inside(key) if isinstance(features, Speaker) else familiar.vector_of(features(key))


def _together(store: Store, records: Sequence[Record], config: FinetuneConfig) -> list[tuple[Record, tuple[str, ...]]]:
    """Scans that are labelled, each with all that is seen beside it."""
    found = companions(store, records, config.contrasts)
    return [(record, found[record.key]) for record in records if record.key in found]
