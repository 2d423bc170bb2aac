"""An inflated 3D residual network: a 2D ResNet whose kernels were given depth, as Merlin's image encoder.

After I3D (arXiv 1705.07750) on ResNet (arXiv 1512.03385, stride in the 3 x 3 convolution), in the shape of Merlin
(arXiv 2406.06512): along k (feet to head) the stem neither strides nor reaches as far as along i and j, so a cell of
the last feature map covers 32 x 32 x 16 voxels. The cells are the patches, their mean is the cls token; there is no
scan level. Convolutions run on (i, j, k) as everything here does; Merlin's run on (k, i, j).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from voxelstem.backbones.convolution import as_tokens, encode_each, hidden, in_parts, no_scan_level
from voxelstem.chance import Chance
from voxelstem.protocols import Tokens

PATCH_IJK: tuple[int, int, int] = (32, 32, 16)
VOXELS_AT_ONCE = 224 * 224 * 160
"""How many voxels are looked at in one pass outside of training: about 2 GiB of feature maps at width 64."""
EXPAND = 4
"""How many times wider a bottleneck's output is than its middle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class I3ResNetConfig:
    """Sizes of the network; as they stand, ResNet-152."""

    name: str = "i3resnet"
    channels: int = 1
    width: int = 64
    """Channels after the stem; a token has 32 times as many."""
    depths: tuple[int, int, int, int] = (3, 8, 36, 3)
    """Bottlenecks in each stage."""
    block_ijk: tuple[int, int, int] = (224, 224, 160)

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no channel, an empty stage, or a block that patches of 32 x 32 x 16 voxels do not fill.
        """
        if min(self.channels, self.width, *self.depths) < 1:
            raise ValueError(
                f"channels, width and every depth must be >= 1, got {self.channels}, {self.width} and {self.depths}"
            )
        if any(block < 1 or block % patch for block, patch in zip(self.block_ijk, PATCH_IJK, strict=True)):
            raise ValueError(f"patches of {PATCH_IJK} voxels must fill block_ijk, got {self.block_ijk}")


class Bottleneck(nn.Module):
    """Narrow, look around, widen, and add what came in."""

    def __init__(self, channels: int, width: int, *, stride: int, branch_gain: float) -> None:
        """`branch_gain` is the first value of the last norm's gain; a stride or another width needs a shortcut."""
        super().__init__()
        self.narrow = nn.Conv3d(channels, width, 1, bias=False)
        self.narrow_norm = nn.BatchNorm3d(width)
        self.look = nn.Conv3d(width, width, 3, stride=stride, padding=1, bias=False)
        self.look_norm = nn.BatchNorm3d(width)
        self.widen = nn.Conv3d(width, EXPAND * width, 1, bias=False)
        self.widen_norm = nn.BatchNorm3d(EXPAND * width)
        nn.init.constant_(self.widen_norm.weight, branch_gain)
        self.shortcut: nn.Conv3d | None = None
        self.shortcut_norm: nn.BatchNorm3d | None = None
        if stride > 1 or channels != EXPAND * width:
            self.shortcut = nn.Conv3d(channels, EXPAND * width, 1, stride=stride, bias=False)
            self.shortcut_norm = nn.BatchNorm3d(EXPAND * width)

    def forward(self, x: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row wide a b c"]:
        """Return the features, on a coarser grid where the bottleneck strides."""
        branch = F.relu(self.narrow_norm(self.narrow(x)), inplace=True)
        branch = F.relu(self.look_norm(self.look(branch)), inplace=True)
        branch = self.widen_norm(self.widen(branch))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return F.relu(branch + x, inplace=True)


class I3ResNet(nn.Module):
    """See the module's docstring. Any block size that the patch divides can be encoded."""

    Config = I3ResNetConfig

    def __init__(self, config: I3ResNetConfig) -> None:
        """Make an untrained network; draw it under a fixed torch seed to be able to draw it again.

        Batch norm that has seen no data changes nothing, so the branches begin quieter instead, the more of them
        a stage adds up: an untrained network has outputs of ordinary size.
        """
        super().__init__()
        self.config = config
        self.patch_ijk = PATCH_IJK
        self.dim = 8 * EXPAND * config.width
        self.stem = nn.Conv3d(config.channels, config.width, (7, 7, 3), stride=(2, 2, 1), padding=(3, 3, 1), bias=False)
        self.stem_norm = nn.BatchNorm3d(config.width)
        self.stages = nn.ModuleList()
        channels = config.width
        for stage, depth in enumerate(config.depths):
            width, gain = config.width * 2**stage, 1 / math.sqrt(depth)
            bottlenecks: list[nn.Module] = []
            for number in range(depth):
                stride = 2 if stage and not number else 1
                bottlenecks.append(Bottleneck(channels, width, stride=stride, branch_gain=gain))
                channels = EXPAND * width
            self.stages.append(nn.Sequential(*bottlenecks))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

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
        chance: Chance | None = None,  # noqa: ARG002 - the protocol's; nothing here is left to chance
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """Feature map of each block (windowed to [0, 1]) as patch tokens in C-order, and their mean as cls.

        A convolution has no place for a missing patch: what is `masked`, or outside `keep`, is emptied to 0, the
        low end of the window. With `keep` only those cells come back, and cls is their mean.

        Raises:
            ValueError: blocks that patches of 32 x 32 x 16 voxels do not fill.
        """
        blocks = hidden(blocks, PATCH_IJK, masked=masked, keep=keep)
        # Batch norm must see the whole batch in training; else one large block at a time bounds the memory.
        maps = self._features(blocks) if self.training else in_parts(self._features, blocks, VOXELS_AT_ONCE)
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
        """Depth 0 is the stem, then one for each bottleneck."""
        before = [sum(self.config.depths[:stage]) for stage in range(len(self.config.depths))]
        depths: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            place = name.split(".")
            depth = 1 + before[int(place[1])] + int(place[2]) if place[0] == "stages" else 0
            depths.setdefault(depth, []).append((name, parameter))
        return sorted(depths.items())

    def _features(self, blocks: Float[Tensor, "row channel i j k"]) -> Float[Tensor, "row dim a b c"]:
        x = F.relu(self.stem_norm(self.stem(blocks)), inplace=True)
        x = F.max_pool3d(x, kernel_size=3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return x
