from __future__ import annotations

import re

import numpy as np
import pytest

from voxelstem.sources import wording
from voxelstem.sources.wording import Saying, fill, length, templates, write_report

NODULE = {"side": "left", "other": "right", "lobe": "upper", "size": "24", "density": "solid"}
WELL = (
    Saying(topic="contrast", case="none", amiss=False),
    Saying(topic="lung", case="none", amiss=False),
    Saying(topic="effusion", case="none", amiss=False),
)
ILL = (WELL[0], Saying(topic="lung", case="one", amiss=True, values=NODULE), WELL[2])


def rng(seed=0):
    return np.random.default_rng(seed)


def every_template():
    for topic, cases in wording._templates().items():
        if topic != "words":
            for case, forms in cases.items():
                for form, lines in forms.items():
                    yield from ((topic, case, form, line) for line in lines)


def test_every_place_of_every_template_can_be_filled():
    values = {"side": "left", "other": "right", "lobe": "upper", "size": "24 mm", "length": "9 cm"}
    values |= {"density": "solid", "amount": "small"}
    for topic, case, _, line in every_template():
        text = fill(line, values, rng())
        assert "{" not in text, (topic, case, line)
        assert text[0].isupper() or text[0].isdigit()


def test_a_place_without_value_or_words_is_refused():
    with pytest.raises(KeyError, match="nowhere"):
        fill("A {nowhere}.", {}, rng())


def test_sentences_end_with_a_full_stop_and_items_do_not():
    for topic, case, form, line in every_template():
        assert line.endswith(".") == (form != "impression"), (topic, case, line)


def test_no_template_stands_twice_in_its_list():
    lines = list(every_template())
    assert len(lines) == len(set(lines))


def test_a_template_that_needs_no_side_names_none_but_both():
    for topic, case, _, line in every_template():
        sides = set(re.findall(r"\b(left|right)\b", line.lower()))
        assert sides in (set(), {"left", "right"}), (topic, case, line)


def test_a_value_is_said_in_several_words():
    said = {fill("{density}", {"density": "hypodense"}, rng(seed)) for seed in range(40)}
    assert said == {"Hypodense", "Low-density", "Hypoattenuating"}


def test_sizes_are_given_in_both_units_and_agree():
    said = {length(24, rng(seed)) for seed in range(20)}
    assert said == {"24 mm", "2.4 cm"}


@pytest.mark.parametrize("seed", range(25))
def test_findings_are_always_said_and_the_normal_is_sometimes_left_out(seed):
    report = write_report(ILL, rng(seed), rewrites=3)
    for text in (report.findings_text, *report.findings_rewrites[::2]):
        assert "left" in text.lower()
        assert re.search(r"24 mm|2\.4 cm", text)
    assert len(report.findings_rewrites) == len(report.impression_rewrites) == 3


def test_every_second_rewrite_is_brief():
    for seed in range(20):
        report = write_report(ILL, rng(seed), rewrites=4)
        for one, other in (report.findings_rewrites[1::2], report.impression_rewrites[1::2]):
            assert 0 < min(len(one), len(other))
            assert max(one.count("."), other.count(".")) <= 6


def test_what_is_normal_is_said_by_some_reports_and_not_by_others():
    said = ["effusion" in write_report(WELL, rng(seed)).findings_text for seed in range(40)]
    assert 5 < sum(said) < 40


def test_only_a_healthy_patient_is_called_so():
    healthy = templates("well", "said", "impression")
    for seed in range(30):
        assert any(one in write_report(WELL, rng(seed)).impression_text for one in healthy)
        assert not any(one in write_report(ILL, rng(seed)).impression_text for one in healthy)


def test_the_same_numbers_write_the_same_report_and_others_another():
    assert write_report(ILL, rng(3)) == write_report(ILL, rng(3))
    assert len({write_report(ILL, rng(seed)).text for seed in range(50)}) > 45


@pytest.mark.parametrize(("topic", "case"), [("lung", "none"), ("effusion", "none"), ("kidneys", "both")])
def test_what_is_normal_is_said_of_each_side_too_and_then_of_both(topic: str, case: str):
    # Denied only where the other side is ill, a side would tell of the other.
    one = Saying(topic=topic, case=case, amiss=False)
    beside = {
        form: {
            side: {
                fill(line, {"other": side}, rng(seed)) for line in templates(topic, "other", form) for seed in range(99)
            }
            for side in ("left", "right")
        }
        for form in ("prose", "terse")
    }
    for form, said_of in beside.items():
        texts = [wording._say(one, form, rng(seed)) for seed in range(200)]
        sided = [
            text
            for text in texts
            if any(f"{left} {right}" == text for left in said_of["left"] for right in said_of["right"])
        ]
        assert 60 < len(sided) < 140, (form, len(sided))
    whole = Saying(topic="spleen", case="normal", amiss=False, values={"length": "90"})
    assert "left" not in " ".join(wording._say(whole, "prose", rng(seed)) for seed in range(50))
