"""What every line of a table promises. A new plug-in is taken up here by itself."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelstem.backbones import BACKBONES
from voxelstem.backbones.disentangled import DisentangledConfig
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import ProjectorConfig
from voxelstem.backbones.i3resnet import I3ResNetConfig
from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.backbones.unet import UNetConfig
from voxelstem.config import flatten, overlay, read_toml, to_toml
from voxelstem.objectives import OBJECTIVES
from voxelstem.protocols import Backbone, Batch, Objective, Task
from voxelstem.recipes import RECIPES, named
from voxelstem.sources import MASKS, SOURCES
from voxelstem.tasks import TASKS
from voxelstem.testing import check_backbone, check_objective, make_batch

BLOCK = (8, 8, 8)
SMALL = {
    "scan_vit": ScanVitConfig(
        block_ijk=BLOCK,
        block=EncoderConfig(dim=24, depth=2, heads=2),
        scan=EncoderConfig(dim=24, depth=1, heads=2),
    ),
    "unet": UNetConfig(features=(4, 8), depths=(1, 1), strides=(1, 2), block_ijk=BLOCK),
    "disentangled": DisentangledConfig(width=4, levels=2, latent=6, block_ijk=BLOCK),
    "i3resnet": I3ResNetConfig(width=2, depths=(1, 2, 1, 1), block_ijk=(64, 32, 32)),
}
"""A size of each backbone at which a test takes milliseconds; a new backbone adds its own."""


def told_apart(network: Any, blocks: torch.Tensor) -> list[torch.Tensor]:
    """What else than an embedding `disentangled` makes of blocks."""
    latents = network.latents(blocks)
    painted = network.reconstruct(latents.subject_mean, latents.contrast_mean)
    return [painted, latents.subject_logvar, latents.contrast_logvar]


BEYOND = {
    "unet": lambda network, blocks: network.decode_levels(network.features(blocks)),
    "disentangled": told_apart,
}
"""What a backbone's other parameters are for."""

LEARNERS = {
    "anatomy": "unet",
    "disentangle": "disentangled",
    "longitudinal": "disentangled",
    "segmentation_prior": "unet",
}
"""Backbones of the objectives that need another one than `scan_vit`."""


def a_backbone(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BACKBONES[name](SMALL[name])


def an_objective(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return drawn_objective(name)


def drawn_objective(name: str) -> Any:
    """Draw a small objective of this name from torch's global generator."""
    kind = OBJECTIVES[name]
    config = kind.Config()
    changes: dict[str, Any] = {
        field.name: dataclasses.replace(getattr(config, field.name), prototypes=16)
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), ProjectorConfig)
    }
    small = {"columns": 3, "mask_block": 4, "latent": 6}
    changes |= {field.name: small[field.name] for field in dataclasses.fields(config) if field.name in small}
    backbone = LEARNERS.get(name, "scan_vit")
    size = SMALL[backbone]
    if hasattr(config, "classes"):
        size = dataclasses.replace(size, out_channels=len(config.classes))
    return kind(dataclasses.replace(config, **changes), BACKBONES[backbone](size))


def a_batch() -> Batch:
    return make_batch(BLOCK)


