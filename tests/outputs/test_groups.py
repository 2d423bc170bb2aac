from __future__ import annotations

import numpy as np
import pytest
from tests.clinic import WEIGHTS, findings, result, series

from voxelstem.findings import Certainty, Code, Curve, Finding, Novelty, Place, Quantity
from voxelstem.outputs.groups import Segment, group, texts
from voxelstem.outputs.origin import check_series
from voxelstem.study import Provenance, Volume

SURE = Certainty(probability=0.8, low=0.65, high=0.9, calibration="temperature", conformal=("yes", "no"), level=0.9)


@pytest.fixture(scope="module")
def origin():
    return check_series(series())


def made(finding, origin, segment=None):
    shape, affine = origin.turned()
    provenance = Provenance(source_format="dicom", sha256="0" * 64, orientation="LPS")
    volume = Volume(array=np.zeros((1, *shape)), affine_ras=affine, modality="CT", provenance=provenance)
    found = result(volume, origin.images, findings=findings(findings=(finding,)))
    return group(1, finding, segment, origin, found)


def one(**settings):
    return Finding(**({"name": "liver_lesion", "kind": "present", "weights": WEIGHTS, "certainty": SURE} | settings))


def numbers(made):
    """Name, value and unit of each measurement."""
    return [(item.name.meaning, pytest.approx(item.value), item.unit.value) for item in made.get_measurements()]


def words(made):
    said = [(item.name.meaning, item.value.meaning) for item in made.get_qualitative_evaluations()]
    return [(question, answer) for question, answer in said if question != "Finding category"]


def test_a_probability_is_a_certainty_in_percent_with_its_interval(origin):
    told = made(one(), origin)
    assert numbers(told) == [("Certainty of Finding", 80.0, "%"), ("Level of interval and set", 90.0, "%")]
    ends = {
        item.name.meaning: (item.value, item.unit.value)
        for item in told.get_measurements()[0][0].ContentSequence
        if "uncertainty" in item.name.meaning
    }
    assert ends == {
        "+, range of upper measurement uncertainty": (pytest.approx(10.0), "%"),
        "-, range of lower measurement uncertainty": (pytest.approx(15.0), "%"),
    }


def test_an_interval_says_how_it_was_made_and_then_only_the_set_has_a_level(origin):
    sure = Certainty(
        probability=0.8, low=0.65, high=0.9, calibration="platt", interval="venn_abers", conformal=("yes",), level=0.9
    )
    told = made(one(certainty=sure), origin)
    assert ("Interval of the probability", "venn_abers") in words(told)
    assert numbers(told) == [("Certainty of Finding", 80.0, "%"), ("Level of conformal set", 90.0, "%")]
    bare = made(one(certainty=Certainty(probability=0.8, low=0.65, high=0.9, interval="venn_abers")), origin)
    assert numbers(bare) == [("Certainty of Finding", 80.0, "%")]
    assert "venn_abers" in list(texts(one(certainty=sure)))


def test_a_score_that_is_no_probability_is_not_called_a_certainty(origin):
    told = made(one(certainty=Certainty(score=0.93)), origin)
    assert numbers(told) == [("Score, no probability", pytest.approx(0.93), "1")]
    assert ("Calibration", "none") in words(told)


def test_the_interval_of_a_volume_stands_with_the_volume_in_its_own_unit(origin):
    place = Place(volume_mm3=7500.0, centre_ras_mm=(1.0, 2.0, 3.0))
    size = Quantity(value=7.5, unit="mL", low=6.0, high=10.0, level=0.9)
    told = made(one(kind="segment", certainty=None, place=place, quantity=size), origin)
    assert numbers(told) == [("Volume", 7500.0, "mm3"), ("Level of interval and set", 90.0, "%")]
    ends = {
        item.name.meaning: (item.value, item.unit.value)
        for item in told.get_measurements()[0][0].ContentSequence
        if "uncertainty" in item.name.meaning
    }
    assert ends == {
        "+, range of upper measurement uncertainty": (pytest.approx(2500.0), "mm3"),
        "-, range of lower measurement uncertainty": (pytest.approx(1500.0), "mm3"),
    }


def test_what_and_where_are_coded(origin):
    told = made(one(name="lung_nodule_left"), origin)
    assert (told.finding_type.meaning, told.finding_category.meaning) == (
        "Nodule",
        "Morphologically Abnormal Structure",
    )
    assert told.finding_sites[0].value.meaning == "Lung"
    assert told.finding_sites[0].laterality.meaning == "Left"
    given = made(one(name="odd name", code=Code(value="60046008", scheme="SCT", meaning="Pleural effusion")), origin)
    assert given.finding_type.value == "60046008"
    # An organ is an anatomical structure; of what a name that nobody knows is, nothing is said.
    assert made(one(name="liver"), origin).finding_category.meaning == "Anatomical Structure"
    assert given.finding_category is None


