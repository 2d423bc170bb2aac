"""What convolutional backbones share: a convolution with its norm, and how one keeps the contract of a backbone.

A convolution has no place for a missing patch, so what is hidden is emptied to 0: the low end of a window, and the
mean of a volume where the normalisation is by z-score.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.chance import Chance
from voxelstem.protocols import Backbone, Tokens

EPS = 1e-5
SLOPE = 0.01
"""Of the leaky ReLU below 0, as in nnU-Net."""
Triple = tuple[int, int, int]


class InstanceNorm(nn.Module):
    """Every channel of every row to mean 0 and variance 1 over its own voxels, then scaled and shifted.

    Ulyanov et al. 2016 (arXiv 1607.08022). Of a map of a single voxel nothing is left but the shift; torch's own module
    refuses such a map.
    """

    def __init__(self, channels: int) -> None:
        """Scale 1 and shift 0."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row channel i j k"]:
        """Return the maps, normalised."""
        if x.device.type == "cpu" and x.is_contiguous():
            # A group for each channel: the same numbers in a half to a third of the time. With channels last torch
            # takes the variance as a difference of large squares there, and on GPUs one kernel block a channel is slow.
            rows, channels = x.shape[:2]
            voxels = math.prod(x.shape[2:])
            return torch.native_group_norm(x, self.weight, self.bias, rows, channels, voxels, channels, EPS)[0]
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, EPS, True)


class ConvNorm(nn.Module):
    """A convolution and its norm, under nnU-Net's names, and a leaky ReLU where `active`."""

    def __init__(
        self, channels: int, width: int, *, edge: int = 3, stride: int = 1, bias: bool = True, active: bool = True
    ) -> None:
        """`channels` in, `width` out, kernel of `edge` voxels along each axis."""
        super().__init__()
        self.conv = nn.Conv3d(channels, width, edge, stride=stride, padding=edge // 2, bias=bias)
        self.norm = InstanceNorm(width)
        self.active = active

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row width a b c"]:
        """Return the features, on a coarser grid where it strides."""
        x = self.norm(self.conv(x))
        return F.leaky_relu(x, SLOPE, inplace=True) if self.active else x


def draw_convolutions(network: nn.Module) -> None:
    """Draw the weights of every convolution from torch's generator by He et al. 2015, for leaky ReLUs; biases are 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def resize_convolutions(network: nn.Module) -> None:
    """Give what stands before a norm the size of a fresh draw, channel by channel; the network answers as before.

    A norm undoes the size of what comes before it (but for its epsilon), so only the pace of learning changes: a rate
    moves large weights little. The expected norm of a channel drawn by He et al. 2015 is the same for every kernel.
    """
    drawn = math.sqrt(2 / (1 + SLOPE**2))
    for module in network.modules():
        if isinstance(module, ConvNorm):
            norms = module.conv.weight.flatten(1).norm(dim=1)
            share = torch.where(norms > 0, drawn / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1.0)
            module.conv.weight.mul_(share.view(-1, 1, 1, 1, 1))
            if module.conv.bias is not None:
                module.conv.bias.mul_(share)


def cells_of(blocks: Float[Tensor, "row channel i j k"], patch_ijk: Triple) -> Triple:
    """How many patches lie along each axis of a block.

    Raises:
        ValueError: patches do not fill the block.
    """
    sizes = tuple(blocks.shape[-3:])
    if any(size < 1 or size % patch for size, patch in zip(sizes, patch_ijk, strict=True)):
        raise ValueError(f"patches of {' x '.join(map(str, patch_ijk))} voxels must fill a block, got {sizes}")
    i, j, k = (size // patch for size, patch in zip(sizes, patch_ijk, strict=True))
    return i, j, k


def emptied(
    blocks: Float[Tensor, "row channel i j k"], patches: Bool[Tensor, "row patch"], patch_ijk: Triple
) -> Float[Tensor, "row channel i j k"]:
    """The blocks with 0 in place of the named patches (C-order)."""
    voxels = patches.unflatten(1, cells_of(blocks, patch_ijk))
    for axis, patch in enumerate(patch_ijk, start=1):
        voxels = voxels.repeat_interleave(patch, dim=axis)
    return blocks.masked_fill(voxels[:, None], 0.0)


def hidden(
    blocks: Float[Tensor, "row channel i j k"],
    patch_ijk: Triple,
    *,
    masked: Bool[Tensor, "row patch"] | None,
    keep: Int[Tensor, "row kept"] | None,
) -> Float[Tensor, "row channel i j k"]:
    """The blocks with 0 in place of what is `masked`, and of what `keep` does not name.

    Raises:
        ValueError: patches do not fill a block.
    """
    count = math.prod(cells_of(blocks, patch_ijk))
    if masked is not None:
        blocks = emptied(blocks, masked, patch_ijk)
    if keep is not None:
        gone = torch.ones(len(blocks), count, dtype=torch.bool, device=blocks.device)
        blocks = emptied(blocks, gone.scatter(1, keep, value=False), patch_ijk)
    return blocks


def as_tokens(
    maps: Float[Tensor, "row dim a b c"], *, keep: Int[Tensor, "row kept"] | None
) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
    """The cells of a feature map as patch tokens in C-order, of `keep` only, and their mean as cls."""
    tokens = maps.flatten(2).transpose(1, 2)
    if keep is not None:
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
    return tokens.mean(dim=1), tokens


def in_parts(
    maps_of: Callable[[Tensor], Tensor], blocks: Float[Tensor, "row channel i j k"], voxels: int
) -> Float[Tensor, "row dim a b c"]:
    """Feature maps of the blocks, of about `voxels` voxels at a time, which bounds the memory of long batches."""
    rows = max(1, voxels // math.prod(blocks.shape[-3:]))
    return torch.cat([maps_of(part) for part in blocks.split(rows)]) if rows < len(blocks) else maps_of(blocks)


def encode_each(
    backbone: Backbone,
    blocks: Float[Tensor, "batch n channel i j k"],
    *,
    masked: Bool[Tensor, "batch n patch"] | None,
    keep: Int[Tensor, "batch n kept"] | None,
    chance: Chance | None,
) -> Tokens:
    """What `Backbone.encode` is of a backbone that looks at each block by itself."""
    batch, n = blocks.shape[:2]
    cls, tokens = backbone.encode_blocks(
        blocks.flatten(0, 1),
        masked=None if masked is None else masked.flatten(0, 1),
        keep=None if keep is None else keep.flatten(0, 1),
        chance=None if chance is None else chance.blocks(n),
    )
    return Tokens(cls=cls.unflatten(0, (batch, n)), patches=tokens.unflatten(0, (batch, n)))


def no_scan_level(name: str) -> ValueError:
    """The refusal of `Backbone.look_at_scan` where there is no second level."""
    return ValueError(f"this backbone has no scan level: {name} looks at each block by itself")
