"""Tokens of a scan and the boxes of things in it: which token speaks for which box, what it says, what it sees.

Without anchor boxes, as in FCOS (Tian et al. 2019): every token near the middle of a thing tells where it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int, Int8
from scipy import ndimage

from voxelstem.geometry import spacing_mm, voxel_to_patient
from voxelstem.protocols import Features
from voxelstem.views import cells

HALF = 0.5
"""Of a token's edge: how far its cell goes from its centre."""
Surrounding = Callable[[Float[np.ndarray, "ti tj tk column"]], Float[np.ndarray, "ti tj tk column"]]
"""Makes a field of a field on the grid of tokens, each column by itself; it is linear."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchors:
    """The tokens of a scan that hold at least one of its voxels."""

    tokens: Float[np.ndarray, "ti tj tk dim"]
    centres_ras_mm: Float[np.ndarray, "token 3"]
    edges_mm: Float[np.ndarray, "3"]
    """Of any token."""

    @staticmethod
    def of(features: Features, affine_ras: Float[np.ndarray, "4 4"], shape_ijk: tuple[int, int, int]) -> Anchors:
        """Find the tokens within a scan; what lies beyond is padding, from which nothing may be learned.

        Raises:
            ValueError: the features have no tokens, or these do not run along the scan's axes.
        """
        tokens, affine = features.tokens, features.tokens_affine_ras
        if tokens is None or affine is None:
            raise ValueError("a voxel-level task needs patch tokens")
        size = (tokens.shape[0], tokens.shape[1], tokens.shape[2])
        members = cells.lay(affine_ras, shape_ijk, affine, size).members()
        start = np.array([member.min() for member in members])
        i, j, k = (slice(int(member.min()), int(member.max()) + 1) for member in members)
        within = tokens[i, j, k].astype(np.float32, copy=False)
        places = np.indices(within.shape[:3]).reshape(3, -1).T
        return Anchors(
            tokens=within,
            centres_ras_mm=voxel_to_patient(places + start, affine),
            edges_mm=np.array(spacing_mm(affine)),
        )

    def kinds(self, corners: Float[np.ndarray, "box 6"], reach: float) -> Int8[np.ndarray, "token"]:
        """Which tokens lie amid one of these things (1), off all of them (0), or at the rim of one (-1).

        A token lies amid a thing if its centre is in the thing's box, and within `reach` of its own edges from the
        middle of it. Of a thing that no token lies amid so, it is the token in whose cell the middle is. Whatever else
        touches a box is its rim.
        """
        kinds = np.zeros(len(self.centres_ras_mm), np.int8)
        half = (corners[:, 3:] - corners[:, :3]) / 2 / self.edges_mm
        for extent, corner in zip(half, corners, strict=True):
            away = np.abs(_away(self.centres_ras_mm, corner[None], self.edges_mm)[:, 0])
            amid = (away <= np.minimum(extent, reach)).all(axis=1)
            nearest = int(away.max(axis=1).argmin())
            amid[nearest] |= bool(away[nearest].max() <= HALF + 1e-6)
            rim = (away < extent + HALF).all(axis=1)
            kinds[rim & (kinds == 0)] = -1
            kinds[amid] = 1
        return kinds

    def aims(self, rows: Int[np.ndarray, "row"], corners: Float[np.ndarray, "box 6"]) -> Float[np.ndarray, "row 6"]:
        """What some tokens should say of the thing nearest to each, for `corners_of` to understand: zeros without one.

        The way to its middle in edges of a token, and the logarithms of its own edges in millimetres.
        """
        found = np.zeros((len(rows), 6), np.float32)
        if len(corners):
            away = _away(self.centres_ras_mm[rows], corners, self.edges_mm)
            nearest = (away**2).sum(axis=2).argmin(axis=1)
            found[:, :3] = -away[np.arange(len(rows)), nearest]
            found[:, 3:] = np.log(corners[:, 3:] - corners[:, :3])[nearest]
        return found

    def corners_of(self, rows: Int[np.ndarray, "row"], said: Float[np.ndarray, "row 6"]) -> Float[np.ndarray, "row 6"]:
        """The boxes that some tokens speak of; undoes `aims`."""
        middle = self.centres_ras_mm[rows] + said[:, :3] * self.edges_mm
        half = np.exp(said[:, 3:].astype(np.float64)) / 2
        return np.concatenate([middle - half, middle + half], axis=1)

    def rows(self, chosen: Int[np.ndarray, "row"], around: int) -> Float[np.ndarray, "row column"]:
        """What is to be seen at some tokens: themselves and their `surroundings`, side by side."""
        dim = self.tokens.shape[3]
        seen = [view(self.tokens).reshape(-1, dim)[chosen] for view in surroundings(around)]
        return np.concatenate(seen, axis=1)


def surroundings(around: int) -> list[Surrounding]:
    """A field as it is, its means over boxes of 3, 5, ... up to `around` tokens to every side, and its three slopes.

    Beyond the scan the field goes on as at the edge. With `around` 0 there is the field alone.
    """
    sizes = [2 * distance + 1 for distance in range(1, around + 1)]
    filters = cast(Any, ndimage)  # its types know no size for each axis
    means = [partial(filters.uniform_filter, size=(size, size, size, 1), mode="nearest") for size in sizes]
    step, axes = np.array([-0.5, 0.0, 0.5]), range(3 if around else 0)
    slopes = [partial(filters.correlate1d, weights=step, axis=axis, mode="nearest") for axis in axes]
    return [np.asarray, *means, *slopes]


def _away(
    centres_ras_mm: Float[np.ndarray, "token 3"], corners: Float[np.ndarray, "box 6"], edges_mm: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "token box 3"]:
    """From the middle of each box to each token, in edges of a token."""
    return (centres_ras_mm[:, None] - (corners[:, :3] + corners[:, 3:]) / 2) / edges_mm
