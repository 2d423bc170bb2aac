"""What a run will take, before it takes it: memory, disk, samples a second, days and kWh; and whether it fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxelstem.engine import cost, hardware
from voxelstem.engine import device as devices
from voxelstem.engine.energy import EnergyConfig
from voxelstem.engine.footprint import Memory, Network, memory_of, network_bytes, ram_bytes, view_bytes
from voxelstem.engine.hardware import Fleet, gib
from voxelstem.engine.parallel import ParallelConfig
from voxelstem.errors import ConfigError
from voxelstem.protocols import Batch
from voxelstem.store.selection import Selection
from voxelstem.views.multicrop import covering_region

PRODUCTS_SHARE = 0.4
"""Of the rate of plain matrix products, what a whole step reaches on this machine; used where none is measured."""
MEASURED_SAMPLES = 8
"""Samples of a measured step, at most: its time is proportional to them."""
LONGEST_S = 10.0
"""A step that would take longer than this is not measured."""
DAY_S, KWH_J = 86400.0, 3.6e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes that move."""

    read_bytes_per_sample: float
    """From storage, compressed."""
    view_bytes_per_sample: float
    """The views of one sample in fp32."""
    read_gb_per_s: float
    """From storage, by all readers together, so that nobody waits."""
    network_bytes_per_step: float
    """That each GPU sends for gradients and, with `fsdp`, weights."""
    network_gb_per_s: float
    """The same in the time of a step, for each GPU."""
    sample_seconds: float
    """For a reader to prepare one sample, measured here in one thread: to read it, and to make its views where no GPU
    does."""
    readers: float
    """Cores that this takes all the time, over all machines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All of it. Bytes are bytes, and what is an estimate is called one in `source`."""

    recipe: str
    scans: int
    acquisitions: int
    subjects: int
    steps: int
    samples: int
    epochs: float
    device: str
    gpus: int
    kind: str
    """How many GPUs share: `ddp` or `fsdp`."""
    batch_per_device: int
    """Samples of a micro-batch."""
    precision: str
    backbone_parameters: int
    trained_parameters: int
    state_bytes: int
    """Of weights, gradients and optimiser in fp32, in one piece."""
    checkpoint_bytes: int
    """On disk at the most: those that are kept and the one that is written."""
    checkpoints_kept: int
    checkpoint_every: int
    disk_free_bytes: int
    ram_bytes: float
    """Of this machine (or, with GPUs elsewhere, of one of them) for readers and prepared samples."""
    ram_free_bytes: float
    """0: not known, because it is another machine."""
    flops_per_sample: float
    step_seconds: float
    samples_per_s: float
    days: float
    kwh: float
    source: str
    """Where the time of a step is from."""
    room_bytes: float
    """Memory of a device."""
    memory: Memory
    traffic: Traffic

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"memory_bytes": self.memory.total, "refused": list(self.refusals())}

    def refusals(self) -> tuple[str, ...]:
        """What does not fit, with the numbers."""
        found: list[str] = []
        memory = self.memory
        if memory.total > self.room_bytes:
            found.append(
                f"a step needs {gib(memory.total)} on each device, which has {gib(self.room_bytes)} "
                f"(weights {gib(memory.weights)}, gradients {gib(memory.gradients)}, optimiser "
                f"{gib(memory.optimiser)}, activations {gib(memory.activations)}, views {gib(memory.views)})"
            )
        if self.checkpoint_bytes > self.disk_free_bytes:
            found.append(
                f"checkpoints need {gib(self.checkpoint_bytes)} of disk, and {gib(self.disk_free_bytes)} are free"
            )
        if 0 < self.ram_free_bytes < self.ram_bytes:
            found.append(f"reading ahead needs {gib(self.ram_bytes)} of RAM, and {gib(self.ram_free_bytes)} are free")
        return tuple(found)

    def check(self) -> None:
        """Refuse a plan that cannot fit.

        Raises:
            ConfigError: with all numbers that say so.
        """
        found = self.refusals()
        if found:
            raise ConfigError(
                f"this run cannot fit: {'; '.join(found)}",
                hint="for device memory: parallel.recompute=true, parallel.kind=fsdp, more parallel.accumulate, "
                "more GPUs or a smaller loader.batch; for disk: a lower checkpoint.keep or another --out; for RAM: "
                "a lower loader.ahead or loader.workers",
            )

    def words(self) -> str:
        """For people: one thing a line."""
        memory, traffic = self.memory, self.traffic
        where = f"{self.gpus} x {self.device}, {self.kind}" if self.gpus else f"this machine ({self.device})"
        millions = self.backbone_parameters / 1e6, self.trained_parameters / 1e6
        ram = f", {gib(self.ram_free_bytes)} free" if self.ram_free_bytes else ""
        rows = {
            "recipe": f"{self.recipe}, {self.precision}, on {where}",
            "data": f"{self.scans:,} scans of {self.subjects:,} subjects, {self.epochs:.1f} epochs"
            + (" (fewer scans than a batch holds: training asks for loader.repeat=true)" if self.too_few else ""),
            "steps": f"{self.steps:,}, {self.samples:,} samples, {self.batch_per_device} at once on a device",
            "parameters": "backbone {:.1f} M, trained {:.1f} M".format(*millions),
            "device memory": f"{gib(memory.total)} of {gib(self.room_bytes)}",
            "  weights": gib(memory.weights),
            "  gradients": gib(memory.gradients),
            "  optimiser": gib(memory.optimiser),
            "  copies": gib(memory.copies),
            "  activations": gib(memory.activations),
            "  views": gib(memory.views),
            "RAM for samples": f"{gib(self.ram_bytes)} a machine{ram}",
            "disk": f"{gib(self.checkpoint_bytes)} for checkpoints, {gib(self.disk_free_bytes)} free",
            "checkpoint": f"{gib(self.state_on_disk)}, one every {self.checkpoint_every:,} steps",
            "computing": f"{self.flops_per_sample / 1e12:.3g} TFLOP a sample",
            "a step": f"{self.step_seconds:.3g} s ({self.source})",
            "samples a second": f"{self.samples_per_s:.3g}",
            "storage": f"{traffic.read_gb_per_s:.3g} GB/s in all, {traffic.read_bytes_per_sample / 1e6:.3g} MB each",
            "reading cores": f"{traffic.readers:.3g} in all ({traffic.sample_seconds:.3g} s a sample, measured here)",
            "network": f"{traffic.network_gb_per_s:.3g} GB/s out of each GPU, "
            f"{traffic.network_bytes_per_step / 1e9:.3g} GB a step",
            "time": f"{self.days:.3g} days",
            "energy": f"{self.kwh:.3g} kWh (estimated, without cooling)",
        }
        return "\n".join(f"{name:<18}{value}" for name, value in rows.items())

    @property
    def too_few(self) -> bool:
        """Whether a batch holds more samples than there are scans."""
        return self.scans * self.steps < self.samples

    @property
    def state_on_disk(self) -> float:
        """Bytes of one checkpoint."""
        return self.checkpoint_bytes / (self.checkpoints_kept + 1)


