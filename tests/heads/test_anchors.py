from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from voxelstem.heads.anchors import Anchors, surroundings
from voxelstem.heads.boxes import iou
from voxelstem.views import cells

AFFINE = np.array([[1.5, 0, 0, -40.0], [0, 2.0, 0, 15.0], [0, 0, 3.0, 300.0], [0, 0, 0, 1.0]])
SHAPE = (32, 24, 16)
"""A scan of 48 mm along every axis."""


@dataclass(frozen=True)
class Seen:
    tokens: np.ndarray | None
    tokens_affine_ras: np.ndarray | None
    scan: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))


def features(dim: int = 3, token_mm: tuple[float, float, float] = (6.0, 8.0, 12.0)) -> Seen:
    affine, size = cells.cover(AFFINE, SHAPE, token_mm)
    return Seen(np.random.default_rng(0).normal(size=(*size, dim)).astype(np.float32), affine)


def anchors(dim: int = 3) -> Anchors:
    return Anchors.of(features(dim), AFFINE, SHAPE)


def things() -> np.ndarray:
    """One larger than tokens, one smaller than any, in millimetres."""
    low = AFFINE[:3, 3] - AFFINE[:3, :3].sum(axis=1) / 2
    return np.array([[5, 5, 5, 33, 31, 35], [39, 41, 40, 41, 43, 42]]) + np.tile(low, 2)


def naive_kind(centre: np.ndarray, edges: np.ndarray, box: np.ndarray, reach: float) -> int:
    middle = (box[:3] + box[3:]) / 2
    in_box = all(box[a] - 1e-9 <= centre[a] <= box[a + 3] + 1e-9 for a in range(3))
    near = all(abs(centre[a] - middle[a]) <= reach * edges[a] + 1e-9 for a in range(3))
    holds = all(abs(centre[a] - middle[a]) <= edges[a] / 2 for a in range(3))
    if (in_box and near) or holds:
        return 1
    apart = any(
        centre[a] + edges[a] / 2 <= box[a] + 1e-9 or centre[a] - edges[a] / 2 >= box[a + 3] - 1e-9 for a in range(3)
    )
    return 0 if apart else -1


def test_tokens_lie_where_their_voxels_do() -> None:
    laid = anchors()
    assert laid.tokens.shape == (8, 6, 4, 3)
    np.testing.assert_allclose(laid.edges_mm, [6, 8, 12])
    i, j, k = np.array(SHAPE) // laid.tokens.shape[:3]
    for place, centre in enumerate(laid.centres_ras_mm):
        at = np.unravel_index(place, laid.tokens.shape[:3])
        voxels = np.array([[at[0] * i + a, at[1] * j + b, at[2] * k + c] for a, b, c in np.ndindex(i, j, k)])
        np.testing.assert_allclose(centre, (voxels @ AFFINE[:3, :3].T + AFFINE[:3, 3]).mean(axis=0))


@pytest.mark.parametrize("reach", [0.4, 1.0, 2.5])
def test_which_tokens_lie_amid_a_thing_agrees_with_the_slow_twin(reach: float) -> None:
    laid, boxes = anchors(), things()
    for corners in (boxes[:1], boxes[1:], boxes):
        each = [[naive_kind(centre, laid.edges_mm, box, reach) for box in corners] for centre in laid.centres_ras_mm]
        wanted = [1 if 1 in kinds else min(kinds) for kinds in each]
        found = laid.kinds(corners, reach)
        assert found.tolist() == wanted
        assert (found == 1).any()
        assert (found == 0).any()


def test_a_thing_smaller_than_a_token_belongs_to_the_token_that_holds_its_middle() -> None:
    laid = anchors()
    (amid,) = np.flatnonzero(laid.kinds(things()[1:], 0.1) == 1)
    middle = (things()[1, :3] + things()[1, 3:]) / 2
    assert (np.abs(laid.centres_ras_mm[amid] - middle) <= laid.edges_mm / 2).all()


