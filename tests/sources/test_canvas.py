from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from voxelstem.sources.anatomy import CLASSES, Lesion, draw_anatomy
from voxelstem.sources.canvas import render

SPACING = (4.0, 4.0, 5.0)


@pytest.fixture(scope="module")
def anatomy():
    drawn = draw_anatomy(np.random.default_rng(4), spleen_enlarged=False, phase="none")
    centre = tuple(np.array([0.55 * drawn.cavity_mm[0], 30.0, -60.0]) + drawn.offset_ras_mm)
    return replace(drawn, lesions=(Lesion(organ="liver", centre_ras_mm=centre, radius_mm=14.0, contrast_hu=-50.0),))


@pytest.fixture(scope="module")
def quiet(anatomy):
    return render(anatomy, SPACING, noise_hu=0.0, rng=np.random.default_rng(0))


def test_every_class_is_painted(quiet):
    assert set(np.unique(quiet.label)) == {0, *CLASSES}


@pytest.mark.parametrize(
    ("organ", "tissue"), [("liver", "liver"), ("spleen", "spleen"), ("heart", "blood"), ("kidney_left", "kidney")]
)
def test_organs_have_the_density_of_their_tissue(quiet, anatomy, organ, tissue):
    value = next(key for key, name in CLASSES.items() if name == organ)
    assert np.median(quiet.hu[quiet.label == value]) == pytest.approx(anatomy.hu[tissue], abs=6.0)


def test_lungs_are_air_and_bone_is_hard(quiet):
    assert np.median(quiet.hu[np.isin(quiet.label, (1, 2))]) < -700
    assert np.median(quiet.hu[quiet.label == 7]) > 100


def test_the_lesion_is_where_the_anatomy_says(quiet, anatomy):
    lesion = anatomy.lesions[0]
    found = np.argwhere(quiet.label == 9) * SPACING + quiet.origin_mm + np.array(anatomy.offset_ras_mm)
    np.testing.assert_allclose(found.mean(axis=0), lesion.centre_ras_mm, atol=max(SPACING) / 2)
    volume = len(found) * np.prod(SPACING)
    assert volume == pytest.approx(4 / 3 * np.pi * lesion.radius_mm**3, rel=0.15)


def test_noise_has_the_spread_that_was_asked_for(anatomy, quiet):
    noisy = render(anatomy, SPACING, noise_hu=20.0, rng=np.random.default_rng(0))
    inside = (quiet.hu > -900) & (quiet.hu < 300)
    assert (noisy.hu - quiet.hu)[inside].std() == pytest.approx(20.0, rel=0.03)


def test_values_are_whole_and_in_a_scanner_s_range(quiet):
    assert quiet.hu.dtype == np.float32
    assert (quiet.hu == np.rint(quiet.hu)).all()
    assert quiet.hu.min() >= -1024
    assert quiet.hu.max() <= 3071


def test_air_surrounds_the_body_in_every_slice(quiet):
    for face in (quiet.hu[0], quiet.hu[-1], quiet.hu[:, 0], quiet.hu[:, -1]):
        assert face.max() < -950
