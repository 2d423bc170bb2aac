"""FOMO25's winning network: a U-Net's encoder that tells apart whose brain it is and how it was scanned.

After the disentangling U-Net-VAE of Gordaliza, Banus, Gérin et al. (arXiv 2601.13166), in the shape of its released
weights: five levels of convolutions, each pooled to the grid of the coarsest, together 992 channels, from which four
1 x 1 x 1 convolutions read mean and log-variance of what belongs to the subject and of what belongs to the contrast, at
every cell. The decoder paints a scan from both, without skips: what it paints it knows from the latents. With `vae`
off there are no log-variances. The means are the patches, their mean over cells is the cls token; there is no scan
level.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.convolution import (
    ConvNorm,
    as_tokens,
    draw_convolutions,
    encode_each,
    hidden,
    in_parts,
    no_scan_level,
)
from voxelstem.chance import Chance
from voxelstem.protocols import Tokens

VOXELS_AT_ONCE = 128**3
"""How many voxels are looked at in one pass outside of training: about 1 GiB of feature maps at width 32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DisentangledConfig:
    """Sizes of the network; as they stand, the released one."""

    name: str = "disentangled"
    channels: int = 1
    width: int = 32
    """Channels of the finest level; each coarser one has twice as many."""
    levels: int = 5
    latent: int = 256
    """Channels of each of the two latents."""
    block_ijk: tuple[int, int, int] = (64, 64, 64)
    vae: bool = True
    """Whether the latents are distributions."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: nothing to see, fewer than two levels, or a block that the patches do not fill.
        """
        if min(self.channels, self.width, self.latent) < 1 or self.levels < 2:  # noqa: PLR2004
            raise ValueError(
                "channels, width and latent must be >= 1 and levels >= 2, got "
                f"{self.channels}, {self.width}, {self.latent} and {self.levels}"
            )
        if any(block < 1 or block % self.patch for block in self.block_ijk):
            raise ValueError(
                f"patches of {self.patch} voxels along each axis must fill block_ijk, got {self.block_ijk}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from fine to coarse."""
        return tuple(self.width * 2**level for level in range(self.levels))

    @property
    def patch(self) -> int:
        """Voxels along each axis that one cell of the latents stands for."""
        return 2 ** (self.levels - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latents:
    """What a scan says of its subject and of its contrast, at each cell of a coarse grid."""

    subject_mean: Float[Tensor, "row latent a b c"]
    contrast_mean: Float[Tensor, "row latent a b c"]
    subject_logvar: Float[Tensor, "row latent a b c"] | None = None
    contrast_logvar: Float[Tensor, "row latent a b c"] | None = None

    def drawn(self, chance: Chance) -> tuple[Float[Tensor, "row latent a b c"], Float[Tensor, "row latent a b c"]]:
        """Subject and contrast drawn from their distributions (Kingma and Welling 2013), by a key for each row.

        Without variances they are the means.
        """
        return (
            _drawn(self.subject_mean, self.subject_logvar, chance.purpose("subject")),
            _drawn(self.contrast_mean, self.contrast_logvar, chance.purpose("contrast")),
        )


def _drawn(mean: Tensor, logvar: Tensor | None, chance: Chance) -> Tensor:
    if logvar is None:
        return mean
    noise = chance.normal(mean[0].numel()).view_as(mean).to(mean.dtype)
    return mean + (0.5 * logvar).exp() * noise


class Level(nn.Module):
    """Two convolutions at one resolution."""

    def __init__(self, channels: int, width: int) -> None:
        """`channels` in, `width` out."""
        super().__init__()
        self.conv1 = ConvNorm(channels, width)
        self.conv2 = ConvNorm(width, width)

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row width i j k"]:
        """Return the features."""
        return self.conv2(self.conv1(x))


class Rise(nn.Module):
    """Twice as fine, and a convolution."""

    def __init__(self, channels: int, width: int) -> None:
        """`channels` in, `width` out."""
        super().__init__()
        self.upsample = nn.ConvTranspose3d(channels, width, 2, 2)
        self.conv = ConvNorm(width, width)

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row width a b c"]:
        """Return the features."""
        return self.conv(self.upsample(x))


class Disentangled(nn.Module):
    """See the module's docstring. Any block size that the patch divides can be encoded."""

    Config = DisentangledConfig

    def __init__(self, config: DisentangledConfig) -> None:
        """Make an untrained network; draw it under a fixed torch seed to be able to draw it again."""
        super().__init__()
        self.config = config
        self.patch_ijk = (config.patch, config.patch, config.patch)
        self.dim = 2 * config.latent
        widths = config.widths
        self.levels = nn.ModuleList(Level(*ends) for ends in zip((config.channels, *widths), widths, strict=False))
        self.subject_mean, self.contrast_mean = self._head(), self._head()
        self.subject_logvar = self._head() if config.vae else None
        self.contrast_logvar = self._head() if config.vae else None
        up = (self.dim, *widths[-2::-1])
        self.rises = nn.ModuleList(Rise(*ends) for ends in pairwise(up))
        self.out = nn.Conv3d(widths[0], config.channels, 1)
        draw_convolutions(self)
        for head in (self.subject_logvar, self.contrast_logvar):
            # Every latent begins with a spread of 1, whatever comes in; one that is drawn drowns the means.
            if head is not None:
                nn.init.zeros_(head.weight)

    def features(self, x: Float[Tensor, "row channel i j k"]) -> list[Tensor]:
        """Feature maps of all levels, from fine (the blocks' own grid) to coarse."""
        maps: list[Tensor] = []
        for number, level in enumerate(self.levels):
            x = level(F.max_pool3d(x, 2) if number else x)
            maps.append(x)
        return maps

    def latents(self, x: Float[Tensor, "row channel i j k"]) -> Latents:
        """Read subject and contrast out of all levels.

        Raises:
            ValueError: blocks that the patches do not fill.
        """
        return self.latents_of(self._pooled(hidden(x, self.patch_ijk, masked=None, keep=None)))

    def latents_of(self, pooled: Float[Tensor, "row width a b c"]) -> Latents:
        """Read subject and contrast out of what `pooled` levels say together."""
        return Latents(
            subject_mean=self.subject_mean(pooled),
            contrast_mean=self.contrast_mean(pooled),
            subject_logvar=None if self.subject_logvar is None else self.subject_logvar(pooled),
            contrast_logvar=None if self.contrast_logvar is None else self.contrast_logvar(pooled),
        )

    def reconstruct(
        self, subject: Float[Tensor, "row latent a b c"], contrast: Float[Tensor, "row latent a b c"]
    ) -> Float[Tensor, "row channel i j k"]:
        """Paint a scan of this subject in this contrast."""
        x = torch.cat((subject, contrast), dim=1)
        for rise in self.rises:
            x = rise(x)
        return self.out(x)

    def encode(
        self,
        blocks: Float[Tensor, "batch n channel i j k"],
        grid: tuple[int, int, int],  # noqa: ARG002 - the protocol's; no block looks at another
        *,
        masked: Bool[Tensor, "batch n patch"] | None = None,
        keep: Int[Tensor, "batch n kept"] | None = None,
        chance: Chance | None = None,
    ) -> Tokens:
        """Embed the blocks of scans, each by itself; arguments as in `encode_blocks`."""
        return encode_each(self, blocks, masked=masked, keep=keep, chance=chance)

    def encode_blocks(
        self,
        blocks: Float[Tensor, "row channel i j k"],
        *,
        masked: Bool[Tensor, "row patch"] | None = None,
        keep: Int[Tensor, "row kept"] | None = None,
        chance: Chance | None = None,  # noqa: ARG002 - the protocol's; means leave nothing to chance
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """Means of subject and contrast (in this order) as patch tokens in C-order, and their mean as cls.

        What is `masked`, or outside `keep`, is emptied to 0. With `keep` only those cells come back, and cls is
        their mean.

        Raises:
            ValueError: blocks that the patches do not fill.
        """
        blocks = hidden(blocks, self.patch_ijk, masked=masked, keep=keep)
        maps = self._means(blocks) if self.training else in_parts(self._means, blocks, VOXELS_AT_ONCE)
        return as_tokens(maps, keep=keep)

    @property
    def has_scan_level(self) -> bool:
        """No: every block is seen by itself."""
        return False

    def look_at_scan(
        self,
        described: Float[Tensor, "batch n 2*dim"],
        grid: tuple[int, int, int],
        *,
        chance: Chance | None = None,
    ) -> tuple[Float[Tensor, "batch scan_dim"], Float[Tensor, "batch n scan_dim"]]:
        """Refuse: there is no second level.

        Raises:
            ValueError: always.
        """
        del described, grid, chance  # the protocol's
        raise no_scan_level(self.config.name)

    def param_groups(self) -> list[tuple[int, list[tuple[str, nn.Parameter]]]]:
        """Depth 0 is the finest level and so on, then come the latents' heads, then the decoder's levels."""
        heads = self.config.levels
        depths: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            part, number, *_ = name.split(".")
            if part in ("levels", "rises"):
                depth = int(number) + (0 if part == "levels" else heads + 1)
            else:
                depth = 2 * heads if part == "out" else heads
            depths.setdefault(depth, []).append((name, parameter))
        return sorted(depths.items())

    def _head(self) -> nn.Conv3d:
        return nn.Conv3d(sum(self.config.widths), self.config.latent, 1)

    def _pooled(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row width a b c"]:
        """All levels on the grid of the coarsest, fine ones first; their own maps are given up on the way."""
        parts: list[Tensor] = []
        for number, level in enumerate(self.levels):
            x = level(F.max_pool3d(x, 2) if number else x)
            edge = 2 ** (self.config.levels - 1 - number)
            parts.append(F.avg_pool3d(x, edge) if edge > 1 else x)
        return torch.cat(parts, dim=1)

    def _means(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row dim a b c"]:
        pooled = self._pooled(x)
        return torch.cat((self.subject_mean(pooled), self.contrast_mean(pooled)), dim=1)
