from __future__ import annotations

import logging
import warnings

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.uid import Comprehensive3DSRStorage
from tests.clinic import (
    SECRETS,
    WEIGHTS,
    complaints,
    enhanced,
    findings,
    labels,
    read,
    result,
    series,
)

from voxelstem.errors import ConfigError
from voxelstem.findings import Certainty, Curve, Finding, Novelty, Place, Quantity, Unsaid, Weights
from voxelstem.outputs import seg, sr
from voxelstem.pieces import measure

SURE = Certainty(probability=0.8, low=0.7, high=0.9, conformal=("yes",), level=0.9)
PLACE = Place(centre_ras_mm=(1.0, 2.0, 3.0), low_ras_mm=(0.0, 0.0, 0.0), high_ras_mm=(2.0, 4.0, 6.0), volume_mm3=48.25)
EVERYTHING = (
    Finding(
        name="pleural effusion",
        kind="present",
        weights=WEIGHTS,
        certainty=SURE,
        novelty=Novelty(flagged=False, score=0.5, p=0.4),
    ),
    Finding(name="side", kind="class", answer="left", weights=WEIGHTS, certainty=SURE),
    Finding(name="age", kind="value", weights=WEIGHTS, quantity=Quantity(value=61.5, unit="a")),
    Finding(name="death", kind="survival", weights=WEIGHTS, curve=Curve(days=(365.0,), survival=(0.9,))),
    Finding(name="liver", kind="segment", weights=WEIGHTS, place=PLACE),
    Finding(name="liver", kind="segment", weights=WEIGHTS, place=PLACE, part=1),
    Finding(
        name="spleen",
        kind="segment",
        weights=WEIGHTS,
        place=PLACE,
        quantity=Quantity(value=0.04825, unit="mL", low=0.03, high=0.08, level=0.9),
    ),
    Finding(name="lung_nodule_left", kind="box", weights=WEIGHTS, place=PLACE, certainty=SURE),
    Finding(
        name="lung_nodule_right",
        kind="box",
        weights=WEIGHTS,
        place=PLACE,
        certainty=Certainty(probability=0.8, low=0.7, high=0.9, calibration="platt", interval="venn_abers"),
    ),
)


def both(tmp_path, datasets, **changes):
    """Write the segmentation and then the report of the same result."""
    volume = read(tmp_path / "in", datasets)
    found = result(volume, datasets, **changes)
    segmented = seg.write(found, tmp_path / "out")
    return segmented, sr.write(found, tmp_path / "out", before=(segmented,))


def comments(one):
    """The sentences at the end of the report."""
    container = one.ContentSequence[-1]
    assert container.ConceptNameCodeSequence[0].CodeMeaning == "Qualitative Evaluations"
    return [item.TextValue for item in container.ContentSequence]


def test_the_report_is_a_draft_that_nobody_has_verified(tmp_path):
    _, done = both(tmp_path, series())
    one = pydicom.dcmread(done.files[0])
    assert one.SOPClassUID == Comprehensive3DSRStorage
    assert (one.CompletionFlag, one.VerificationFlag, one.PreliminaryFlag) == ("PARTIAL", "UNVERIFIED", "PRELIMINARY")
    assert "VerifyingObserverSequence" not in one
    assert one.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert one.SeriesDescription == "voxelstem findings, preliminary, unverified"


@pytest.mark.parametrize("make", [series, enhanced])
def test_dciodvfy_has_nothing_against_a_report_of_every_kind_of_finding(tmp_path, make):
    _, done = both(tmp_path, make(), findings=findings(findings=EVERYTHING))
    assert complaints(done.files[0]) == []


def test_dciodvfy_has_nothing_against_a_report_of_nothing(tmp_path):
    datasets = series("sagittal", modality="MR")
    volume = read(tmp_path / "in", datasets)
    done = sr.write(result(volume, datasets, mask=None, findings=findings(findings=())), tmp_path / "out")
    assert complaints(done.files[0]) == []


