from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.views.laterality import swap_sides

SIDED = [
    ("en", "left lung and right kidney", "right lung and left kidney"),
    ("en", "Left. RIGHT. Right", "Right. LEFT. Left"),
    ("en", "left-sided effusion, rightward shift", "right-sided effusion, leftward shift"),
    ("en", "bilateral, left > right", "bilateral, right > left"),
    ("en", "LUL nodule, RLL mass, RLQ pain, LV/RV ratio", "RUL nodule, LLL mass, LLQ pain, RV/LV ratio"),
    ("en", "R > L effusion, L kidney cyst, L-sided, L<R", "L > R effusion, R kidney cyst, R-sided, R<L"),
    ("en", "Rt. kidney, lt upper lobe", "Lt. kidney, rt upper lobe"),
    ("en", "dextroscoliosis; Levoconvex", "levoscoliosis; Dextroconvex"),
    (
        "en",
        "all right ribs; right-angled? right angle of the jaw",
        "all left ribs; right-angled? left angle of the jaw",
    ),
    ("en", "on the right below the fissure", "on the left below the fissure"),
    ("en", "fluid on the right unchanged, on left now larger", "fluid on the left unchanged, on right now larger"),
    ("en", "drain on the left in place, R>>L effusion, L >> R", "drain on the right in place, L>>R effusion, R >> L"),
    ("en", "a shunt from left to right", "a shunt from right to left"),
    ("en", "label kidney_left, left_lung", "label kidney_right, right_lung"),
    ("de", "Linksseitiger Erguss, rechter Unterlappen", "Rechtsseitiger Erguss, linker Unterlappen"),
    ("de", "Niere re. frei, li > re, LINKE Lunge, rechtshilär", "Niere li. frei, re > li, RECHTE Lunge, linkshilär"),
    ("nl", "rechterlong vrij, links basaal, Linker nier", "linkerlong vrij, rechts basaal, Rechter nier"),
    ("fr", "poumon droit, base gauche, artères droites", "poumon gauche, base droite, artères gauches"),
    ("fr", "Lobe inférieur gauche, surrénale droite", "Lobe inférieur droit, surrénale gauche"),
    ("fr", "épanchement pleural à gauche", "épanchement pleural à droite"),
]
UNSIDED = [
    ("en", "biopsy right away, all right. Upright view, bright, leftover, outright"),
    ("en", "drain left in place, left over, the tube was left alone, a collection left untreated"),
    ("en", "right angle, right-angled, right below the fissure"),
    ("en", "L1 fracture, L-spine, vitamin R, RT and LT, post RT lung changes, RCC, LAD, RA"),
    ("en", "levothyroxine, levofloxacin, dextrose"),
    ("en", "lEft RiGHT"),
    ("en", "left4 xleft"),
    ("de", "aufrecht, rechteckig, Recht"),
    ("nl", "rechtop, rechtstreeks"),
    ("fr", "grand droit, muscles droits, angle droit, adroit"),
]


@pytest.mark.parametrize(("language", "text", "other"), SIDED)
def test_sides_change_places_and_keep_their_case(language, text, other):
    assert swap_sides(text, language=language) == other
    assert swap_sides(other, language=language) == text


@pytest.mark.parametrize(("language", "text"), UNSIDED)
def test_the_same_words_in_another_sense_stay(language, text):
    assert swap_sides(text, language=language) == text


# fmt: off
WORDS = [
    "left", "right", "Left", "RIGHT", "lEft", "left-sided", "rightmost", "L", "R", "RUL", "LLQ", "LV", "rt", "Lt.",
    "all", "the", "away", "now", "in", "place", "angle", "of", "below", "over", "kidney", "lung", ">", "<", "/", "-",
    ",", ".", "(", "L>R", "R<L", "on", "unchanged", ">>", "R>>L",
    "dextro", "levoscoliosis", "links", "rechts", "rechter", "linke", "Linksherz",
    "rechtstreeks", "re", "li", "nodule", "\n",
]
FRENCH = [
    "poumon", "base", "lobe", "droit", "droite", "gauche", "gauches", "droits", "droites", "Droit", "grand", ",",
    ".", "vu", "à",
]
# fmt: on


@pytest.mark.parametrize("language", ["en", "de", "nl"])
def test_twice_is_the_text_again(language):
    @given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(["", " ", "  ", "-"]))))
    def twice(words):
        text = "".join(word + gap for word, gap in words)
        assert swap_sides(swap_sides(text, language=language), language=language) == text

    twice()


@given(st.text())
def test_twice_is_the_text_again_whatever_the_text(text):
    assert swap_sides(swap_sides(text)) == text


@given(st.lists(st.sampled_from(FRENCH)))
def test_french_spelling_settles_once_and_then_comes_back(words):
    settled = swap_sides(" ".join(words), language="fr")
    assert swap_sides(swap_sides(settled, language="fr"), language="fr") == settled


def test_an_unknown_language_is_read_as_english():
    assert swap_sides("left", language="tr") == "right"


def test_a_french_text_without_an_end_is_read_to_its_end():
    text = "poumon gauche " * 10_000
    assert swap_sides(text, language="fr") == "poumon droit " * 10_000
    # It would take minutes if each word looked back to the beginning.
