from __future__ import annotations

import pytest

from voxelstem.sources import vocabulary
from voxelstem.sources.vocabulary import all_known, clean_contrast, contrast_agent


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("GE MEDICAL SYSTEMS", vocabulary.MAKERS),
        ("Philips Medical Systems, Inc.", vocabulary.MAKERS),
        ("Agfa-Gevaert AG", vocabulary.MAKERS),
        ("SOMATOM Definition AS+", vocabulary.MODELS),
        ("Discovery CT750 HD", vocabulary.MODELS),
        ("Biograph40_mCT 4R", vocabulary.MODELS),
        ("Br38f", vocabulary.KERNELS),
        ("STD+", vocabulary.KERNELS),
        ("FC08", vocabulary.KERNELS),
        ("BONEPLUS", vocabulary.KERNELS),
        ("WHOLE BODY", vocabulary.PARTS),
        ("HELICAL MODE", vocabulary.SCANS),
        ("CT_SOM5 SPI", vocabulary.IMAGE_TYPES),
    ],
)
def test_what_scanners_write_is_known(text, known):
    assert all_known(text, known)


@pytest.mark.parametrize(
    "text", ["", "  ", "-", "_", "Miller", "GE Miller", "SIEMENS 4711-Miller", "GE\nMiller", "ＧＥ"]
)
def test_one_unknown_word_makes_a_text_unknown(text):
    assert not all_known(text, vocabulary.MAKERS)


@pytest.mark.parametrize(
    ("typed", "word"),
    [
        ("", ""),
        ("  ", ""),
        ("NONE", "none"),
        ("W/O", "none"),
        ("ohne KM", "none"),
        ("ISOVUE300/100", "enhanced"),
        ("APPLIED", "enhanced"),
        ("GASTRO & OMNI", "enhanced"),
        ("Oral & IV", "enhanced"),
        ("barium", "oral"),
        ("given by Dr Miller", "enhanced"),
    ],
)
def test_what_somebody_typed_about_contrast_agent_becomes_one_word(typed, word):
    assert contrast_agent(typed) == word
    assert contrast_agent(contrast_agent(typed)) == word


@pytest.mark.parametrize("name", ["T1w", "T2starw", "FLAIR", "portal", "T1w ce", "dwi", "inv2_MP2RAGE"])
def test_a_contrast_of_known_words_stays(name):
    assert clean_contrast(f" {name} ") == name


@pytest.mark.parametrize("name", ["", "Miller", "T1w Miller", "T1w" * 30, "20240131", "<b>T1w</b>", "=T1w"])
def test_another_contrast_does_not(name):
    assert clean_contrast(name) == ""
