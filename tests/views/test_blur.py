from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from voxelstem.views.blur import blur, gaussian_matrix


def naive(line: np.ndarray, sigma: float, *, inside: bool) -> np.ndarray:
    """Blur a line by summing over all pairs of voxels."""

    def share(distance: int) -> float:
        low, high = ((distance + side) / (sigma * math.sqrt(2)) for side in (-0.5, 0.5))
        return 0.5 * (math.erf(high) - math.erf(low))

    result = np.empty(len(line))
    for at in range(len(line)):
        shares = np.array([share(at - other) for other in range(len(line))])
        result[at] = (shares * line).sum() / (shares.sum() if inside else 1.0)
    return result


@pytest.mark.parametrize("edge", ["inside", "air"])
def test_each_row_is_blurred_along_each_axis_by_its_own_width(edge: str) -> None:
    rng = np.random.default_rng(0)
    views, sigma = rng.random((2, 2, 5, 6, 7)), np.array([[0.4, 1.0, 2.5], [1.5, 0.3, 0.8]])
    expected = views.copy()
    for row in range(2):
        for axis in range(3):
            expected[row] = np.apply_along_axis(
                naive, 1 + axis, expected[row], sigma[row, axis], inside=edge == "inside"
            )
    got = blur(torch.from_numpy(views).float(), torch.from_numpy(sigma), edge=edge)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def test_a_constant_stays_constant_unless_the_edge_is_air() -> None:
    grey, wide = torch.full((1, 1, 9, 9, 9), 0.5), torch.full((1, 3), 1.0)
    torch.testing.assert_close(blur(grey, wide), grey)
    darker = blur(grey, wide, edge="air")
    assert darker[0, 0, 4, 4, 4] == pytest.approx(0.5, abs=1e-3)
    assert darker[0, 0, 0, 0, 0] < 0.25


def test_a_narrow_gaussian_leaves_the_voxels_alone() -> None:
    torch.testing.assert_close(gaussian_matrix(torch.tensor([0.05]), 6), torch.eye(6)[None])


def test_no_width_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma > 0, got 0"):
        gaussian_matrix(torch.tensor([1.0, 0.0]), 4)
