"""Masked autoencoding: reconstruct what was hidden (He et al. 2021)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def normalise_patches(voxels: Float[Tensor, "*rows voxel"], *, eps: float = 1e-6) -> Float[Tensor, "*rows voxel"]:
    """Each patch to mean 0 and variance 1 (He et al. 2021, section 3: per-patch normalised targets)."""
    mean = voxels.mean(dim=-1, keepdim=True)
    variance = voxels.var(dim=-1, keepdim=True, unbiased=False)
    return (voxels - mean) / (variance + eps).sqrt()
