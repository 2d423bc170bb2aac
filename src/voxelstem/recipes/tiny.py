"""Recipes that train in minutes on two CPU cores: to see the machinery work, not to be used on patients."""

from __future__ import annotations

from dataclasses import replace

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import ProjectorConfig
from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.engine.checkpoint import CheckpointConfig
from voxelstem.engine.loader import LoaderConfig, ViewsConfig
from voxelstem.engine.optim import OptimConfig
from voxelstem.objectives.dino import DinoConfig
from voxelstem.objectives.mae import MaeConfig
from voxelstem.pretrain import PretrainConfig
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind


def mae() -> PretrainConfig:
    """Both levels by MAE on 2 x 2 x 2 blocks."""
    block = (24, 24, 24)
    return PretrainConfig(
        recipe="tiny.mae",
        steps=700,
        spec=InputSpec(spacing_mm=(4.0, 4.0, 4.0), low_hu=-200.0, high_hu=300.0, block_ijk=block),
        backbone=ScanVitConfig(
            patch_ijk=(4, 4, 4),
            block_ijk=block,
            block=EncoderConfig(dim=192, depth=6, heads=4),
            scan=EncoderConfig(dim=192, depth=2, heads=4, rope_base=100.0),
        ),
        objective=MaeConfig(grid=(2, 2, 2)),
        views=ViewsConfig(global_=ViewKind(size_ijk=(48, 48, 48), min_scale=0.85, max_scale=1.15)),
        loader=LoaderConfig(batch=4),
        optim=OptimConfig(lr=1e-3),
        checkpoint=CheckpointConfig(every=250),
    )


def dino() -> PretrainConfig:
    """The block level by DINO with iBOT and KoLeo; no scan level."""
    base = mae()
    block = base.spec.block_ijk
    return replace(
        base,
        recipe="tiny.dino",
        backbone=replace(base.backbone, scan=replace(base.backbone.scan, depth=0)),
        objective=DinoConfig(projector=ProjectorConfig(prototypes=512)),
        views=ViewsConfig(
            global_=ViewKind(count=2, size_ijk=block, min_scale=0.8, max_scale=1.25),
            local=ViewKind(count=4, size_ijk=(12, 12, 12), min_scale=0.8, max_scale=1.25),
            augment=AugmentConfig(noise_std=0.05, gamma=0.1, shift=0.1),
            region_scale=1.5,
        ),
        loader=LoaderConfig(batch=12),
        optim=OptimConfig(lr=1e-3, weight_decay=0.04, betas=(0.9, 0.999), layer_decay=0.9),
    )


def base() -> PretrainConfig:
    """What `tiny` alone means: the recipe that was measured best, see LOG.md."""
    return replace(mae(), recipe="tiny.base")
