from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from voxelstem.config import overlay
from voxelstem.engine.optim import make_optimizer, set_rate
from voxelstem.engine.scans import trainable
from voxelstem.pretrain import PretrainConfig, make_loader, make_objective
from voxelstem.recipes import RECIPES, named
from voxelstem.store import Store

WITH_REPORTS = {"tiny.align", "tiny.spectre_stage2"}
TINY = [name for name in RECIPES if name.startswith("tiny") and name not in WITH_REPORTS]


@pytest.mark.parametrize("name", TINY)
def test_a_view_fills_the_blocks_that_the_objective_cuts_it_into(name: str):
    recipe = named(name)
    grid = getattr(recipe.objective, "grid", (1, 1, 1))
    wanted = tuple(cells * edge for cells, edge in zip(grid, recipe.spec.block_ijk, strict=True))
    assert recipe.views.global_.size_ijk == wanted
    if recipe.views.local.count:
        assert all(
            edge % patch == 0
            for edge, patch in zip(recipe.views.local.size_ijk, recipe.backbone.patch_ijk, strict=True)
        )


@pytest.mark.parametrize("name", TINY)
def test_views_of_one_sample_fit_into_their_region(name: str):
    views = named(name).views
    assert views.global_.scales[1].max() <= views.region_scale


@pytest.mark.parametrize("name", [name for name in TINY if name != "tiny"])
def test_every_recipe_takes_two_steps(name: str, phantoms: Store):
    config = overlay(named(name), {"loader.batch": 2})
    objective = make_objective(config)
    optimizer = make_optimizer(objective, objective.learner.param_groups(), config.optim)
    before = {name: value.clone() for name, value in objective.learner.named_parameters()}
    loader = make_loader(config, phantoms, trainable(phantoms, config.spec))
    for step in range(2):
        progress = (step + 1) / 10
        set_rate(optimizer, config.optim, progress=progress, batch=config.loader.batch)
        output = objective.step(loader.batch(step), progress=progress)
        assert torch.isfinite(output.loss)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(progress=progress)
    trained = objective.learner.named_parameters()
    assert any(not torch.equal(before[name], value) for name, value in trained)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_is_tiny(name: str):
    objective = make_objective(named(name))
    assert sum(parameter.numel() for parameter in objective.backbone.parameters()) < 8e6
    assert objective.trains_scan_level == objective.backbone.has_scan_level


def test_tiny_alone_means_its_base():
    assert named("tiny") == named("tiny.base")


@pytest.mark.parametrize("name", ["tiny.base", "tiny.mae", "tiny.jepa", "tiny.dino"])
def test_our_own_recipes_mirror_nothing(name: str):
    assert named(name).views.augment.flip_axes == ()


PAIRS = ["spectre_stage1", "spectre_stage1_paper", "spectre_dinov1"]


@pytest.mark.parametrize("name", [*PAIRS, "dino"])
def test_a_miniature_does_what_the_large_one_does(name: str):
    tiny, large = named(f"tiny.{name}"), named("ct.base" if name == "dino" else f"ct.{name}")
    short = {"centring", "koleo_weight", "position_weight", "momentum_start", "momentum_end"} if name == "dino" else {}
    same = {setting: getattr(large.objective, setting) for setting in short}
    assert replace(tiny.objective, projector=large.objective.projector, **same) == large.objective
    assert tiny.views.augment == large.views.augment
    if name in PAIRS:
        assert replace(tiny.optim, lr=large.optim.lr) == large.optim
        assert replace(tiny.views.local, size_ijk=large.views.local.size_ijk) == large.views.local


def test_a_recipe_names_itself():
    for name in TINY:
        recipe: PretrainConfig = named(name)
        assert recipe.recipe in RECIPES
