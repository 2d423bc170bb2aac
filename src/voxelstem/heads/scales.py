"""What a head divides the columns of its rows by: columns of a network are of one kind, measured values are not.

A network's columns share a unit, and that one of them spreads more than another may mean something. Volumes, energies
and kurtoses have units of their own: which is the largest says nothing but how it is counted, and without a scale for
each the largest are all that a head sees. Features say by `measured` which of their columns are of that kind. Where
both kinds stand side by side they are given the same weight, however many columns either has (block scaling:
Westerhuis, Kourti & MacGregor 1998, "Analysis of multiblock and hierarchical PCA and PLS models").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from voxelstem.protocols import Features, Measured

STILL = 1e-6
"""A column that spreads by no more than this share of its largest value does not vary: float32 holds no more."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Standard:
    """A row is seen as (row - middle) / scale."""

    middle: Float[np.ndarray, "dim"]
    scale: Float[np.ndarray, "dim"]
    """Infinite for measured columns that do not vary: they become 0, in every scan."""


def measured_columns(features: Sequence[Features]) -> Bool[np.ndarray, "dim"]:
    """Which columns of these scans are measured in units of their own; none where features do not say.

    Raises:
        ValueError: no scan, or scans that do not agree.
    """
    said = [one.measured if isinstance(one, Measured) else np.zeros(len(one.scan), dtype=bool) for one in features]
    if not said or any(not np.array_equal(one, said[0]) for one in said):
        raise ValueError("scans of one head must agree on which of their columns are measured in units of their own")
    return said[0]


def standard(rows: Float[np.ndarray, "row dim"], measured: Bool[np.ndarray, "dim"], *, prior: float) -> Standard:
    """Middle and scale of the columns of the rows that a head is fitted to.

    Args:
        rows: Of labelled scans, never of tested ones.
        measured: As `measured_columns` says.
        prior: The spread of a network's column is estimated as if this many more rows had shown the average spread of
            all of them: 0 standardises each by itself, infinity keeps their proportions. Two rows make every column
            look equally telling. A measured column always has its own standard deviation.
    """
    variance, own = rows.var(axis=0), ~measured
    spread = np.sqrt(variance)
    if own.any():
        trust = len(rows) / (len(rows) + prior)
        spread[own] = np.sqrt(trust * variance[own] + (1 - trust) * variance[own].mean())
    still = spread <= STILL * np.maximum(np.abs(rows).max(axis=0), STILL)
    scale = np.where(still, np.where(measured, math.inf, 1.0), spread)
    kinds = (own & ~still, measured & ~still)
    if all(kind.any() for kind in kinds):
        for kind in kinds:
            scale[kind] *= math.sqrt(2 * np.count_nonzero(kind) / np.count_nonzero(~still))
    return Standard(middle=rows.mean(axis=0), scale=scale)


def ruler(rows: Float[np.ndarray, "row dim"], measured: Bool[np.ndarray, "dim"]) -> dict[str, np.ndarray]:
    """Arrays of a head that compares rows by cosine: how `laid` makes them comparable.

    There are none where nothing is measured: a network's vectors are compared as they are.
    """
    if not measured.any():
        return {}
    found = standard(rows, measured, prior=math.inf)
    return {"ruler_middle": found.middle, "ruler_scale": found.scale}


def laid(arrays: Mapping[str, np.ndarray], rows: Float[np.ndarray, "*row dim"]) -> Float[np.ndarray, "*row dim"]:
    """Rows as a head with these arrays compares them, in float64."""
    wide = rows.astype(np.float64)
    return (wide - arrays["ruler_middle"]) / arrays["ruler_scale"] if "ruler_middle" in arrays else wide
