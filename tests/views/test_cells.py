from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.geometry import patient_to_voxel, voxel_to_patient
from voxelstem.views import cells

OBLIQUE = np.array(
    [[0.8 * 0.9986, -0.0523 * 1.1, 0, -20], [0.8 * 0.0523, 1.1 * 0.9986, 0, 7], [0, 0, 2.5, 3], [0, 0, 0, 1.0]]
)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    token_mm=st.tuples(*[st.floats(0.7, 9)] * 3),
    sub=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_tally_agrees_with_sending_every_voxel_through_the_patient(
    shape: tuple[int, int, int], token_mm: tuple[float, float, float], sub: int, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(-1, 4, shape)
    affine, tokens = cells.cover(OBLIQUE, shape, token_mm)
    grid = cells.lay(OBLIQUE, shape, affine, tokens, sub=sub)
    naive = np.zeros((*grid.cells_ijk, 4))
    for ijk in np.ndindex(shape):
        place = patient_to_voxel(voxel_to_patient(np.array([ijk], float), OBLIQUE), affine)[0]
        cell = np.clip(np.floor((place + 0.5) * sub + 1e-6).astype(int), 0, np.array(grid.cells_ijk) - 1)
        if values[ijk] >= 0:
            naive[(*cell, values[ijk])] += 1
    np.testing.assert_array_equal(cells.tally(values, grid, 4), naive)


def test_tally_counts_every_voxel_once_whatever_the_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 3, (17, 11, 13))
    affine, tokens = cells.cover(OBLIQUE, values.shape, (4.0, 4.0, 4.0))
    grid = cells.lay(OBLIQUE, values.shape, affine, tokens, sub=2)
    whole = cells.tally(values, grid, 3)
    monkeypatch.setattr(cells, "VOXELS_AT_ONCE", 200)
    np.testing.assert_array_equal(cells.tally(values, grid, 3), whole)
    assert whole.sum() == values.size
    assert whole.sum(axis=(0, 1, 2)).tolist() == np.bincount(values.ravel()).tolist()


def test_tokens_of_two_voxels_have_their_centre_between_them() -> None:
    affine, tokens = cells.cover(np.diag([1.0, 1.0, 1.0, 1.0]), (4, 5, 2), (2.0, 2.0, 2.0))
    assert tokens == (2, 3, 1)
    np.testing.assert_allclose(affine[:3, 3], 0.5)
    grid = cells.lay(np.eye(4), (4, 5, 2), affine, tokens)
    np.testing.assert_allclose(grid.places()[0], [-0.25, 0.25, 0.75, 1.25])
    assert grid.members()[1].tolist() == [0, 0, 1, 1, 2]


def test_a_crooked_or_mirrored_token_grid_is_refused() -> None:
    for crooked in (OBLIQUE, np.diag([-1.0, 1.0, 1.0, 1.0])):
        with pytest.raises(ValueError, match="axes of the scan"):
            cells.lay(np.eye(4), (64, 64, 64), crooked, (8, 8, 8))


def test_values_without_a_place_are_refused() -> None:
    grid = cells.lay(np.eye(4), (2, 2, 2), np.eye(4), (2, 2, 2))
    with pytest.raises(ValueError, match="no place"):
        cells.tally(np.full((2, 2, 2), 5), grid, 3)
    with pytest.raises(ValueError, match="do not lie"):
        cells.tally(np.zeros((2, 2, 3), int), grid, 3)
