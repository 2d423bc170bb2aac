"""Networks as modules that leave: what the ONNX and the OpenVINO export have in common, of weights and of runs.

Of a weights folder, two levels: `blocks`: blocks (row, channel, i, j, k), fed as the InputSpec says -> cls (row, dim),
patches (row, patch, dim). `scan`, where it is there: described (batch, n, 2 dim), positions (n, 3) -> scan (batch,
scan_dim), blocks (batch, n, scan_dim); `described` is concat(cls, mean of patches), `positions` the blocks' centres in
(-1, 1).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxelstem.backbones.compute import MOST_ERROR
from voxelstem.backbones.convolution import EPS, InstanceNorm, as_tokens
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.lean import Form, LeanScan, LeanVit
from voxelstem.backbones.scan_vit import ScanVit
from voxelstem.backbones.unet import UNet
from voxelstem.card import CONFIG, README
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.model import load
from voxelstem.study import InputSpec

PARITY = "parity.json"
OF_NORMS = 1e-4
"""Most error of a network with instance norms: over the few cells of a bottleneck they make rounding ten times larger
(6e-5 between two builds of ResEnc-L, see `benchmarks/nnunet.py`)."""
_LARGE = 64**3
"""Voxels of a crop above which one is tried, and not three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One network to be written, with what it is tried on."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: tuple[dict[int, str], ...]
    """Names of the axes of each input that may have any length."""
    example: tuple[Tensor, ...]
    trial: tuple[Tensor, ...]
    """Of other lengths than the example, so that a length that was baked in shows."""
    wanted: tuple[Tensor, ...]
    """What the reference says of `trial`."""
    most: float = MOST_ERROR["fp32"]
    """Largest error that is let out."""
    answer: tuple[int, int] | None = None
    """Which output, and which axis of it, has the largest entry where the answer is; None where it gives none."""


Save = Callable[[Level, Path], str]
"""Write a level into a folder; gives the file's name."""
Run = Callable[[Path, Mapping[str, Tensor]], Sequence[Tensor]]
"""Read a written file and compute its outputs from named inputs."""


def export(folder: Path, out: Path, *, kind: str, save: Save, run: Run) -> Path:
    """Write every level of the weights in `folder` to the new folder `out`; see `write`.

    Beside them the weights' own config.json and README.md, for input contract and licence go wherever they go.

    Raises:
        CheckpointError: the weights cannot be read or have no such form, or as `write`.
    """
    check_new(out)
    beside = {name: folder / name for name in (CONFIG, README) if (folder / name).is_file()}
    return write(levels_of(folder), out, beside=beside, kind=kind, save=save, run=run)


def write(levels: Sequence[Level], out: Path, *, beside: Mapping[str, Path], kind: str, save: Save, run: Run) -> Path:
    """Write networks to the new folder `out`, whole or not at all, with the files `beside` them under their names.

    parity.json says how far the written files, run on seeded inputs, are from the fp32 reference (max|a - b| /
    max|b|), and how many answers changed.

    Raises:
        CheckpointError: `out` exists or cannot be written, or a written file does not give the reference's numbers and
            answers.
    """
    check_new(out)
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        files: dict[str, Any] = {}
        for level in levels:
            name = save(level, unfinished)
            found = run(unfinished / name, dict(zip(level.inputs, level.trial, strict=True)))
            files[name] = _compared(level, found, kind) | {"inputs": level.inputs, "outputs": level.outputs}
        facts = {
            "format": kind,
            "against": "voxelstem fp32",
            "measure": "max|a-b| / max|b| of each output, the largest",
            "files": files,
        }
        (unfinished / PARITY).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for name, path in beside.items():
            shutil.copyfile(path, unfinished / name)
        _settle(unfinished)
        unfinished.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"'{out.name}' could not be written: {error.strerror}", hint="free some space and run again"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def check_new(out: Path) -> None:
    """See that nothing is there yet.

    Raises:
        CheckpointError: something is.
    """
    if out.exists():
        raise CheckpointError(f"{out.name} exists already", hint="choose another folder or remove this one")


def _compared(level: Level, found: Sequence[Tensor], kind: str) -> dict[str, Any]:
    """Error and changed answers of a written file.

    Raises:
        CheckpointError: more than the level allows.
    """
    error = max(_apart(one, other) for one, other in zip(found, level.wanted, strict=True))
    hint = "try other versions of the packages that pip install 'voxelstem[cpu]' brings"
    if error > level.most:
        raise CheckpointError(
            f"the {kind} file of the {level.name} level errs by {error:.1e}, more than {level.most:g}, so nothing was "
            "written",
            hint=hint,
        )
    if level.answer is None:
        return {"relative_error": error, "most": level.most}
    output, axis = level.answer
    changed = _changed(found[output], level.wanted[output], axis, level.most)
    if changed:
        raise CheckpointError(
            f"the {kind} file of the {level.name} level changes {changed} answers, so nothing was written", hint=hint
        )
    return {"relative_error": error, "most": level.most, "changed_answers": changed}


