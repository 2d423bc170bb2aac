"""A masked autoencoder whose bottleneck must know anatomy and health: SSL3D's winning objective.

After Gordaliza, Banus, Gérin et al. (arXiv 2601.13166): a U-Net paints what was hidden from it; out of the first half
of the bottleneck's channels the volumes of the brain's structures are read, out of the next 30 % whether there is any
pathology, and the last 20 % are free. All scans of a subject (or session) have the same volumes as their target
(`views.pair.volumes_of`), so what is read is anatomy whatever the contrast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.readouts import Progressive
from voxelstem.chance import Chance
from voxelstem.errors import ConfigError
from voxelstem.losses.masked import among, masked_mse
from voxelstem.losses.position import place_of, relative_position
from voxelstem.losses.terms import Term, add_up
from voxelstem.losses.volumes import Form, known_class, known_volumes, volume_regression
from voxelstem.protocols import Batch, StepOutput
from voxelstem.views.crop import ViewKind
from voxelstem.views.mask import Background, countable, draw_voxels


@dataclass(frozen=True, kw_only=True, slots=True)
class AnatomyConfig:
    """Which terms count how much, what is hidden, and which channels answer what; weights as released."""

    name: str = "anatomy"
    mask_block: int = 16
    """Edge of a hidden block in voxels."""
    mask_ratio: float = 0.75
    """Share of blocks that are hidden: of every view exactly as many."""
    fill: Literal["zero", "token"] = "zero"
    """What stands in hidden voxels: 0, which among z-scores is the mean and could be tissue, or a learned number."""
    leaves_out: ClassVar[bool] = True
    """Flags of what does not count (`views.left_out`) are obeyed."""
    background: Background = "counts"
    """Whether voxels at a view's lowest value (air, a removed face) count in the reconstruction."""
    reconstruction_weight: float = 0.70
    visible_weight: float = 0.0
    """Weight of the reconstruction of what was not hidden."""
    anatomy_weight: float = 0.15
    pathology_weight: float = 0.15
    place_weight: float = 0.0
    """Ours: of saying for every voxel where it lies, in `place_mm` from the middle of all views of a scan. What two
    views show must be known to tell how far they lie apart, so there are two or more; what speaks of volumes and health
    has one. All voxels are asked, also those that `views.left_out` names."""
    place_mm: float = 100.0
    """About half of the field of view."""
    anatomy_form: Form = "huber"
    """How volumes are compared; `released` is SSL3D's un-centred cosine, for columns that are not standardised."""
    unknown_pathology: Literal["left_out", "positive"] = "left_out"
    """What is made of scans of whom nobody knows; as released they count as ill."""
    columns: int = 100
    """Volumes of a scan: all that SynthSeg measures but the volume within the skull, by which they are divided."""
    anatomy_channels: float = 0.5
    pathology_channels: float = 0.3
    """Shares of the bottleneck's channels, one after the other."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a weight, share or count outside its range, or nothing to learn.
        """
        weights = ("reconstruction_weight", "visible_weight", "anatomy_weight", "pathology_weight", "place_weight")
        for name in weights:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.reconstruction_weight == 0:
            raise ValueError("reconstruction_weight must be > 0: nothing else is asked of the decoder")
        if not 0 < self.place_mm < math.inf:
            raise ValueError(f"place_mm must be > 0, got {self.place_mm}")
        if not 0 < self.mask_ratio < 1 or self.mask_block < 1 or self.columns < 1:
            raise ValueError(
                "need 0 < mask_ratio < 1, mask_block >= 1 and columns >= 1, got "
                f"{self.mask_ratio}, {self.mask_block} and {self.columns}"
            )
        shares = (self.anatomy_channels, self.pathology_channels)
        if min(shares) <= 0 or sum(shares) > 1:
            raise ValueError(f"anatomy_channels and pathology_channels are > 0 and at most 1 together, got {shares}")

    def check(self, global_: ViewKind, local: ViewKind, *, batch: int, backbone: Any) -> None:
        """Hold the other parts of a recipe against what a step needs.

        Raises:
            ValueError: no U-Net with a decoder, views that its cells or the hidden blocks do not fill, or a single view
                that is asked where it lies.
        """
        del local, batch
        if self.place_weight and global_.count < 2:  # noqa: PLR2004 - one view lies nowhere
            raise ValueError(
                "objective.place_weight compares views of a scan: set views.global_.count to 2 or more, and with it "
                "views.pair=null and anatomy_weight and pathology_weight, which ask for a pair's facts, to 0"
            )
        if not getattr(backbone, "decoder", False) or getattr(backbone, "skips", None) is None:
            raise ValueError(f"anatomy needs a U-Net with its decoder (backbone.name=unet), got {backbone.name}")
        for edge, name in ((backbone.patch, "the backbone's cells"), (self.mask_block, "objective.mask_block")):
            if any(size % edge for size in global_.size_ijk):
                raise ValueError(
                    f"views.global_.size_ijk must be a multiple of {edge} ({name}), got {global_.size_ijk}"
                )
        blocks = math.prod(size // self.mask_block for size in global_.size_ijk)
        if not 0 < round(self.mask_ratio * blocks) < blocks:
            raise ValueError(
                f"objective.mask_ratio {self.mask_ratio} hides none or all of the {blocks} blocks of a view"
            )


class Anatomy(nn.Module):
    """U-Net, two readouts and the terms."""

    Config = AnatomyConfig

    def __init__(self, config: AnatomyConfig, backbone: Any) -> None:
        """`backbone` is a `backbones.unet.UNet` with its decoder, or one that has its `features`, `rise` and `paint`.

        What a configuration has no use for is not there.

        Raises:
            ConfigError: the backbone cannot paint.
        """
        super().__init__()
        if not (hasattr(backbone, "paint") and hasattr(backbone, "features")):
            raise ConfigError(
                f"objective 'anatomy' needs a network that paints, and '{backbone.config.name}' does not",
                hint="choose backbone.name=unet, with decoder=true",
            )
        self.config = config
        self.backbone = backbone
        self.anatomy_count = max(1, round(config.anatomy_channels * backbone.dim))
        self.pathology_count = max(1, round(config.pathology_channels * backbone.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, 1)) if config.fill == "token" else None
        norm = config.anatomy_form != "huber"
        self.volumes = (
            Progressive(self.anatomy_count, config.columns, last_norm=norm) if config.anatomy_weight else None
        )
        self.health = Progressive(self.pathology_count, 2, last_norm=False) if config.pathology_weight else None
        self.locate = nn.Conv3d(backbone.config.features[0], 3, 1) if config.place_weight else None

    @property
    def learner(self) -> Any:
        """The backbone that gradients train."""
        return self.backbone

    @property
    def trains_scan_level(self) -> bool:
        """No: every view is one block."""
        return False

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Paint what is hidden in the global views, and say what is known of their scans. `progress` changes nothing.

        Raises:
            ConfigError: a term asks for what the batch does not hold.
        """
        del progress
        config, count = self.config, batch.known.get
        truth, chance = batch.views["global"].flatten(0, 1), _chance(batch)
        masked, counted = self._hidden(truth, chance), self._countable(batch)
        features = self.backbone.features(torch.where(masked, self._fill(truth), truth))
        finest = self.backbone.rise(features, chance)
        painted = self.backbone.paint(finest)
        found = masked_mse(painted, truth, masked, counted=counted, count=count("reconstruction"))
        terms = {"reconstruction": Term.of(config.reconstruction_weight, found)}
        if config.visible_weight:
            seen = masked_mse(painted, truth, ~masked, counted=counted, count=count("visible"))
            terms["visible"] = Term.of(config.visible_weight, seen)
        if self.locate is not None:
            terms["place"] = Term(weight=config.place_weight, value=self._misplaced(self.locate(finest), batch))
        if self.volumes is not None:
            guess = self.volumes(features[-1][:, : self.anatomy_count])
            volumes = self._target(batch, "volumes", config.columns)
            found = volume_regression(guess, volumes, form=config.anatomy_form, count=count("anatomy"))
            terms["anatomy"] = Term.of(config.anatomy_weight, found)
        if self.health is not None:
            guess = self.health(features[-1][:, self.anatomy_count :][:, : self.pathology_count])
            found = known_class(guess, self._ill(batch), count=count("pathology"))
            terms["pathology"] = Term.of(config.pathology_weight, found)
        return add_up(terms)

    def known(self, batch: Batch) -> dict[str, Tensor]:
        """How many values the terms rest on, as `Batch.known` names them."""
        config, found = self.config, dict[str, Tensor]()
        counted = self._countable(batch)
        # Of every view exactly as many voxels are hidden: what all count needs no count.
        if counted is not None:
            masked = self._hidden(counted, _chance(batch))
            found["reconstruction"] = among(masked, counted).sum()
            found |= {"visible": among(~masked, counted).sum()} if config.visible_weight else {}
        if self.volumes is not None:
            volumes = self._target(batch, "volumes", config.columns)
            found["anatomy"] = known_volumes(volumes, config.anatomy_form).sum()
        if self.health is not None:
            found["pathology"] = (~self._ill(batch).isnan()).sum()
        return found

    def after_step(self, *, progress: float) -> None:
        """Nothing follows: there is no teacher."""

    def _misplaced(self, said: Float[Tensor, "row 3 i j k"], batch: Batch) -> Float[Tensor, ""]:
        """Smooth L1 of the places of all voxels of a scan's views, relative to their mean."""
        i, j, k = said.shape[-3:]
        positions = grid_positions((i, j, k)).to(said.device).expand(len(said), -1, -1)
        true_mm = place_of(positions, batch.places_mm["global"].to(said.device))
        located = said.flatten(2).mT.unflatten(0, (len(batch), -1)).flatten(1, 2)
        return relative_position(located, true_mm, scale_mm=self.config.place_mm)

    def _hidden(self, truth: Float[Tensor, "row channel i j k"], chance: Chance) -> Bool[Tensor, "row 1 i j k"]:
        i, j, k = truth.shape[-3:]
        edge = self.config.mask_block
        return draw_voxels(chance, (i, j, k), block_ijk=(edge, edge, edge), ratio=self.config.mask_ratio)

    def _countable(self, batch: Batch) -> Bool[Tensor, "row channel i j k"] | None:
        # A batch may hold flags of what does not count, as views of one channel beside those that they speak of.
        flags = batch.views.get("counted:global")
        flags = None if flags is None else flags.flatten(0, 1)
        return countable(batch.views["global"].flatten(0, 1), flags, background=self.config.background)

    def _ill(self, batch: Batch) -> Float[Tensor, " row"]:
        ill = self._target(batch, "pathology", 1)[:, 0]
        return ill.nan_to_num(1.0) if self.config.unknown_pathology == "positive" else ill

    def _fill(self, like: Tensor) -> Tensor:
        return torch.zeros((), dtype=like.dtype, device=like.device) if self.mask_token is None else self.mask_token

    @staticmethod
    def _target(batch: Batch, name: str, columns: int) -> Float[Tensor, "row value"]:
        """What is known of each view's scan.

        Raises:
            ConfigError: the batch does not say it, or not as many values.
        """
        if name not in batch.targets:
            term = "pathology" if name == "pathology" else "anatomy"
            raise ConfigError(
                f"objective 'anatomy' learns from '{name}', and no scan of the store says anything of it",
                hint=f"set views.pair, ingest scans with volumes and pathology, or set objective.{term}_weight=0",
            )
        found = batch.targets[name]
        if found.shape[1] != columns:
            raise ConfigError(
                f"objective.columns is {columns}, and the store's scans have {found.shape[1]} volumes",
                hint=f"set objective.columns={found.shape[1]}, or name the structures in views.pair.structures",
            )
        return found.repeat_interleave(batch.views["global"].shape[1], dim=0)


def _chance(batch: Batch) -> Chance:
    """A key for each view."""
    return batch.chance.blocks(batch.views["global"].shape[1])
