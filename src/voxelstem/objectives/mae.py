"""MAE: hide most patches, encode the rest, reconstruct what was hidden (He et al. 2021).

On a grid of several blocks the scan level takes part: each block's decoder starts from the token that the
scan-level transformer gave this block after looking at its neighbours. With `encode_masks` it is SimMIM (Xie et al.
2021): mask tokens enter the encoder, and one linear layer reconstructs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from voxelstem.backbones.encoder import EncoderConfig, init_linear
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.predictor import Predictor, take
from voxelstem.backbones.scan_vit import patchify
from voxelstem.chance import Chance
from voxelstem.losses.mae import reconstruction
from voxelstem.losses.position import place_of, relative_position
from voxelstem.protocols import Batch, StepOutput
from voxelstem.views.crop import ViewKind
from voxelstem.views.tile import split_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class MaeConfig:
    """What is hidden, and the decoder that is thrown away afterwards."""

    name: str = "mae"
    grid: tuple[int, int, int] = (1, 1, 1)
    """Blocks in one global view."""
    keep: float = 0.25
    """Share of patches that the encoder sees."""
    decode: float = 0.25
    """Share of patches that are reconstructed, drawn among the hidden ones; fewer make a cheaper step."""
    normalise_targets: bool = True
    position_weight: float = 0.0
    """Weight of the term that asks every visible token where in the body it is."""
    encode_masks: bool = False
    """SimMIM: hidden patches enter the encoder behind its mask token; there is no decoder, no scan level learns, and
    a step costs as much as encoding everything."""
    decoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(dim=96, depth=2, heads=4))

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no block, a negative weight, nothing is kept or decoded, together more than there is, or a
                decoder that could not know where anything is.
        """
        if min(self.grid) < 1:
            raise ValueError(f"grid must be at least one block, got {self.grid}")
        if not 0 <= self.position_weight < math.inf:
            raise ValueError(f"position_weight must be >= 0, got {self.position_weight}")
        if not (self.keep > 0 and self.decode > 0 and self.keep + self.decode <= 1):
            raise ValueError(f"need keep > 0, decode > 0 and keep + decode <= 1, got {self.keep} and {self.decode}")
        if not (self.decoder.depth or self.encode_masks):
            raise ValueError("decoder.depth must be >= 1, got 0: it is its blocks that know positions")

    def check(self, global_: ViewKind, local: ViewKind, *, batch: int, backbone: Any) -> None:
        """Hold the other parts of a recipe against what a step needs.

        Raises:
            ValueError: a global view is not a whole grid of blocks, or a block has too few patches for the shares.
        """
        del local, batch
        block_ijk = backbone.block_ijk
        wanted = tuple(cells * edge for cells, edge in zip(self.grid, block_ijk, strict=True))
        if global_.count < 1:
            raise ValueError("mae reconstructs global views: need views.global_.count >= 1, got 0")
        if global_.size_ijk != wanted:
            raise ValueError(
                f"views.global_.size_ijk must be objective.grid {self.grid} times block_ijk {block_ijk}, "
                f"which is {wanted}, got {global_.size_ijk}"
            )
        patches = math.prod(block_ijk) // math.prod(backbone.patch_ijk)
        kept, drawn = self.counts(patches)
        if min(kept, drawn, patches - kept) < 1:
            raise ValueError(
                f"objective.keep {self.keep} and objective.decode {self.decode} leave no patch to see, or none to "
                f"decode, of the {patches} in a block"
            )

    def counts(self, patches: int) -> tuple[int, int]:
        """How many of a block's patches are seen, and how many reconstructed."""
        kept = round(patches * self.keep)
        return kept, min(round(patches * self.decode), patches - kept)


