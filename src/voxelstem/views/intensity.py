"""Raw values to network input: the only place where values are normalised.

A window is the same for every scan. The two normalisers of brain MRI take theirs from the whole volume, never from a
crop of it: the same tissue would have another value in each crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from voxelstem.errors import IngestError
from voxelstem.study import InputSpec

ROWS = 32
"""Rows along i that are measured at a time, wherever they come from: sums of the same parts have the same bits."""
NEAR = 0.2
"""How far mean and deviation of z-scores may lie from 0 and 1: cropping, clipping and resampling move them."""
STILL, FEWEST_STILL = 1e-3, 0.05
"""What counts as 0 in data about as wide as z-scores (storing in 16 bits moves it), and which share of voxels must be
0 to be a background that was left at 0 while tissue was brought to mean 0."""

WIDEST = 40.0
"""Of a window for z-scores: a wider one was made for raw values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What is measured of a whole volume."""

    minimum: float
    mean: float
    deviation: float
    """Standard deviation over all voxels, not over all but one."""
    top99: float
    """99th percentile of the foreground, which is all above the minimum."""
    still: float
    """Share of voxels within `STILL` of 0."""

    @property
    def scored(self) -> str:
        """Whether the values look like z-scores: of the `whole` volume, of its `tissue` with air left at 0, or `""`."""
        if self.minimum >= 0:
            return ""
        # Voxels at 0 add nothing to the sums, so the moments of the others follow from those of all.
        moving = 1 - self.still
        if self.still >= FEWEST_STILL and moving > 0:
            mean = self.mean / moving
            square = (self.deviation**2 + self.mean**2) / moving
            if _standard(mean, math.sqrt(max(square - mean**2, 0.0))):
                return "tissue"
        return "whole" if _standard(self.mean, self.deviation) else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a volume's values are brought to [0, 1] by, or to z-scores: in all three ways a straight line."""

    low: float
    """The value that becomes 0."""
    high: float
    """The value that becomes 1."""
    outside: float
    """The value of what lies outside of the scan."""
    clamped: bool = True
    """Whether what comes to lie outside [0, 1] is cut off."""


