"""Mend stated probabilities on held-out subjects: temperature for classes, Platt's line for yes or no, new prevalence.

One row is one subject that nothing was fitted to yet. No calibrator turns an order round: of two classes of a row, or
two rows of one question, the more probable one is never the less probable one after. Each rests on disk as a few plain
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax

from voxelstem.certainty.calibration import SMALLEST, check_chances, check_labels, check_probabilities, log_odds
from voxelstem.metrics import FEW_SUBJECTS, FEWEST_SUBJECTS

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures that are searched: without an error on the held-out subjects, the most likely one would be zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Temperature:
    """Logits are divided by one number before the softmax (Guo et al. 2017, section 4.2): the answer stays the same."""

    temperature: float
    """Above 1 probabilities were too sure, below 1 not sure enough."""
    classes: int
    subjects: int
    """How many it was fitted to."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a temperature that is not positive and finite, or fewer than two classes.
        """
        if not 0 < self.temperature < math.inf or self.classes < 2:  # noqa: PLR2004
            raise ValueError(
                f"a temperature is positive, for two classes or more, got {self.temperature} for {self.classes}"
            )

    @property
    def at_bound(self) -> bool:
        """Whether the best temperature lies at an end of what is searched: then the labels did not determine it."""
        return not LOWEST < self.temperature < HIGHEST

    def apply(self, probabilities: Float[np.ndarray, "row classes"]) -> Float[np.ndarray, "row classes"]:
        """Calibrate probabilities; what lies below `SMALLEST` is taken for that.

        Raises:
            ValueError: other classes, or as `calibration.check_probabilities`.
        """
        return self.apply_to_logits(log_probabilities(probabilities))

    def apply_to_logits(self, logits: Float[np.ndarray, "row classes"]) -> Float[np.ndarray, "row classes"]:
        """Turn logits into calibrated probabilities.

        Raises:
            ValueError: other classes, or logits that are not finite.
        """
        if logits.shape[1] != self.classes:
            raise ValueError(f"fitted to {self.classes} classes, got {logits.shape[1]}")
        return softmax(_finite(logits) / self.temperature, axis=1)

    def arrays(self) -> dict[str, np.ndarray]:
        """As it rests on disk."""
        return _numbers({"temperature": self.temperature, "classes": self.classes, "subjects": self.subjects})

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Temperature:
        """Read what `arrays` gave.

        Raises:
            ValueError: a number is missing, or none that a temperature could be.
        """
        temperature, classes, subjects = _read(arrays, "temperature", "classes", "subjects")
        return cls(temperature=temperature, classes=int(classes), subjects=int(subjects))


@dataclass(frozen=True, kw_only=True, slots=True)
class Platt:
    """Log-odds are brought to a line before they become the probability of a yes (Platt 1999)."""

    scale: float
    """Never negative. Zero says that the log-odds told nothing, or the contrary: then all get one probability."""
    shift: float
    positives: int
    negatives: int
    """How many subjects of each kind it was fitted to."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a negative scale, or one that is not finite.
        """
        if not 0 <= self.scale < math.inf or not math.isfinite(self.shift):
            raise ValueError(f"scale is finite and not negative, shift finite, got {self.scale} and {self.shift}")

    def apply(self, chance: Float[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        """Calibrate the probability of a yes.

        Raises:
            ValueError: no rows, NaN, or a number outside [0, 1].
        """
        return self.apply_to_logits(log_odds(check_chances(chance, np.zeros(len(chance), dtype=np.bool_))))

    def apply_to_logits(self, logits: Float[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        """Turn logits of a yes into calibrated probabilities.

        Raises:
            ValueError: logits that are not finite.
        """
        return expit(self.scale * _finite(logits) + self.shift)

    def arrays(self) -> dict[str, np.ndarray]:
        """As it rests on disk."""
        counts = {"positives": self.positives, "negatives": self.negatives}
        return _numbers({"scale": self.scale, "shift": self.shift, **counts})

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Platt:
        """Read what `arrays` gave.

        Raises:
            ValueError: a number is missing, or none that it could be.
        """
        scale, shift, positives, negatives = _read(arrays, "scale", "shift", "positives", "negatives")
        return cls(scale=scale, shift=shift, positives=int(positives), negatives=int(negatives))


def fit_temperature(
    logits: Float[np.ndarray, "row classes"], truth: Int[np.ndarray, "row"], *, modest: bool = False
) -> Temperature:
    """Find the temperature of the smallest log loss on held-out subjects (Guo et al. 2017, section 4.2).

    It lies between `LOWEST` and `HIGHEST`: see `Temperature.at_bound`. The log loss has one minimum, as it is convex in
    the inverse of the temperature. From probabilities: `fit_temperature(log_probabilities(probabilities), truth)`.

    `modest` takes nothing for sure that so few subjects show: of n of a class, n + 1 of n + K are taken to be of it and
    one is of each other class, for K classes, which for two is Platt's own rule (1999, section 2.2). Without it a few
    answers that are all right would make every later one certain.

    Raises:
        ValueError: fewer than ten subjects, one class among them only, logits that are not finite or the same for all
            classes of every row, or not one label from 0 to classes - 1 for each row.
    """
    check_labels(truth, logits)
    kinds = np.unique(truth)
    if len(truth) < FEW_SUBJECTS or len(kinds) < 2:  # noqa: PLR2004
        raise ValueError(
            f"a temperature needs {FEW_SUBJECTS} held-out subjects of two classes at least, there are {len(truth)} "
            f"of {len(kinds)}"
        )
    rows = _finite(logits)
    if not np.ptp(rows, axis=1).any():
        raise ValueError(f"logits of all classes are the same in all {len(rows)} rows: no temperature changes that")

    temperature = best_temperature(rows, truth, modest=modest)
    return Temperature(temperature=temperature, classes=rows.shape[1], subjects=len(rows))


def fit_platt(logits: Float[np.ndarray, "row"], truth: Bool[np.ndarray, "row"]) -> Platt:
    """Find the line of the smallest log loss on held-out subjects, with a scale that is not negative (Platt 1999).

    By `best_line`. From probabilities: `fit_platt(log_odds(chance), truth)`.

    Raises:
        ValueError: fewer than ten subjects or than three of a kind, not one truth for each row, or logits that are not
            finite or all the same.
    """
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if len(logits) != len(truth):
        raise ValueError(f"every row needs a truth, got {len(truth)} for {len(logits)}")
    if len(truth) < FEW_SUBJECTS or min(positives, negatives) < FEWEST_SUBJECTS:
        raise ValueError(
            f"a Platt scaling needs {FEW_SUBJECTS} held-out subjects at least, {FEWEST_SUBJECTS} of each kind, there "
            f"are {positives} positive and {negatives} negative ones"
        )
    rows = _finite(logits)
    if np.ptp(rows) <= SMALLEST * max(1.0, abs(float(rows.mean()))):
        raise ValueError(f"the logits of all {len(rows)} rows are the same: no scale follows from them")
    scale, shift = best_line(rows, truth)
    return Platt(scale=scale, shift=shift, positives=positives, negatives=negatives)


def best_temperature(
    logits: Float[np.ndarray, "row classes"],
    truth: Int[np.ndarray, "row"],
    *,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    modest: bool = False,
) -> float:
    """The temperature of the smallest log loss among those searched, however few rows there are.

    `fit_temperature` asks first whether they are enough, and says what `modest` is.
    """
    wanted = np.eye(logits.shape[1])[truth]
    if modest:
        own = wanted.sum(axis=0)[truth, None]
        wanted = (wanted * own + 1) / (own + logits.shape[1])

    def loss(power: float) -> float:
        return -float((wanted * log_softmax(logits / math.exp(power), axis=1)).sum(axis=1).mean())

    ends = (math.log(lowest), math.log(highest))
    found = cast(Any, minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-9}))
    # The search comes near the ends of its bounds, and never reaches them.
    best = min((*ends, float(found.x)), key=loss)
    return {ends[0]: lowest, ends[1]: highest}.get(best, math.exp(best))


def best_line(logits: Float[np.ndarray, "row"], truth: Bool[np.ndarray, "row"]) -> tuple[float, float]:
    """Scale, never negative, and shift of the smallest log loss with Platt's targets, however few rows there are.

    Instead of 1 and 0 the targets are (P + 1) / (P + 2) and 1 / (N + 2), for P positive and N negative rows (Platt
    1999, section 2.2), so rows which are told apart without an error make nothing certain. `fit_platt` asks first
    whether they are enough.
    """
    positives, negatives = int(truth.sum()), int((~truth).sum())
    middle, spread = float(logits.mean()), max(float(logits.std()), SMALLEST)
    standard = (logits - middle) / spread
    targets = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(at: Float[np.ndarray, "2"]) -> tuple[float, Float[np.ndarray, "2"]]:
        z = at[0] * standard + at[1]
        error = (expit(z) - targets) / len(z)
        # log(1 + exp(z)) - target * z, without an exp of a large number.
        return float((np.logaddexp(0.0, z) - targets * z).mean()), np.array([error @ standard, error.sum()])

    found = minimize(
        loss,
        np.array([1.0, 0.0]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None), (None, None)],
        options={"ftol": 1e-15, "gtol": 1e-9},
    ).x
    scale = float(found[0] / spread)
    return scale, float(found[1]) - scale * middle


def log_probabilities(probabilities: Float[np.ndarray, "row classes"]) -> Float[np.ndarray, "row classes"]:
    """Logits of probabilities, finite for 0 too (see `calibration.SMALLEST`).

    Raises:
        ValueError: as `calibration.check_probabilities`.
    """
    return np.log(np.maximum(check_probabilities(probabilities), SMALLEST))


def for_prevalence(
    probabilities: Float[np.ndarray, "row classes"],
    *,
    fitted: Float[np.ndarray, "classes"],
    known: Float[np.ndarray, "classes"],
) -> Float[np.ndarray, "row classes"]:
    """Correct probabilities for a place where classes are more or less frequent (Saerens et al. 2002, equation 2.4).

    Right where only the frequencies differ, and each class looks the same in both places. A yes or no is two classes:
    `np.stack([1 - chance, chance], axis=1)`.

    Args:
        probabilities: Calibrated where the classes were as frequent as in `fitted`.
        fitted: Share of each class among the subjects that the probabilities were fitted to.
        known: Share of each class in the other place.

    Raises:
        ValueError: not one share for each class, shares that are not positive or do not add up to one, or as
            `calibration.check_probabilities`.
    """
    rows = check_probabilities(probabilities)
    for name, shares in (("fitted", fitted), ("known", known)):
        if len(shares) != rows.shape[1]:
            raise ValueError(f"{name} needs a share for each of {rows.shape[1]} classes, got {len(shares)}")
        check_probabilities(shares[None])
        if shares.min() <= 0:
            raise ValueError(f"every class has a share above 0, {name} has {shares.tolist()}")
    weighed = rows * (known.astype(np.float64) / known.sum()) / (fitted.astype(np.float64) / fitted.sum())
    return weighed / weighed.sum(axis=1, keepdims=True)


def _finite(logits: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    odd = int((~np.isfinite(logits)).sum())
    if odd:
        raise ValueError(f"logits are finite, {odd} of {logits.size} are not")
    return logits.astype(np.float64)


def _numbers(values: Mapping[str, float]) -> dict[str, np.ndarray]:
    return {name: np.array(value, dtype=np.float64) for name, value in values.items()}


def _read(arrays: Mapping[str, np.ndarray], *names: str) -> list[float]:
    wrong = [name for name in names if name not in arrays or arrays[name].size != 1]
    if wrong:
        raise ValueError(f"a calibrator has one number each for {', '.join(names)}; not so: {', '.join(wrong)}")
    return [float(arrays[name].reshape(())) for name in names]
