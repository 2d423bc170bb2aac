"""One number for a scan: a ridge regression on its frozen embedding, its neighbours, or attention to its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F

from voxelstem import metrics
from voxelstem.certainty.assurance import Assurance
from voxelstem.findings import Finding, Weights
from voxelstem.heads import attending
from voxelstem.heads.bags import bag_of, kind_of
from voxelstem.heads.neighbours import nearest, unit
from voxelstem.heads.scales import laid, measured_columns, ruler, standard
from voxelstem.protocols import Example, Features, Head


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The true number of a subject and the predicted one, in the unit of the label file."""

    truth: float
    predicted: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Regress:
    """Settings of the scan-level regression, and the regression itself."""

    modes: ClassVar[tuple[str, ...]] = ("probe", "knn", "attention")
    metrics: ClassVar[tuple[str, ...]] = ("mae", "r")
    voxels: ClassVar[bool] = False
    numbers: ClassVar[bool] = True
    tunable: ClassVar[bool] = True

    unit: str = "1"
    """Of the label file's numbers, as UCUM writes it: `a` for years, `mm`, `1` for plain numbers."""
    strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0, 10000.0)
    """Candidates for the weight of the squared norm, on standardised columns; leaving one subject out chooses."""
    neighbours: int = 5
    """Over how many labelled scans `knn` takes the mean (fewer if there are fewer)."""
    temperature: float = 0.07
    """There a neighbour of cosine c weighs exp(c / temperature), as in `classify` (Wu et al. 2018, section 3.4)."""
    attention: attending.AttendConfig = field(default_factory=attending.AttendConfig)
    """What is looked at in `attention`, and how that is fitted."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: no strength, or a strength, a temperature or a number of neighbours that is not positive.
        """
        if self.neighbours < 1 or self.temperature <= 0:
            raise ValueError(
                f"neighbours and temperature must be positive, got {self.neighbours} and {self.temperature}"
            )
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(f"strengths must be positive, got {self.strengths}")

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit `probe`, `knn` or `attention` to scans with a value; there are no classes. Only attention needs the seed.

        Raises:
            ValueError: an unknown mode, fewer than two subjects, a scan without a value, or nothing to attend to.
        """
        if mode not in self.modes:
            raise ValueError(f"regress has no mode '{mode}'")
        values = np.array([math.nan if example.value is None else example.value for example in examples])
        if len({example.subject for example in examples}) < 2 or not np.isfinite(values).all():  # noqa: PLR2004 - a line needs two points
            raise ValueError("a regression needs scans of two subjects at least, each with a value")
        if mode == "attention":
            return self._attend(examples, values, classes, seed)
        rows = np.stack([example.features.scan for example in examples]).astype(np.float64)
        measured = measured_columns([example.features for example in examples])
        if mode == "knn":
            how = ruler(rows, measured)
            return Head(mode=mode, classes=classes, arrays=how | {"rows": unit(laid(how, rows)), "values": values})
        rows, values = _by_subject([example.subject for example in examples], rows, values)
        seen, bias = standard(rows, measured, prior=0.0), values.mean()
        weight, strength = ridge((rows - seen.middle) / seen.scale, values - bias, self.strengths)
        arrays = {"middle": seen.middle, "scale": seen.scale, "weight": weight, "bias": np.array([bias])}
        return Head(mode=mode, classes=classes, arrays=arrays, facts={"strength": strength})

    def looks_at_tokens(self, mode: str) -> bool:
        """Whether scans must come with patch tokens in this mode."""
        return mode == "attention" and self.attention.bag != "blocks"

    def answer(self, head: Head, features: Features) -> float:
        """The number of one scan, in every mode.

        Raises:
            ValueError: the head looks at what the scan does not have.
        """
        if head.mode == "attention":
            return float(attending.score(head, features).logits[0])
        return self.predict(head, features.scan)

    def predict(self, head: Head, scan: Float[np.ndarray, "dim"]) -> float:
        """The number of one scan embedding.

        Raises:
            ValueError: the head looks at more than that, see `answer`.
        """
        if head.mode == "attention":
            raise ValueError("a head in mode attention looks at blocks or patches, not at the scan's one vector")
        if head.mode == "knn":
            near = nearest(head.arrays["rows"], laid(head.arrays, scan), self.neighbours)
            return float(near.shares(self.temperature) @ head.arrays["values"][near.places])
        row = (scan.astype(np.float64) - head.arrays["middle"]) / head.arrays["scale"]
        return float(row @ head.arrays["weight"] + head.arrays["bias"][0])

    def _attend(
        self, examples: Sequence[Example], values: Float[np.ndarray, "scan"], classes: tuple[str, ...], seed: int
    ) -> Head:
        """Fit attention over blocks or patches to standardised values, and bring its answer into their unit."""
        features = [example.features for example in examples]
        kind = kind_of(features, self.attention.bag)
        middle, spread = float(values.mean()), float(values.std())
        fitted = attending.fit(
            [bag_of(one, kind).members for one in features],
            huber((values - middle) / (spread or 1.0)),
            1,
            config=self.attention,
            parts=attending.parts_of(
                [example.subject for example in examples], np.zeros(len(values)), self.attention, seed=seed
            ),
            seed=seed,
        )
        weight, bias = fitted.attention.weight * spread, fitted.attention.bias * spread + middle
        arrays = replace(fitted.attention, weight=weight, bias=bias).arrays()
        return Head(mode="attention", classes=classes, arrays=arrays, facts={"bag": kind, "steps": float(fitted.steps)})

    def findings(self, head: Head, features: Features, weights: Weights, sure: Assurance) -> tuple[Finding, ...]:
        """What is said of one scan: its number, with an interval where the run could have one."""
        quantity = sure.quantity(self.answer(head, features), self.unit)
        return (
            Finding(
                name=weights.name,
                kind="value",
                quantity=quantity,
                weights=weights,
            ),
        )

    def outcome(self, head: Head, example: Example) -> Measured:
        """Predict one scan and keep its truth beside.

        Raises:
            ValueError: the example has no value.
        """
        if example.value is None:
            raise ValueError("a regression needs a value to compare with")
        return Measured(truth=example.value, predicted=self.answer(head, example.features))

    def combine(self, outcomes: Sequence[Measured]) -> Measured:
        """Average the predictions over a subject's scans."""
        return Measured(truth=outcomes[0].truth, predicted=metrics.mean([outcome.predicted for outcome in outcomes]))

    def statistic(self, metric: str) -> Callable[[Sequence[Measured]], float]:
        """`mae` (mean absolute error, in the label's unit) or `r` (Pearson's correlation), over subjects."""
        if metric == "mae":
            return metrics.MeanOf(lambda outcome: abs(outcome.truth - outcome.predicted))
        return Correlation()


