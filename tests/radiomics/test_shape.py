from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from voxelstem.radiomics import shape

UNIT, THICK = (1.0, 1.0, 1.0), (0.75, 1.25, 2.5)
AT_I, AT_J, AT_K = np.indices((15, 13, 14))
SHAPES = {
    "ball": (AT_I - 7) ** 2 + (AT_J - 6.2) ** 2 + (AT_K - 6.5) ** 2 <= 5.3**2,
    "ellipsoid": ((AT_I - 7) / 6.1) ** 2 + ((AT_J - 6) / 3.3) ** 2 + ((AT_K - 6.5) / 4.7) ** 2 <= 1,
    "ring": (np.hypot(AT_I - 7, AT_J - 6) - 3.6) ** 2 + (AT_K - 6.4) ** 2 <= 1.9**2,
}


def noise(seed: int, size: tuple[int, int, int] = (5, 6, 4)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    region = rng.random(size) < rng.uniform(0.2, 0.8)
    region[tuple(rng.integers(0, size))] = True
    return region


def mesh(region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All triangles of a region's surface and their weights, cube by cube."""
    padded = np.pad(region, 1)
    triangles, weights = [], []
    for place in np.ndindex(*(count - 1 for count in padded.shape)):
        corners = itertools.product((0, 1), repeat=3)
        kind = sum(int(padded[tuple(np.add(place, corner))]) << bit for bit, corner in enumerate(corners))
        held = shape._cubes().kinds == kind
        triangles.append(shape._cubes().triangles[held] + np.array(place))
        weights.append(shape._cubes().weights[held])
    return np.concatenate(triangles), np.concatenate(weights)


def faces(region: np.ndarray) -> np.ndarray:
    """Middles of all faces between a voxel that is in and one that is out."""
    found = []
    for place in np.argwhere(region):
        for axis, side in itertools.product(range(3), (-1, 1)):
            beside = place.copy()
            beside[axis] += side
            if (
                not all(0 <= at < count for at, count in zip(beside, region.shape, strict=True))
                or not region[tuple(beside)]
            ):
                found.append((place + beside) / 2)
    return np.array(found)


# What scikit-image 0.26.0 draws (marching_cubes of the padded shape at 0.5, with this spacing): area, enclosed volume.
@pytest.mark.parametrize(
    ("name", "spacing_mm", "area", "volume"),
    [
        ("ball", UNIT, 376.93286195956205, 609.0),
        ("ball", THICK, 786.6875991836107, 1427.34375),
        ("ellipsoid", UNIT, 294.60768910961656, 380.3333333333333),
        ("ellipsoid", THICK, 577.6798974979483, 891.40625),
        ("ring", UNIT, 287.5892322521385, 262.0),
        ("ring", THICK, 544.354180096199, 614.0625),
    ],
)
def test_the_surface_of_smooth_shapes_is_that_of_the_tables_in_use(
    name: str, spacing_mm: tuple[float, float, float], area: float, volume: float
) -> None:
    found = shape.surface(SHAPES[name], spacing_mm)
    assert found.area_mm2 == pytest.approx(area, rel=1e-9)
    assert found.volume_mm3 == pytest.approx(volume, rel=1e-9)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 1), (3, 4, 2), (5, 5, 5)])
def test_a_box_loses_its_edges_and_corners(size: tuple[int, int, int]) -> None:
    # Each unit of an edge loses a prism of 1 / 8; each corner keeps a tetrahedron of 1 / 48 of its eighth of a voxel.
    long = sum(edge - 1 for edge in size)
    flats = 2 * sum((a - 1) * (b - 1) for a, b in itertools.combinations(size, 2))
    found = shape.surface(np.ones(size, dtype=bool), UNIT)
    assert found.volume_mm3 == pytest.approx(math.prod(size) - 4 * long / 8 - 8 * (1 / 8 - 1 / 48))
    assert found.area_mm2 == pytest.approx(flats + 4 * long * math.sqrt(0.5) + 8 * math.sqrt(3) / 8)


@pytest.mark.parametrize("seed", range(4))
def test_area_and_volume_are_those_of_the_mesh_drawn_cube_by_cube(seed: int) -> None:
    region = noise(seed)
    triangles, weights = mesh(region)
    a, b, c = (triangles * THICK).transpose(1, 0, 2)
    found = shape.surface(region, THICK)
    assert found.area_mm2 == pytest.approx(weights @ np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2)
    # Every way to span a polygon of several encloses as much: the weighted sum is each one's.
    assert found.volume_mm3 == pytest.approx(weights @ (a * np.cross(b, c)).sum(axis=1) / 6)


@pytest.mark.parametrize("seed", range(4))
def test_the_mesh_is_closed_and_its_faces_look_outward(seed: int) -> None:
    edges: Counter[tuple[tuple[float, ...], tuple[float, ...]]] = Counter()
    for triangle, weight in zip(*mesh(noise(seed)), strict=True):
        corners = [tuple(corner) for corner in triangle]
        for start, stop in zip(corners, corners[1:] + corners[:1], strict=True):
            edges[start, stop] += weight
    for (start, stop), count in edges.items():
        assert count == pytest.approx(edges[stop, start])


