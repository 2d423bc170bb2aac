"""Which structure is this? Two CTs with many structures, each structure of one named by those of the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from voxelstem import baselines, metrics, regions
from voxelstem.adapted import SeeConfig
from voxelstem.features import with_intensity
from voxelstem.heads.scales import STILL
from voxelstem.judging.contest import intensity_features
from voxelstem.metrics import Interval
from voxelstem.model import Model
from voxelstem.store import Record, Store
from voxelstem.streaming import of_store
from voxelstem.study import Volume

Described = dict[str, np.ndarray]
"""A vector for each structure of a scan."""
FEWEST_VOXELS = 200
"""Below that a structure is cut off by the scan's end rather than seen."""


def structures(
    store: Store, models: Mapping[str, Sequence[Model]], real: Model | None, see: SeeConfig
) -> tuple[str, dict[str, Any]]:
    """A markdown table and its figures: how often the most similar structure of the other CT has the same name."""
    shared = names_in_all(store)
    teams: dict[str, list[dict[str, Described]]] = {}
    for name, trained in models.items():
        fresh = [model.scratch(seed=seed) for seed, model in enumerate(trained)]
        teams[f"{name} untrained"] = [describe(store, shared, tokens_of(store, model, see)) for model in fresh]
        teams[name] = [describe(store, shared, tokens_of(store, model, see)) for model in trained]
    if real is not None:
        fresh = [real.scratch(seed=seed) for seed in range(3)]
        teams["I3ResNet-152 untrained"] = [by_crop(store, shared, model) for model in fresh]
        teams["I3ResNet-152"] = [by_crop(store, shared, real)]
    first = next(iter(models.values()))[0]
    plain = intensity_features(store, first.spec, first.backbone.patch_ijk)
    teams["intensity"] = [describe(store, shared, plain)]
    teams["radiomics"] = [measured(store, shared)]
    answers = {name: joined([right(team, shared) for team in team_of]) for name, team_of in teams.items()}
    chance = 1 / len(shared)
    lines = [
        f"{len(shared)} structures of at least {FEWEST_VOXELS} voxels in both; chance {chance:.3f}.",
        "",
        "| weights | right | by seed | - untrained | - intensity |",
        "|---|---|---|---|---|",
    ]
    facts: dict[str, Any] = {"structures": len(shared), "chance": chance}
    for name, own in answers.items():
        value = metrics.bootstrap_interval(own, share)
        seeds = " ".join(f"{np.mean([own[s][r] for s in shared]):.3f}" for r in range(len(teams[name])))
        over = [
            metrics.paired_difference(own, answers[other], share) if other in answers and other != name else None
            for other in (f"{name} untrained", "intensity")
        ]
        lines.append(f"| {name} | {value} | {seeds} | {shown(over[0])} | {shown(over[1])} |")
        facts[name] = [dataclasses.asdict(value), *(None if one is None else dataclasses.asdict(one) for one in over)]
    return "\n".join(lines), facts


def share(sample: Sequence[tuple[float, ...]]) -> float:
    """Mean over structures of the mean over seeds and both ways."""
    return float(np.mean([np.mean(one) for one in sample]))


def shown(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def names_in_all(store: Store) -> list[str]:
    """Names of the structures that every scan holds enough of."""
    found: list[set[str]] = []
    for record in store:
        labels = store.labels(record.key)
        assert labels is not None
        counts = np.bincount(labels.array.ravel().astype(np.int64), minlength=256)
        found.append({name for value, name in labels.classes.items() if value and counts[value] >= FEWEST_VOXELS})
    return sorted(set.intersection(*found))


def tokens_of(store: Store, model: Model, see: SeeConfig) -> Callable[[str], Any]:
    seen = model.through(see.layers) if see.layers else model

    def look(key: str) -> Any:
        found = seen.embed(of_store(store, key), tokens=True)
        return found if see.beside == "nothing" else with_intensity(found, store.volume(key), model.spec)

    return look


def describe(store: Store, shared: Sequence[str], look: Callable[[str], Any]) -> dict[str, Described]:
    """Tokens pooled over each structure."""
    found: dict[str, Described] = {}
    for record in store:
        features, labels = look(record.key), store.labels(record.key)
        assert labels is not None
        found[record.key] = {
            name: regions.pool(features, regions.of_class(labels, name), record.affine_ras).scan for name in shared
        }
    return found


def by_crop(store: Store, shared: Sequence[str], model: Model) -> dict[str, Described]:
    """One block about each structure's middle: for networks whose tokens are larger than most structures."""
    return {
        record.key: {name: model.embed(about(store, record, name, model)).scan for name in shared} for record in store
    }


def about(store: Store, record: Record, name: str, model: Model) -> Volume:
    """As much of a scan as the model takes in at once, about a structure; less at the scan's ends."""
    volume, labels = store.volume(record.key), store.labels(record.key)
    assert labels is not None
    middle = np.argwhere(regions.of_class(labels, name)).mean(axis=0)
    sides = [
        round(count * edge / spacing)
        for count, edge, spacing in zip(model.spec.block_ijk, model.spec.spacing_mm, volume.spacing_mm, strict=True)
    ]
    cuts = []
    for at, side, extent in zip(middle, sides, volume.shape_ijk, strict=True):
        start = int(np.clip(round(at - side / 2), 0, max(extent - side, 0)))
        cuts.append(slice(start, min(start + side, extent)))
    affine = volume.affine_ras.astype(np.float64).copy()
    affine[:3, 3] += affine[:3, :3] @ np.array([cut.start for cut in cuts])
    return dataclasses.replace(volume, array=volume.array[(slice(None), *cuts)], affine_ras=affine, labels=None)


def measured(store: Store, shared: Sequence[str]) -> dict[str, Described]:
    """First-order radiomics and morphology of each structure."""
    found: dict[str, Described] = {}
    for record in store:
        volume, labels = store.volume(record.key), store.labels(record.key)
        assert labels is not None
        found[record.key] = {name: baselines.radiomics(volume, regions.of_class(labels, name)).scan for name in shared}
    return found


def right(described: Mapping[str, Described], shared: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Whether the nearest structure of the other scan has the same name, asked both ways."""
    found: dict[str, list[float]] = {name: [] for name in shared}
    for key, other in ((a, b) for a in described for b in described if a != b):
        known, asked = (
            np.stack([described[side][name] for name in shared]).astype(np.float64) for side in (other, key)
        )
        middle, spread = known.mean(axis=0), known.std(axis=0)
        spread[spread <= STILL * np.abs(known).max(axis=0)] = np.inf
        one, two = ((rows - middle) / spread for rows in (asked, known))
        cosines = unit(one) @ unit(two).T
        for place, name in enumerate(shared):
            found[name].append(float(cosines[place].argmax() == place))
    return {name: tuple(own) for name, own in found.items()}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def joined(several: Sequence[Mapping[str, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
    """Both ways averaged within a seed: one figure for each structure and seed."""
    return {name: tuple(float(np.mean(one[name])) for one in several) for name in several[0]}
