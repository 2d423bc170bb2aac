"""What a plan may count on: the GPUs it is for, and what is free on this machine."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Figures of a data sheet: dense, without sparsity."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    watts: float


GPUS = {
    "a100": Gpu(memory_gib=80, bf16_tflops=312, fp32_tflops=19.5, watts=400),
    "h100": Gpu(memory_gib=80, bf16_tflops=989, fp32_tflops=67, watts=700),
    "h200": Gpu(memory_gib=141, bf16_tflops=989, fp32_tflops=67, watts=700),
    "l40s": Gpu(memory_gib=48, bf16_tflops=362, fp32_tflops=91.6, watts=350),
    "rtx4090": Gpu(memory_gib=24, bf16_tflops=165, fp32_tflops=82.6, watts=450),
}
"""NVIDIA's data sheets (SXM where there are two forms), as a plan's assumptions; the only place for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """The GPUs that a plan is for; none: this machine as it is."""

    gpus: int = 0
    gpu: str = "h100"
    memory_gib: float = 0.0
    """Of each GPU; 0: what the data sheet says."""
    per_node: int = 8
    utilisation: float = 0.35
    """Share of the data sheet's rate that a step reaches: an assumption, which a measured step replaces."""
    network_gb_per_s: float = 50.0
    """That each GPU can send while it computes: 400 Gb/s each, as in the large machines of its kind."""
    host_watts: float = 150.0
    """What the machine around each GPU draws."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a negative number, a share that is none, or a GPU whose figures nobody wrote down.
        """
        if self.gpu not in GPUS:
            raise ValueError(f"gpu is one of {', '.join(GPUS)}, got '{self.gpu}'")
        if min(self.gpus, self.memory_gib, self.host_watts) < 0 or self.per_node < 1 or not self.network_gb_per_s > 0:
            raise ValueError("need gpus, memory_gib and host_watts >= 0, per_node >= 1 and network_gb_per_s > 0")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation lies in (0, 1], got {self.utilisation}")

    @property
    def memory_bytes(self) -> float:
        """Of each GPU."""
        return (self.memory_gib or GPUS[self.gpu].memory_gib) * GIB

    @property
    def watts(self) -> float:
        """Of all GPUs and the machines around them; cooling is not counted."""
        return self.gpus * (GPUS[self.gpu].watts + self.host_watts)

    def flops_per_s(self, *, bf16: bool) -> float:
        """What one GPU is expected to reach."""
        gpu = GPUS[self.gpu]
        return self.utilisation * 1e12 * (gpu.bf16_tflops if bf16 else gpu.fp32_tflops)


def gib(size: float) -> str:
    """Bytes for people.

    >>> gib(5 * 2**30), gib(3 * 2**20)
    ('5.0 GiB', '3.0 MiB')
    """
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / GIB * 1024:.1f} MiB"


def free_memory(*, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> float:
    """Bytes of RAM that a new process can have here: what Linux calls available, and no more than a container may."""
    free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        free = 1024.0 * int(lines["MemAvailable"].split()[0])
    for limit, used, counts, prefix in _LIMITS:
        paths = cgroup / limit, cgroup / used
        if all(path.is_file() for path in paths) and (text := paths[0].read_text(encoding="ascii").strip()) != "max":
            taken = float(paths[1].read_text(encoding="ascii")) - _cached(cgroup / counts, prefix)
            free = min(free, max(0.0, int(text) - taken))
    return free


def _cached(counts: Path, prefix: str) -> float:
    """Bytes of files that are in memory because there was room: they count as used, and go when it is needed."""
    if not counts.is_file():
        return 0.0
    pairs = dict(line.split() for line in counts.read_text(encoding="ascii").splitlines())
    return sum(float(pairs.get(prefix + name, 0)) for name in ("inactive_file", "active_file"))


_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
)
"""Of a container, by either version of Linux' control groups: what it may have, what it has, and of what kinds."""


def free_disk(folder: Path) -> int:
    """Free bytes of the file system in which a folder lies or will lie."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def product_rate(device: torch.device, *, bf16: bool, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of products of square matrices here, the fastest of several."""
    left = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    fastest, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends or fastest == float("inf"):
        began = time.perf_counter()
        product = left @ left
        float(product[0, 0])  # waits for a GPU
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest
