from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import ProjectorConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.backbones.text import TowerConfig
from voxelstem.card import Card, check_folder, write_weights
from voxelstem.config import flatten
from voxelstem.engine.handover import ABOUT, begin_from, differing, gather_training
from voxelstem.engine.optim import OptimConfig, make_optimizer
from voxelstem.engine.state import optimizer_state
from voxelstem.errors import CheckpointError
from voxelstem.model import load
from voxelstem.objectives.dino import Dino, DinoConfig
from voxelstem.objectives.mae import Mae, MaeConfig
from voxelstem.objectives.siglip import Siglip, SiglipConfig
from voxelstem.study import InputSpec
from voxelstem.weights.hub import export_hub

SIZE = EncoderConfig(dim=12, depth=1, heads=2)
NETWORK = ScanVitConfig(block_ijk=(8, 8, 8), block=SIZE, scan=replace(SIZE, depth=0))
PROJECTOR = ProjectorConfig(hidden=8, bottleneck=4, prototypes=6)


def network(seed: int, config: ScanVitConfig = NETWORK) -> ScanVit:
    torch.manual_seed(seed)
    return ScanVit(config)


def dino(seed: int, *, prototypes: int = 6, config: ScanVitConfig = NETWORK) -> Dino:
    settings = DinoConfig(projector=replace(PROJECTOR, prototypes=prototypes), koleo_weight=0.0)
    return Dino(settings, network(seed, config))


def mae(seed: int, config: ScanVitConfig = NETWORK) -> Mae:
    return Mae(MaeConfig(decoder=SIZE), network(seed, config))


def optimizer_of(objective: Any) -> torch.optim.AdamW:
    return make_optimizer(objective, objective.learner.param_groups(), OptimConfig(lr=1e-2, warm_up=0.0))


def trained(make: Any, objective: Any) -> torch.optim.AdamW:
    """Two steps, so that student, teacher, centres and moments all differ from their beginnings."""
    optimizer = optimizer_of(objective)
    for step in range(2):
        objective.step(make.batch(step), progress=0.5).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(progress=0.5)
    return optimizer


def written(folder: Path, objective: Any, optimizer: torch.optim.Optimizer | None) -> Path:
    config = objective.backbone.config
    card = Card(architecture=flatten(config), spec=InputSpec(block_ijk=config.block_ijk), trained=("block",))
    training = None if optimizer is None else gather_training(objective, optimizer, {"steps": 2})
    write_weights(
        folder,
        objective.backbone.state_dict(),
        card,
        extras=training.extras if training else None,
        texts=training.texts if training else None,
    )
    return folder


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.fixture
def given(make, tmp_path: Path) -> tuple[Dino, torch.optim.AdamW, Path]:
    objective = dino(0)
    optimizer = trained(make, objective)
    return objective, optimizer, written(tmp_path / "weights", objective, optimizer)


def test_the_same_objective_takes_everything_over(given):
    objective, _, weights = given
    other = dino(1)
    begun = begin_from(weights, other)
    assert (begun.taken, begun.reason, begun.left_out, begun.optimizer) == ("full", "", [], False)
    assert equal(objective, other)
    assert not equal(objective.student, objective.teacher.network)  # so all of it was truly put in its place


def test_the_optimisers_moments_come_along_when_asked_for(given):
    objective, optimizer, weights = given
    other = dino(1)
    its_optimizer = optimizer_of(other)
    assert begin_from(weights, other, optimizer=its_optimizer).optimizer
    before, now = optimizer_state(objective, optimizer), optimizer_state(other, its_optimizer)
    assert before.keys() == now.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_going_on_with_everything_equals_never_having_stopped(make, given):
    objective, optimizer, weights = given
    other = dino(1)
    its_optimizer = optimizer_of(other)
    begin_from(weights, other, optimizer=its_optimizer)
    for one, its in ((objective, optimizer), (other, its_optimizer)):
        one.step(make.batch(7), progress=0.5).loss.backward()
        its.step()
        one.after_step(progress=0.5)
    assert equal(objective, other)


def test_other_heads_leave_the_backbone_in_student_and_teacher_alike(given):
    objective, _, weights = given
    other = dino(1, prototypes=9)
    begun = begin_from(weights, other)
    assert begun.taken == "backbone"
    assert "other shapes" in begun.reason
    assert "cls_centre: 6 -> 9" in begun.reason
    assert equal(objective.backbone, other.learner)
    assert equal(objective.backbone, other.backbone)
    assert equal(other.student, other.teacher.network)
    assert {"student.cls_head", "teacher.network", "cls_centre"} <= set(begun.left_out)
    assert "student.backbone" not in begun.left_out


def test_another_objective_takes_the_backbone(given):
    objective, _, weights = given
    other = mae(1)
    begun = begin_from(weights, other)
    assert begun.taken == "backbone"
    assert begun.reason == "they were trained by dino, this is mae"
    assert equal(objective.backbone, other.backbone)
    assert any(name.startswith("decoder") for name in begun.left_out)
    assert not any(name.startswith("backbone") for name in begun.left_out)


class Words(nn.Module):
    """A text tower that keeps its own numbers out of every state, as those that do not learn."""

    dim = 5

    def __init__(self, sha256: str) -> None:
        super().__init__()
        self.sha256 = sha256


def siglip(seed: int, *, tower: str, source: str = "minilm") -> Siglip:
    settings = SiglipConfig(text=TowerConfig(source=source), hidden=8, bottleneck=4, out=4)
    return Siglip(settings, network(seed, replace(NETWORK, scan=SIZE)), make_tower=lambda _: Words(tower))


@pytest.mark.parametrize(("tower", "taken"), [("a" * 64, "full"), ("b" * 64, "backbone")])
def test_heads_are_taken_over_for_the_tower_that_they_learned_beside_and_for_no_other(
    tmp_path: Path, tower: str, taken: str
):
    source = siglip(0, tower="a" * 64)
    begun = begin_from(written(tmp_path / "w", source, optimizer_of(source)), other := siglip(1, tower=tower))
    assert begun.taken == taken
    assert equal(other.text_head, source.text_head) == (taken == "full")
    assert equal(other.backbone, source.backbone)


def test_what_lies_beside_the_weights_names_no_folder_of_a_user(tmp_path: Path):
    source = siglip(0, tower="a" * 64, source="/srv/qzxvornq/towers/qwen")
    folder = written(tmp_path / "w", source, optimizer_of(source))
    assert '"qwen"' in (folder / ABOUT).read_text()
    assert not [path for path in folder.rglob("*") if path.is_file() and b"qzxvornq" in path.read_bytes()]


def test_weights_from_elsewhere_have_no_training(make, tmp_path: Path):
    source = mae(0)
    begun = begin_from(written(tmp_path / "weights", source, None), other := dino(1))
    assert begun.taken == "backbone"
    assert begun.reason == "these weights came without their training"
    assert equal(source.backbone, other.learner)
    assert equal(other.student, other.teacher.network)


def test_a_scan_level_that_only_one_side_has_is_left_out_and_told(make, tmp_path: Path):
    deep = replace(NETWORK, scan=SIZE)
    with_level, without = mae(0, deep), mae(1)
    begun = begin_from(written(tmp_path / "deep", with_level, None), without)
    assert {"scan_encoder (of the weights)", "scan_project (of the weights)"} <= set(begun.left_out)
    other = mae(2, deep)
    before = other.backbone.scan_project.weight.clone()
    begun = begin_from(written(tmp_path / "flat", without, None), other)
    assert {"backbone.scan_encoder", "backbone.scan_project"} <= set(begun.left_out)
    assert torch.equal(before, other.backbone.scan_project.weight)
    assert equal(other.backbone.block_encoder, with_level.backbone.block_encoder)


def test_another_network_is_refused_with_every_difference(given):
    _, _, weights = given
    wide = replace(NETWORK, block=replace(SIZE, dim=24), scan=replace(SIZE, depth=0))
    other = dino(1, config=wide)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="another network") as caught:
        begin_from(weights, other)
    assert "block.dim: 12 -> 24" in caught.value.hint
    assert "mask_token: 12 -> 24" in caught.value.problem
    different = differing(network(0).state_dict(), network(0, wide).state_dict())
    assert all(line in caught.value.problem for line in different)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_differences_name_what_only_one_side_has():
    one, other = {"a": torch.zeros(2, 3), "b": torch.zeros(())}, {"a": torch.zeros(2, 3), "c": torch.zeros(4)}
    assert differing(one, other) == ["b: one number -> none", "c: none -> 4"]


def test_a_damaged_training_is_refused(given):
    _, _, weights = given
    path = weights / "training" / "objective.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from the card's sha256"):
        begin_from(weights, dino(1))


def test_the_training_is_part_of_the_product_and_leaves_the_weights_as_they_are(given, tmp_path: Path):
    objective, _, weights = given
    card = check_folder(weights)
    assert sorted(card.extras) == [
        "training/objective.safetensors",
        "training/optimizer.safetensors",
        "training/training.json",
    ]
    assert equal(load(weights).backbone, objective.backbone)
    export_hub(weights, tmp_path / "upload")
    assert begin_from(tmp_path / "upload", dino(1)).taken == "full"