def test_a_thing_that_no_token_holds_is_nowhere() -> None:
    far = things()[1:] + 200.0
    assert (anchors().kinds(far, 1.0) == 0).all()
    assert (anchors().kinds(np.zeros((0, 6)), 1.0) == 0).all()


def test_what_tokens_should_say_is_understood_as_the_box_of_the_nearest_thing() -> None:
    laid, boxes = anchors(), things()
    rows = np.arange(len(laid.centres_ras_mm))
    aims = laid.aims(rows, boxes)
    spoken = laid.corners_of(rows, aims)
    away = (laid.centres_ras_mm[:, None] - (boxes[:, :3] + boxes[:, 3:]) / 2) / laid.edges_mm
    nearest = np.linalg.norm(away, axis=2).argmin(axis=1)
    assert set(nearest) == {0, 1}
    np.testing.assert_allclose(spoken, boxes[nearest], atol=1e-4)
    assert iou(spoken, boxes)[rows, nearest].min() > 0.999
    some = np.array([5, 3, 77])
    np.testing.assert_array_equal(laid.aims(some, boxes), aims[some])
    assert not laid.aims(some, np.zeros((0, 6))).any()


def test_what_is_to_be_seen_agrees_with_the_slow_twin() -> None:
    laid = anchors(dim=2)
    ti, tj, tk, _ = laid.tokens.shape

    def at(i: int, j: int, k: int) -> np.ndarray:
        return laid.tokens[min(max(i, 0), ti - 1), min(max(j, 0), tj - 1), min(max(k, 0), tk - 1)]

    chosen = np.array([0, 37, 101, ti * tj * tk - 1])
    rows = laid.rows(chosen, around=2)
    for row, place in zip(rows, chosen, strict=True):
        i, j, k = (int(v) for v in np.unravel_index(place, (ti, tj, tk)))
        means = [
            np.mean([at(i + a - r, j + b - r, k + c - r) for a, b, c in np.ndindex(2 * r + 1, 2 * r + 1, 2 * r + 1)], 0)
            for r in (1, 2)
        ]
        slopes = [
            (at(i + 1, j, k) - at(i - 1, j, k)) / 2,
            (at(i, j + 1, k) - at(i, j - 1, k)) / 2,
            (at(i, j, k + 1) - at(i, j, k - 1)) / 2,
        ]
        np.testing.assert_allclose(row, np.concatenate([at(i, j, k), *means, *slopes]), atol=1e-5)
    np.testing.assert_array_equal(laid.rows(chosen, around=0), laid.tokens.reshape(-1, 2)[chosen])


def test_surroundings_commute_with_a_linear_map() -> None:
    rng = np.random.default_rng(0)
    field_, weight = rng.normal(size=(5, 4, 6, 3)), rng.normal(size=(3, 2))
    for view in surroundings(2):
        np.testing.assert_allclose(view(field_ @ weight), view(field_) @ weight, atol=1e-12)


def test_padding_round_the_scan_is_not_seen() -> None:
    plain = features()
    assert plain.tokens is not None
    assert plain.tokens_affine_ras is not None
    padded = np.pad(plain.tokens, ((2, 1), (1, 1), (0, 2), (0, 0)), constant_values=50.0)
    affine = plain.tokens_affine_ras.copy()
    affine[:3, 3] += affine[:3, :3] @ [-2, -1, 0]
    inner, outer = anchors(), Anchors.of(Seen(padded, affine), AFFINE, SHAPE)
    np.testing.assert_array_equal(inner.tokens, outer.tokens)
    np.testing.assert_allclose(inner.centres_ras_mm, outer.centres_ras_mm)


def test_what_cannot_be_laid_is_refused() -> None:
    with pytest.raises(ValueError, match="needs patch tokens"):
        Anchors.of(Seen(None, None), AFFINE, SHAPE)
    plain = features()
    assert plain.tokens_affine_ras is not None
    turned = plain.tokens_affine_ras[:, [1, 0, 2, 3]]
    with pytest.raises(ValueError, match="does not run along the axes"):
        Anchors.of(Seen(plain.tokens, turned), AFFINE, SHAPE)
