"""Recipes that align whole scans with their reports: SPECTRE's stage 2 as released, our own, and both in miniature.

(R) and (P) as in `recipes.ct`: SPECTRE's released script and settings, its paper's table.
"""

from __future__ import annotations

from dataclasses import replace

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.backbones.text import TowerConfig
from voxelstem.engine.checkpoint import CheckpointConfig
from voxelstem.engine.loader import LoaderConfig
from voxelstem.engine.optim import OptimConfig
from voxelstem.objectives.siglip import SiglipConfig
from voxelstem.pretrain import PretrainConfig
from voxelstem.recipes import ct
from voxelstem.study import INPUT_SPECS, InputSpec
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind
from voxelstem.views.multicrop import ViewsConfig
from voxelstem.views.report import SPECTRE, ReportConfig, SectionConfig

QWEN = TowerConfig(
    source="Qwen3-Embedding-0.6B",
    pooling="last",
    trains="lowrank",
    rank=16,
    alpha=64.0,
    dropout=0.05,
    targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    max_tokens=1024,
)
"""SPECTRE's text tower (R); `objective.text.source` is the folder that it lies in."""

SENTENCES = ReportConfig(
    findings=SectionConfig(shuffle=True, sentence_drop_p=0.1),
    impression=SectionConfig(drop_p=0.3, shuffle=True, sentence_drop_p=0.1),
    rewrite_p=0.3,
)
"""Most of the sentences, in any order, under no heading. A text that says little of its scan is a weak pair."""


def spectre_stage2() -> PretrainConfig:
    """SPECTRE's stage 2 as its released SigLIP script does it (R): 59,000 steps (P) of 144 scans of 3 x 3 x 4 blocks.

    Go on from stage 1 with `--from`: the block level is taken over, the scan level is drawn. For the first tenth the
    block level does not learn; there its gradients are computed and thrown away, here they are not computed.

    What is otherwise, because it was a fault there: a mirrored scan's report is mirrored too, gradients of the texts
    are those of the whole batch, and the new scan level learns at full rate (there its first layer had 0.05 of it).
    """
    start = ct.spectre_stage1()
    return replace(
        start,
        recipe="ct.spectre_stage2",
        steps=59_000,
        spec=INPUT_SPECS["ct-stage2"],
        # The script builds its scan level with eps 1e-6, the package that is released with 1e-5.
        backbone=replace(start.backbone, scan=replace(ct.LARGE, depth=4, rope_base=100.0, eps=1e-6)),
        objective=SiglipConfig(text=QWEN, chunk=1, frozen_image=0.1),
        views=ViewsConfig(
            global_=ViewKind(count=1, size_ijk=(384, 384, 256)),
            augment=AugmentConfig(flip_axes=(0, 1, 2), noise_std=0.0, gamma=0.0, shift=0.0),
            region_scale=1.0,
            overhang=0.0,
            central_mm=(384.0, 384.0, 480.0),
            windowed="first",
            report=SPECTRE,
        ),
        loader=LoaderConfig(batch=144, samples_per_open=1, workers=10),
        optim=OptimConfig(
            lr=1e-3,
            end_lr=1e-6,
            warm_up=0.1,
            lr_scaling="sqrt",
            weight_decay=0.01,
            decay_tokens=True,
            betas=(0.9, 0.95),
            layer_decay=0.9,
            patch_embed_scale=0.2,
            frozen_prototypes=0.01,
            clip_norm=1.0,
        ),
    )


def base() -> PretrainConfig:
    """Our own: the whole body in 3 x 3 x 4 blocks of 128 mm, on from `ct.base`.

    - At 1 x 1 x 2 mm a view holds 384 x 384 x 512 mm: what a report describes is in it, and no crop can leave it out.
    - The text tower is the one that comes as a package, with low-rank changes; `objective.text.source` names another.
    - A few of a report's sentences are left out and their order is drawn.
    - Left and right are mirrored in half of the samples, in the voxels and in the words.
    """
    start = ct.base()
    return replace(
        start,
        recipe="ct.align",
        steps=30_000,
        spec=InputSpec(spacing_mm=(1.0, 1.0, 2.0), block_ijk=ct.BLOCK, frame_ijk=(384, 384, 256)),
        backbone=replace(
            start.backbone, scan=replace(start.backbone.block, depth=4, registers=0, drop_path=0.0, rope_base=100.0)
        ),
        objective=SiglipConfig(text=TowerConfig(trains="lowrank"), hidden=1024, chunk=1, frozen_image=0.1),
        views=ViewsConfig(
            global_=ViewKind(count=1, size_ijk=(384, 384, 256), min_scale=0.95, max_scale=1.05),
            augment=AugmentConfig(flip_axes=(0,), noise_std=0.03, noise_p=0.5, gamma=0.1, gamma_p=0.25, shift=0.05),
            region_scale=1.05,
            overhang=0.0,
            report=SENTENCES,
        ),
        loader=LoaderConfig(batch=256, samples_per_open=1, workers=8),
        optim=OptimConfig(
            lr=5e-4, warm_up=0.05, lr_scaling="sqrt", weight_decay=0.05, betas=(0.9, 0.95), layer_decay=0.8
        ),
    )


