"""Changes of intensity and mirror images, as drawn plans applied to many views in [0, 1] at once.

Mirroring is drawn here and done where the view is resampled (`views.resample.sample`), where it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxelstem.views.blur import Edge, blur

Range = tuple[float, float]
Ranges = tuple[Range, Range, Range]
Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How far a view may differ from the scan, and how often it does. By default it does not.

    Changes come in this order: mirror, smooth or sharpen, gamma, noise, window. Each is made with a chance of its own
    (`..._p`). Mirroring left and right teaches that the liver may lie on either side, so no axis is mirrored by
    default. SPECTRE's stage 1 is all of it: three axes, `smooth_p` and `sharpen_p` 0.125 with `blur_sigma` 1.5 to 2.5,
    1.5 to 2.5 and 0.75 to 1.25 and `sharpen_sigma` 0.5 to 1, 0.5 to 1 and 0.25 to 0.5, `gamma` 0.1, `noise_std` 0.1 and
    `shift` (0, 0.4), each at 0.25, with `clip` off and the `edge` in air.
    """

    flip_axes: tuple[int, ...] = ()
    """Axes (0 = R, 1 = A, 2 = S) that may be mirrored."""
    flip_p: float = 0.5
    """Chance of each of them."""
    smooth_p: float = 0.0
    """Chance of a Gaussian blur."""
    sharpen_p: float = 0.0
    """Chance of sharpening; a view is smoothed, or sharpened, or neither."""
    blur_sigma: Ranges = ((0.5, 1.0), (0.5, 1.0), (0.5, 1.0))
    """Width of the blur along each axis, in voxels of the view."""
    sharpen_sigma: Ranges = ((0.25, 0.5), (0.25, 0.5), (0.25, 0.5))
    """Width of the second blur, whose difference from the first is what sharpening adds."""
    sharpen_amount: Range = (10.0, 30.0)
    """How many times it is added."""
    edge: Edge = "inside"
    """What a blur sees beyond the edge of the view: nothing (`inside`) or zeros (`air`)."""
    gamma: float = 0.0
    """Exponent drawn from [1 - gamma, 1 + gamma]."""
    gamma_p: float = 1.0
    noise_std: float = 0.0
    """Largest standard deviation of added Gaussian noise, in window units."""
    noise_p: float = 1.0
    shift: float | Range = 0.0
    """Ends of the window move by up to this share of its width; of two numbers the first counts outwards and the second
    inwards."""
    shift_p: float = 1.0
    clip: bool = True
    """Keep a view in [0, 1] after every change. Otherwise only moving the window cuts off what sharpening and noise
    have put outside, and gamma bends between the view's own lowest and highest value."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: an axis that is none, an amount outside its range, or a chance that is none.
        """
        if not set(self.flip_axes) <= {0, 1, 2}:
            raise ValueError(f"flip_axes are among 0, 1, 2, got {self.flip_axes}")
        outwards, inwards = self.shifts
        numbers = (0 <= self.noise_std < math.inf, 0 <= self.gamma < 1, 0 <= outwards < math.inf, 0 <= inwards < 0.5)  # noqa: PLR2004
        if not all(numbers):
            raise ValueError("need noise_std >= 0, 0 <= gamma < 1 and 0 <= shift < 0.5 (outwards any number)")
        chances = {name: getattr(self, name) for name in ("flip_p", "smooth_p", "sharpen_p", *_CHANCES)}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {chance}")
        if self.smooth_p + self.sharpen_p > 1:
            raise ValueError(f"smooth_p + sharpen_p must be <= 1, got {self.smooth_p} + {self.sharpen_p}")
        for name in ("blur_sigma", "sharpen_sigma"):
            if not all(0 < low <= high < math.inf for low, high in getattr(self, name)):
                raise ValueError(f"{name} needs 0 < low <= high along each axis, got {getattr(self, name)}")
        if not 0 <= self.sharpen_amount[0] <= self.sharpen_amount[1] < math.inf:
            raise ValueError(f"sharpen_amount needs 0 <= low <= high, got {self.sharpen_amount}")

    @property
    def shifts(self) -> Range:
        """How far the ends of the window move outwards and inwards."""
        return self.shift if isinstance(self.shift, tuple) else (self.shift, self.shift)

    @property
    def breaks_laterality(self) -> bool:
        """Whether left and right may change sides."""
        return 0 in self.flip_axes and self.flip_p > 0


_CHANCES = ("gamma_p", "noise_p", "shift_p")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentPlan:
    """What was drawn for one view; applying it twice gives the same voxels. The defaults change nothing."""

    flip_axes: tuple[int, ...] = ()
    blur_sigma: Triple | None = None
    """Widths of the blur; None: there is none."""
    sharpen_sigma: Triple = (0.0, 0.0, 0.0)
    sharpen_amount: float = 0.0
    """0: the blur stays a blur."""
    gamma: float = 1.0
    noise_std: float = 0.0
    low: float = 0.0
    high: float = 1.0
    seed: int = 0
    """Of the noise."""


