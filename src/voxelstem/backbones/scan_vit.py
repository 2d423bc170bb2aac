"""The two-level transformer: patches within a block, then the blocks of the whole scan.

After SPECTRE (arXiv 2511.17209): a 3D ViT looks at each block; a second transformer looks at all block
embeddings concat(cls, mean of patch tokens). Both are the same `Encoder`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from voxelstem.backbones.atlas import Atlas
from voxelstem.backbones.encoder import Encoder, EncoderConfig, init_linear
from voxelstem.backbones.layers import grid_positions
from voxelstem.backbones.places import PlaceReadout
from voxelstem.backbones.pools import pool
from voxelstem.chance import Chance
from voxelstem.errors import ConfigError
from voxelstem.protocols import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanVitConfig:
    """Sizes of both levels. `scan.depth = 0` leaves the scan level out."""

    name: str = "scan_vit"
    channels: int = 1
    patch_ijk: tuple[int, int, int] = (4, 4, 4)
    block_ijk: tuple[int, int, int] = (32, 32, 32)
    block: EncoderConfig = field(default_factory=EncoderConfig)
    scan: EncoderConfig = field(default_factory=lambda: EncoderConfig(depth=2, rope_base=100.0))
    inputs: Literal["centred", "unit"] = "centred"
    """Windowed voxels lie in [0, 1]: `unit` takes them so, as SPECTRE's weights want; `centred` moves them to (-1, 1)
    first, which keeps an untrained embedding's outputs small."""
    place_readout: int = 0
    """Channels of every token of a block that are read out by its place into cls, see `places.PlaceReadout`; 0:
    attention alone fills cls. It wants blocks that lie where they always do, as in a frame (`InputSpec.frame_ijk`)."""
    atlas_cell: int = 0
    """Edge in voxels of the cells whose texture is compared with what is usual there, see `atlas.Atlas`; 0: it is not.
    It wants such blocks too."""
    atlas_directions: tuple[int, int] = (200, 100)
    """Numbers that are kept of deviations and of coarse voxels, each as loud as the others."""
    atlas_noise: float = 0.0
    """Standard deviation of what training adds to each, so that few scans are not easily learned by heart."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no channel, a patch or block without voxels, or patches that do not fill the block.
        """
        if self.channels < 1:
            raise ValueError(f"channels must be >= 1, got {self.channels}")
        if min(*self.patch_ijk, *self.block_ijk) < 1:
            raise ValueError(
                f"patch_ijk and block_ijk must be at least one voxel, got {self.patch_ijk} and {self.block_ijk}"
            )
        if any(block % patch for block, patch in zip(self.block_ijk, self.patch_ijk, strict=True)):
            raise ValueError(f"patch_ijk {self.patch_ijk} must divide block_ijk {self.block_ijk}")
        if self.place_readout < 0 or self.atlas_cell < 0 or min(self.atlas_directions) < 1:
            raise ValueError(
                "need place_readout >= 0, atlas_cell >= 0 and atlas_directions >= 1 each, "
                f"got {self.place_readout}, {self.atlas_cell} and {self.atlas_directions}"
            )
        if self.atlas_cell and any(edge % (2 * self.atlas_cell) for edge in self.patch_ijk):
            raise ValueError(f"atlas_cell must divide half of patch_ijk {self.patch_ijk}, got {self.atlas_cell}")
        if not 0 <= self.atlas_noise < math.inf:
            raise ValueError(f"atlas_noise is a standard deviation >= 0, got {self.atlas_noise}")

    def check_whole(self, block_ijk: tuple[int, ...], *, some: bool = False) -> None:
        """What reads by place wants the blocks that it was made for, and all of their patches.

        Raises:
            ConfigError: these are others.
        """
        if (self.place_readout or self.atlas_cell) and (some or tuple(block_ijk) != self.block_ijk):
            raise ConfigError(
                f"what reads blocks by place wants whole ones of {self.block_ijk} voxels, got {tuple(block_ijk)}"
                + (", of which only some patches are kept" if some else ""),
                hint="feed blocks of the size that the weights were trained on: place_readout and atlas_cell want it",
            )

    @property
    def places(self) -> int:
        """Patches of a block."""
        return math.prod(block // patch for block, patch in zip(self.block_ijk, self.patch_ijk, strict=True))


def make_atlas(config: ScanVitConfig) -> Atlas | None:
    """What compares a block with what is usual at its places, if the config asks for it."""
    if not config.atlas_cell:
        return None
    return Atlas(
        config.patch_ijk,
        places=config.places,
        cell=config.atlas_cell,
        directions=config.atlas_directions,
        dim=config.block.dim,
    )


def patchify(
    blocks: Float[Tensor, "row channel i j k"], patch_ijk: tuple[int, int, int]
) -> Float[Tensor, "row patch voxel"]:
    """Cut blocks into patches, each a flat vector (channel, i, j, k); patch order is C-order, k fastest."""
    row, channel, i, j, k = blocks.shape
    pi, pj, pk = patch_ijk
    parts = blocks.reshape(row, channel, i // pi, pi, j // pj, pj, k // pk, pk)
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(row, -1, channel * pi * pj * pk)


class ScanVit(nn.Module):
    """See the module's docstring. Any block size that the patch divides can be encoded."""

    Config = ScanVitConfig

    def __init__(self, config: ScanVitConfig) -> None:
        """Make an untrained network; draw it under a fixed torch seed to be able to draw it again."""
        super().__init__()
        self.config = config
        self.patch_ijk = config.patch_ijk
        self.dim = config.block.dim
        self.embed = nn.Linear(config.channels * math.prod(config.patch_ijk), self.dim)
        self.mask_token = nn.Parameter(torch.zeros(self.dim))
        self.block_encoder = Encoder(config.block)
        channels = config.place_readout
        self.readout = PlaceReadout(config.block.dim, channels, places=config.places) if channels else None
        self.atlas = make_atlas(config)
        self.scan_project = nn.Linear(2 * self.dim, config.scan.dim) if config.scan.depth else None
        self.scan_encoder = Encoder(config.scan) if config.scan.depth else None
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        init_linear(self.embed)
        if self.scan_project is not None:
            init_linear(self.scan_project)

    def encode(
        self,
        blocks: Float[Tensor, "batch n channel i j k"],
        grid: tuple[int, int, int],
        *,
        masked: Bool[Tensor, "batch n patch"] | None = None,
        keep: Int[Tensor, "batch n kept"] | None = None,
        chance: Chance | None = None,
    ) -> Tokens:
        """Embed the blocks of scans (windowed to [0, 1]; n = grid i * j * k).

        `masked` patches are replaced by the mask token (iBOT); with `keep` only those patches enter the
        network at all, and only those come back (MAE). `chance` holds a key for each scan, for changes in training.
        """
        batch, n = blocks.shape[:2]
        cls, tokens = self.encode_blocks(
            blocks.flatten(0, 1),
            masked=None if masked is None else masked.flatten(0, 1),
            keep=None if keep is None else keep.flatten(0, 1),
            chance=None if chance is None else chance.blocks(n),
        )
        cls, tokens = cls.unflatten(0, (batch, n)), tokens.unflatten(0, (batch, n))
        if not self.has_scan_level:
            return Tokens(cls=cls, patches=tokens)
        described = pool(cls.flatten(0, 1), tokens.flatten(0, 1)).unflatten(0, (batch, n))
        scan, scan_blocks = self.look_at_scan(described, grid, chance=chance)
        return Tokens(cls=cls, patches=tokens, blocks=scan_blocks, scan=scan)

    def encode_blocks(
        self,
        blocks: Float[Tensor, "row channel i j k"],
        *,
        masked: Bool[Tensor, "row patch"] | None = None,
        keep: Int[Tensor, "row kept"] | None = None,
        chance: Chance | None = None,
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """First level: cls and patch tokens of each block by itself; the other arguments as in `encode`."""
        patches, positions = self._patches(blocks)
        if keep is not None:
            index = keep[..., None]
            patches = patches.gather(1, index.expand(-1, -1, patches.shape[-1]))
            positions = positions.expand(len(patches), -1, -1).gather(1, index.expand(-1, -1, 3))
        self.config.check_whole(blocks.shape[-3:], some=keep is not None)
        x = self.embed(self._inputs(patches))
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token.to(x.dtype), x)
        cls, tokens = self.block_encoder(x, positions, chance=chance)
        return self._read(cls, tokens, patches, masked=masked, chance=chance)

    def intermediates(
        self, blocks: Float[Tensor, "row channel i j k"], layers: Sequence[int]
    ) -> list[tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]]:
        """Normalised cls and patch tokens after the named layers of the first level, counted from 1, for dense tasks.

        Raises:
            ValueError: there is no such layer.
            ConfigError: they are read by place, and are no whole blocks of the trained size.
        """
        self.config.check_whole(blocks.shape[-3:])
        patches, positions = self._patches(blocks)
        found = self.block_encoder.intermediates(self.embed(self._inputs(patches)), positions, layers)
        return [self._read(cls, tokens, patches) for cls, tokens in found]

    @property
    def shows_attention(self) -> bool:
        """Whether the first level has a layer whose attention can be looked at."""
        return self.config.block.depth > 0

    def cls_attention(self, blocks: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row head patch"]:
        """How much each block's cls token looks at each of its patches in the last layer."""
        patches, positions = self._patches(blocks)
        return self.block_encoder.cls_attention(self.embed(self._inputs(patches)), positions)

    def _patches(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The patches of windowed voxels, and where they lie in their block."""
        patches = patchify(blocks, self.patch_ijk)
        i, j, k = (size // patch for size, patch in zip(blocks.shape[-3:], self.patch_ijk, strict=True))
        positions = grid_positions((i, j, k)).to(blocks.device)[None]
        return patches, positions

    def _inputs(self, patches: Tensor) -> Tensor:
        return 2 * patches - 1 if self.config.inputs == "centred" else patches

    def _read(
        self,
        cls: Tensor,
        tokens: Tensor,
        patches: Tensor,
        *,
        masked: Tensor | None = None,
        chance: Chance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cls with what the places say and what is unusual there, if they are read."""
        if self.readout is not None:
            cls = cls + self.readout(tokens)
        if self.atlas is not None:
            noise = None
            if chance is not None and self.config.atlas_noise:
                noise = self.config.atlas_noise * chance.purpose("atlas").normal(sum(self.config.atlas_directions))
            cls = cls + self.atlas(patches, masked=masked, noise=noise)
        return cls, tokens

    def measure(self, blocks: Sequence[Float[Tensor, "row channel i j k"]]) -> None:
        """Learn from blocks of many scans, given a few at a time, what is usual, where the config asks for that."""
        if self.atlas is not None:
            self.atlas.measure([patchify(part, self.patch_ijk) for part in blocks])

    def take_measured(self, other: ScanVit) -> None:
        """Know what another network of this architecture was shown."""
        if self.atlas is not None and other.atlas is not None:
            for mine, theirs in zip(self.atlas.buffers(), other.atlas.buffers(), strict=True):
                mine.copy_(theirs)

    @property
    def wants_measuring(self) -> bool:
        """Whether it should be shown many blocks before it is trained."""
        return self.atlas is not None and not self.atlas.is_measured

    @property
    def has_scan_level(self) -> bool:
        """Whether there is a transformer over the blocks."""
        return self.scan_encoder is not None

    def look_at_scan(
        self,
        described: Float[Tensor, "batch n 2*dim"],
        grid: tuple[int, int, int],
        *,
        chance: Chance | None = None,
    ) -> tuple[Float[Tensor, "batch scan_dim"], Float[Tensor, "batch n scan_dim"]]:
        """Second level: the blocks, each described by `pools.pool` (concat(cls, mean of patches)), look at each other.

        Raises:
            ValueError: the architecture has no scan level.
        """
        if self.scan_encoder is None or self.scan_project is None:
            raise ValueError("this backbone has no scan level: scan.depth is 0")
        positions = grid_positions(grid).to(described.device)[None]
        return self.scan_encoder(self.scan_project(described), positions, chance=chance)

    def param_groups(self) -> list[tuple[int, list[tuple[str, nn.Parameter]]]]:
        """Depth 0 is the patch embedding, then one for each transformer block, the scan level last."""
        deepest = len(self.block_encoder.blocks) + 1
        depths: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            if name.startswith("block_encoder.blocks."):
                depth = 1 + int(name.split(".")[2])
            elif name.startswith(("scan_", "readout.", "atlas.", "block_encoder.norm")):
                depth = deepest
            else:
                depth = 0
            depths.setdefault(depth, []).append((name, parameter))
        return sorted(depths.items())
