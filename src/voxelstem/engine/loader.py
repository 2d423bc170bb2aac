"""Training samples out of the store. A sample is a pure function of (seed, epoch, index): nothing to save or lose.

An epoch is a permutation of the scans. `samples_per_open` steps share a row of scans: the scan at place q of the row
is opened once and gives sample q to each of these steps, so a batch never holds two samples of one opening (and two of
one scan only where an epoch ends within it, another scan cannot be read, or `repeat` allows fewer scans than samples).
Neither the number of processes that train, nor that of threads or workers that read, nor the step at which a run
resumes changes which samples a step holds, or one bit of them.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64

from voxelstem.engine.pair_counts import NAME_LETTERS, PairCounts
from voxelstem.engine.reading import Reading, Sample, Slot, SlotReader
from voxelstem.engine.targets import read_facts
from voxelstem.engine.transfer import Crops
from voxelstem.errors import ConfigError, StoreError
from voxelstem.protocols import Batch
from voxelstem.store.plans import epoch_order
from voxelstem.store.reader import Record, Store
from voxelstem.study import InputSpec
from voxelstem.views.multicrop import Region, ViewPlans, ViewsConfig, make_views
from voxelstem.workers import Lost, Workers

STORED_BYTES = 2
"""Of one voxel in the store."""
_CHECK_DISK = "see whether the store's disk is there and healthy, then ingest these scans again"
_CHECK_VALUES = (
    "the store's files are sound, the values in them are not: export these scans as they were before anything "
    "normalised them, and ingest them again"
)
_STEP = 3
"""First number of a step's seed; those of `engine.reading` are others."""
CPU = torch.device("cpu")


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
    made: Literal["auto", "worker", "device"] = "auto"
    """Who makes the views of what was read: the threads or workers, or the device that trains, which then gets boxes of
    voxels (`auto`: a GPU does, a processor does not)."""
    repeat: bool = False
    """Whether a batch may hold several samples of one scan, as it must where there are fewer scans than samples."""

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


Read = Callable[[Iterable[Slot]], Iterator[tuple[Slot, Reading | Lost]]]


