"""What `dynamic-network-architectures` and our U-Net are both asked, with weights drawn from the tensors' names.

The peer's answers are kept in `resenc.npz`; `benchmarks/resenc.py --write` makes it, in the peers' environment.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from cases import fill, uniform

ANSWERS = Path(__file__).with_name("resenc.npz")
TOLERANCE = 1e-5

SIZES: dict[str, dict[str, Any]] = {
    # Stages that keep their width and stages that change it, as in ResEnc-L.
    "six": {"features": (2, 4, 6, 8, 10, 10), "depths": (1, 2, 1, 2, 1, 2), "strides": (1, 2, 2, 2, 2, 2)},
    "odd": {"features": (4, 4, 6), "depths": (2, 1, 3), "strides": (1, 2, 3), "channels": 2, "out_channels": 3},
}
BLOCKS = {"six": (64, 64, 64), "odd": (18, 12, 24)}


def weights(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for tensors of these names and shapes."""
    return fill(f"resenc/{name}", {key: tuple(tensor.shape) for key, tensor in state.items()})


def block(name: str) -> Tensor:
    """Two rows of a block."""
    shape = (2, SIZES[name].get("channels", 1), *BLOCKS[name])
    return torch.from_numpy(2 * uniform(f"resenc block {name}", math.prod(shape)).reshape(shape))