def _apart(found: Tensor, wanted: Tensor) -> float:
    """max|a - b| / max|b|; infinite where something is not a number, or shapes differ."""
    if found.shape != wanted.shape:
        return math.inf
    largest, error = float(wanted.abs().max()), float((found.float() - wanted.float()).abs().max())
    # A comparison with what is not a number is never true.
    return error / largest if largest and math.isfinite(largest) and math.isfinite(error) else math.inf


def _changed(found: Tensor, wanted: Tensor, axis: int, most: float) -> int:
    """How many answers another entry wins, those left out in which the reference's best two are as good as equal."""
    best = wanted.topk(2, dim=axis).values
    clear = (best.select(axis, 0) - best.select(axis, 1)) > most * wanted.abs().max()
    return int(((found.argmax(dim=axis) != wanted.argmax(dim=axis)) & clear).sum())


@torch.inference_mode()
def levels_of(folder: Path) -> list[Level]:
    """The levels of the weights in `folder`.

    Raises:
        CheckpointError: no weights there, damaged ones, or a backbone that has no lean form.
    """
    model = load(folder)
    backbone: Any = model.backbone
    blocks_level = Blocks(backbone).eval()
    rows = rows_to_try(backbone.config.block_ijk)
    blocks = drawn(2 + rows, backbone.config.channels, model.spec, backbone.config.block_ijk)
    levels = [
        Level(
            name="blocks",
            module=blocks_level,
            inputs=("blocks",),
            outputs=("cls", "patches"),
            dynamic=({0: "row"},),
            example=(blocks[:2],),
            trial=(blocks[2:],),
            wanted=backbone.encode_blocks(blocks[2:]),
            most=most_of(backbone),
        )
    ]
    if backbone.has_scan_level:
        draw = torch.Generator().manual_seed(1)
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


class Blocks(nn.Module):
    """The first level of a backbone in a form that can leave, with as much of its interface as a tuned network asks."""

    def __init__(self, backbone: Any) -> None:
        """Take over the tensors, or copies of them.

        Raises:
            CheckpointError: a backbone that has no such form.
        """
        super().__init__()
        self.dim, self.patch_ijk = backbone.dim, backbone.patch_ijk
        self.kind: Literal["vit", "unet"]
        if isinstance(backbone, ScanVit):
            self.kind, self.network = "vit", LeanVit(backbone, Form(half_split=True))
        elif isinstance(backbone, UNet):
            self.kind, self.network = "unet", _with_plain_norms(copy.deepcopy(backbone))
        else:
            raise CheckpointError(
                f"a {type(backbone).__name__} cannot be exported",
                hint="only backbones of scan_vit and unet can, so far",
            )

    def forward(
        self, blocks: Float[Tensor, "row channel i j k"]
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """Cls and patch tokens of each block."""
        if self.kind == "vit":
            return self.network(blocks)
        network: Any = self.network
        return as_tokens(network.encoder(blocks), keep=None)

    def encode_blocks(
        self, blocks: Float[Tensor, "row channel i j k"]
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """The same, by the name that backbones have for it."""
        return self(blocks)

    def features(self, blocks: Float[Tensor, "row channel i j k"]) -> list[Tensor]:
        """Of a U-Net: the maps of all stages."""
        network: Any = self.network
        return network.features(blocks)

    def decode(self, features: list[Tensor]) -> Float[Tensor, "row out i j k"]:
        """Of a U-Net: what its finest head paints."""
        network: Any = self.network
        return network.decode(features)


class _PlainNorm(nn.Module):
    """An `InstanceNorm` by the one operation that every format knows."""

    def __init__(self, norm: InstanceNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row channel i j k"]:
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, EPS, False)


def _with_plain_norms(network: nn.Module) -> nn.Module:
    for name, part in network.named_children():
        if isinstance(part, InstanceNorm):
            setattr(network, name, _PlainNorm(part))
        else:
            _with_plain_norms(part)
    return network


def drawn(
    rows: int, channels: int, spec: InputSpec, block_ijk: tuple[int, int, int]
) -> Float[Tensor, "row channel i j k"]:
    """Seeded blocks in the range of what scans become: normal for z-scores, else evenly within [0, 1]."""
    draw, shape = torch.Generator().manual_seed(0), (rows, channels, *block_ijk)
    return torch.randn(shape, generator=draw) if spec.normalisation == "zscore" else torch.rand(shape, generator=draw)


def most_of(backbone: nn.Module) -> float:
    """Largest error that a written network of this backbone may have."""
    return OF_NORMS if any(isinstance(part, InstanceNorm) for part in backbone.modules()) else MOST_ERROR["fp32"]


def rows_to_try(block_ijk: tuple[int, int, int]) -> int:
    """How many crops a network is tried on."""
    return 3 if math.prod(block_ijk) <= _LARGE else 1


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