def test_highdicom_reads_back_every_finding(tmp_path):
    _, done = both(tmp_path, series(), findings=findings(findings=EVERYTHING))
    report = highdicom.sr.srread(done.files[0]).content
    plain = report.get_image_measurement_groups()
    volumetric = report.get_volumetric_roi_measurement_groups()
    assert isinstance(report, highdicom.sr.MeasurementReport)
    assert [one.tracking_identifier for one in (*plain, *volumetric)] == [
        "1. pleural effusion",
        "2. side",
        "3. age",
        "4. death",
        "6. liver",
        "7. spleen",
        "8. lung_nodule_left",
        "9. lung_nodule_right",
        "5. liver",
    ]
    assert len({str(one.tracking_uid) for one in (*plain, *volumetric)}) == len(EVERYTHING)


def test_numbers_come_back_with_their_units(tmp_path):
    segmented, done = both(tmp_path, series())
    report = highdicom.sr.srread(done.files[0]).content
    (effusion,), (liver,) = report.get_image_measurement_groups(), report.get_volumetric_roi_measurement_groups()
    told = {one.name.meaning: (one.value, one.unit.value) for one in effusion.get_measurements()}
    assert told["Certainty of Finding"] == (80.0, "%")
    assert told["Out of distribution score"] == (3.5, "1")
    volume, level = liver.get_measurements()
    assert (level.name.meaning, level.value) == ("Level of interval and set", 90.0)
    assert (volume.name.value, volume.value, volume.unit.value) == ("118565006", 48.25, "mm3")
    assert liver.referenced_segment.referenced_segment_numbers == [segmented.segments["liver"]]


def test_the_volume_of_a_segment_is_that_of_its_frames(tmp_path):
    """From the label map to the report, and back from the pixels of the segmentation that it refers to."""
    datasets = series("oblique")
    volume = read(tmp_path / "in", datasets)
    found = labels(volume.shape_ijk)
    told = measure(found.array, volume.affine_ras, found.classes, weights=WEIGHTS, least_mm3=2.0)
    segmented, done = both(
        tmp_path, datasets, mask=found, findings=findings(findings=told.findings, unsaid=told.unsaid)
    )
    drawn = highdicom.seg.segread(segmented.files[0])
    report = highdicom.sr.srread(done.files[0]).content
    groups = report.get_volumetric_roi_measurement_groups()
    assert len(groups) == len(found.classes)
    for one in groups:
        (number,) = one.referenced_segment.referenced_segment_numbers
        assert drawn.get_segment_description(number).segmented_property_type == one.finding_type
        voxels = int(drawn.get_volume(segment_numbers=[number]).array.sum())
        assert one.get_measurements()[0].value == pytest.approx(voxels * 0.6 * 0.8 * 2.5, rel=1e-6)
    pieces = [one for one in told.findings if one.part]
    assert len(report.get_image_measurement_groups()) == len(pieces)


def test_images_and_segmentation_are_referred_to_and_listed_as_evidence(tmp_path):
    datasets = series()
    segmented, done = both(tmp_path, datasets)
    one = highdicom.sr.srread(done.files[0])
    images = {str(each.SOPInstanceUID) for each in datasets}
    evidence = {str(item[2]) for item in one.get_evidence()}
    assert evidence == images | {str(segmented.dataset.SOPInstanceUID)}
    assert {str(item[0]) for item in one.get_evidence()} == {datasets[0].StudyInstanceUID}
    listed = {
        str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        for item in highdicom.sr.utils.find_content_items(one, value_type="IMAGE", recursive=True)
    }
    assert listed == evidence


def test_without_a_segmentation_volumes_are_said_of_the_images_alone(tmp_path):
    datasets = series()
    volume = read(tmp_path / "in", datasets)
    done = sr.write(result(volume, datasets, mask=None), tmp_path / "out")
    report = highdicom.sr.srread(done.files[0]).content
    assert not report.get_volumetric_roi_measurement_groups()
    groups = report.get_image_measurement_groups()
    assert [one.tracking_identifier for one in groups] == ["1. pleural effusion", "2. liver"]
    np.testing.assert_array_equal(groups[1].get_measurements()[0].referenced_coordinates[0].value, [[-1.0, -2.0, 3.0]])


