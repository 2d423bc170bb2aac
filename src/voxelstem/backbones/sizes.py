"""The sizes in which SPECTRE's transformer comes (arXiv 2511.17209; shapes as in the package `spectre-fm` 0.2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.table import closest

FINE, COARSE = (16, 16, 8), (32, 32, 16)
"""Voxels of a patch."""
BLOCK_IJK = (128, 128, 64)
"""Voxels of a block, unless another size is asked for; any that the patch divides will do."""


def _size(
    dim: int, heads: int, *, depth: int = 12, scan_depth: int = 2, patch_ijk: tuple[int, int, int] = FINE
) -> ScanVitConfig:
    return ScanVitConfig(
        patch_ijk=patch_ijk,
        block_ijk=BLOCK_IJK,
        block=EncoderConfig(dim=dim, depth=depth, heads=heads, rope_base=1000.0),
        scan=EncoderConfig(dim=dim, depth=scan_depth, heads=heads, rope_base=100.0),
        inputs="unit",
    )


SIZES: Mapping[str, ScanVitConfig] = MappingProxyType(
    {
        "spectre-tiny": _size(192, 2),
        "spectre-small": _size(384, 4),
        "spectre-base": _size(768, 8),
        "spectre-base-patch32": _size(768, 8, patch_ijk=COARSE),
        "spectre-large": _size(1080, 12, depth=24, scan_depth=4),
        "spectre-large-patch32": _size(1080, 12, depth=24, scan_depth=4, patch_ijk=COARSE),
    }
)
"""Both levels of each size; weights exist for `spectre-large` only. `dataclasses.replace` gives the others."""


def sized(
    name: str, *, block_ijk: tuple[int, int, int] = BLOCK_IJK, scan_eps: float = 1e-5, scan_level: bool = True
) -> ScanVitConfig:
    """The named size for blocks of `block_ijk` voxels, with or without its scan level.

    `scan_eps` is LayerNorm's in the scan level: the package that released the weights computes with 1e-5, the
    authors' own training and evaluation scripts with 1e-6.

    Raises:
        ValueError: no such size, or a block that the patch does not divide.
    """
    if name not in SIZES:
        raise ValueError(f"there is no size '{name}'; {closest(name, list(SIZES))}")
    config = SIZES[name]
    scan = dataclasses.replace(config.scan, eps=scan_eps, depth=config.scan.depth if scan_level else 0)
    return dataclasses.replace(config, block_ijk=block_ijk, scan=scan)
