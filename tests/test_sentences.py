from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.sentences import LANGUAGES, bare_sentences, sentences, spoken


@given(st.text())
def test_sentences_joined_are_the_text(text):
    parts = sentences(text)
    assert "".join(parts) == text
    assert all(parts)


def test_bare_sentences_have_no_blanks_around_them_and_none_is_empty():
    assert bare_sentences("  Mass. \n\n No effusion.\n") == ["Mass.", "No effusion."]
    assert bare_sentences(" \n") == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("Nodule of 2.5 cm. No effusion.", ["Nodule of 2.5 cm. ", "No effusion."]),
        ("1. Mass. 2. Cyst of 3 mm.", ["1. Mass. ", "2. Cyst of 3 mm."]),
        ("a) Mass. b) Cyst.", ["a) Mass. b) Cyst."]),
        ("Cyst, e.g. Bosniak I. Clear!", ["Cyst, e.g. Bosniak I. ", "Clear!"]),
        ("Cyst.\n\nClear", ["Cyst.\n\n", "Clear"]),
        ("Nodule in the left\nlower lobe.", ["Nodule in the left\nlower lobe."]),
        ("Nodule\nCyst", ["Nodule\n", "Cyst"]),
        ("Example:\nright nodule", ["Example:\n", "right nodule"]),
        ("Niere re. Zyste. Frei.", ["Niere re. Zyste. ", "Frei."]),
    ],
)
def test_a_sentence_ends_where_a_reader_ends_it(text, parts):
    assert sentences(text) == parts


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("There is no pleural effusion and the heart is normal.", "en"),
        ("Kein Nachweis eines Ergusses. Die Leber ist normal und ohne Herd.", "de"),
        ("Er is geen pleuravocht. De lever is normaal en zonder afwijking van het parenchym.", "nl"),
        ("Le foie est normal. Pas de lésion dans les reins et la rate.", "fr"),
        ("双肺野内见多发斑片状高密度影", "other"),
        ("Печень без очаговых изменений", "other"),
        ("Lungs clear.", ""),
        ("Karaciğer boyutları normaldir. Dalak boyutu artmıştır.", ""),
        ("", ""),
    ],
)
def test_the_commonest_words_tell_the_language_or_nothing_does(text, language):
    assert spoken(text) == language
    assert language in (*LANGUAGES, "other", "")
