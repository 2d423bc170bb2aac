from __future__ import annotations

import numpy as np
import pytest

from voxelstem.radiomics.biomarkers import FEATURES, Biomarkers

FOUND = Biomarkers(names=("stat_mean", "stat_cov", "morph_av"), values=np.array([2.0, np.nan, 0.5]))


def test_every_feature_has_a_code_and_a_name_of_its_own() -> None:
    codes, words = zip(*FEATURES.values(), strict=True)
    assert len(set(codes)) == len(set(words)) == len(FEATURES) == 18 + 23 + 23
    assert all(len(code) == 4 and code.upper() == code for code in codes)


def test_a_feature_is_found_by_its_name() -> None:
    assert FOUND["morph_av"] == 0.5
    with pytest.raises(KeyError, match="stat_var was not measured; there are stat_mean"):
        FOUND["stat_var"]


def test_some_features_can_be_taken_in_any_order() -> None:
    some = FOUND.only(["morph_av", "stat_mean"])
    assert some.names == ("morph_av", "stat_mean")
    assert some.values.tolist() == [0.5, 2.0]
    with pytest.raises(KeyError, match="ih_mean"):
        FOUND.only(["ih_mean"])


def test_what_has_no_value_is_named() -> None:
    assert FOUND.undefined == ("stat_cov",)
    assert FOUND.only(["stat_mean"]).undefined == ()


@pytest.mark.parametrize(
    ("names", "values", "match"),
    [
        (("a", "b"), [1.0], "2 names need as many values"),
        (("a", "b", "a"), [1.0, 2.0, 3.0], "these occur twice: a"),
        (("a",), [np.inf], "infinite"),
    ],
)
def test_a_crooked_vector_is_refused(names: tuple[str, ...], values: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Biomarkers(names=names, values=np.array(values))
