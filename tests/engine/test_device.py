"""Choosing where to train."""

from __future__ import annotations

import pytest
import torch

from voxelstem.engine import device
from voxelstem.errors import ConfigError
from voxelstem.testing import make_batch

CPU = torch.device("cpu")


def test_the_cpu_can_always_be_chosen() -> None:
    assert device.choose("cpu") == CPU


def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert device.choose("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, so it is not refused")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        device.choose("cuda")


def test_bf16_casts_and_fp32_does_not() -> None:
    a = torch.ones(4, 4)
    with device.autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with device.autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32


def test_auto_casts_only_where_it_pays() -> None:
    a = torch.ones(4, 4)
    with device.autocast(CPU, "auto"):
        assert (a @ a).dtype == (torch.bfloat16 if device.bf16_pays(CPU) else torch.float32)


def test_a_moved_batch_is_the_same() -> None:
    batch = make_batch((8, 8, 8))
    moved = device.move(batch, CPU)
    assert moved.seed == batch.seed
    assert all(torch.equal(moved.views[name], batch.views[name]) for name in batch.views)
    assert all(torch.equal(moved.places_mm[name], batch.places_mm[name]) for name in batch.places_mm)


def test_all_tensors_of_a_batch_move() -> None:
    moved = device.move(make_batch((8, 8, 8)), torch.device("meta"))
    for part in (moved.views, moved.places_mm, moved.targets):
        assert {tensor.device.type for tensor in part.values()} == {"meta"}
