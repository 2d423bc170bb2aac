"""Crops and views as values: draw a plan, keep it, apply it. Positions are millimetres from the scan's low corner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from voxelstem.errors import ConfigError
from voxelstem.resampling import grid_coordinates
from voxelstem.study import InputSpec
from voxelstem.views import resample


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A box of whole voxels that knows where it was."""

    start_ijk: tuple[int, int, int]
    size_ijk: tuple[int, int, int]

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as array slices."""
        i, j, k = (slice(start, start + size) for start, size in zip(self.start_ijk, self.size_ijk, strict=True))
        return i, j, k


def draw_crop(shape_ijk: tuple[int, int, int], size_ijk: tuple[int, int, int], rng: np.random.Generator) -> Crop:
    """Place a box anywhere inside the volume; an axis shorter than the box is taken whole."""
    size = [min(wanted, have) for wanted, have in zip(size_ijk, shape_ijk, strict=True)]
    start = [int(rng.integers(0, have - taken + 1)) for have, taken in zip(shape_ijk, size, strict=True)]
    return Crop(start_ijk=(start[0], start[1], start[2]), size_ijk=(size[0], size[1], size[2]))


def cut(array: Float[np.ndarray, "channel i j k"], crop: Crop) -> Float[np.ndarray, "channel a b c"]:
    """Take the box out of the array. Pure: the same crop always gives the same voxels."""
    return array[(slice(None), *crop.slices)]


Scale = float | tuple[float, float, float]
"""One number for all axes, or one for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewKind:
    """One kind of view: how many, how many voxels, and how large in the patient relative to `spec.spacing_mm`."""

    count: int = 1
    size_ijk: tuple[int, int, int] = (32, 32, 32)
    min_scale: Scale = 1.0
    max_scale: Scale = 1.0
    spread: Literal["log-uniform", "uniform"] = "log-uniform"
    """How scales fill their range: as many halved as doubled, or every millimetre as often as another."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no view, no voxels, or an empty range of scales.
        """
        low, high = self.scales
        if self.count < 0 or min(self.size_ijk) < 1 or not ((low > 0) & (low <= high) & (high < np.inf)).all():
            raise ValueError(
                f"a view needs count >= 0, voxels and 0 < min_scale <= max_scale, got "
                f"{self.count}, {self.size_ijk}, [{self.min_scale}, {self.max_scale}]"
            )

    @property
    def scales(self) -> tuple[Float64[np.ndarray, "3"], Float64[np.ndarray, "3"]]:
        """The smallest and the largest scale along each axis."""
        low, high = (np.broadcast_to(np.asarray(scale, np.float64), 3) for scale in (self.min_scale, self.max_scale))
        return low, high

    def draw_scales(self, rng: np.random.Generator) -> Float64[np.ndarray, "3"]:
        """Draw a scale for each axis by itself."""
        low, high = self.scales
        if self.spread == "uniform":
            return rng.uniform(low, high)
        return np.exp(rng.uniform(np.log(low), np.log(high)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPlan:
    """Where one view lies in the scan. `extent_mm / size_ijk` is its voxel size."""

    start_mm: tuple[float, float, float]
    extent_mm: tuple[float, float, float]
    size_ijk: tuple[int, int, int]


def check_spacing(spec: InputSpec) -> None:
    """Views are cut at a spacing, so the spec must have one.

    Raises:
        ConfigError: it fits each scan to one block.
    """
    if spec.resampling == "fit":
        raise ConfigError(
            "views need a spacing, and spec.resampling 'fit' leaves none",
            hint="pretrain with spec.resampling=spacing and spec.spacing_mm",
        )


def draw_views(
    kind: ViewKind,
    spec: InputSpec,
    box_mm: tuple[tuple[float, float, float], tuple[float, float, float]],
    rng: np.random.Generator,
) -> list[ViewPlan]:
    """Draw `kind.count` views inside `box_mm` = (start, extent), each axis of each with its own scale.

    The box is a part of the scan (the patient's body, or the region that all views of one sample share). An
    axis on which the view is longer than the box is centred on it.

    Raises:
        ConfigError: the spec has no spacing.
    """
    check_spacing(spec)
    plans = []
    for _ in range(kind.count):
        extent = np.asarray(kind.size_ijk) * np.asarray(spec.spacing_mm) * kind.draw_scales(rng)
        free = np.asarray(box_mm[1]) - extent
        start = np.asarray(box_mm[0]) + np.where(free > 0, rng.uniform(size=3) * free, free / 2)
        plans.append(
            ViewPlan(
                start_mm=(float(start[0]), float(start[1]), float(start[2])),
                extent_mm=(float(extent[0]), float(extent[1]), float(extent[2])),
                size_ijk=kind.size_ijk,
            )
        )
    return plans


def covering_crop(plan: ViewPlan, spacing_mm: tuple[float, float, float], shape_ijk: tuple[int, int, int]) -> Crop:
    """Smallest box of stored voxels that the view needs, margins for interpolation included."""
    spacing = np.asarray(spacing_mm)
    low = np.asarray(plan.start_mm) / spacing
    high = low + np.asarray(plan.extent_mm) / spacing
    step = np.asarray(plan.extent_mm) / np.asarray(plan.size_ijk) / spacing
    margin = np.ceil(np.maximum(1.0, step)).astype(int) + 1
    start = np.clip(np.floor(low).astype(int) - margin, 0, np.asarray(shape_ijk) - 1)
    size = np.clip(np.ceil(high).astype(int) + margin, start + 1, np.asarray(shape_ijk)) - start
    return Crop(
        start_ijk=(int(start[0]), int(start[1]), int(start[2])), size_ijk=(int(size[0]), int(size[1]), int(size[2]))
    )


def apply_view(
    voxels: Float[Tensor, "channel i j k"],
    plan: ViewPlan,
    crop: Crop,
    *,
    spacing_mm: tuple[float, float, float],
    outside: float,
    flip_axes: tuple[int, ...] = (),
) -> Float[Tensor, "channel a b c"]:
    """Resample the view out of `voxels`, which were read at `crop` from a scan of `spacing_mm`, and mirror it.

    Positions beyond the scan get `outside`.
    """
    steps = [plan.extent_mm[axis] / plan.size_ijk[axis] / spacing_mm[axis] for axis in range(3)]
    coordinates = [
        grid_coordinates(
            plan.size_ijk[axis],
            start=plan.start_mm[axis] / spacing_mm[axis] - crop.start_ijk[axis],
            step=steps[axis],
        )
        for axis in range(3)
    ]
    places = (coordinates[0], coordinates[1], coordinates[2])
    return resample.sample(
        voxels, places, step_ijk=(steps[0], steps[1], steps[2]), outside=outside, flip_axes=flip_axes
    )
