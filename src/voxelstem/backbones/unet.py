"""The residual-encoder U-Net of nnU-Net, in four sizes, under nnU-Net's own names of tensors.

Isensee et al. 2024 (arXiv 2404.09556) for the network; L is what OpenMind (arXiv 2412.17041) and the SSL3D challenge
pretrain, block by block and tensor by tensor (102,348,965 parameters in 264 tensors); M, S and tiny are smaller ones of
ours. The cells of the coarsest feature map are the patches, their mean is the cls token; there is no scan level.

A U-Net that has to paint a picture may carry it across by its skips and leave the bottleneck idle, and one without
skips cannot draw small things. With `skips="dropped"` the decoder sees each level's skip only now and then while it
learns: what it paints it must know from the bottleneck, and skips are there, and understood, where they are wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.convolution import (
    SLOPE,
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

Skips = Literal["full", "none", "dropped"]
Size = Literal["L", "M", "S", "tiny"]

VOXELS_AT_ONCE = 160**3
"""How many voxels are looked at in one pass outside of training: about 2 GiB of feature maps at 32 features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Sizes of the network; as they stand, ResEnc-L. One entry for each stage, from fine to coarse."""

    name: str = "unet"
    channels: int = 1
    out_channels: int = 1
    """Of what the decoder paints."""
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    depths: tuple[int, ...] = (1, 3, 4, 6, 6, 6)
    """Residual blocks."""
    strides: tuple[int, ...] = (1, 2, 2, 2, 2, 2)
    """Along every axis, on the way into the stage; the first is 1."""
    block_ijk: tuple[int, int, int] = (160, 160, 160)
    decoder: bool = True
    """Whether there is one; without it the weights are an encoder's."""
    skips: Skips = "full"
    """What the decoder sees of the encoder's stages beside the bottleneck: all, nothing, or in training now and then
    and else all."""
    skip_drop: float = 0.5
    """How often a sample's skip of one level is left out in training where skips are "dropped"."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: nothing to see or paint, stages of unequal number, an empty one, a first stage that strides, a
                block that the patches do not fill, or a share outside [0, 1).
        """
        stages = (len(self.features), len(self.depths), len(self.strides))
        if len(set(stages)) > 1 or stages[0] < 2:  # noqa: PLR2004
            raise ValueError(
                f"features, depths and strides need one entry for each of two or more stages, got {stages}"
            )
        counts = (self.channels, self.out_channels, *self.features, *self.depths, *self.strides)
        if min(counts) < 1 or self.strides[0] != 1:
            raise ValueError(
                "channels, out_channels, features, depths and strides must be >= 1, and the first stride 1, got "
                f"{self.channels}, {self.out_channels}, {self.features}, {self.depths} and {self.strides}"
            )
        if any(block < 1 or block % self.patch for block in self.block_ijk):
            raise ValueError(
                f"patches of {self.patch} voxels along each axis must fill block_ijk, got {self.block_ijk}"
            )
        if not 0 <= self.skip_drop < 1:
            raise ValueError(f"skip_drop lies in [0, 1), got {self.skip_drop}")

    @property
    def patch(self) -> int:
        """Voxels along each axis that one cell of the bottleneck stands for."""
        return math.prod(self.strides)


_SIZES: dict[Size, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "L": ((32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6), 160),
    "M": ((16, 32, 64, 128, 160, 160), (1, 3, 4, 6, 6, 6), 128),
    "S": ((16, 32, 64, 128, 160), (1, 2, 2, 3, 3), 96),
    "tiny": ((8, 16, 32), (1, 1, 1), 32),
}
"""Features and residual blocks of each stage, and the edge of a block in voxels."""


def resenc(
    size: Size,
    *,
    channels: int = 1,
    out_channels: int = 1,
    decoder: bool = True,
    skips: Skips = "full",
    skip_drop: float = 0.5,
) -> UNetConfig:
    """One of the sizes. L is the published network; M (L at half the width), S and tiny are ours.

    Another block is `dataclasses.replace(resenc("L"), block_ijk=(96, 96, 96))`.
    """
    features, depths, edge = _SIZES[size]
    return UNetConfig(
        channels=channels,
        out_channels=out_channels,
        features=features,
        depths=depths,
        strides=(1, *(2,) * (len(features) - 1)),
        block_ijk=(edge, edge, edge),
        decoder=decoder,
        skips=skips,
        skip_drop=skip_drop,
    )


