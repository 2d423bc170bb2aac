from __future__ import annotations

from pathlib import Path

import pytest
import torch

from voxelstem.engine import hardware
from voxelstem.engine.hardware import GIB, Fleet


def test_free_disk_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path):
    there = hardware.free_disk(tmp_path)
    assert there > 0
    assert hardware.free_disk(tmp_path / "not" / "yet") == pytest.approx(there, rel=0.05)


def test_free_memory_is_what_linux_calls_available_and_no_more_than_a_container_may(tmp_path: Path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  16000 kB\nMemAvailable:  9000 kB\n", encoding="ascii")
    assert hardware.free_memory(meminfo=meminfo, cgroup=tmp_path) == 9000 * 1024
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("1000\n", encoding="ascii")
    assert hardware.free_memory(meminfo=meminfo, cgroup=tmp_path) == 9000 * 1024
    (tmp_path / "memory.max").write_text("5000000\n", encoding="ascii")
    assert hardware.free_memory(meminfo=meminfo, cgroup=tmp_path) == 4_999_000
    assert 0 < hardware.free_memory() < 2**50


@pytest.mark.parametrize(
    ("limit", "used", "counts", "prefix"),
    [
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ],
)
def test_files_that_are_kept_in_memory_only_while_there_is_room_leave_a_container_s_memory_free(
    tmp_path: Path, limit: str, used: str, counts: str, prefix: str
):
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("5000000\n", encoding="ascii")
    (tmp_path / used).write_text("4900000\n", encoding="ascii")
    kinds = f"anon 600000\n{prefix}inactive_file 4000000\n{prefix}active_file 200000\n"
    (tmp_path / counts).write_text(kinds, encoding="ascii")
    assert hardware.free_memory(cgroup=tmp_path) == 5_000_000 - 4_900_000 + 4_200_000


def test_matrix_products_are_timed():
    rate = hardware.product_rate(torch.device("cpu"), bf16=False, size=128, seconds=0.02)
    assert 1e7 < rate < 1e15


def test_a_fleet_takes_the_data_sheet_s_memory_unless_told_otherwise():
    assert Fleet(gpus=8, gpu="a100").memory_bytes == 80 * GIB
    assert Fleet(gpus=8, gpu="a100", memory_gib=40).memory_bytes == 40 * GIB
    assert Fleet(gpus=2, gpu="h100", host_watts=100).watts == 1600
    assert Fleet(gpu="h100", utilisation=0.5).flops_per_s(bf16=True) == pytest.approx(494.5e12)


@pytest.mark.parametrize(
    "wrong", [{"gpus": -1}, {"gpu": "abacus"}, {"memory_gib": -1.0}, {"utilisation": 0.0}, {"per_node": 0}]
)
def test_fleets_that_cannot_be_are_refused(wrong: dict[str, object]):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        Fleet(**wrong)
