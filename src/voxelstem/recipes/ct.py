"""Recipes for CT, for GPUs: SPECTRE's stage 1 as released and as published, and our own.

Where a figure of SPECTRE's comes from: its released script and settings (R), its paper's table of hyper-parameters (P,
arXiv 2511.17209). They disagree; `docs/reference/recipes.md` lists where.
"""

from __future__ import annotations

from dataclasses import replace

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.heads import ProjectorConfig
from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.engine.checkpoint import CheckpointConfig
from voxelstem.engine.loader import LoaderConfig
from voxelstem.engine.monitor import HealthConfig
from voxelstem.engine.optim import OptimConfig
from voxelstem.objectives.dino import DinoConfig
from voxelstem.objectives.mae import MaeConfig
from voxelstem.pretrain import PretrainConfig
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind
from voxelstem.views.multicrop import ViewsConfig

BLOCK = (128, 128, 64)
PATCH = (16, 16, 8)
LARGE = EncoderConfig(dim=1080, depth=24, heads=12, eps=1e-5, layer_scale=1e-3, drop_path=0.3, rope_rescale=2.0)
"""SPECTRE's backbone in training (R): 338.5 M parameters, heads of 90."""
STEPS = 83_100
"""P: 150 epochs of 554 steps of 1,536 samples. The script's 100 epochs in steps of 1,024 are as many."""


def _spectre_backbone() -> ScanVitConfig:
    """The block level alone, voxels as they are windowed; the scan level is SPECTRE's stage 2."""
    return ScanVitConfig(
        patch_ijk=PATCH,
        block_ijk=BLOCK,
        block=LARGE,
        scan=replace(LARGE, depth=0, rope_base=100.0),
        inputs="unit",
    )


def _spectre_changes() -> AugmentConfig:
    """R: a view is sharpened or smoothed (0.25 of the half that OneOf leaves each), bent, made noisy, rescaled."""
    first, second = ((1.5, 2.5), (1.5, 2.5), (0.75, 1.25)), ((0.5, 1.0), (0.5, 1.0), (0.25, 0.5))
    return AugmentConfig(
        flip_axes=(0, 1, 2),
        smooth_p=0.125,
        sharpen_p=0.125,
        blur_sigma=first,
        sharpen_sigma=second,
        edge="air",
        gamma=0.1,
        gamma_p=0.25,
        noise_std=0.1,
        noise_p=0.25,
        shift=(0.0, 0.4),
        shift_p=0.25,
        clip=False,
    )


def _spectre_views() -> ViewsConfig:
    """R: 2 views of 64 to 128 mm and 8 of 24 to 64 mm, out of a box of 128 mm in the middle 256 x 256 x 384 mm."""
    return ViewsConfig(
        global_=ViewKind(count=2, size_ijk=BLOCK, min_scale=1.0, max_scale=2.0, spread="uniform"),
        local=ViewKind(count=8, size_ijk=(48, 48, 24), min_scale=1.0, max_scale=8 / 3, spread="uniform"),
        augment=_spectre_changes(),
        region_scale=2.0,
        overhang=0.0,
        central_mm=(256.0, 256.0, 384.0),
        windowed="first",
    )