def plan(
    config: Any,
    chosen: Selection,
    *,
    make: Callable[[Any], Any],
    load: Callable[[Any], Any],
    out: Path,
    fleet: Fleet | None = None,
) -> Plan:
    """Reckon up a run of `config` (a `PretrainConfig`) over the chosen scans, without its network if that is large.

    `make` gives the objective and `load` the loader of a config; `out` is the run's folder, which need not exist.

    Raises:
        ConfigError: the batch cannot be shared out, or the run needs a GPU that is not there.
    """
    fleet, device = fleet or Fleet(), devices.choose(config.device)
    room = fleet.memory_bytes if fleet.gpus else _room(device)
    step = _reckon(config, make, fleet, device)
    few = replace(config, loader=replace(config.loader, batch=min(config.loader.batch, MEASURED_SAMPLES), repeat=True))
    loader = load(few)
    batch, sample_seconds = _time_a_batch(loader, made_elsewhere=gpu_makes_views(config.loader, fleet, device))
    fits = step.memory.total <= room
    computing = step.on(fleet) if fleet.gpus else step.here(few, make, batch, device=device, fits=fits)
    a_sample, source = max(computing, *_limits(config.loader, step, fleet, sample_seconds))
    seconds = config.steps * config.loader.batch * a_sample
    watts = fleet.watts if fleet.gpus else EnergyConfig().watts_per_core * torch.get_num_threads()
    return Plan(
        recipe=config.recipe,
        scans=len(chosen),
        acquisitions=chosen.acquisitions(),
        subjects=chosen.subjects(),
        steps=config.steps,
        samples=config.steps * config.loader.batch,
        epochs=config.steps * config.loader.batch / config.loader.samples_per_open / len(chosen),
        device=fleet.gpu if fleet.gpus else device.type,
        gpus=fleet.gpus,
        kind=step.kind,
        batch_per_device=step.share,
        precision="bf16" if step.bf16 else "fp32",
        backbone_parameters=step.backbone,
        trained_parameters=step.network.learned,
        state_bytes=cost.FLOAT * (step.network.held + 3 * step.network.learned),
        checkpoint_bytes=(config.checkpoint.keep + 1) * cost.FLOAT * (step.network.held + 2 * step.network.learned),
        checkpoints_kept=config.checkpoint.keep,
        checkpoint_every=config.checkpoint.every,
        disk_free_bytes=hardware.free_disk(out),
        ram_bytes=ram_bytes(config.loader, fleet, views=view_bytes(config.views)),
        ram_free_bytes=0.0 if fleet.gpus else hardware.free_memory(),
        flops_per_sample=step.flops,
        step_seconds=config.loader.batch * a_sample,
        samples_per_s=1 / a_sample,
        days=seconds / DAY_S,
        kwh=seconds * watts / KWH_J,
        source=source,
        room_bytes=room,
        memory=step.memory,
        traffic=_traffic(step, config, a_sample, read=_read_bytes(loader, samples=16), sample_seconds=sample_seconds),
    )


