"""A scan on its way to the network, a column of blocks at a time: resampled, windowed and tiled in bounded memory.

Resampling is separable, so the blocks at one place along i need only the input rows below them: the whole scan never
exists in floats at the network's spacing. At 0.5 x 0.5 x 1 mm that would be 800 MB for a chest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxelstem.errors import ConfigError, IngestError
from voxelstem.resampling import area_weights, grid_affine, grid_coordinates, resampled_count, steps_ijk, weights
from voxelstem.store import Store
from voxelstem.store.encoding import AIR_HU
from voxelstem.study import INPUT_SPECS, InputSpec, Volume
from voxelstem.views.intensity import Limits, doubt, limits, measure, window
from voxelstem.views.tile import Tiling, centre_crop, cover

Triple = tuple[int, int, int]
Edges = Float[np.ndarray, " 3"]
ROWS = 32
"""Output planes made by one multiplication: the matrices of resampling are banded, and few rows see few columns."""
MOST_BLOCKS = 1 << 14
"""A whole body at 0.5 mm has 11,000 blocks of 128 x 128 x 64."""
LEAST_MM, MOST_MM, LONGEST_MM = 0.005, 200.0, 20_000.0
"""Edges of voxels that some scanner makes, and the length of a scan that no header is believed beyond."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scan:
    """Voxels that are read a slab at a time, from memory or from a store."""

    shape_ijk: Triple
    affine_ras: Float[np.ndarray, "4 4"]
    spacing_mm: tuple[float, float, float]
    modality: str
    channels: int
    slab: Callable[[int, int], Float[np.ndarray, "channel row j k"]]
    """The rows from one index along i to another, in HU or intensity."""
    body_ijk: tuple[Triple, Triple] | None = None
    """First voxel and size of the box around the patient; None where it has not been looked for."""


def of_volume(volume: Volume) -> Scan:
    """Stream a volume that is in memory; its voxels are not copied."""
    return Scan(
        shape_ijk=volume.shape_ijk,
        affine_ras=volume.affine_ras,
        spacing_mm=volume.spacing_mm,
        modality=volume.modality,
        channels=volume.array.shape[0],
        slab=lambda low, high: volume.array[:, low:high],
    )


def of_store(store: Store, key: str) -> Scan:
    """Stream a volume of a store: a slab decodes only the store's blocks that it touches.

    Raises:
        StoreError: no such volume; and while it is read, if its file is missing or damaged.
    """
    record = store.record(key)
    _, j, k = record.shape_ijk
    return Scan(
        shape_ijk=record.shape_ijk,
        affine_ras=record.affine_ras,
        spacing_mm=record.spacing_mm,
        modality=record.modality,
        channels=record.channels,
        slab=lambda low, high: store.crop(key, (low, 0, 0), (high - low, j, k)),
        body_ijk=(record.body_start_ijk, record.body_size_ijk),
    )


def with_spacing(spec: InputSpec, spacing: str | tuple[float, float, float] | None) -> InputSpec:
    """The spec with another spacing: a name in `study.INPUT_SPECS`, `native`, or millimetres along R, A and S.

    Raises:
        ConfigError: no such name, no lengths, or the spec fits scans to a block, which leaves no spacing to choose.
    """
    if spacing is None:
        return spec
    if spec.resampling == "fit":
        raise ConfigError(
            "these weights take each scan as one block, at the spacing at which it fits: no other can be chosen",
            hint="leave the spacing out",
        )
    if spacing == "native":
        return replace(spec, preset="", resampling="native", frame_ijk=None)
    if isinstance(spacing, str):
        known = {
            name: other
            for name, other in INPUT_SPECS.items()
            if (other.modality, other.normalisation) == (spec.modality, spec.normalisation)
        }
        if spacing not in known:
            raise ConfigError(
                f"there is no spacing '{spacing}' for {spec.modality}",
                hint=f"say one of {', '.join([*known, 'native'])}, or three lengths in mm",
            )
        wanted = known[spacing]
        return replace(spec, preset=spacing, spacing_mm=wanted.spacing_mm, resampling=wanted.resampling, frame_ijk=None)
    if len(spacing) != 3 or not all(LEAST_MM <= edge <= MOST_MM for edge in spacing):  # noqa: PLR2004 - three axes
        raise ConfigError(f"a spacing is three lengths from {LEAST_MM} to {MOST_MM:g} mm, got {spacing}")
    return replace(spec, preset="", spacing_mm=spacing, resampling="spacing", frame_ijk=None)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Laid:
    """How a scan is laid out for the network: its grid of blocks, and how each axis is resampled."""

    tiling: Tiling
    affine_ras: Float[np.ndarray, "4 4"]
    """From voxels of the resampled scan to millimetres."""
    matrices: tuple[Tensor | None, Tensor | None, Tensor | None]
    """(output, input) for each axis; None where it has the wanted spacing already and is copied."""
    limits: Limits
    """How the scan's values are normalised, and what lies outside of it."""
    share: float = 1.0
    """Of the scan, how much is laid out: less than all where air about a box was cut off (`fit`), or in a frame."""
    cut: float = 0.0
    """Share of the box around the patient that a frame leaves out."""
    doubt: str = ""
    """What a person should know of the scan's values; mostly nothing."""


