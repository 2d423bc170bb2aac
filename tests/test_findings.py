from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.clinic import WEIGHTS, findings

from voxelstem.findings import (
    NOTICE,
    STATUS,
    Certainty,
    Code,
    Curve,
    Finding,
    Findings,
    Looked,
    Novelty,
    Place,
    Quantity,
    Unsaid,
    Weights,
    of_json,
    to_json,
)

SURE = Certainty(probability=0.5)
BOX = Place(low_ras_mm=(0.0, 0.0, 0.0), high_ras_mm=(1.0, 1.0, 1.0))
CURVE = Curve(days=(365.0, 730.0), survival=(0.9, 0.7))

numbers = st.floats(-1e6, 1e6)
shares = st.floats(0, 1)
names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=64)


@st.composite
def certainties(draw):
    if draw(st.booleans()):
        return Certainty(score=draw(numbers))
    low, probability, high = sorted((draw(shares), draw(shares), draw(shares)))
    conformal = draw(st.none() | st.lists(names, max_size=3).map(tuple))
    if draw(st.booleans()):
        return Certainty(
            probability=probability, low=low, high=high, interval="venn_abers", conformal=conformal, level=0.9
        )
    if draw(st.booleans()):
        return Certainty(probability=probability, low=low, high=high, conformal=conformal, level=0.9)
    return Certainty(probability=probability, conformal=conformal, level=0.5, calibration=draw(names))


@st.composite
def places(draw):
    low = draw(st.tuples(numbers, numbers, numbers))
    high = tuple(edge + draw(st.floats(0.125, 1e3)) for edge in low)
    centre = draw(st.none() | st.tuples(numbers, numbers, numbers))
    return Place(centre_ras_mm=centre, low_ras_mm=low, high_ras_mm=high, volume_mm3=draw(st.floats(1e-3, 1e9)))


@st.composite
def single(draw):
    kind = draw(st.sampled_from(["present", "class", "value", "survival", "segment", "box"]))
    own = {
        "class": {"answer": draw(names)},
        "value": {"quantity": Quantity(value=draw(numbers), unit="mm")},
        "survival": {"curve": CURVE},
        "segment": {"part": draw(st.integers(0, 9))},
    }
    place = draw(places())
    if kind == "segment" and draw(st.booleans()):
        value = (place.volume_mm3 or 0.0) / 1000
        own["segment"] = {"quantity": Quantity(value=value, unit="mL", low=0.5 * value, high=2 * value, level=0.9)}
    return Finding(
        name=draw(names),
        kind=kind,
        weights=WEIGHTS,
        code=draw(st.none() | st.just(Code(value="10200004", scheme="SCT", meaning="Liver"))),
        certainty=draw(certainties()),
        place=place,
        novelty=draw(st.none() | st.builds(Novelty, flagged=st.booleans(), score=numbers, p=shares)),
        **own.get(kind, {}),
    )


@settings(max_examples=50)
@given(st.lists(single(), max_size=4))
def test_json_gives_equal_findings_back(told):
    novelty = told[0].novelty if told else Novelty(flagged=True, score=0.5, p=0.1)
    before = findings(findings=tuple(told), novelty=novelty)
    assert of_json(to_json(before)) == before


def test_json_says_that_nothing_is_verified_and_which_weights_spoke():
    told = json.loads(to_json(findings()))
    assert told["schema"] == "voxelstem.findings/3"
    assert told["notice"] == NOTICE
    assert "not a medical device" in told["notice"]
    assert {one["status"] for one in told["findings"]} == {"preliminary, unverified"}
    assert {one["weights"]["sha256"] for one in told["findings"]} == {"ab" * 32}


def test_a_number_of_numpy_that_is_one_of_python_is_written_and_others_are_refused():
    before = findings(findings=(Finding(name="x", kind="present", weights=WEIGHTS, certainty=SURE),))
    after = dataclasses.replace(before.findings[0], certainty=Certainty(probability=np.float64(0.5)))
    assert of_json(to_json(dataclasses.replace(before, findings=(after,)))) == before
    with pytest.raises(ValueError, match="probability must be a finite number"):
        Certainty(probability=np.float32(0.5))


