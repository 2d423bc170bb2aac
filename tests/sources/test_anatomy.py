from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from voxelstem.sources.anatomy import CLASSES, Ellipsoid, draw_anatomy, draw_lesion, outline, report, turn


def anatomy_of(seed: int, *, enlarged: bool = False, phase: str = "none"):
    return draw_anatomy(np.random.default_rng(seed), spleen_enlarged=enlarged, phase=phase)


def test_turns_are_rotations():
    matrix = turn(20.0, -35.0, 50.0)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1.0)


def test_level_of_an_ellipsoid_equals_the_written_out_formula():
    rng = np.random.default_rng(0)
    body = Ellipsoid(centre_mm=rng.normal(size=3), radii_mm=np.array([10.0, 20.0, 30.0]), turn=turn(10.0, 20.0, 30.0))
    points = rng.normal(size=(50, 3)) * 20
    naive = [float((((body.turn @ (point - body.centre_mm)) / body.radii_mm) ** 2).sum()) for point in points]
    np.testing.assert_allclose(body.level(*points.T), naive, rtol=1e-4)


def test_the_box_around_an_ellipsoid_touches_its_surface():
    body = Ellipsoid(centre_mm=np.zeros(3), radii_mm=np.array([10.0, 20.0, 30.0]), turn=turn(40.0, 20.0, 70.0))
    directions = np.random.default_rng(1).normal(size=(200_000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    surface = (directions * body.radii_mm) @ body.turn
    np.testing.assert_allclose(np.abs(surface).max(axis=0), body.reach_mm(), rtol=1e-2)


def test_outline_stays_above_one_far_outside():
    far = np.linspace(1.3, 50.0, 200)
    assert (outline(far[:, None], np.zeros(1)) > 1).all()
    assert (outline(far[:, None], far[None, :]) > 1).all()


@pytest.mark.parametrize("seed", range(8))
def test_organs_lie_on_the_side_where_people_have_them(seed):
    anatomy = anatomy_of(seed)
    organs = anatomy.organs
    assert organs["spleen"].centre_mm[0] < 0 < organs["kidney_right"].centre_mm[0]
    assert organs["kidney_left"].centre_mm[0] < 0
    assert organs["heart"].centre_mm[2] > organs["spleen"].centre_mm[2] > organs["kidney_left"].centre_mm[2]
    right_middle = np.array([0.5 * anatomy.cavity_mm[0]]), np.array([anatomy.cavity_shift_mm])
    assert anatomy.liver(*right_middle, np.array([anatomy.dome_mm[1] - 30.0])).all()
    assert not anatomy.liver(-right_middle[0], right_middle[1], np.array([anatomy.dome_mm[1] - 30.0])).any()
    assert anatomy.lung(*right_middle, np.array([anatomy.dome_mm[1] + 40.0])).all()


def test_an_enlarged_spleen_is_larger_than_any_normal_one():
    def volume(seed, enlarged):
        return anatomy_of(seed, enlarged=enlarged).organs["spleen"].radii_mm.prod()

    normal = [volume(seed, False) for seed in range(40)]
    enlarged = [volume(seed, True) for seed in range(40)]
    assert np.quantile(normal, 0.95) < np.quantile(enlarged, 0.05)


def test_densities_of_solid_organs_overlap_between_patients():
    drawn = [anatomy_of(seed).hu for seed in range(60)]
    for one, other in (("liver", "spleen"), ("liver", "muscle"), ("kidney", "blood")):
        gaps = np.array([hu[one] - hu[other] for hu in drawn])
        assert (gaps > 0).any(), (one, other)
        assert (gaps < 0).any(), (one, other)


def test_contrast_medium_brightens_the_blood():
    assert anatomy_of(3, phase="portal").hu["blood"] > anatomy_of(3).hu["blood"] + 40


def test_lesions_fit_their_organ_and_keep_apart():
    anatomy = anatomy_of(5)
    rng = np.random.default_rng(9)
    for _ in range(4):
        lesion = draw_lesion(rng, anatomy, taken=anatomy.lesions, radius_mm=(6.0, 12.0))
        anatomy = replace(anatomy, lesions=(*anatomy.lesions, lesion))
    for index, lesion in enumerate(anatomy.lesions):
        directions = np.random.default_rng(index).normal(size=(500, 3))
        ball = lesion.radius_mm * directions / np.linalg.norm(directions, axis=1, keepdims=True)
        points = ball + np.array(lesion.centre_ras_mm) - np.array(anatomy.offset_ras_mm)
        inside = {"liver": anatomy.liver, "lung": anatomy.lung}[lesion.organ]
        assert inside(*points.T).all()
        for other in anatomy.lesions[index + 1 :]:
            apart = np.linalg.norm(np.subtract(lesion.centre_ras_mm, other.centre_ras_mm))
            assert apart > lesion.radius_mm + other.radius_mm


def test_a_lesion_larger_than_every_organ_is_refused():
    with pytest.raises(ValueError, match="no room"):
        draw_lesion(np.random.default_rng(0), anatomy_of(0), taken=(), radius_mm=(90.0, 95.0))


def test_the_report_says_what_the_anatomy_holds():
    anatomy = anatomy_of(1, enlarged=True)
    assert "without lesion" in report(anatomy).text
    assert "plenomegaly" in report(anatomy).text
    lesion = replace(draw_lesion(np.random.default_rng(2), anatomy, taken=(), radius_mm=(9.0, 9.0)), organ="liver")
    text = report(replace(anatomy, lesions=(lesion,))).text
    assert "Hypodense lesion in the liver, 18 mm" in text
    assert "Impression: Liver lesion, largest 18 mm" in text


def test_class_names_are_unique_and_small_numbers():
    assert len(set(CLASSES.values())) == len(CLASSES)
    assert set(CLASSES) == set(range(1, len(CLASSES) + 1))