class Loader:
    """Gives the batch of any step, in any order, always the same: process `rank` of `world` its share of it.

    A scan that cannot be read twice in a row (its file is damaged, or its worker died or hung twice) is quarantined
    for the rest of the run. The next good scan of the epoch's order stands in for it, and `notes` says so. Where
    samples are pairs, another partner stands in for one that cannot be read, and the scan itself where there is none.
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
            StoreError: there are none, or too few for one batch and `config.repeat` is off; or pairs are wanted and
                there are none (`targets.read_facts`).
            ConfigError: the batch cannot be shared out evenly.
        """
        if not len(keys):
            raise StoreError("no scan to train on", hint="ingest scans of the recipe's modality first")
        if len(keys) < config.batch and not config.repeat:
            raise StoreError(
                f"a batch of {config.batch} samples needs as many scans, and there are {len(keys)} to train on",
                hint=f"set loader.batch={len(keys)} or less, ingest more scans, or set loader.repeat=true to take "
                "several samples of one scan into a batch",
            )
        if config.batch % world:
            raise ConfigError(
                f"loader.batch must be a multiple of the {world} processes, got {config.batch}",
                hint=f"set loader.batch to a multiple of {world}, or start another number of processes",
            )
        self.store, self.keys, self.spec = store, sorted(keys), spec
        self.views, self.config, self.seed = views, config, seed
        self.rank, self.world = rank, world
        self.quarantined: set[str] = set()
        self._advice = _CHECK_DISK
        self._crops = Crops(store, config.source)
        self._facts = read_facts(store, self.keys, views.pair) if views.pair else None
        self._notes: list[dict[str, Any]] = [self._crops.note(), *([self._facts.note()] if self._facts else [])]
        if views.left_out:
            held = sum(views.left_out in store.record(key).classes.values() for key in self.keys)
            self._notes.append({f"left out, '{views.left_out}'": f"in {held} of {len(self.keys)} scans"})
        self.pairs = PairCounts()
        self._voxels, self._seconds = 0, 0.0
        self._waited, self._busy = 0.0, 0.0

    def quarantine(self, keys: Iterable[str]) -> None:
        """Leave out these scans and no others, by the first letters of their keys as `notes` gives them.

        What was found out about others is forgotten and not told: a run that resumes, or goes back, meets them again
        where it met them first.
        """
        marks = tuple(keys)
        self.quarantined = {key for key in self.keys if marks and key.startswith(marks)}
        self._notes = [note for note in self._notes if "quarantined" not in note]

    def notes(self) -> list[dict[str, Any]]:
        """What happened since the last call, for the journal: the way voxels come by, scans that were quarantined."""
        notes, self._notes = self._notes, []
        return notes

    @property
    def known(self) -> str:
        """The scans' keys, a line each, and what is known of them where a recipe asks for it."""
        said = [json.dumps(self._facts.note(), sort_keys=True)] if self._facts else []
        return "\n".join([*self.keys, *said])

    def speed(self) -> dict[str, float]:
        """How fast samples came so far.

        GB of stored voxels that were read and GB/s that each thread or process read; and how long whoever trains waited
        for batches, in seconds and as a share of the time since the first one came (which waits for all to start).
        Where samples are pairs, the share of those whose second scan is a copy, and how many were refused as one: of
        the batches that `batches` handed out, whatever was read ahead of them.
        """
        read, passed = self._voxels * STORED_BYTES / 1e9, self._waited + self._busy
        return self.pairs.shares() | {
            "read_gb": read,
            "read_gb_per_s": read / self._seconds if self._seconds else 0.0,
            "data_wait_s": self._waited,
            "data_wait_share": self._waited / passed if passed else 0.0,
        }

    def names(self, step: int) -> list[str]:
        """Of which scans this process's samples of a step are, by the first letters of their keys."""
        return [slot.key[:NAME_LETTERS] for slot in self._slots(step, step + 1)]

    def batch(self, step: int, *, device: torch.device = CPU) -> Batch:
        """This process's samples of one step, read here and now; for a GPU they lie on `device` if it made them."""
        reader = self._reader(device)

        def read(slots: Iterable[Slot]) -> Iterator[tuple[Slot, Reading]]:
            return ((slot, reader(slot)) for slot in slots)

        row = [self._good(slot, reader(slot), read) for slot in self._slots(step, step + 1)]
        return self._batch(step, [reading.samples[0] for _, reading in row], device)

    def batches(self, start: int, stop: int, *, device: torch.device = CPU) -> Generator[Batch, None, None]:
        """Batches of the steps from `start` to `stop`, prepared ahead by threads or processes, as `batch` gives them.

        Raises:
            StoreError: too many scans cannot be read.
            ConfigError: processes cannot be started.
        """
        with closing(self._prepared(start, stop, device)) as prepared:
            asked: float | None = None
            for batch in prepared:
                ready = time.perf_counter()
                self._waited += 0.0 if asked is None else ready - asked
                yield batch
                asked = time.perf_counter()
                self._busy += asked - ready

    def _prepared(self, start: int, stop: int, device: torch.device) -> Generator[Batch, None, None]:
        with self._readers(device) as read:
            readings = iter(read(self._slots(start, stop)))
            for steps in self._rows(start, stop):
                row = [self._good(*next(readings), read) for _ in self._share]
                for sample, step in enumerate(steps):
                    batch = self._batch(step, [reading.samples[sample] for _, reading in row], device)
                    for slot, reading in row:
                        self._notes += self.pairs.add(slot, reading, sample)
                    yield batch

    def _reader(self, device: torch.device) -> SlotReader:
        made = self.config.made
        makes = made == "worker" or (made == "auto" and device.type == "cpu")
        return SlotReader(
            crops=self._crops, spec=self.spec, views=self.views, seed=self.seed, makes=makes, facts=self._facts
        )

    def plan(self, step: int, index: int) -> tuple[Record, ViewPlans]:
        """Which scan sample `index` of the whole batch of `step` reads, and where its views lie."""
        phase = step % self.config.samples_per_open
        slot = self._slot(step // self.config.samples_per_open * self.config.batch + index, (phase,))
        record = self.store.record(slot.key)
        return record, self._reader(CPU).plan(record, slot, phase)

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
                return Slot(key=key, epoch=epoch, place=place, phases=phases, aside=self._aside(key))
        raise StoreError("no scan to train on can be read", hint=self._advice)

    def _aside(self, key: str) -> frozenset[str]:
        """Partners of a scan that are quarantined."""
        if self._facts is None or not self.quarantined:
            return frozenset()
        return self._facts.relatives(key) & self.quarantined

    def _good(self, slot: Slot, reading: Reading | Lost, read: Read) -> tuple[Slot, Reading]:
        """A slot and its samples; where its scan cannot be read, the slot of the one that stands in for it."""
        # What was read ahead of a scan that was put aside meanwhile is left: how far ahead that was must not matter.
        while isinstance(reading, Lost) or reading.fault or self.quarantined & {slot.key, *reading.partners}:
            if isinstance(reading, Lost):
                self._put_aside(slot.key, reading.reason)
            elif reading.fault:
                self._put_aside(reading.blamed, reading.fault, reading.code)
            slot = self._slot(slot.epoch * len(self.keys) + slot.place, slot.phases)
            ((_, reading),) = read([slot])
        self._voxels += reading.voxels
        self._seconds += reading.seconds
        return slot, reading

    def _put_aside(self, key: str, reason: str, code: str = "") -> None:
        if key in self.quarantined:
            return
        self.quarantined.add(key)
        self._advice = _CHECK_VALUES if code else _CHECK_DISK
        self._notes.append({"quarantined": key[:NAME_LETTERS], "reason": reason} | ({"code": code} if code else {}))
        bad, count = len(self.quarantined), len(self.keys)
        if bad > max(1, self.config.max_bad_share * count):
            raise StoreError(
                f"{bad} of {count} scans cannot be {'used' if code else 'read'}; the last one: {reason}",
                hint=self._advice,
            )

    @contextmanager
    def _readers(self, device: torch.device) -> Generator[Read, None, None]:
        """Threads or processes that read slots ahead, in order."""
        # Slots that are in hand hold whole rows, so that no more than `ahead` steps (and one row) are in memory.
        reader = self._reader(device)
        ahead = math.ceil(self.config.ahead / self.config.samples_per_open) * len(self._share)
        if self.config.workers:
            with Workers(reader, self.config.workers, timeout_s=self.config.timeout_s) as workers:
                yield lambda slots: workers.map(slots, ahead=ahead)
        else:
            with ThreadPoolExecutor(self.config.threads) as pool:
                try:
                    yield lambda slots: _ahead(pool, reader, slots, ahead)
                finally:
                    pool.shutdown(cancel_futures=True)

    def _batch(self, step: int, samples: list[Sample], device: torch.device) -> Batch:
        regions = [sample for sample in samples if isinstance(sample, Region)]
        # What is there already: whole samples, or the flags of those that are made now.
        there = [sample.all_flags if isinstance(sample, Region) else sample.views for sample in samples]
        views = {name: torch.from_numpy(np.stack([one[name] for one in there])) for name in there[0]}
        if regions:
            flags = {name: each.to(device) for name, each in views.items()}
            views = make_views(regions, self.spec, self.views, device=device) | flags
        places = [sample.places_mm for sample in samples]
        return Batch(
            views=views,
            places_mm={name: torch.from_numpy(np.stack([each[name] for each in places])) for name in places[0]},
            seed=int(np.random.default_rng([_STEP, self.seed, step]).integers(2**62)),
            first=self._share.start,
            texts=tuple(sample.text for sample in samples) if self.views.report else (),
            targets={
                name: torch.from_numpy(np.stack([sample.targets[name] for sample in samples]))
                for name in samples[0].targets
            },
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
