from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from voxelstem import geometry

spacings = st.tuples(*[st.floats(0.2, 8.0)] * 3)
angles = st.tuples(*[st.floats(-180.0, 180.0)] * 3)
places = st.tuples(*[st.floats(-500.0, 500.0)] * 3)
CORNERS = np.array(list(itertools.product([0.0, 4.0], [0.0, 6.0], [0.0, 8.0])))


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Any right-angled scanner geometry, mirrored ones too."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", draw(angles), degrees=True).as_matrix() @ np.diag(draw(spacings))
    affine[:3, 0] *= draw(st.sampled_from([-1.0, 1.0]))
    affine[:3, 3] = draw(places)
    return affine


@given(affines())
def test_going_to_the_patient_and_back_changes_nothing(affine: np.ndarray):
    there = geometry.voxel_to_patient(CORNERS, affine)
    np.testing.assert_allclose(geometry.patient_to_voxel(there, affine), CORNERS, atol=1e-8)


@given(affines())
def test_voxel_to_patient_agrees_with_its_naive_twin(affine: np.ndarray):
    def twin(corner: np.ndarray) -> list[float]:
        return [sum(affine[row, at] * corner[at] for at in range(3)) + affine[row, 3] for row in range(3)]

    np.testing.assert_allclose(
        geometry.voxel_to_patient(CORNERS, affine), [twin(corner) for corner in CORNERS], atol=1e-9
    )


@given(spacings, angles)
def test_turning_the_patient_does_not_change_the_spacing(spacing: tuple[float, float, float], angle: tuple):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angle, degrees=True).as_matrix() @ np.diag(spacing)
    assert geometry.spacing_mm(affine) == pytest.approx(spacing)


def all_orientations() -> list[str]:
    pairs = itertools.product("RL", "AP", "SI")
    return sorted({"".join(order) for letters in pairs for order in itertools.permutations(letters)})


def affine_of(letters: str) -> np.ndarray:
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for axis, letter in enumerate(letters):
        world, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[letter]
        affine[world, axis] = sign * (1.0 + axis)
    affine[:3, 3] = (-11.0, 7.0, 30.0)
    return affine


def test_there_are_48_orientations():
    assert len(all_orientations()) == 48


@pytest.mark.parametrize("letters", all_orientations())
def test_every_orientation_is_told_by_its_letters(letters: str):
    assert geometry.orientation(affine_of(letters)) == letters


@pytest.mark.parametrize("letters", all_orientations())
def test_turning_to_ras_moves_no_voxel_in_the_patient(letters: str):
    affine = affine_of(letters)
    array = np.random.default_rng(0).random((2, 3, 4, 5))
    turned, affine_ras = geometry.to_ras(array, affine)
    assert geometry.orientation(affine_ras) == "RAS"
    for index in np.ndindex(array.shape[1:]):
        place = geometry.voxel_to_patient(np.array([index], dtype=float), affine)
        i, j, k = np.rint(geometry.patient_to_voxel(place, affine_ras)[0]).astype(int)
        assert (turned[:, i, j, k] == array[(slice(None), *index)]).all()


@given(affines())
def test_an_oblique_scan_keeps_its_obliqueness(affine: np.ndarray):
    array = np.arange(24.0).reshape(2, 3, 4)
    turned, affine_ras = geometry.to_ras(array, affine)
    assert geometry.axis_order(affine_ras)[0] == (0, 1, 2)
    assert sorted(geometry.spacing_mm(affine_ras)) == pytest.approx(sorted(geometry.spacing_mm(affine)))
    centre = (np.array(array.shape) - 1) / 2
    turned_centre = (np.array(turned.shape) - 1) / 2
    np.testing.assert_allclose(
        geometry.voxel_to_patient(centre[None], affine),
        geometry.voxel_to_patient(turned_centre[None], affine_ras),
        atol=1e-8,
    )


@pytest.mark.parametrize("letters", ["RAS", "LPS", "SAL", "IRP"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_turning_converts_while_it_copies_and_copies_once(letters: str, order: str):
    array = np.asarray(np.arange(60).reshape(3, 4, 5), np.int16, order=order)
    view, affine = geometry.turn_to_ras(array, affine_of(letters))
    assert np.shares_memory(view, array)
    turned, affine_ras = geometry.to_ras(array, affine_of(letters), np.float32)
    assert turned.dtype == np.float32
    assert turned.flags.c_contiguous
    assert turned.flags.writeable
    np.testing.assert_array_equal(turned, view)
    np.testing.assert_array_equal(affine_ras, affine)


def test_what_is_right_already_is_not_copied():
    array = np.zeros((2, 3, 4), np.float32)
    assert np.shares_memory(geometry.to_ras(array, np.eye(4))[0], array)
    assert np.shares_memory(geometry.to_ras(array, np.eye(4), np.float32)[0], array)
    assert not np.shares_memory(geometry.to_ras(array, np.eye(4), np.float64)[0], array)


def test_turning_to_ras_leaves_the_given_affine_alone():
    affine = affine_of("LPI")
    before = affine.copy()
    geometry.to_ras(np.zeros((2, 2, 2)), affine)
    assert (affine == before).all()


def test_dicom_and_we_agree_after_two_turns():
    np.testing.assert_array_equal(geometry.LPS_TO_RAS @ geometry.LPS_TO_RAS, np.eye(4))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [((0, 3, np.nan), "not finite"), ((1, 1, 0.0), "no extent"), ((0, 1, 0.5), "not perpendicular")],
)
def test_an_affine_that_places_nothing_is_refused(spoil: tuple[int, int, float], message: str):
    affine = np.eye(4)
    row, column, value = spoil
    affine[row, column] = value
    with pytest.raises(ValueError, match=message):
        geometry.check_affine(affine)


@given(affines())
def test_every_right_angled_affine_is_accepted(affine: np.ndarray):
    geometry.check_affine(affine)
