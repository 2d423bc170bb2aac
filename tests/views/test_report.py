from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.config import flatten, overlay
from voxelstem.errors import ConfigError
from voxelstem.study import Report
from voxelstem.views.report import (
    REASONS,
    SECTIONS,
    SPECTRE,
    ReportConfig,
    SectionConfig,
    apply_report,
    draw_report,
    fault_of,
)

REPORT = Report(
    findings_text="Left nodule of 2.5 cm. No effusion. The heart is normal.",
    impression_text="1. Left nodule.",
    history_text="Cough.",
    technique_text="Native.",
    rest_text="Comparison: none of 2019.",
    findings_rewrites=("A nodule on the left.", "One left nodule."),
    impression_rewrites=("Nodule, left.",),
    icd10=("Cough", "Nodule of lung"),
    language="en",
)
PLAIN = ReportConfig(
    **{name: SectionConfig() for name in SECTIONS}, rewrite_p=0.0, most_letters=10**9, most_icd10=10**6
)
ONLY = SectionConfig(take=False)


def read(config, report=REPORT, *, seed=0, mirrored=False):
    return apply_report(draw_report(config, report, np.random.default_rng(seed)), report, mirrored=mirrored)


def many(config, report=REPORT, *, count=400):
    rng = np.random.default_rng(1)
    return [apply_report(draw_report(config, report, rng), report, mirrored=False) for _ in range(count)]


def words(text):
    return sorted(re.findall(r"\S+", text))


PROSE = st.text(st.sampled_from("ab. \n,;:!?A1éL(•"), max_size=80)


@given(
    st.builds(
        Report,
        findings_text=PROSE,
        impression_text=PROSE,
        rest_text=PROSE,
        history_text=PROSE,
        technique_text=PROSE,
    ),
    st.integers(0, 9),
)
def test_with_everything_off_no_word_is_lost(report, seed):
    # What says nothing at all (a heading, "n/a", signs) is no section of a text.
    said = [report.history_text, report.technique_text, report.rest_text, report.findings_text, report.impression_text]
    plan = draw_report(PLAIN, report, np.random.default_rng(seed))
    parts = {part.section: getattr(report, f"{part.section}_text") for part in plan.parts}
    assert words(apply_report(plan, report, mirrored=False)) == sorted(
        word for text in parts.values() for word in words(text)
    )
    left_out = [text for text in said if text not in parts.values()]
    assert not any(re.search(r"[b-zé]", re.sub(r"[^\W\d_][\w /-]{0,40}:", "", text.lower())) for text in left_out)


@given(st.integers(0, 999), st.booleans(), PROSE)
def test_shuffled_and_dropped_sentences_are_sentences_of_the_report(seed, shuffle, prose):
    report = Report(findings_text=f"Nodule. {prose}")
    config = dataclasses.replace(PLAIN, findings=SectionConfig(shuffle=shuffle, sentence_drop_p=0.5))
    text = read(config, report, seed=seed)
    assert text.strip()
    left = words(report.findings_text)
    for word in words(text):
        left.remove(word)


def test_a_shuffled_section_has_every_sentence_once_in_many_orders():
    config = dataclasses.replace(PLAIN, **dict.fromkeys(SECTIONS, ONLY) | {"findings": SectionConfig(shuffle=True)})
    seen = set(many(config))
    assert len(seen) == 6
    assert {tuple(words(text)) for text in seen} == {tuple(words(REPORT.findings_text))}


def test_sentences_are_dropped_as_often_as_asked_and_one_stays():
    config = dataclasses.replace(
        PLAIN, **dict.fromkeys(SECTIONS, ONLY) | {"findings": SectionConfig(sentence_drop_p=0.3)}
    )
    seen = many(config, count=2000)
    assert np.mean(["No effusion." in text for text in seen]) == pytest.approx(0.7, abs=0.05)
    always = dataclasses.replace(config, findings=SectionConfig(sentence_drop_p=1.0))
    assert set(many(always)) == {"Left nodule of 2.5 cm.", "No effusion.", "The heart is normal."}


def test_the_default_reads_like_the_report_and_leaves_out_what_the_image_does_not_show():
    whole = f"Findings: {REPORT.findings_text}\nImpression: {REPORT.impression_text}"
    plain = dataclasses.replace(REPORT, findings_rewrites=(), impression_rewrites=())
    seen = many(ReportConfig(), plain)
    findings, impression = whole.split("\n")
    assert set(seen) == {whole, findings, impression}
    assert seen.count(whole) / len(seen) == pytest.approx(0.49, abs=0.08)


