"""Images made of label maps: any contrast, bias, sharpness and noise, so that only anatomy is left to be learned.

Billot et al. 2023 (SynthSeg): each class gets a mean and a spread of its own for each image, drawn without regard to
what a scanner would show. What was drawn is a plan; applying it twice gives the same voxels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from voxelstem.chance import Chance
from voxelstem.views.blur import blur

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig:
    """How far images differ that are made of one label map. Intensities are in units of the range of class means."""

    spread: Range = (0.01, 0.12)
    """Standard deviation of the voxels of a class."""
    air_p: float = 0.5
    """Chance that the background is 0 without spread, as in a scan whose head was cut out; else it is a class."""
    bias: float = 0.3
    """Largest standard deviation of the logarithm of the bias field."""
    bias_cells: int = 4
    """Points along each axis between which the bias is smooth."""
    blur_sigma: Range = (0.3, 1.0)
    """Width of the scanner's blur along each axis, in voxels."""
    thick: float = 3.0
    """Slices are up to so many voxels thick."""
    thick_p: float = 0.5
    """Chance of thick slices, along an axis that is drawn."""
    noise: float = 0.05
    """Largest standard deviation of the noise that is added after the blur."""
    gamma: float = 0.3
    """Largest distance of the exponent's logarithm from 0."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a range that runs from large to small, a negative amount, or a chance that is none.
        """
        if not (0 <= self.spread[0] <= self.spread[1] < math.inf and 0 < self.blur_sigma[0] <= self.blur_sigma[1]):
            raise ValueError(f"need 0 <= low <= high, got spread={self.spread} and blur_sigma={self.blur_sigma}")
        if min(self.bias, self.noise, self.gamma) < 0 or self.thick < 1 or self.bias_cells < 2:  # noqa: PLR2004
            raise ValueError("need bias, noise and gamma >= 0, thick >= 1 and bias_cells >= 2")
        if not (0 <= self.air_p <= 1 and 0 <= self.thick_p <= 1):
            raise ValueError(f"air_p and thick_p must be in [0, 1], got {self.air_p} and {self.thick_p}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SynthesisPlan:
    """What was drawn for each row."""

    means: Float[Tensor, "row class"]
    spreads: Float[Tensor, "row class"]
    bias: Float[Tensor, "row cell cell cell"]
    """Logarithm of the bias field at its points."""
    blur_sigma: Float[Tensor, "row 3"]
    thick: Float[Tensor, "row 3"]
    """Voxels in a slice along each axis; 1 along all but one."""
    noise: Float[Tensor, " row"]
    gamma: Float[Tensor, " row"]
    chance: Chance
    """Of the voxels: grain and noise."""


def draw_synthesis(config: SynthesisConfig, chance: Chance, *, classes: int) -> SynthesisPlan:
    """Draw a plan for each row of `chance`; labels run from 0, the background, to `classes` - 1."""
    one = chance.purpose("synthesis").uniform(8)
    looks = chance.purpose("looks").uniform(2 * classes)
    means, spreads = looks[:, :classes], _within(config.spread, looks[:, classes:])
    air = (one[:, 0] < config.air_p)[:, None] & (torch.arange(classes, device=one.device) == 0)
    cells = config.bias_cells
    field = chance.purpose("bias").normal(cells**3).reshape(-1, cells, cells, cells)
    along = torch.arange(3, device=one.device) == (3 * one[:, 1, None]).long()
    thick = torch.where(one[:, 2] < config.thick_p, 1 + (config.thick - 1) * one[:, 3], 1.0)
    return SynthesisPlan(
        means=torch.where(air, 0.0, means),
        spreads=torch.where(air, 0.0, spreads),
        bias=field * (config.bias * one[:, 4])[:, None, None, None],
        blur_sigma=_within(config.blur_sigma, chance.purpose("sharpness").uniform(3)),
        thick=torch.where(along, thick[:, None], 1.0),
        noise=config.noise * one[:, 5],
        gamma=(config.gamma * (2 * one[:, 6] - 1)).exp(),
        chance=chance,
    )


def apply_synthesis(labels: Int[Tensor, "row i j k"], plan: SynthesisPlan) -> Float[Tensor, "row 1 i j k"]:
    """Make an image of each label map, from 0 to 1.

    Class means and grain, bias, blur, thick slices, noise, then each image stretched to [0, 1] and bent.

    Raises:
        ValueError: as many plans as label maps are needed, or a label is negative or beyond the plan's classes.
    """
    rows, classes = plan.means.shape
    if len(labels) != rows:
        raise ValueError(f"need one plan for each of the {len(labels)} label maps, got {rows}")
    low, high = (int(each) for each in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must run from 0 to {classes - 1}, got {low} to {high}")
    flat = labels.flatten(1).long()
    grain = plan.chance.purpose("grain").normal(flat.shape[1])
    images = (plan.means.gather(1, flat) + plan.spreads.gather(1, flat) * grain).reshape(rows, 1, *labels.shape[1:])
    images = images * _bias(plan.bias, (labels.shape[1], labels.shape[2], labels.shape[3]))
    images = _in_slices(blur(images, plan.blur_sigma), plan.thick)
    noise = plan.chance.purpose("noise").normal(flat.shape[1]).reshape(images.shape)
    images = images + plan.noise[:, None, None, None, None] * noise
    low_value, high_value = images.amin((1, 2, 3, 4), keepdim=True), images.amax((1, 2, 3, 4), keepdim=True)
    images = (images - low_value) / (high_value - low_value).clamp_min(torch.finfo(images.dtype).tiny)
    return images ** plan.gamma[:, None, None, None, None]


def _within(limits: Range, drawn: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * drawn


def _bias(points: Float[Tensor, "row cell cell cell"], shape: tuple[int, int, int]) -> Float[Tensor, "row 1 i j k"]:
    return F.interpolate(points[:, None], size=shape, mode="trilinear", align_corners=True).exp()


def _in_slices(images: Float[Tensor, "row 1 i j k"], thick: Float[Tensor, "row 3"]) -> Float[Tensor, "row 1 i j k"]:
    """What is left of each image when it was taken in thick slices and interpolated back."""
    shape = images.shape[2:]
    made: list[Tensor] = []
    for image, edges in zip(images, thick.tolist(), strict=True):
        coarse = [max(1, round(size / edge)) for size, edge in zip(shape, edges, strict=True)]
        if list(shape) == coarse:
            made.append(image)
            continue
        slices = F.interpolate(image[None], size=coarse, mode="area")
        made.append(F.interpolate(slices, size=shape, mode="trilinear", align_corners=False)[0])
    return torch.stack(made)
