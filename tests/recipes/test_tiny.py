from __future__ import annotations

import pytest

from voxelstem.pretrain import PretrainConfig, make_objective
from voxelstem.recipes import RECIPES, named

TINY = [name for name in RECIPES if name.startswith("tiny")]


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
    assert views.global_.max_scale <= views.region_scale


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_is_tiny(name: str):
    objective = make_objective(named(name))
    assert sum(parameter.numel() for parameter in objective.backbone.parameters()) < 8e6
    assert objective.trains_scan_level == objective.backbone.has_scan_level


def test_tiny_alone_means_its_base():
    assert named("tiny") == named("tiny.base")


@pytest.mark.parametrize("name", TINY)
def test_no_recipe_mirrors_left_and_right(name: str):
    assert named(name).views.augment.flip_axes == ()


def test_a_recipe_names_itself():
    for name in TINY:
        recipe: PretrainConfig = named(name)
        assert recipe.recipe in RECIPES
