"""MAE: hide most patches, encode the rest, reconstruct what was hidden (He et al. 2021).

On a grid of several blocks the scan level takes part: each block's decoder starts from the token that the
scan-level transformer gave this block after looking at its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from voxelstem.backbones.encoder import Encoder, EncoderConfig, init_linear
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.scan_vit import patchify
from voxelstem.losses.mae import normalise_patches
from voxelstem.losses.position import relative_position
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
    decoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(dim=96, depth=2, heads=4))

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no block, a negative weight, nothing is kept or decoded, or together more than there is.
        """
        if min(self.grid) < 1:
            raise ValueError(f"grid must be at least one block, got {self.grid}")
        if not 0 <= self.position_weight < math.inf:
            raise ValueError(f"position_weight must be >= 0, got {self.position_weight}")
        if not (self.keep > 0 and self.decode > 0 and self.keep + self.decode <= 1):
            raise ValueError(f"need keep > 0, decode > 0 and keep + decode <= 1, got {self.keep} and {self.decode}")

    def check(self, global_: ViewKind, local: ViewKind, *, batch: int, backbone: Any) -> None:
        """Hold the other parts of a recipe against what a step needs.

        Raises:
            ValueError: a global view is not a whole grid of blocks, or a block has too few patches for the shares.
        """
        del local, batch
        block_ijk = backbone.block_ijk
        wanted = tuple(cells * edge for cells, edge in zip(self.grid, block_ijk, strict=True))
        if global_.size_ijk != wanted:
            raise ValueError(
                f"views.global_.size_ijk must be objective.grid {self.grid} times block_ijk {block_ijk}, "
                f"which is {wanted}, got {global_.size_ijk}"
            )
        patches = math.prod(block_ijk) // math.prod(backbone.patch_ijk)
        if min(round(patches * self.keep), round(patches * self.decode)) < 1:
            raise ValueError(
                f"objective.keep {self.keep} and objective.decode {self.decode} leave no patch "
                f"of the {patches} in a block"
            )


class Mae(nn.Module):
    """Encoder on visible tokens only; the decoder knows every position."""

    Config = MaeConfig

    def __init__(self, config: MaeConfig, backbone: Any) -> None:
        """`backbone` satisfies `protocols.Backbone` and takes `keep`."""
        super().__init__()
        self.config = config
        self.backbone = backbone
        width = config.decoder.dim
        voxels = backbone.config.channels * backbone.patch_ijk[0] * backbone.patch_ijk[1] * backbone.patch_ijk[2]
        scan_dim = backbone.config.scan.dim if backbone.config.scan.depth else backbone.dim
        self.narrow = nn.Linear(backbone.dim, width)
        self.context = nn.Linear(scan_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.decoder = Encoder(config.decoder)
        self.predict = nn.Linear(width, voxels)
        self.locate = nn.Linear(backbone.dim, 3)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in (self.narrow, self.context, self.predict, self.locate):
            init_linear(layer)

    @property
    def learner(self) -> Any:
        """The backbone that gradients train."""
        return self.backbone

    @property
    def trains_scan_level(self) -> bool:
        """The decoder starts from the scan level's tokens, where there is one."""
        return self.backbone.has_scan_level

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Reconstruct the hidden patches of the global views. `progress` changes nothing here."""
        del progress
        samples, views = batch.views["global"].shape[:2]
        view = batch.views["global"].flatten(0, 1)
        grid = self.config.grid
        i, j, k = (size // cells for size, cells in zip(view.shape[-3:], grid, strict=True))
        blocks = split_blocks(view, (i, j, k)).transpose(0, 1)
        rows, n = blocks.shape[:2]
        cells = tuple(size // patch for size, patch in zip((i, j, k), self.backbone.patch_ijk, strict=True))
        patches = cells[0] * cells[1] * cells[2]
        chance = batch.chance.blocks(views)
        kept, drawn = round(patches * self.config.keep), round(patches * self.config.decode)
        order = chance.blocks(n).purpose("patches").uniform(patches).argsort(dim=1)
        keep, hidden = order[:, :kept], order[:, kept : kept + drawn]
        tokens = self.backbone.encode(blocks, grid, keep=keep.unflatten(0, (rows, n)), chance=chance)
        context = tokens.cls if tokens.blocks is None else tokens.blocks
        positions = grid_positions((cells[0], cells[1], cells[2])).to(view.device)
        predicted = self._decode(
            tokens.patches.flatten(0, 1), context.flatten(0, 1), positions[keep], positions[hidden]
        )
        target = take(patchify(blocks.flatten(0, 1), self.backbone.patch_ijk), hidden)
        if self.config.normalise_targets:
            target = normalise_patches(target)
        reconstruction = (predicted.float() - target).square().mean()
        located = self.locate(tokens.patches).flatten(1, 2).unflatten(0, (samples, -1)).flatten(1, 2)
        true_mm = place_of(positions[keep], batch.places_mm["global"].to(view.device), grid)
        position = relative_position(located, true_mm)
        return StepOutput(
            loss=reconstruction + self.config.position_weight * position,
            scalars={"loss/reconstruction": float(reconstruction.detach()), "loss/position": float(position.detach())},
        )

    def _decode(
        self,
        visible: Float[Tensor, "row kept dim"],
        context: Float[Tensor, "row scan_dim"],
        visible_at: Float[Tensor, "row kept 3"],
        hidden_at: Float[Tensor, "row hidden 3"],
    ) -> Float[Tensor, "row hidden voxel"]:
        """Let mask tokens at the hidden places look at the visible tokens; all of them know the block's context."""
        masks = self.mask_token.expand(*hidden_at.shape[:2], -1)
        x = torch.cat([self.narrow(visible), masks.to(visible.dtype)], dim=1) + self.context(context)[:, None]
        _, decoded = self.decoder(x, torch.cat([visible_at, hidden_at], dim=1))
        return self.predict(decoded[:, visible_at.shape[1] :])

    def after_step(self, *, progress: float) -> None:
        """Nothing follows: MAE has no teacher."""


def take(rows: Shaped[Tensor, "row patch dim"], index: Int[Tensor, "row chosen"]) -> Shaped[Tensor, "row chosen dim"]:
    """Pick other patches in every row."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def place_of(
    positions: Float[Tensor, "row kept 3"],
    places_mm: Float[Tensor, "sample view 2 3"],
    grid: tuple[int, int, int],
) -> Float[Tensor, "sample token 3"]:
    """Millimetres in the scan of patch centres that are given as positions (-1, 1) within their block.

    Rows run over samples, their views and the blocks of a view; `places_mm` holds low corner and extent.
    """
    samples, views = places_mm.shape[:2]
    cells = (grid_positions(grid).to(positions) + 1) / 2
    inside = positions.unflatten(0, (samples, views, -1)) / 2 / torch.tensor(grid).to(positions)
    share = cells[:, None] + inside
    start, extent = places_mm[:, :, 0, None, None], places_mm[:, :, 1, None, None]
    return (start + share * extent).flatten(1, 3)
