from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.surface_dice import compute_surface_dice

from voxelstem.surfaces import surface_dice


def two_balls() -> tuple[np.ndarray, np.ndarray]:
    i, j, k = np.indices((20, 24, 16)).astype(float)
    one = ((i - 9) / 6) ** 2 + ((j - 11) / 7) ** 2 + ((k - 7) / 4) ** 2 <= 1
    other = ((i - 10) / 6) ** 2 + ((j - 10) / 6) ** 2 + ((k - 7.5) / 5) ** 2 <= 1
    return one, other


# surface-distance 0.1 of DeepMind: compute_surface_dice_at_tolerance(compute_surface_distances(one, other, mm), t)
GOLDEN = {
    ((1.0, 1.0, 1.0), 0.5): 0.454591269336567,
    ((1.0, 1.0, 1.0), 1.0): 0.8583030010976661,
    ((1.0, 1.0, 1.0), 2.0): 0.9974800397221704,
    ((0.8, 1.2, 3.0), 0.5): 0.45000012047083104,
    ((0.8, 1.2, 3.0), 1.0): 0.74122820763139,
    ((0.8, 1.2, 3.0), 2.0): 0.8974444288247649,
    ((0.8, 1.2, 3.0), 3.5): 0.990340173598375,
    ((2.5, 0.7, 1.3), 0.5): 0.4731743945288379,
    ((2.5, 0.7, 1.3), 1.0): 0.6731625747471432,
    ((2.5, 0.7, 1.3), 2.0): 0.9335335307802135,
    ((2.5, 0.7, 1.3), 3.5): 0.9989018449571019,
}


@pytest.mark.parametrize(("asked", "value"), GOLDEN.items())
def test_surface_dice_equals_deepmind_s_on_anisotropic_grids(
    asked: tuple[tuple[float, float, float], float], value: float
) -> None:
    one, other = two_balls()
    assert surface_dice(one, other, asked[0], tolerance_mm=asked[1]) == pytest.approx(value, abs=1e-6)
    assert surface_dice(other, one, asked[0], tolerance_mm=asked[1]) == pytest.approx(value, abs=1e-6)


@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.002, 0.05, 0.5, 0.98]),
    spacing=st.tuples(*[st.floats(0.3, 5.0)] * 3),
    tolerance=st.floats(0.1, 8.0),
)
@settings(max_examples=25, deadline=None)
def test_scattered_marks_are_scored_as_monai_scores_them(
    seed: int, share: float, spacing: tuple[float, float, float], tolerance: float
) -> None:
    rng = np.random.default_rng(seed)
    one, other = two_balls()
    other = other ^ (rng.random(other.shape) < share)
    masks = [torch.from_numpy(np.pad(mask, 1).astype(np.float32))[None, None] for mask in (one, other)]
    wanted = compute_surface_dice(
        masks[0], masks[1], [tolerance], include_background=True, spacing=list(spacing), use_subvoxels=True
    )
    assert surface_dice(one, other, spacing, tolerance_mm=tolerance) == pytest.approx(float(wanted[0, 0]), abs=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_whole_voxels_away_is_within_as_many_millimetres_though_sizes_are_rounded(steps: int) -> None:
    one = np.zeros((12, 3, 3), dtype=bool)
    one[1, 1, 1] = True
    for size in (0.7, 0.7 * (1 + 1e-9), 0.7 * (1 - 1e-9)):
        value = surface_dice(one, np.roll(one, steps, 0), (size, 3.0, 3.0), tolerance_mm=0.7 * steps)
        assert value == 1.0


def test_a_mask_at_the_scan_s_edge_has_a_surface_there() -> None:
    one, other = (mask[6:, 8:, 5:] for mask in two_balls())
    # surface-distance 0.1, the same cut
    assert surface_dice(one, other, (0.8, 1.2, 3.0), tolerance_mm=1.0) == pytest.approx(0.7766698742250591, abs=1e-6)


def test_what_lies_around_changes_nothing() -> None:
    one, other = two_balls()
    wide = [np.pad(mask, 7) for mask in (one, other)]
    near = surface_dice(one, other, (0.8, 1.2, 3.0), tolerance_mm=1.0)
    assert surface_dice(wide[0], wide[1], (0.8, 1.2, 3.0), tolerance_mm=1.0) == near


def test_the_same_mask_is_1_a_missing_one_0_and_two_missing_ones_nothing() -> None:
    one, _ = two_balls()
    empty = np.zeros_like(one)
    assert surface_dice(one, one, (1.0, 1.0, 3.0), tolerance_mm=0.1) == 1.0
    assert surface_dice(empty, one, (1.0, 1.0, 3.0), tolerance_mm=9.0) == 0.0
    assert surface_dice(one, empty, (1.0, 1.0, 3.0), tolerance_mm=9.0) == 0.0
    assert math.isnan(surface_dice(empty, empty, (1.0, 1.0, 3.0), tolerance_mm=9.0))


def test_a_shift_beyond_the_tolerance_loses_only_the_faces_that_moved() -> None:
    cube = np.zeros((30, 12, 12), dtype=bool)
    cube[5:25, 3:9, 3:9] = True
    values = [surface_dice(np.roll(cube, by, 0), cube, (1.0, 1.0, 1.0), tolerance_mm=1.5) for by in (0, 1, 2, 4)]
    assert values[0] == values[1] == 1.0
    assert 1.0 > values[2] > values[3] > 0.7


@pytest.mark.parametrize(
    ("spacing", "tolerance", "cut"),
    [((1.0, 0.0, 1.0), 1.0, 0), ((1.0, 1.0, 1.0), 0.0, 0), ((1.0, 1.0, 1.0), math.inf, 0), ((1.0, 1.0, 1.0), 1.0, 1)],
)
def test_what_cannot_be_measured_is_refused(spacing: tuple[float, float, float], tolerance: float, cut: int) -> None:
    one, other = two_balls()
    with pytest.raises(ValueError, match="masks need one shape"):
        surface_dice(one[cut:], other, spacing, tolerance_mm=tolerance)
