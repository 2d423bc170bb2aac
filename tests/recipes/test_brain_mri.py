from __future__ import annotations

from dataclasses import replace

import pytest

from voxelstem.objectives.anatomy import AnatomyConfig
from voxelstem.objectives.disentangle import DisentangleConfig
from voxelstem.recipes import brain_mri, named
from voxelstem.sources.brain_anatomy import INSIDE


def test_ssl3d_has_the_released_figures() -> None:
    recipe = brain_mri.ssl3d()
    objective, optim = recipe.objective, recipe.optim
    assert (objective.reconstruction_weight, objective.anatomy_weight, objective.pathology_weight) == (0.70, 0.15, 0.15)
    assert (objective.anatomy_channels, objective.pathology_channels) == (0.5, 0.3)
    assert (objective.mask_block, objective.mask_ratio, objective.fill) == (16, 0.75, "zero")
    assert recipe.backbone.features == (32, 64, 128, 256, 320, 320)
    assert (optim.kind, optim.lr, optim.momentum, optim.schedule) == ("sgd", 1e-2, 0.99, "poly")
    assert (optim.weight_decay, optim.clip_norm, recipe.steps, recipe.loader.batch) == (3e-5, 12.0, 250_000, 2)
    assert (recipe.spec.normalisation, recipe.spec.block_ijk) == ("zscore", (160, 160, 160))
    assert recipe.views.pair is not None
    assert not recipe.views.pair.paired


def test_fomo25_has_the_released_figures() -> None:
    recipe = brain_mri.fomo25()
    objective, optim = recipe.objective, recipe.optim
    weights = (objective.self_weight, objective.cross_weight, objective.kl_weight)
    assert (*weights, objective.subject_weight, objective.contrast_weight) == (3.0, 1.0, 0.001, 0.5, 0.5)
    assert (objective.swap, objective.repel_copies, objective.kl_warm_up) == ("released", True, 0.1)
    assert (objective.mask_block, objective.mask_ratio) == (4, 0.2)
    assert (recipe.backbone.width, recipe.backbone.levels, recipe.backbone.latent) == (32, 5, 256)
    assert (optim.kind, optim.lr, optim.warm_up, optim.clip_norm) == ("adamw", 1e-4, 0.05, 1.0)
    assert (recipe.spec.normalisation, recipe.spec.block_ijk, recipe.loader.batch) == ("unit99", (64, 64, 64), 4)


def test_what_is_released_turns_off_what_we_correct() -> None:
    """Defaults of the objectives are corrected; the released recipes say otherwise by name."""
    assert (DisentangleConfig().swap, DisentangleConfig().repel_copies) == ("true", False)
    assert (AnatomyConfig().anatomy_form, AnatomyConfig().unknown_pathology) == ("huber", "left_out")
    ssl3d = brain_mri.ssl3d().objective
    assert replace(ssl3d, anatomy_form="huber", unknown_pathology="left_out") == AnatomyConfig()
    assert brain_mri.tiny_ssl3d().objective.unknown_pathology == "left_out"
    assert replace(brain_mri.fomo25().objective, swap="true", repel_copies=False) == DisentangleConfig()


def test_ours_swaps_truly_drops_skips_and_counts_no_air() -> None:
    for recipe in (brain_mri.base(), brain_mri.tiny()):
        assert recipe.objective.swap == "true"
        assert recipe.backbone.skips == "dropped"
        assert recipe.objective.background == "ignored"
        assert recipe.spec.normalisation == "zscore"
        assert min(recipe.objective.masked_weight, recipe.objective.anatomy_weight, recipe.objective.nt_xent_weight) > 0


@pytest.mark.parametrize("name", ["tiny", "tiny_ssl3d", "tiny_fomo25"])
def test_miniatures_see_whole_phantom_heads(name: str) -> None:
    recipe = named(f"brain_mri.{name}")
    assert recipe.spec.modality == "MR"
    # 160 mm along each axis.
    assert [edge * mm for edge, mm in zip(recipe.spec.block_ijk, recipe.spec.spacing_mm, strict=True)] == [160.0] * 3
    if getattr(recipe.objective, "anatomy_weight", 0):
        assert recipe.objective.columns == len(INSIDE)
