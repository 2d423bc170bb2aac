"""Where scans and texts are compared, for the benchmark on paired phantoms: trained weights, and plain baselines.

A baseline is a ridge regression from features of a scan to the frozen text tower's vector of its report, learned on the
same training pairs: of the same network untrained, of the intensity histogram, and of coarse voxels (mean and spread of
16 mm cubes), which tell what a linear model sees in the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from voxelstem.aligned import Aligned
from voxelstem.model import Model
from voxelstem.store import Store
from voxelstem.study import Report, Volume

LOW_HU, HIGH_HU, BINS = -1000.0, 300.0, 64
BOX_MM = (384.0, 256.0, 384.0)
CUBE_MM = 16.0
Features = Callable[[Volume], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Scans and reports of a store, in the order of their keys."""

    store: Store
    keys: tuple[str, ...]

    @staticmethod
    def of(root: Path) -> Pairs:
        store = Store.open(root)
        return Pairs(store=store, keys=tuple(sorted(store.select().key)))

    def first(self, count: int) -> Pairs:
        return replace(self, keys=self.keys[:count])

    @cached_property
    def subjects(self) -> list[str]:
        return [self.store.record(key).subject for key in self.keys]

    @cached_property
    def facts(self) -> list[dict[str, str]]:
        return [dict(self.store.record(key).labels) for key in self.keys]

    @cached_property
    def reports(self) -> list[Report]:
        found = [self.store.record(key).report for key in self.keys]
        return [report for report in found if report is not None]

    def texts(self, sections: Sequence[str]) -> list[str]:
        """Sections of every report, without headings."""
        return ["\n".join(getattr(report, section) for section in sections) for report in self.reports]

    def rows(self, features: Features, kept: Path, *, mirrored: bool = False) -> np.ndarray:
        """Features of every scan, or of its mirror image; kept in a file."""
        if kept.exists():
            with np.load(kept) as file:
                if list(file["keys"]) == list(self.keys):
                    return file["rows"]
        volumes = (self.store.volume(key) for key in self.keys)
        rows = np.stack([features(mirror(volume) if mirrored else volume) for volume in volumes])
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial.npz")
        np.savez(partial, rows=rows, keys=np.array(self.keys))
        partial.replace(kept)
        return rows


def mirror(volume: Volume) -> Volume:
    """Left and right change places in the voxels; the affine stays, so the patient is mirrored."""
    return replace(volume, array=np.ascontiguousarray(volume.array[:, ::-1]), labels=None)


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """What one contestant makes of the held-out scans, their mirror images, some training scans, and any text."""

    name: str
    scans: np.ndarray
    mirrored: np.ndarray
    learned: np.ndarray
    """Of training scans: thresholds may be set on them."""
    embed: Callable[[Sequence[str]], np.ndarray]


def histogram(volume: Volume) -> np.ndarray:
    """Share of the voxels at each intensity."""
    counts, _ = np.histogram(np.clip(volume.array, LOW_HU, HIGH_HU), bins=BINS, range=(LOW_HU, HIGH_HU))
    return (100.0 * counts / volume.array.size).astype(np.float32)


def coarse(volume: Volume) -> np.ndarray:
    """Mean and spread of every cube of 16 mm of a box about the scan's middle."""
    sizes = [round(CUBE_MM / edge) for edge in volume.spacing_mm]
    counts = [round(edge / CUBE_MM) for edge in BOX_MM]
    box = np.full([size * count for size, count in zip(sizes, counts, strict=True)], LOW_HU, np.float32)
    scan = np.clip(volume.array[0], LOW_HU, HIGH_HU)
    starts = [(have - want) // 2 for have, want in zip(scan.shape, box.shape, strict=True)]
    taken = tuple(
        slice(max(start, 0), max(start, 0) + min(have, want))
        for start, have, want in zip(starts, scan.shape, box.shape, strict=True)
    )
    put = tuple(
        slice(max(-start, 0), max(-start, 0) + min(have, want))
        for start, have, want in zip(starts, scan.shape, box.shape, strict=True)
    )
    box[put] = scan[taken]
    i, j, k = counts
    cubes = box.reshape(i, sizes[0], j, sizes[1], k, sizes[2]).transpose(0, 2, 4, 1, 3, 5).reshape(i * j * k, -1)
    return np.concatenate([cubes.mean(axis=1), cubes.std(axis=1)])


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """Kernel ridge regression on standardised features; its strength is chosen by leave-one-out on what it learns."""

    mean: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    @staticmethod
    def fit(rows: np.ndarray, wanted: np.ndarray) -> Ridge:
        mean, spread = rows.mean(axis=0), rows.std(axis=0)
        spread = spread + 0.01 * spread.mean() + 1e-6  # what hardly varies says little
        scaled = ((rows - mean) / spread).astype(np.float64)
        bias = wanted.mean(axis=0)
        values, vectors = np.linalg.eigh(scaled @ scaled.T / scaled.shape[1])
        turned = vectors.T @ (wanted - bias)
        best, alpha = np.inf, np.zeros_like(wanted)
        for strength in np.logspace(-4, 2, 13) * max(values.mean(), 1e-12):
            shrunk = 1.0 / (np.maximum(values, 0.0) + strength)
            tried = vectors @ (shrunk[:, None] * turned)
            left_out = tried / np.maximum((vectors**2 @ shrunk)[:, None], 1e-12)
            error = float((left_out**2).mean())
            if error < best:
                best, alpha = error, tried
        return Ridge(mean=mean, spread=spread, weights=scaled.T @ alpha / scaled.shape[1], bias=bias)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return ((rows - self.mean) / self.spread) @ self.weights + self.bias


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def trained(space: Aligned, held: Pairs, learned: Pairs, kept: Path, name: str) -> Vectors:
    """Scans and texts as the aligned weights see them."""

    def features(volume: Volume) -> np.ndarray:
        return space.embed_scan(volume)

    mark = space.sha256[:16]
    return Vectors(
        name=name,
        scans=held.rows(features, kept / f"{mark}-held.npz"),
        mirrored=held.rows(features, kept / f"{mark}-mirrored.npz", mirrored=True),
        learned=learned.rows(features, kept / f"{mark}-learned.npz"),
        embed=space.embed_texts,
    )


def regressed(name: str, features: Features, held: Pairs, seen: Pairs, space: Aligned, *, kept: Path) -> Vectors:
    """Ridge from a scan's features to its report's vector, both centred on the training pairs.

    Every report is learned as its whole, its findings and its impression: prompts are as short as these.
    """

    def tower(texts: Sequence[str]) -> np.ndarray:
        return space.tower(list(texts)).detach().cpu().numpy().astype(np.float64)

    several = [
        tower(seen.texts(part))
        for part in (("findings_text", "impression_text"), ("findings_text",), ("impression_text",))
    ]
    wanted = np.mean(several, axis=0)
    middle = wanted.mean(axis=0)
    rows = seen.rows(features, kept / "seen.npz")
    ridge = Ridge.fit(rows, unit(wanted - middle))

    def towards(found: np.ndarray) -> np.ndarray:
        return unit(ridge(found) - ridge.bias)

    return Vectors(
        name=name,
        scans=towards(held.rows(features, kept / "held.npz")),
        mirrored=towards(held.rows(features, kept / "mirrored.npz", mirrored=True)),
        learned=towards(rows),
        embed=lambda texts: unit(tower(texts) - middle),
    )


def untrained(model: Model, *, seed: int) -> Features:
    """Vectors of the same network before training; it was shown what is usual in these scans all the same."""
    scratch = model.scratch(seed=seed)

    def features(volume: Volume) -> np.ndarray:
        return np.asarray(scratch.embed(volume).scan, np.float32)

    return features


def decodable(
    rows: np.ndarray, said: Sequence[Mapping[str, str]], tested: np.ndarray, truth: Sequence[Mapping[str, str]]
) -> dict[str, tuple[float, float]]:
    """Balanced accuracy of a ridge that is told all these facts, and what guessing gives, for each fact."""
    classes = {fact: sorted({one[fact] for one in said}) for fact in said[0]}
    told = np.array(
        [[one[fact] == kind for fact, kinds in classes.items() for kind in kinds] for one in said], np.float64
    )
    # Each class weighs the same, however rare.
    answers = Ridge.fit(rows, told / told.mean(axis=0))(tested)
    found: dict[str, tuple[float, float]] = {}
    for fact, kinds in classes.items():
        answer, answers = answers[:, : len(kinds)].argmax(axis=1), answers[:, len(kinds) :]
        right = {
            kind: [kinds[place] == kind for place, one in zip(answer, truth, strict=True) if one[fact] == kind]
            for kind in kinds
        }
        found[fact] = float(np.mean([np.mean(hits) for hits in right.values() if hits])), 1 / len(kinds)
    return found
