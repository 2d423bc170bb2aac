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
        "tiny.dino": "voxelstem.recipes.tiny:dino",
    },
)


def named(name: str) -> PretrainConfig:
    """The recipe of this name.

    Raises:
        ConfigError: there is none; the hint says which was probably meant.
    """
    recipe: PretrainConfig = RECIPES[name]()
    return recipe