def changed(**changes):
    told = json.loads(to_json(findings()))
    told.update(changes)
    return json.dumps(told)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[]", "no findings of the schema"),
        ("{}", "no findings of the schema"),
        (changed(schema="voxelstem.findings/2"), "no findings of the schema"),
        (changed(extra=1), "1 unknown fields"),
        (changed(study=7), "findings.study is of another type: int"),
        (changed(looked=[]), "at least one series"),
        (changed(notice="all good"), "must not be changed"),
        (changed(findings=[{}]), r"findings.findings\[0\] lacks 'name'"),
        (
            changed(looked=[{"series": "a", "modality": "CT", "spacing_mm": [1, 1], "coverage": 1}]),
            "must have 3 values",
        ),
        (changed(looked=[{"series": "a", "modality": "CT", "spacing_mm": [1, 1, 0], "coverage": 1}]), "positive"),
        (to_json(findings()).replace("0.8", "NaN"), "NaN is no finite number"),
        (to_json(findings()).replace("0.8", "-Infinity"), "Infinity is no finite number"),
        (to_json(findings()).replace("0.8", "1e999"), "finite"),
        (to_json(findings()).replace("0.8", "1" + "0" * 400), "another type"),
        (to_json(findings()).replace("0.8", "true"), "another type: bool"),
        (to_json(findings()).replace('"study"', '"version"'), "twice"),
        ('{"a":' * 100_000, "nested"),
    ],
)
def test_json_that_was_not_written_here_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        of_json(text)