def draw_augment(config: AugmentConfig, rng: np.random.Generator) -> AugmentPlan:
    """Draw one plan."""
    # All numbers are drawn whatever comes of them: one more change leaves the plans of the others as they were.
    flips, (blurred, bent, noisy, moved) = rng.random(3), rng.random(4)
    widths = [[float(rng.uniform(*axis)) for axis in axes] for axes in (config.blur_sigma, config.sharpen_sigma)]
    amount, (outwards, inwards) = float(rng.uniform(*config.sharpen_amount)), config.shifts
    gamma, noise_std = float(rng.uniform(1 - config.gamma, 1 + config.gamma)), float(rng.uniform(0, config.noise_std))
    low, high = float(rng.uniform(-outwards, inwards)), float(rng.uniform(1 - inwards, 1 + outwards))
    sharp = blurred < config.sharpen_p
    plain = not sharp and blurred >= config.sharpen_p + config.smooth_p
    first, second = ((i, j, k) for i, j, k in widths)
    return AugmentPlan(
        flip_axes=tuple(axis for axis in config.flip_axes if flips[axis] < config.flip_p),
        blur_sigma=None if plain else first,
        sharpen_sigma=second if sharp else (0.0, 0.0, 0.0),
        sharpen_amount=amount if sharp else 0.0,
        gamma=gamma if bent < config.gamma_p else 1.0,
        noise_std=noise_std if noisy < config.noise_p else 0.0,
        low=low if moved < config.shift_p else 0.0,
        high=high if moved < config.shift_p else 1.0,
        seed=int(rng.integers(2**62)),
    )


Views = Float[Tensor, "row channel i j k"]


def apply_augment(views: Views, plans: Sequence[AugmentPlan], config: AugmentConfig) -> Views:
    """Smooth or sharpen, bend, add noise and move the window of each row by its plan, on the views' device.

    Of `config` only `edge` and `clip` count: what was drawn is in the plans. Views that change are changed in place;
    mirroring is left to `views.resample.sample`.

    Raises:
        ValueError: as many plans as views are needed.
    """
    if len(plans) != len(views):
        raise ValueError(f"need one plan for each of the {len(views)} views, got {len(plans)}")

    def change(rows: list[int], made: Callable[[Views, list[AugmentPlan]], Views], *, bounded: bool) -> None:
        if rows:
            found = made(views[rows], [plans[row] for row in rows])
            views[rows] = found.clamp_(0.0, 1.0) if config.clip and not bounded else found

    blurred = [row for row, plan in enumerate(plans) if plan.blur_sigma]
    change(blurred, lambda some, how: _blurred(some, how, config.edge), bounded=False)
    bent = [row for row, plan in enumerate(plans) if plan.gamma != 1]
    change(bent, _bent_in_window if config.clip else _bent_in_view, bounded=True)
    change([row for row, plan in enumerate(plans) if plan.noise_std > 0], _noisy, bounded=False)
    moved = [row for row, plan in enumerate(plans) if (plan.low, plan.high) != (0.0, 1.0)]
    change(moved, _moved, bounded=True)
    return views


def _each(values: list[float], like: Views) -> Float[Tensor, "row 1 1 1 1"]:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None, None, None]


def _blurred(views: Views, plans: list[AugmentPlan], edge: Edge) -> Views:
    """Gaussian blur; sharpened is `b + amount * (b - blur(b))` of what is blurred once."""
    sigmas = [plan.blur_sigma or (0.0, 0.0, 0.0) for plan in plans]
    result = blur(views, torch.tensor(sigmas, device=views.device), edge=edge)
    rows = [row for row, plan in enumerate(plans) if plan.sharpen_amount]
    if rows:
        once, seconds = result[rows], [plans[row].sharpen_sigma for row in rows]
        twice = blur(once, torch.tensor(seconds, device=views.device), edge=edge)
        result[rows] = once + _each([plans[row].sharpen_amount for row in rows], views) * (once - twice)
    return result


def _bent_in_window(views: Views, plans: list[AugmentPlan]) -> Views:
    return views.pow_(_each([plan.gamma for plan in plans], views))


def _bent_in_view(views: Views, plans: list[AugmentPlan]) -> Views:
    low, high = views.amin((1, 2, 3, 4), keepdim=True), views.amax((1, 2, 3, 4), keepdim=True)
    span = (high - low).clamp_min(torch.finfo(views.dtype).tiny)
    return _bent_in_window((views - low) / span, plans) * span + low


def _noisy(views: Views, plans: list[AugmentPlan]) -> Views:
    for view, plan in zip(views, plans, strict=True):
        generator = torch.Generator(views.device).manual_seed(plan.seed)
        noise = torch.randn(view.shape, generator=generator, device=view.device, dtype=view.dtype)
        view.add_(noise, alpha=plan.noise_std)
    return views


def _moved(views: Views, plans: list[AugmentPlan]) -> Views:
    low = _each([plan.low for plan in plans], views)
    width = _each([plan.high - plan.low for plan in plans], views)
    return views.sub_(low).div_(width).clamp_(0.0, 1.0)
