from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from voxelstem.judging.groups import facet_of, groups_of, missing
from voxelstem.store import Record
from voxelstem.study import Acquisition


@dataclass(frozen=True)
class Line:
    subject: str
    acquisition: Acquisition = field(default_factory=Acquisition)


def line(subject: str, sex: str = "", maker: str = "", model: str = "") -> Record:
    facts = {"Manufacturer": maker, "ManufacturerModelName": model}
    return cast(Record, cast(Any, Line(subject, Acquisition(sex=sex, facts={k: v for k, v in facts.items() if v}))))


def test_a_facet_counts_from_two_groups_on_and_who_has_none_is_not_said() -> None:
    records = [
        line("a", "F", "SIEMENS", "Force"),
        line("b", "M", "SIEMENS", "Force"),
        line("c", "", "SIEMENS", "Force"),
    ]
    assert groups_of(records) == {"sex": {"a": "F", "b": "M", "c": "not said"}}
    assert missing(groups_of(records)).startswith("scanner: the store does not tell")
    assert groups_of([line("a", "F"), line("b", "")]) == {}
    assert missing({}).startswith("sex and scanner")


def test_a_scanner_is_its_maker_and_model_and_a_subject_s_first_word_counts() -> None:
    records = [line("a"), line("a", maker="GE"), line("b", maker="SIEMENS", model="Force"), line("b", maker="GE")]
    assert groups_of(records) == {"scanner": {"a": "ge", "b": "siemens Force"}}


def test_names_of_one_maker_are_one_scanner() -> None:
    records = [line("a", maker="SIEMENS", model="Force"), line("b", maker="Siemens Healthineers", model="Force")]
    assert groups_of(records) == {}
    assert groups_of([*records, line("c", maker="GE")]) == {
        "scanner": {"a": "siemens Force", "b": "siemens Force", "c": "ge"}
    }


def test_another_facet_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'mood'"):
        facet_of(line("a"), "mood")
