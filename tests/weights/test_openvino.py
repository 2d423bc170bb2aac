from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest
import torch
from tests.weights.test_levels import write

from voxelstem.backbones.compute import relative_error
from voxelstem.backbones.layers import grid_positions
from voxelstem.weights.openvino import export_openvino, run

pytest.importorskip("openvino", reason="the cpu extra is not installed")


def test_written_files_give_the_references_numbers_for_other_lengths(tmp_path: Path) -> None:
    backbone = write(tmp_path / "weights")
    out = export_openvino(tmp_path / "weights", tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert names == {"blocks.xml", "blocks.bin", "scan.xml", "scan.bin", "config.json", "README.md", "parity.json"}
    parity = json.loads((out / "parity.json").read_text())
    assert all(entry["relative_error"] <= 1e-5 for entry in parity["files"].values())

    blocks = torch.rand(4, 1, 8, 8, 4)
    cls, patches = run(out / "blocks.xml", {"blocks": blocks})
    assert relative_error((cls, patches), backbone.encode_blocks(blocks)) <= 1e-5
    described = torch.randn(1, 30, 360)
    scan, rows = run(out / "scan.xml", {"described": described, "positions": grid_positions((5, 3, 2))})
    assert relative_error((scan, rows), backbone.look_at_scan(described, (5, 3, 2))) <= 1e-5


def test_nothing_is_told_to_anyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    senders = {thread.name for thread in threading.enumerate()}
    write(tmp_path / "weights")
    export_openvino(tmp_path / "weights", tmp_path / "out")
    assert {thread.name for thread in threading.enumerate()} <= senders
