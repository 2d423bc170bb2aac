from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from voxelstem.sources.anatomy import draw_anatomy
from voxelstem.sources.lobes import LIVER_PLACES, LUNG_PLACES, draw_at, lobe_of

PLACES = [("lung", place) for place in LUNG_PLACES] + [("liver", place) for place in LIVER_PLACES]


def patient(seed, **changes):
    return replace(draw_anatomy(np.random.default_rng(seed), spleen_enlarged=False, phase="none"), **changes)


def centre_mm(lesion, anatomy):
    return np.array(lesion.centre_ras_mm) - anatomy.offset_ras_mm


def test_lobes_of_an_organ_do_not_overlap():
    anatomy = patient(0)
    points = np.random.default_rng(1).uniform((-150, -110, -160), (150, 110, 180), size=(20_000, 3))
    for organ in ("lung", "liver"):
        inside = [lobe_of(anatomy, organ, place, points) for kind, place in PLACES if kind == organ]
        assert all(lobe.sum() > 20 for lobe in inside)
        assert np.sum(inside, axis=0).max() == 1


def test_upper_lobes_lie_above_lower_ones_and_right_ones_to_the_right():
    anatomy = patient(2)
    points = np.random.default_rng(1).uniform((-150, -110, -160), (150, 110, 180), size=(20_000, 3))
    middle = {place: points[lobe_of(anatomy, "lung", place, points)].mean(axis=0) for place in LUNG_PLACES}
    assert middle["right upper"][2] > middle["right middle"][2] > middle["right lower"][2]
    assert middle["left upper"][2] > middle["left lower"][2]
    assert max(middle["left upper"][0], middle["left lower"][0]) < 0 < middle["right middle"][0]


@pytest.mark.parametrize(("organ", "place"), PLACES)
def test_a_lesion_lies_in_its_lobe_and_wholly_in_its_organ(organ, place):
    drawn = 0
    for seed in range(4):
        anatomy = patient(seed)
        for lesion in draw_at(np.random.default_rng(seed), anatomy, organ, place, size_mm=20, density="calcified"):
            drawn += 1
            centre = centre_mm(lesion, anatomy)
            assert lobe_of(anatomy, organ, place, centre[None]).all()
            ball = np.random.default_rng(0).normal(size=(300, 3))
            ball *= lesion.radius_mm / np.linalg.norm(ball, axis=1, keepdims=True)
            inside = anatomy.liver if organ == "liver" else anatomy.lung
            assert inside(*(centre + ball).T).all()
    assert drawn >= 2


def test_a_nodule_lies_out_of_the_fluid():
    anatomy = patient(3, effusion=(0.08, 0.0))
    points = np.random.default_rng(5).uniform((-150, -110, -60), (0, 110, 180), size=(20_000, 3))
    lung = points[anatomy.lung(*points.T)]
    wet = np.quantile(anatomy.fluid_order(*lung.T), 0.08)
    for seed in range(5):
        (lesion,) = draw_at(np.random.default_rng(seed), anatomy, "lung", "left lower", size_mm=16, density="solid")
        ball = np.random.default_rng(0).normal(size=(300, 3))
        ball *= lesion.radius_mm / np.linalg.norm(ball, axis=1, keepdims=True)
        assert anatomy.fluid_order(*(centre_mm(lesion, anatomy) + ball).T).min() > wet


def test_where_there_is_no_room_the_lesion_is_smaller_or_missing():
    (small,) = draw_at(np.random.default_rng(0), patient(0), "liver", "right", size_mm=200, density="hypodense")
    assert 2 * small.radius_mm < 150
    cramped = patient(0, liver_floor_mm=-1.0)
    assert draw_at(np.random.default_rng(0), cramped, "liver", "right", size_mm=20, density="hypodense") == []


@pytest.mark.parametrize(
    ("density", "differs", "chalk"),
    [("hypodense", -1, 0), ("hyperdense", 1, 0), ("calcified", 0, 1), ("solid", 0, 0)],
)
def test_density_decides_what_is_added(density, differs, chalk):
    (lesion,) = draw_at(np.random.default_rng(1), patient(1), "liver", "right", size_mm=16, density=density)
    assert np.sign(lesion.contrast_hu) == differs
    assert np.sign(lesion.chalk_hu) == chalk
