"""The shape of a set of voxels: the surface round it, what that encloses, its hull, its axes. Pure numpy and scipy.

The surface is that of marching cubes (Lorensen and Cline 1987) half-way between voxels that are in and voxels that are
out. Where they leave open how it runs through a cube of eight voxel centres, the choice here does not depend on how the
scan is turned: voxels that touch along an edge are one body, and a bent polygon is spanned so that the side with fewer
corners of the cube keeps the most. Where no voxels touch along an edge only, scikit-image's tables give the same. No
mesh is kept: there are 256 kinds of cubes, each with its own area and volume, and counting them is enough.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

ROWS_AT_ONCE = 512
"""How many corners of a hull are compared with all others in one go; bounds the memory."""
FLAT = 1e-12
"""A principal axis with this small a share of the largest one's variance has none: what is left is rounding."""

ROUNDING = 1e-9
"""Volumes of a cube's parts that differ by less are equal; they are multiples of 1 / 48."""

_CORNERS = tuple(itertools.product((0, 1), repeat=3))
"""Places of a cube's corners; bit number n of a cube's kind says whether corner n is in."""
_ROUND = ((0, 0), (1, 0), (1, 1), (0, 1))
_FACE_AREA = {0: 0.0, 1: 1 / 8, 2: 1 / 2, 3: 7 / 8, 4: 1.0}
"""Share of a cube's face inside the surface, by how many of its corners are in; of two across it is 3 / 4."""

Edge = tuple[int, int]
"""Two neighbouring corners of a cube, the lower number first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surface:
    """Area and volume of what marching cubes draws."""

    area_mm2: float
    volume_mm3: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Hull:
    """The smallest convex body round a surface."""

    area_mm2: float
    volume_mm3: float
    diameter_mm: float
    """Distance of the two places of the surface that are farthest from one another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """The ellipsoid that spreads as a region's voxel centres do."""

    centre_mm: tuple[float, float, float]
    """Along the array's axes, from the centre of its first voxel."""
    lengths_mm: tuple[float, float, float]
    """From one end to the other, the longest first: four standard deviations. 0 where the region is flat."""


def surface(region: Bool[np.ndarray, "i j k"], spacing_mm: tuple[float, float, float]) -> Surface:
    """Area and volume of the surface round a region; nothing lies beyond the edge of the array."""
    counts, cubes = count_cubes(region), _cubes()
    a, b, c = (cubes.triangles * spacing_mm).transpose(1, 0, 2)
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    return Surface(
        area_mm2=float((counts[cubes.kinds] * cubes.weights) @ areas),
        volume_mm3=float(counts @ cubes.volumes) * math.prod(spacing_mm),
    )


def count_cubes(region: Bool[np.ndarray, "i j k"]) -> Int[np.ndarray, "256"]:
    """How often each kind of cube occurs between the voxels' centres, the empty border round them included.

    Bit `4 di + 2 dj + dk` of a cube's kind tells whether its voxel at (+di, +dj, +dk) is in.
    """
    counts = np.zeros(256, dtype=np.int64)
    planes = np.zeros((2, region.shape[1] + 2, region.shape[2] + 2), dtype=np.uint8)
    for plane in itertools.chain(region, (False,)):
        planes[0] = planes[1]
        planes[1, 1:-1, 1:-1] = plane
        kinds = np.zeros((planes.shape[1] - 1, planes.shape[2] - 1), dtype=np.uint8)
        for bit, (di, dj, dk) in enumerate(_CORNERS):
            kinds |= planes[di, dj : dj + kinds.shape[0], dk : dk + kinds.shape[1]] << bit
        counts += np.bincount(kinds.ravel(), minlength=256)
    return counts


def hull(region: Bool[np.ndarray, "i j k"], spacing_mm: tuple[float, float, float]) -> Hull:
    """Measure the convex hull of the surface round a region.

    Raises:
        ValueError: the region is empty.
    """
    if not region.any():
        raise ValueError("an empty region has no hull")
    found = ConvexHull(_outermost(region) * np.array(spacing_mm))
    return Hull(
        area_mm2=float(found.area),
        volume_mm3=float(found.volume),
        diameter_mm=_farthest(found.points[found.vertices]),
    )


