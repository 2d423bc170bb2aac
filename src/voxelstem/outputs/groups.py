"""One finding as one measurement group of a DICOM report: TID 1411 where it has a segment, otherwise TID 1501."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as PlainCode

from voxelstem.findings import MM3_PER_ML, Certainty, Code, Finding, Novelty, Point, Quantity
from voxelstem.outputs.codes import NO, PRIVATE, YES, Coded, coded, private
from voxelstem.outputs.origin import Origin, plain
from voxelstem.outputs.result import Result

if TYPE_CHECKING:
    from highdicom.sr import (
        AlgorithmIdentification,
        CoordinatesForMeasurement3D,
        FindingSite,
        Measurement,
        MeasurementProperties,
        MeasurementsAndQualitativeEvaluations,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )

    Group = MeasurementsAndQualitativeEvaluations | VolumetricROIMeasurementsAndQualitativeEvaluations

PERCENT = codes.UCUM.Percent
NUMBER = PlainCode(value="1", scheme_designator="UCUM", meaning="no units")


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Which segment of which DICOM Segmentation shows a class."""

    dataset: Dataset
    number: int


def group(at: int, finding: Finding, segment: Segment | None, origin: Origin, result: Result) -> Group:
    """Make the group of one finding. The caller keeps pydicom and highdicom quiet.

    Probabilities are "Certainty of Finding" (DCM 111012), in percent as everywhere in PS3.16; the interval of one is
    its range of upper and lower uncertainty (TID 310). Places are coordinates in the images' frame of reference:
    a point for the centre, two points for the corners of the box along the patient's axes.

    Args:
        at: The finding's number in the report, from 1.
        finding: What to write.
        segment: The segment of all its voxels, where there is one.
        origin: The series that it was found on.
        result: Gives UIDs and the version.
    """
    from highdicom import sr

    meant = _meaning(finding)
    tracking = sr.TrackingIdentifier(uid=result.new_uid(), identifier=f"{at}. {finding.name}")
    algorithm = _algorithm(finding, result)
    evaluations = [sr.QualitativeEvaluation(name=plain(name), value=plain(value)) for name, value in _answers(finding)]
    if segment is None:
        return sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=tracking,
            finding_type=plain(meant.kind),
            finding_category=_category(finding),
            finding_sites=_sites(meant),
            algorithm_id=algorithm,
            measurements=_measurements(finding, _coordinates(finding, origin)),
            qualitative_evaluations=evaluations,
        )
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=tracking,
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=segment.dataset.SOPClassUID,
            sop_instance_uid=segment.dataset.SOPInstanceUID,
            segment_number=segment.number,
            source_series=sr.SourceSeriesForSegmentation(origin.images[0].SeriesInstanceUID),
        ),
        finding_type=plain(meant.kind),
        finding_category=_category(finding),
        finding_sites=_sites(meant),
        algorithm_id=algorithm,
        # Where it lies is the segment itself; the template has no room for coordinates.
        measurements=_measurements(finding, []),
        qualitative_evaluations=evaluations,
    )


def texts(finding: Finding) -> Iterator[str]:
    """All words of a finding that a report spells out."""
    yield from (finding.name, finding.weights.name, finding.weights.licence)
    if finding.answer:
        yield finding.answer
    if finding.code is not None:
        yield finding.code.meaning
    if finding.quantity is not None:
        yield finding.quantity.unit
    if finding.certainty is not None:
        yield finding.certainty.calibration
        if finding.certainty.interval:
            yield finding.certainty.interval
        yield from finding.certainty.conformal or ()


def _meaning(finding: Finding) -> Coded:
    meant = coded(finding.name)
    return meant if finding.code is None else replace(meant, kind=finding.code)


def _category(finding: Finding) -> PlainCode | None:
    """Structure or abnormality, of what is surely known: "side" or "survival" would be neither."""
    meant = coded(finding.name)
    return None if meant.kind.scheme == PRIVATE else plain(meant.category)


def _sites(meant: Coded) -> list[FindingSite] | None:
    """The organ of a lesion, and the side of either."""
    from highdicom.sr import FindingSite

    if meant.region is None and meant.side is None:
        return None
    where = meant.kind if meant.region is None else meant.region
    return [FindingSite(plain(where), laterality=None if meant.side is None else plain(meant.side))]


def _algorithm(finding: Finding, result: Result) -> AlgorithmIdentification:
    from highdicom.sr import AlgorithmIdentification

    weights = finding.weights
    return AlgorithmIdentification(
        name=weights.name,
        version=result.findings.version,
        manufacturer=result.findings.software,
        parameters=[f"weights sha256 {weights.sha256}", f"licence {weights.licence}"],
    )


def _answers(finding: Finding) -> Iterator[tuple[Code, Code]]:
    """What is said in words: question and answer."""
    if finding.answer:
        yield coded(finding.name).kind, _answer(finding.answer)
    if finding.certainty is not None:
        yield private("Calibration"), private(finding.certainty.calibration)
        if finding.certainty.interval:
            yield private("Interval of the probability"), private(finding.certainty.interval)
        if finding.certainty.conformal is not None:
            for answer in finding.certainty.conformal or ("no answer",):
                yield private("Conformal set"), _answer(answer)
    if finding.novelty is not None:
        yield private("Out of distribution"), YES if finding.novelty.flagged else NO


