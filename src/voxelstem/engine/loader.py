"""Training samples out of the store. A sample is a pure function of (seed, epoch, index): nothing to save or lose.

An epoch is a permutation of the scans. `samples_per_open` steps share a row of scans: the scan at place q of the row
is opened once and gives sample q to each of these steps, so a batch never holds two samples of one scan (unless there
are fewer scans than samples in it). Neither the number of processes that train, nor that of threads or workers that
read, nor the step at which a run resumes changes which samples a step holds, or one bit of them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from voxelstem.engine.transfer import Crops
from voxelstem.errors import StoreError
from voxelstem.protocols import Batch
from voxelstem.store.plans import epoch_order
from voxelstem.store.reader import Record, Store
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig, AugmentPlan, apply_augment, draw_augment
from voxelstem.views.crop import Crop, ViewKind, ViewPlan, apply_view, covering_crop, draw_views
from voxelstem.views.intensity import window
from voxelstem.workers import Lost, Workers

STORED_BYTES = 2
"""Of one voxel in the store."""
_CHECK_DISK = "see whether the store's disk is there and healthy, then ingest these scans again"
_PLACE, _CHANGE, _STEP = 1, 2, 3
"""First number of every seed: what is drawn. Streams with different purposes never meet."""


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
    """How many samples a step takes, from how many openings of files, and who prepares them."""

    batch: int = 8
    """Samples of one step, over all processes that train together."""
    samples_per_open: int = 2
    """Samples drawn from a scan each time its file is opened, one for each of as many steps in a row. An epoch gives
    this many samples of every scan. More saves openings; fewer makes neighbouring steps less alike."""
    threads: int = 1
    """Threads that read where there are no workers."""
    workers: int = 0
    """Processes that read. A scan that kills or stalls its process then costs the scan and not the run."""
    source: str = "blosc2"
    """`blosc2` reads the store's files; `tiles` the raw ones that `voxelstem export tiles` wrote: the same bits."""
    timeout_s: float = 60.0
    """Seconds that a worker may take over the samples of one opening."""
    ahead: int = 4
    """Steps that are prepared ahead."""
    max_bad_share: float = 0.1
    """Share of the scans that may turn out unreadable before the run stops; one always may."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a number below 1, negative workers, no time, or a share that is none.
        """
        if min(self.batch, self.threads, self.ahead, self.samples_per_open) < 1:
            raise ValueError(
                f"batch, threads, ahead and samples_per_open must be >= 1, got {self.batch}, {self.threads}, "
                f"{self.ahead}, {self.samples_per_open}"
            )
        if self.workers < 0 or not self.timeout_s > 0:
            raise ValueError(f"need workers >= 0 and timeout_s > 0, got {self.workers} and {self.timeout_s}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be in [0, 1], got {self.max_bad_share}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One opening of one scan, and which of its samples are wanted."""

    key: str
    epoch: int
    place: int
    """Where in the epoch's order the slot stands."""
    phases: tuple[int, ...]
    """Which of the `samples_per_open` samples."""


Sample = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
"""Views and places_mm of one sample, as in `Batch` without its first axis."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What a slot gave: the samples of its phases, or why there are none."""

    samples: tuple[Sample, ...] = ()
    fault: str = ""
    voxels: int = 0
    """How many were decoded."""
    seconds: float = 0.0
    """What decoding them took."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlotReader:
    """Makes the samples of a slot, in any thread or process, always the same."""

    crops: Crops
    spec: InputSpec
    views: ViewsConfig
    seed: int

    def __call__(self, slot: Slot) -> Reading:
        """Read the slot; a scan that cannot be read is tried once more."""
        reading = self._attempt(slot)
        return self._attempt(slot) if reading.fault else reading

    def _attempt(self, slot: Slot) -> Reading:
        samples: list[Sample] = []
        voxels, seconds = 0, 0.0
        try:
            record = self.crops.store.record(slot.key)
            for phase in slot.phases:
                plans = self.plan(record, slot, phase)
                kinds = [plan for kind in plans.values() for plan in kind]
                crop = _around([covering_crop(plan, record.spacing_mm, record.shape_ijk) for plan in kinds])
                began = time.perf_counter()
                box = self.crops.read(record.key, crop.start_ijk, crop.size_ijk)
                seconds += time.perf_counter() - began
                voxels += box.numel()
                rng = np.random.default_rng(self._seed(_CHANGE, slot, phase))
                samples.append(self._cut(record, plans, crop, box, rng))
        except StoreError as error:
            return Reading(fault=error.problem)
        return Reading(samples=tuple(samples), voxels=voxels, seconds=seconds)

    def plan(self, record: Record, slot: Slot, phase: int) -> dict[str, list[ViewPlan]]:
        """Draw where the views of one sample lie."""
        rng = np.random.default_rng(self._seed(_PLACE, slot, phase))
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

    def _seed(self, purpose: int, slot: Slot, phase: int) -> list[int]:
        return [purpose, self.seed, slot.epoch, slot.place, phase]

    def _cut(
        self,
        record: Record,
        plans: dict[str, list[ViewPlan]],
        crop: Crop,
        voxels: Float32[Tensor, "channel i j k"],
        rng: np.random.Generator,
    ) -> Sample:
        views: dict[str, np.ndarray] = {}
        places: dict[str, np.ndarray] = {}
        for name, kind in plans.items():
            changes = [draw_augment(self.views.augment, rng) for _ in kind]
            seen: list[np.ndarray] = []
            for plan, change in zip(kind, changes, strict=True):
                view = apply_view(voxels, plan, crop, spacing_mm=record.spacing_mm, outside=self.spec.low_hu)
                seen.append(apply_augment(window(view, self.spec), change).numpy())
            views[name] = np.stack(seen)
            places[name] = np.stack([_place(plan, change) for plan, change in zip(kind, changes, strict=True)])
        return views, places


Read = Callable[[Iterable[Slot]], Iterator[tuple[Slot, Reading | Lost]]]


class Loader:
    """Gives the batch of any step, in any order, always the same: process `rank` of `world` its share of it.

    A scan that cannot be read twice in a row (its file is damaged, or its worker died or hung twice) is quarantined
    for the rest of the run. The next good scan of the epoch's order stands in for it, and `notes` says so.
    """

    def __init__(
        self,
        store: Store,
        keys: Sequence[str],
        spec: InputSpec,
        *,
        views: ViewsConfig,
        config: LoaderConfig,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`keys` are those of the scans to train on.

        Raises:
            StoreError: there are none.
            ValueError: the batch cannot be shared out evenly.
        """
        if not len(keys):
            raise StoreError("no scan to train on", hint="ingest scans of the recipe's modality first")
        if not 0 <= rank < world or config.batch % world:
            raise ValueError(f"loader.batch must be a multiple of the {world} processes, got {config.batch}")
        self.store, self.keys, self.spec = store, sorted(keys), spec
        self.views, self.config, self.seed = views, config, seed
        self.rank, self.world = rank, world
        self.quarantined: set[str] = set()
        crops = Crops(store, config.source)
        self._read = SlotReader(crops=crops, spec=spec, views=views, seed=seed)
        self._notes: list[dict[str, Any]] = [crops.note()]
        self._voxels, self._seconds = 0, 0.0

    def quarantine(self, keys: Iterable[str]) -> None:
        """Leave scans out from the start, by the first letters of their keys as `notes` gives them."""
        marks = tuple(keys)
        self.quarantined |= {key for key in self.keys if marks and key.startswith(marks)}

    def notes(self) -> list[dict[str, Any]]:
        """What happened since the last call, for the journal: the way voxels come by, scans that were quarantined."""
        notes, self._notes = self._notes, []
        return notes

    def speed(self) -> dict[str, float]:
        """How many GB of stored voxels were read so far, and how many GB/s each thread or process read."""
        read = self._voxels * STORED_BYTES / 1e9
        return {"read_gb": read, "read_gb_per_s": read / self._seconds if self._seconds else 0.0}

    def batch(self, step: int) -> Batch:
        """This process's samples of one step, read here and now."""
        row = [self._good(slot, self._read(slot), self._here) for slot in self._slots(step, step + 1)]
        return self._batch(step, [samples[0] for samples in row])

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Batches of the steps from `start` to `stop`, prepared ahead by threads or processes.

        Raises:
            StoreError: too many scans cannot be read.
            ConfigError: processes cannot be started.
        """
        with self._readers() as read:
            readings = iter(read(self._slots(start, stop)))
            for steps in self._rows(start, stop):
                row = [self._good(*next(readings), read) for _ in self._share]
                for step in steps:
                    yield self._batch(step, [samples[step - steps.start] for samples in row])

    def plan(self, step: int, index: int) -> tuple[Record, dict[str, list[ViewPlan]]]:
        """Which scan sample `index` of the whole batch of `step` reads, and where its views lie."""
        phase = step % self.config.samples_per_open
        slot = self._slot(step // self.config.samples_per_open * self.config.batch + index, (phase,))
        record = self.store.record(slot.key)
        return record, self._read.plan(record, slot, phase)

    @property
    def _share(self) -> range:
        size = self.config.batch // self.world
        return range(self.rank * size, (self.rank + 1) * size)

    def _rows(self, start: int, stop: int) -> Iterator[range]:
        """Steps that share their openings, in order."""
        each = self.config.samples_per_open
        while start < stop:
            end = min(start - start % each + each, stop)
            yield range(start, end)
            start = end

    def _slots(self, start: int, stop: int) -> Iterator[Slot]:
        each = self.config.samples_per_open
        for steps in self._rows(start, stop):
            for index in self._share:
                position = steps.start // each * self.config.batch + index
                yield self._slot(position, tuple(step % each for step in steps))

    def _slot(self, position: int, phases: tuple[int, ...]) -> Slot:
        count = len(self.keys)
        epoch, place = divmod(position, count)
        order = _order(count, self.seed, epoch)
        for shift in range(count):
            key = self.keys[order[(place + shift) % count]]
            if key not in self.quarantined:
                return Slot(key=key, epoch=epoch, place=place, phases=phases)
        raise StoreError("no scan to train on can be read", hint=_CHECK_DISK)

    def _good(self, slot: Slot, reading: Reading | Lost, read: Read) -> tuple[Sample, ...]:
        """The samples of a slot; where its scan cannot be read, of the one that stands in for it."""
        while isinstance(reading, Lost) or reading.fault:
            self._put_aside(slot.key, reading.reason if isinstance(reading, Lost) else reading.fault)
            slot = self._slot(slot.epoch * len(self.keys) + slot.place, slot.phases)
            ((_, reading),) = read([slot])
        self._voxels += reading.voxels
        self._seconds += reading.seconds
        return reading.samples

    def _put_aside(self, key: str, reason: str) -> None:
        if key in self.quarantined:
            return
        self.quarantined.add(key)
        self._notes.append({"quarantined": key[:16], "reason": reason})
        bad, count = len(self.quarantined), len(self.keys)
        if bad > max(1, self.config.max_bad_share * count):
            raise StoreError(f"{bad} of {count} scans cannot be read; the last one: {reason}", hint=_CHECK_DISK)

    def _here(self, slots: Iterable[Slot]) -> Iterator[tuple[Slot, Reading]]:
        return ((slot, self._read(slot)) for slot in slots)

    @contextmanager
    def _readers(self) -> Generator[Read, None, None]:
        """Threads or processes that read slots ahead, in order."""
        # Slots that are in hand hold whole rows, so that no more than `ahead` steps (and one row) are in memory.
        ahead = math.ceil(self.config.ahead / self.config.samples_per_open) * len(self._share)
        if self.config.workers:
            with Workers(self._read, self.config.workers, timeout_s=self.config.timeout_s) as workers:
                yield lambda slots: workers.map(slots, ahead=ahead)
        else:
            with ThreadPoolExecutor(self.config.threads) as pool:
                try:
                    yield lambda slots: _ahead(pool, self._read, slots, ahead)
                finally:
                    pool.shutdown(cancel_futures=True)

    def _batch(self, step: int, samples: list[Sample]) -> Batch:
        (views, places), (names, kinds) = zip(*samples, strict=True), (samples[0][0], samples[0][1])
        return Batch(
            views={name: torch.from_numpy(np.stack([view[name] for view in views])) for name in names},
            places_mm={name: torch.from_numpy(np.stack([place[name] for place in places])) for name in kinds},
            seed=int(np.random.default_rng([_STEP, self.seed, step]).integers(2**62)),
            first=self._share.start,
        )


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " count"]:
    return epoch_order(count, seed=seed, epoch=epoch)


def _ahead(
    pool: ThreadPoolExecutor, read: SlotReader, slots: Iterable[Slot], ahead: int
) -> Iterator[tuple[Slot, Reading]]:
    waiting: deque[tuple[Slot, Future[Reading]]] = deque()
    for slot in slots:
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
        waiting.append((slot, pool.submit(read, slot)))
    for first, future in waiting:
        yield first, future.result()


def _around(crops: Sequence[Crop]) -> Crop:
    """The smallest box that holds all of them."""
    low = np.min([crop.start_ijk for crop in crops], axis=0)
    size = np.max([np.add(crop.start_ijk, crop.size_ijk) for crop in crops], axis=0) - low
    return Crop(start_ijk=(int(low[0]), int(low[1]), int(low[2])), size_ijk=(int(size[0]), int(size[1]), int(size[2])))


def _place(plan: ViewPlan, change: AugmentPlan) -> Float32[np.ndarray, "2 3"]:
    """Low corner and extent in mm; a mirrored axis begins at the high corner and runs backwards."""
    start, extent = np.array(plan.start_mm, np.float32), np.array(plan.extent_mm, np.float32)
    for axis in change.flip_axes:
        start[axis] += extent[axis]
        extent[axis] *= -1
    return np.stack([start, extent])
