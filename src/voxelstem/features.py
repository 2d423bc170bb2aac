"""What heads see of scans: frozen features of a store's volumes, each made once, and the truth beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Bool, Float

from voxelstem import baselines, regions
from voxelstem.adapted import AdaptConfig, Adapted, SeeConfig
from voxelstem.aligned import Aligned, read_aligned
from voxelstem.card import check_commercial, read_card
from voxelstem.embed import embed_volume_cached
from voxelstem.embedding import Embedding
from voxelstem.errors import ConfigError
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, Speaker
from voxelstem.model import Model
from voxelstem.protocols import Example, Features, Task
from voxelstem.store import Record, Store
from voxelstem.study import InputSpec, Volume
from voxelstem.truth import Truth
from voxelstem.weights.hub import fetch

FeaturesOf = Callable[[str], Features]
"""Gives the frozen features of the volume with this key."""
AS_IT_IS = SeeConfig()


def examples_of(
    store: Store, records: Sequence[Record], truth: Truth, features: FeaturesOf, task: Task
) -> Iterator[Example]:
    """Features and truth of scans, one after the other."""
    for record in records:
        yield Example(
            subject=record.subject,
            key=record.key,
            features=features(record.key),
            affine_ras=record.affine_ras,
            label=truth.labels.get(record.subject),
            value=truth.values.get(record.subject),
            findings=truth.findings.get(record.subject),
            survival=truth.survival.get(record.subject),
            labels=store.labels(record.key) if task.voxels else None,
        )


def embedder(model: Model, store: Store, folder: Path, *, tokens: bool, see: SeeConfig = AS_IT_IS) -> FeaturesOf:
    """Embed volumes with a model, each one once: the features rest in `folder`.

    Raises:
        ConfigError: the backbone does not have the layers to `see`.
    """
    seen = model.through(see.layers) if see.layers else model

    def recall(key: str) -> Features:
        found: Features = embed_volume_cached(seen, store, key, folder, tokens=tokens or bool(see.region))
        if see.beside == "intensity":
            found = with_intensity(found, store.volume(key), model.spec)
        if see.region:
            found = in_region(found, store, key, see.region)
        if see.beside == "radiomics":
            labels = store.labels(key) if see.region else None
            region = None if labels is None else regions.of_class(labels, see.region)
            found = with_radiomics(found, store.volume(key), region, of=f"of scan {key[:16]} ")
        return found

    return recall


def in_region(found: Features, store: Store, key: str, name: str) -> Features:
    """Pool a scan's tokens over a structure of its label map.

    Raises:
        ConfigError: the scan has no such structure, or the network saw nothing of it.
    """
    labels = store.labels(key)
    try:
        if labels is None:
            raise ValueError("it has no label map")
        return regions.pool(found, regions.of_class(labels, name), store.record(key).affine_ras)
    except ValueError as error:
        raise ConfigError(
            f"scan {key[:16]} cannot be looked at in its region '{name}': {error}",
            hint="ingest the masks with --labels, and name scans without the structure in no label file",
        ) from error


def look(
    model: Model,
    volume: Volume,
    *,
    tokens: bool,
    see: SeeConfig = AS_IT_IS,
    region: Bool[np.ndarray, "i j k"] | None = None,
) -> Features:
    """What `embedder` gives, of a volume that is in no store; `region` is the mask of `see.region`.

    Raises:
        ConfigError: as `embedder`, another modality, or a region that is missing or was not seen.
        IngestError: the volume is refused.
    """
    seen = model.through(see.layers) if see.layers else model
    if see.region and region is None:
        raise ConfigError(f"this run looks at a region, '{see.region}'", hint="give its mask with --region")
    found: Features = seen.embed(volume, tokens=tokens or bool(see.region))
    if see.beside == "intensity":
        found = with_intensity(found, volume, model.spec)
    if see.region and region is not None:
        try:
            found = regions.pool(found, region, volume.affine_ras)
        except ValueError as error:
            raise ConfigError(str(error), hint="the mask must lie on the scan's own grid") from error
    return with_radiomics(found, volume, region) if see.beside == "radiomics" else found


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """What a model says of a scan, and beside it how bright the same places are, or what radiomics says."""

    scan: Float[np.ndarray, " dim"]
    tokens: Float[np.ndarray, "ti tj tk dim"] | None
    tokens_affine_ras: Float[np.ndarray, "4 4"] | None
    measured: Bool[np.ndarray, " dim"]
    """Which columns of `scan` have units of their own; heads standardise them (`heads.scales`)."""


def with_intensity(found: Features, volume: Volume, spec: InputSpec) -> Joined:
    """Put the histograms of `baselines.intensity` beside what a model says of the same volume."""
    scan = np.concatenate([found.scan, baselines.intensity(volume, spec, token_mm=None).scan])
    shares = np.zeros(len(scan), dtype=bool)
    if found.tokens is None or found.tokens_affine_ras is None:
        return Joined(scan=scan, tokens=None, tokens_affine_ras=None, measured=shares)
    i, j, k = found.tokens.shape[:3]
    bright = baselines.patch_histograms(volume, spec, found.tokens_affine_ras, (i, j, k))
    tokens = np.concatenate([found.tokens, bright.astype(found.tokens.dtype)], axis=-1)
    return Joined(scan=scan, tokens=tokens, tokens_affine_ras=found.tokens_affine_ras, measured=shares)


def with_radiomics(
    found: Features, volume: Volume, region: Bool[np.ndarray, "i j k"] | None = None, *, of: str = ""
) -> Joined:
    """Put `baselines.radiomics` of the body, and after it that of a region, beside the one vector of a scan.

    A mean over tokens says what something looks like. Volume and shape, which a prognosis often hangs on, are here.

    Raises:
        ConfigError: the region has no shape, or lies on another grid.
    """
    parts = [found.scan, baselines.radiomics(volume, baselines.find_body(volume)).scan]
    try:
        parts += [] if region is None else [baselines.radiomics(volume, region).scan]
    except ValueError as error:
        raise ConfigError(
            f"radiomics {of}cannot be told: {error}",
            hint="leave see.beside out, or name a structure of three voxels or more",
        ) from error
    scan = np.concatenate(parts)
    measured = np.arange(len(scan)) >= len(found.scan)
    return Joined(scan=scan, tokens=found.tokens, tokens_affine_ras=found.tokens_affine_ras, measured=measured)


@dataclass(frozen=True, kw_only=True, slots=True)
class Projected:
    """A scan in the space of texts, as a task sees it."""

    scan: Float[np.ndarray, " out"]
    """A unit vector."""
    tokens: None = None
    tokens_affine_ras: None = None


def projector(space: Aligned, store: Store, folder: Path) -> FeaturesOf:
    """Embed volumes and bring them into the space of texts; the embeddings before that rest in `folder`."""
    plain = embedder(space.model, store, folder, tokens=False)
    return lambda key: Projected(scan=space.embed_scan(cast(Embedding, plain(key))))


def open_space(weights: str | Path, config: AdaptConfig, *, commercial: bool = False) -> Aligned:
    """Read aligned weights for a task that compares scans with texts.

    Raises:
        ConfigError: `scratch`, which has no words; a tower or tokenizer that is not here; or the licence forbids it.
        CheckpointError: the weights were not aligned with reports, or are damaged.
    """
    if str(weights) == "scratch":
        raise ConfigError(
            f"an untrained network has no words, so {config.task} cannot use it",
            hint="give aligned weights; `evaluate` shows the same network untrained beside them",
        )
    folder = fetch(weights, text=True)
    if commercial or config.commercial:
        check_commercial(read_card(folder))
    tokenizer = config.head.tokenizer
    return read_aligned(folder, tokenizer=Path(tokenizer) if tokenizer else None)


def speaker(adapted: Adapted, model: Model, store: Store) -> FeaturesOf:
    """What the network of a run in mode `full` says of scans, by the InputSpec that it was trained with.

    Raises:
        CheckpointError: head and weights belong to different runs.
    """
    asked = Asked(task=adapted.config.task, voxels=adapted.task.voxels, classes=adapted.head.classes, targets={})
    return Speaker(model, adapted.head, store, asked, adapted.config.full or FinetuneConfig())
