"""DINO with iBOT and KoLeo: a student agrees with its own moving average.

Caron et al. 2021 (DINO), Zhou et al. 2021 (iBOT), Oquab et al. 2023 (DINOv2: separate heads, KoLeo on the cls
token of global views). Teacher outputs are centred by a running mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from voxelstem import distributed, schedules
from voxelstem.backbones.heads import Projector, ProjectorConfig
from voxelstem.backbones.teacher import Teacher
from voxelstem.chance import Chance
from voxelstem.losses.dino import centred_softmax, dino
from voxelstem.losses.ibot import ibot
from voxelstem.losses.koleo import koleo
from voxelstem.protocols import Batch, StepOutput
from voxelstem.views.crop import ViewKind
from voxelstem.views.mask import draw_cuboids


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig:
    """Weights of the three terms, temperatures, and how fast the teacher follows."""

    name: str = "dino"
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    mask_ratio: float = 0.45
    """Share of patches hidden in the student's global views."""
    student_temperature: float = 0.1
    teacher_temperature_start: float = 0.04
    teacher_temperature_end: float = 0.07
    teacher_temperature_share: float = 0.3
    """Share of the run over which the teacher's temperature rises."""
    momentum_start: float = 0.99
    momentum_end: float = 1.0
    centre_momentum: float = 0.9

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a weight, share, temperature or momentum outside its range.
        """
        if not (0 <= self.ibot_weight < math.inf and 0 <= self.koleo_weight < math.inf):
            raise ValueError(f"need ibot_weight and koleo_weight >= 0, got {self.ibot_weight} and {self.koleo_weight}")
        warmths = (self.student_temperature, self.teacher_temperature_start, self.teacher_temperature_end)
        if not all(0 < warmth < math.inf for warmth in warmths):
            raise ValueError(f"temperatures must be > 0, got {warmths}")
        shares = ("mask_ratio", "teacher_temperature_share", "momentum_start", "momentum_end", "centre_momentum")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} lies in [0, 1], got {getattr(self, name)}")

    def check(self, global_: ViewKind, local: ViewKind, *, batch: int, backbone: Any) -> None:
        """Hold the other parts of a recipe against what a step needs.

        Raises:
            ValueError: views that patches do not fill, no two views to compare, or no two samples to keep apart.
        """
        for name, kind in (("global_", global_), ("local", local)):
            if kind.count and any(size % patch for size, patch in zip(kind.size_ijk, backbone.patch_ijk, strict=True)):
                raise ValueError(
                    f"views.{name}.size_ijk must be a multiple of patch_ijk {backbone.patch_ijk}, got {kind.size_ijk}"
                )
        if global_.count + local.count < 2:  # noqa: PLR2004 - a pair
            raise ValueError(
                "dino compares two views or more, got one: need views.global_.count >= 2 or views.local.count >= 1"
            )
        if self.koleo_weight and batch < 2:  # noqa: PLR2004 - a sample and its neighbour
            raise ValueError(f"koleo needs loader.batch >= 2, got {batch} (objective.koleo_weight=0 switches it off)")


class Projected(nn.Module):
    """A backbone with one projector for cls tokens and one for patch tokens."""

    def __init__(self, backbone: Any, config: ProjectorConfig) -> None:
        """`backbone` satisfies `protocols.Backbone`."""
        super().__init__()
        self.backbone = backbone
        self.cls_head = Projector(backbone.dim, config)
        self.patch_head = Projector(backbone.dim, config)

    def forward(
        self,
        views: Float[Tensor, "row channel i j k"],
        masked: Bool[Tensor, "row patch"] | None = None,
        *,
        chance: Chance | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return cls embeddings, cls logits and patch embeddings; each view is one block."""
        hidden = None if masked is None else masked[:, None]
        tokens = self.backbone.encode(views[:, None], (1, 1, 1), masked=hidden, chance=chance)
        return tokens.cls[:, 0], self.cls_head(tokens.cls[:, 0]), tokens.patches[:, 0]