def _limits(loader: Any, step: _Step, fleet: Fleet, sample_seconds: float) -> list[tuple[float, str]]:
    """Seconds a sample takes at the least to be read (a `LoaderConfig` says by how many), and its gradients sent."""
    readers = max(1, fleet.gpus) * max(loader.workers, loader.threads)
    network = step.sent_bytes / fleet.network_gb_per_s / 1e9 / loader.batch
    return [
        (sample_seconds / readers, f"limited by {readers} threads or processes that read"),
        (network, f"limited by {fleet.network_gb_per_s:g} GB/s of network for each GPU"),
    ]


def _traffic(step: _Step, config: Any, a_sample: float, *, read: float, sample_seconds: float) -> Traffic:
    return Traffic(
        read_bytes_per_sample=read,
        view_bytes_per_sample=view_bytes(config.views),
        read_gb_per_s=read / a_sample / 1e9,
        network_bytes_per_step=step.sent_bytes,
        network_gb_per_s=step.sent_bytes / a_sample / config.loader.batch / 1e9,
        sample_seconds=sample_seconds,
        readers=sample_seconds / a_sample,
    )


def _share(batch: int, gpus: int, accumulate: int) -> int:
    if batch % (gpus * accumulate):
        raise ConfigError(
            f"a batch of {batch} samples cannot be shared out evenly among {gpus} GPUs in {accumulate} micro-batches",
            hint=f"set loader.batch to a multiple of {gpus * accumulate}",
        )
    return batch // (gpus * accumulate)


def gpu_makes_views(loader: Any, fleet: Fleet, device: torch.device) -> bool:
    """Whether those who read leave the views to a GPU, of the fleet or the one here; `loader` is a `LoaderConfig`."""
    return loader.made != "worker" and (fleet.gpus > 0 or device.type == "cuda")


def _room(device: torch.device) -> float:
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else hardware.free_memory()