def axes(region: Bool[np.ndarray, "i j k"], spacing_mm: tuple[float, float, float]) -> Axes:
    """Find the principal axes of a region's voxel centres.

    Raises:
        ValueError: the region is empty.
    """
    if not region.any():
        raise ValueError("an empty region has no axes")
    middle = centre(region, spacing_mm)
    away = [np.arange(count) * edge - at for count, edge, at in zip(region.shape, spacing_mm, middle, strict=True)]
    spread = np.zeros((3, 3))
    # Two axes at a time, the third one counted together: no list of all voxels is needed.
    for first, second in ((0, 1), (0, 2), (1, 2)):
        counts = region.sum(axis=3 - first - second, dtype=np.float64)
        spread[first, second] = spread[second, first] = away[first] @ counts @ away[second]
        spread[first, first] = away[first] ** 2 @ counts.sum(axis=1)
        spread[second, second] = counts.sum(axis=0) @ away[second] ** 2
    # A sample's covariance (n - 1), which the reference values need; one voxel has no spread anyway.
    variances = np.linalg.eigvalsh(spread / max(int(region.sum()) - 1, 1))[::-1]
    variances = np.where(variances > FLAT * variances[0], variances, 0.0)
    a, b, c = 4 * np.sqrt(variances)
    return Axes(centre_mm=middle, lengths_mm=(float(a), float(b), float(c)))


