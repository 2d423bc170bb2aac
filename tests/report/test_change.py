from __future__ import annotations

import numpy as np

from voxelstem.change import ChangeMap
from voxelstem.report.change import change_picture
from voxelstem.study import Provenance, Volume


def volume(array: np.ndarray) -> Volume:
    return Volume(
        array=array[None].astype(np.float32),
        affine_ras=np.diag([2.0, 2.0, 3.0, 1.0]),
        modality="MR",
        provenance=Provenance(source_format="phantom", sha256="0" * 64, orientation="RAS"),
    )


def found(change: float) -> ChangeMap:
    observed = np.random.default_rng(0).uniform(0.2, 0.8, (12, 14, 10))
    expected = observed.copy()
    observed[5:8, 5:8, 4:6] += change
    return ChangeMap(
        expected=volume(expected), observed=volume(observed), difference=volume(observed - expected), years=2.0
    )


def test_the_picture_says_what_it_shows_and_is_the_same_each_time() -> None:
    picture = change_picture(found(0.5))
    assert picture.png.startswith(b"\x89PNG")
    assert picture.png == change_picture(found(0.5)).png
    assert "2.0 years" in picture.alt
    assert picture.png != change_picture(found(-0.5)).png


def test_a_map_without_change_can_be_drawn() -> None:
    assert "0.000" in change_picture(found(0.0)).alt
