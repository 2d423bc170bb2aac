"""When an event comes: a linear head on a scan's frozen embedding, fitted to times of which some are censored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from torch import Tensor

from voxelstem import metrics
from voxelstem.assurance import Assurance
from voxelstem.errors import AuditError
from voxelstem.findings import Finding, Weights
from voxelstem.losses.survival import Ties, cox_loss, fates, hazard_loss
from voxelstem.protocols import Example, Features, Head
from voxelstem.study import Survival
from voxelstem.survival import (
    Curve,
    Watched,
    breslow,
    brier_weights,
    censoring,
    counted_concordance,
    interval_edges,
    kaplan_meier,
    spans,
    uno_weights,
)

STEEPEST = 50.0
"""Log risks are cut off here for curves: e^50 times a hazard is certainty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prognosis:
    """What is said of a scan."""

    risk: float
    """Higher is worse. `cox`: the log of the hazard ratio to the mean of the labelled subjects. `hazard`: the share of
    the time until the head's horizon that is expected to be lost."""
    curve: Curve
    """Chance that the event has not come yet. `cox`: at every time that a labelled subject had. `hazard`: at the end of
    every interval; within one the hazard is even."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Foretold:
    """What was said of a subject, what came, and what each part of it counts for."""

    truth: Survival
    risk: float
    chances: tuple[float, ...]
    """That the event has not come by each of the head's moments; `alive` says whether it had not."""
    alive: tuple[bool, ...]
    shares: tuple[float, ...]
    """What each moment counts for in the integrated Brier score (nothing once nobody knows), and what the pairs count
    for that the event begins, in Uno's C."""
    weight: float

    @property
    def brier(self) -> float:
        """The subject's own part of the integrated Brier score."""
        rows = zip(self.shares, self.alive, self.chances, strict=True)
        return math.fsum(share * (alive - chance) ** 2 for share, alive, chance in rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Survive:
    """Settings of the scan-level survival heads, and the heads themselves."""

    modes: ClassVar[tuple[str, ...]] = ("probe",)
    metrics: ClassVar[tuple[str, ...]] = ("harrell_c", "uno_c", "integrated_brier")
    voxels: ClassVar[bool] = False
    survival: ClassVar[bool] = True

    kind: Literal["cox", "hazard"] = "cox"
    """Proportional hazards over time as it comes (Cox 1972), or log odds of the hazard in intervals of time
    (Gensheimer & Narasimhan 2019)."""
    ties: Ties = "efron"
    """How `cox` counts events at one time."""
    days: float = 1.0
    """Days in one unit of time of the label file: 30.44 for months, 365.25 for years. Findings count in days."""
    intervals: int = 10
    """How many `hazard` has, each with about as many events; fewer if events have fewer times."""
    by_interval: bool = False
    """Let each interval of `hazard` have weights of its own: effects may change with time, for as many times the
    weights. Otherwise intervals differ by a constant."""
    strength: float = 100.0
    """Weight of the squared norm, on standardised columns, when there are too few events to choose it."""
    strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0, 10000.0)
    """Candidates when there are enough."""
    folds: int = 5
    """Folds of that choice, which is made from `fewest` labelled subjects with an event on."""
    fewest: int = 10
    moments: int = 50
    """Equal steps from 0 to the horizon in which curves are judged; `least` says where that lies."""
    least: float = 0.2
    """Curves and events are judged until this share of the labelled subjects would still be watched: nobody then counts
    for more than 1 / `least` subjects in the Brier score, or 1 / `least`^2 in Uno's C."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a count, a strength or a share without sense.
        """
        if min(self.intervals, self.moments) < 1 or min(self.folds, self.fewest) < 2:  # noqa: PLR2004
            counts = (self.intervals, self.moments, self.folds, self.fewest)
            raise ValueError(f"intervals and moments must be >= 1, folds and fewest >= 2, got {counts}")
        if self.fewest < self.folds:
            raise ValueError(f"every fold needs an event: fewest must be >= folds {self.folds}, got {self.fewest}")
        if not self.strengths or min(self.strength, *self.strengths) <= 0 or not 0 < self.least < 1:
            raise ValueError("strength and strengths must be positive, and least lie between 0 and 1")

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit `probe` to scans with a time; there are no classes. A subject's scans are averaged: one has one time.

        Raises:
            ValueError: an unknown mode, an example without a time, fewer than two subjects, or no event after time 0.
            AuditError: hardly anybody was watched beyond time 0.
        """
        if mode not in self.modes:
            raise ValueError(f"survive has no mode '{mode}'")
        rows, watched = _by_subject(examples)
        if len(watched) < 2 or not (watched.event & (watched.time > 0)).any():  # noqa: PLR2004 - compared to another
            raise ValueError("survival needs at least two subjects, and an event after time 0")
        middle, scale = rows.mean(axis=0), rows.std(axis=0)
        scale = np.where(scale > 1e-9 * np.maximum(np.abs(rows).max(axis=0), 1e-9), scale, 1.0)
        # A squared norm does not change when the axes are turned: as few columns as there are subjects are enough.
        left, sizes, right = np.linalg.svd((rows - middle) / scale, full_matrices=False)
        seen = _Seen.of(left * sizes, watched)
        model = (
            _Cox(ties=self.ties) if self.kind == "cox" else _Hazard.of(watched, self.intervals, own=self.by_interval)
        )
        strength = self._choose(model, seen, seed)
        found = _minimise(model, seen, strength)
        arrays = {"middle": middle, "scale": scale} | model.arrays(found, seen, right)
        facts: dict[str, float | str] = {"kind": self.kind, "strength": strength}
        return Head(mode=mode, classes=classes, arrays=arrays | self._measures(watched), facts=facts)

    def usual(self, examples: Sequence[Example], classes: tuple[str, ...]) -> Head:
        """A head that looks at no scan: everybody gets the labelled subjects' Kaplan-Meier curve, and equal risk.

        Raises:
            ValueError, AuditError: as `fit`.
        """
        _, watched = _by_subject(examples)
        curve = kaplan_meier(watched)
        nothing = {name: np.zeros(0) for name in ("middle", "scale", "weight")}
        arrays = nothing | {"time": curve.time, "baseline": curve.value} | self._measures(watched)
        return Head(mode="usual", classes=classes, arrays=arrays, facts={"kind": "cox"})

    def predict(self, head: Head, scan: Float[np.ndarray, "dim"]) -> Prognosis:
        """Risk and curve of one scan embedding."""
        arrays = head.arrays
        row = (scan.astype(np.float64) - arrays["middle"]) / arrays["scale"]
        if head.facts["kind"] == "cox":
            risk = float(row @ arrays["weight"])
            chances = arrays["baseline"] ** np.exp(np.clip(risk, -STEEPEST, STEEPEST))
            return Prognosis(risk=risk, curve=Curve(time=arrays["time"], value=chances))
        logits = arrays["weight"] @ row + arrays["bias"]
        curve = Curve(time=arrays["edges"][1:], value=np.exp(-np.cumsum(np.logaddexp(0, logits))))
        return Prognosis(risk=1 - float(_chances(head, curve) @ spans(arrays["moments"])), curve=curve)

    def findings(self, head: Head, features: Features, weights: Weights, sure: Assurance) -> tuple[Finding, ...]:
        """What is said of one scan: its curve."""
        curve = self.predict(head, features.scan).curve
        return (sure.outlook(weights, curve.time * self.days, curve.value, features.scan),)

    def outcome(self, head: Head, example: Example) -> Foretold:
        """Predict one scan and keep its truth beside.

        Raises:
            ValueError: the example has no time.
        """
        truth, said = _told(example), self.predict(head, example.features.scan)
        one, moments = Watched.of([truth]), head.arrays["moments"]
        uncensored = Curve(time=head.arrays["censoring_time"], value=head.arrays["censoring"])
        shares = brier_weights(one, moments, uncensored=uncensored)[0] * spans(moments)
        return Foretold(
            truth=truth,
            risk=said.risk,
            chances=tuple(_chances(head, said.curve).tolist()),
            alive=tuple((truth.time > moments).tolist()),
            shares=tuple(shares.tolist()),
            weight=float(uno_weights(one, uncensored=uncensored, tau=float(moments[-1]))[0]),
        )

    def combine(self, outcomes: Sequence[Foretold]) -> Foretold:
        """Average risks and curves over a subject's scans."""
        chances = np.mean([outcome.chances for outcome in outcomes], axis=0)
        risk = metrics.mean([outcome.risk for outcome in outcomes])
        return replace(outcomes[0], risk=risk, chances=tuple(chances.tolist()))

    def statistic(self, metric: str) -> Callable[[Sequence[Any]], float]:
        """`harrell_c`, `uno_c` (both 0.5 by chance) or `integrated_brier` (less is better), over subjects.

        The last two are freed from censoring by the labelled subjects' watches, and look as far as the head's horizon.
        """
        if metric == "integrated_brier":
            return metrics.MeanOf(lambda outcome: outcome.brier)
        return Concordance(uno=metric == "uno_c")

    def _choose(self, model: _Model, seen: _Seen, seed: int) -> float:
        """Take the strength by cross-validated likelihood if there are enough events; else the default.

        A fold's part is what the likelihood of all changes without the others': Verweij & van Houwelingen 1993.
        """
        if int(seen.event.sum()) < self.fewest:
            return self.strength
        order = np.random.default_rng([seed, 17]).permutation(len(seen.event))
        order = order[np.argsort(seen.event.numpy()[order], kind="stable")]
        loss = dict.fromkeys(self.strengths, 0.0)
        for fold in range(self.folds):
            kept = seen.part(torch.tensor(np.delete(order, np.s_[fold :: self.folds])))
            for strength in self.strengths:
                found = torch.tensor(_minimise(model, kept, strength))
                loss[strength] += float(model.misfit(seen, found) - model.misfit(kept, found))
        return min(self.strengths, key=lambda strength: loss[strength])

    def _measures(self, watched: Watched) -> dict[str, np.ndarray]:
        """What outcomes are judged by: how long the labelled subjects were watched, and moments until the horizon."""
        uncensored = censoring(watched)
        fair = uncensored.time[uncensored.value >= self.least]
        if not len(fair) or fair[-1] <= 0:
            raise AuditError(
                f"less than {self.least:g} of {len(watched)} labelled subjects are watched beyond time 0: curves "
                "cannot be judged",
                hint="label subjects that were watched for longer, or set head.least lower",
            )
        return {
            "censoring_time": uncensored.time,
            "censoring": uncensored.value,
            "moments": np.linspace(0.0, fair[-1], self.moments + 1),
        }


