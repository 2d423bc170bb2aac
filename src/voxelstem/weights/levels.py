"""A weights folder's two levels as modules that leave: what the ONNX and the OpenVINO export have in common.

`blocks`: blocks (row, channel, i, j, k), windowed to [0, 1] -> cls (row, dim), patches (row, patch, dim).
`scan`, where it is there: described (batch, n, 2 dim), positions (n, 3) -> scan (batch, scan_dim), blocks
(batch, n, scan_dim); `described` is concat(cls, mean of patches), `positions` the blocks' centres in (-1, 1).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxelstem.backbones.compute import MOST_ERROR, relative_error
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.lean import Form, LeanScan, LeanVit
from voxelstem.backbones.scan_vit import ScanVit
from voxelstem.card import CONFIG, README
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.model import load

PARITY = "parity.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One network to be written, with what it is tried on."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, str]
    dynamic: tuple[dict[int, str], ...]
    """Names of the axes of each input that may have any length."""
    example: tuple[Tensor, ...]
    trial: tuple[Tensor, ...]
    """Of other lengths than the example, so that a length that was baked in shows."""
    wanted: tuple[Tensor, Tensor]
    """What the reference says of `trial`."""


Save = Callable[[Level, Path], str]
"""Write a level into a folder; gives the file's name."""
Run = Callable[[Path, Mapping[str, Tensor]], Sequence[Tensor]]
"""Read a written file and compute its outputs from named inputs."""


def export(folder: Path, out: Path, *, kind: str, save: Save, run: Run) -> Path:
    """Write every level of the weights in `folder` to the new folder `out`, whole or not at all.

    Beside them: `parity.json` (max|a - b| / max|b| of the written files, run on seeded inputs, against the fp32
    reference), and the weights' own config.json and README.md, for input contract and licence go wherever they go.

    Raises:
        CheckpointError: the weights cannot be read or have no such form, `out` exists or cannot be written, or a
            written file does not give the reference's numbers.
    """
    if out.exists():
        raise CheckpointError(f"{out.name} exists already", hint="choose another folder or remove this one")
    levels = levels_of(folder)
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        files: dict[str, Any] = {}
        for level in levels:
            name = save(level, unfinished)
            found = run(unfinished / name, dict(zip(level.inputs, level.trial, strict=True)))
            error = relative_error((found[0], found[1]), level.wanted)
            if error > MOST_ERROR["fp32"]:
                raise CheckpointError(
                    f"the {kind} file of the {level.name} level errs by {error:.1e}, more than "
                    f"{MOST_ERROR['fp32']:g}, so nothing was written",
                    hint="try other versions of the packages that pip install 'voxelstem[cpu]' brings",
                )
            files[name] = {"relative_error": error, "inputs": level.inputs, "outputs": level.outputs}
        facts = {
            "format": kind,
            "against": "voxelstem fp32",
            "measure": "max|a-b| / max|b| of each output, the largest",
            "files": files,
        }
        (unfinished / PARITY).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for name in (CONFIG, README):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, unfinished / name)
        _settle(unfinished)
        unfinished.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"'{out.name}' could not be written: {error.strerror}", hint="free some space and run again"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


@torch.inference_mode()
def levels_of(folder: Path) -> list[Level]:
    """The levels of the weights in `folder`.

    Raises:
        CheckpointError: no weights there, damaged ones, or a backbone that has no lean form.
    """
    backbone: Any = load(folder).backbone
    if not isinstance(backbone, ScanVit):
        raise CheckpointError(
            f"a {type(backbone).__name__} cannot be exported", hint="only backbones of scan_vit can, so far"
        )
    draw = torch.Generator().manual_seed(0)
    blocks = torch.rand(5, backbone.config.channels, *backbone.config.block_ijk, generator=draw)
    levels = [
        Level(
            name="blocks",
            module=LeanVit(backbone, Form(half_split=True)).eval(),
            inputs=("blocks",),
            outputs=("cls", "patches"),
            dynamic=({0: "row"},),
            example=(blocks[:2],),
            trial=(blocks[2:],),
            wanted=backbone.encode_blocks(blocks[2:]),
        )
    ]
    if backbone.has_scan_level:
        described = torch.randn(2, 12, 2 * backbone.dim, generator=draw)
        levels.append(
            Level(
                name="scan",
                module=LeanScan(backbone, Form(half_split=True)).eval(),
                inputs=("described", "positions"),
                outputs=("scan", "blocks"),
                dynamic=({0: "batch", 1: "n"}, {0: "n"}),
                example=(torch.randn(3, 8, 2 * backbone.dim, generator=draw), grid_positions((2, 2, 2))),
                trial=(described, grid_positions((3, 2, 2))),
                wanted=backbone.look_at_scan(described, (3, 2, 2)),
            )
        )
    return levels


def need(*packages: str) -> None:
    """Refuse in one sentence where a package of the `cpu` extra is absent.

    Raises:
        ConfigError: at least one is.
    """
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"this needs {', '.join(absent)}, which is not installed", hint="pip install 'voxelstem[cpu]'"
        )


def _settle(folder: Path) -> None:
    """Wait until everything in the folder is on the disk, so that its name is never there before its content."""
    for path in sorted([*folder.rglob("*"), folder]):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
