"""Energy of a run in kWh: by the hardware's own counters where they can be read, elsewhere estimated, and said so.

Counters: NVIDIA's management library, which comes with the driver, for GPUs; Linux' powercap folder (RAPL) for
processors and their memory. Neither knows about fans, disks, cooling or other machines' idling.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

JOULES_PER_KWH = 3.6e6
POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """How much, and where the number is from."""

    kwh: float
    source: str
    """`measured (…)`, `estimated (…)`, or both where one device can be read and another cannot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyConfig:
    """What is assumed of hardware that tells nothing, and where to ask the rest."""

    watts_per_core: float = 10.0
    """Of one busy processor core with its share of cache and memory: 4 for large servers, 15 for desktops."""
    watts_per_gpu: float = 400.0
    """Of a GPU that trains."""
    powercap: Path = POWERCAP
    nvml: str = NVML


class EnergyMeter:
    """Counts from the moment it is entered until it is left.

    It is meant to be asked at every step or look: processors' counters begin anew after some minutes, which only a
    reading before and after can tell.

    >>> with EnergyMeter(torch.device("cpu"), EnergyConfig(powercap=Path("nowhere"))) as meter:
    ...     meter.kwh().source
    'estimated (10 W per busy core)'
    """

    def __init__(
        self, device: torch.device, config: EnergyConfig | None = None, *, before: float = 0.0, first_here: bool = True
    ) -> None:
        """Look what can be read.

        Args:
            device: Where training runs.
            config: What is assumed of hardware that tells nothing.
            before: kWh that the run took until now, such as before it was resumed.
            first_here: Whether this process is the first one on its machine: processors' counters are of the whole
                machine and count once.
        """
        config = config or EnergyConfig()
        self._kwh = before
        self._meters: list[tuple[str, str, Callable[[], float]]] = []
        if device.type == "cuda":
            self._meters.append(_gpu(device, config))
        zones = _zones(config.powercap)
        if not zones:
            watts = config.watts_per_core
            self._meters.append(("estimated", f"{watts:g} W per busy core", _Rising(lambda: watts * _core_seconds())))
        elif first_here:
            self._meters.append(("measured", "RAPL, all processors of the machine", _Zones(zones)))
        said: dict[str, list[str]] = {}
        for how, what, _ in self._meters:
            said.setdefault(how, []).append(what)
        words = [f"{how} ({', '.join(whats)})" for how, whats in sorted(said.items(), reverse=True)]
        self.source = " + ".join(words) or "measured (by another process of this machine)"

    def __enter__(self) -> EnergyMeter:
        """Begin to count."""
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Count what is left."""
        self.kwh()

    def kwh(self) -> Energy:
        """Everything so far, of this process's devices."""
        self._kwh += self._read() / JOULES_PER_KWH
        return Energy(kwh=self._kwh, source=self.source)

    def _read(self) -> float:
        """Joules since the last reading."""
        return sum(read() for _, _, read in self._meters)


class _Rising:
    """What a counter of joules that never falls gained since the last call."""

    def __init__(self, total: Callable[[], float]) -> None:
        self._total, self._last = total, total()

    def __call__(self) -> float:
        now = self._total()
        gained, self._last = max(now - self._last, 0.0), now
        return gained


class _Zones:
    """Joules of some powercap zones since the last call; each counts microjoules and begins anew at its range."""

    def __init__(self, zones: list[Path]) -> None:
        self._ranges = {zone: _number(zone / "max_energy_range_uj") or 0 for zone in zones}
        self._last = {zone: _number(zone / "energy_uj") for zone in zones}

    def __call__(self) -> float:
        gained = 0
        for zone, span in self._ranges.items():
            now, last = _number(zone / "energy_uj"), self._last[zone]
            if now is None or last is None:
                continue
            gained += now - last if now >= last else max(now - last + span, 0)
            self._last[zone] = now
        return gained / 1e6


def _zones(folder: Path) -> list[Path]:
    """Processor packages, and memory beside them. A platform zone would count both once more, and so would cores."""
    found: list[Path] = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        # The counter is often for root's eyes only.
        if (name.startswith("package") or name == "dram") and _number(zone / "energy_uj") is not None:
            found.append(zone)
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _core_seconds() -> float:
    """Busy seconds of all cores in this process, in those that it started, and in those of them that ended."""
    spent = os.times()
    living = sum(_busy(child.pid) for child in multiprocessing.active_children() if child.pid)
    return spent.user + spent.system + spent.children_user + spent.children_system + living


def _busy(pid: int) -> float:
    """Core seconds of a process that still runs; 0 where the system does not say."""
    try:
        # The name, which may hold anything, stands in brackets; times are fields 14 and 15 of the whole line.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def _gpu(device: torch.device, config: EnergyConfig) -> tuple[str, str, Callable[[], float]]:
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    counter = nvml_joules(uuid, config.nvml)
    if counter is not None:
        return "measured", "NVML", _Rising(counter)
    watts = config.watts_per_gpu
    return "estimated", f"{watts:g} W per GPU", _Rising(lambda: watts * time.monotonic())


def nvml_joules(uuid: str, library: str = NVML) -> Callable[[], float] | None:
    """A GPU's own counter of joules, by NVIDIA's management library; None where there is none or it does not count.

    Args:
        uuid: Such as `GPU-8f1c…`, which does not depend on which GPUs this process may see.
        library: File of the management library.
    """
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
    if failed or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
        return None

    def joules() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return joules
