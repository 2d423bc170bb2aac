"""Training samples out of the store. Sample i of step s is a pure function of (seed, s, i): nothing to save or lose."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from voxelstem.errors import StoreError
from voxelstem.protocols import Batch
from voxelstem.store.reader import Record, Store
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig, AugmentPlan, apply_augment, draw_augment
from voxelstem.views.crop import ViewKind, ViewPlan, apply_view, covering_crop, draw_views
from voxelstem.views.intensity import window


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig:
    """The views of one sample: `global_` ones, and smaller `local` ones within the same region if wanted."""

    global_: ViewKind = field(default_factory=ViewKind)
    local: ViewKind = field(default_factory=lambda: ViewKind(count=0))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    region_scale: float = 1.25
    """Views of one sample lie within a region of this times the global view's size, so that they overlap."""
    overhang: float = 0.25
    """The region may reach past the body by this share of its size: whole-scan tiles overhang the scan too, and a
    network that never saw an edge of the scan is lost there."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no global view, a region without extent, or one that reaches less than to the body's edge.
        """
        if self.global_.count < 1:
            raise ValueError(f"global_.count must be >= 1, got {self.global_.count}")
        if not 0 < self.region_scale < math.inf:
            raise ValueError(f"region_scale must be > 0, got {self.region_scale}")
        if not 0 <= self.overhang < math.inf:
            raise ValueError(f"overhang must be >= 0, got {self.overhang}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig:
    """How many samples a step takes and how many steps are prepared ahead."""

    batch: int = 8
    threads: int = 1
    ahead: int = 4

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a number below 1.
        """
        if min(self.batch, self.threads, self.ahead) < 1:
            raise ValueError(f"batch, threads and ahead must be >= 1, got {self.batch}, {self.threads}, {self.ahead}")


class Loader:
    """Gives the batch of any step, in any order, always the same."""

    def __init__(
        self,
        store: Store,
        records: list[Record],
        spec: InputSpec,
        *,
        views: ViewsConfig,
        config: LoaderConfig,
        seed: int,
    ) -> None:
        """`records` are the scans to train on.

        Raises:
            StoreError: there are none.
        """
        if not records:
            raise StoreError("no scan to train on", hint="ingest scans of the recipe's modality first")
        self.store, self.records, self.spec = store, sorted(records, key=lambda record: record.key), spec
        self.views, self.config, self.seed = views, config, seed

    def batch(self, step: int) -> Batch:
        """All samples of one step."""
        samples = [self._read(*self.plan(step, index), step, index) for index in range(self.config.batch)]
        return Batch(
            views={name: torch.stack([views[name] for views, _ in samples]) for name in samples[0][0]},
            places_mm={name: torch.stack([places[name] for _, places in samples]) for name in samples[0][1]},
            seed=int(np.random.default_rng([self.seed, step]).integers(2**62)),
        )

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the steps from `start` to `stop`, prepared ahead by threads."""
        with ThreadPoolExecutor(self.config.threads) as pool:
            waiting = deque(
                pool.submit(self.batch, step) for step in range(start, min(start + self.config.ahead, stop))
            )
            for step in range(start, stop):
                ready = waiting.popleft().result()
                if step + self.config.ahead < stop:
                    waiting.append(pool.submit(self.batch, step + self.config.ahead))
                yield ready

    def plan(self, step: int, index: int) -> tuple[Record, dict[str, list[ViewPlan]]]:
        """Which scan sample `index` of `step` reads, and where its views lie."""
        rng = np.random.default_rng([self.seed, step, index])
        record = self.records[int(rng.integers(len(self.records)))]
        return record, self._draw(record, rng)

    def _draw(self, record: Record, rng: np.random.Generator) -> dict[str, list[ViewPlan]]:
        size_ijk, scale = self.views.global_.size_ijk, self.views.region_scale
        region = ViewKind(size_ijk=size_ijk, min_scale=scale, max_scale=scale)
        spacing, wide = np.asarray(record.spacing_mm), np.asarray(size_ijk) * np.asarray(self.spec.spacing_mm) * scale
        start = np.asarray(record.body_start_ijk) * spacing - self.views.overhang * wide
        extent = np.asarray(record.body_size_ijk) * spacing + 2 * self.views.overhang * wide
        body = ((start[0], start[1], start[2]), (extent[0], extent[1], extent[2]))
        shared = draw_views(region, self.spec, body, rng)[0]
        box = (shared.start_mm, shared.extent_mm)
        plans = {"global": draw_views(self.views.global_, self.spec, box, rng)}
        if self.views.local.count:
            plans["local"] = draw_views(self.views.local, self.spec, box, rng)
        return plans

    def _read(
        self, record: Record, plans: dict[str, list[ViewPlan]], step: int, index: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rng = np.random.default_rng([self.seed, step, index, 1])
        views: dict[str, Tensor] = {}
        places: dict[str, Tensor] = {}
        for name, kind in plans.items():
            changes = [draw_augment(self.views.augment, rng) for _ in kind]
            read = [self._view(record, plan) for plan in kind]
            views[name] = torch.stack([apply_augment(view, change) for view, change in zip(read, changes, strict=True)])
            places[name] = torch.stack([_place(plan, change) for plan, change in zip(kind, changes, strict=True)])
        return views, places

    def _view(self, record: Record, plan: ViewPlan) -> Tensor:
        crop = covering_crop(plan, record.spacing_mm, record.shape_ijk)
        voxels = torch.from_numpy(self.store.crop(record.key, crop.start_ijk, crop.size_ijk))
        view = apply_view(voxels, plan, crop, spacing_mm=record.spacing_mm, outside=self.spec.low_hu)
        return window(view, self.spec)


def _place(plan: ViewPlan, change: AugmentPlan) -> Tensor:
    """Low corner and extent in mm; a mirrored axis begins at the high corner and runs backwards."""
    start, extent = torch.tensor(plan.start_mm), torch.tensor(plan.extent_mm)
    for axis in change.flip_axes:
        start[axis] += extent[axis]
        extent[axis] *= -1
    return torch.stack([start, extent])
