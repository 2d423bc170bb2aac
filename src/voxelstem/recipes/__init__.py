"""Complete configs as functions, named `module.function`; `tiny` alone means `tiny.base`."""

from __future__ import annotations

from voxelstem.pretrain import PretrainConfig
from voxelstem.table import Table

RECIPES = Table(
    "recipe",
    {
        "tiny": "voxelstem.recipes.tiny:base",
        "tiny.base": "voxelstem.recipes.tiny:base",
        "tiny.mae": "voxelstem.recipes.tiny:mae",
        "tiny.jepa": "voxelstem.recipes.tiny:jepa",
        "tiny.dino": "voxelstem.recipes.tiny:dino",
        "tiny.align": "voxelstem.recipes.align:tiny",
        "tiny.spectre_stage2": "voxelstem.recipes.align:tiny_spectre_stage2",
        "tiny.spectre_stage1": "voxelstem.recipes.tiny:spectre_stage1",
        "tiny.spectre_stage1_paper": "voxelstem.recipes.tiny:spectre_stage1_paper",
        "tiny.spectre_dinov1": "voxelstem.recipes.tiny:spectre_dinov1",
        "tiny.spectre_mae": "voxelstem.recipes.tiny:spectre_mae",
        "ct.align": "voxelstem.recipes.align:base",
        "ct.spectre_stage2": "voxelstem.recipes.align:spectre_stage2",
        "ct.base": "voxelstem.recipes.ct:base",
        "ct.small": "voxelstem.recipes.ct:small",
        "ct.spectre_stage1": "voxelstem.recipes.ct:spectre_stage1",
        "ct.spectre_stage1_paper": "voxelstem.recipes.ct:spectre_stage1_paper",
        "ct.spectre_dinov1": "voxelstem.recipes.ct:spectre_dinov1",
        "ct.spectre_mae": "voxelstem.recipes.ct:spectre_mae",
        "brain_mri.base": "voxelstem.recipes.brain_mri:base",
        "brain_mri.ssl3d": "voxelstem.recipes.brain_mri:ssl3d",
        "brain_mri.fomo25": "voxelstem.recipes.brain_mri:fomo25",
        "brain_mri.tiny": "voxelstem.recipes.brain_mri:tiny",
        "brain_mri.tiny_ssl3d": "voxelstem.recipes.brain_mri:tiny_ssl3d",
        "brain_mri.tiny_fomo25": "voxelstem.recipes.brain_mri:tiny_fomo25",
    },
)


def named(name: str) -> PretrainConfig:
    """The recipe of this name.

    Raises:
        ConfigError: there is none; the hint says which was probably meant.
    """
    recipe: PretrainConfig = RECIPES[name]()
    return recipe
