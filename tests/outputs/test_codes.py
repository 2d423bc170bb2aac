from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.sr._concepts_dict import concepts

from voxelstem.errors import ConfigError
from voxelstem.outputs import codes
from voxelstem.outputs.codes import check_texts, coded, private

OWN = [codes.ANATOMY, codes.ABNORMAL, codes.TISSUE, codes.SUBSTANCE, codes.YES, codes.NO, *codes.SIDES.values()]


@pytest.mark.parametrize(
    "code",
    [
        *OWN,
        *codes.ORGANS.values(),
        *codes.TISSUES.values(),
        *codes.SUBSTANCES.values(),
        *codes.LESIONS.values(),
    ],
    ids=lambda code: code.meaning,
)
def test_every_number_means_in_dicom_what_it_means_here(code):
    # pydicom's dictionary is made from the tables of PS3.16.
    meanings = {told[0] for word in concepts["SCT"].values() for value, told in word.items() if value == code.value}
    assert code.scheme == "SCT"
    assert code.meaning in meanings


@pytest.mark.parametrize("name", ["kidney_left", "left kidney", "Kidney-Left", " LEFT  KIDNEY "])
def test_one_organ_is_known_by_all_its_spellings(name):
    found = coded(name)
    assert (found.category.meaning, found.kind.meaning) == ("Anatomical Structure", "Kidney")
    assert found.side == codes.SIDES["left"]


def test_a_lesion_is_known_with_its_organ():
    found = coded("lung_nodule_right")
    assert (found.category, found.kind.meaning) == (codes.ABNORMAL, "Nodule")
    assert (found.region.meaning, found.side.meaning) == ("Lung", "Right")
    alone = coded("lesion")
    assert (alone.kind.meaning, alone.region, alone.side) == ("Lesion", None, None)


@pytest.mark.parametrize("name", ["flux capacitor", "left_right_kidney", "liver_of_a_lesion", "7", "liver lesion edge"])
def test_what_is_not_surely_known_is_private(name):
    found = coded(name)
    assert (found.kind.scheme, found.kind.meaning) == ("99VOXELSTEM", name)
    assert (found.side, found.region) == (None, None)


def test_an_unknown_lesion_is_still_abnormal():
    assert coded("spiculated nodule").category == codes.ABNORMAL
    assert coded("flux capacitor").category == codes.ANATOMY


@given(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=64))
def test_a_private_code_fits_and_hangs_on_nothing_but_the_text(text):
    assert private(text) == private(text)
    assert private(text) != private(text[:-1] + ("a" if text[-1] != "a" else "b"))
    assert len(private(text).value) <= 16


@pytest.mark.parametrize("text", ["Größe", "a\\b", "a\nb", "n" * 65])
def test_texts_that_dicom_cannot_spell_everywhere_are_refused(text):
    with pytest.raises(ConfigError, match="cannot be written as DICOM"):
        check_texts(["liver", text])
    check_texts(["liver", "n" * 64])
