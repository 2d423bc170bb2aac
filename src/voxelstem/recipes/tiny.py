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

BLOCK = (32, 32, 32)


def base() -> PretrainConfig:
    """What `tiny` alone means, measured best so far (see LOG.md): MAE that also asks every token where it is."""
    return PretrainConfig(
        recipe="tiny.base",
        steps=500,
        spec=InputSpec(spacing_mm=(4.0, 4.0, 4.0), low_hu=-1000.0, high_hu=300.0, block_ijk=BLOCK),
        backbone=ScanVitConfig(
            patch_ijk=(4, 4, 4),
            block_ijk=BLOCK,
            block=EncoderConfig(dim=96, depth=4, heads=4),
            scan=EncoderConfig(dim=96, depth=2, heads=4, rope_base=100.0),
        ),
        objective=MaeConfig(
            grid=(2, 2, 2),
            keep=0.25,
            decode=0.125,
            normalise_targets=False,
            position_weight=1.0,
            decoder=EncoderConfig(dim=48, depth=1, heads=2),
        ),
        views=ViewsConfig(global_=ViewKind(size_ijk=(64, 64, 64), min_scale=0.85, max_scale=1.15), region_scale=1.2),
        loader=LoaderConfig(batch=2),
        optim=OptimConfig(lr=2e-3),
        checkpoint=CheckpointConfig(every=250),
    )


def mae() -> PretrainConfig:
    """MAE as published: normalised targets and no question about places."""
    start = base()
    objective = replace(start.objective, normalise_targets=True, position_weight=0.0)
    return replace(start, recipe="tiny.mae", objective=objective)


def dino() -> PretrainConfig:
    """The block level by DINO with iBOT and KoLeo; no scan level."""
    start = base()
    return replace(
        start,
        recipe="tiny.dino",
        backbone=replace(start.backbone, scan=replace(start.backbone.scan, depth=0)),
        objective=DinoConfig(projector=ProjectorConfig(prototypes=512)),
        views=ViewsConfig(
            global_=ViewKind(count=2, size_ijk=BLOCK, min_scale=0.8, max_scale=1.25),
            local=ViewKind(count=4, size_ijk=(16, 16, 16), min_scale=0.8, max_scale=1.25),
            augment=AugmentConfig(noise_std=0.05, gamma=0.1, shift=0.1),
            region_scale=1.5,
        ),
        loader=LoaderConfig(batch=6),
        optim=OptimConfig(lr=1e-3, weight_decay=0.04, betas=(0.9, 0.999), layer_decay=0.9),
    )