def _answer(word: str) -> Code:
    return {"yes": YES, "no": NO}.get(word.lower(), private(word))


def _measurements(finding: Finding, coordinates: list[CoordinatesForMeasurement3D]) -> list[Measurement]:
    """What is said in numbers; the first of them carries the coordinates."""
    from highdicom.sr import Measurement

    numbers = list(_numbers(finding))
    return [
        Measurement(
            name=one.name,
            value=one.value,
            unit=one.unit,
            properties=_properties(one),
            referenced_coordinates=coordinates or None if at == 0 else None,
        )
        for at, one in enumerate(numbers)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Number:
    name: PlainCode
    value: float
    unit: PlainCode
    low: float | None = None
    high: float | None = None


def _numbers(finding: Finding) -> Iterator[_Number]:
    if finding.place is not None and finding.place.volume_mm3 is not None:
        yield _volume(float(finding.place.volume_mm3), finding.quantity if finding.kind == "segment" else None)
    if finding.quantity is not None and finding.kind != "segment":
        told = finding.quantity
        unit = PlainCode(value=told.unit, scheme_designator="UCUM", meaning=told.unit)
        name = plain(finding.code or coded(finding.name).kind)
        yield _Number(
            name=name, value=float(told.value), unit=NUMBER if told.unit == "1" else unit, low=told.low, high=told.high
        )
    if finding.curve is not None:
        for days, share in zip(finding.curve.days, finding.curve.survival, strict=True):
            yield _Number(name=plain(private(f"Survival at {days:g} days")), value=share * 100.0, unit=PERCENT)
    if finding.certainty is not None:
        yield from _sure(finding.certainty)
    level = finding.quantity.level if finding.quantity is not None else None
    level = finding.certainty.level if level is None and finding.certainty is not None else level
    if level is not None:
        # An interval with a name of its own is not made to cover a share of cases.
        named = finding.quantity is None and finding.certainty is not None and finding.certainty.interval
        name = "Level of conformal set" if named else "Level of interval and set"
        yield _Number(name=plain(private(name)), value=level * 100.0, unit=PERCENT)
    if finding.novelty is not None:
        yield from _strange(finding.novelty)


def _volume(volume_mm3: float, interval: Quantity | None) -> _Number:
    """A volume, with the ends of its interval in the same unit where there is one."""
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return _Number(
        name=codes.SCT.Volume,
        value=volume_mm3,
        unit=codes.UCUM.CubicMillimeter,
        low=None if low is None else low * MM3_PER_ML,
        high=None if high is None else high * MM3_PER_ML,
    )


def _sure(certainty: Certainty) -> Iterator[_Number]:
    if certainty.score is not None:
        yield _Number(name=plain(private("Score, no probability")), value=float(certainty.score), unit=NUMBER)
    if certainty.probability is None:
        return
    scale = 100.0
    yield _Number(
        name=codes.DCM.CertaintyOfFinding,
        value=certainty.probability * scale,
        unit=PERCENT,
        low=None if certainty.low is None else certainty.low * scale,
        high=None if certainty.high is None else certainty.high * scale,
    )


def _strange(novelty: Novelty) -> Iterator[_Number]:
    yield _Number(name=plain(private("Out of distribution score")), value=float(novelty.score), unit=NUMBER)
    yield _Number(name=plain(private("Out of distribution p")), value=float(novelty.p), unit=NUMBER)


def _properties(number: _Number) -> MeasurementProperties | None:
    """An interval, by how far its ends lie from the value, in the value's own unit."""
    from highdicom.sr import MeasurementProperties, NumContentItem, RelationshipTypeValues

    if number.low is None or number.high is None:
        return None
    made = MeasurementProperties()
    ends = (
        (codes.SCT.RangeOfUpperMeasurementUncertainty, number.high - number.value),
        (codes.SCT.RangeOfLowerMeasurementUncertainty, number.value - number.low),
    )
    for name, distance in ends:
        made.append(
            NumContentItem(
                name=name,
                value=float(distance),
                unit=number.unit,
                relationship_type=RelationshipTypeValues.HAS_PROPERTIES,
            )
        )
    return made


def _coordinates(finding: Finding, origin: Origin) -> list[CoordinatesForMeasurement3D]:
    from highdicom.sr import CoordinatesForMeasurement3D, GraphicTypeValues3D

    place = finding.place
    if place is None:
        return []
    sets: list[tuple[GraphicTypeValues3D, list[Point]]] = []
    if place.centre_ras_mm is not None:
        sets.append((GraphicTypeValues3D.POINT, [place.centre_ras_mm]))
    if place.low_ras_mm is not None and place.high_ras_mm is not None:
        sets.append((GraphicTypeValues3D.MULTIPOINT, [place.low_ras_mm, place.high_ras_mm]))
    return [
        CoordinatesForMeasurement3D(
            graphic_type=kind,
            graphic_data=np.array(points, dtype=np.float64) * (-1.0, -1.0, 1.0),  # RAS to DICOM's LPS
            frame_of_reference_uid=origin.frame_uid,
        )
        for kind, points in sets
    ]