def test_cubes_are_counted_as_by_looking_at_each() -> None:
    region = noise(3, (4, 3, 5))
    padded = np.pad(region, 1)
    counts = np.zeros(256, dtype=int)
    for i, j, k in np.ndindex(5, 4, 6):
        eight = padded[i : i + 2, j : j + 2, k : k + 2].ravel()
        counts[sum(1 << bit for bit, held in enumerate(eight) if held)] += 1
    np.testing.assert_array_equal(shape.count_cubes(region), counts)


@pytest.mark.parametrize("seed", range(3))
def test_a_shape_measures_the_same_however_the_scan_is_turned(seed: int) -> None:
    region = noise(seed)
    surface, hull, axes = shape.surface(region, THICK), shape.hull(region, THICK), shape.axes(region, THICK)
    for order, mirrored in itertools.product(itertools.permutations(range(3)), itertools.product((0, 1), repeat=3)):
        turned = np.flip(region.transpose(order), [axis for axis in range(3) if mirrored[axis]])
        spacing = (THICK[order[0]], THICK[order[1]], THICK[order[2]])
        assert shape.surface(turned, spacing).area_mm2 == pytest.approx(surface.area_mm2)
        assert shape.surface(turned, spacing).volume_mm3 == pytest.approx(surface.volume_mm3)
        assert shape.hull(turned, spacing).diameter_mm == pytest.approx(hull.diameter_mm)
        assert shape.axes(turned, spacing).lengths_mm == pytest.approx(axes.lengths_mm)


@pytest.mark.parametrize("seed", range(5))
def test_the_hull_is_that_of_all_faces_between_in_and_out(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "ROWS_AT_ONCE", 3)
    region = noise(seed)
    points = faces(region) * THICK
    found, naive = shape.hull(region, THICK), ConvexHull(points)
    assert found.volume_mm3 == pytest.approx(naive.volume)
    assert found.area_mm2 == pytest.approx(naive.area)
    assert found.diameter_mm == pytest.approx(pdist(points).max())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), spacing=st.tuples(*[st.floats(0.3, 5)] * 3))
def test_the_hull_holds_the_surface_and_the_surface_is_no_larger_than_its_voxels(
    seed: int, spacing: tuple[float, float, float]
) -> None:
    region = noise(seed, (4, 4, 4))
    surface, hull = shape.surface(region, spacing), shape.hull(region, spacing)
    box = [(part.stop - part.start) * edge for part, edge in zip(shape.box(region), spacing, strict=True)]
    assert 0 < surface.volume_mm3 <= hull.volume_mm3 * (1 + 1e-9)
    assert max(box) <= hull.diameter_mm * (1 + 1e-9) <= math.hypot(*box) * (1 + 2e-9)


def test_axes_are_four_standard_deviations_of_the_voxel_centres() -> None:
    region = SHAPES["ellipsoid"] & (AT_I + AT_J > 9)
    points = np.argwhere(region) * THICK
    naive = 4 * np.sqrt(np.sort(np.linalg.eigvalsh(np.cov(points.T)))[::-1])
    found = shape.axes(region, THICK)
    assert found.lengths_mm == pytest.approx(naive)
    assert found.centre_mm == pytest.approx(points.mean(axis=0))


def test_axes_of_a_ball_are_its_diameter_by_the_root_of_five_quarters() -> None:
    # Each coordinate of a full ball has the variance r^2 / 5.
    i, j, k = np.indices((41, 41, 41)) - 20
    found = shape.axes(i**2 + j**2 + k**2 <= 18.3**2, (0.5, 0.5, 0.5))
    assert found.lengths_mm == pytest.approx([4 * 18.3 * 0.5 / math.sqrt(5)] * 3, rel=0.01)


def test_what_is_flat_has_no_third_axis_and_a_voxel_has_none() -> None:
    diagonal = np.zeros((9, 9, 9), dtype=bool)
    diagonal[range(9), range(9), range(9)] = True
    length, none, nor = shape.axes(diagonal, THICK).lengths_mm
    assert length > 0
    assert (none, nor) == (0, 0)
    assert shape.axes(np.ones((1, 1, 1), dtype=bool), UNIT).lengths_mm == (0, 0, 0)


def test_the_centre_follows_the_weights() -> None:
    weights = np.random.default_rng(0).uniform(0, 5, (4, 3, 6))
    naive = sum(weight * np.array(place) * THICK for place, weight in np.ndenumerate(weights)) / weights.sum()
    assert shape.centre(weights, THICK) == pytest.approx(naive)


def test_the_box_is_the_smallest_one() -> None:
    region = np.zeros((6, 7, 8), dtype=bool)
    region[2, 3, 1] = region[4, 3, 6] = True
    assert shape.box(region) == (slice(2, 5), slice(3, 4), slice(1, 7))


def test_nothing_has_no_shape() -> None:
    nothing = np.zeros((3, 3, 3), dtype=bool)
    for ask in (shape.hull, shape.axes):
        with pytest.raises(ValueError, match="empty"):
            ask(nothing, UNIT)
    with pytest.raises(ValueError, match="empty"):
        shape.box(nothing)
    assert shape.surface(nothing, UNIT) == shape.Surface(area_mm2=0.0, volume_mm3=0.0)