def test_calibration_set_and_novelty_are_said_in_words(origin):
    told = made(one(novelty=Novelty(flagged=True, score=3.5, p=0.01)), origin)
    assert words(told) == [
        ("Calibration", "temperature"),
        ("Conformal set", "Yes"),
        ("Conformal set", "No"),
        ("Out of distribution", "Yes"),
    ]
    assert numbers(told)[2:] == [("Out of distribution score", 3.5, "1"), ("Out of distribution p", 0.01, "1")]
    calm = made(one(certainty=Certainty(probability=0.5, conformal=(), level=0.9)), origin)
    assert words(calm) == [("Calibration", "none"), ("Conformal set", "no answer")]


def test_a_class_is_question_and_answer(origin):
    told = made(one(name="kernel", kind="class", answer="sharp"), origin)
    assert words(told)[0] == ("kernel", "sharp")


def test_a_value_keeps_its_unit_and_its_interval(origin):
    length = Quantity(value=12.5, unit="mm", low=11.0, high=13.0, level=0.8)
    told = made(one(name="diameter", kind="value", certainty=None, quantity=length), origin)
    assert numbers(told) == [("diameter", 12.5, "mm"), ("Level of interval and set", 80.0, "%")]
    plain = made(one(name="score", kind="value", certainty=None, quantity=Quantity(value=2.0, unit="1")), origin)
    assert plain.get_measurements()[0].unit.meaning == "no units"


def test_a_curve_is_one_number_for_each_day(origin):
    curve = Curve(days=(365.0, 730.0), survival=(0.9, 0.75))
    told = made(one(name="death", kind="survival", certainty=None, curve=curve), origin)
    assert numbers(told) == [("Survival at 365 days", 90.0, "%"), ("Survival at 730 days", 75.0, "%")]


def test_places_are_points_in_the_frame_of_the_images_left_and_back_of_the_patient_positive(origin):
    place = Place(
        centre_ras_mm=(1.0, 2.0, 3.0), low_ras_mm=(0.0, -1.0, 2.0), high_ras_mm=(4.0, 5.0, 6.0), volume_mm3=7.5
    )
    told = made(one(kind="box", place=place), origin)
    assert numbers(told)[0] == ("Volume", 7.5, "mm3")
    first, second = told.get_measurements()[:2]
    centre, box = first.referenced_coordinates
    np.testing.assert_array_equal(centre.value, [[-1.0, -2.0, 3.0]])
    np.testing.assert_array_equal(box.value, [[0.0, 1.0, 2.0], [-4.0, -5.0, 6.0]])
    assert {str(item.frame_of_reference_uid) for item in (centre, box)} == {origin.frame_uid}
    assert not second.referenced_coordinates


def test_a_segment_is_referred_to_by_its_number(origin):
    place = Place(volume_mm3=7.5, centre_ras_mm=(1.0, 2.0, 3.0))
    dataset = type(origin.images[0])()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.4", "2.25.99"
    told = made(one(kind="segment", certainty=None, place=place), origin, segment=Segment(dataset=dataset, number=3))
    assert told[0].template_id == "1411"
    segment = told.referenced_segment
    assert (str(segment.referenced_sop_instance_uid), segment.referenced_segment_numbers) == ("2.25.99", [3])
    assert str(segment.source_series_for_segmentation.value) == origin.images[0].SeriesInstanceUID
    assert numbers(told) == [("Volume", 7.5, "mm3")]


def test_each_group_names_its_weights(origin):
    told = made(one(), origin)
    said = [item.value for item in told[0].ContentSequence if item.name.meaning.startswith("Algorithm")]
    assert said == ["maker/tiny-ct", "1.2.3", "voxelstem", f"weights sha256 {'ab' * 32}", "licence Apache-2.0"]


def test_all_words_that_will_be_spelt_are_told():
    finding = one(
        name="n",
        kind="class",
        answer="a",
        code=Code(value="1", scheme="s", meaning="m"),
        certainty=Certainty(probability=0.5, calibration="c", conformal=("d",), level=0.9),
    )
    assert list(texts(finding)) == ["n", "maker/tiny-ct", "Apache-2.0", "a", "m", "c", "d"]
