"""Two scans of a subject, told apart: what is the subject's is shared, and the other half is how it was scanned.

FOMO25's winning objective (Gordaliza, Banus, Gérin et al., arXiv 2601.13166) and what we make of it. Each scan is
painted from its own latents, and from the subject of one and the contrast of the other: with `swap="true"` that must be
the scan that has this contrast. The released code compares it with the other scan, which asks the network to leave the
contrast out or to encode the wrong one; `swap="released"` does so too. Beyond the released terms: a parallel path with
skips that paints what was hidden (where the backbone is a U-Net), volumes, pathology, and subjects told from others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from voxelstem import distributed, schedules
from voxelstem.backbones.disentangled import Latents
from voxelstem.backbones.readouts import Sides
from voxelstem.chance import Chance
from voxelstem.errors import ConfigError
from voxelstem.losses.contrast import between_groups, nt_xent, same_subject, standardised, vicreg
from voxelstem.losses.latent import contrast_repulsion, kl, subject_cosine
from voxelstem.losses.masked import among, masked_mse, smooth_l1
from voxelstem.losses.terms import Counted, Term, add_up
from voxelstem.losses.volumes import known_class, known_volumes, volume_regression
from voxelstem.protocols import Batch, StepOutput
from voxelstem.views.crop import ViewKind
from voxelstem.views.mask import Background, countable, draw_voxels
from voxelstem.views.pair import CONTRASTS

PAIR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class DisentangleConfig:
    """Which terms count how much and what is hidden; weights as released, and what is ours at 0."""

    name: str = "disentangle"
    swap: Literal["true", "released"] = "true"
    """What is painted from one scan's subject and the other's contrast, and compared with the scan of that contrast;
    or (as released) from both subjects' mean and a contrast, and compared with the scan of the other contrast."""
    mask_block: int = 4
    """Edge of a hidden block in voxels."""
    mask_ratio: float = 0.2
    """Share of blocks that are hidden: of every scan exactly as many, of both scans others."""
    leaves_out: ClassVar[bool] = True
    """Flags of what does not count (`views.left_out`) are obeyed."""
    background: Background = "counts"
    """Whether voxels at a view's lowest value (air, a removed face) count in what is painted."""
    latent: int = 256
    """Channels of each side's latents, where the backbone (a U-Net) has none of its own."""
    self_weight: float = 3.0
    cross_weight: float = 1.0
    kl_weight: float = 0.001
    kl_warm_up: float = 0.1
    """Share of the run over which the weight of the divergence rises from 0; as released, 10 of 100 epochs."""
    subject_weight: float = 0.5
    """Of 1 - cosine of both scans' subjects."""
    contrast_weight: float = 0.5
    """Of the cosine of both scans' contrasts."""
    repel_copies: bool = False
    """Whether contrasts that are known to be one (those of a scan and its own copy, or of two sessions in the same
    contrast) are pushed apart too, as released."""
    masked_weight: float = 0.0
    """Of what was hidden, painted by a U-Net's own decoder."""
    anatomy_weight: float = 0.0
    columns: int = 100
    """Volumes of a scan."""
    pathology_weight: float = 0.0
    nt_xent_weight: float = 0.0
    """Of finding a subject's other scan among all scans of the batch, by what they do not share with all others."""
    temperature: float = 0.1
    leak_weight: float = 0.0
    """Of how far the subject's latent tells contrasts apart: the share of its variance that lies between them, among
    all scans of the batch whose contrast is known."""
    name_weight: float = 0.0
    """Of naming a scan's contrast by its contrast's latent, where it is known."""
    names: int = len(CONTRASTS)
    """How many contrasts have a name: as many as `views.pair.contrasts`."""
    vicreg_weight: float = 0.0
    """Of 25 invariance + 25 variance + 1 covariance of subjects."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a weight, share, count or temperature outside its range, or nothing to paint.
        """
        for name in self.__dataclass_fields__:
            if name.endswith("_weight") and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.self_weight == 0:
            raise ValueError("self_weight must be > 0: without it latents may forget the scan")
        if not (0 <= self.mask_ratio < 1 and self.mask_block >= 1):
            raise ValueError(
                f"need 0 <= mask_ratio < 1 and mask_block >= 1, got {self.mask_ratio} and {self.mask_block}"
            )
        if not 0 <= self.kl_warm_up <= 1 or not 0 < self.temperature < math.inf:
            raise ValueError(
                f"need kl_warm_up in [0, 1] and temperature > 0, got {self.kl_warm_up} and {self.temperature}"
            )
        if min(self.latent, self.columns, self.names) < 1:
            raise ValueError(
                f"latent, columns and names must be >= 1, got {self.latent}, {self.columns} and {self.names}"
            )

    def check(self, global_: ViewKind, local: ViewKind, *, batch: int, backbone: Any) -> None:
        """Hold the other parts of a recipe against what a step needs.

        Raises:
            ValueError: views that the backbone's cells or the hidden blocks do not fill, no two subjects to tell apart,
                or nothing that paints with skips.
        """
        del local
        patch = getattr(backbone, "patch", 1)
        for edge, name in ((patch, "the backbone's cells"), (self.mask_block, "objective.mask_block")):
            if any(size % edge for size in global_.size_ijk):
                raise ValueError(
                    f"views.global_.size_ijk must be a multiple of {edge} ({name}), got {global_.size_ijk}"
                )
        if global_.count != 1:
            raise ValueError(f"disentangle compares one view of each scan: views.global_.count is {global_.count}")
        if (self.nt_xent_weight or self.vicreg_weight or self.leak_weight) and batch < PAIR:
            raise ValueError(f"subjects are told apart in a micro-batch of 2 or more, loader.batch gives {batch}")
        if self.masked_weight and not getattr(backbone, "decoder", False):
            raise ValueError(
                f"objective.masked_weight needs a U-Net with its decoder (backbone.name=unet), got {backbone.name}"
            )