def spectre_stage1() -> PretrainConfig:
    """SPECTRE's stage 1 as its released DINOv2/v3 script does it, quirks included (R).

    - The teacher is centred by a running mean (0.9), not by Sinkhorn and Knopp.
    - KoLeo acts on the logits of the local views, not on cls embeddings.
    - Half of the global views are masked, by 20 to 70 %; heads for cls and patches are separate.
    - No register tokens; layer scale 1e-3, drop path up to 0.3, positions rescaled by up to 2.
    - lr times sqrt(batch / 1024), 0.9 a layer, 0.2 for the patch embedding; tokens decay, vectors do not.
    - All three axes are mirrored, left and right too: do not go on from here with reports.

    8 processes of 128 samples make the batch. The script runs in fp16, this in bf16 where that pays; its masks
    overshoot their ratio by a fault, these do not.
    """
    return PretrainConfig(
        recipe="ct.spectre_stage1",
        steps=STEPS,
        spec=InputSpec(spacing_mm=(0.5, 0.5, 1.0), low_hu=-1000.0, high_hu=1000.0, block_ijk=BLOCK),
        backbone=_spectre_backbone(),
        objective=DinoConfig(
            projector=ProjectorConfig(hidden=2048, bottleneck=256, prototypes=65_536),
            separate_heads=True,
            centring="softmax",
            ibot_weight=1.0,
            masked_views=0.5,
            mask_ratios=(0.2, 0.7),
            koleo_weight=0.1,
            koleo_on="local_logits",
            student_temperature=0.1,
            teacher_temperature_start=0.04,
            teacher_temperature_end=0.07,
            teacher_temperature_share=0.3,
            momentum_start=0.992,
            momentum_end=1.0,
            centre_momentum=0.9,
        ),
        views=_spectre_views(),
        loader=LoaderConfig(batch=1024, samples_per_open=12, workers=10),
        optim=OptimConfig(
            lr=4e-3,
            end_lr=1e-6,
            warm_up=0.1,
            lr_scaling="sqrt",
            weight_decay=0.04,
            weight_decay_growth=10.0,
            decay_tokens=True,
            betas=(0.9, 0.999),
            layer_decay=0.9,
            patch_embed_scale=0.2,
            clip_norm=3.0,
        ),
        checkpoint=CheckpointConfig(every=1000, keep=3),
        health=HealthConfig(every=500),
    )


def spectre_stage1_paper() -> PretrainConfig:
    """SPECTRE's stage 1 as its paper tells it (P): larger batch, more epochs, and KoLeo on cls of the global views.

    Batch 1,536, 150 epochs (10 of warm-up), 4 samples of a scan. 4e-3 is taken as the rate that is reached; by the
    script's rule it would be the rate at 1,024 samples. All else is the script's.
    """
    start = spectre_stage1()
    return replace(
        start,
        recipe="ct.spectre_stage1_paper",
        objective=replace(start.objective, koleo_on="cls", teacher_temperature_share=30 / 150),
        loader=replace(start.loader, batch=1536, samples_per_open=4),
        optim=replace(start.optim, lr_scaling="none", warm_up=10 / 150),
    )


def spectre_dinov1() -> PretrainConfig:
    """SPECTRE's plain DINO script (R): cls tokens alone, on the base size; temperature fixed, prototypes frozen first.

    Its backbone has learned absolute positions; ours have rotary ones always, so this one differs there.
    """
    start = spectre_stage1()
    size = EncoderConfig(dim=768, depth=12, heads=8, layer_scale=1e-3)
    return replace(
        start,
        recipe="ct.spectre_dinov1",
        backbone=replace(start.backbone, block=size, scan=replace(size, depth=0, rope_base=100.0)),
        objective=replace(
            start.objective,
            ibot_weight=0.0,
            koleo_weight=0.0,
            teacher_temperature_end=0.04,
            momentum_end=0.999,
        ),
        optim=replace(start.optim, lr=5e-4, frozen_prototypes=0.01),
    )


def spectre_mae() -> PretrainConfig:
    """SPECTRE's MAE script (R): a quarter of the patches is seen, all others are rebuilt as raw voxels, base size.

    There the decoder cannot know where a patch was (its position table is zero and frozen); here it does. Heads of the
    decoder are 30 wide instead of 32, as rotary positions along three axes ask for a multiple of 6.
    """
    start = spectre_stage1()
    size = EncoderConfig(dim=768, depth=12, heads=8)
    return replace(
        start,
        recipe="ct.spectre_mae",
        spec=replace(start.spec, spacing_mm=(0.75, 0.75, 1.5)),
        backbone=replace(start.backbone, block=size, scan=replace(size, depth=0, rope_base=100.0)),
        objective=MaeConfig(
            keep=0.25, decode=0.75, normalise_targets=False, decoder=EncoderConfig(dim=480, depth=8, heads=16)
        ),
        views=ViewsConfig(
            global_=ViewKind(count=1, size_ijk=BLOCK, min_scale=0.34, max_scale=1.0, spread="uniform"),
            augment=AugmentConfig(),
            region_scale=1.0,
            overhang=0.0,
            central_mm=(288.0, 288.0, 384.0),
            windowed="first",
        ),
        loader=replace(start.loader, samples_per_open=36),
        optim=OptimConfig(
            lr=1e-3,
            end_lr=1e-6,
            warm_up=0.4,
            lr_scaling="sqrt",
            weight_decay=0.05,
            decay_tokens=True,
            betas=(0.9, 0.95),
            clip_norm=3.0,
        ),
    )


