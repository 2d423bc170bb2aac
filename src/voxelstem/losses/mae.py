"""Masked autoencoding: reconstruct what was hidden (He et al. 2021)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def normalise_patches(voxels: Float[Tensor, "*rows voxel"], *, eps: float = 1e-6) -> Float[Tensor, "*rows voxel"]:
    """Each patch to mean 0 and variance 1 (He et al. 2021, section 3: per-patch normalised targets).

    A patch of one value becomes zero: there is nothing in it but its mean.
    """
    mean = voxels.mean(dim=-1, keepdim=True)
    variance = voxels.var(dim=-1, keepdim=True, unbiased=False)
    return (voxels - mean) / (variance + eps).sqrt()


def reconstruction(
    predicted: Float[Tensor, "*rows voxel"], voxels: Float[Tensor, "*rows voxel"], *, normalise: bool
) -> Float[Tensor, ""]:
    """Mean squared error over the voxels of hidden patches, each patch normalised first or as it is."""
    target = normalise_patches(voxels.float()) if normalise else voxels.float()
    return (predicted.float() - target).square().mean()