def test_spectre_s_template_is_its_own_to_the_letter():
    report = dataclasses.replace(
        REPORT, findings_text="Clear. Impressions", findings_rewrites=(), impression_rewrites=()
    )
    seen = set(many(SPECTRE, report))
    assert "Findings: Clear.\nImpressions: 1. Left nodule.\nICD10: Cough; Nodule of lung\n" in seen
    assert all("Impressions: 1. Left nodule.\n" in text for text in seen)
    assert len(seen) == 6, "findings or not; codes in two orders or not"


def test_spectre_s_chances_are_its_own():
    seen = many(SPECTRE, count=3000)
    share = {
        "findings": np.mean(["Findings: " in text for text in seen]),
        "codes": np.mean(["ICD10: " in text for text in seen]),
        "own words": np.mean(["Impressions: 1. Left nodule." in text for text in seen]),
        "rewrite": np.mean(["One left nodule." in text for text in seen]),
    }
    assert share == pytest.approx({"findings": 0.7, "codes": 0.7, "own words": 0.5, "rewrite": 0.7 * 0.25}, abs=0.04)


def test_at_most_so_many_codes_are_drawn_each_once():
    report = dataclasses.replace(REPORT, icd10=tuple(f"Code {number}" for number in range(50)))
    text = next(text for text in many(SPECTRE, report) if "ICD10" in text)
    codes = text.split("ICD10: ")[1].strip().split("; ")
    assert len(codes) == len(set(codes)) == 20
    assert set(codes) < set(report.icd10)


def test_a_rewrite_is_read_only_where_the_report_has_one():
    always = dataclasses.replace(ReportConfig(), rewrite_p=1.0)
    bare = dataclasses.replace(REPORT, findings_rewrites=(), impression_rewrites=())
    assert "Left nodule of 2.5 cm." in "".join(many(always, bare))
    assert "Left nodule of 2.5 cm." not in "".join(many(always))
    lost = dataclasses.replace(REPORT, findings_text="")
    never = dataclasses.replace(ReportConfig(), rewrite_p=0.0, impression=ONLY)
    assert read(never, lost) in ("Findings: A nodule on the left.", "Findings: One left nodule.")


def test_of_sections_that_would_all_be_dropped_one_stays():
    config = dataclasses.replace(PLAIN, **{name: SectionConfig(drop_p=1.0) for name in SECTIONS})
    seen = set(many(config))
    assert len(seen) == len(SECTIONS) + 1, "each alone, the codes in two orders"


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_report_of_ten_thousand_words_loses_sentences_and_keeps_its_impression(shuffle):
    long = dataclasses.replace(REPORT, findings_text=" ".join(f"Finding number {n} of many." for n in range(2000)))
    config = dataclasses.replace(
        ReportConfig(), findings=SectionConfig(shuffle=shuffle), impression=SectionConfig(), rewrite_p=0.0
    )
    text = read(config, long)
    assert 7900 < len(text) <= 8000
    assert text.endswith(".\n1. Left nodule.")
    assert re.sub(r"Finding number \d+ of many\.\s?", "", text) == "1. Left nodule."


def test_one_endless_sentence_ends_at_a_word():
    text = read(dataclasses.replace(PLAIN, most_letters=100), Report(findings_text="nodule " * 5000))
    assert len(text) <= 100
    assert set(text.split()) == {"nodule"}
    assert len(read(dataclasses.replace(PLAIN, most_letters=9), Report(findings_text="n" * 99))) == 9


def test_sides_change_places_only_with_the_image():
    plan = draw_report(PLAIN, REPORT, np.random.default_rng(0))
    there, back = (apply_report(plan, REPORT, mirrored=mirrored) for mirrored in (False, True))
    assert "Left nodule of 2.5 cm." in there
    assert "Right nodule of 2.5 cm." in back
    assert back.replace("Right", "Left").replace("right", "left") == there


@pytest.mark.parametrize("language", ["de", ""])
def test_sides_change_places_in_the_report_s_own_language(language):
    report = Report(findings_text="Erguss links, keine Läsion in der Leber und ohne Herd.", language=language)
    assert read(PLAIN, report, mirrored=True).startswith("Erguss rechts")


def test_a_section_too_short_to_tell_its_language_follows_the_whole_report():
    report = Report(findings_text="Die Leber ist normal und ohne Herd.", impression_text="Rechtsseitiger Erguss.")
    config = dataclasses.replace(PLAIN, findings=SectionConfig(take=False))
    assert read(config, report, mirrored=True) == "Linksseitiger Erguss."