class Dino(nn.Module):
    """Student, teacher and the three terms."""

    Config = DinoConfig
    cls_centre: Tensor
    patch_centre: Tensor

    def __init__(self, config: DinoConfig, backbone: Any) -> None:
        """The teacher equals the student at step 0, by construction."""
        super().__init__()
        self.config = config
        self.student = Projected(backbone, config.projector)
        self.teacher = Teacher(self.student)
        self.register_buffer("cls_centre", torch.zeros(config.projector.prototypes))
        self.register_buffer("patch_centre", torch.zeros(config.projector.prototypes))
        self._seen: tuple[Tensor, Tensor] | None = None
        """Mean teacher logits of the last step, towards which the centres move when the step has counted."""

    @property
    def learner(self) -> Any:
        """The backbone that gradients train: the student's."""
        return self.student.backbone

    @property
    def trains_scan_level(self) -> bool:
        """No: every view is one block."""
        return False

    @property
    def backbone(self) -> Any:
        """What is kept after pretraining: the teacher's, which is the steadier of the two."""
        return self.teacher.network.backbone

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Compare the student's views with what the teacher makes of the two global ones."""
        config = self.config
        globals_ = batch.views["global"].transpose(0, 1)
        count, samples = globals_.shape[:2]
        flat = globals_.flatten(0, 1)
        chance = batch.chance.each(count)
        masked = self._draw_mask(flat, chance)
        temperature = schedules.linear(
            progress,
            start=config.teacher_temperature_start,
            end=config.teacher_temperature_end,
            share=config.teacher_temperature_share,
        )
        with torch.no_grad():
            _, teacher_cls, teacher_patches = self.teacher.network(flat)
            teacher_patch = self.teacher.network.patch_head(teacher_patches)
            cls_target = centred_softmax(teacher_cls, self.cls_centre, temperature=temperature)
            patch_target = centred_softmax(teacher_patch, self.patch_centre, temperature=temperature)
            self._seen = (
                distributed.mean(teacher_cls.float().mean(dim=0)),
                distributed.mean(teacher_patch.float().mean(dim=(0, 1))),
            )
        cls, cls_logits, patches = self.student(flat, masked, chance=chance)
        student = [cls_logits.unflatten(0, (count, samples))]
        if "local" in batch.views:
            local = batch.views["local"].transpose(0, 1)
            small = batch.chance.purpose("local").each(len(local))
            logits = self.student(local.flatten(0, 1), chance=small)[1]
            student.append(logits.unflatten(0, local.shape[:2]))
        terms = {
            "dino": dino(
                torch.cat(student),
                cls_target.unflatten(0, (count, samples)),
                temperature=config.student_temperature,
            ),
            "ibot": ibot(
                self.student.patch_head(patches), patch_target, masked, temperature=config.student_temperature
            ),
            "koleo": torch.stack([koleo(view) for view in cls.unflatten(0, (count, samples))]).mean(),
        }
        loss = terms["dino"] + config.ibot_weight * terms["ibot"] + config.koleo_weight * terms["koleo"]
        scalars = {f"loss/{name}": float(term.detach()) for name, term in terms.items()}
        scalars["teacher_entropy"] = float(-(cls_target * (cls_target + 1e-12).log()).sum(-1).mean())
        return StepOutput(loss=loss, scalars=scalars)

    def _draw_mask(self, views: Float[Tensor, "row channel i j k"], chance: Chance) -> Bool[Tensor, "row patch"]:
        sizes = zip(views.shape[-3:], self.student.backbone.patch_ijk, strict=True)
        i, j, k = (size // patch for size, patch in sizes)
        masked = draw_cuboids(chance, (i, j, k), ratios=torch.full((len(views),), self.config.mask_ratio))
        return masked.to(views.device)

    def after_step(self, *, progress: float) -> None:
        """The teacher follows the student, ever more slowly, and the centres what the teacher said."""
        config = self.config
        if self._seen is not None:
            for centre, seen in zip((self.cls_centre, self.patch_centre), self._seen, strict=True):
                centre.lerp_(seen, 1 - config.centre_momentum)
            self._seen = None
        momentum = schedules.cosine(progress, start=config.momentum_start, end=config.momentum_end)
        self.teacher.follow(self.student, momentum=momentum)
