"""The labelled scans that are nearest to a new one by cosine, and what each of them has to say in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

SOFTENED = "softened"
"""A fact of heads whose votes are softened: those of 0.12.0 and before were not, and were calibrated as they were."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Nearest:
    """Rows that are nearest to one, the nearest first."""

    places: Int[np.ndarray, "near"]
    """Which rows these are."""
    cosines: Float[np.ndarray, "near"]

    def shares(self, temperature: float) -> Float[np.ndarray, "near"]:
        """What each counts for: exp(cosine / temperature), made to add up to 1 (Wu et al. 2018, section 3.4).

        Raises:
            ValueError: a temperature that is not positive.
        """
        if temperature <= 0:
            raise ValueError(f"the temperature of votes must be positive, got {temperature}")
        votes = np.exp((self.cosines - self.cosines[:1]) / temperature)
        return votes / votes.sum()


def softened(shares: Float[np.ndarray, "class"], voters: int) -> Float[np.ndarray, "class"]:
    """Shares of votes, with one voter more who gives every class the same: so few are never certain.

    The rule of succession, made to weigh one vote in all (Cestnik 1990). The order of two scans stays what it is.

    >>> softened(np.array([1.0, 0.0]), 4).tolist()
    [0.9, 0.1]
    """
    return (voters * shares + 1 / len(shares)) / (voters + 1)


def unit(rows: Float[np.ndarray, "row dim"]) -> Float[np.ndarray, "row dim"]:
    """Rows of length 1 in float64; a row of nothing stays as it is."""
    wide = rows.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def nearest(
    rows: Float[np.ndarray, "row dim"],
    asked: Float[np.ndarray, "dim"],
    count: int,
    *,
    hidden: Bool[np.ndarray, "row"] | None = None,
) -> Nearest:
    """The `count` rows of the largest cosine with a vector, or as many as there are; equal ones in their own order.

    Args:
        rows: Unit rows, as `unit` makes them.
        asked: A vector of any length.
        count: How many.
        hidden: Rows that do not take part.

    Raises:
        ValueError: nobody is asked for, or no row is left.
    """
    cosines = rows @ unit(asked[None])[0]
    order = np.argsort(-cosines, kind="stable")
    order = order if hidden is None else order[~hidden[order]]
    if count < 1 or not len(order):
        raise ValueError(f"of {len(order)} rows {count} cannot be the nearest")
    return Nearest(places=order[:count], cosines=cosines[order[:count]])