class _Pair(NamedTuple):
    """Both scans of each sample, all a first and then all b."""

    truth: Float[Tensor, "both channel i j k"]
    masked: Bool[Tensor, "both 1 i j k"] | None
    counted: Bool[Tensor, "both channel i j k"] | None
    alike: Bool[Tensor, " sample"]
    """Whether both are known to be of one contrast."""


class Disentangle(nn.Module):
    """Encoder, latents, decoder and the terms."""

    Config = DisentangleConfig

    def __init__(self, config: DisentangleConfig, backbone: Any) -> None:
        """`backbone` is a `Disentangled`, or a U-Net, which gets latents and a decoder from them for pretraining only.

        What a configuration has no use for is not there.

        Raises:
            ConfigError: the backbone has neither latents nor maps to read them from.
        """
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.sides: Sides | None = None
        if not hasattr(backbone, "latents"):
            if not hasattr(backbone, "features"):
                raise ConfigError(
                    f"objective 'disentangle' reads latents out of maps, and '{backbone.config.name}' has none",
                    hint="choose backbone.name=disentangled or unet",
                )
            own = backbone.config
            self.sides = Sides(own.features, own.strides, latent=config.latent, channels=own.channels)
        latent = config.latent if self.sides is not None else backbone.config.latent
        self.volumes = nn.Linear(latent, config.columns) if config.anatomy_weight else None
        self.health = nn.Linear(2 * latent, 2) if config.pathology_weight else None
        self.names = nn.Linear(latent, config.names) if config.name_weight else None

    @property
    def learner(self) -> Any:
        """The backbone that gradients train."""
        return self.backbone

    @property
    def trains_scan_level(self) -> bool:
        """No: every view is one block."""
        return False

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Encode both scans in one pass, paint each from itself and from the other, and compare.

        Raises:
            ConfigError: the batch holds no second scan, or not what a term asks for.
        """
        config = self.config
        chance = batch.chance.each(PAIR)
        pair = self._pair(batch, chance)
        seen = pair.truth if pair.masked is None else pair.truth.masked_fill(pair.masked, 0.0)
        terms: dict[str, Term] = {}
        if self.sides is None:
            latents = self.backbone.latents(seen)
        else:
            features = self.backbone.features(seen)
            latents = self.sides.latents(features)
            if config.masked_weight and pair.masked is not None:
                painted = self.backbone.decode(features, chance)
                count = batch.known.get("masked")
                hidden = masked_mse(painted, pair.truth, pair.masked, counted=pair.counted, count=count)
                terms["masked"] = Term.of(config.masked_weight, hidden)
        subject, contrast = latents.drawn(chance) if self.training else (latents.subject_mean, latents.contrast_mean)
        terms |= self._painted(pair, subject, contrast, batch.known)
        terms |= self._apart(pair, subject, contrast, batch.known)
        if config.kl_weight and latents.subject_logvar is not None and latents.contrast_logvar is not None:
            rising = schedules.linear(progress, start=0.0, end=config.kl_weight, share=config.kl_warm_up)
            spread = kl(latents.subject_mean, latents.subject_logvar) + kl(
                latents.contrast_mean, latents.contrast_logvar
            )
            # Rows are those of both scans: their mean is half of the sum that was released.
            terms["kl"] = Term(weight=rising, value=PAIR * spread)
        return add_up(terms | self._told(latents, batch))

    def after_step(self, *, progress: float) -> None:
        """Nothing follows: there is no teacher."""

    def _pair(self, batch: Batch, chance: Chance) -> _Pair:
        config = self.config
        if "other" not in batch.views or "copy" not in batch.targets:
            raise ConfigError(
                "objective 'disentangle' compares two scans of a subject, and the batch holds one of each",
                hint="set views.pair, with same_session, other_session or any_scan above 0",
            )
        a, b = batch.views["global"][:, 0], batch.views["other"][:, 0]
        if a.shape != b.shape:
            raise ConfigError(
                f"both scans of a pair are seen alike, and views are of {tuple(a.shape[1:])} and {tuple(b.shape[1:])}",
                hint="set views.pair, which cuts both at one size",
            )
        i, j, k = a.shape[-3:]
        edge, truth = config.mask_block, torch.cat([a, b])
        # A batch may hold flags of what does not count, as views of one channel beside those that they speak of.
        flags = [batch.views[name][:, 0] for name in ("counted:global", "counted:other") if name in batch.views]
        return _Pair(
            truth=truth,
            # A key for each scan: a and b hide other blocks.
            masked=draw_voxels(chance, (i, j, k), block_ijk=(edge, edge, edge), ratio=config.mask_ratio)
            if config.mask_ratio
            else None,
            counted=countable(truth, torch.cat(flags) if len(flags) == PAIR else None, background=config.background),
            alike=_alike(batch),
        )

    def known(self, batch: Batch) -> dict[str, Tensor]:
        """How many values the terms rest on, as `Batch.known` names them."""
        config, found = self.config, dict[str, Tensor]()
        pair = self._pair(batch, batch.chance.each(PAIR))
        # Of every scan exactly as many voxels are hidden: what all count needs no count.
        if pair.counted is not None:
            found |= {"self": pair.counted.sum()} | ({"cross": pair.counted.sum()} if config.cross_weight else {})
            if self.sides is not None and config.masked_weight and pair.masked is not None:
                found["masked"] = among(pair.masked, pair.counted).sum()
        if config.contrast_weight and not config.repel_copies:
            found["contrast"] = (~pair.alike).sum()
        if self.volumes is not None:
            found["anatomy"] = known_volumes(self._volumes(batch)).sum()
        if self.health is not None:
            found["pathology"] = (~self._target(batch, "pathology", 1)[:, 0].isnan()).sum()
        if self.names is not None:
            found["name"] = (~self._target(batch, "contrast", PAIR).isnan()).sum()
        return found

    def _painted(self, pair: _Pair, subject: Tensor, contrast: Tensor, known: Mapping[str, Tensor]) -> dict[str, Term]:
        """Scans from their own latents, and from one's subject with the other's contrast; all in one pass."""
        config = self.config
        subjects, contrasts, wanted, counted = [subject], [contrast], [pair.truth], [pair.counted]
        if config.cross_weight:
            crossed = self.config.swap == "true"
            mean = subject.unflatten(0, (PAIR, -1)).mean(dim=0)
            # a's subject (or the mean) with b's contrast, then b's with a's.
            subjects.append(subject if crossed else torch.cat([mean, mean]))
            contrasts.append(_turned(contrast))
            wanted.append(_turned(pair.truth) if crossed else pair.truth)
            counted.append(None if pair.counted is None else _turned(pair.counted) if crossed else pair.counted)
        paint = self.backbone.reconstruct if self.sides is None else self.sides.reconstruct
        guesses = paint(torch.cat(subjects), torch.cat(contrasts)).split(len(pair.truth))
        names = {"self": config.self_weight, "cross": config.cross_weight}
        terms: dict[str, Term] = {}
        for (name, weight), guess, truth, where in zip(names.items(), guesses, wanted, counted, strict=False):
            error = smooth_l1(guess, truth, counted=where, count=known.get(name))
            # As released, the sum over both scans.
            doubled = Counted(value=PAIR * error.value, count=error.count)
            terms[name] = Term(weight=weight, value=doubled.value) if where is None else Term.of(weight, doubled)
        return terms

    def _apart(self, pair: _Pair, subject: Tensor, contrast: Tensor, known: Mapping[str, Tensor]) -> dict[str, Term]:
        """Both scans say the same of the subject and other things of the contrast."""
        config = self.config
        terms: dict[str, Term] = {}
        if config.subject_weight:
            terms["subject"] = Term(weight=config.subject_weight, value=subject_cosine(*subject.chunk(PAIR)))
        if config.contrast_weight:
            skip = None if config.repel_copies else pair.alike
            apart = contrast_repulsion(*contrast.chunk(PAIR), skip=skip, count=known.get("contrast"))
            terms["contrast"] = Term.of(config.contrast_weight, apart)
        return terms

    def _told(self, latents: Latents, batch: Batch) -> dict[str, Term]:
        """What is ours: anatomy and health out of the latents' means, and each subject told from the others."""
        config, count = self.config, batch.known.get
        terms: dict[str, Term] = {}
        subject, style = _over_cells(latents.subject_mean), _over_cells(latents.contrast_mean)
        if self.volumes is not None:
            found = volume_regression(self.volumes(subject), self._volumes(batch), count=count("anatomy"))
            terms["anatomy"] = Term.of(config.anatomy_weight, found)
        if self.health is not None:
            # A lesion may show in one contrast only; what is known is known of scan a.
            both = torch.cat([subject, style], dim=1)[: len(batch)]
            ill = self._target(batch, "pathology", 1)[:, 0]
            found = known_class(self.health(both), ill, count=count("pathology"))
            terms["pathology"] = Term.of(config.pathology_weight, found)
        if self.names is not None:
            named = known_class(self.names(style), self._contrasts(batch).T.flatten(), count=count("name"))
            terms["name"] = Term.of(config.name_weight, named)
        if config.leak_weight:
            both = distributed.rows(subject.unflatten(0, (PAIR, -1)).transpose(0, 1).contiguous()).flatten(0, 1)
            groups = distributed.rows(self._target(batch, "contrast", PAIR)).flatten()
            terms["leak"] = Term(weight=config.leak_weight, value=between_groups(both, groups))
        if config.nt_xent_weight or config.vicreg_weight:
            one, other = (distributed.rows(side) for side in subject.float().chunk(PAIR))
            if config.nt_xent_weight:
                number = batch.targets.get("subject")
                same = None if number is None else same_subject(distributed.rows(number))
                value = nt_xent(*standardised(one, other), same=same, temperature=config.temperature)
                terms["nt_xent"] = Term(weight=config.nt_xent_weight, value=value)
            if config.vicreg_weight:
                parts = vicreg(one, other)
                terms["invariance"] = Term(weight=25 * config.vicreg_weight, value=parts.invariance)
                terms["variance"] = Term(weight=25 * config.vicreg_weight, value=parts.variance)
                terms["covariance"] = Term(weight=config.vicreg_weight, value=parts.covariance)
        return terms

    def _contrasts(self, batch: Batch) -> Float[Tensor, "sample 2"]:
        found = self._target(batch, "contrast", PAIR)
        if bool((found >= self.config.names).any()):
            most = int(found.nan_to_num().max())
            raise ConfigError(
                f"objective.names is {self.config.names}, and the batch holds contrast number {most}",
                hint="set objective.names to how many views.pair.contrasts there are",
            )
        return found

    def _volumes(self, batch: Batch) -> Float[Tensor, "both column"]:
        names = ("volumes", "volumes_other" if "volumes_other" in batch.targets else "volumes")
        return torch.cat([self._target(batch, name, self.config.columns) for name in names])

    @staticmethod
    def _target(batch: Batch, name: str, columns: int) -> Float[Tensor, "sample value"]:
        found = batch.targets.get(name)
        if found is None or found.shape[1] != columns:
            held = "none" if found is None else f"{found.shape[1]} values"
            terms = {"pathology": "pathology_weight", "contrast": "name_weight and leak_weight"}
            raise ConfigError(
                f"objective 'disentangle' learns {columns} values of '{name}' of each scan, and the store says {held}",
                hint="set objective.columns to what there is, ingest scans with it, or set to 0 in objective: "
                + terms.get(name, "anatomy_weight"),
            )
        return found


def _over_cells(latent: Float[Tensor, "row dim i j k"]) -> Float[Tensor, "row dim"]:
    """Mean over cells, in 32 bits or more: bf16 would round away what tells scans apart."""
    return latent.flatten(2).to(torch.promote_types(latent.dtype, torch.float32)).mean(dim=2)


def _turned(rows: Tensor) -> Tensor:
    """All b first, then all a."""
    return rows.roll(len(rows) // PAIR, dims=0)


def _alike(batch: Batch) -> Bool[Tensor, " sample"]:
    """Pairs of one contrast: copies, and what is known to be; NaN, which nobody knows, equals nothing."""
    copies = batch.targets["copy"][:, 0] > 0
    contrast = batch.targets.get("contrast")
    return copies if contrast is None else copies | (contrast[:, 0] == contrast[:, -1])
