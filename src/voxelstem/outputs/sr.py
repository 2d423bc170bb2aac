"""Findings as a DICOM Structured Report: Comprehensive 3D SR, template TID 1500 (PS3.16), which nobody has verified.

It refers to the images and, where one was written, to the segmentation. It is written also where nothing was found:
what was looked at, and what could not be said, is an answer too.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as PlainCode

from voxelstem.findings import NOTICE, SOFTWARE, STATUS, Finding, Findings
from voxelstem.outputs import origin as origins
from voxelstem.outputs.codes import check_texts
from voxelstem.outputs.groups import Segment, group, texts
from voxelstem.outputs.origin import Origin
from voxelstem.outputs.result import Result, Written, keep, named

if TYPE_CHECKING:
    from highdicom.sr import Comprehensive3DSR, ContainerContentItem, ContentItem, ObservationContext

SERIES_NUMBER = 9102
"""Far above what scanners count to, so that viewers list it behind the scans."""
LONGEST_TEXT = 2048
EVALUATIONS = PlainCode(value="C0034375", scheme_designator="UMLS", meaning="Qualitative Evaluations")
ENGLISH = PlainCode(value="en-US", scheme_designator="RFC5646", meaning="English (United States)")
SOURCE = PlainCode(value="260753009", scheme_designator="SCT", meaning="Source")
PROCEDURES = {"CT": codes.LN.CTUnspecifiedBodyRegion, "MR": codes.LN.MRIUnspecifiedBodyRegion}


def write(result: Result, folder: Path, *, before: Sequence[Written] = ()) -> Written:
    """Write the findings to `sr-<digest>.dcm`.

    Patient and study are those of the source images. The report is PARTIAL, UNVERIFIED and PRELIMINARY, and its
    observer is a device: this software with these weights.

    Args:
        result: What was found; it must hold the images that it was found on.
        folder: Where to; made where it is absent.
        before: What other outputs wrote of the same result: the segmentation among it is referred to.

    Raises:
        ConfigError: highdicom is missing, the slices are tilted or uneven, or a text cannot be spelt by DICOM.
        IngestError: as `origin.check_series` says.
    """
    origins.need_highdicom()
    check_texts(word for finding in result.findings.findings for word in texts(finding))
    check_texts(_comments(result.findings), most=LONGEST_TEXT)
    with origins.quiet():
        origin = origins.check_series(result.sources)
        made = build(result, origin, before)
        data = origins.encode(made)
    return Written(output="sr", files=(keep(folder / f"{named('sr', data)}.dcm", data),), dataset=made)


def build(result: Result, origin: Origin, before: Sequence[Written]) -> Comprehensive3DSR:
    """Make the object. The caller keeps pydicom and highdicom quiet."""
    from highdicom.sr import Comprehensive3DSR

    shown = [one for one in before if one.output == "seg" and one.dataset is not None]
    made = Comprehensive3DSR(
        evidence=[*origin.images, *(one.dataset for one in shown if one.dataset is not None)],
        content=_root(result, origin, shown),
        series_instance_uid=result.new_uid(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=result.new_uid(),
        instance_number=1,
        manufacturer=SOFTWARE,
        manufacturer_model_name=SOFTWARE,
        software_versions=result.findings.version,
        device_serial_number=serial(result.findings),
        is_complete=False,
        is_final=False,
        is_verified=False,
        series_description=f"{SOFTWARE} findings, {STATUS}",
        coding_schemes=[origins.scheme()],
    )
    origins.give_back(made, origin)
    return made


def serial(findings: Findings) -> str:
    """What stands for the weights as a device: their SHA-256, or that of all their SHA-256 where they are several."""
    digests = sorted({one.sha256 for one in findings.weights})
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _root(result: Result, origin: Origin, shown: Sequence[Written]) -> ContainerContentItem:
    """The content tree. highdicom's own refuses a report without measurements and has no room for comments."""
    from highdicom.sr import (
        CodeContentItem,
        CodedConcept,
        ContainerContentItem,
        ContentSequence,
        RelationshipTypeValues,
    )
    from highdicom.sr import LanguageOfContentItemAndDescendants as Language

    root = ContainerContentItem(name=codes.DCM.ImagingMeasurementReport, template_id="1500")
    procedure = CodeContentItem(
        name=codes.DCM.ProcedureReported,
        value=PROCEDURES[origin.modality],
        relationship_type=RelationshipTypeValues.HAS_CONCEPT_MOD,
    )
    items: list[ContentItem] = [*Language(CodedConcept.from_code(ENGLISH)), *_observer(result.findings), procedure]
    items.append(_library(origin))
    measured = [
        item
        for at, finding in enumerate(result.findings.findings, start=1)
        for item in group(at, finding, _segment(finding, shown), origin, result)
    ]
    if measured:
        items.append(_container(codes.DCM.ImagingMeasurements, measured))
    items.append(_container(EVALUATIONS, [_comment(text) for text in _comments(result.findings)]))
    root.ContentSequence = ContentSequence(items)
    return root


