"""Recipes that train in minutes on two CPU cores: to see the machinery work, not to be used on patients."""

from __future__ import annotations

from dataclasses import replace

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.engine.checkpoint import CheckpointConfig
from voxelstem.engine.loader import LoaderConfig
from voxelstem.engine.optim import OptimConfig
from voxelstem.objectives.dino import DinoConfig
from voxelstem.objectives.jepa import JepaConfig
from voxelstem.objectives.mae import MaeConfig
from voxelstem.pretrain import PretrainConfig
from voxelstem.recipes import ct
from voxelstem.study import InputSpec
from voxelstem.views.crop import ViewKind
from voxelstem.views.multicrop import ViewsConfig

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


def jepa() -> PretrainConfig:
    """Features of hidden cuboids are predicted, not voxels: the block level alone."""
    start = base()
    return replace(
        start,
        recipe="tiny.jepa",
        backbone=replace(start.backbone, scan=replace(start.backbone.scan, depth=0)),
        objective=JepaConfig(predictor=EncoderConfig(dim=48, depth=2, heads=2)),
        views=ViewsConfig(global_=ViewKind(size_ijk=BLOCK, min_scale=0.85, max_scale=1.15), region_scale=1.2),
        loader=LoaderConfig(batch=8, repeat=True),
        optim=OptimConfig(lr=1e-3, weight_decay=0.04, betas=(0.9, 0.999)),
    )


def dino() -> PretrainConfig:
    """`ct.base` in miniature; no scan level.

    What is otherwise, for a few hundred steps of four samples: targets are centred by a running mean (eight rows are
    too few for Sinkhorn to share prototypes out among), the teacher follows quickly, the question about places weighs
    more and KoLeo less, and the layer that takes voxels in learns at full rate.
    """
    start = _shrunk(ct.base(), "tiny.dino")
    return replace(
        start,
        steps=300,
        backbone=replace(start.backbone, block=replace(start.backbone.block, registers=1, drop_path=0.0)),
        objective=replace(
            start.objective,
            centring="softmax",
            koleo_weight=0.05,
            position_weight=10.0,
            momentum_start=0.95,
            momentum_end=0.995,
        ),
        views=replace(
            start.views,
            global_=replace(start.views.global_, min_scale=0.8, max_scale=1.25),
            local=replace(start.views.local, count=2, min_scale=0.8, max_scale=1.25),
        ),
        loader=replace(start.loader, batch=4),
        optim=OptimConfig(lr=2e-3, weight_decay=0.04, betas=(0.9, 0.999), layer_decay=0.9),
    )


def spectre_stage1() -> PretrainConfig:
    """`ct.spectre_stage1` in miniature."""
    return _shrunk(ct.spectre_stage1(), "tiny.spectre_stage1")


def spectre_stage1_paper() -> PretrainConfig:
    """`ct.spectre_stage1_paper` in miniature; the rate is the one of the miniature's batch."""
    start = _shrunk(ct.spectre_stage1_paper(), "tiny.spectre_stage1_paper")
    return replace(start, optim=replace(start.optim, lr=3e-4))


def spectre_dinov1() -> PretrainConfig:
    """`ct.spectre_dinov1` in miniature."""
    return _shrunk(ct.spectre_dinov1(), "tiny.spectre_dinov1")


def spectre_mae() -> PretrainConfig:
    """`ct.spectre_mae` in miniature."""
    start = _shrunk(ct.spectre_mae(), "tiny.spectre_mae")
    return replace(start, objective=replace(start.objective, decoder=EncoderConfig(dim=48, depth=1, heads=2)))


def _shrunk(large: PretrainConfig, recipe: str) -> PretrainConfig:
    """A recipe for GPUs with everything that costs time made small, and what it does left as it is."""
    small, objective = base(), large.objective
    if isinstance(objective, DinoConfig):
        projector = replace(objective.projector, hidden=256, bottleneck=64, prototypes=512)
        objective = replace(objective, projector=projector)
    size = replace(large.backbone.block, dim=96, depth=4, heads=4)
    return replace(
        large,
        recipe=recipe,
        steps=small.steps,
        precision="auto",
        spec=small.spec,
        backbone=replace(
            large.backbone, patch_ijk=small.backbone.patch_ijk, block_ijk=BLOCK, block=size, scan=replace(size, depth=0)
        ),
        objective=objective,
        views=replace(
            large.views,
            global_=replace(large.views.global_, size_ijk=BLOCK),
            local=replace(large.views.local, size_ijk=(16, 16, 16)),
        ),
        loader=LoaderConfig(batch=6, repeat=True),
        checkpoint=small.checkpoint,
        health=small.health,
    )