def base() -> PretrainConfig:
    """Our own: SPECTRE's data flow, with what the literature and our measurements say is better.

    - Heads of 96 (dim 768, 8 heads): a multiple of 8, without which the fast attention kernels refuse or pad.
    - bf16 where the hardware has it; fp32 weights and statistics.
    - Sinkhorn and Knopp instead of a running mean (DINOv2): no prototype can starve, and no centre to tune.
    - KoLeo on cls embeddings of the global views, over the whole batch, as its authors meant it.
    - 4 register tokens (Darcet et al. 2023): patch maps without outliers, which dense tasks read.
    - Nothing is mirrored: the liver is on one side, and reports say which.
    - Regions lie about the patient's body, not about the middle of the picture: no step is spent on air and table.
    - Every patch token is asked where in the body it is (see decision 4): measured to help, nearly free.
    - Scales are log-uniform about the true size, within 1.5: global views of 64 to 144 mm, local ones of 24 to 54.
    - lr follows the batch, so that 8 or 256 GPUs need no other number.
    """
    start = spectre_stage1()
    size = EncoderConfig(
        dim=768, depth=12, heads=8, registers=4, layer_scale=1e-1, drop_path=0.1, rope_rescale=2.0, rope_jitter=1.05
    )
    return replace(
        start,
        recipe="ct.base",
        steps=60_000,
        spec=replace(start.spec, spacing_mm=(0.75, 0.75, 1.5)),
        backbone=replace(start.backbone, block=size, scan=replace(size, depth=0, rope_base=100.0), inputs="centred"),
        objective=replace(
            start.objective,
            projector=ProjectorConfig(hidden=2048, bottleneck=256, prototypes=32_768),
            centring="sinkhorn",
            koleo_on="cls",
            position_weight=0.1,
            teacher_temperature_share=0.2,
        ),
        views=ViewsConfig(
            global_=ViewKind(count=2, size_ijk=BLOCK, min_scale=0.67, max_scale=1.5),
            local=ViewKind(count=8, size_ijk=(48, 48, 24), min_scale=0.67, max_scale=1.5),
            augment=AugmentConfig(
                smooth_p=0.125, sharpen_p=0.125, gamma=0.1, gamma_p=0.25, noise_std=0.1, noise_p=0.25, shift=0.1
            ),
            region_scale=1.5,
        ),
        loader=LoaderConfig(batch=1024, samples_per_open=4, workers=8),
        optim=replace(
            start.optim, lr=1e-3, warm_up=0.1, decay_tokens=False, weight_decay=0.04, weight_decay_growth=5.0
        ),
    )


def small() -> PretrainConfig:
    """`base` for one or a few GPUs: 384 wide, 8,192 prototypes, batches of 128."""
    start = base()
    size = replace(start.backbone.block, dim=384, heads=4, drop_path=0.0)
    return replace(
        start,
        recipe="ct.small",
        steps=100_000,
        backbone=replace(start.backbone, block=size, scan=replace(size, depth=0, rope_base=100.0)),
        objective=replace(start.objective, projector=ProjectorConfig(hidden=1024, bottleneck=256, prototypes=8192)),
        loader=replace(start.loader, batch=128, workers=4),
    )
