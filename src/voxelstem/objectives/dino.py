"""The DINO family: a student agrees with its own moving average, on whole views and on hidden patches.

One objective, whose terms are weighted by its config: Caron et al. 2021 (DINO), Zhou et al. 2021 (iBOT), Oquab et al.
2023 (DINOv2: separate heads, Sinkhorn's targets, KoLeo on the cls token of global views), Siméoni et al. 2025 (DINOv3:
Gram anchoring; its register tokens are `backbone.block.registers`). What it says of a batch does not depend on how the
batch is shared out among processes; micro-batches are batches of their own for Sinkhorn's targets and KoLeo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from voxelstem import distributed, schedules
from voxelstem.backbones.encoder import init_linear
from voxelstem.backbones.heads import Projector, ProjectorConfig
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.teacher import Teacher
from voxelstem.chance import Chance
from voxelstem.losses.dino import centred_softmax, dino, entropy, moved_centre
from voxelstem.losses.gram import Negatives, gram
from voxelstem.losses.ibot import ibot, patch_weights
from voxelstem.losses.koleo import koleo
from voxelstem.losses.position import place_of, relative_position
from voxelstem.losses.sinkhorn import sinkhorn
from voxelstem.protocols import Batch, StepOutput
from voxelstem.views.crop import ViewKind
from voxelstem.views.mask import draw_cuboids, draw_ratios

PAIR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig:
    """Which terms count how much, what is hidden, temperatures, and how fast the teacher follows."""

    name: str = "dino"
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    separate_heads: bool = True
    """Whether patches have a projector of their own."""
    centring: Literal["softmax", "sinkhorn"] = "softmax"
    """How the teacher is kept from one answer for everything: less its running mean, or every prototype equally often
    (3 rounds of Sinkhorn and Knopp)."""
    ibot_weight: float = 1.0
    """At 0 no patch is hidden."""
    masked_views: float = 0.5
    """Share of the global views in which patches are hidden."""
    mask_ratios: tuple[float, float] = (0.2, 0.7)
    """From the least to the largest share of patches that is hidden in such a view."""
    koleo_weight: float = 0.1
    koleo_on: Literal["cls", "local_logits"] = "cls"
    """What is spread out, summed over views: cls embeddings of the global ones as in DINOv2, or logits of the local
    ones (what SPECTRE's code does; its paper means the former)."""
    gram_weight: float = 0.0
    gram_from: float = 0.5
    """Share of the run after which patches are anchored to an earlier teacher."""
    gram_refresh: float = 0.1
    """Share of the run after which the present teacher becomes that earlier one."""
    gram_negatives: Negatives = "keep"
    position_weight: float = 0.0
    """Weight of the term that asks every patch token where in the body it is."""
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
            ValueError: a weight, share, ratio, temperature or momentum outside its range.
        """
        for name in ("ibot_weight", "koleo_weight", "gram_weight", "position_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        warmths = (self.student_temperature, self.teacher_temperature_start, self.teacher_temperature_end)
        if not all(0 < warmth < math.inf for warmth in warmths):
            raise ValueError(f"temperatures must be > 0, got {warmths}")
        shares = ("teacher_temperature_share", "momentum_start", "momentum_end", "centre_momentum", "gram_from")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} lies in [0, 1], got {getattr(self, name)}")
        for name in ("masked_views", "gram_refresh"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} lies in (0, 1], got {getattr(self, name)}")
        low, high = self.mask_ratios
        if not 0 < low <= high <= 1:
            raise ValueError(f"mask_ratios rise within (0, 1], got {self.mask_ratios}")

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
        if global_.count + local.count < PAIR:
            raise ValueError(
                "dino compares two views or more, got one: need views.global_.count >= 2 or views.local.count >= 1"
            )
        if self.koleo_weight and batch < PAIR:
            raise ValueError(
                f"koleo needs loader.batch >= 2 in every micro-batch, got {batch} "
                "(objective.koleo_weight=0 switches it off)"
            )
        if self.koleo_weight and self.koleo_on == "local_logits" and not local.count:
            raise ValueError("objective.koleo_on=local_logits needs views.local.count >= 1, got 0")


class Projected(nn.Module):
    """A backbone with a projector for cls tokens and, where it is wanted, another for patch tokens."""

    def __init__(self, backbone: Any, config: ProjectorConfig, *, separate: bool) -> None:
        """`backbone` satisfies `protocols.Backbone`."""
        super().__init__()
        self.backbone = backbone
        self.cls_head = Projector(backbone.dim, config)
        self.patch_head = Projector(backbone.dim, config) if separate else None

    def patch_logits(self, patches: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows prototype"]:
        """Project patch tokens, by the one head where there is but one."""
        return self.cls_head(patches) if self.patch_head is None else self.patch_head(patches)

    def forward(
        self,
        views: Float[Tensor, "row channel i j k"],
        masked: Bool[Tensor, "row patch"] | None = None,
        *,
        chance: Chance | None = None,
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """Return cls and patch embeddings; each view is one block."""
        hidden = None if masked is None else masked[:, None]
        tokens = self.backbone.encode(views[:, None], (1, 1, 1), masked=hidden, chance=chance)
        return tokens.cls[:, 0], tokens.patches[:, 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hidden:
    """What is hidden in the global views, rows view by view."""

    masked: Bool[Tensor, "row patch"]
    at: Int64[Tensor, " hidden"]
    """Numbers of the hidden patches among those of all rows: only these go through a patch head."""
    weights: Float[Tensor, " hidden"]

    def take(self, patches: Float[Tensor, "row patch dim"]) -> Float[Tensor, "hidden dim"]:
        """The tokens at the hidden places."""
        return patches.flatten(0, 1).index_select(0, self.at)


class Dino(nn.Module):
    """Student, teacher and the terms."""

    Config = DinoConfig
    cls_centre: Tensor
    patch_centre: Tensor
    gram_refreshes: Tensor

    def __init__(self, config: DinoConfig, backbone: Any) -> None:
        """The teacher equals the student at step 0, by construction; the backbone is taken as it comes."""
        super().__init__()
        self.config = config
        self.student = Projected(backbone, config.projector, separate=config.separate_heads and config.ibot_weight > 0)
        self.teacher = Teacher(self.student)
        if config.centring == "softmax":
            self.register_buffer("cls_centre", torch.zeros(config.projector.prototypes))
            self.register_buffer("patch_centre", torch.zeros(config.projector.prototypes))
        if config.gram_weight:
            self.anchor = Teacher(backbone)
            self.register_buffer("gram_refreshes", torch.zeros((), dtype=torch.long))
        if config.position_weight:
            self.locate = nn.Linear(backbone.dim, 3)
            init_linear(self.locate)
        self._seed: int | None = None
        self._seen: dict[int, Tensor] = {}
        """What the centres will move to when the step of that seed has counted: sums of teacher logits and their
        numbers, for each micro-batch by its first sample."""

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
        """Compare the student's views with what the teacher makes of the global ones."""
        config = self.config
        views = batch.views["global"].transpose(0, 1)
        count, samples = views.shape[:2]
        flat = views.flatten(0, 1)
        hidden = self._hide(batch) if config.ibot_weight else None
        cls_target, patch_target = self._targets(flat, hidden, batch, progress)
        masked = None if hidden is None else hidden.masked
        cls, patches = self.student(flat, masked, chance=batch.chance.each(count))
        every = [cls]
        if "local" in batch.views:
            local = batch.views["local"].transpose(0, 1)
            small = batch.chance.purpose("local").each(len(local))
            every.append(self.student(local.flatten(0, 1), chance=small)[0])
        logits = self.student.cls_head(torch.cat(every)).unflatten(0, (-1, samples))
        cls_target = cls_target.unflatten(0, (count, samples))
        terms = {"dino": (1.0, dino(logits, cls_target, temperature=config.student_temperature))}
        if hidden is not None:
            named = self.student.patch_logits(hidden.take(patches))
            term = ibot(named, patch_target, hidden.weights, temperature=config.student_temperature)
            terms["ibot"] = (config.ibot_weight, term)
        if config.koleo_weight:
            terms["koleo"] = (config.koleo_weight, self._spread(cls.unflatten(0, (count, samples)), logits))
        if config.gram_weight and progress >= config.gram_from:
            terms["gram"] = (config.gram_weight, self._anchored(flat, patches))
        if config.position_weight:
            terms["position"] = (config.position_weight, self._place(patches, batch))
        loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        used = distributed.mean(cls_target.mean(dim=(0, 1)))
        said = {f"loss/{name}": term.detach() for name, (_, term) in terms.items()}
        said |= {"teacher_entropy": entropy(cls_target).mean(), "prototype_entropy": entropy(used)}
        # Mutual information of view and prototype: 0 for one answer to everything, be it sure or even.
        said["teacher_information"] = said["prototype_entropy"] - said["teacher_entropy"]
        # One transfer for all of them: each would let the device run dry.
        return StepOutput(loss=loss, scalars=dict(zip(said, torch.stack(list(said.values())).tolist(), strict=True)))

    def _hide(self, batch: Batch) -> Hidden:
        """Draw what is hidden, on the CPU, so that nobody waits for the device to say how many patches that are."""
        samples, count = batch.views["global"].shape[:2]
        sizes = zip(batch.views["global"].shape[-3:], self.student.backbone.patch_ijk, strict=True)
        i, j, k = (size // patch for size, patch in sizes)
        share, ratios = self.config.masked_views, self.config.mask_ratios
        wanted = draw_ratios(batch.seed, (count, samples), first=batch.first, share=share, ratios=ratios)
        chance = Chance.of(batch.seed, first=batch.first, count=samples).each(count)
        masked = draw_cuboids(chance, (i, j, k), ratios=wanted.flatten())
        device = batch.views["global"].device
        at, weights = masked.flatten().nonzero()[:, 0], patch_weights(masked)
        return Hidden(masked=masked.to(device), at=at.to(device), weights=weights.to(device))

    @torch.no_grad()
    def _targets(
        self, flat: Float[Tensor, "row channel i j k"], hidden: Hidden | None, batch: Batch, progress: float
    ) -> tuple[Float[Tensor, "row prototype"], Float[Tensor, "hidden prototype"]]:
        """What the teacher says of every whole view, and of every patch that the student does not see."""
        config = self.config
        temperature = schedules.linear(
            progress,
            start=config.teacher_temperature_start,
            end=config.teacher_temperature_end,
            share=config.teacher_temperature_share,
        )
        cls, patches = self.teacher.network(flat)
        named = self.teacher.network.cls_head(cls).float()
        behind = named[:0] if hidden is None else self.teacher.network.patch_logits(hidden.take(patches)).float()
        if config.centring == "softmax":
            if self._seed != batch.seed:
                self._seed, self._seen = batch.seed, {}
            numbers = named.new_tensor([len(named), len(behind)])
            self._seen[batch.first] = torch.cat([named.sum(dim=0), behind.sum(dim=0), numbers])
            return (
                centred_softmax(named, self.cls_centre, temperature=temperature),
                centred_softmax(behind, self.patch_centre, temperature=temperature),
            )
        cls_target, patch_target = (
            sinkhorn(logits, temperature=temperature, peak=_peak(logits), total=distributed.total)
            for logits in (named, behind)
        )
        return cls_target, patch_target

    def _spread(self, cls: Float[Tensor, "view sample dim"], logits: Float[Tensor, "any sample prototype"]) -> Tensor:
        """KoLeo, view by view, among the samples of all processes."""
        if self.config.koleo_on == "cls":
            return torch.stack([koleo(distributed.rows(view)) for view in cls]).sum()
        return torch.stack([koleo(distributed.rows(view)) for view in logits[len(cls) :]]).sum()

    def _anchored(self, flat: Tensor, patches: Float[Tensor, "row patch dim"]) -> Tensor:
        with torch.no_grad():
            earlier = self.anchor.network.encode(flat[:, None], (1, 1, 1)).patches[:, 0]
        term = gram(patches, earlier, negatives=self.config.gram_negatives)
        # Before the first refresh there is no earlier teacher, only the weights of step 0.
        return term * (self.gram_refreshes > 0)

    def _place(self, patches: Float[Tensor, "row patch dim"], batch: Batch) -> Tensor:
        """Ask all patches of a sample's global views where they lie, relative to one another."""
        views = batch.views["global"]
        samples, count = views.shape[:2]
        sizes = zip(views.shape[-3:], self.student.backbone.patch_ijk, strict=True)
        i, j, k = (size // patch for size, patch in sizes)
        positions = grid_positions((i, j, k)).to(views.device).expand(samples * count, -1, -1)
        true_mm = place_of(positions, batch.places_mm["global"].to(views.device))
        said = self.locate(patches).unflatten(0, (count, samples)).transpose(0, 1).flatten(1, 2)
        return relative_position(said, true_mm)

    @torch.no_grad()
    def after_step(self, *, progress: float) -> None:
        """The teacher follows the student, ever more slowly, and the centres what the teacher said."""
        config = self.config
        if self._seen:
            sums = distributed.total(torch.stack(list(self._seen.values())).sum(dim=0))
            prototypes = config.projector.prototypes
            for at, centre in enumerate((self.cls_centre, self.patch_centre)):
                seen, number = sums[at * prototypes :][:prototypes], sums[2 * prototypes + at]
                centre.copy_(moved_centre(centre, seen, number, momentum=config.centre_momentum))
            self._seen = {}
        momentum = schedules.cosine(progress, start=config.momentum_start, end=config.momentum_end)
        self.teacher.follow(self.student, momentum=momentum)
        if config.gram_weight and progress >= config.gram_from:
            # A little more, because 0.6 - 0.4 is a little less than 0.2.
            due = 1 + math.floor((progress - config.gram_from) / config.gram_refresh + 1e-9)
            if due > int(self.gram_refreshes):
                self.anchor.follow(self.teacher.network.backbone, momentum=0.0)
                self.gram_refreshes.fill_(due)


def _peak(logits: Float[Tensor, "row prototype"]) -> Float[Tensor, ""]:
    """The largest logit that any process holds; a share without rows has none."""
    mine = logits.amax() if len(logits) else logits.new_tensor(-math.inf)
    return distributed.rows(mine.reshape(1)).amax()