@dataclass(frozen=True, slots=True)
class Concordance:
    """Harrell's or Uno's C of subjects, which is computed for all draws at once."""

    uno: bool
    repeated: bool = False
    """Each subject holds a sequence of repeats: the figure is taken within every repeat, then averaged over them."""

    def __call__(self, sample: Sequence[Any]) -> float:
        """Compute the figure."""
        return float(self.resampled(sample, np.arange(len(sample))[None])[0]) if sample else math.nan

    def resampled(self, sample: Sequence[Any], picks: Int[np.ndarray, "draw pick"]) -> Float[np.ndarray, "draw"]:
        """Compute the figure of each row of picked subjects."""
        counts = np.stack([np.bincount(row, minlength=len(sample)) for row in picks]).astype(np.float64)
        repeats: Sequence[Sequence[Foretold]] = list(zip(*sample, strict=True)) if self.repeated else [sample]
        return metrics.defined_mean(np.stack([self._of(outcomes, counts) for outcomes in repeats], axis=1), 1)

    def _of(self, outcomes: Sequence[Foretold], counts: Float[np.ndarray, "draw subject"]) -> np.ndarray:
        watched = Watched.of(outcome.truth for outcome in outcomes)
        risk = np.array([outcome.risk for outcome in outcomes])
        weights = np.array([outcome.weight if self.uno else 1.0 for outcome in outcomes])
        return counted_concordance(counts, watched, risk, weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What a head is fitted to."""

    rows: Float[Tensor, "subject column"]
    time: Float[Tensor, " subject"]
    event: Bool[Tensor, " subject"]

    @classmethod
    def of(cls, rows: Float[np.ndarray, "subject column"], watched: Watched) -> _Seen:
        return cls(rows=torch.tensor(rows), time=torch.tensor(watched.time), event=torch.tensor(watched.event))

    def part(self, kept: Int[Tensor, " some"]) -> _Seen:
        return _Seen(rows=self.rows[kept], time=self.time[kept], event=self.event[kept])


class _Model(Protocol):
    """A likelihood of weights `at` that are given as one vector."""

    def bend(self, seen: _Seen) -> Float[Tensor, " weight"]:
        """About the second derivative of the misfit along each of the weights."""
        ...

    def misfit(self, seen: _Seen, at: Float[Tensor, " weight"]) -> Float[Tensor, ""]:
        """Negative log likelihood, summed over subjects."""
        ...

    def weights(self, at: Float[Tensor, " weight"]) -> Float[Tensor, " some"]:
        """Those that are kept small."""
        ...

    def arrays(
        self, at: Float[np.ndarray, "weight"], seen: _Seen, right: Float[np.ndarray, "column dim"]
    ) -> dict[str, np.ndarray]:
        """What a head keeps; `right` turns columns back into features."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cox:
    ties: Ties

    def bend(self, seen: _Seen) -> Float[Tensor, " weight"]:
        return seen.rows.square().mean(dim=0) * seen.event.sum()

    def misfit(self, seen: _Seen, at: Float[Tensor, " weight"]) -> Float[Tensor, ""]:
        return cox_loss(seen.rows @ at, seen.time, seen.event, ties=self.ties) * seen.event.sum()

    def weights(self, at: Float[Tensor, " weight"]) -> Float[Tensor, " some"]:
        return at

    def arrays(
        self, at: Float[np.ndarray, "weight"], seen: _Seen, right: Float[np.ndarray, "column dim"]
    ) -> dict[str, np.ndarray]:
        baseline = breslow(Watched(time=seen.time.numpy(), event=seen.event.numpy()), seen.rows.numpy() @ at)
        return {"weight": at @ right, "time": baseline.time, "baseline": baseline.value}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Hazard:
    """A constant for each interval, and one vector of weights for all or for each of them."""

    edges: Float[Tensor, " edge"]
    own: bool

    @classmethod
    def of(cls, watched: Watched, intervals: int, *, own: bool) -> _Hazard:
        return cls(edges=torch.tensor(interval_edges(watched, intervals)), own=own)

    def bend(self, seen: _Seen) -> Float[Tensor, " weight"]:
        intervals = len(self.edges) - 1
        each, squares = seen.event.sum() / intervals, seen.rows.square().mean(dim=0)
        weights = (squares * each).repeat(intervals) if self.own else squares * each * intervals
        return torch.cat([each.expand(intervals), weights])

    def misfit(self, seen: _Seen, at: Float[Tensor, " weight"]) -> Float[Tensor, ""]:
        intervals = len(self.edges) - 1
        logits = seen.rows @ self.weights(at).view(-1, seen.rows.shape[1]).T + at[:intervals]
        return hazard_loss(logits, fates(seen.time, seen.event, self.edges)) * len(seen.time)

    def weights(self, at: Float[Tensor, " weight"]) -> Float[Tensor, " some"]:
        return at[len(self.edges) - 1 :]

    def arrays(
        self, at: Float[np.ndarray, "weight"], seen: _Seen, right: Float[np.ndarray, "column dim"]
    ) -> dict[str, np.ndarray]:
        del seen
        bias, weight = np.split(at, [len(self.edges) - 1])
        weight = np.broadcast_to(weight.reshape(-1, len(right)) @ right, (len(bias), right.shape[1]))
        return {"weight": np.ascontiguousarray(weight), "bias": bias, "edges": self.edges.numpy()}


def _minimise(model: _Model, seen: _Seen, strength: float) -> Float[np.ndarray, "weight"]:
    """Weights of the least misfit plus `strength` / 2 times their squared norm, by L-BFGS in float64."""
    bend = model.bend(seen)
    model.weights(bend).add_(strength)  # in place: these are a part of them
    # Columns of an embedding differ by orders of magnitude: measured in their own bends, all weights learn alike.
    unit = bend.clamp(min=1e-9).rsqrt()

    def loss(at: Float[np.ndarray, "weight"]) -> tuple[float, Float[np.ndarray, "weight"]]:
        point = torch.tensor(at, requires_grad=True)
        value = model.misfit(seen, point * unit) + strength / 2 * model.weights(point * unit).square().sum()
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.numpy()

    steps = {"maxiter": 1000, "maxcor": 20, "ftol": 1e-14, "gtol": 1e-5}
    return minimize(loss, np.zeros(len(unit)), jac=True, method="L-BFGS-B", options=steps).x * unit.numpy()


def _chances(head: Head, curve: Curve) -> Float[np.ndarray, "moment"]:
    """A curve of the head at its moments."""
    moments = head.arrays["moments"]
    if head.facts["kind"] == "cox":
        return curve.at(moments)
    logs = np.log(np.maximum(curve.value, np.finfo(np.float64).tiny))
    return np.exp(np.interp(moments, np.append(0.0, curve.time), np.append(0.0, logs)))


def _told(example: Example) -> Survival:
    if example.survival is None:
        raise ValueError("survival needs a time to compare with")
    return example.survival


def _by_subject(examples: Sequence[Example]) -> tuple[Float[np.ndarray, "subject dim"], Watched]:
    """Mean row and fate of each subject."""
    kept: dict[str, list[np.ndarray]] = {}
    known: dict[str, Survival] = {}
    for example in examples:
        kept.setdefault(example.subject, []).append(example.features.scan.astype(np.float64))
        known[example.subject] = _told(example)
    return np.stack([np.mean(kept[s], axis=0) for s in known]), Watched.of(known.values())
