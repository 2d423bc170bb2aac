from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from voxelstem.backbones.compute import relative_error
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.card import Card, write_weights
from voxelstem.config import flatten
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.study import InputSpec
from voxelstem.weights import levels as levels_module
from voxelstem.weights.levels import OF_NORMS, Blocks, Level, export, levels_of, most_of, need

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


UNET = UNetConfig(features=(4, 8), depths=(1, 1), strides=(1, 2), block_ijk=(8, 8, 8))


def test_a_u_net_s_encoder_leaves_as_its_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = UNet(UNET).eval().requires_grad_(False)
    card = Card(architecture=flatten(UNET), spec=InputSpec(block_ijk=UNET.block_ijk))
    write_weights(tmp_path / "weights", backbone.state_dict(), card)
    (level,) = levels_of(tmp_path / "weights")
    assert level.most == most_of(backbone) == OF_NORMS
    for found, wanted in zip(level.module(*level.trial), backbone.encode_blocks(*level.trial), strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_backbone_without_such_a_form_is_refused() -> None:
    other = torch.nn.Linear(1, 1)
    other.dim, other.patch_ijk = 1, (1, 1, 1)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    with pytest.raises(CheckpointError, match="a Linear cannot be exported"):
        Blocks(other)


def answering(wanted: torch.Tensor) -> Level:
    """A level of which the answer is the larger of two numbers in each row."""
    nothing = torch.zeros(len(wanted), 1)
    return Level(
        name="head",
        module=torch.nn.Identity(),
        inputs=("scan",),
        outputs=("logits",),
        dynamic=({0: "row"},),
        example=(nothing,),
        trial=(nothing,),
        wanted=(wanted,),
        most=0.1,
        answer=(0, 1),
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([[1.0, 0.0], [0.5, 0.45]], ""),
        ([[1.0, 0.0], [0.45, 0.5]], ""),  # as good as equal in the reference: 0.05 apart where 0.1 may be wrong
        ([[1.0, 0.0], [0.7, 0.45]], "errs by"),
        ([[float("nan"), 0.0], [0.5, 0.45]], "errs by inf"),
        ([[1.0], [0.5]], "errs by inf"),
    ],
)
def test_errors_and_changed_answers_are_counted(tmp_path: Path, found: list[list[float]], said: str) -> None:
    level = answering(torch.tensor([[1.0, 0.0], [0.5, 0.45]]))

    def go() -> Path:
        run = lambda _file, _inputs: [torch.tensor(found)]  # noqa: E731
        return levels_module.write([level], tmp_path / "out", beside={}, kind="test", save=save, run=run)

    if said:
        with pytest.raises(CheckpointError, match=said):
            go()
        assert not (tmp_path / "out").exists()
        return
    (entry,) = json.loads((go() / "parity.json").read_text())["files"].values()
    assert entry["changed_answers"] == 0


def test_a_changed_answer_is_refused_though_the_numbers_are_near(tmp_path: Path) -> None:
    level = answering(torch.tensor([[1.0, 0.0], [0.5, 0.35]]))
    with pytest.raises(CheckpointError, match="changes 1 answers"):
        levels_module.write(
            [level],
            tmp_path / "out",
            beside={},
            kind="test",
            save=save,
            run=lambda _file, _inputs: [torch.tensor([[1.0, 0.0], [0.41, 0.44]])],
        )
    assert not (tmp_path / "out").exists()


def test_an_absent_package_is_named_with_its_extra() -> None:
    with pytest.raises(ConfigError, match="needs surely_absent") as caught:
        need("json", "surely_absent")
    assert "voxelstem[cpu]" in caught.value.hint