@pytest.mark.parametrize("name", list(BACKBONES))
class TestBackbone:
    def test_it_satisfies_the_protocol(self, name: str):
        assert isinstance(a_backbone(name), Backbone)

    def test_it_keeps_the_public_contract(self, name: str):
        check_backbone(lambda: BACKBONES[name](SMALL[name]), beyond=BEYOND.get(name))

    def test_it_gives_one_vector_a_block_and_one_a_patch(self, name: str):
        backbone = a_backbone(name)
        block_ijk = SMALL[name].block_ijk
        tokens = backbone.encode(torch.rand(2, 6, 1, *block_ijk), (1, 2, 3))
        patches = math.prod(size // patch for size, patch in zip(block_ijk, backbone.patch_ijk, strict=True))
        assert tokens.cls.shape == (2, 6, backbone.dim)
        assert tokens.patches.shape == (2, 6, patches, backbone.dim)

    def test_the_same_blocks_give_the_same_tokens(self, name: str):
        backbone, blocks = a_backbone(name).eval(), torch.rand(1, 2, 1, *SMALL[name].block_ijk)
        assert torch.equal(backbone.encode(blocks, (1, 1, 2)).cls, backbone.encode(blocks, (1, 1, 2)).cls)

    def test_every_parameter_stands_in_one_group_by_depth(self, name: str):
        backbone = a_backbone(name)
        groups = backbone.param_groups()
        grouped = [id(parameter) for _, members in groups for _, parameter in members]
        assert sorted(grouped) == sorted(id(parameter) for parameter in backbone.parameters())
        assert min(depth for depth, _ in groups) == 0

    def test_its_config_rebuilds_it(self, name: str):
        kind = BACKBONES[name]
        config = overlay(kind.Config(), flatten(SMALL[name]))
        assert config == SMALL[name]
        assert kind(config).load_state_dict(a_backbone(name).state_dict())


@pytest.mark.parametrize("name", list(OBJECTIVES))
class TestObjective:
    def test_it_satisfies_the_protocol(self, name: str):
        objective = an_objective(name)
        assert isinstance(objective, Objective)
        assert objective.config.name == name

    def test_it_keeps_the_public_contract(self, name: str):
        check_objective(lambda: drawn_objective(name))

    def test_a_step_gives_a_finite_loss_that_trains_its_learner(self, name: str):
        objective = an_objective(name)
        objective.step(a_batch(), progress=0.1).loss.backward()
        gradients = [parameter.grad for parameter in objective.learner.parameters() if parameter.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.abs().sum() > 0 for gradient in gradients)

    def test_the_same_seed_gives_the_same_loss_to_the_last_bit(self, name: str):
        first, second = (an_objective(name).step(a_batch(), progress=0.1).loss for _ in range(2))
        assert torch.equal(first, second)
        assert first.isfinite()

    def test_a_step_leaves_its_batch_alone(self, name: str):
        batch = a_batch()
        before = copy.deepcopy(batch.views)
        an_objective(name).step(batch, progress=0.1)
        assert all(torch.equal(before[kind], batch.views[kind]) for kind in before)

    def test_what_follows_a_step_leaves_the_learner_alone(self, name: str):
        objective = an_objective(name)
        before = copy.deepcopy(objective.learner.state_dict())
        objective.step(a_batch(), progress=0.5)
        objective.after_step(progress=0.5)
        assert all(torch.equal(tensor, before[key]) for key, tensor in objective.learner.state_dict().items())

    def test_the_backbone_that_is_kept_has_the_learner_s_architecture(self, name: str):
        objective = an_objective(name)
        assert objective.backbone.config == objective.learner.config
        assert objective.backbone.state_dict().keys() == objective.learner.state_dict().keys()


@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_satisfies_the_protocol_and_its_settings_replay(name: str):
    task = TASKS[name]()
    assert isinstance(task, Task)
    assert task.modes
    assert overlay(TASKS[name](), flatten(task)) == task
    assert all(callable(task.statistic(metric)) for metric in task.metrics)


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_is_complete_and_replays_from_its_file(name: str, tmp_path: Path):
    recipe = named(name)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert overlay(named(name), read_toml(path)) == recipe
    assert {"seed", "steps", "checkpoint.every"} <= flatten(recipe).keys()
    assert recipe.backbone.name in BACKBONES
    assert recipe.objective.name in OBJECTIVES


@pytest.mark.parametrize("name", list(SOURCES))
def test_a_source_reads_a_path_for_a_subject(name: str):
    path, subject, *rest = inspect.signature(SOURCES[name]).parameters.values()
    assert (path.name, subject.name) == ("path", "subject")
    assert all(one.default is not inspect.Parameter.empty for one in rest)


@pytest.mark.parametrize("name", list(MASKS))
def test_a_mask_reader_reads_a_path(name: str):
    assert list(inspect.signature(MASKS[name]).parameters) == ["path"]


@pytest.mark.parametrize("table", [BACKBONES, OBJECTIVES, TASKS, RECIPES, SOURCES, MASKS], ids=lambda table: table.kind)
def test_names_are_what_can_be_typed(table: Any):
    assert [name for name in table if not re.fullmatch(r"[a-z][a-z0-9_.]*", name)] == []
