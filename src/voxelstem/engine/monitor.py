"""Health signs of a run: does the embedding collapse, and does it help a probe that never trains it?

Everything is looked at on the same few blocks, which are drawn once for all, so numbers of one run compare. Several
processes that train together must look at the same time: parameters that are shared out are gathered for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from voxelstem.distributed import here
from voxelstem.engine.transfer import Crops
from voxelstem.errors import CheckpointError, StoreError
from voxelstem.metrics import balanced_accuracy, effective_rank
from voxelstem.protocols import Backbone, Objective
from voxelstem.store.reader import Record, Store
from voxelstem.study import InputSpec
from voxelstem.views.crop import Crop, ViewKind, ViewPlan, apply_view, covering_crop, draw_views
from voxelstem.views.intensity import limits, window

_log = logging.getLogger(__name__)
MOST_TOKENS = 2048
"""Of which the effective rank is measured, evenly spaced among all."""
MOST_ASKED = 4096
"""Held-out patches whose neighbours are looked for."""
TEMPERATURE = 0.07
"""Of the neighbours' votes (Wu et al. 2018)."""
_TOGETHER = 8
"""Blocks that are encoded at once: memory stays small beside a training step's."""
_GRAM_BLOCKS, _GRAM_PATCHES = 4, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """How often the run is looked at, and how closely."""

    every: int = 100
    """Steps between two looks."""
    blocks: int = 48
    """Blocks that are looked at."""
    neighbours: int = 10
    """Patches that vote on a held-out patch's class."""
    per_class: int = 64
    """Patches of each class, at most, that may vote: a probe of few labels."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: one is out of range.
        """
        if self.every < 1 or self.neighbours < 1 or self.per_class < 1:
            raise ValueError(
                f"health.every, health.neighbours and health.per_class must be >= 1, "
                f"got {self.every}, {self.neighbours} and {self.per_class}"
            )
        if self.blocks < 2:  # noqa: PLR2004 - one half to fit, one to test
            raise ValueError(f"health.blocks must be >= 2, got {self.blocks}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSet:
    """Fixed blocks with a label for each patch: the class of most of its voxels."""

    blocks: Float[Tensor, "n channel i j k"]
    labels: Int[Tensor, "n patch"]
    held_out: Float[Tensor, " n"]
    """1 where the block belongs to a subject that the probe is tested on."""


def draw_probe_set(
    store: Store, records: Sequence[Record], spec: InputSpec, *, patch_ijk: tuple[int, int, int], blocks: int, seed: int
) -> ProbeSet | None:
    """Draw blocks out of labelled scans, half of the subjects for fitting and half for testing.

    What a scan's labels leave out counts as one class more: the probe set should be labelled alike everywhere.
    None where fewer than two subjects carry voxel labels. A scan that cannot be read is passed over.
    """
    labelled = sorted((record for record in records if record.classes), key=lambda record: record.key)
    subjects = sorted({record.subject for record in labelled})
    if len(subjects) < 2:  # noqa: PLR2004 - one to fit, one to test
        return None
    names = sorted({name for record in labelled for name in record.classes.values()})
    rng = np.random.default_rng([seed, 7])
    crops = Crops(store, "blosc2")
    views: list[Tensor] = []
    labels: list[Tensor] = []
    held_out: list[float] = []
    for index in range(blocks):
        subject = subjects[index % len(subjects)]
        choices = [record for record in labelled if record.subject == subject]
        record = choices[int(rng.integers(len(choices)))]
        plan, crop = _draw(record, spec, rng)
        try:
            views.append(_view(crops, record, spec, plan, crop))
            labels.append(_labels(store, record, plan, crop, names=names, patch_ijk=patch_ijk))
        except StoreError:
            # The loader will meet this scan, put it aside and say so.
            rest = [one for one in labelled if one.key != record.key]
            return draw_probe_set(store, rest, spec, patch_ijk=patch_ijk, blocks=blocks, seed=seed)
        held_out.append(float(subjects.index(subject) % 2))
    return ProbeSet(blocks=torch.stack(views), labels=torch.stack(labels), held_out=torch.tensor(held_out))


def draw_blocks(
    store: Store, keys: Sequence[str], spec: InputSpec, *, blocks: int, seed: int
) -> Float[Tensor, "blocks channel i j k"]:
    """Draw blocks out of scans without labels, for signs of collapse alone; one that cannot be read is passed over."""
    rng = np.random.default_rng([seed, 7])
    crops = Crops(store, "blosc2")
    views: list[Tensor] = []
    for place in rng.integers(len(keys), size=blocks):
        record = store.record(keys[int(place)])
        try:
            views.append(_view(crops, record, spec, *_draw(record, spec, rng)))
        except StoreError:
            rest = [key for key in keys if key != record.key]
            return draw_blocks(store, rest, spec, blocks=blocks, seed=seed)
    return torch.stack(views)


def _draw(record: Record, spec: InputSpec, rng: np.random.Generator) -> tuple[ViewPlan, Crop]:
    """Place a block anywhere in the scan."""
    i, j, k = (n * s for n, s in zip(record.shape_ijk, record.spacing_mm, strict=True))
    plan = draw_views(ViewKind(size_ijk=spec.block_ijk), spec, ((0.0, 0.0, 0.0), (i, j, k)), rng)[0]
    return plan, covering_crop(plan, record.spacing_mm, record.shape_ijk)


def _view(crops: Crops, record: Record, spec: InputSpec, plan: ViewPlan, crop: Crop) -> Float[Tensor, "channel i j k"]:
    found = limits(crops.stats(record.key, spec), spec)
    voxels = crops.read(record.key, crop.start_ijk, crop.size_ijk)
    return window(apply_view(voxels, plan, crop, spacing_mm=record.spacing_mm, outside=found.outside), found)


def _labels(
    store: Store, record: Record, plan: ViewPlan, crop: Crop, *, names: list[str], patch_ijk: tuple[int, int, int]
) -> Int[Tensor, " patch"]:
    """The class of most of each patch: 0 for none, then those of `names` in order."""
    truth = store.label_crop(record.key, crop.start_ijk, crop.size_ijk)
    onehot = np.zeros((1 + len(names), *truth.shape), dtype=np.float32)
    for value, name in record.classes.items():
        onehot[1 + names.index(name)] = truth == value
    onehot[0] = ~onehot.any(axis=0)
    share = apply_view(torch.from_numpy(onehot), plan, crop, spacing_mm=record.spacing_mm, outside=0.0)
    return functional.avg_pool3d(share[None], patch_ijk, patch_ijk)[0].argmax(dim=0).flatten()


class Monitor:
    """Looks at a run: `monitor(objective)` gives named numbers for the journal, whatever the objective is."""

    def __init__(
        self,
        config: HealthConfig,
        seen: ProbeSet | Float[Tensor, "n channel i j k"],
        *,
        device: torch.device,
        memory: Path,
        begins: bool,
    ) -> None:
        """Prepare to look at the same blocks again and again.

        Args:
            config: How closely.
            seen: What is looked at; without labels there are only signs of collapse.
            device: Where the backbone is.
            memory: File that keeps how alike the starting weights found patches, so that a resumed run goes on
                comparing with the same.
            begins: Whether the first look is at the starting weights; the file is written then, else read.
        """
        self.config, self.device, self.memory = config, device, memory
        self.probe = seen if isinstance(seen, ProbeSet) else None
        self.blocks = seen.blocks if isinstance(seen, ProbeSet) else seen
        self._begins = begins
        self._start = None if begins else _remembered(memory)

    @torch.no_grad()
    def __call__(self, objective: Objective) -> dict[str, float]:
        """One look. Nothing of the objective changes, and nothing is drawn by chance.

        Raises:
            CheckpointError: the disk is full.
        """
        began = time.monotonic()
        cls, patches = _encode(objective.backbone, self.blocks, self.device)
        told = {
            "effective_rank": effective_rank(_some(patches.flatten(0, 1), MOST_TOKENS).numpy()),
            "effective_rank/cls": effective_rank(cls.numpy()),
            "spread/patch": spread(patches.flatten(0, 1)),
            "spread/cls": spread(cls),
            "entropy/patch": feature_entropy(patches.flatten(0, 1)),
        }
        told |= self._drift(patches)
        if self.probe is not None:
            told["probe/patch_balanced_accuracy"] = ridge_accuracy(patches, self.probe)
            told["probe/patch_knn"] = knn_accuracy(
                patches, self.probe, neighbours=self.config.neighbours, per_class=self.config.per_class
            )
        told["look_seconds"] = time.monotonic() - began
        # A probe whose held-out half shows a single class says nothing.
        return {name: value for name, value in told.items() if math.isfinite(value)}

    def _drift(self, patches: Float[Tensor, "n patch dim"]) -> dict[str, float]:
        now = gram(patches[:_GRAM_BLOCKS, :: -(-patches.shape[1] // _GRAM_PATCHES)])
        if self._begins:
            self._begins, self._start = False, now
            if here().rank == 0:
                _remember(self.memory, now)
        if self._start is None or self._start.shape != now.shape:
            return {}
        return {"gram_drift": float((now - self._start).square().mean())}


def gram(patches: Float[Tensor, "n patch dim"]) -> Float[Tensor, "n patch patch"]:
    """Cosine of every patch with every other of its block: what Gram anchoring holds still (Siméoni et al. 2025)."""
    unit = functional.normalize(patches.float(), dim=-1)
    return unit @ unit.mT


def spread(rows: Float[Tensor, "row dim"]) -> float:
    """How far rows point apart: their directions' standard deviation over that of directions drawn evenly.

    1 where directions are spread evenly, 0 where all rows point the same way (the sign of Chen and He 2021).
    """
    unit = functional.normalize(rows.double(), dim=-1)
    return float(unit.std(dim=0, correction=0).mean()) * math.sqrt(rows.shape[1])


def feature_entropy(rows: Float[Tensor, "row dim"]) -> float:
    """How evenly the dimensions share the variance: 1 where all vary alike, 0 where a single one does."""
    variance = rows.double().var(dim=0, correction=0)
    share = variance / variance.sum().clamp_min(1e-30)
    return float(-torch.xlogy(share, share).sum() / math.log(max(rows.shape[1], 2)))


def ridge_accuracy(patches: Float[Tensor, "n patch dim"], probe: ProbeSet) -> float:
    """Balanced accuracy of ridge regression from frozen patch tokens to classes.

    Fitted on the subjects of one half, tested on the other half's. Chance is 1 / number of classes.
    """
    fit, test = probe.held_out == 0, probe.held_out == 1
    known = torch.unique(probe.labels[fit])
    x, y = patches[fit].flatten(0, 1).double(), probe.labels[fit].flatten()
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-6
    x = functional.pad((x - mean) / deviation, (0, 1), value=1.0)
    weight = 1.0 / torch.bincount(y, minlength=int(known.max()) + 1).clamp_min(1)[y].double()
    target = (y[:, None] == known[None]).double()
    products = (x * weight[:, None]).T @ x + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype)
    coefficients = torch.linalg.solve(products, (x * weight[:, None]).T @ target)
    z = functional.pad((patches[test].flatten(0, 1).double() - mean) / deviation, (0, 1), value=1.0)
    guess = known[(z @ coefficients).argmax(dim=1)]
    return balanced_accuracy(probe.labels[test].flatten().numpy(), guess.numpy())


def knn_accuracy(patches: Float[Tensor, "n patch dim"], probe: ProbeSet, *, neighbours: int, per_class: int) -> float:
    """Balanced accuracy of the nearest labelled patches' vote, by cosine after their mean was taken off.

    At most `per_class` patches of each class vote: those of one half of the subjects, on the other half's patches.
    """
    fit, test = probe.held_out == 0, probe.held_out == 1
    labels = probe.labels[fit].flatten()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = torch.cat([order[labels[order] == name][:per_class] for name in torch.unique(labels)])
    voters, classes = patches[fit].flatten(0, 1)[chosen].float(), labels[chosen]
    mean = voters.mean(dim=0)
    asked = functional.normalize(_some(patches[test].flatten(0, 1), MOST_ASKED).float() - mean, dim=-1)
    cosine, nearest = (asked @ functional.normalize(voters - mean, dim=-1).T).topk(min(neighbours, len(voters)))
    # Under autocast the products come in half precision.
    votes = torch.zeros(len(asked), int(classes.max()) + 1).scatter_add_(
        1, classes[nearest], (cosine.float() / TEMPERATURE).exp()
    )
    truth = _some(probe.labels[test].flatten(), MOST_ASKED)
    return balanced_accuracy(truth.numpy(), votes.argmax(dim=1).numpy())


def _encode(
    backbone: Backbone, blocks: Float[Tensor, "n channel i j k"], device: torch.device
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n patch dim"]]:
    """Cls and patch tokens of all blocks, in single precision on the CPU."""
    parts = [backbone.encode_blocks(part.to(device)) for part in blocks.split(_TOGETHER)]
    return torch.cat([cls.float().cpu() for cls, _ in parts]), torch.cat(
        [patches.float().cpu() for _, patches in parts]
    )


def _some(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spaced."""
    return rows[:: max(-(-len(rows) // most), 1)]


def _remember(path: Path, start: Float[Tensor, "n patch patch"]) -> None:
    try:
        # By a rename: a run that is killed here must not find half a file.
        unfinished = path.with_name(f".{path.name}.unfinished")
        save_file({"gram": start.contiguous()}, unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"'{path.name}' of the run cannot be written", hint="free some space and start the same command again"
        ) from error


def _remembered(path: Path) -> Tensor | None:
    try:
        return load_file(path)["gram"]
    except (OSError, SafetensorError, KeyError):
        _log.warning("'%s' of the run is missing or damaged: the drift since the start is not reported", path.name)
        return None
