"""Keep embeddings apart (Sablayrolles et al. 2019, Spreading vectors for similarity search, equation 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def koleo(embedding: Float[Tensor, "batch dim"], *, eps: float = 1e-8) -> Float[Tensor, ""]:
    """Minus the mean log distance to the nearest neighbour on the unit sphere. Needs two rows or more."""
    unit = F.normalize(embedding.float(), dim=-1)
    # In a lower precision another row would often pass for the nearest.
    with torch.no_grad(), torch.autocast(unit.device.type, enabled=False):
        # Not -1: the other of two rows may lie exactly opposite, and nobody is his own neighbour.
        nearest = (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(dim=-1)
    return -(torch.linalg.vector_norm(unit - unit[nearest], dim=-1) + eps).log().mean()