def measure(slab: Callable[[int, int], Shaped[np.ndarray, "channel row j k"]], rows: int) -> Stats:
    """Measure a volume that is read a slab at a time; the same voxels give the same bits, however they are read.

    Args:
        slab: Gives the rows from one index along i to another.
        rows: How many there are.

    Raises:
        IngestError: `not-finite`, or `channels` where there is more than one: each would need its own numbers.
    """
    total, mean, spread, still = 0, 0.0, 0.0, 0
    least, at_least, most = math.inf, 0, np.empty(0, np.float32)
    for low in range(0, rows, ROWS):
        part = _read(slab(low, min(low + ROWS, rows)))
        lowest = float(part.min())
        at_lowest = int(np.count_nonzero(part == lowest))
        at_least = at_lowest + (at_least if least == lowest else 0) if lowest <= least else at_least
        least = min(least, lowest)
        still += int(np.count_nonzero(np.abs(part) < STILL))
        # Chan et al. 1979: means and sums of squares of two parts to those of both.
        here = float(part.mean(dtype=np.float64))
        off: Float64[np.ndarray, " voxel"] = part - np.float64(here)
        apart, both = here - mean, total + part.size
        spread += float(np.square(off, out=off).sum()) + apart**2 * total * part.size / both
        mean, total = mean + apart * part.size / both, both
        most = _highest(most, part, rows * (part.size // min(ROWS, rows - low)))
    return Stats(
        minimum=least,
        mean=mean,
        deviation=math.sqrt(spread / total),
        top99=_percentile(most, total - at_least, least),
        still=still / total,
    )


def limits(seen: Shaped[np.ndarray, "channel i j k"] | Stats | None, spec: InputSpec) -> Limits:
    """How a volume's values are normalised.

    unit99 is what Yucca calls `volume_wise_znorm`: the volume is clipped at the 99th percentile of its foreground and
    its range brought to [0, 1]. zscore is nnssl's: mean and deviation of the whole volume, nothing cut off.

    Z-scores are refused where they cannot be what the weights were taught on: where tissue was scored and air left at
    0, in the middle of the values, or where a window was not made for them. Z-scores of the whole volume keep the
    order and the distances of its values, so that `zscore` and `unit99` undo them; `doubt` says so.

    Args:
        seen: The whole volume or what `measure` found; None is enough for a window. Given for other than CT, a window
            is checked against it.
        spec: What the network is to be fed with.

    Raises:
        IngestError: `not-finite`, `channels`, `constant`, or `z-scored`.
        ValueError: nothing was measured, and the spec's normalisation needs it.
    """
    if isinstance(seen, np.ndarray):
        array = seen
        seen = measure(lambda low, high: array[:, low:high], array.shape[1])
    if seen is not None:
        _check_scored(seen, spec)
    if spec.normalisation == "window":
        return Limits(low=spec.low_hu, high=spec.high_hu, outside=spec.low_hu)
    if seen is None:
        raise ValueError(f"{spec.normalisation} needs the whole volume measured")
    if not seen.deviation > 0:
        raise IngestError(
            f"all voxels have one value ({seen.minimum:g}), which {spec.normalisation} cannot normalise",
            code="constant",
            hint="export the scan again",
        )
    if spec.normalisation == "unit99":
        return Limits(low=seen.minimum, high=seen.top99, outside=seen.minimum)
    return Limits(low=seen.mean, high=seen.mean + seen.deviation, outside=seen.minimum, clamped=False)


def doubt(seen: Stats, spec: InputSpec) -> str:
    """What a person should know of values that were normalised before they came here; nothing for others."""
    if spec.normalisation != "unit99" or not seen.scored:
        return ""
    return (
        f"z-scored: {_described(seen)}, so the values were normalised before; unit99 undoes a shift and a scale of the "
        "whole volume, but not clipping"
    )


def window(hu: Float[Tensor, "*shape"], limits: Limits) -> Float[Tensor, "*shape"]:
    """Map [low, high] to [0, 1], and clamp what lies outside where the limits say so."""
    return squeeze_(lift(hu, limits), limits)


def lift(hu: Shaped[Tensor, "*shape"], limits: Limits) -> Float[Tensor, "*shape"]:
    """The first half of `window`: 0 is what lies outside of the scan. New memory; integers become float.

    Resampling may stand between the halves, or before or after both: it is linear, and clamping is what is not.
    """
    return hu - limits.outside


def squeeze_(lifted: Float[Tensor, "*shape"], limits: Limits) -> Float[Tensor, "*shape"]:
    """The second half of `window`, in place: two passes through fresh memory less."""
    if limits.low != limits.outside:
        lifted.sub_(limits.low - limits.outside)
    lifted.div_(limits.high - limits.low)
    return lifted.clamp_(0.0, 1.0) if limits.clamped else lifted


def _read(slab: Shaped[np.ndarray, "channel row j k"]) -> Float[np.ndarray, " voxel"]:
    """The voxels of a slab in the order of its indices, whatever theirs in memory is."""
    if len(slab) != 1:
        raise IngestError(
            f"the volume has {len(slab)} channels, and the normaliser measures one",
            code="channels",
            hint="give each channel as a volume of its own",
        )
    part = np.ascontiguousarray(slab, dtype=np.float32).ravel()
    # Both are NaN where one voxel is.
    if not (part.size and math.isfinite(float(part.min())) and math.isfinite(float(part.max()))):
        raise IngestError(
            "the volume holds values that are not finite (NaN or infinite)",
            code="not-finite",
            hint="export it again",
        )
    return part


def _highest(
    most: Float[np.ndarray, " kept"], part: Float[np.ndarray, " voxel"], whole: int
) -> Float[np.ndarray, " more"]:
    """The highest hundredth of `whole` voxels, as far as they were read: no percentile from the 99th needs others."""
    keep = whole // 100 + 2
    found = np.concatenate([most, part if len(most) < keep else part[part > most.min()]])
    return found if len(found) <= keep else np.partition(found, len(found) - keep)[len(found) - keep :]


def _percentile(most: Float[np.ndarray, " kept"], count: int, least: float) -> float:
    """The 99th percentile of the `count` highest voxels, between neighbours as numpy's `linear` lays it."""
    if not count:
        return least
    falling = np.sort(most)[::-1].astype(np.float64)
    below, rest = divmod(99 * (count - 1), 100)
    at = count - 1 - below
    return float(falling[at] + (falling[max(at - 1, 0)] - falling[at]) * rest / 100)


def _standard(mean: float, deviation: float) -> bool:
    return abs(mean) <= NEAR and abs(deviation - 1) <= NEAR


def _described(seen: Stats) -> str:
    return f"minimum {seen.minimum:.3g}, mean {seen.mean:.2f}, standard deviation {seen.deviation:.2f}"


def _made_for_scores(seen: Stats, spec: InputSpec) -> bool:
    """Whether a window holds most of such values, and these fill more than a sliver of it."""
    low, high = seen.mean - seen.deviation / 2, seen.mean + seen.deviation / 2
    return spec.low_hu <= low and high <= spec.high_hu and spec.high_hu - spec.low_hu <= WIDEST


def _check_scored(seen: Stats, spec: InputSpec) -> None:
    how = "" if spec.modality == "CT" else seen.scored
    if how == "tissue":
        raise IngestError(
            f"the values look z-scored over tissue alone ({_described(seen)}; {seen.still:.0%} of the voxels are 0, in "
            "their middle): these weights know air as the darkest value",
            code="z-scored",
            hint="give the scan as it was before it was normalised",
        )
    if how and spec.normalisation == "window" and not _made_for_scores(seen, spec):
        raise IngestError(
            f"the values look z-scored ({_described(seen)}): these weights take the window "
            f"{spec.low_hu:g} to {spec.high_hu:g} of raw values",
            code="z-scored",
            hint="give the scan as it was before it was normalised",
        )
