"""Where training runs: one place that chooses the device and moves batches to it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from voxelstem.errors import ConfigError
from voxelstem.protocols import Batch

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


def choose(name: str) -> torch.device:
    """The device of this name; `auto` is the GPU where there is one.

    Raises:
        ConfigError: a GPU is wanted and there is none.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("device is cuda, and torch sees no GPU here", hint="set device=auto or device=cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def bf16_pays(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware. Elsewhere it is emulated and many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Torch knows, but has no public door to ask at.
    avx512 = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    amx = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    return bool(avx512 or amx)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 autocast for `bf16`, and for `auto` where it pays."""
    use = precision == "bf16" or (precision == "auto" and bf16_pays(device))
    return torch.autocast(device.type, torch.bfloat16) if use else nullcontext()


def move(batch: Batch, device: torch.device) -> Batch:
    """The same batch on the device."""
    return replace(
        batch,
        views={name: view.to(device, non_blocking=True) for name, view in batch.views.items()},
        places_mm={name: place.to(device, non_blocking=True) for name, place in batch.places_mm.items()},
        targets={name: values.to(device, non_blocking=True) for name, values in batch.targets.items()},
    )
