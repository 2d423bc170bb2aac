"""Changes of intensity and mirror images, as drawn plans applied to a view in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How far a view may differ from the scan. Zero switches a change off.

    Mirroring left and right teaches that the liver may lie on either side, so no axis is mirrored by default.
    """

    flip_axes: tuple[int, ...] = ()
    """Axes (0 = R, 1 = A, 2 = S) that are mirrored half of the time."""
    noise_std: float = 0.0
    """Largest standard deviation of added Gaussian noise, in window units."""
    gamma: float = 0.0
    """Exponent drawn from [1 - gamma, 1 + gamma]."""
    shift: float = 0.0
    """Ends of the window move by up to this share of its width."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: an axis that is none, or an amount outside its range.
        """
        if not set(self.flip_axes) <= {0, 1, 2}:
            raise ValueError(f"flip_axes are among 0, 1, 2, got {self.flip_axes}")
        if not (0 <= self.noise_std and 0 <= self.gamma < 1 and 0 <= self.shift < 0.5):  # noqa: PLR2004
            raise ValueError("need noise_std >= 0, 0 <= gamma < 1 and 0 <= shift < 0.5")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentPlan:
    """What was drawn for one view; applying it twice gives the same voxels."""

    flip_axes: tuple[int, ...]
    noise_std: float
    gamma: float
    low: float
    high: float
    seed: int


def draw_augment(config: AugmentConfig, rng: np.random.Generator) -> AugmentPlan:
    """Draw one plan."""
    return AugmentPlan(
        flip_axes=tuple(axis for axis in config.flip_axes if rng.random() < 0.5),  # noqa: PLR2004 - a fair coin
        noise_std=float(rng.uniform(0, config.noise_std)),
        gamma=float(rng.uniform(1 - config.gamma, 1 + config.gamma)),
        low=float(rng.uniform(-config.shift, config.shift)),
        high=float(rng.uniform(1 - config.shift, 1 + config.shift)),
        seed=int(rng.integers(2**62)),
    )


def apply_augment(view: Float[Tensor, "channel i j k"], plan: AugmentPlan) -> Float[Tensor, "channel i j k"]:
    """Mirror, shift the window, bend it, add noise; the result stays in [0, 1]."""
    if plan.flip_axes:
        view = view.flip([1 + axis for axis in plan.flip_axes])
    view = ((view - plan.low) / (plan.high - plan.low)).clamp(0.0, 1.0)
    if plan.gamma != 1:
        view = view**plan.gamma
    if plan.noise_std > 0:
        generator = torch.Generator().manual_seed(plan.seed)
        view = view + plan.noise_std * torch.randn(view.shape, generator=generator)
    return view.clamp(0.0, 1.0)