def _time_a_batch(loader: Any, *, made_elsewhere: bool) -> tuple[Batch, float]:
    """A batch, and the seconds a reader needs for one sample of it (the second batch, so that nothing is cold).

    Where a GPU makes the views, readers only decode.
    """
    loader.batch(0)
    decoded, began = _decoding(loader), time.perf_counter()
    batch: Batch = loader.batch(1)
    seconds = _decoding(loader) - decoded if made_elsewhere else time.perf_counter() - began
    return batch, seconds / len(batch)


def _decoding(loader: Any) -> float:
    """Seconds that the loader has decoded so far."""
    speed = loader.speed()
    return speed["read_gb"] / speed["read_gb_per_s"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """What follows from the config and the hardware alone; of one sample unless it says otherwise."""

    network: Network
    backbone: int
    memory: Memory
    flops: float
    bf16: bool
    kind: str
    share: int
    sent_bytes: float
    """Of a whole step."""

    def on(self, fleet: Fleet) -> tuple[float, str]:
        """Seconds on GPUs that are not here; what they send is counted apart."""
        seconds = self.flops / fleet.gpus / fleet.flops_per_s(bf16=self.bf16)
        return seconds, f"estimated: {fleet.utilisation:.0%} of the data sheet's rate"

    def here(
        self, few: Any, make: Callable[[Any], Any], batch: Batch, *, device: torch.device, fits: bool
    ) -> tuple[float, str]:
        """Seconds here: of real steps where these are short enough, else by the speed of matrix products."""
        rate = PRODUCTS_SHARE * hardware.product_rate(device, bf16=self.bf16)
        if self.flops * len(batch) / rate > LONGEST_S or not fits:
            return self.flops / rate, f"estimated: {PRODUCTS_SHARE:.0%} of the speed of matrix products here"
        objective, batch = make(few).to(device), devices.move(batch, device)
        took = [_time_a_step(objective, batch, few.precision, device) for _ in range(3)]
        return float(np.median(took[1:])) / len(batch), f"measured on {len(batch)} samples"


def _reckon(config: Any, make: Callable[[Any], Any], fleet: Fleet, device: torch.device) -> _Step:
    parallel: ParallelConfig = config.parallel
    gpus, views = max(1, fleet.gpus), view_bytes(config.views)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and (fleet.gpus > 0 or devices.bf16_pays(device)))
    share = _share(config.loader.batch, gpus, parallel.accumulate)
    # An objective may let its samples pass in chunks, computed once more for the gradient.
    chunk = min(share, getattr(config.objective, "chunk", share))
    with torch.device("meta"):
        full = make(config)
    network = Network.of(full)
    blank = cost.blank_batch(config.views, samples=4, columns=getattr(config.objective, "columns", 0))
    calls = cost.observe(make(cost.miniature(config)), blank)
    costs = cost.sample_cost(calls, full, bf16=bf16)
    return _Step(
        network=network,
        backbone=sum(p.numel() for p in full.backbone.parameters()),
        memory=memory_of(network, costs, parallel, gpus=gpus, share=share, chunk=chunk, views=views, bf16=bf16),
        flops=costs.flops(recompute=parallel.recompute or chunk < share),
        bf16=bf16,
        kind=parallel.kind,
        share=share,
        sent_bytes=network_bytes(network, parallel, gpus=gpus, bf16=bf16),
    )


def _time_a_step(objective: Any, batch: Batch, precision: str, device: torch.device) -> float:
    began = time.perf_counter()
    with devices.autocast(device, precision):
        loss = objective.step(batch, progress=0.0).loss
    loss.backward()
    float(loss.detach())  # waits for a GPU
    return time.perf_counter() - began


def _read_bytes(loader: Any, *, samples: int) -> float:
    """Compressed bytes that a sample reads: its box's share of its scan's file, the mean over some samples."""
    read: list[float] = []
    for index in range(samples):
        record, views = loader.plan(*divmod(index, loader.config.batch))
        box = covering_region(views, record)
        read.append(record.volume_bytes * math.prod(box.size_ijk) / math.prod(record.shape_ijk))
    return float(np.mean(read))
