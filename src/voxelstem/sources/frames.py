"""What each frame of a DICOM file says of itself: its place, its rescale and which volume it belongs to.

A single-frame file says it in its header, a multi-frame one in functional groups (PS3.3, C.7.6.16), of its own frame
or shared by all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.grid import Frame
from voxelstem.sources.header import Header, Picture
from voxelstem.sources.pixels import Layout, planes

HU_TYPES = ("", "HU", "US")
"""RescaleType of a CT: often absent, or US (unspecified) by converters that only copied slope and intercept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """One frame of one file."""

    picture: int
    """Which of the files."""
    number: int
    """Which frame of it."""
    frame: Frame
    slope: float
    intercept: float
    stack: tuple[str, ...]
    """What frames of one volume share, in multi-frame files."""


def slices_of(index: int, picture: Picture, stored: Layout) -> Iterator[Slice]:
    """The frames of a file and what their functional groups say, or its one picture.

    Args:
        index: The file's number among the series' files.
        picture: The file.
        stored: How its pixels are stored.

    Raises:
        IngestError: `unsupported` for frames without places, `corrupt`, `no-rescale` or `not-hu` for a CT.
    """
    header = picture.header
    own = header.items("PerFrameFunctionalGroupsSequence")
    shared = header.items("SharedFunctionalGroupsSequence")[:1]
    if not own and stored.frames > 1:
        raise IngestError(
            f"{header.name} has {stored.frames} frames and does not say where they lie",
            code="unsupported",
            hint="export the series as single-frame images",
        )
    if own and len(own) != stored.frames:
        raise raster.corrupt(header.name, f"it declares {stored.frames} frames and describes {len(own)}")
    for number, groups in enumerate(own or [header]):
        places = [groups, *shared] if own else []
        name = f"{header.name}, frame {number + 1}" if own else header.name
        measures = _group(places, "PixelMeasuresSequence", header)
        slope, intercept = _rescale(_group(places, "PixelValueTransformationSequence", header), header, name)
        yield Slice(
            picture=index,
            number=number,
            frame=Frame(
                name=name,
                orientation=_group(places, "PlaneOrientationSequence", header).vector("ImageOrientationPatient", 6),
                position_mm=_group(places, "PlanePositionSequence", header).vector("ImagePositionPatient", 3),
                pixel_spacing_mm=measures.vector("PixelSpacing", 2),
                rows=stored.rows,
                columns=stored.columns,
                digest=lambda number=number: _digest(picture, stored, number),
            ),
            slope=slope,
            intercept=intercept,
            stack=_stack(places, header) if own else (),
        )


def _group(places: list[Header], sequence: str, header: Header) -> Header:
    """The functional group of a frame, its own or the one that all share; the header itself in single-frame files."""
    return next((item for groups in places for item in groups.items(sequence)[:1]), header)


def _stack(places: list[Header], header: Header) -> tuple[str, ...]:
    """What tells the volumes of a multi-frame file apart."""
    content = _group(places, "FrameContentSequence", header)
    echo = _group(places, "MREchoSequence", header)
    diffusion = _group(places, "MRDiffusionSequence", header)
    kind = next(
        (_group(places, name, header) for name in ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence") if places),
        header,
    )
    return (
        content.text("StackID"),
        content.text("TemporalPositionIndex"),
        echo.text("EffectiveEchoTime"),
        diffusion.text("DiffusionBValue"),
        kind.text("FrameType"),
    )


def _rescale(group: Header, header: Header, name: str) -> tuple[float, float]:
    """Slope and intercept of one slice; a CT without them has no Hounsfield units."""
    modality = header.text("Modality")
    if not (group.values("RescaleSlope") and group.values("RescaleIntercept")):
        if modality == "CT":
            raise IngestError(
                f"{name} has no rescale slope and intercept, so its values are not Hounsfield units",
                code="no-rescale",
                hint="export the original series",
            )
        return 1.0, 0.0
    if modality == "CT" and group.text("RescaleType").strip().upper() not in HU_TYPES:
        raise IngestError(
            f"{name} says that its values are not Hounsfield units (RescaleType)",
            code="not-hu",
            hint="give the series in Hounsfield units, not a map of material or atomic number",
        )
    slope, intercept = group.number("RescaleSlope"), group.number("RescaleIntercept")
    if slope == 0:
        raise raster.corrupt(name, "its RescaleSlope is zero")
    return slope, intercept


def _digest(picture: Picture, stored: Layout, number: int) -> str:
    found = next(plane for index, plane in enumerate(planes(picture, stored)) if index == number)
    return hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest()
