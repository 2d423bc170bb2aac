"""One number for a scan: a ridge regression on its frozen embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from voxelstem import metrics
from voxelstem.protocols import Example, Head


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The true number of a subject and the predicted one, in the unit of the label file."""

    truth: float
    predicted: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Regress:
    """Settings of the scan-level regression, and the regression itself."""

    modes: ClassVar[tuple[str, ...]] = ("probe",)
    metrics: ClassVar[tuple[str, ...]] = ("mae", "r")
    voxels: ClassVar[bool] = False
    numbers: ClassVar[bool] = True
    tunable: ClassVar[bool] = True

    strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0, 10000.0)
    """Candidates for the weight of the squared norm, on standardised columns; leaving one scan out chooses."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no strength, or one that is not positive.
        """
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(f"strengths must be positive, got {self.strengths}")

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit `probe` to scans with a value; there are no classes, and nothing is left to the seed.

        Raises:
            ValueError: an unknown mode, fewer than two scans, or one without a value.
        """
        del seed
        if mode not in self.modes:
            raise ValueError(f"regress has no mode '{mode}'")
        values = np.array([math.nan if example.value is None else example.value for example in examples])
        if len(values) < 2 or not np.isfinite(values).all():  # noqa: PLR2004 - a line needs two points
            raise ValueError("a regression needs at least two scans, each with a value")
        rows = np.stack([example.features.scan for example in examples]).astype(np.float64)
        middle, scale = rows.mean(axis=0), rows.std(axis=0)
        scale = np.where(scale > 1e-9 * np.maximum(np.abs(rows).max(axis=0), 1e-9), scale, 1.0)
        weight, strength = ridge((rows - middle) / scale, values - values.mean(), self.strengths)
        arrays = {"middle": middle, "scale": scale, "weight": weight, "bias": np.array([values.mean()])}
        return Head(mode=mode, classes=classes, arrays=arrays, facts={"strength": strength})

    def predict(self, head: Head, scan: Float[np.ndarray, "dim"]) -> float:
        """The number of one scan embedding."""
        row = (scan.astype(np.float64) - head.arrays["middle"]) / head.arrays["scale"]
        return float(row @ head.arrays["weight"] + head.arrays["bias"][0])

    def outcome(self, head: Head, example: Example) -> Measured:
        """Predict one scan and keep its truth beside.

        Raises:
            ValueError: the example has no value.
        """
        if example.value is None:
            raise ValueError("a regression needs a value to compare with")
        return Measured(truth=example.value, predicted=self.predict(head, example.features.scan))

    def combine(self, outcomes: Sequence[Measured]) -> Measured:
        """Average the predictions over a subject's scans."""
        return Measured(truth=outcomes[0].truth, predicted=metrics.mean([outcome.predicted for outcome in outcomes]))

    def statistic(self, metric: str) -> Callable[[Sequence[Measured]], float]:
        """`mae` (mean absolute error, in the label's unit) or `r` (Pearson's correlation), over subjects."""
        if metric == "mae":
            return metrics.MeanOf(lambda outcome: abs(outcome.truth - outcome.predicted))
        return lambda sample: pearson(
            np.array([outcome.truth for outcome in sample]), np.array([outcome.predicted for outcome in sample])
        )


def pearson(one: Float[np.ndarray, "row"], other: Float[np.ndarray, "row"]) -> float:
    """Linear correlation; NaN where one side does not vary."""
    a, b = one - one.mean(), other - other.mean()
    # Rounding alone makes a spread of equal numbers; how large it is goes with the numbers.
    vary = all(np.abs(gap).max() > 1e-9 * np.abs(side).max() for gap, side in ((a, one), (b, other)))
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) if vary else math.nan


def ridge(
    rows: Float[np.ndarray, "scan dim"], values: Float[np.ndarray, "scan"], strengths: Sequence[float]
) -> tuple[Float[np.ndarray, "dim"], float]:
    """Weights of the ridge regression of centred values on centred rows, and the strength that was chosen.

    Leaving each scan out in turn is computed at once from the singular values (Golub, Heath and Wahba 1979); the mean
    is part of what is left out.
    """
    left, sizes, right = np.linalg.svd(rows, full_matrices=False)
    seen = left.T @ values
    best = (math.inf, strengths[0])
    for strength in strengths:
        shrunk = sizes**2 / (sizes**2 + strength)
        lever = (left**2) @ shrunk + 1 / len(rows)
        gaps = (values - left @ (shrunk * seen)) / np.maximum(1 - lever, 1e-9)
        best = min(best, (float(gaps @ gaps), strength))
    strength = best[1]
    return right.T @ (sizes / (sizes**2 + strength) * seen), strength
