from __future__ import annotations

import re
from html import unescape

import pytest

from voxelstem.report import page
from voxelstem.report.verdict import NEEDS, unmeasured, verdict_section

SAID = {"intervals": "95 % over 84 subjects", "energy": "0.31 kWh"}


def rows(html: str) -> list[tuple[str, str, str]]:
    found = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>', html)
    return [(name, state.replace("\N{NO-BREAK SPACE}", " "), unescape(told)) for name, state, told in found]


def test_every_line_is_measured_or_not_and_what_is_missing_comes_first() -> None:
    told = rows(verdict_section(SAID).body)
    assert [state for _, state, _ in told] == ["NOT MEASURED"] * (len(NEEDS) - 2) + ["MEASURED"] * 2
    assert {name for name, _, _ in told} == {need.name for need in NEEDS.values()}
    assert told[-2:] == [
        ("Intervals over subjects", "MEASURED", "95 % over 84 subjects"),
        ("Energy", "MEASURED", "0.31 kWh"),
    ]


def test_what_is_missing_says_what_is_unknown_and_what_it_takes() -> None:
    by_name = {name: text for name, _, text in rows(verdict_section(SAID).body)}
    for key in unmeasured(SAID):
        assert NEEDS[key].why in by_name[NEEDS[key].name]
        assert NEEDS[key].needed in by_name[NEEDS[key].name]


def test_nothing_measured_is_thirteen_lines_and_all_measured_is_none() -> None:
    assert unmeasured({}) == tuple(NEEDS)
    assert len(rows(verdict_section({}).body)) == len(NEEDS) == 13
    everything = dict.fromkeys(NEEDS, "see above")
    assert unmeasured(everything) == ()
    assert "NOT" not in verdict_section(everything).body


def test_the_count_is_no_mark() -> None:
    html = verdict_section(SAID).body
    assert "2 of 13 lines were measured" in html
    assert "not a mark" in html
    assert "%" not in html.replace("95 %", "")


def test_words_are_no_markup() -> None:
    html = page.page("Evaluation", [verdict_section({"energy": "<script>x</script> & more"})])
    assert "<script" not in html
    assert "&lt;script&gt;x&lt;/script&gt; &amp; more" in html


def test_what_the_list_does_not_ask_for_is_refused() -> None:
    with pytest.raises(ValueError, match="'charm' is nothing that the list asks for; it asks for intervals"):
        verdict_section({"charm": "lots"})
    with pytest.raises(ValueError, match="'charm'"):
        unmeasured({"charm": "lots"})


@pytest.mark.parametrize("told", ["", "  "])
def test_silence_is_no_measurement(told: str) -> None:
    with pytest.raises(ValueError, match="'energy' is said to be measured, without a figure"):
        verdict_section({"energy": told})


def test_the_list_asks_for_what_an_honest_evaluation_needs() -> None:
    assert set(NEEDS) == {
        "intervals",
        "leakage_store",
        "leakage_pretraining",
        "calibration",
        "sex",
        "age",
        "scanner",
        "site",
        "prevalence",
        "external",
        "strange",
        "readers",
        "energy",
    }
    with pytest.raises(TypeError):
        NEEDS["charm"] = NEEDS["energy"]  # pyright: ignore[reportIndexIssue]