class Mae(nn.Module):
    """Encoder on visible tokens only; the decoder knows every position."""

    Config = MaeConfig

    def __init__(self, config: MaeConfig, backbone: Any) -> None:
        """`backbone` satisfies `protocols.Backbone`.

        What a configuration has no use for is not there, so that every parameter of this objective gets a gradient.
        """
        super().__init__()
        self.config = config
        self.backbone = backbone
        voxels = backbone.config.channels * math.prod(backbone.patch_ijk)
        context_dim = backbone.config.scan.dim if backbone.has_scan_level else backbone.dim
        self.decoder = (
            nn.Linear(backbone.dim, voxels)
            if config.encode_masks
            else Predictor(backbone.dim, voxels, config.decoder, context_dim=context_dim)
        )
        self.locate = nn.Linear(backbone.dim, 3) if config.position_weight else None
        for layer in (self.decoder, self.locate):
            if layer is not None:
                init_linear(layer)

    @property
    def learner(self) -> Any:
        """The backbone that gradients train."""
        return self.backbone

    @property
    def trains_scan_level(self) -> bool:
        """The decoder starts from the scan level's tokens, where there is one; without a decoder it does not learn."""
        return self.backbone.has_scan_level and not self.config.encode_masks

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Reconstruct the hidden patches of the global views. `progress` changes nothing here."""
        del progress
        config, patch_ijk = self.config, self.backbone.patch_ijk
        views = batch.views["global"]
        view = views.flatten(0, 1)
        i, j, k = (size // cells for size, cells in zip(view.shape[-3:], config.grid, strict=True))
        blocks = split_blocks(view, (i, j, k)).transpose(0, 1)
        positions = grid_positions((i // patch_ijk[0], j // patch_ijk[1], k // patch_ijk[2])).to(view.device)
        chance = batch.chance.blocks(views.shape[1])
        order = chance.blocks(blocks.shape[1]).purpose("patches").uniform(len(positions)).argsort(dim=1)
        kept, drawn = config.counts(len(positions))
        keep, hidden = order[:, :kept], order[:, kept : kept + drawn]
        if config.encode_masks:
            visible, predicted = self._see_masked(blocks, keep, hidden, chance)
        else:
            visible, predicted = self._see_kept(blocks, keep, hidden, positions, chance)
        voxels = take(patchify(blocks.flatten(0, 1), patch_ijk), hidden)
        terms = {"reconstruction": reconstruction(predicted, voxels, normalise=config.normalise_targets)}
        loss = terms["reconstruction"]
        if self.locate is not None:
            located = self.locate(visible).unflatten(0, (len(batch), -1)).flatten(1, 2)
            true_mm = place_of(positions[keep], batch.places_mm["global"].to(view.device), config.grid)
            terms["position"] = relative_position(located, true_mm)
            loss = loss + config.position_weight * terms["position"]
        return StepOutput(loss=loss, scalars={f"loss/{name}": float(term.detach()) for name, term in terms.items()})

    def _see_kept(
        self,
        blocks: Float[Tensor, "view n channel i j k"],
        keep: Int[Tensor, "row kept"],
        hidden: Int[Tensor, "row hidden"],
        positions: Float[Tensor, "patch 3"],
        chance: Chance,
    ) -> tuple[Float[Tensor, "row kept dim"], Float[Tensor, "row hidden voxel"]]:
        """Tokens of the kept patches, and what the decoder makes of them; all of a block know the block's context."""
        tokens = self.backbone.encode(blocks, self.config.grid, keep=keep.unflatten(0, blocks.shape[:2]), chance=chance)
        visible, context = tokens.patches.flatten(0, 1), tokens.cls if tokens.blocks is None else tokens.blocks
        return visible, self.decoder(visible, positions[keep], positions[hidden], context.flatten(0, 1))

    def _see_masked(
        self,
        blocks: Float[Tensor, "view n channel i j k"],
        keep: Int[Tensor, "row kept"],
        hidden: Int[Tensor, "row hidden"],
        chance: Chance,
    ) -> tuple[Float[Tensor, "row kept dim"], Float[Tensor, "row hidden voxel"]]:
        """The same without a decoder: the encoder meets mask tokens in all places that are not kept."""
        rows = blocks.flatten(0, 1)
        patches = math.prod(size // patch for size, patch in zip(rows.shape[-3:], self.backbone.patch_ijk, strict=True))
        masked = keep.new_ones((len(rows), patches)).scatter(1, keep, 0).bool()
        _, tokens = self.backbone.encode_blocks(rows, masked=masked, chance=chance.blocks(blocks.shape[1]))
        return take(tokens, keep), self.decoder(take(tokens, hidden))

    def after_step(self, *, progress: float) -> None:
        """Nothing follows: MAE has no teacher."""
