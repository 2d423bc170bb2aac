"""Where the slices of a series lie: sorted along their common normal, and proved to fill a straight, even grid.

Only position and orientation count: the standard places an image by ImagePositionPatient and
ImageOrientationPatient alone (PS3.3, C.7.6.2). SliceThickness, SpacingBetweenSlices, SliceLocation and
GantryDetectorTilt are descriptions, often wrong, and nothing here reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from voxelstem import geometry
from voxelstem.errors import IngestError

FEWEST_SLICES = 3  # with two, nothing says whether one is missing between them

# Scanners write positions with few digits, so gaps are equal to 0.01 mm or 1 % of a gap, not exactly: an
# error of 1 % is far below what resampling sees, and the smallest real fault, a missing slice, is 100 %.
TOLERANCE_MM = 0.01
TOLERANCE_SHARE = 0.01
DRIFT_SHARE = 0.05  # of a gap: how far a slice may lie from the straight line through all of them
TILT_SHARE = 0.1  # of a pixel: how far slices may slide sideways over the whole series
COSINE_TOLERANCE = 1e-3  # orientations are written with 6 digits or fewer
LENGTH_TOLERANCE = 1e-2

COARSEST_ROUNDING_MM = 0.1  # some scanners round positions to one digit; whole millimetres prove nothing
ROUNDING_SHARE = 0.35  # of a gap: a missing slice puts others at least half a gap off the line, so it stays seen
FINEST_DIGIT = 6
SMALLEST_MM = 1e-6
EXACT_DIGITS = 9  # the fit's own error shows from the 13th digit on: 5 mm must not become 5.000000000000001 mm

WIDEST_GAP = 2.05
"""`repair` bridges holes up to this many usual gaps: one missing slice, made up from both its neighbours. Across a
larger hole more than one slice would be made up in a row, and a finding of that size could vanish or be drawn out."""

STEEPEST_DEGREES = 45.0  # gantries tilt up to 30; a steeper slide is no tilt but a wrong header

MOST_NAMED = 5  # holes that a message lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What a header says of one picture's place. Lengths in mm, directions and positions in LPS as DICOM has them."""

    name: str
    """What a message may call it, such as `image 12`: never a file name or a UID."""
    orientation: tuple[float, ...]
    """ImageOrientationPatient: along a row, then along a column; empty where the header has none."""
    position_mm: tuple[float, ...]
    """ImagePositionPatient: centre of the first voxel; empty where the header has none."""
    pixel_spacing_mm: tuple[float, ...]
    """PixelSpacing: between rows, then between columns; empty where the header has none."""
    rows: int
    columns: int
    digest: Callable[[], str] | None = None
    """Gives a digest of the stored pixels. Asked only where two frames lie in one place and `repair` is on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """What `repair.straighten` needs to make a straight, even stack of one that is not."""

    slide_mm: Float[np.ndarray, "slice 2"]
    """How far each slice slid along the column index and the row index, from the first slice on."""
    height_mm: Float[np.ndarray, " slice"]
    """Along the normal, from the first slice on."""
    step_mm: float
    """Between the slices of the even stack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Where a series lies. Array axes are column, row, slice."""

    order: tuple[int, ...]
    """Which frame is which slice: positions in the list given to `place`, sorted along the normal."""
    shape: tuple[int, int, int]
    """Of the array that these slices fill, before any repair."""
    affine_ras: Float[np.ndarray, "4 4"]
    """Voxel to patient. With `repair`: of the straight stack that starts at the first slice; use what
    `repair.straighten` returns instead."""
    notes: tuple[str, ...] = ()
    """What was left out or assumed, in plain words, for the provenance."""
    repair: Repair | None = None
    """None when the array already is straight and even."""


def place(frames: Sequence[Frame], *, repair: bool = False) -> Grid:
    """Sort slices along their common normal and check that they fill a straight, even grid.

    Positions that a scanner rounded (to 0.1 mm at the coarsest) count as even when their rounding explains the
    deviation from the best straight line.

    Args:
        frames: One for each picture, in any order.
        repair: Drop exact duplicates (same place and pixels), and describe tilt and uneven gaps (up to
            `WIDEST_GAP` usual ones) for `repair.straighten` instead of refusing them.

    Raises:
        IngestError: `too-few-slices`, `no-geometry`, `bad-affine`, `mixed-orientation`, `mixed-size`,
            `duplicate-slices`, `tilt` or `slice-gaps`.
    """
    _check_count(len(frames))
    axes, pixel_mm, normal = _plane(frames)
    positions = np.array([_numbers(one, "position_mm", 3) for one in frames])
    order = np.argsort(positions @ normal, kind="stable")
    order, notes = _without_doubles(frames, positions, order, normal, repair=repair)
    _check_count(len(order))
    positions = positions[order]
    heights = positions @ normal
    crooked = _is_tilted(positions, normal, pixel_mm=float(pixel_mm.min()), repair=repair)
    uneven = _is_uneven(positions, normal, repair=repair)
    needed = None
    if crooked or uneven:
        slide = (positions - positions[0]) @ np.linalg.pinv(axes).T
        slide[:, np.abs(slide).max(axis=0) <= _sideways_mm(positions, float(pixel_mm.min()))] = 0
        tall = float(heights[-1] - heights[0])
        count = max(round(tall / float(np.median(np.diff(heights)))), 1)
        step, start = round(tall / count, EXACT_DIGITS), float(heights[0])
        even = heights - heights[0] if uneven else step * np.arange(len(order))
        needed = Repair(slide_mm=slide, height_mm=even, step_mm=step)
    else:
        step, start = (round(float(number), EXACT_DIGITS) for number in np.polyfit(np.arange(len(order)), heights, 1))
        off = float(np.abs(start + step * np.arange(len(order)) - heights).max())
        if off > TOLERANCE_MM:
            notes = (*notes, f"slice positions lie up to {off:.2f} mm off the even grid that they were read as")
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2] = axes * pixel_mm[::-1], normal * step
    affine[:3, 3] = positions[0] + normal * (start - heights[0])
    return Grid(
        order=tuple(int(index) for index in order),
        shape=(frames[0].columns, frames[0].rows, len(order)),
        affine_ras=geometry.LPS_TO_RAS @ affine,
        notes=notes,
        repair=needed,
    )


def _check_count(count: int) -> None:
    if count < FEWEST_SLICES:
        raise IngestError(
            f"the series has {count} slices; a volume needs at least {FEWEST_SLICES}",
            code="too-few-slices",
            hint="export the whole series",
        )


def _numbers(frame: Frame, field: str, count: int) -> Float[np.ndarray, " count"]:
    numbers = np.array(getattr(frame, field), np.float64)
    words = field.removesuffix("_mm").replace("_", " ")
    if not numbers.size:
        raise IngestError(
            f"{frame.name} has no {words}, so the series has no place in the patient",
            code="no-geometry",
            hint="export the original series from the archive",
        )
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise _bad_affine(f"the {words} of {frame.name} is not {count} finite numbers")
    return numbers


def _bad_affine(what: str) -> IngestError:
    return IngestError(
        f"the series does not say where its voxels lie: {what}",
        code="bad-affine",
        hint="export the original series from the archive",
    )


def _plane(
    frames: Sequence[Frame],
) -> tuple[Float[np.ndarray, "3 2"], Float[np.ndarray, "2"], Float[np.ndarray, "3"]]:
    """What all slices share: unit vectors along the column index and the row index, pixel spacing, normal (LPS)."""
    cosines = np.array([_numbers(one, "orientation", 6) for one in frames])
    pixel = np.array([_numbers(one, "pixel_spacing_mm", 2) for one in frames])
    usual, usual_mm = _usual(cosines), _usual(pixel)
    axes = usual.reshape(2, 3).T
    lengths = np.linalg.norm(axes, axis=0)
    if (np.abs(lengths - 1) > LENGTH_TOLERANCE).any():
        raise _bad_affine(f"direction cosines have the length 1, these have {lengths[0]:.3f} and {lengths[1]:.3f}")
    axes = axes / lengths
    normal = np.cross(axes[:, 0], axes[:, 1])
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2] = axes * usual_mm[::-1], normal
    try:
        geometry.check_affine(affine)
    except ValueError as problem:
        raise _bad_affine(str(problem)) from problem
    if pixel.min() <= 0:
        raise _bad_affine("a pixel spacing is not positive")
    odd = int(np.count_nonzero(np.abs(cosines - usual).max(axis=1) > COSINE_TOLERANCE))
    if odd:
        raise IngestError(
            f"{odd} of {len(frames)} slices point in another direction than the others",
            code="mixed-orientation",
            hint="give one stack of parallel slices in its own folder",
        )
    sizes = {(one.rows, one.columns) for one in frames}
    if len(sizes) > 1 or np.abs(pixel - usual_mm).max() > TOLERANCE_SHARE * usual_mm.min():
        raise IngestError(
            "the slices of the series differ in rows, columns or pixel spacing",
            code="mixed-size",
            hint="give one reconstruction in its own folder",
        )
    return axes, usual_mm, normal / np.linalg.norm(normal)


def _usual(numbers: Float[np.ndarray, "slice n"]) -> Float[np.ndarray, " n"]:
    """What most slices say, so that a digit that is wrong in one of them moves nothing."""
    said, counts = np.unique(numbers, axis=0, return_counts=True)
    return said[int(np.argmax(counts))]


def _without_doubles(
    frames: Sequence[Frame],
    positions: Float[np.ndarray, "slice 3"],
    order: Int[np.ndarray, " slice"],
    normal: Float[np.ndarray, "3"],
    *,
    repair: bool,
) -> tuple[Int[np.ndarray, " left"], tuple[str, ...]]:
    """Refuse slices that lie where another one lies; `repair` drops those that also show the same."""
    gaps = np.diff((positions @ normal)[order])
    doubled = np.flatnonzero(gaps < TOLERANCE_MM)
    if not doubled.size:
        return order, ()
    if repair and all(_same(frames, positions, int(order[at]), int(order[at + 1])) for at in doubled):
        return np.delete(order, doubled + 1), (f"{doubled.size} exact duplicates of slices dropped",)
    raise IngestError(
        f"{doubled.size} of {len(order)} slices lie where another one lies; the first is slice {doubled[0] + 2}",
        code="duplicate-slices",
        hint="two phases or reconstructions share its number, so export one of them; "
        "exact duplicates are dropped with --repair",
    )


def _same(frames: Sequence[Frame], positions: Float[np.ndarray, "slice 3"], one: int, other: int) -> bool:
    first, second = frames[one].digest, frames[other].digest
    here = float(np.linalg.norm(positions[one] - positions[other])) < TOLERANCE_MM
    return here and first is not None and second is not None and first() == second()


def _rounding_mm(positions: Float[np.ndarray, "slice 3"]) -> float:
    """The place value of the last digit that any position needs; `COARSEST_ROUNDING_MM` where all are whole."""
    for digits in range(1, FINEST_DIGIT):
        if np.allclose(np.round(positions, digits), positions, rtol=0, atol=1e-9):
            return min(COARSEST_ROUNDING_MM, 10.0**-digits)
    return 10.0**-FINEST_DIGIT


def _sideways_mm(positions: Float[np.ndarray, "slice 3"], pixel_mm: float) -> float:
    """How far slices may slide sideways and still count as straight."""
    return max(TOLERANCE_MM, TILT_SHARE * pixel_mm, _rounding_mm(positions) * float(np.sqrt(3)))


def _is_tilted(
    positions: Float[np.ndarray, "slice 3"], normal: Float[np.ndarray, "3"], *, pixel_mm: float, repair: bool
) -> bool:
    """Whether slices slide sideways by more than rounding; only `repair` may go on then, up to a limit."""
    heights = positions @ normal
    sideways = positions - np.outer(heights, normal)
    slide = float(np.linalg.norm(sideways - sideways[0], axis=1).max())
    if slide <= _sideways_mm(positions, pixel_mm):
        return False
    degrees = float(np.degrees(np.arctan2(slide, heights[-1] - heights[0])))
    if repair and degrees <= STEEPEST_DEGREES:
        return True
    raise IngestError(
        f"the slices slide sideways by up to {slide:.1f} mm: a gantry tilt of about {degrees:.1f} degrees",
        code="tilt",
        hint="a sheared volume is not read as if it were straight; "
        + ("--repair resamples it" if degrees <= STEEPEST_DEGREES else "no gantry tilts so far: export it again"),
    )


def _is_uneven(positions: Float[np.ndarray, "slice 3"], normal: Float[np.ndarray, "3"], *, repair: bool) -> bool:
    """Whether slices lie off an even grid by more than rounding; only `repair` may go on then, up to a limit."""
    heights = positions @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    odd = np.flatnonzero(np.abs(gaps - usual) > max(TOLERANCE_MM, TOLERANCE_SHARE * usual))
    index = np.arange(len(heights))
    step, start = np.polyfit(index, heights, 1)
    drift = float(np.abs(start + step * index - heights).max())
    if not odd.size and drift <= max(TOLERANCE_MM, DRIFT_SHARE * usual):
        return False
    # A gap has two positions, each off by at most half its last digit; on an oblique stack three coordinates add to it.
    slack = min(_rounding_mm(positions) * float(np.abs(normal).sum()), ROUNDING_SHARE * usual) + SMALLEST_MM
    if drift <= slack and float(np.abs(gaps - step).max()) <= slack:
        return False
    widest = float(gaps.max())
    if repair and widest <= WIDEST_GAP * usual:
        return True
    raise IngestError(
        _gaps_in_words(gaps, usual, odd) or f"the slice gaps drift by up to {drift:.2f} mm from an even {usual:.2f} mm",
        code="slice-gaps",
        hint=f"the hole of {widest:.2f} mm is too wide for --repair (at most one slice may be missing in a row)"
        if widest > WIDEST_GAP * usual
        else "export the series again, or take it with --repair, which fills in by linear interpolation",
    )


def _gaps_in_words(gaps: Float[np.ndarray, " gap"], usual: float, odd: Int[np.ndarray, " odd"]) -> str:
    """Say which slices are missing where gaps are whole multiples, else which gap is odd; empty without any."""
    if not odd.size:
        return ""
    times = gaps[odd] / usual
    whole = np.rint(times)
    more = f", and {odd.size - MOST_NAMED} more places" if odd.size > MOST_NAMED else ""
    if (whole > 1).all() and (np.abs(times - whole) <= DRIFT_SHARE * whole).all():
        places = ", ".join(f"{n - 1:.0f} after slice {at + 1}" for at, n in zip(odd[:MOST_NAMED], whole, strict=False))
        return (
            f"missing from a series of {gaps.size + 1} slices every {usual:.2f} mm are {(whole - 1).sum():.0f}: "
            f"{places}{more}"
        )
    return (
        f"{odd.size} of {gaps.size} slice gaps differ from {usual:.2f} mm; "
        f"the first, after slice {odd[0] + 1}, is {gaps[odd[0]]:.2f} mm"
    )
