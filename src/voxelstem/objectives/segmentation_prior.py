"""Learn to segment from label maps alone: images are made of them in any contrast, so only anatomy can be learned.

After Billot et al. 2023 (SynthSeg). The scans themselves come in twice, without their voxel labels: what a network
segments in them must add up to the volumes of their label maps, and their mirror image must give the mirrored
segmentation with left and right exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxelstem.errors import ConfigError
from voxelstem.losses.segmentation import (
    mirror_symmetry,
    opposite,
    soft_segmentation,
    soft_volumes,
    volume_consistency,
)
from voxelstem.losses.terms import Term, add_up
from voxelstem.protocols import Batch, StepOutput
from voxelstem.views.crop import ViewKind
from voxelstem.views.synthesis import SynthesisConfig, apply_synthesis, draw_synthesis

LABELS = "labels:global"
"""The kind of view that holds the values of the label map under each global view."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationPriorConfig:
    """Which classes there are, how images are made, and how much each term counts."""

    name: str = "segmentation_prior"
    classes: tuple[str, ...] = ("background", "structure")
    """Names of the label maps' values from 0 on; `left` and `right` in them are sides."""
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    segmentation_weight: float = 1.0
    """Of made images against their label maps."""
    volumes_weight: float = 0.01
    """Of scans: the integral of each class but the background against its volume in the label map."""
    symmetry_weight: float = 0.1
    """Of scans against their mirror images, along axis i: the patient's left and right."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: fewer than two classes, one named twice or without its other side, or a weight that is none.
        """
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):  # noqa: PLR2004
            raise ValueError(f"classes must be two or more names that differ, got {self.classes}")
        weights = (self.segmentation_weight, self.volumes_weight, self.symmetry_weight)
        if not (0 < self.segmentation_weight and all(0 <= weight < math.inf for weight in weights)):
            raise ValueError(f"need segmentation_weight > 0 and the other weights >= 0, got {weights}")
        opposite(self.classes)

    def check(self, global_: ViewKind, local: ViewKind, *, batch: int, backbone: Any) -> None:
        """Hold the other parts of a recipe against what a step needs.

        Raises:
            ValueError: no U-Net that paints one channel for each class, or views that its cells do not fill.
        """
        del local, batch
        if not getattr(backbone, "decoder", False) or getattr(backbone, "out_channels", 0) != len(self.classes):
            raise ValueError(
                f"segmentation_prior needs a U-Net with backbone.out_channels={len(self.classes)}, one for each of "
                f"objective.classes (backbone.name=unet), got {backbone.name}"
            )
        if any(size % backbone.patch for size in global_.size_ijk):
            raise ValueError(
                f"views.global_.size_ijk must be a multiple of {backbone.patch} (the backbone's cells), "
                f"got {global_.size_ijk}"
            )


class SegmentationPrior(nn.Module):
    """A U-Net and three terms; there is nothing to throw away afterwards."""

    Config = SegmentationPriorConfig
    needs_labels = True
    """Batches must hold `labels:global`, see `engine.label_views`."""

    def __init__(self, config: SegmentationPriorConfig, backbone: Any) -> None:
        """`backbone` is a `backbones.unet.UNet` with its decoder, or one that has its `features` and `decode`.

        Raises:
            ConfigError: the backbone does not paint a channel for each class.
        """
        super().__init__()
        if not hasattr(backbone, "decode") or backbone.config.out_channels != len(config.classes):
            raise ConfigError(
                f"objective 'segmentation_prior' needs a network that paints {len(config.classes)} classes",
                hint=f"choose backbone.name=unet with decoder=true and out_channels={len(config.classes)}",
            )
        self.config, self.backbone = config, backbone
        self.swap = opposite(config.classes)

    @property
    def learner(self) -> Any:
        """The backbone that gradients train."""
        return self.backbone

    @property
    def trains_scan_level(self) -> bool:
        """No: every view is one block."""
        return False

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Segment images made of the label maps, and the scans themselves. `progress` changes nothing.

        Raises:
            ConfigError: the batch holds no label maps, or values beyond the classes.
        """
        del progress
        config = self.config
        views = batch.views["global"]
        scans, truth = views.flatten(0, 1), self._labels(batch)
        chance = batch.chance.blocks(views.shape[1])
        plan = draw_synthesis(config.synthesis, chance, classes=len(config.classes))
        # One pass for all: a network whose norms look at one row at a time does not care.
        rows = [apply_synthesis(truth, plan).to(scans)]
        rows += [scans] if config.volumes_weight or config.symmetry_weight else []
        rows += [scans.flip(2)] if config.symmetry_weight else []
        features = self.backbone.features(torch.cat(rows))
        logits = list(self.backbone.decode(features, chance.each(len(rows))).split(len(scans)))
        terms = {"segmentation": Term(weight=config.segmentation_weight, value=soft_segmentation(logits[0], truth))}
        if config.volumes_weight:
            terms["volumes"] = self._volumes(batch, logits[1], truth)
        if config.symmetry_weight:
            value = mirror_symmetry(logits[1], logits[2], self.swap)
            terms["symmetry"] = Term(weight=config.symmetry_weight, value=value)
        return add_up(terms)

    def after_step(self, *, progress: float) -> None:
        """Nothing follows: there is no teacher."""

    def _labels(self, batch: Batch) -> Tensor:
        if LABELS not in batch.views:
            raise ConfigError(
                "objective 'segmentation_prior' learns from voxel labels, and the batch holds none",
                hint="ingest scans with --labels, and let the loader follow them: engine.label_views.follow",
            )
        truth = batch.views[LABELS].flatten(0, 1)[:, 0].long()
        most = int(truth.max())
        if most >= len(self.config.classes):
            raise ConfigError(
                f"a label map holds the value {most}, and objective.classes names {len(self.config.classes)} values",
                hint="name every value of the store's label maps in objective.classes, from 0, the background, on",
            )
        return truth

    def _volumes(self, batch: Batch, logits: Tensor, truth: Tensor) -> Term:
        """The scans' own segmentation against the volumes in their label maps; air has none that matter."""
        places = batch.places_mm["global"].flatten(0, 1).to(logits.device)
        voxel = places[:, 1].abs().prod(dim=1) / math.prod(truth.shape[1:])
        counts = torch.stack([torch.bincount(row.flatten(), minlength=logits.shape[1]) for row in truth])
        target: Float[Tensor, "row class"] = counts * voxel[:, None]
        target[:, 0] = math.nan
        # As many are known of every scan, so that the mean over micro-batches is that over all.
        found = volume_consistency(soft_volumes(logits, voxel), target)
        return Term.of(self.config.volumes_weight, found)
