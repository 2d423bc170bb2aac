"""JEPA: predict what a teacher makes of hidden regions, not their voxels (Assran et al. 2023, I-JEPA, in 3D).

A student encodes some of the patches outside of hidden cuboids; a narrow predictor, told only where the hidden patches
lie, says what the teacher's features are there; the teacher saw everything and follows the student slowly. All cuboids
are predicted at once, as in V-JEPA (Bardes et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from voxelstem import schedules
from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.predictor import Predictor, take
from voxelstem.backbones.teacher import Teacher
from voxelstem.chance import Chance
from voxelstem.losses.jepa import feature_error, normalise_features
from voxelstem.protocols import Batch, StepOutput
from voxelstem.views.crop import ViewKind
from voxelstem.views.mask import draw_cuboids


@dataclass(frozen=True, kw_only=True, slots=True)
class JepaConfig:
    """What is hidden, what is seen, the predictor that is thrown away, and how fast the teacher follows."""

    name: str = "jepa"
    target: float = 0.4
    """Share of patches, in cuboids, whose features are predicted."""
    context: float = 0.4
    """Share of patches that the student sees, drawn among the others."""
    beta: float = 1.0
    """Where the error turns from squared to absolute, see `losses.jepa.feature_error`."""
    momentum_start: float = 0.996
    momentum_end: float = 1.0
    predictor: EncoderConfig = field(default_factory=lambda: EncoderConfig(dim=96, depth=3, heads=4))

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: nothing is hidden or seen, together more than there is, a momentum or beta out of range, or a
                predictor that could not know where anything is.
        """
        if not (self.target > 0 and self.context > 0 and self.target + self.context <= 1):
            raise ValueError(
                f"need target > 0, context > 0 and target + context <= 1, got {self.target} and {self.context}"
            )
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be >= 0, got {self.beta}")
        for name in ("momentum_start", "momentum_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} lies in [0, 1], got {getattr(self, name)}")
        if not self.predictor.depth:
            raise ValueError("predictor.depth must be >= 1, got 0: it is its blocks that know positions")

    def check(self, global_: ViewKind, local: ViewKind, *, batch: int, backbone: Any) -> None:
        """Hold the other parts of a recipe against what a step needs.

        Raises:
            ValueError: no global view, one that patches do not fill, or too few patches for the shares.
        """
        del local, batch
        if global_.count < 1:
            raise ValueError("jepa looks at global views: need views.global_.count >= 1, got 0")
        if any(size % patch for size, patch in zip(global_.size_ijk, backbone.patch_ijk, strict=True)):
            raise ValueError(
                f"views.global_.size_ijk must be a multiple of patch_ijk {backbone.patch_ijk}, got {global_.size_ijk}"
            )
        patches = math.prod(global_.size_ijk) // math.prod(backbone.patch_ijk)
        if min(self.counts(patches)) < 1:
            raise ValueError(
                f"objective.target {self.target} and objective.context {self.context} leave no patch to predict, or "
                f"none to see, of the {patches} in a view"
            )

    def counts(self, patches: int) -> tuple[int, int]:
        """How many of a view's patches are predicted, and how many are seen."""
        hidden = round(patches * self.target)
        return hidden, min(round(patches * self.context), patches - hidden)


class Jepa(nn.Module):
    """Student, teacher and predictor. Every view is one block."""

    Config = JepaConfig

    def __init__(self, config: JepaConfig, backbone: Any) -> None:
        """`backbone` satisfies `protocols.Backbone`; the teacher equals it at step 0."""
        super().__init__()
        self.config = config
        self.student = backbone
        self.teacher = Teacher(backbone)
        self.predictor = Predictor(backbone.dim, backbone.dim, config.predictor)

    @property
    def learner(self) -> Any:
        """The backbone that gradients train."""
        return self.student

    @property
    def backbone(self) -> Any:
        """What is kept after pretraining: the teacher's, as in the paper's evaluation."""
        return self.teacher.network

    @property
    def trains_scan_level(self) -> bool:
        """No: every view is one block."""
        return False

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Predict the teacher's features of the global views' hidden cuboids. `progress` changes nothing here."""
        del progress
        views = batch.views["global"]
        rows = views.flatten(0, 1)
        cells = tuple(size // patch for size, patch in zip(rows.shape[-3:], self.student.patch_ijk, strict=True))
        grid = (cells[0], cells[1], cells[2])
        positions = grid_positions(grid).to(rows.device)
        chance = batch.chance.blocks(views.shape[1])
        hidden, seen = self._draw(grid, chance)
        with torch.no_grad():
            target = normalise_features(take(self.teacher.network.encode_blocks(rows)[1], hidden))
        _, tokens = self.student.encode_blocks(rows, keep=seen, chance=chance)
        predicted = self.predictor(tokens, positions[seen], positions[hidden])
        loss = feature_error(predicted, target, beta=self.config.beta)
        # 0 if the teacher says the same of every patch: then everything is predicted, and nothing learned.
        spread = float(target.flatten(0, 1).std(dim=0, unbiased=False).mean())
        return StepOutput(loss=loss, scalars={"loss/feature": float(loss.detach()), "target_spread": spread})

    def _draw(
        self, grid: tuple[int, int, int], chance: Chance
    ) -> tuple[Int[Tensor, "row hidden"], Int[Tensor, "row seen"]]:
        """Numbers of the patches that are predicted and of those that are seen, equally many in every row."""
        patches = math.prod(grid)
        hidden, seen = self.config.counts(patches)
        masked = draw_cuboids(chance, grid, ratios=torch.full((len(chance),), self.config.target))
        drawn = chance.purpose("context").uniform(patches)
        # Hidden patches stand first, in their order; the others behind them, in an order by chance.
        order = torch.where(masked.to(drawn.device), -1.0, drawn).argsort(dim=1, stable=True)
        return order[:, :hidden], order[:, hidden : hidden + seen]

    def after_step(self, *, progress: float) -> None:
        """The teacher follows the student, ever more slowly."""
        config = self.config
        momentum = schedules.cosine(progress, start=config.momentum_start, end=config.momentum_end)
        self.teacher.follow(self.student, momentum=momentum)
