"""A label map as a DICOM Segmentation (PS3.3, A.51): BINARY, one segment a class, on the slices of its series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Integer

from voxelstem.errors import ConfigError
from voxelstem.findings import NOTICE, SOFTWARE, STATUS, Weights
from voxelstem.outputs import origin as origins
from voxelstem.outputs.codes import check_texts, coded
from voxelstem.outputs.origin import Origin
from voxelstem.outputs.result import Result, Written, keep, named
from voxelstem.room import left_bytes

if TYPE_CHECKING:
    from highdicom.seg import Segmentation, SegmentDescription

SERIES_NUMBER = 9101
"""Far above what scanners count to, so that viewers list it behind the scans."""
LABEL = "PRELIMINARY"
"""ContentLabel is a code string: neither a comma nor lower case letters fit, so `DESCRIPTION` says the rest."""
DESCRIPTION = f"{STATUS.upper()}: not a medical device"
MOST_PIXEL_BYTES = 2**32 - 2
"""What the length of an element can say (PS3.5, 7.1.1)."""
FRAME_BYTES = 60 << 10
"""What highdicom and pydicom hold of one frame beside its pixels (measured: 58 KiB)."""
COPIES = 3
"""How often the pixels exist until the file is written: frame by frame, in one piece, and in the file's bytes."""
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A label map on the slices of a series, its classes numbered from 1 without a gap."""

    numbers: Integer[np.ndarray, "frame row column"]
    classes: tuple[str, ...]
    """`classes[0]` is number 1."""
    absent: tuple[str, ...]
    """Classes without a voxel."""


def write(result: Result, folder: Path, *, before: Sequence[Written] = ()) -> Written:  # noqa: ARG001 - all have it
    """Write the label map to `seg-<digest>.dcm`; nothing where it is empty.

    Patient and study are those of the source images. Everything else says that this is preliminary.

    Args:
        result: What was found; it must hold a label map and the images that it was found on.
        folder: Where to; made where it is absent.
        before: What other outputs wrote of the same result.

    Raises:
        ConfigError: highdicom or a label map is missing, the label map lies on another grid or is too large, or a
            class has a name that DICOM cannot spell.
        IngestError: as `origin.check_series` says.
    """
    origins.need_highdicom()
    mask = result.need_mask("seg")
    check_texts([*mask.labels.classes.values(), mask.weights.name, mask.weights.licence])
    with origins.quiet():
        origin = origins.check_series(result.sources)
        stack = number(origins.to_slices(mask, origin), mask.labels.classes)
        if not stack.classes:
            return Written(output="seg", files=(), left_out=stack.absent)
        made = build(stack, origin, mask.weights, result)
        data = origins.encode(made)
    return Written(
        output="seg",
        files=(keep(folder / f"{named('seg', data)}.dcm", data),),
        left_out=stack.absent,
        segments={name: at for at, name in enumerate(stack.classes, start=1)},
        dataset=made,
    )


def number(labels: Integer[np.ndarray, "frame row column"], classes: dict[int, str]) -> Stack:
    """Number the classes that have voxels from 1 on, in the order of their values.

    Raises:
        ConfigError: the segments' frames would not fit into one DICOM element, or into the memory that is left.
    """
    counts = np.zeros(max(classes, default=0) + 1, dtype=np.int64)
    frames = 0
    for plane in labels:
        held = np.bincount(plane.ravel(), minlength=counts.size)
        counts += held
        frames += int(np.count_nonzero(held[1:]))
    size = frames * math.prod(labels.shape[1:]) / 8
    if size > MOST_PIXEL_BYTES:
        raise ConfigError(
            f"the segmentation would have {frames} frames of {size / 2**30:.1f} GiB, and DICOM allows 4 GiB",
            hint="choose fewer classes, or the output nifti",
        )
    need = frames * FRAME_BYTES + COPIES * size + labels.size
    if need > left_bytes():
        raise ConfigError(
            f"the segmentation would have {frames} frames and take {need / 2**30:.1f} GiB more, and the limit leaves "
            f"{left_bytes() / 2**30:.1f}",
            hint="allow more memory, choose fewer classes, or the output nifti",
        )
    present = [value for value in sorted(classes) if counts[value]]
    table = np.zeros(counts.size, dtype=np.uint8 if len(present) < 2**8 else np.uint16)
    table[present] = np.arange(1, len(present) + 1)
    return Stack(
        numbers=table[labels],
        classes=tuple(classes[value] for value in present),
        absent=tuple(classes[value] for value in sorted(classes) if not counts[value]),
    )


def build(stack: Stack, origin: Origin, weights: Weights, result: Result) -> Segmentation:
    """Make the object. The caller keeps pydicom and highdicom quiet."""
    from highdicom.seg import Segmentation, SegmentationTypeValues

    made = Segmentation(
        source_images=origin.images,
        pixel_array=stack.numbers,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[_describe(at, name, weights, result) for at, name in enumerate(stack.classes, start=1)],
        series_instance_uid=result.new_uid(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=result.new_uid(),
        instance_number=1,
        manufacturer=SOFTWARE,
        manufacturer_model_name=SOFTWARE,
        software_versions=result.findings.version,
        device_serial_number=weights.sha256,
        content_label=LABEL,
        content_description=DESCRIPTION,
        series_description=f"{SOFTWARE} segmentation, {STATUS}",
        coding_schemes=[origins.scheme()],
    )
    made.ImageComments = NOTICE
    origins.give_back(made, origin)
    return made


def _describe(at: int, name: str, weights: Weights, result: Result) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes

    meant = coded(name)
    turn = at * GOLDEN_ANGLE  # hues that stay apart, however many there are
    made = SegmentDescription(
        segment_number=at,
        segment_label=name,
        segmented_property_category=origins.plain(meant.category),
        segmented_property_type=origins.plain(meant.kind),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=SOFTWARE,
            family=codes.DCM.ArtificialIntelligence,
            version=result.findings.version,
            source=SOFTWARE,
            parameters={"weights": weights.name, "sha256": weights.sha256, "licence": weights.licence},
        ),
        tracking_uid=result.new_uid(),
        tracking_id=name,
        anatomic_regions=None if meant.region is None else [origins.plain(meant.region)],
        display_color=CIELabColor(65.0, 60 * math.cos(turn), 60 * math.sin(turn)),
    )
    if meant.side is not None:
        side = origins.item(meant.side)
        if meant.region is None:
            made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
        else:
            made.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [side]
    return made
