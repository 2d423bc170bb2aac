from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.cli.triples import box_ras_mm, place, spacing_mm, triple
from voxelstem.errors import ConfigError

numbers = st.tuples(*[st.floats(-1e6, 1e6)] * 3)


@given(numbers)
def test_three_numbers_come_back(given_numbers: tuple[float, float, float]):
    assert triple(",".join(map(repr, given_numbers))) == given_numbers


@pytest.mark.parametrize("text", ["", "1", "1,2", "1,2,3,4", "a,b,c", "1,2,nan", "1,2,inf"])
def test_anything_else_is_none(text: str):
    assert triple(text) is None
    with pytest.raises(ConfigError, match="is no spacing"):
        spacing_mm(text)
    with pytest.raises(ConfigError, match="is no place"):
        place(text)


def test_a_spacing_is_above_zero():
    assert spacing_mm("1.5,1.5,3") == (1.5, 1.5, 3.0)
    assert spacing_mm(None) is None
    with pytest.raises(ConfigError, match="above 0"):
        spacing_mm("1,0,1")


def test_a_place_is_a_voxel_or_millimetres():
    assert place(None) == (None, None)
    assert place("120,96,40") == ((120, 96, 40), None)
    assert place("-20,35.5,110mm") == (None, (-20.0, 35.5, 110.0))
    with pytest.raises(ConfigError, match="is no place"):
        place("1.5,2,3")


def test_a_box_is_its_low_and_its_high_corner() -> None:
    assert box_ras_mm("-90,-20,40:-60,15.5,70") == ((-90.0, -20.0, 40.0), (-60.0, 15.5, 70.0))
    assert box_ras_mm(None) is None
    for text in ("1,2,3", "1,2,3:4,5", "1,2,9:4,5,6", "a,b,c:d,e,f", ""):
        with pytest.raises(ConfigError, match="is no box"):
            box_ras_mm(text)
