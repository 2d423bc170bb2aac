from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from voxelstem.engine.energy import JOULES_PER_KWH, EnergyConfig, EnergyMeter, nvml_joules

CPU = torch.device("cpu")


class Powercap:
    """A folder like /sys/class/powercap."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def zone(self, number: str, name: str, joules: float, *, span: float = 1000.0) -> None:
        zone = self.folder / number
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "name").write_text(name + "\n")
        (zone / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
        (zone / "max_energy_range_uj").write_text(f"{int(span * 1e6)}\n")

    def meter(self, before: float = 0.0, *, first_here: bool = True) -> EnergyMeter:
        return EnergyMeter(CPU, EnergyConfig(powercap=self.folder), before=before, first_here=first_here)


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    return Powercap(tmp_path / "powercap")


def joules(meter: EnergyMeter) -> float:
    return round(meter.kwh().kwh * JOULES_PER_KWH, 6)


def test_packages_and_memory_count_and_what_holds_them_does_not(powercap: Powercap):
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "psys"}
    for zone, name in (names | {"intel-rapl-mmio:0": "package-0"}).items():
        powercap.zone(zone, name, 100.0)
    with powercap.meter() as meter:
        for zone, name in (names | {"intel-rapl-mmio:0": "package-0"}).items():
            powercap.zone(zone, name, 130.0)
        assert joules(meter) == 60.0
        assert meter.kwh().source == "measured (RAPL, all processors of the machine)"


def test_a_counter_that_began_anew_is_understood(powercap: Powercap):
    powercap.zone("intel-rapl:0", "package-0", 990.0)
    with powercap.meter() as meter:
        powercap.zone("intel-rapl:0", "package-0", 5.0)
        assert joules(meter) == 15.0
        powercap.zone("intel-rapl:0", "package-0", 25.0)
        assert joules(meter) == 35.0


def test_energy_is_counted_from_entering_and_on_top_of_what_was_before(powercap: Powercap):
    powercap.zone("intel-rapl:0", "package-0", 100.0)
    meter = powercap.meter(before=1.5)
    powercap.zone("intel-rapl:0", "package-0", 200.0)
    with meter:
        powercap.zone("intel-rapl:0", "package-0", 300.0)
    assert meter.kwh().kwh == pytest.approx(1.5 + 100 / JOULES_PER_KWH, rel=1e-12)


def test_a_counter_that_vanishes_adds_nothing(powercap: Powercap):
    powercap.zone("intel-rapl:0", "package-0", 100.0)
    with powercap.meter() as meter:
        shutil.rmtree(powercap.folder)
        assert joules(meter) == 0.0


def test_counters_of_the_whole_machine_count_in_one_of_its_processes(powercap: Powercap):
    powercap.zone("intel-rapl:0", "package-0", 100.0)
    with powercap.meter(first_here=False) as meter:
        powercap.zone("intel-rapl:0", "package-0", 300.0)
        assert joules(meter) == 0.0
        assert meter.source == "measured (by another process of this machine)"


@pytest.mark.parametrize("content", ["", "nothing"])
def test_zones_that_cannot_be_read_mean_an_estimate(powercap: Powercap, content: str):
    powercap.zone("intel-rapl:0", "package-0", 100.0)
    (powercap.folder / "intel-rapl:0" / "energy_uj").write_text(content)
    assert powercap.meter().source == "estimated (10 W per busy core)"


def test_the_estimate_is_busy_seconds_times_the_watts_that_it_states(tmp_path: Path):
    config = EnergyConfig(watts_per_core=3600.0, powercap=tmp_path)
    with EnergyMeter(CPU, config) as meter:
        began = time.process_time()
        while time.process_time() - began < 0.3:
            sum(range(10_000))
        busy = time.process_time() - began
        told = meter.kwh()
    # The system counts busy time in hundredths of a second.
    assert told.kwh == pytest.approx(busy / 1000, abs=0.05 / 1000)
    assert told.source == "estimated (3600 W per busy core)"


def test_waiting_costs_nothing_by_the_estimate(tmp_path: Path):
    with EnergyMeter(CPU, EnergyConfig(watts_per_core=3600.0, powercap=tmp_path)) as meter:
        time.sleep(0.2)
        assert meter.kwh().kwh < 0.1 / 1000


def test_without_the_management_library_a_gpu_is_not_measured():
    assert nvml_joules("GPU-1", "libthere-is-none.so") is None


LIBRARY = """
#include <string.h>
static unsigned long long spent = 5000;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = &spent; return strcmp(uuid, "GPU-1") != 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
  *energy = *(unsigned long long *)device; spent += 1500; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_a_gpu_s_own_counter_is_read_as_joules(tmp_path: Path):
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(LIBRARY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    counter = nvml_joules("GPU-1", str(library))
    assert counter is not None
    assert [counter(), counter()] == [6.5, 8.0]
    assert nvml_joules("GPU-2", str(library)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_busy_gpu_takes_energy():
    with EnergyMeter(torch.device("cuda")) as meter:
        began = time.monotonic()
        square = torch.rand(4096, 4096, device="cuda")
        while time.monotonic() - began < 1.0:
            (square @ square).sum().item()
        # Between a GPU at rest and the hungriest there is.
        assert 5.0 / JOULES_PER_KWH < meter.kwh().kwh < 5000.0 / JOULES_PER_KWH