def huber(values: Float[np.ndarray, "scan"]) -> attending.Loss:
    """Huber's loss (1964) of the first logit against standardised numbers: beyond 1, an error counts plainly."""
    known = torch.from_numpy(values.astype(np.float32))
    return lambda logits, rows: F.smooth_l1_loss(logits[:, 0], known[torch.from_numpy(rows)])


def _by_subject(
    subjects: Sequence[str], rows: Float[np.ndarray, "scan dim"], values: Float[np.ndarray, "scan"]
) -> tuple[Float[np.ndarray, "subject dim"], Float[np.ndarray, "subject"]]:
    """Scans of one subject averaged: left out in turn are then subjects, and not scans whose like stays in."""
    _, places = np.unique(subjects, return_inverse=True)
    counts = np.bincount(places)
    means = np.zeros((len(counts), rows.shape[1]))
    np.add.at(means, places, rows)
    return means / counts[:, None], np.bincount(places, weights=values) / counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Correlation(metrics.Counted):
    """Pearson's correlation of what was predicted and what is true, over subjects."""

    def counted(
        self, outcomes: Sequence[Measured], counts: Float[np.ndarray, "draw subject"]
    ) -> Float[np.ndarray, "draw"]:
        """Compute it in each draw."""
        truth, predicted = (np.array([getattr(one, side) for one in outcomes]) for side in ("truth", "predicted"))
        return counted_pearson(counts, truth, predicted)


def pearson(one: Float[np.ndarray, "row"], other: Float[np.ndarray, "row"]) -> float:
    """Linear correlation; NaN where one side does not vary."""
    return float(counted_pearson(np.ones((1, len(one))), one, other)[0])


def counted_pearson(
    counts: Float[np.ndarray, "draw row"], one: Float[np.ndarray, "row"], other: Float[np.ndarray, "row"]
) -> Float[np.ndarray, "draw"]:
    """`pearson` of each draw in which a row stands `counts` times."""
    there, total = counts > 0, counts.sum(axis=1)
    gaps, vary = [], np.ones(len(counts), np.bool_)
    for side in (one, other):
        gap = there * (side - (counts @ side / total)[:, None])
        # Rounding alone makes a spread of equal numbers; how large it is goes with the numbers.
        vary &= np.abs(gap).max(axis=1) > 1e-9 * (there * np.abs(side)).max(axis=1)
        gaps.append(gap)
    a, b = gaps
    spread = np.sqrt((counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1))
    return np.where(vary, (counts * a * b).sum(axis=1) / np.where(vary, spread, 1.0), math.nan)


def ridge(
    rows: Float[np.ndarray, "scan dim"], values: Float[np.ndarray, "scan"], strengths: Sequence[float]
) -> tuple[Float[np.ndarray, "dim"], float]:
    """Weights of the ridge regression of centred values on centred rows, and the strength that was chosen.

    Leaving each row out in turn is computed at once from the singular values (Golub, Heath and Wahba 1979); the mean
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