def test_the_observer_is_a_device_with_the_hash_of_its_weights(tmp_path):
    _, done = both(tmp_path, series())
    one = highdicom.sr.srread(done.files[0])
    (context,) = one.content.get_observer_contexts()
    device = context.observer_identifying_attributes
    assert context.observer_type.meaning == "Device"
    assert (device.name, device.model_name, device.serial_number) == ("voxelstem", "voxelstem 1.2.3", "ab" * 32)
    assert one.DeviceSerialNumber == "ab" * 32
    assert str(device.uid).startswith("2.25.")


def test_the_device_changes_with_its_weights_and_with_nothing_else():
    other = Weights(sha256="cd" * 32, name="other", licence="MIT")
    one, two = findings(), findings(weights=(WEIGHTS, other))
    assert sr.serial(one) == "ab" * 32
    assert sr.serial(two) == sr.serial(findings(weights=(other, WEIGHTS), findings=()))
    assert len(sr.serial(two)) == 64
    assert sr.serial(two) not in (WEIGHTS.sha256, other.sha256)


def test_a_report_of_nothing_says_what_was_looked_at_and_what_could_not_be_said(tmp_path):
    datasets = series()
    volume = read(tmp_path / "in", datasets)
    nothing = findings(findings=(), novelty=Novelty(flagged=True, score=0.41021, p=1 / 18))
    done = sr.write(result(volume, datasets, mask=None, findings=nothing), tmp_path / "out")
    one = pydicom.dcmread(done.files[0])
    told = comments(one)
    assert "not a medical device" in told[0]
    assert told[1:] == [
        "Looked at: CT at 0.6 x 0.8 x 2.5 mm, 100.0% of its voxels.",
        "Out of distribution: yes, score 0.4102, p 0.0556.",
        "Not said: spleen, because it lies outside the scan.",
    ]
    names = [item.ConceptNameCodeSequence[0].CodeMeaning for item in one.ContentSequence]
    assert "Imaging Measurements" not in names
    assert highdicom.sr.srread(done.files[0]).content.get_image_measurement_groups() == []


def test_a_long_reason_is_not_cut_off(tmp_path):
    datasets = series()
    volume = read(tmp_path / "in", datasets)
    why = "w" * 1024
    told = findings(findings=(), unsaid=(Unsaid(what="x" * 64, why=why),))
    done = sr.write(result(volume, datasets, mask=None, findings=told), tmp_path / "out")
    assert comments(pydicom.dcmread(done.files[0]))[-1].endswith(f"because {why}.")


def test_patient_and_study_come_back_and_nothing_of_them_is_anywhere_else(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    datasets = series()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        _, done = both(tmp_path, datasets)
    one = pydicom.dcmread(done.files[0])
    for word in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyInstanceUID"):
        assert one[word].value == datasets[0][word].value
    heard = "".join(str(each.message) for each in heard)
    told = caplog.text + "".join(capfd.readouterr()) + heard + "".join(path.name for path in done.files)
    assert not [secret for secret in (*SECRETS, str(tmp_path), datasets[0].StudyInstanceUID) if secret in told]


@pytest.mark.parametrize(
    "changes",
    [
        {"findings": (Finding(name="Größe", kind="present", weights=WEIGHTS, certainty=SURE),)},
        {"unsaid": (Unsaid(what="liver", why="zu groß"),)},
    ],
)
def test_texts_that_dicom_cannot_spell_are_refused(tmp_path, changes):
    datasets = series()
    volume = read(tmp_path / "in", datasets)
    with pytest.raises(ConfigError, match="cannot be written as DICOM"):
        sr.write(result(volume, datasets, findings=findings(**changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
