from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from voxelstem.allowed import check_interval, check_key, check_level, check_name, check_numbers, check_share


@dataclass(frozen=True)
class Held:
    one: object
    many: tuple[object, ...] = ()


def test_finite_numbers_of_python_words_and_nothing_are_accepted() -> None:
    check_numbers(Held(one=1.5, many=(2, -3.0, 0.0)))
    check_numbers(Held(one="word", many=()))
    check_numbers(Held(one=None))


@pytest.mark.parametrize("odd", [math.nan, math.inf, np.float32(1.0), np.zeros(2)])
def test_what_no_format_could_write_alike_is_refused_with_its_field(odd: object) -> None:
    with pytest.raises(ValueError, match="one must be a finite number"):
        check_numbers(Held(one=odd))
    with pytest.raises(ValueError, match="many must be a finite number"):
        check_numbers(Held(one=1.0, many=(1.0, odd)))


def test_shares_and_levels_have_their_ends() -> None:
    for share in (0.0, 0.5, 1.0):
        check_share("it", share)
    for share in (-1e-9, 1 + 1e-9):
        with pytest.raises(ValueError, match=r"it must lie in \[0, 1\]"):
            check_share("it", share)
    check_level(None, wanted=False)
    check_level(0.9, wanted=True)
    with pytest.raises(ValueError, match="needs the level"):
        check_level(None, wanted=True)
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            check_level(level, wanted=False)


def test_intervals_hold_their_value() -> None:
    check_interval(1.0, None, None)
    check_interval(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="two ends"):
        check_interval(1.0, 0.0, None)
    with pytest.raises(ValueError, match="leaves out 1"):
        check_interval(1.0, 1.1, 2.0)


def test_names_are_one_line_and_keys_no_person() -> None:
    check_name("name", "left lung")
    check_name("name", "é" * 64)
    for text in ("", " a", "a\nb", "a" * 65):
        with pytest.raises(ValueError, match="name must be 1 to 64"):
            check_name("name", text)
    check_name("why", "a" * 65, most=100)
    check_key("study", "1.2.840.113619")
    for key in ("Roe^Jane", "a/b", "", "-a", "a" * 65, "Jane Roe"):
        with pytest.raises(ValueError, match="study must be a pseudonymous key"):
            check_key("study", key)