def tiny() -> PretrainConfig:
    """`ct.align` in miniature, for phantoms with reports, from fresh networks on two cores.

    What is otherwise:

    - A window of soft tissue: at -1000 HU a small network sees no organ.
    - Matrices learn by Muon. With AdamW scans and reports agree on the contrast agent a thousand steps before organs.
    - The texture of each place is compared with what is usual there: a nodule changes less than a breath does. Views
      are not jittered, for a frame lies the same way in use, and few are mirrored: usual is what bodies are mostly.
      No attention stands between that and the heads: with it lesions came later.
    - Batches are as large as they must be for pairs that agree in all their organs: only these ask for lesions.
    - Heads are standardised over the batch and the temperature is low: fresh networks would become all alike.
    - A frozen tower reads whole reports, and one or two of their sentences beside: prompts are single sentences.
    - Patches are large, and one block is the whole frame: of a part of it, other places would pass for the same.
    """
    return PretrainConfig(
        recipe="tiny.align",
        steps=600,
        spec=InputSpec(
            spacing_mm=(8.0, 8.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(48, 40, 48), frame_ijk=(48, 40, 48)
        ),
        backbone=ScanVitConfig(
            patch_ijk=(8, 8, 8),
            block_ijk=(48, 40, 48),
            block=EncoderConfig(dim=288, depth=0, heads=6, place_codes=8),
            scan=EncoderConfig(dim=288, depth=1, heads=6, rope_base=100.0, place_codes=8, layer_scale=0.02),
            atlas_cell=2,
            atlas_noise=0.3,
        ),
        objective=SiglipConfig(
            text=TowerConfig(each="sentence"),
            hidden=256,
            bottleneck=128,
            out=128,
            temperature_start=1.6,
            bias_start=-3.5,
            chunk=128,
            standardise=True,
            brief_weight=0.5,
        ),
        views=ViewsConfig(
            global_=ViewKind(count=1, size_ijk=(48, 40, 48)),
            augment=AugmentConfig(flip_axes=(0,), flip_p=0.25, noise_std=0.0, gamma=0.0, shift=0.0),
            region_scale=1.0,
            overhang=0.0,
            report=ReportConfig(findings=SectionConfig(), impression=SectionConfig(), rewrite_p=0.0),
        ),
        loader=LoaderConfig(batch=128, samples_per_open=1, repeat=True),
        optim=OptimConfig(
            kind="muon",
            lr=2e-3,
            matrix_scale=25.0,
            momentum=0.95,
            warm_up=0.05,
            weight_decay=0.01,
            betas=(0.9, 0.95),
            clip_norm=1.0,
        ),
        checkpoint=CheckpointConfig(every=150),
    )


def tiny_spectre_stage2() -> PretrainConfig:
    """`ct.spectre_stage2` in miniature: its text, loss and schedule on `tiny.align`'s networks."""
    large, small = spectre_stage2(), tiny()
    return replace(
        large,
        recipe="tiny.spectre_stage2",
        steps=small.steps,
        spec=small.spec,
        backbone=replace(small.backbone, block=replace(small.backbone.block, depth=1), inputs="unit"),
        objective=replace(large.objective, text=TowerConfig(), hidden=512, bottleneck=128, out=128, chunk=32),
        views=replace(large.views, global_=small.views.global_, central_mm=None, region_scale=1.05),
        loader=small.loader,
        optim=replace(large.optim, lr_scaling="none"),
        checkpoint=small.checkpoint,
        health=small.health,
    )