def lay(scan: Scan, spec: InputSpec, *, like_spectre: bool = False) -> Laid:
    """Lay a scan out at the spec's spacing; both grids begin at the same low corner, or at that of the box or frame.

    Args:
        scan: Only its facts are read; its voxels too to fit a box, to normalise by the whole volume, or where values
            are no HU, which could have been normalised before.
        spec: What the network is to be fed with.
        like_spectre: Whole blocks about the middle instead of a grid that covers everything; a box is one block anyhow.

    Raises:
        IngestError: `impossible-spacing`, `too-large` at the spec's spacing, or where voxels are read `not-finite`
            and what `views.intensity.limits` refuses.
    """
    _check_spacing(scan)
    if spec.resampling == "fit":
        return _lay_box(scan, spec)
    if spec.frame_ijk is not None:
        return _lay_frame(scan, spec, spec.frame_ijk)
    steps = steps_ijk(scan.affine_ras, scan.shape_ijk, spec.grid_spacing_mm(scan.spacing_mm, scan.shape_ijk))
    i, j, k = (resampled_count(size, 1.0, step) for size, step in zip(scan.shape_ijk, steps, strict=True))
    tiling = _counted((centre_crop if like_spectre else cover)((i, j, k), spec.block_ijk))
    over_i, over_j, over_k = (
        None
        if step == 1
        else torch.from_numpy(weights(grid_coordinates(out, start=0.0, step=step), size, step=step)).float()
        for out, size, step in zip((i, j, k), scan.shape_ijk, steps, strict=True)
    )
    found, doubtful = _measured(scan, spec)
    return Laid(
        tiling=tiling,
        affine_ras=grid_affine(scan.affine_ras, steps),
        matrices=(over_i, over_j, over_k),
        limits=found,
        doubt=doubtful,
    )


def _counted(tiling: Tiling) -> Tiling:
    if (count := prod(tiling.grid)) > MOST_BLOCKS:
        voxels = " x ".join(map(str, tiling.shape_ijk))
        problem = f"at the weights' spacing the scan has {voxels} voxels, which are {count} blocks"
        raise IngestError(problem, code="too-large", hint="crop it, or check its spacing")
    return tiling


def _lay_frame(scan: Scan, spec: InputSpec, frame_ijk: Triple) -> Laid:
    """Lay out a box about the middle of the body exactly where `views.multicrop` takes its view in training."""
    spacing, wanted = np.asarray(scan.spacing_mm), np.asarray(spec.spacing_mm)
    body, size = (np.asarray(edge) * spacing for edge in scan.body_ijk or _body(scan))
    tiling = _counted(cover(frame_ijk, spec.block_ijk))
    wide = np.asarray(frame_ijk) * wanted
    start = body + size / 2 - wide / 2
    corner = scan.affine_ras.astype(np.float64)
    corner[:3, 3] += corner[:3, :3] @ (start / spacing)
    over_i, over_j, over_k = (
        torch.from_numpy(weights(grid_coordinates(out, start=low, step=step), have, step=step)).float()
        for out, low, step, have in zip(frame_ijk, start / spacing, wanted / spacing, scan.shape_ijk, strict=True)
    )
    i, j, k = wanted / spacing
    found, doubtful = _measured(scan, spec)
    return Laid(
        tiling=tiling,
        affine_ras=grid_affine(corner, (i, j, k)),
        matrices=(over_i, over_j, over_k),
        limits=found,
        share=_overlap(start, wide, np.zeros(3), np.asarray(scan.shape_ijk) * spacing),
        cut=1 - _overlap(start, wide, body, size),
        doubt=doubtful,
    )


def _overlap(start: Edges, extent: Edges, of: Edges, size: Edges) -> float:
    """Share of the second box (from a corner on, of a size) that lies in the first."""
    return float(np.prod((np.minimum(start + extent, of + size) - np.maximum(start, of)) / size))


