"""A backbone seen through several of its layers at once: early ones keep what late ones lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from voxelstem.errors import ConfigError


class Layered:
    """The first level of a frozen backbone, its cls and patch tokens after the named layers side by side.

    As the linear heads of DINOv2 see a network (Oquab et al. 2023, section 7). `dim` grows with the number of layers.
    """

    has_scan_level = False

    def __init__(self, backbone: Any, layers: Sequence[int]) -> None:
        """Name the layers, counted from 1.

        Raises:
            ConfigError: a backbone that does not show its layers, or one that it does not have.
        """
        depth = backbone.config.block.depth if hasattr(backbone, "intermediates") else 0
        if not depth:
            raise ConfigError("this backbone does not show its layers", hint="leave see.layers out")
        if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(1, depth + 1)):
            raise ConfigError(
                f"see.layers are different numbers from 1 to {depth}, got {tuple(layers)}",
                hint=f"name layers that this network has, such as see.layers='[{depth}]', or leave it out",
            )
        self.backbone, self.layers = backbone, tuple(layers)
        self.config, self.patch_ijk = backbone.config, backbone.patch_ijk
        self.dim = backbone.dim * len(self.layers)

    def encode_blocks(
        self, blocks: Float[Tensor, "row channel i j k"]
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """Cls and patch tokens of each block, in the order of the layers."""
        found = self.backbone.intermediates(blocks, self.layers)
        cls, tokens = (torch.cat(side, dim=-1) for side in zip(*found, strict=True))
        return cls, tokens
