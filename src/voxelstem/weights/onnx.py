"""Weights as ONNX: `blocks.onnx` and `scan.onnx`, for every runtime that reads it."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch

from voxelstem.weights.levels import Level, export, need
from voxelstem.weights.openvino import run

_ONE_FILE = 1 << 30
"""Bytes of weights above which they lie beside the graph, in `.onnx.data`: protobuf ends at 2 GiB."""


def export_onnx(folder: Path, out: Path) -> Path:
    """Write the weights in `folder` to the new folder `out`; see `levels` for the networks' inputs and outputs.

    The check that is written beside them is computed by OpenVINO, from the file.

    Raises:
        ConfigError: the `cpu` extra is not installed.
        CheckpointError: see `levels.export`.
    """
    need("onnx", "onnxscript", "openvino")
    return export(folder, out, kind="onnx", save=save, run=run)


def save(level: Level, folder: Path) -> str:
    """Write a network to a folder; gives the file's name."""
    axes = {name: torch.export.Dim(name) for free in level.dynamic for name in free.values()}
    shapes = tuple({axis: axes[name] for axis, name in free.items()} for free in level.dynamic)
    size = sum(tensor.nbytes for tensor in (*level.module.buffers(), *level.module.parameters()))
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter speaks of its own insides
        program: Any = torch.export.export(level.module, level.example, dynamic_shapes=shapes)
        torch.onnx.export(
            program,
            (),
            folder / f"{level.name}.onnx",
            input_names=level.inputs,
            output_names=level.outputs,
            dynamo=True,
            external_data=size > _ONE_FILE,
            verbose=False,
        )
    return f"{level.name}.onnx"
