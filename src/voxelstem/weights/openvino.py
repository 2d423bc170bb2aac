"""Weights for OpenVINO: `blocks.xml` and `scan.xml`, each with its `.bin`, to be read without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voxelstem.backbones.compute import openvino_network
from voxelstem.weights.levels import Level, export, need


def export_openvino(folder: Path, out: Path) -> Path:
    """Write the weights in `folder` to the new folder `out`; see `levels` for the networks' inputs and outputs.

    Raises:
        ConfigError: the `cpu` extra is not installed.
        CheckpointError: see `levels.export`.
    """
    need("openvino")
    return export(folder, out, kind="openvino", save=save, run=run)


def run(file: Path, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """Compute the outputs of a written `.xml` or `.onnx` in fp32."""
    import openvino

    compiled: Any = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(found[port].copy()) for port in compiled.outputs]


def save(level: Level, folder: Path) -> str:
    """Write a network to a folder, an .xml and its .bin; gives the name of the former."""
    import openvino

    network = openvino_network(level.module, *level.example)
    shapes: dict[Any, Any] = {}
    for port, name, example, free in zip(network.inputs, level.inputs, level.example, level.dynamic, strict=True):
        port.get_tensor().set_names({name})
        shapes[port] = [-1 if axis in free else size for axis, size in enumerate(example.shape)]
    for port, name in zip(network.outputs, level.outputs, strict=True):
        port.get_tensor().set_names({name})
    network.reshape(shapes)
    network.validate_nodes_and_infer_types()
    # Half of the bytes is not worth 1e-3 of error: fp32 stays what it is.
    openvino.save_model(network, folder / f"{level.name}.xml", compress_to_fp16=False)
    return f"{level.name}.xml"
