"""Recipes for brain MRI: both winners of the challenges of MICCAI 2025 as released, our own, and miniatures.

After Gordaliza, Banus, Gérin et al. (arXiv 2601.13166) and their code: SSL3D's winner pretrains a ResEnc-L on single
scans, FOMO25's a small network on pairs of contrasts. Where a released figure is unknown it says so here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from voxelstem.backbones.disentangled import DisentangledConfig
from voxelstem.backbones.unet import resenc
from voxelstem.engine.checkpoint import CheckpointConfig
from voxelstem.engine.loader import LoaderConfig
from voxelstem.engine.optim import OptimConfig
from voxelstem.objectives.anatomy import AnatomyConfig
from voxelstem.objectives.disentangle import DisentangleConfig
from voxelstem.pretrain import PretrainConfig
from voxelstem.sources.nnssl import REMOVED
from voxelstem.study import INPUT_SPECS, InputSpec
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind
from voxelstem.views.multicrop import ViewsConfig
from voxelstem.views.pair import PairConfig

TINY = (32, 32, 32)
TINY_MM = (5.0, 5.0, 5.0)
"""A whole head in one block."""
PHANTOM_COLUMNS = 6
"""Structures of the phantom brain that have a volume."""


def ssl3d() -> PretrainConfig:
    """SSL3D's winner as released: 0.70 masked reconstruction, 0.15 volumes, 0.15 health, on ResEnc-L.

    - Blocks of 16 voxels, 75 % of them, are set to 0; only what was hidden is compared.
    - Volumes are compared by their un-centred cosine, one target for all scans of a subject; scans of whom nobody
      knows count as ill. `objective.anatomy_form=huber` and `objective.unknown_pathology=left_out` mend both.
    - SGD with Nesterov's momentum 0.99, a rate of 1e-2 that falls as a power, gradients clipped at 12: 1000 epochs of
      250 steps of 2 samples (the winner's own batch is not published).
    - Mirrored along all axes, and between 0.7 and 1.4 of their size. Theirs are so one time in five, and turned by up
      to 30 degrees as often; here each view has its size drawn, and none is turned.

    bf16 where that pays; theirs is fp16.
    """
    spec = INPUT_SPECS["mri-nnssl"]
    return PretrainConfig(
        recipe="brain_mri.ssl3d",
        steps=250_000,
        spec=spec,
        backbone=resenc("L"),
        objective=AnatomyConfig(anatomy_form="released", unknown_pathology="positive"),
        views=ViewsConfig(
            global_=ViewKind(size_ijk=spec.block_ijk, min_scale=0.7, max_scale=1.4),
            augment=AugmentConfig(flip_axes=(0, 1, 2)),
            region_scale=1.4,
            pair=PairConfig(same_session=0.0, volumes_of="subject", standardise=False),
        ),
        loader=LoaderConfig(batch=2, workers=8),
        optim=OptimConfig(
            kind="sgd",
            momentum=0.99,
            schedule="poly",
            lr=1e-2,
            end_lr=0.0,
            warm_up=0.0,
            weight_decay=3e-5,
            decay_vectors=True,
            clip_norm=12.0,
        ),
        checkpoint=CheckpointConfig(every=2500),
    )


def fomo25() -> PretrainConfig:
    """FOMO25's winner as released, its swap included: 3 self, 1 crossed, 0.001 divergence, 0.5 alike, 0.5 apart.

    - Two contrasts of one session at the same place, each with 20 % of its blocks of 4 voxels set to 0.
    - Each contrast's latent is painted with both subjects' mean and compared with the other scan, and contrasts are
      pushed apart even between a scan and its copy. `objective.swap=true` and `objective.repel_copies=false` mend both.
    - AdamW at 1e-4 on everything alike, 5 % warm-up, a cosine, gradients clipped at 1: 100 epochs of some 2,520 steps
      of 4 pairs.
    """
    spec = INPUT_SPECS["mri-fomo25"]
    return PretrainConfig(
        recipe="brain_mri.fomo25",
        steps=252_000,
        spec=spec,
        backbone=DisentangledConfig(),
        objective=DisentangleConfig(swap="released", repel_copies=True),
        views=ViewsConfig(
            global_=ViewKind(size_ijk=spec.block_ijk), region_scale=1.0, overhang=0.0, pair=PairConfig(same_session=1.0)
        ),
        loader=LoaderConfig(batch=4, workers=8),
        optim=OptimConfig(
            lr=1e-4,
            end_lr=0.0,
            warm_up=0.05,
            weight_decay=0.01,
            decay_vectors=True,
            betas=(0.9, 0.999),
            clip_norm=1.0,
        ),
        checkpoint=CheckpointConfig(every=2500),
    )


def base() -> PretrainConfig:
    """Our own: both winners in one network, corrected. Its figures are first guesses; nobody has trained it at size.

    - One encoder with two ways out: latents of subject and contrast, painted without skips and truly swapped, and a
      U-Net's decoder whose skips are left out half of the time, so that the bottleneck stays informative and
      segmentation has its skips.
    - Pairs of contrasts, and of sessions; what is known to be one contrast is not pushed apart.
    - Volumes of each session, standardised by column, so that change over the years is not erased; health where it is
      known; and each subject told from the others in the batch, in place of the cosine of its two scans, which all
      scans meet by being alike.
    - The contrast is named by its own latent, and kept out of the subject's.
    - Air does not count, nor what the scans' labels call `removed`: faces.
    - z-scores, as nnU-Net wants them: cut off at the 99th percentile, an infarct is as bright as the brain around it.
    """
    start = fomo25()
    edge = (96, 96, 96)
    return replace(
        start,
        recipe="brain_mri.base",
        spec=replace(INPUT_SPECS["mri-nnssl"], preset="", block_ijk=edge),
        backbone=replace(resenc("M", skips="dropped"), block_ijk=edge),
        objective=DisentangleConfig(
            swap="true",
            mask_block=8,
            mask_ratio=0.5,
            background="ignored",
            masked_weight=1.0,
            anatomy_weight=0.15,
            pathology_weight=0.15,
            subject_weight=0.0,
            nt_xent_weight=0.5,
            temperature=0.5,
            leak_weight=1.0,
            name_weight=0.2,
        ),
        views=ViewsConfig(
            global_=ViewKind(size_ijk=edge, min_scale=0.85, max_scale=1.15),
            region_scale=1.15,
            left_out=REMOVED,
            pair=PairConfig(same_session=0.7, other_session=0.2, any_scan=0.1, volumes_of="session"),
        ),
        loader=LoaderConfig(batch=8, workers=8),
        optim=OptimConfig(lr=3e-4, end_lr=1e-6, warm_up=0.05, weight_decay=0.05, betas=(0.9, 0.98), clip_norm=1.0),
    )


def tiny() -> PretrainConfig:
    """`base` in miniature, on phantom brains."""
    start = base()
    objective = replace(start.objective, mask_block=4, latent=16, columns=PHANTOM_COLUMNS)
    return _shrunk(start, "brain_mri.tiny", backbone=resenc("tiny", skips="dropped"), objective=objective)


def tiny_ssl3d() -> PretrainConfig:
    """`ssl3d` in miniature, on phantom brains.

    Volumes are compared column by column, nobody counts as ill of whom nobody knows, and Muon takes the place of SGD,
    which moves no weight in a few hundred steps.
    """
    start = ssl3d()
    mended = replace(start.objective, anatomy_form="huber", unknown_pathology="left_out")
    objective = replace(mended, mask_block=4, columns=PHANTOM_COLUMNS)
    small = _shrunk(start, "brain_mri.tiny_ssl3d", backbone=resenc("tiny"), objective=objective)
    optim = replace(start.optim, kind="muon", momentum=0.95, lr=6e-3, schedule="cosine", clip_norm=3.0)
    return replace(small, optim=optim)


def tiny_fomo25() -> PretrainConfig:
    """`fomo25` in miniature, on phantom brains."""
    start = fomo25()
    backbone = DisentangledConfig(width=4, levels=3, latent=16, block_ijk=TINY)
    return _shrunk(start, "brain_mri.tiny_fomo25", backbone=backbone, objective=start.objective)


def _shrunk(large: PretrainConfig, recipe: str, *, backbone: Any, objective: Any) -> PretrainConfig:
    """The recipe with a small network, whole heads in one block, and few steps at a rate for them."""
    spec = InputSpec(modality="MR", spacing_mm=TINY_MM, block_ijk=TINY, normalisation=large.spec.normalisation)
    return replace(
        large,
        recipe=recipe,
        steps=400,
        spec=spec,
        backbone=backbone,
        objective=objective,
        views=replace(large.views, global_=replace(large.views.global_, size_ijk=TINY, min_scale=0.9, max_scale=1.1)),
        loader=LoaderConfig(batch=4, repeat=True),
        optim=replace(large.optim, lr=2e-3),
        checkpoint=CheckpointConfig(every=200),
    )
