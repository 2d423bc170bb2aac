"""The DICOM series that a result goes back to: its images, checked, and the way from our grid to its slices.

Patient and study are copied as they stand, and by pydicom alone: highdicom sees headers without them, so that an odd
date or name stops nothing and nothing of it can get into a message or a log.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Integer
from pydicom import uid
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code as PlainCode

from voxelstem import geometry
from voxelstem.errors import ConfigError, IngestError
from voxelstem.findings import SOFTWARE, Code
from voxelstem.outputs.codes import PRIVATE
from voxelstem.outputs.result import Mask
from voxelstem.sources import raster
from voxelstem.sources.dicom import MOST_FILES
from voxelstem.sources.frames import Slice, slices_of
from voxelstem.sources.grid import Grid, place
from voxelstem.sources.header import Header, Picture, lacks
from voxelstem.sources.pixels import Layout

if TYPE_CHECKING:
    from highdicom.base import SOPClass
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

TOLERANCE_MM = 0.01
"""How far a corner of our grid may lie from the same corner of the slices: what a scanner's last digit moves."""

KINDS = (
    uid.CTImageStorage,
    uid.EnhancedCTImageStorage,
    uid.LegacyConvertedEnhancedCTImageStorage,
    uid.MRImageStorage,
    uid.EnhancedMRImageStorage,
    uid.LegacyConvertedEnhancedMRImageStorage,
)
SAME = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "FrameOfReferenceUID", "Modality")
"""What all images of a series share, and each must have."""
SHOWN = (
    *SAME,
    "SOPInstanceUID",
    "InstanceNumber",
    "PositionReferenceIndicator",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
"""All that highdicom is shown of an image: nothing of the patient."""
BLANK = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
"""What must be there and may be empty (type 2), and is, until `give_back`."""
_LOUD = ("highdicom", "pydicom")


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A series, checked."""

    images: tuple[Dataset, ...]
    """What highdicom may see of each image, in the order of the files."""
    first: Dataset
    """The first image as it came, for `give_back`."""
    grid: Grid

    @property
    def modality(self) -> str:
        """DICOM's word: `CT` or `MR`."""
        return str(self.images[0].Modality)

    @property
    def frame_uid(self) -> str:
        """What the images' coordinates refer to."""
        return str(self.images[0].FrameOfReferenceUID)

    def turned(self) -> tuple[tuple[int, int, int], Float[np.ndarray, "4 4"]]:
        """Shape and affine of the volume that `sources.dicom` makes of this series, in RAS+."""
        room = np.broadcast_to(np.uint8(0), self.grid.shape)  # a view of one byte: only its shape is turned
        view, affine = geometry.turn_to_ras(room, self.grid.affine_ras)
        return (view.shape[0], view.shape[1], view.shape[2]), affine


def need_highdicom() -> None:
    """Check that the package that writes SEG and SR is there.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import highdicom
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the outputs seg and sr need the package highdicom", hint="pip install 'voxelstem[clinic]'"
        ) from error
    assert highdicom


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Let pydicom and highdicom say nothing in this process: their warnings and log lines quote header values."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_series(sources: Sequence[Dataset]) -> Origin:
    """Check that the images are one series of slices on an even grid, in any order.

    Raises:
        IngestError: `empty`, `too-large`, `unsupported`, `several-series`, `several-patients`, `several-volumes`,
            `corrupt` or what `sources.grid.place` refuses.
        ConfigError: the slices are tilted or uneven, so the volume was resampled.
    """
    if not sources:
        raise IngestError(
            "there is no DICOM series to go back to", code="empty", hint="choose the outputs json and nifti"
        )
    if len(sources) > MOST_FILES:
        raise raster.too_large("the series", f"has {len(sources)} files")
    headers = [Header(name=f"image {at + 1}", dataset=one) for at, one in enumerate(sources)]
    _check_alike(headers)
    slices = [one for at, header in enumerate(headers) for one in _slices(at, header)]
    if len({one.stack for one in slices}) > 1:
        raise IngestError(
            f"the series holds {len({one.stack for one in slices})} volumes (stacks, echoes, times or b-values)",
            code="several-volumes",
            hint="export each volume as a series of its own",
        )
    grid = place([one.frame for one in slices], repair=True)
    if grid.repair is not None:
        raise ConfigError(
            "the slices of the series are tilted or unevenly spaced: what was found on the straightened volume "
            "does not lie on them",
            hint="choose the outputs json and nifti, which need no slices",
        )
    raster.check_size("the series", grid.shape, 1)
    return Origin(images=tuple(map(_shown, headers)), first=sources[0], grid=grid)


def _check_alike(headers: list[Header]) -> None:
    """Refuse images of several series or patients, and what an answer could not refer to."""
    for header in headers:
        for keyword in (*SAME, "SOPInstanceUID", "Rows", "Columns"):
            if not header.text(keyword):
                raise lacks(keyword, name=header.name)
    if headers[0].text("SOPClassUID") not in KINDS:
        raise IngestError(
            "the series is neither CT nor MR", code="unsupported", hint="choose the outputs json and nifti"
        )
    if len(headers) > 1 and any(header.values("NumberOfFrames") not in ([], [1]) for header in headers):
        raise IngestError(
            "the series has several multi-frame images, and results go back to one",
            code="unsupported",
            hint="choose the outputs json and nifti",
        )
    for keyword in SAME:
        if len({header.text(keyword) for header in headers}) > 1:
            raise IngestError(
                f"the {len(headers)} images differ in their {keyword}",
                code="several-series",
                hint="give the images of one series",
            )
    if len({header.text("PatientID") for header in headers}) > 1:
        raise IngestError(
            "the images of the series name different patients",
            code="several-patients",
            hint="ask the archive which patient the series belongs to",
        )
    if len({header.text("SOPInstanceUID") for header in headers}) < len(headers):
        raise IngestError(
            "two images of the series have one SOPInstanceUID", code="duplicate-slices", hint="give each image once"
        )


def _slices(at: int, header: Header) -> list[Slice]:
    # Only the size is read of how pixels are stored: there may be none.
    size = Layout(
        rows=header.whole("Rows"),
        columns=header.whole("Columns"),
        frames=header.whole("NumberOfFrames", 1),
        bits_allocated=16,
        bits_stored=16,
        high_bit=15,
        signed=False,
    )
    return list(slices_of(at, Picture(header=header, syntax="", data=b"", start=0), size))


def _shown(header: Header) -> Dataset:
    shown = Dataset()
    for keyword in BLANK:
        setattr(shown, keyword, "")
    for keyword in SHOWN:
        if keyword in header.dataset:
            shown.add(header.dataset[keyword])
    return shown


def to_slices(mask: Mask, origin: Origin) -> Integer[np.ndarray, "frame row column"]:
    """The label map on the slices that it was found on, in the order of the images: the way of the reader, backwards.

    Raises:
        ConfigError: the label map lies on another grid than the volume that the reader makes of the series.
    """
    shape, affine = origin.turned()
    array = mask.labels.array
    if array.shape != shape:
        raise _elsewhere(f"it has {array.shape} voxels and the series {shape}")
    corners = np.array(list(np.ndindex(2, 2, 2)), dtype=np.float64) * (np.array(shape) - 1)
    ours = geometry.voxel_to_patient(corners, mask.affine_ras.astype(np.float64))
    off = float(np.linalg.norm(ours - geometry.voxel_to_patient(corners, affine), axis=1).max())
    if off > TOLERANCE_MM:
        raise _elsewhere(f"a corner lies {off:.3g} mm away, and {TOLERANCE_MM:g} mm are allowed")
    order, flips = geometry.axis_order(origin.grid.affine_ras)
    back = np.flip(array, tuple(axis for axis, flip in enumerate(flips) if flip))
    column_row_slice = back.transpose(np.argsort(order))
    places = np.argsort(origin.grid.order)  # which slice each image shows
    stacked = column_row_slice.transpose(2, 1, 0)
    # Files mostly lie in order, and then there is nothing to gather.
    return stacked if np.array_equal(places, np.arange(len(places))) else stacked[places]


def _elsewhere(why: str) -> ConfigError:
    return ConfigError(
        f"the label map does not lie on the slices of its series: {why}",
        hint="give the map on the grid that the series was read with, not on a resampled one",
    )


def give_back(made: SOPClass, origin: Origin) -> None:
    """Write patient and study into an object as they stand in the series, in its character set."""
    if "SpecificCharacterSet" in origin.first:
        made.add(origin.first["SpecificCharacterSet"])
    made.copy_patient_and_study_information(origin.first)
    for element in list(made):
        if element is origin.first.get(element.tag):  # its own from now on: who changes one must not change the other
            made[element.tag] = copy.deepcopy(element)


def encode(made: Dataset) -> bytes:
    """An object as the bytes of a DICOM file."""
    stream = io.BytesIO()
    made.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def scheme() -> CodingSchemeIdentificationItem:
    """Who stands behind our private codes."""
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    return CodingSchemeIdentificationItem(
        designator=PRIVATE, name="names of classes and findings", responsible_organization=SOFTWARE
    )


def plain(code: Code) -> PlainCode:
    """A code as highdicom takes it."""
    return PlainCode(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)


def item(code: Code) -> Dataset:
    """A code as an item of a sequence."""
    made = Dataset()
    made.CodeValue, made.CodingSchemeDesignator, made.CodeMeaning = code.value, code.scheme, code.meaning
    return made
