"""The U-Net that whoever needs no pretraining would train: nnU-Net's shape, planned for a spacing and a patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from voxelstem.chance import Chance
from voxelstem.errors import ConfigError

Triple = tuple[int, int, int]
SMALLEST = 4
"""Cells along an axis that halving leaves at least."""
FIRST, MOST = 32, 320
"""Channels of the first level, doubled with every level up to the most."""
FEWEST_LEVELS = 3
"""Of MONAI's network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnetPlan:
    """Kernels and strides of each level, from the finest to the coarsest."""

    kernels: tuple[Triple, ...]
    strides: tuple[Triple, ...]

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each level."""
        return tuple(min(FIRST * 2**level, MOST) for level in range(len(self.strides)))


def plan_unet(spacing_mm: tuple[float, float, float], patch_ijk: Triple) -> UnetPlan:
    """Plan kernels and strides as nnU-Net does (Isensee et al. 2021, supplementary note 2, "Architecture topology").

    Of the axes that have room, those are halved whose voxels are less than twice as long as the finest of them, so that
    spacings come together; an axis is convolved once its voxels are less than twice as long as the finest ones. An axis
    with an odd number of cells is not halved further, because windows here are the InputSpec's and are not padded.

    >>> plan_unet((1.0, 1.0, 4.0), (64, 64, 16)).strides
    ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2))

    Raises:
        ValueError: a spacing or patch without extent.
    """
    if min(spacing_mm) <= 0 or min(patch_ijk) < 1:
        raise ValueError(f"spacing and patch must be positive, got {spacing_mm} mm and {patch_ijk}")
    spacing, size = list(spacing_mm), list(patch_ijk)
    kernels: list[Triple] = []
    strides: list[Triple] = [(1, 1, 1)]
    wide = [False] * 3
    while True:
        wide = [known or edge < 2 * min(spacing) for known, edge in zip(wide, spacing, strict=True)]
        kernels.append(_triple([3 if known else 1 for known in wide]))
        able = [axis for axis in range(3) if size[axis] % 2 == 0 and size[axis] >= 2 * SMALLEST]
        finest = min((spacing[axis] for axis in able), default=0.0)
        able = [axis for axis in able if spacing[axis] < 2 * finest]
        # One axis alone is halved only where it has room to spare.
        if not able or (len(able) == 1 and size[able[0]] < 3 * SMALLEST):
            break
        strides.append(_triple([2 if axis in able else 1 for axis in range(3)]))
        for axis in able:
            spacing[axis] *= 2
            size[axis] //= 2
    # Everything meets in the coarsest level.
    return UnetPlan(kernels=(*kernels[:-1], (3, 3, 3)), strides=tuple(strides))


class ScratchUnet(nn.Module):
    """MONAI's DynUNet without anything pretrained, in the form that `finetune.loop.fit` trains.

    Plain convolutions, instance norm and leaky ReLU, as nnU-Net has them; no deep supervision.
    """

    def __init__(
        self, *, contrasts: int, out: int, spacing_mm: tuple[float, float, float], patch_ijk: Triple, seed: int
    ) -> None:
        """Draw the network under the seed.

        Raises:
            ConfigError: the patch is too small for a U-Net.
        """
        from monai.networks.nets.dynunet import DynUNet

        super().__init__()
        self.block_ijk, self.plan = patch_ijk, plan_unet(spacing_mm, patch_ijk)
        if len(self.plan.strides) < FEWEST_LEVELS:
            raise ConfigError(
                f"a patch of {patch_ijk} voxels can be halved {len(self.plan.strides) - 1} times: too few for a U-Net",
                hint="a U-Net needs 16 voxels along two axes at least",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = DynUNet(
                spatial_dims=3,
                in_channels=contrasts,
                out_channels=out,
                kernel_size=self.plan.kernels,
                strides=self.plan.strides,
                upsample_kernel_size=self.plan.strides[1:],
                filters=self.plan.channels,
            )

    def forward(
        self, x: Float[Tensor, "row contrast i j k"], *, keys: Chance | None = None
    ) -> Float[Tensor, "row kind i j k"]:
        """Logits of every voxel; nothing is left out at random, so `keys` change nothing."""
        del keys
        return self.net(x)

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Nothing is pretrained; everything is trained alike."""
        return [], list(self.parameters())

    def depths(self) -> dict[nn.Parameter, int]:
        """No layer is slower than another."""
        return {}


def _triple(values: list[int]) -> Triple:
    i, j, k = values
    return i, j, k
