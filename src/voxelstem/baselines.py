"""What can be said about a scan without any learning: brightness, radiomics, and the nearest labelled scan.

A model that does not beat these has not earned its place. They speak the language of tasks
(`protocols.Features`, `LabelMap`), so the same heads and scores serve them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from voxelstem.geometry import spacing_mm
from voxelstem.radiomics.biomarkers import FEATURES
from voxelstem.radiomics.radiomics import CT_BINS, EVERYTHING, FixedBinNumber, describe
from voxelstem.streaming import lay, of_volume
from voxelstem.study import InputSpec, LabelMap, Volume
from voxelstem.views import cells

BODY_HU = -300.0
"""Between air and fat: whatever is connected and brighter is body, and what it encloses too."""
BODY_STEP_MM = 4.0
"""The body is found on a thinned copy of the scan with about this spacing."""
RADIOMICS = tuple(
    name
    for name in FEATURES
    if name not in ("stat_cov", "stat_qcod", "morph_com", "morph_vol_dens_aee", "morph_area_dens_aee")
)
"""Features that every region of three voxels or more has that is not all air. Left out is what divides by a mean of
intensities, which for Hounsfield units may be zero or next to it, and by the ellipsoid of a region that may be flat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Intensity:
    """Histograms as features: of the body for the scan, of each patch for its token."""

    scan: Float[np.ndarray, "bins"]
    tokens: Float[np.ndarray, "ti tj tk bins"] | None
    tokens_affine_ras: Float[np.ndarray, "4 4"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """Where the body is in a scan. `start_ijk` and `stop_ijk` bound it, in voxels of the whole scan."""

    mask: Bool[np.ndarray, "i j k"]
    """On a thinned copy of the scan: every `stride`-th voxel along each axis."""
    stride: tuple[int, int, int]
    start_ijk: tuple[int, int, int]
    stop_ijk: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Radiomics:
    """First-order radiomics and shape of one region as features. There are no tokens."""

    scan: Float[np.ndarray, "feature"]
    """As defined, not scaled: heads standardise what is `measured`."""
    names: tuple[str, ...]
    """What each feature is; `biomarkers.FEATURES` says it in words."""
    tokens: None = None
    tokens_affine_ras: None = None

    @property
    def measured(self) -> Bool[np.ndarray, "feature"]:
        """All of them have units of their own."""
        return np.ones(len(self.scan), dtype=bool)


def intensity(
    volume: Volume, spec: InputSpec, *, token_mm: tuple[float, float, float] | None, bins: int = 32
) -> Intensity:
    """Describe a scan by how bright it is and nothing else (first channel).

    `token_mm` is the size of a patch; None leaves the tokens out. CT counts HU within the window of
    `spec`; other modalities have no unit, so their own 0.5th to 99.5th percentile is the window, as it is where `spec`
    normalises each volume by itself.
    """
    levels = _levels(volume, spec, bins)
    body = find_body(volume)
    step_i, step_j, step_k = body.stride
    counts = np.bincount(levels[::step_i, ::step_j, ::step_k][body.mask], minlength=bins).astype(np.float32)
    # Square roots (Hellinger): the rare bins of small organs are not drowned by fat.
    scan = np.sqrt(counts / max(float(counts.sum()), 1.0))
    if token_mm is None:
        return Intensity(scan=scan, tokens=None, tokens_affine_ras=None)
    affine, size = cells.cover(volume.affine_ras, volume.shape_ijk, token_mm)
    tokens = _histograms(levels, volume, affine, size, bins)
    return Intensity(scan=scan, tokens=tokens, tokens_affine_ras=affine)


def patch_histograms(
    volume: Volume,
    spec: InputSpec,
    affine_ras: Float[np.ndarray, "4 4"],
    size_ijk: tuple[int, int, int],
    *,
    bins: int = 32,
) -> Float[np.ndarray, "ti tj tk bins"]:
    """The tokens of `intensity` on a given grid of patches, such as a model's; zeros where a patch holds no voxel."""
    return _histograms(_levels(volume, spec, bins), volume, affine_ras, size_ijk, bins)


def _histograms(
    levels: Int[np.ndarray, "i j k"],
    volume: Volume,
    affine_ras: Float[np.ndarray, "4 4"],
    size_ijk: tuple[int, int, int],
    bins: int,
) -> Float[np.ndarray, "ti tj tk bins"]:
    inside = cells.tally(levels, cells.lay(volume.affine_ras, volume.shape_ijk, affine_ras, size_ijk), bins)
    return np.sqrt(inside / np.maximum(inside.sum(axis=3, keepdims=True), 1.0))


def radiomics(
    volume: Volume, region: Bool[np.ndarray, "i j k"] | Body, *, features: Sequence[str] = RADIOMICS
) -> Radiomics:
    """Describe a region by what IBSI's first-order radiomics and morphology say of it (first channel).

    CT is read from -1000 HU on, in bins of 25 HU: voxels below count for the shape only. Other modalities have no unit,
    so their scan's 0.5th to 99.5th percentile becomes 0 to 1 before, and the region's own range is cut into 32 bins.

    Args:
        volume: The scan.
        region: Which voxels, on the scan's grid (`regions` makes such masks); or the body, which is described on the
            thinned copy of the scan that it was found on.
        features: Names from `biomarkers.FEATURES`.

    Raises:
        ValueError: the region is empty, lies on another grid or holds what is not finite, or one of the features does
            not exist or has no value there, as the elongation of a single voxel has none.
    """
    strangers = [name for name in features if name not in FEATURES]
    if strangers:
        raise ValueError(f"no such feature: {', '.join(strangers)}; biomarkers.FEATURES names all")
    ct = volume.modality == "CT"
    shown = volume if ct else _without_unit(volume)
    if isinstance(region, Body):
        shown, region = _thinned(shown, region.stride), region.mask
    found = describe(
        shown,
        region,
        bins=CT_BINS if ct else FixedBinNumber(count=32),
        intensity_range=(CT_BINS.lowest, math.inf) if ct else EVERYTHING,
    ).only(features)
    if found.undefined:
        raise ValueError(
            f"{', '.join(found.undefined)} cannot be told of this region of {int(region.sum())} voxels: "
            "leave the region out, or ask for other features"
        )
    return Radiomics(scan=found.values, names=found.names)


def token_mm(volume: Volume, spec: InputSpec, patch_ijk: tuple[int, int, int]) -> tuple[float, float, float]:
    """Edge lengths in millimetres of a patch of `patch_ijk` voxels, at the spacing at which this scan is fed."""
    if spec.resampling == "fit":
        fed_mm = spacing_mm(lay(of_volume(volume), spec).affine_ras)
    else:
        fed_mm = spec.grid_spacing_mm(volume.spacing_mm, volume.shape_ijk)
    i, j, k = (edge * size for edge, size in zip(fed_mm, patch_ijk, strict=True))
    return i, j, k


def find_body(volume: Volume) -> Body:
    """The largest connected thing in a scan that is no air, with its holes (lungs, bowel gas) filled slice by slice."""
    stride = _stride(volume)
    thinned = volume.array[0, :: stride[0], :: stride[1], :: stride[2]]
    solid = thinned > (BODY_HU if volume.modality == "CT" else float(thinned.mean()))
    mask = _fill(_largest(solid)) if solid.any() else np.ones_like(solid)
    ends = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    start = [int(end[0]) * step for end, step in zip(ends, stride, strict=True)]
    stop = [
        min((int(end[-1]) + 1) * step, count) for end, step, count in zip(ends, stride, volume.shape_ijk, strict=True)
    ]
    return Body(
        mask=mask, stride=stride, start_ijk=(start[0], start[1], start[2]), stop_ijk=(stop[0], stop[1], stop[2])
    )


def nearest(scan: Float[np.ndarray, "bins"], atlases: Sequence[Float[np.ndarray, "bins"]]) -> int:
    """Which atlas has the most similar body histogram (smallest summed difference)."""
    return int(np.argmin([np.abs(scan - other).sum() for other in atlases]))


def carry(labels: LabelMap, from_body: Body, to_body: Body, shape_ijk: tuple[int, int, int]) -> LabelMap:
    """Lay the labels of one scan over another so that the boxes round their bodies match; no further registration."""
    places = []
    for axis, count in enumerate(shape_ijk):
        low, high = from_body.start_ijk[axis], from_body.stop_ijk[axis]
        start, stop = to_body.start_ijk[axis], to_body.stop_ijk[axis]
        place = low + (np.arange(count) + 0.5 - start) * (high - low) / (stop - start) - 0.5
        places.append(np.rint(place).astype(np.int64))
    inside = [(place >= 0) & (place < count) for place, count in zip(places, labels.array.shape, strict=True)]
    clipped = [np.clip(place, 0, count - 1) for place, count in zip(places, labels.array.shape, strict=True)]
    known = inside[0][:, None, None] & inside[1][:, None] & inside[2]
    carried = np.where(known, labels.array[np.ix_(*clipped)], 0)
    return LabelMap(array=carried.astype(labels.array.dtype), classes=labels.classes)


def _largest(solid: Bool[np.ndarray, "i j k"]) -> Bool[np.ndarray, "i j k"]:
    pieces = np.empty(solid.shape, dtype=np.int32)
    ndimage.label(solid, output=pieces)
    return pieces == int(np.bincount(pieces.ravel())[1:].argmax()) + 1


def _fill(mask: Bool[np.ndarray, "i j k"]) -> Bool[np.ndarray, "i j k"]:
    filled = np.empty_like(mask)
    for k in range(mask.shape[2]):
        ndimage.binary_fill_holes(mask[:, :, k], output=filled[:, :, k])
    return filled


def _stride(volume: Volume) -> tuple[int, int, int]:
    i, j, k = (max(1, round(BODY_STEP_MM / spacing)) for spacing in volume.spacing_mm)
    return i, j, k


def _levels(volume: Volume, spec: InputSpec, bins: int) -> np.ndarray:
    """Histogram bin of every voxel; what lies beyond the window falls into its first or last bin."""
    array = volume.array[0]
    low, high = spec.low_hu, spec.high_hu
    if volume.modality != "CT" or spec.per_volume:
        low, high = _own_window(volume)
    return np.clip((array - low) * (bins / (high - low)), 0, bins - 1).astype(np.int64)


def _own_window(volume: Volume) -> tuple[float, float]:
    """The 0.5th and the 99.5th percentile of a scan, from a thinned copy."""
    step_i, step_j, step_k = _stride(volume)
    low, high = np.quantile(volume.array[0, ::step_i, ::step_j, ::step_k], [0.005, 0.995])
    return low, max(high, low + 1e-6)


def _without_unit(volume: Volume) -> Volume:
    """The scan with its own window at 0 to 1; nothing is cut off."""
    low, high = _own_window(volume)
    return replace(volume, array=((volume.array - low) / (high - low)).astype(np.float32))


def _thinned(volume: Volume, stride: tuple[int, int, int]) -> Volume:
    """Every `stride`-th voxel of a scan, each standing for as many more."""
    affine = volume.affine_ras.astype(np.float64) @ np.diag([*stride, 1.0])
    return replace(
        volume, array=volume.array[:, :: stride[0], :: stride[1], :: stride[2]], affine_ras=affine, labels=None
    )