def _body(scan: Scan) -> tuple[Triple, Triple]:
    """What a store would have noted as the box around the patient."""
    if scan.modality != "CT":
        return (0, 0, 0), scan.shape_ijk
    i, j, k = _box(scan, AIR_HU)
    return (i.start, j.start, k.start), (len(i), len(j), len(k))


def _measured(scan: Scan, spec: InputSpec) -> tuple[Limits, str]:
    """How a scan's values are normalised, and what is doubtful of them; only the window of HU needs no look at them."""
    # What has several channels has no per-volume normaliser, and `limits` says so.
    if not spec.per_volume and (spec.modality == "CT" or scan.channels > 1):
        return limits(None, spec), ""
    stats = measure(scan.slab, scan.shape_ijk[0])
    return limits(stats, spec), doubt(stats, spec)


def _lay_box(scan: Scan, spec: InputSpec) -> Laid:
    """Lay out the box of what lies above `low_hu` as one block."""
    box = _box(scan, spec.low_hu)
    start, size = [rows.start for rows in box], (len(box[0]), len(box[1]), len(box[2]))
    wanted_mm = spec.grid_spacing_mm(scan.spacing_mm, size)
    i, j, k = (wanted / have for wanted, have in zip(wanted_mm, scan.spacing_mm, strict=True))
    corner = scan.affine_ras.astype(np.float64)
    corner[:3, 3] += corner[:3, :3] @ start
    over_i, over_j, over_k = (
        torch.from_numpy(np.pad(area_weights(len(rows), block), ((0, 0), (rows.start, whole - rows.stop)))).float()
        for rows, block, whole in zip(box, spec.block_ijk, scan.shape_ijk, strict=True)
    )
    return Laid(
        tiling=cover(spec.block_ijk, spec.block_ijk),
        affine_ras=grid_affine(corner, (i, j, k)),
        matrices=(over_i, over_j, over_k),
        limits=limits(None, spec),
        share=prod(size) / prod(scan.shape_ijk),
    )


def _box(scan: Scan, above: float) -> tuple[range, range, range]:
    """The smallest box that holds every voxel above a value; the whole scan where there is none.

    Raises:
        IngestError: `not-finite`; what lies outside the box would never be looked at again.
    """
    found = [np.zeros(size, bool) for size in scan.shape_ijk]
    for low in range(0, scan.shape_ijk[0], ROWS):
        slab = scan.slab(low, min(low + ROWS, scan.shape_ijk[0]))
        _check_finite(slab.min(), slab.max())
        inside = slab > above
        found[0][low : low + ROWS] = inside.any(axis=(0, 2, 3))
        found[1] |= inside.any(axis=(0, 1, 3))
        found[2] |= inside.any(axis=(0, 1, 2))
    if not found[0].any():
        i, j, k = map(range, scan.shape_ijk)
    else:
        i, j, k = (range(int(used[0]), int(used[-1]) + 1) for used in map(np.flatnonzero, found))
    return i, j, k


def _check_spacing(scan: Scan) -> None:
    lengths = [edge * size for edge, size in zip(scan.spacing_mm, scan.shape_ijk, strict=True)]
    if all(LEAST_MM <= edge <= MOST_MM for edge in scan.spacing_mm) and max(lengths) <= LONGEST_MM:
        return
    edges = " x ".join(f"{edge:.4g}" for edge in scan.spacing_mm)
    raise IngestError(
        f"its voxels are said to be {edges} mm, for {' x '.join(map(str, scan.shape_ijk))} of them: no scanner does so",
        code="impossible-spacing",
        hint=f"edges from {LEAST_MM} to {MOST_MM:g} mm are believed; export the scan again",
    )


def columns(scan: Scan, laid: Laid, spec: InputSpec) -> Iterator[Float[Tensor, "n channel i j k"]]:
    """Read, resample and normalise a scan; give its blocks in grid order, all along k at once.

    Padding is what `Limits.outside` becomes: for a window 0, air.

    Besides the scan it takes one slab of input rows, those rows at the new spacing along i, and two columns; for a box
    that fits one block the slab is the rows under a part of it, not under all.

    Raises:
        IngestError: `not-finite` where a value is NaN or infinite.
    """
    tiling, outside = laid.tiling, laid.limits.outside
    across_i, across_j, along_k = (_spans(tiling, axis) for axis in range(3))
    rows_k = slice(along_k[0].rows.start, along_k[-1].rows.stop)
    plain = all(matrix is None for matrix in laid.matrices)
    resampled = _in_parts if spec.resampling == "fit" else _resampled
    for span_i in across_i:
        cut = _copied(scan, span_i.rows) if plain else resampled(scan, laid, span_i.rows, outside)
        for span_j in across_j:
            part = cut(span_j.rows, rows_k)
            column = np.full((len(along_k), scan.channels, *tiling.block_ijk), outside, np.float32)
            for block, span_k in zip(column, along_k, strict=True):
                at = slice(span_k.rows.start - rows_k.start, span_k.rows.stop - rows_k.start)
                _turn(part[..., at], block[:, span_i.inside, span_j.inside, span_k.inside])
            yield window(_finite(torch.from_numpy(column)), laid.limits)


