from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from voxelstem.backbones.compute import relative_error
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.card import Card, write_weights
from voxelstem.config import flatten
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.study import InputSpec
from voxelstem.weights.levels import Level, export, levels_of, need

CONFIG = ScanVitConfig(
    patch_ijk=(4, 4, 2),
    block_ijk=(8, 8, 4),
    block=EncoderConfig(dim=180, depth=1, heads=2),
    scan=EncoderConfig(dim=96, depth=1, heads=1, rope_base=100.0),
    inputs="unit",
)


def write(folder: Path, config: ScanVitConfig = CONFIG) -> ScanVit:
    torch.manual_seed(0)
    backbone = ScanVit(config).eval().requires_grad_(False)
    backbone.measure([torch.rand(20, 1, *config.block_ijk)])
    card = Card(architecture=flatten(config), spec=InputSpec(block_ijk=CONFIG.block_ijk), licence="CC BY-NC-SA 4.0")
    write_weights(folder, backbone.state_dict(), card)
    return backbone


def test_both_levels_are_the_lean_form_of_the_weights(tmp_path: Path) -> None:
    write(tmp_path / "weights")
    levels = levels_of(tmp_path / "weights")
    assert [level.name for level in levels] == ["blocks", "scan"]
    for level in levels:
        assert relative_error(level.module(*level.trial), level.wanted) <= 2e-6


def test_weights_without_scan_level_have_one(tmp_path: Path) -> None:
    alone = dataclasses.replace(CONFIG, scan=dataclasses.replace(CONFIG.scan, depth=0))
    write(tmp_path / "weights", alone)
    assert [level.name for level in levels_of(tmp_path / "weights")] == ["blocks"]


def save(level: Level, folder: Path) -> str:
    (folder / level.name).write_text("a network")
    return level.name


def test_a_wrong_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "weights")
    out = tmp_path / "exported"
    with pytest.raises(CheckpointError, match="errs by"):
        export(
            tmp_path / "weights",
            out,
            kind="test",
            save=save,
            run=lambda _file, _inputs: (torch.zeros(3, 180), torch.zeros(3, 8, 180)),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "exported").mkdir()
    with pytest.raises(CheckpointError, match="exported exists already"):
        export(tmp_path / "weights", tmp_path / "exported", kind="test", save=save, run=lambda _file, _inputs: ())


def test_card_licence_and_parity_go_along(tmp_path: Path) -> None:
    write(tmp_path / "weights")
    wanted = {level.name: level.wanted for level in levels_of(tmp_path / "weights")}
    out = export(
        tmp_path / "weights", tmp_path / "exported", kind="test", save=save, run=lambda file, _: wanted[file.name]
    )
    assert {path.name for path in out.iterdir()} == {"blocks", "scan", "config.json", "README.md", "parity.json"}
    assert "CC BY-NC-SA 4.0" in (out / "README.md").read_text()
    parity = json.loads((out / "parity.json").read_text())
    assert {name: entry["relative_error"] for name, entry in parity["files"].items()} == {"blocks": 0, "scan": 0}
    assert parity["files"]["scan"]["inputs"] == ["described", "positions"]


def test_an_absent_package_is_named_with_its_extra() -> None:
    with pytest.raises(ConfigError, match="needs surely_absent") as caught:
        need("json", "surely_absent")
    assert "voxelstem[cpu]" in caught.value.hint