def centre(weights: Shaped[np.ndarray, "i j k"], spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    """Mean place of the voxel centres by their weights, which do not sum to zero, in mm from the first one."""
    lines = (weights.sum(axis=others, dtype=np.float64) for others in ((1, 2), (0, 2), (0, 1)))
    i, j, k = (
        float(np.arange(len(line)) @ line / line.sum()) * edge for line, edge in zip(lines, spacing_mm, strict=True)
    )
    return i, j, k


def box(region: Bool[np.ndarray, "i j k"]) -> tuple[slice, slice, slice]:
    """The smallest box of voxels that holds all of a region.

    Raises:
        ValueError: the region is empty.
    """
    ends = [np.flatnonzero(region.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    if not len(ends[0]):
        raise ValueError("an empty region lies in no box")
    i, j, k = (slice(int(end[0]), int(end[-1]) + 1) for end in ends)
    return i, j, k


def _farthest(points: Float[np.ndarray, "point 3"]) -> float:
    """Largest distance between two of the points."""
    reach = np.linalg.norm(points - (points.min(axis=0) + points.max(axis=0)) / 2, axis=1)
    farthest = float(cdist(points[[reach.argmax()]], points).max())
    # Two points that lie farther from one another than this reach farther from the middle together, so each does alone.
    points = points[reach + reach.max() >= farthest * (1 - 1e-9)]
    for start in range(0, len(points), ROWS_AT_ONCE):
        farthest = max(farthest, float(cdist(points[start : start + ROWS_AT_ONCE], points).max()))
    return farthest


def _outermost(region: Bool[np.ndarray, "i j k"]) -> Float[np.ndarray, "point 3"]:
    """Corners of the surface that can be corners of its hull, in voxels.

    The surface has its corners where a voxel that is in faces one that is out, half-way between the two. Of those on
    one line of voxels only the first and the last can be corners of the hull.
    """
    found: list[np.ndarray] = []
    for axis in range(3):
        held = np.argwhere(region.any(axis=axis))
        first = region.argmax(axis=axis)[tuple(held.T)] - 0.5
        last = region.shape[axis] - 0.5 - np.flip(region, axis).argmax(axis=axis)[tuple(held.T)]
        found += [np.insert(held.astype(np.float64), axis, ends, axis=1) for ends in (first, last)]
    return np.concatenate(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cubes:
    """What every kind of cube holds, its edges 1."""

    triangles: Float[np.ndarray, "triangle 3 3"]
    """Seen from without, their corners run counterclockwise."""
    weights: Float[np.ndarray, "triangle"]
    """Below 1 where a polygon can be spanned in several ways that are as good: then all count alike."""
    kinds: Int[np.ndarray, "triangle"]
    """Which kind of cube a triangle belongs to."""
    volumes: Float[np.ndarray, "256"]


@cache
def _cubes() -> _Cubes:
    triangles, weights, kinds, volumes = (
        [np.zeros((0, 3, 3))],
        [np.zeros(0)],
        [np.zeros(0, dtype=np.int64)],
        np.zeros(256),
    )
    for kind in range(256):
        volumes[kind] = _capped(kind)
        for polygon in _polygons(kind):
            ways = _span(polygon, kind.bit_count())
            triangles += ways
            weights += [np.full(len(way), 1 / len(ways)) for way in ways]
            kinds += [np.full(len(way), kind) for way in ways]
            volumes[kind] += _below(ways[0])
    return _Cubes(
        triangles=np.concatenate(triangles),
        weights=np.concatenate(weights),
        kinds=np.concatenate(kinds),
        volumes=volumes,
    )


def _polygons(kind: int) -> list[Float[np.ndarray, "corner 3"]]:
    """What the surface is in one kind of cube: follow it from face to face until it closes."""
    follows = dict(pair for face in _faces() for pair in _cuts(kind, face))
    found: list[Float[np.ndarray, "corner 3"]] = []
    while follows:
        start, edge = follows.popitem()
        polygon = [start]
        while edge != start:
            polygon.append(edge)
            edge = follows.pop(edge)
        found.append(np.array([np.add(_CORNERS[low], _CORNERS[high]) / 2 for low, high in polygon]))
    return found


def _span(polygon: Float[np.ndarray, "corner 3"], inside: int) -> list[Float[np.ndarray, "triangle 3 3"]]:
    """Cut a polygon into triangles so that the side with fewer of the cube's corners keeps the most.

    With `inside` half of them, the middling way is taken. Gives all ways that enclose as much.
    """
    ways = _ways(polygon)
    enclosed = np.array([_below(way) for way in ways])
    best = np.sort(enclosed)[len(ways) // 2 if inside == 4 else -1 if inside < 4 else 0]  # noqa: PLR2004 - of 8
    return [way for way, volume in zip(ways, enclosed, strict=True) if abs(volume - best) < ROUNDING]


def _ways(polygon: Float[np.ndarray, "corner 3"]) -> list[Float[np.ndarray, "triangle 3 3"]]:
    """All ways to cut a polygon into triangles along its diagonals."""
    last = len(polygon) - 1
    if last < 2:  # noqa: PLR2004 - a line
        return [np.zeros((0, 3, 3))]
    return [
        np.concatenate([polygon[None, [0, tip, last]], before, after])
        for tip in range(1, last)
        for before in _ways(polygon[: tip + 1])
        for after in _ways(polygon[tip:])
    ]


def _below(triangles: Float[np.ndarray, "triangle 3 3"]) -> float:
    """Volume between triangles and corner 0, counted negative where they face it."""
    a, b, c = triangles.transpose(1, 0, 2)
    return float((a * np.cross(b, c)).sum()) / 6


def _faces() -> list[tuple[int, ...]]:
    """The corners of each face of a cube in order, counterclockwise from without; the far faces are the odd ones."""
    found: list[tuple[int, ...]] = []
    for axis, side in itertools.product(range(3), (0, 1)):
        corners: list[int] = []
        for step in _ROUND if side else _ROUND[::-1]:
            place = {axis: side, (axis + 1) % 3: step[0], (axis + 2) % 3: step[1]}
            corners.append(_CORNERS.index((place[0], place[1], place[2])))
        found.append(tuple(corners))
    return found


def _cuts(kind: int, face: tuple[int, ...]) -> list[tuple[Edge, Edge]]:
    """Where the surface crosses a face: round each run of corners that are out, from which edge to which."""
    inside = [bool(kind >> corner & 1) for corner in face]
    edges: list[Edge] = [(min(pair), max(pair)) for pair in zip(face, face[1:] + face[:1], strict=True)]
    cuts: list[tuple[Edge, Edge]] = []
    for at in range(4):
        if inside[at - 1] and not inside[at]:
            run = next(step for step in range(1, 4) if inside[(at + step) % 4])
            cuts.append((edges[(at + run - 1) % 4], edges[at - 1]))
    return cuts


def _capped(kind: int) -> float:
    """What a cube's own faces add to the volume inside, by the divergence theorem; those through corner 0 add none."""
    volume = 0.0
    for face in _faces()[1::2]:
        inside = [bool(kind >> corner & 1) for corner in face]
        across = sum(inside) == 2 and inside[0] == inside[2]  # noqa: PLR2004 - two that share no edge of the face
        volume += (0.75 if across else _FACE_AREA[sum(inside)]) / 3
    return volume
