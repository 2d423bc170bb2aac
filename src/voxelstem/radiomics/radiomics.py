"""What first-order radiomics says of a region, as the Image Biomarker Standardisation Initiative (IBSI) defines it.

Zwanenburg et al., "Image biomarker standardisation initiative", arXiv 1612.07003; section numbers below are its.
Intensity statistics (3.3) and histogram features (3.4) are complete. Of morphology (3.1), 23 of 29: the two by the
smallest turned box, the two by the smallest ellipsoid, Moran's I and Geary's C are left out. Texture is not here.

A region is a mask of voxels on the scan's own grid: nothing is resampled. A feature whose definition divides by zero
is NaN, and the rest stand: the coefficients of variation and dispersion where the mean or the sum of quartiles is
zero, the centre of mass shift where intensities sum to zero, the robust deviation of two voxels (none lies between
their percentiles), ratios of axes where the region is a point, a line or flat, and gradients where the histogram has
one bin. Of what does not vary, skewness and kurtosis are 0 by definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from voxelstem.radiomics import shape
from voxelstem.radiomics.biomarkers import FEATURES, Biomarkers
from voxelstem.study import Volume

EVERYTHING = (-math.inf, math.inf)
"""The range of intensities that leaves nothing out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedBinNumber:
    """Cut the range between the region's own lowest and highest intensity into `count` bins (2.7, K15C)."""

    count: int = 32

    def __post_init__(self) -> None:
        """Guard the number.

        Raises:
            ValueError: there is no bin.
        """
        if self.count < 1:
            raise ValueError(f"there must be one bin at least, got {self.count}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedBinSize:
    """Bins of one width for all regions, from one lowest intensity on (2.7, Q3RU). For units that mean something."""

    width: float
    lowest: float

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: the width is not positive, or a number is not finite.
        """
        if not (0 < self.width < math.inf and math.isfinite(self.lowest)):
            raise ValueError(f"bins need a positive width and a finite start, got {self.width:g} from {self.lowest:g}")


Bins = FixedBinNumber | FixedBinSize
CT_BINS = FixedBinSize(width=25.0, lowest=-1000.0)
"""What the manual's configuration C uses of CT: 25 HU, here from air on."""


def describe(
    volume: Volume,
    region: Bool[np.ndarray, "i j k"],
    *,
    bins: Bins,
    intensity_range: tuple[float, float] = EVERYTHING,
) -> Biomarkers:
    """All features of a region of a scan (first channel), in the order of `FEATURES`.

    Args:
        volume: The scan; its spacing gives the millimetres.
        region: Which voxels, on the scan's grid.
        bins: How intensities become the levels of the histogram.
        intensity_range: Voxels beyond these limits (which belong to it) count for the shape and not for intensities:
            the manual's range re-segmentation (2.5).

    Raises:
        ValueError: the region is no mask on the scan's grid, is empty or holds nothing within the range, or an
            intensity in it is not finite; also as `discretise`.
    """
    if region.dtype != np.bool_ or region.shape != volume.shape_ijk:
        raise ValueError(
            f"a region is a mask (bool) on the scan's grid {volume.shape_ijk}, got {region.dtype} of {region.shape}"
        )
    if not region.any():
        raise ValueError("the region is empty: there is nothing to describe")
    box = shape.box(region)
    array, region = volume.array[0][box], region[box]
    if not np.isfinite(array[region]).all():
        raise ValueError("an intensity in the region is not finite")
    inside = region & (array >= intensity_range[0]) & (array <= intensity_range[1])
    if not inside.any():
        raise ValueError(f"no voxel of the region lies in the range {intensity_range[0]:g} to {intensity_range[1]:g}")
    values = array[inside].astype(np.float64)
    found = (
        statistics(values),
        histogram(discretise(values, bins)),
        morphology(array, region, inside, volume.spacing_mm),
    )
    return Biomarkers(
        names=tuple(name for part in found for name in part.names),
        values=np.concatenate([part.values for part in found]),
    )


def discretise(values: Real[np.ndarray, "voxel"], bins: Bins) -> Int[np.ndarray, "voxel"]:
    """Levels, from 1 on, that intensities fall into (2.7).

    Where all intensities are equal, a fixed number of bins puts them into the last one, as its formula says.

    Raises:
        ValueError: there are no intensities, or one lies below the lowest bin of fixed size.
    """
    if not len(values):
        raise ValueError("there are no intensities")
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if isinstance(bins, FixedBinSize):
        if low < bins.lowest:
            raise ValueError(
                f"an intensity of {low:g} lies below the first bin, which begins at {bins.lowest:g}: "
                "leave it out by intensity_range, or let the bins begin lower"
            )
        return np.floor((values - bins.lowest) / bins.width).astype(np.int64) + 1
    if low == high:
        return np.full(len(values), bins.count)
    # Just below the highest intensity the quotient may round up to 1.
    return np.minimum(np.floor(bins.count * ((values - low) / (high - low))).astype(np.int64) + 1, bins.count)


def statistics(values: Real[np.ndarray, "voxel"]) -> Biomarkers:
    """Intensity-based statistics (3.3): 18 features.

    Percentiles lie on the straight line between the two nearest order statistics, rank 1 + p (n - 1) (Hyndman and Fan
    1996, type 7): the manual does not define them, and this gives its reference values.

    Raises:
        ValueError: there are no intensities.
    """
    values = values.astype(np.float64)
    found = _distribution(values)
    energy = float(values @ values)
    return _named("stat_", found | {"energy": energy, "rms": math.sqrt(energy / len(values))})


def histogram(levels: Int[np.ndarray, "voxel"]) -> Biomarkers:
    """Intensity histogram features (3.4): 23 features. The histogram runs from level 1 to the highest that occurs.

    Of several steepest bins the lowest is named.

    Raises:
        ValueError: there are no levels, or one is below 1.
    """
    found = _distribution(levels.astype(np.float64))
    if levels.min() < 1:
        raise ValueError(f"levels begin at 1, got {int(levels.min())}")
    counts = np.bincount(levels)[1:].astype(np.float64)
    share = counts[counts > 0] / len(levels)
    most = np.flatnonzero(counts == counts.max()) + 1
    found |= {
        # Of several, the nearest to the mean; of two as near, the lower (argmin takes the first).
        "mode": float(most[np.abs(most - found["mean"]).argmin()]),
        "entropy": float(-(share * np.log2(share)).sum()) + 0.0,
        "uniformity": float(share @ share),
    }
    slope = np.gradient(counts) if len(counts) > 1 else np.full(1, math.nan)
    for name, place in (("max_grad", slope.argmax()), ("min_grad", slope.argmin())):
        steepest = float(slope[place])
        found |= {name: steepest, f"{name}_g": float(place + 1) if len(counts) > 1 else math.nan}
    return _named("ih_", found)


def morphology(
    array: Real[np.ndarray, "i j k"],
    region: Bool[np.ndarray, "i j k"],
    inside: Bool[np.ndarray, "i j k"],
    spacing_mm: tuple[float, float, float],
) -> Biomarkers:
    """Morphological features (3.1): 23 features.

    The mesh is that of `shape`, marching cubes at 0.5. The bounding box runs along the array's axes.

    Args:
        array: Intensities.
        region: The morphological mask.
        inside: The intensity mask: what of it counts for the centre of mass and the integrated intensity.
        spacing_mm: Edges of a voxel.

    Raises:
        ValueError: a mask is empty.
    """
    if not region.any() or not inside.any():
        raise ValueError("the region is empty: there is nothing to describe")
    surface, hull, axes = (
        shape.surface(region, spacing_mm),
        shape.hull(region, spacing_mm),
        shape.axes(region, spacing_mm),
    )
    area, volume = surface.area_mm2, surface.volume_mm3
    i, j, k = ((part.stop - part.start) * edge for part, edge in zip(shape.box(region), spacing_mm, strict=True))
    a, b, c = (length / 2 for length in axes.lengths_mm)
    weights = np.where(inside, array, 0)
    total = float(weights.sum(dtype=np.float64))
    shift = math.dist(axes.centre_mm, shape.centre(weights, spacing_mm)) if total else math.nan
    compact = 36 * math.pi * volume**2 / area**3
    found = {
        "volume": volume,
        "vol_approx": int(region.sum()) * math.prod(spacing_mm),
        "area_mesh": area,
        "av": area / volume,
        "comp_1": volume / (math.sqrt(math.pi) * area**1.5),
        "comp_2": compact,
        "sph_dispr": compact ** (-1 / 3),
        "sphericity": compact ** (1 / 3),
        "asphericity": compact ** (-1 / 3) - 1,
        "com": shift,
        "diam": hull.diameter_mm,
        "pca_maj_axis": 2 * a,
        "pca_min_axis": 2 * b,
        "pca_least_axis": 2 * c,
        "pca_elongation": _over(b, a),
        "pca_flatness": _over(c, a),
        "vol_dens_aabb": volume / (i * j * k),
        "area_dens_aabb": area / (2 * (i * j + j * k + k * i)),
        "vol_dens_aee": _over(volume, 4 / 3 * math.pi * a * b * c),
        "area_dens_aee": _over(area, _ellipsoid_area(a, b, c)),
        "vol_dens_conv_hull": volume / hull.volume_mm3,
        "area_dens_conv_hull": area / hull.area_mm2,
        "integ_int": volume * total / int(inside.sum()),
    }
    return _named("morph_", found)


def _distribution(values: Float[np.ndarray, "voxel"]) -> dict[str, float]:
    """The 16 features that statistics and histogram share."""
    if not len(values):
        raise ValueError("there are no intensities")
    low, high, mean = float(values.min()), float(values.max()), float(values.mean())
    p10, p25, median, p75, p90 = (float(place) for place in np.percentile(values, (10, 25, 50, 75, 90)))
    # A mean may miss by a rounding what never varies.
    off = values - mean if low < high else np.zeros_like(values)
    square = off * off
    variance = float(square.mean())
    robust = values[(values >= p10) & (values <= p90)]
    return {
        "mean": mean,
        "var": variance,
        "skew": float((square * off).mean()) / variance**1.5 if variance else 0.0,
        "kurt": float((square * square).mean()) / variance**2 - 3 if variance else 0.0,
        "median": median,
        "min": low,
        "p10": p10,
        "p90": p90,
        "max": high,
        "iqr": p75 - p25,
        "range": high - low,
        "mad": float(np.abs(off).mean()),
        "rmad": float(np.abs(robust - robust.mean()).mean()) if len(robust) else math.nan,
        "medad": float(np.abs(values - median).mean()),
        "cov": _over(math.sqrt(variance), mean),
        "qcod": _over(p75 - p25, p75 + p25),
    }


def _ellipsoid_area(a: float, b: float, c: float) -> float:
    """The manual's series for an ellipsoid with these half axes, the longest first, up to degree 20 (3.1, RDD2).

    With its eccentricities the series does not give the true area (of a disc it makes 1.57 times as much, of a sphere
    it is right). The reference values rest on it all the same.
    """
    if not b:
        return 0.0
    alpha, beta = 1 - (b / a) ** 2, 1 - (c / a) ** 2
    # Legendre polynomials times (alpha beta)^degree, by Bonnet's recursion: nothing is divided by an eccentricity of 0.
    before, now, total = 0.0, 1.0, 0.0
    for degree in range(21):
        total += now / (1 - 4 * degree**2)
        after = ((2 * degree + 1) * (alpha + beta) / 2 * now - degree * alpha * beta * before) / (degree + 1)
        before, now = now, after
    return 4 * math.pi * a * b * total


def _over(share: float, whole: float) -> float:
    """The quotient, NaN where there is none."""
    return share / whole if whole else math.nan


def _named(family: str, found: Mapping[str, float]) -> Biomarkers:
    """Put the features of a family into the order of `FEATURES`."""
    names = tuple(name for name in FEATURES if name.startswith(family))
    return Biomarkers(names=names, values=np.array([found[name.removeprefix(family)] for name in names]))