def _segment(finding: Finding, shown: Sequence[Written]) -> Segment | None:
    """Where all voxels of a class are drawn. A piece of it has no segment of its own."""
    if finding.kind != "segment" or finding.part:
        return None
    for one in shown:
        if one.dataset is not None and finding.name in one.segments:
            return Segment(dataset=one.dataset, number=one.segments[finding.name])
    return None


def _observer(findings: Findings) -> ObservationContext:
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObservationContext, ObserverContext

    number = serial(findings)
    device = DeviceObserverIdentifyingAttributes(
        # A UID made of a UUID (PS3.5, B.2): the same version with the same weights is the same device.
        uid=f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{SOFTWARE} {findings.version} {number}').int}",
        name=SOFTWARE,
        manufacturer_name=SOFTWARE,
        model_name=f"{SOFTWARE} {findings.version}",
        serial_number=number,
    )
    context = ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    return ObservationContext(observer_device_context=context)


def _library(origin: Origin) -> ContainerContentItem:
    """All images that were looked at (TID 1600)."""
    from highdicom.sr import ImageContentItem, RelationshipTypeValues

    images = [
        ImageContentItem(
            name=SOURCE,
            referenced_sop_class_uid=image.SOPClassUID,
            referenced_sop_instance_uid=image.SOPInstanceUID,
            relationship_type=RelationshipTypeValues.CONTAINS,
        )
        for image in origin.images
    ]
    return _container(codes.DCM.ImageLibrary, [_container(codes.DCM.ImageLibraryGroup, images)])


def _container(name: PlainCode, items: Sequence[ContentItem]) -> ContainerContentItem:
    from highdicom.sr import ContainerContentItem, ContentSequence, RelationshipTypeValues

    made = ContainerContentItem(name=name, relationship_type=RelationshipTypeValues.CONTAINS)
    made.ContentSequence = ContentSequence(items)
    return made


def _comments(findings: Findings) -> Iterator[str]:
    """What a reader must know, in sentences. Keys of series are left out: the images themselves are listed."""
    yield NOTICE
    for one in findings.looked:
        spacing = " x ".join(f"{edge:g}" for edge in one.spacing_mm)
        yield f"Looked at: {one.modality} at {spacing} mm, {one.coverage:.1%} of its voxels."
    if findings.novelty is not None:
        yield (
            f"Out of distribution: {'yes' if findings.novelty.flagged else 'no'}, score {findings.novelty.score:.4g}, "
            f"p {findings.novelty.p:.3g}."
        )
    for one in findings.unsaid:
        yield f"Not said: {one.what}, because {one.why}."


def _comment(text: str) -> ContentItem:
    from highdicom.sr import RelationshipTypeValues, TextContentItem

    return TextContentItem(name=codes.DCM.Comment, value=text, relationship_type=RelationshipTypeValues.CONTAINS)
