from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.weights.test_levels import CONFIG, write

from voxelstem.backbones.compute import relative_error
from voxelstem.backbones.layers import grid_positions
from voxelstem.errors import ConfigError
from voxelstem.weights.onnx import export_onnx
from voxelstem.weights.openvino import run


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"place_readout": 3, "atlas_cell": 1, "atlas_directions": (6, 5)}], ids=str)
def test_written_files_give_the_references_numbers_for_other_lengths(tmp_path: Path, more: dict[str, Any]) -> None:
    for package in ("onnx", "onnxscript", "openvino"):
        pytest.importorskip(package, reason="the cpu extra is not installed")
    backbone = write(tmp_path / "weights", dataclasses.replace(CONFIG, **more))
    out = export_onnx(tmp_path / "weights", tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert names == {"blocks.onnx", "scan.onnx", "config.json", "README.md", "parity.json"}
    parity = json.loads((out / "parity.json").read_text())
    assert all(entry["relative_error"] <= 1e-5 for entry in parity["files"].values())

    blocks = torch.rand(4, 1, 8, 8, 4)
    cls, patches = run(out / "blocks.onnx", {"blocks": blocks})
    assert relative_error((cls, patches), backbone.encode_blocks(blocks)) <= 1e-5
    described = torch.randn(1, 30, 360)
    scan, rows = run(out / "scan.onnx", {"described": described, "positions": grid_positions((5, 3, 2))})
    assert relative_error((scan, rows), backbone.look_at_scan(described, (5, 3, 2))) <= 1e-5


def test_without_the_extra_it_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="needs onnxscript") as caught:
        export_onnx(tmp_path / "nowhere", tmp_path / "out")
    assert "voxelstem[cpu]" in caught.value.hint