def _turn(voxels: Float[np.ndarray, "channel i j k"], room: Float[np.ndarray, "channel i j k"]) -> None:
    """Copy voxels, plane by plane: a series lies in memory slice after slice, and one assignment would crawl."""
    for row in range(voxels.shape[2]):
        room[:, :, row] = voxels[:, :, row]


def _finite(voxels: Tensor) -> Tensor:
    least, most = torch.aminmax(voxels)
    _check_finite(float(least), float(most))
    return voxels


def _check_finite(least: float, most: float) -> None:
    # Both are NaN where one voxel is.
    if not (np.isfinite(least) and np.isfinite(most)):
        raise IngestError(
            "the scan holds values that are not finite (NaN or infinite)", code="not-finite", hint="export it again"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """One block along one axis: which rows of the scan it holds, and where in the block they lie."""

    rows: slice
    inside: slice


def _spans(tiling: Tiling, axis: int) -> list[_Span]:
    block, size = tiling.block_ijk[axis], tiling.shape_ijk[axis]
    spans: list[_Span] = []
    for at in range(tiling.grid[axis]):
        start = tiling.origin_ijk[axis] + at * block
        low, high = max(start, 0), min(start + block, size)
        spans.append(_Span(rows=slice(low, high), inside=slice(low - start, high - start)))
    return spans


def _copied(scan: Scan, rows: slice) -> Callable[[slice, slice], Float[np.ndarray, "channel i j k"]]:
    """Read rows along i; what comes back cuts them along j and k."""
    slab = scan.slab(rows.start, rows.stop)
    return lambda rows_j, rows_k: slab[:, :, rows_j, rows_k]


def _resampled(
    scan: Scan, laid: Laid, rows: slice, air: float
) -> Callable[[slice, slice], Float[np.ndarray, "channel i j k"]]:
    """Read what rows of the resampled scan need along i, and bring it to them; what comes back resamples the rest.

    Positions beyond the scan count as air, so that air must be zero while it is resampled.
    """
    over_i, over_j, over_k = laid.matrices
    low, high = (rows.start, rows.stop) if over_i is None else _band(over_i[rows])
    read = scan.slab(low, high)
    voxels = np.empty(read.shape, np.float32)
    _turn(read, voxels)
    slab = torch.from_numpy(voxels).sub_(air)
    if over_i is not None:
        slab = _along(slab, 1, over_i[rows, low:high], slice(0, rows.stop - rows.start))
    return lambda rows_j, rows_k: _along(_along(slab, 2, over_j, rows_j), 3, over_k, rows_k).add(air).numpy()


def _in_parts(
    scan: Scan, laid: Laid, rows: slice, air: float
) -> Callable[[slice, slice], Float[np.ndarray, "channel i j k"]]:
    """As `_resampled`, but takes few rows all the way at a time: of a single block none is needed twice."""
    parts = [slice(at, min(at + ROWS, rows.stop)) for at in range(rows.start, rows.stop, ROWS)]
    return lambda rows_j, rows_k: np.concatenate(
        [_resampled(scan, laid, part, air)(rows_j, rows_k) for part in parts], axis=1
    )


def _band(rows: Tensor) -> tuple[int, int]:
    """The columns in which any of these rows is not zero."""
    used = rows.any(dim=0).nonzero()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)


def _along(part: Tensor, axis: int, matrix: Tensor | None, rows: slice) -> Tensor:
    """The output `rows` along one of the axes of (channel, i, j, k)."""
    if matrix is None:
        return part.narrow(axis, rows.start, rows.stop - rows.start)
    made: list[Tensor] = []
    for at in range(rows.start, rows.stop, ROWS):
        some = matrix[at : min(at + ROWS, rows.stop)]
        low, high = _band(some)
        some, piece = some[:, low:high], part.narrow(axis, low, high - low)
        if axis == 1:
            made.append((some @ piece.flatten(2)).unflatten(2, piece.shape[2:]))
        else:
            made.append(some @ piece if axis == 2 else piece @ some.T)  # noqa: PLR2004 - (channel, i, j, k)
    return torch.cat(made, dim=axis) if len(made) > 1 else made[0]
