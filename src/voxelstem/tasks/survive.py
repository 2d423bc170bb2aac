"""When an event comes, from times of which some are censored: a linear head, neighbours, or attention to parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from voxelstem import metrics
from voxelstem.certainty.assurance import Assurance
from voxelstem.findings import Finding, Weights
from voxelstem.heads import attending
from voxelstem.heads.bags import bag_of, kind_of
from voxelstem.heads.neighbours import nearest, unit
from voxelstem.heads.risks import (
    Concordance,
    Cox,
    Foretold,
    Hazard,
    Likelihood,
    Seen,
    beran,
    constants,
    hazards_of,
    judged_by,
    minimised,
)
from voxelstem.heads.scales import Standard, laid, measured_columns, ruler, standard
from voxelstem.heads.survival import (
    Curve,
    Watched,
    breslow,
    brier_weights,
    interval_edges,
    kaplan_meier,
    spans,
    uno_weights,
)
from voxelstem.losses.survival import Ties, cox_loss
from voxelstem.protocols import Example, Features, Head
from voxelstem.study import Survival

STEEPEST = 50.0
"""Log risks are cut off here for curves: e^50 times a hazard is certainty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prognosis:
    """What is said of a scan."""

    risk: float
    """Higher is worse. `cox`: the log of the hazard ratio to the mean of the labelled subjects. `hazard`, and of
    neighbours: the share of the time until the head's horizon that is expected to be lost."""
    curve: Curve
    """Chance that the event has not come yet. `cox`: at every time that a labelled subject had. `hazard`: at the end of
    every interval; within one the hazard is even."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survive:
    """Settings of the scan-level survival heads, and the heads themselves."""

    modes: ClassVar[tuple[str, ...]] = ("probe", "knn", "attention")
    metrics: ClassVar[tuple[str, ...]] = ("harrell_c", "uno_c", "integrated_brier")
    voxels: ClassVar[bool] = False
    survival: ClassVar[bool] = True
    tunable: ClassVar[bool] = True

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
    neighbours: int = 10
    """Of how many labelled subjects `knn` draws the curve (fewer if there are fewer)."""
    temperature: float = 0.07
    """There a neighbour of cosine c counts for exp(c / temperature), as in `classify` (Wu et al. 2018, section 3.4)."""
    attention: attending.AttendConfig = field(default_factory=attending.AttendConfig)
    """What is looked at in `attention`, and how that is fitted. `cox` compares the subjects of one batch."""
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
        if self.neighbours < 1 or self.temperature <= 0:
            raise ValueError(
                f"neighbours and temperature must be positive, got {self.neighbours} and {self.temperature}"
            )

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit a mode to scans with a time; there are no classes. A subject's scans are joined: one has one time.

        `probe` and `knn` average their embeddings, `attention` looks at the parts of all of them at once.

        Raises:
            ValueError: an unknown mode, an example without a time, fewer than two subjects, no event after time 0, or
                nothing to attend to.
            AuditError: hardly anybody was watched beyond time 0.
        """
        if mode not in self.modes:
            raise ValueError(f"survive has no mode '{mode}'")
        rows, watched = _by_subject(examples)
        if len(watched) < 2 or not (watched.event & (watched.time > 0)).any():  # noqa: PLR2004 - compared to another
            raise ValueError("survival needs at least two subjects, and an event after time 0")
        facts: dict[str, float | str] = {"kind": self.kind}
        measured = measured_columns([example.features for example in examples])
        if mode == "knn":
            how, facts["kind"] = ruler(rows, measured), "knn"
            arrays = how | {"rows": unit(laid(how, rows)), "time": watched.time, "event": watched.event}
        elif mode == "attention":
            arrays = self._attend(examples, watched, seed, facts)
        else:
            arrays = self._line(standard(rows, measured, prior=0.0), rows, watched, seed, facts)
        return Head(
            mode=mode,
            classes=classes,
            arrays=arrays | judged_by(watched, least=self.least, moments=self.moments),
            facts=facts,
        )

    def _line(
        self,
        how: Standard,
        rows: Float[np.ndarray, "subject dim"],
        watched: Watched,
        seed: int,
        facts: dict[str, float | str],
    ) -> dict[str, np.ndarray]:
        """A linear risk of standardised columns, under the penalty that serves best."""
        # A squared norm does not change when the axes are turned: as few columns as there are subjects are enough.
        left, sizes, right = np.linalg.svd((rows - how.middle) / how.scale, full_matrices=False)
        seen = Seen.of(left * sizes, watched)
        model = Cox(ties=self.ties) if self.kind == "cox" else Hazard.of(watched, self.intervals, own=self.by_interval)
        facts["strength"] = strength = self._choose(model, seen, seed)
        found = minimised(model, seen, strength)
        return {"middle": how.middle, "scale": how.scale} | model.arrays(found, seen, right)

    def _attend(
        self, examples: Sequence[Example], watched: Watched, seed: int, facts: dict[str, float | str]
    ) -> dict[str, np.ndarray]:
        """Attention over the parts of each subject's scans; above its risks stand the curves that they mean."""
        features = [example.features for example in examples]
        kind = kind_of(features, self.attention.bag)
        joined: dict[str, list[np.ndarray]] = {}
        for example in examples:
            joined.setdefault(example.subject, []).append(bag_of(example.features, kind).members)
        bags = [np.concatenate(parts) for parts in joined.values()]
        own = self.kind == "hazard" and self.by_interval
        fitted = attending.fit(
            bags,
            self._loss(watched),
            len(interval_edges(watched, self.intervals)) - 1 if own else 1,
            config=self.attention,
            parts=attending.parts_of(list(joined), watched.event, self.attention, seed=seed),
            seed=seed,
        )
        facts |= {"bag": kind, "steps": float(fitted.steps)}
        said = np.stack([fitted.attention.score(bag) for bag in bags])
        if self.kind == "cox":
            middle = said.mean(axis=0)
            attention = replace(fitted.attention, bias=fitted.attention.bias - middle)
            baseline = breslow(watched, (said - middle)[:, 0])
            return attention.arrays() | {"time": baseline.time, "baseline": baseline.value}
        edges = interval_edges(watched, self.intervals)
        above = constants(watched, np.zeros(len(watched)) if own else said[:, 0], edges)
        return fitted.attention.arrays() | {"edges": edges, "constants": above}

    def _loss(self, watched: Watched) -> attending.Loss:
        """What attention makes small: of some of these subjects."""
        known = torch.tensor(np.stack([watched.time, watched.event], axis=1))
        if self.kind == "hazard":
            hazards = hazards_of(watched, self.intervals)
            return lambda logits, rows: hazards(logits, known[torch.from_numpy(rows)]).float()

        def compared(logits: Float[Tensor, "row out"], rows: Int[np.ndarray, "row"]) -> Float[Tensor, ""]:
            time, event = known[torch.from_numpy(rows)].T
            return cox_loss(logits[:, 0], time, event > 0, ties=self.ties)

        return compared

    def above(self, risk: Float[np.ndarray, "subject"], watched: Watched, *, mode: str) -> Head:
        """A head above risks that a trained network gives as a scan's only feature: the curves that they mean.

        Raises:
            AuditError: hardly anybody was watched beyond time 0.
        """
        middle = np.array([risk.mean()])
        arrays = {"middle": middle, "scale": np.ones(1)}
        if self.kind == "cox":
            baseline = breslow(watched, risk - middle)
            arrays |= {"weight": np.ones(1), "time": baseline.time, "baseline": baseline.value}
        else:
            edges = interval_edges(watched, self.intervals)
            bias = constants(watched, risk - middle, edges)
            arrays |= {"weight": np.ones((len(bias), 1)), "bias": bias, "edges": edges}
        return Head(
            mode=mode,
            classes=(),
            arrays=arrays | judged_by(watched, least=self.least, moments=self.moments),
            facts={"kind": self.kind},
        )

    def looks_at_tokens(self, mode: str) -> bool:
        """Whether scans must come with patch tokens in this mode."""
        return mode == "attention" and self.attention.bag != "blocks"

    def usual(self, examples: Sequence[Example], classes: tuple[str, ...]) -> Head:
        """A head that looks at no scan: everybody gets the labelled subjects' Kaplan-Meier curve, and equal risk.

        Raises:
            ValueError, AuditError: as `fit`.
        """
        _, watched = _by_subject(examples)
        curve = kaplan_meier(watched)
        nothing = {name: np.zeros(0) for name in ("middle", "scale", "weight")}
        arrays = (
            nothing
            | {"time": curve.time, "baseline": curve.value}
            | judged_by(watched, least=self.least, moments=self.moments)
        )
        return Head(mode="usual", classes=classes, arrays=arrays, facts={"kind": "cox"})

    def answer(self, head: Head, features: Features) -> Prognosis:
        """Risk and curve of one scan, in every mode.

        Raises:
            ValueError: the head looks at what the scan does not have.
        """
        if head.mode == "attention":
            said = attending.score(head, features).logits
            return self._of_cox(head, float(said[0])) if head.facts["kind"] == "cox" else self._of_hazards(head, said)
        return self.predict(head, features.scan)

    def predict(self, head: Head, scan: Float[np.ndarray, "dim"]) -> Prognosis:
        """Risk and curve of one scan embedding.

        Raises:
            ValueError: the head looks at more than that, see `answer`.
        """
        if head.mode == "attention":
            raise ValueError("a head in mode attention looks at blocks or patches, not at the scan's one vector")
        arrays = head.arrays
        if head.facts["kind"] == "knn":
            near = nearest(arrays["rows"], laid(arrays, scan), self.neighbours)
            counts = np.zeros(len(arrays["time"]))
            counts[near.places] = near.shares(self.temperature)
            return _expected(head, beran(Watched(time=arrays["time"], event=arrays["event"]), counts))
        row = (scan.astype(np.float64) - arrays["middle"]) / arrays["scale"]
        if head.facts["kind"] == "cox":
            return self._of_cox(head, float(row @ arrays["weight"]))
        return self._of_hazards(head, arrays["weight"] @ row + arrays["bias"])

    def _of_cox(self, head: Head, risk: float) -> Prognosis:
        chances = head.arrays["baseline"] ** np.exp(np.clip(risk, -STEEPEST, STEEPEST))
        return Prognosis(risk=risk, curve=Curve(time=head.arrays["time"], value=chances))

    def _of_hazards(self, head: Head, said: Float[np.ndarray, "out"]) -> Prognosis:
        logits = said + head.arrays.get("constants", 0.0)
        chances = np.exp(-np.cumsum(np.logaddexp(0, logits)))
        return _expected(head, Curve(time=head.arrays["edges"][1:], value=chances))

    def findings(self, head: Head, features: Features, weights: Weights, sure: Assurance) -> tuple[Finding, ...]:
        """What is said of one scan: its curve."""
        curve = self.answer(head, features).curve
        return (sure.outlook(weights, curve.time * self.days, curve.value),)

    def outcome(self, head: Head, example: Example) -> Foretold:
        """Predict one scan and keep its truth beside.

        Raises:
            ValueError: the example has no time.
        """
        truth, said = _told(example), self.answer(head, example.features)
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

    def _choose(self, model: Likelihood, seen: Seen, seed: int) -> float:
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
                found = torch.tensor(minimised(model, kept, strength))
                loss[strength] += float(model.misfit(seen, found) - model.misfit(kept, found))
        return min(self.strengths, key=lambda strength: loss[strength])


def _expected(head: Head, curve: Curve) -> Prognosis:
    """A curve, and as its risk the share of the time until the horizon that it expects to be lost."""
    return Prognosis(risk=1 - float(_chances(head, curve) @ spans(head.arrays["moments"])), curve=curve)


def _chances(head: Head, curve: Curve) -> Float[np.ndarray, "moment"]:
    """A curve of the head at its moments."""
    moments = head.arrays["moments"]
    if head.facts["kind"] != "hazard":
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