class Residual(nn.Module):
    """Two convolutions, and what came in: pooled where they stride, projected where the width changes.

    He et al. 2018 (arXiv 1812.01187, ResNet-D).
    """

    def __init__(self, channels: int, width: int, *, stride: int, branch_gain: float) -> None:
        """`branch_gain` is the first value of the last norm's gain."""
        super().__init__()
        self.conv1 = ConvNorm(channels, width, stride=stride)
        self.conv2 = ConvNorm(width, width, active=False)
        nn.init.constant_(self.conv2.norm.weight, branch_gain)
        way: list[nn.Module] = [nn.AvgPool3d(stride, stride)] if stride > 1 else []
        if channels != width:
            way.append(ConvNorm(channels, width, edge=1, bias=False, active=False))
        self.skip = nn.Sequential(*way)

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row width a b c"]:
        """Return the features, on a coarser grid where the block strides."""
        branch = self.conv2(self.conv1(x))
        # In place: nothing reads a norm's result for its gradient.
        branch += self.skip(x)
        return F.leaky_relu(branch, SLOPE, inplace=True)


class Stage(nn.Module):
    """Residual blocks at one resolution, the first of which goes there."""

    def __init__(self, channels: int, width: int, *, depth: int, stride: int) -> None:
        """Branches begin quieter, the more of them a stage adds up."""
        super().__init__()
        gain = 1 / math.sqrt(depth)
        self.blocks = nn.Sequential(
            *(
                Residual(width if number else channels, width, stride=1 if number else stride, branch_gain=gain)
                for number in range(depth)
            )
        )

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row width a b c"]:
        """Return the features."""
        return self.blocks(x)


class Convolutions(nn.Module):
    """Convolutions one after the other, as nnU-Net nests them."""

    def __init__(self, *convolutions: ConvNorm) -> None:
        """In this order."""
        super().__init__()
        self.convs = nn.Sequential(*convolutions)

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row width i j k"]:
        """Return the features."""
        return self.convs(x)


class Encoder(nn.Module):
    """Stem and stages, from fine to coarse."""

    def __init__(self, config: UNetConfig) -> None:
        """Make it untrained."""
        super().__init__()
        first = config.features[0]
        self.stem = Convolutions(ConvNorm(config.channels, first))
        self.stages = nn.Sequential()
        channels = first
        for width, depth, stride in zip(config.features, config.depths, config.strides, strict=True):
            self.stages.append(Stage(channels, width, depth=depth, stride=stride))
            channels = width

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row dim a b c"]:
        """The coarsest map; the others are given up on the way."""
        return self.stages(self.stem(x))

    def features(self, x: Float[Tensor, "row channel i j k"]) -> list[Tensor]:
        """Every stage's map, from fine to coarse."""
        x = self.stem(x)
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """From the bottleneck back to voxels, with a head at each level; from coarse to fine."""

    def __init__(self, config: UNetConfig) -> None:
        """Make it untrained; the names are nnU-Net's, whose heads are for segmentation."""
        super().__init__()
        self.stages, self.transpconvs, self.seg_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        seen = 1 if config.skips == "none" else 2
        for level in range(len(config.features) - 1, 0, -1):
            below, width, stride = config.features[level], config.features[level - 1], config.strides[level]
            self.transpconvs.append(nn.ConvTranspose3d(below, width, stride, stride))
            self.stages.append(Convolutions(ConvNorm(seen * width, width)))
            self.seg_layers.append(nn.Conv3d(width, config.out_channels, 1))

    def forward(self, coarsest: Float[Tensor, "row dim a b c"], skips: list[Tensor]) -> list[Tensor]:
        """Maps of each level from coarse to fine; `skips` in the same order, or none."""
        maps: list[Tensor] = []
        x = coarsest
        for level, (rise, stage) in enumerate(zip(self.transpconvs, self.stages, strict=True)):
            x = rise(x)
            x = stage(torch.cat((x, skips[level]), dim=1) if skips else x)
            maps.append(x)
        return maps


