"""Power laws that level off: ceilings, drops and exponents of many curves at once, pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

EXPONENTS = (0.05, 2.0)
"""Bounds. Errors of networks fall with exponents of 0.07 to 0.35, of estimators whose form is right with 0.5 to 1
(Hestness et al. 2017); beyond them a curve is a logarithm, or has levelled off."""
_COARSE, _FINE = 100, 60


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PowerLaws:
    """score(N) = asymptote - drop * N^-exponent, one law for each curve. A curve that does not rise has no drop."""

    asymptote: Float[np.ndarray, "curve"]
    drop: Float[np.ndarray, "curve"]
    exponent: Float[np.ndarray, "curve"]
    """NaN without a drop."""

    @property
    def at_bound(self) -> np.ndarray:
        """Whether the exponent is as small or as large as may be (bool, one for each curve)."""
        return np.isclose(self.exponent, EXPONENTS[0], rtol=1e-3) | np.isclose(self.exponent, EXPONENTS[1], rtol=1e-3)

    def at(self, size: int) -> Float[np.ndarray, "curve"]:
        """The score of each law at a size."""
        power = np.where(np.isnan(self.exponent), 0.0, float(size) ** -np.nan_to_num(self.exponent))
        return self.asymptote - self.drop * power


def fit_power_laws(
    sizes: Sequence[int],
    scores: Float[np.ndarray, "curve size"],
    weights: Float[np.ndarray, "size"],
    *,
    ceiling: float,
) -> PowerLaws:
    """Fit every curve by weighted least squares, with asymptote <= `ceiling`, drop >= 0 and the exponent in bounds.

    Figueroa et al. 2012 fit this law, and weigh by size. With the exponent given, the other two are a line in
    N^-exponent (variable projection: Golub & Pereyra 1973), so the exponent alone is searched for, on a grid that is
    refined once to 0.2 %: nothing depends on where a search begins. A curve with a score that is not finite gives NaN.

    Raises:
        ValueError: fewer than three sizes, sizes that do not grow, or weights that are not one positive for each.
    """
    if len(sizes) < 3 or min(sizes) < 1 or any(b <= a for a, b in pairwise(sizes)):  # noqa: PLR2004
        raise ValueError(f"a power law needs three sizes that grow, got {list(sizes)}")
    if weights.shape != (len(sizes),) or scores.shape[1:] != weights.shape or not (weights > 0).all():
        raise ValueError(f"every one of {len(sizes)} sizes needs a score and a positive weight")
    finite = np.asarray(np.isfinite(scores).all(axis=1))
    known = np.where(finite[:, None], scores, 0.0)
    # In units of the smallest size, so that neither drop nor power becomes tiny.
    relative = np.asarray(sizes, dtype=np.float64) / sizes[0]
    coarse = np.broadcast_to(np.geomspace(*EXPONENTS, _COARSE), (len(known), _COARSE))
    best = _lines(relative, known, weights, coarse, ceiling)
    ratio = (EXPONENTS[1] / EXPONENTS[0]) ** (1 / (_COARSE - 1))
    fine = best.exponent[:, None] * np.geomspace(1 / ratio, ratio, _FINE)
    best = _lines(relative, known, weights, fine.clip(*EXPONENTS), ceiling)
    rises = finite & (best.drop > 1e-12 * np.maximum(np.abs(best.asymptote), 1e-300))
    power = sizes[0] ** best.exponent
    return PowerLaws(
        asymptote=np.where(finite, best.asymptote, np.nan),
        drop=np.where(rises, best.drop * power, np.where(finite, 0.0, np.nan)),
        exponent=np.where(rises, best.exponent, np.nan),
    )


def _lines(
    relative: Float[np.ndarray, "size"],
    scores: Float[np.ndarray, "curve size"],
    weights: Float[np.ndarray, "size"],
    exponents: Float[np.ndarray, "curve try"],
    ceiling: float,
) -> PowerLaws:
    """For every curve the best of its tried exponents, with the best line for it within bounds."""
    share = weights / weights.sum()
    powers = relative ** -exponents[:, :, None]
    above = ceiling - scores[:, None, :]
    mean_power, mean_score = powers @ share, (scores @ share)[:, None]
    spread = ((powers - mean_power[..., None]) ** 2) @ share
    drop = -((powers - mean_power[..., None]) * (scores[:, None, :] - mean_score[..., None])) @ share / spread
    asymptote = mean_score + drop * mean_power
    # A convex problem in two numbers: if its minimum is out of bounds, the best lies on one of them.
    inside = (drop >= 0) & (asymptote <= ceiling)
    capped = np.maximum((powers * above) @ share / ((powers**2) @ share), 0.0)
    level = np.broadcast_to(np.minimum(mean_score, ceiling), drop.shape)
    options = [
        (np.where(inside, asymptote, level), np.where(inside, drop, 0.0)),
        (np.full_like(drop, ceiling), capped),
        (level, np.zeros_like(drop)),
    ]
    misfits = [((a[..., None] - d[..., None] * powers - scores[:, None, :]) ** 2) @ share for a, d in options]
    # Of the three the first wins ties, so that a minimum inside its bounds stays where it is.
    winner = np.argmin(misfits, axis=0)
    chosen = np.argmin(np.min(misfits, axis=0), axis=1)
    curve = np.arange(len(scores))
    asymptotes, drops = (np.stack(side)[winner[curve, chosen], curve, chosen] for side in zip(*options, strict=True))
    return PowerLaws(asymptote=asymptotes, drop=drops, exponent=exponents[curve, chosen])