@given(st.text(max_size=200))
def test_any_text_is_refused_with_a_value_error_and_nothing_else(text):
    with pytest.raises(ValueError):  # noqa: PT011 - the kind of error is the fact
        of_json(text)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Certainty(probability=1.5), r"\[0, 1\]"),
        (lambda: Certainty(probability=math.nan), "finite"),
        (lambda: Certainty(), "a probability, or a score"),  # noqa: PLW0108 - as the others here
        (lambda: Certainty(probability=0.5, score=0.9), "a probability, or a score"),
        (lambda: Certainty(score=math.inf), "finite"),
        (lambda: Certainty(score=0.9, low=0.1, high=0.2, level=0.9), "no interval"),
        (lambda: Certainty(score=0.9, calibration="platt"), "not calibrated"),
        (lambda: Certainty(probability=0.5, low=0.4), "two ends"),
        (lambda: Certainty(probability=0.5, low=0.6, high=0.7, level=0.9), "leaves out"),
        (lambda: Certainty(probability=0.5, low=-0.1, high=0.7, level=0.9), r"\[0, 1\]"),
        (lambda: Certainty(probability=0.5, low=0.4, high=0.7), "needs the level"),
        (lambda: Certainty(probability=0.5, conformal=()), "needs the level"),
        (lambda: Certainty(probability=0.5, low=0.4, high=0.7, interval="venn_abers", conformal=()), "needs the level"),
        (lambda: Certainty(probability=0.5, interval="venn_abers"), "no interval that"),
        (lambda: Certainty(probability=0.5, low=0.4, high=0.7, interval="a\nb"), "one line"),
        (lambda: Certainty(probability=0.5, level=1.0), "between 0 and 1"),
        (lambda: Certainty(probability=0.5, conformal=("a\nb",), level=0.9), "one line"),
        (lambda: Quantity(value=math.inf, unit="mm"), "finite"),
        (lambda: Quantity(value=1.0, unit=""), "unit"),
        (lambda: Quantity(value=1.0, unit="mm", low=2.0, high=3.0, level=0.9), "leaves out"),
        (lambda: Place(low_ras_mm=(0.0, 0.0, 0.0)), "two corners"),
        (lambda: Place(low_ras_mm=(0.0, 0.0, 0.0), high_ras_mm=(1.0, 0.0, 1.0)), "must lie below"),
        (lambda: Place(centre_ras_mm=(0.0, math.nan, 0.0)), "finite"),
        (lambda: Place(volume_mm3=0.0), "positive"),
        (lambda: Curve(days=(2.0, 1.0), survival=(0.9, 0.8)), "must rise"),
        (lambda: Curve(days=(0.0,), survival=(0.9,)), "must rise"),
        (lambda: Curve(days=(1.0, 2.0), survival=(0.8, 0.9)), "not rise"),
        (lambda: Curve(days=(1.0,), survival=(0.8, 0.7)), "one survival for each day"),
        (lambda: Curve(days=(), survival=()), "one survival for each day"),
        (lambda: Novelty(flagged=True, score=1.0, p=2.0), r"\[0, 1\]"),
        (lambda: Weights(sha256="AB" * 32, name="x", licence="y"), "64 hexadecimal"),
        (lambda: Weights(sha256="ab" * 32, name="/data/x", licence="y"), "path"),
        (lambda: Weights(sha256="ab" * 32, name="C:\\x", licence="y"), "path"),
        (lambda: Weights(sha256="ab" * 32, name="x", licence=""), "licence"),
        (lambda: Code(value="1" * 17, scheme="SCT", meaning="x"), "16"),
        (lambda: Looked(series="Roe^Jane", modality="CT", spacing_mm=(1.0, 1.0, 1.0), coverage=1.0), "pseudonymous"),
        (lambda: Looked(series="a/b", modality="CT", spacing_mm=(1.0, 1.0, 1.0), coverage=1.0), "pseudonymous"),
        (lambda: Looked(series="a", modality="CT", spacing_mm=(1.0, 1.0, 1.0), coverage=1.1), r"\[0, 1\]"),
        (lambda: Unsaid(what="liver", why=""), "why"),
        (lambda: findings(study="Roe, Jane"), "pseudonymous"),
        (lambda: findings(looked=()), "at least one series"),
        (lambda: findings(weights=()), "weights must name"),
        (lambda: findings(weights=(Weights(sha256="cd" * 32, name="x", licence="y"),)), "weights must name"),
    ],
)
def test_a_record_refuses_what_no_format_could_say(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "guess"}, "kind must be one of"),
        ({"kind": "present"}, "needs certainty"),
        ({"kind": "class", "certainty": SURE}, "needs answer"),
        ({"kind": "class", "answer": "yes"}, "needs certainty"),
        ({"kind": "present", "certainty": SURE, "answer": "yes"}, "belongs to the kind 'class'"),
        ({"kind": "value"}, "needs quantity"),
        ({"kind": "survival"}, "needs curve"),
        (
            {"kind": "value", "quantity": Quantity(value=1.0, unit="mm"), "curve": CURVE},
            "belongs to the kind 'survival'",
        ),
        ({"kind": "segment"}, "volume_mm3"),
        ({"kind": "segment", "place": BOX}, "volume_mm3"),
        ({"kind": "segment", "place": Place(volume_mm3=1.0), "part": -1}, "negative"),
        (
            {"kind": "segment", "place": Place(volume_mm3=9.0), "quantity": Quantity(value=9.0, unit="mL")},
            "volume of all its voxels in mL",
        ),
        (
            {"kind": "segment", "place": Place(volume_mm3=9.0), "quantity": Quantity(value=0.009, unit="mm3")},
            "volume of all its voxels in mL",
        ),
        (
            {"kind": "segment", "place": Place(volume_mm3=9e3), "part": 1, "quantity": Quantity(value=9.0, unit="mL")},
            "volume of all its voxels in mL",
        ),
        (
            {"kind": "present", "certainty": SURE, "quantity": Quantity(value=1.0, unit="mm")},
            "belongs to the kind 'value'",
        ),
        ({"kind": "box", "certainty": SURE}, "corners"),
        ({"kind": "box", "place": BOX}, "needs certainty"),
        ({"kind": "present", "certainty": SURE, "part": 2}, "belongs to the kind 'segment'"),
        ({"kind": "present", "certainty": SURE, "status": "final"}, STATUS),
        ({"kind": "present", "certainty": SURE, "name": "a\nb"}, "one line"),
        ({"kind": "present", "certainty": SURE, "name": "n" * 65}, "64"),
    ],
)
def test_a_finding_says_what_its_kind_needs_and_nothing_of_another(settings, said):
    with pytest.raises(ValueError, match=said):
        Finding(**({"name": "x", "weights": WEIGHTS} | settings))


def test_a_uid_is_a_key():
    assert findings(study="1.2.840.10008.5.1").study == "1.2.840.10008.5.1"


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        findings().findings[0].status = "final"
    assert isinstance(findings(), Findings)