@pytest.mark.parametrize("findings", ["\n\n Clear lungs. No effusion.", "Findings:\n---\n***\n1.\n\nClear lungs."])
@pytest.mark.parametrize("shuffle", [False, True])
def test_of_the_sentences_that_stay_one_says_something(findings, shuffle):
    config = dataclasses.replace(PLAIN, findings=SectionConfig(shuffle=shuffle, sentence_drop_p=0.7))
    for text in many(config, Report(findings_text=findings)):
        assert "lungs" in text or "effusion" in text


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_section_of_words_that_are_cut_out_is_not_taken(shuffle):
    config = dataclasses.replace(PLAIN, findings=SectionConfig(strip=("Pneumonia",), shuffle=shuffle))
    assert fault_of(Report(findings_text="Pneumonia"), config) == "no-wanted-section"
    both = Report(findings_text="Pneumonia", findings_rewrites=("Infection.",), impression_text="Clear.")
    assert {text.strip() for text in many(dataclasses.replace(config, rewrite_p=0.0), both)} == {"Infection.\nClear."}


def test_a_plan_replays_and_leaves_the_report_as_it_was():
    before = dataclasses.asdict(REPORT)
    plan = draw_report(SPECTRE, REPORT, np.random.default_rng(5))
    assert apply_report(plan, REPORT, mirrored=True) == apply_report(plan, REPORT, mirrored=True)
    assert draw_report(SPECTRE, REPORT, np.random.default_rng(5)) == plan
    assert dataclasses.asdict(REPORT) == before


GERMAN = "Kein Erguss. Die Leber ist normal und ohne Herd im linken Lappen."
FAULTS = [
    (None, "no-report"),
    (Report(), "empty"),
    (Report(findings_text=" \n"), "empty"),
    (Report(findings_text="FINDINGS:\nIMPRESSION:"), "headings-only"),
    (Report(findings_text="Findings", impression_text="n/a"), "headings-only"),
    (Report(findings_text="nan"), "headings-only"),
    (Report(rest_text="All is well."), "no-wanted-section"),
    (Report(findings_text="Findings:", history_text="Cough."), "no-wanted-section"),
    (Report(findings_text="Clear.", language="de"), "language"),
    (Report(findings_text=GERMAN), "language"),
    (Report(findings_text=GERMAN, language="en"), "language"),
    (Report(findings_text="双肺野内见多发斑片状高密度影"), "language"),
    (Report(findings_text="Gro\ufffdes Herz."), "encoding"),
    (Report(findings_text="GroÃ\x9fes Herz, linksventrikulÃ¤r."), "encoding"),
    (Report(findings_text="\x00F\x00i\x00n\x00d"), "encoding"),
    (Report(findings_text="Clear \ud800 lungs."), "encoding"),
    (REPORT, ""),
    (Report(impression_text="Clear."), ""),
    (Report(findings_text="Lungs clear.", language="en-US"), ""),
    (Report(findings_rewrites=("Clear.",)), ""),
]


@pytest.mark.parametrize(("report", "reason"), FAULTS)
def test_a_report_that_cannot_be_learned_from_has_a_reason_to_count(report, reason):
    assert fault_of(report, ReportConfig()) == reason
    assert reason in (*REASONS, "")


def test_every_reason_occurs_and_none_quotes_the_report():
    assert {reason for _, reason in FAULTS} == {*REASONS, ""}


@pytest.mark.parametrize("report", [report for report, reason in FAULTS if reason == ""])
def test_a_report_without_a_fault_never_gives_an_empty_text(report):
    assert all(text.strip() for text in many(ReportConfig(), report))


def test_any_language_is_taken_where_none_is_asked_for():
    assert fault_of(Report(findings_text=GERMAN), dataclasses.replace(ReportConfig(), languages=())) == ""


def test_settings_are_changed_by_name_and_say_what_is_wrong():
    config = overlay(ReportConfig(), {"findings.drop_p": 0, "icd10.take": True, "languages": ["en", "de"]})
    assert (config.findings.drop_p, config.icd10.take, config.languages) == (0.0, True, ("en", "de"))
    assert overlay(ReportConfig(), flatten(SPECTRE)) == SPECTRE
    for changes, said in (
        ({"findings.drop_p": 1.5}, "drop_p"),
        ({"findings.take": False, "impression.take": False}, "no section is taken"),
        ({"rewrite_p": -0.1}, "rewrite_p"),
        ({"most_letters": 0}, "most_letters"),
    ):
        with pytest.raises(ConfigError, match=said):
            overlay(ReportConfig(), changes)


def test_nothing_of_a_report_is_logged_or_printed(caplog, capfd):
    caplog.set_level("DEBUG")
    for text in ("QzxVornq: left nodule.", "QzxVornq \ufffd", "QzxVornq kein Erguss. Die Leber ist ohne Herd."):
        report = Report(findings_text=text, language="en")
        assert "QzxVornq" not in fault_of(report, ReportConfig())
        read(PLAIN, report, mirrored=True)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
