"""One vector of a scan from inside a tuned network: what says whether a scan is unlike those that it was trained on.

Its answers do not tell: a network may be as sure of a knee as of the heads it has seen. Its features are what Sun et
al. 2022 (section 3) measure distances between.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from voxelstem.finetune.cases import Seen
from voxelstem.finetune.network import Tuned
from voxelstem.study import InputSpec
from voxelstem.views import slide


@torch.inference_mode()
def vector_of(net: Tuned, seen: Seen, spec: InputSpec) -> Float[np.ndarray, " dim"]:
    """Cls and the mean patch of the backbone, averaged over as few windows as cover the scan.

    Of a U-Net both are the mean of the bottleneck. Contrasts that go through the network one by one stand side by side.
    One window is held at a time, and no decoder is asked.
    """
    device = next(net.parameters()).device
    i, j, k = seen.image.shape[1:]
    lows = slide.places((i, j, k), spec.block_ijk, overlap=0.0)
    total = torch.zeros(0, dtype=torch.float64)
    for low in lows:
        box = tuple(slice(start, start + side) for start, side in zip(low, spec.block_ijk, strict=True))
        block = seen.image[(slice(None), *box)].to(device)
        cls, patches = net.backbone.encode_blocks(block[:, None] if net.late else block[None])
        row = torch.cat([cls, patches.mean(dim=1)], dim=1).flatten().double().cpu()
        total = total + row if total.numel() else row
    return (total / len(lows)).float().numpy()