class UNet(nn.Module):
    """See the module's docstring. Any block size that the patch divides can be encoded."""

    Config = UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        """Make an untrained network; draw it under a fixed torch seed to be able to draw it again."""
        super().__init__()
        self.config = config
        self.patch_ijk = (config.patch, config.patch, config.patch)
        self.dim = config.features[-1]
        self.encoder = Encoder(config)
        self.decoder = Decoder(config) if config.decoder else None
        draw_convolutions(self)

    def features(self, x: Float[Tensor, "row channel i j k"]) -> list[Tensor]:
        """Feature maps of all stages, from fine (the blocks' own grid) to coarse (the bottleneck)."""
        return self.encoder.features(x)

    def decode(self, features: list[Tensor], chance: Chance | None = None) -> Float[Tensor, "row out_channels i j k"]:
        """What the finest head paints of `features`, on the blocks' own grid.

        `chance`, a key for each row, leaves skips out where the network is in training and its skips are "dropped".

        Raises:
            ValueError: there is no decoder.
        """
        return self.paint(self.rise(features, chance))

    def rise(self, features: list[Tensor], chance: Chance | None = None) -> Float[Tensor, "row width i j k"]:
        """The decoder's finest map, before any head; arguments as in `decode`."""
        return self._risen(self._decoder(), features, chance)[-1]

    def paint(self, finest: Float[Tensor, "row width i j k"]) -> Float[Tensor, "row out_channels i j k"]:
        """What the finest head makes of that map."""
        return self._decoder().seg_layers[-1](finest)

    def decode_levels(self, features: list[Tensor], chance: Chance | None = None) -> list[Tensor]:
        """What the heads of all levels paint, from fine to coarse, for deep supervision; arguments as in `decode`."""
        decoder = self._decoder()
        maps = self._risen(decoder, features, chance)
        return [head(x) for head, x in zip(decoder.seg_layers, maps, strict=True)][::-1]

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
        chance: Chance | None = None,  # noqa: ARG002 - the protocol's; the encoder leaves nothing to chance
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """Bottleneck of each block (normalised as the weights ask) as patch tokens in C-order, and their mean as cls.

        What is `masked`, or outside `keep`, is emptied to 0. With `keep` only those cells come back, and cls is
        their mean.

        Raises:
            ValueError: blocks that the patches do not fill.
        """
        blocks = hidden(blocks, self.patch_ijk, masked=masked, keep=keep)
        maps = self.encoder(blocks) if self.training else in_parts(self.encoder, blocks, VOXELS_AT_ONCE)
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
        """Depth 0 is the stem, then one for each residual block, then one for each level of the decoder."""
        before = [1 + sum(self.config.depths[:stage]) for stage in range(len(self.config.depths) + 1)]
        depths: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            part, kind, *place = name.split(".")
            if part == "decoder":
                depth = before[-1] + int(place[0])
            else:
                depth = before[int(place[0])] + int(place[2]) if kind == "stages" else 0
            depths.setdefault(depth, []).append((name, parameter))
        return sorted(depths.items())

    def _decoder(self) -> Decoder:
        if self.decoder is None:
            raise ValueError("this U-Net has no decoder: its config says decoder=False, as an encoder's weights do")
        return self.decoder

    def _risen(self, decoder: Decoder, features: list[Tensor], chance: Chance | None) -> list[Tensor]:
        if len(features) != len(self.config.features):
            raise ValueError(f"decode needs a map of each of {len(self.config.features)} stages, got {len(features)}")
        skips = [] if self.config.skips == "none" else features[-2::-1]
        if self.config.skips == "dropped" and self.training and chance is not None:
            # Left out whole and not made up for: what is there in evaluation also comes up in training, all of them.
            stay = chance.purpose("skips").uniform(len(skips)) >= self.config.skip_drop
            skips = [skip * stay[:, level, None, None, None, None] for level, skip in enumerate(skips)]
        return decoder(features[-1], skips)
