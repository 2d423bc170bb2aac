"""Labels of whole scans: neighbours or a logistic regression on the frozen embedding, or attention to its parts.

One of several classes is true of a scan (`subject,label`), or each of many is there or not (a column for each).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import log_softmax, softmax
from torch import Tensor
from torch.nn import functional as F

from voxelstem import metrics
from voxelstem.answers import Answer, Figure
from voxelstem.certainty.assurance import Assurance
from voxelstem.findings import Finding, Weights
from voxelstem.heads import attending, manylabels
from voxelstem.heads.bags import bag_of, kind_of
from voxelstem.heads.neighbours import SOFTENED, nearest, softened, unit
from voxelstem.heads.scales import laid, measured_columns, ruler, standard
from voxelstem.protocols import Example, Features, Head

RULED_OUT = -1e4
"""Logit of a class that no label shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """The truth about a subject and what was predicted for it. Both count in the head's order of classes."""

    truth: int
    scores: tuple[float, ...]
    """Probability of each class."""


@dataclass(frozen=True, slots=True)
class Measure(metrics.Counted):
    """A figure over subjects, of guesses or of answers about many classes."""

    metric: str

    def counted(self, outcomes: Sequence[Any], counts: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, "draw"]:
        """Compute the figure in each draw."""
        if isinstance(outcomes[0], Answer):
            kind, _, only = self.metric.partition(":")
            return Figure(kind=kind, only=only).counted(outcomes, counts)
        truth = np.array([guess.truth for guess in outcomes])
        scores = np.array([guess.scores for guess in outcomes])
        if self.metric == "auroc":
            return metrics.counted_macro_auroc(counts, truth, scores)
        return metrics.counted_balance(counts, truth, scores.argmax(axis=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Classify:
    """Settings of the scan-level heads, and the heads themselves."""

    modes: ClassVar[tuple[str, ...]] = ("probe", "knn", "attention")
    metrics: ClassVar[tuple[str, ...]] = ("auroc", "balanced_accuracy")
    voxels: ClassVar[bool] = False
    tunable: ClassVar[bool] = True

    classes: tuple[str, ...] = ()
    """Of a label file with a column for each class: the columns that count; all but `subject` and `fold` if empty."""
    neighbours: int = 5
    """How many labelled scans vote in `knn` (fewer if there are fewer)."""
    temperature: float = 0.07
    """A neighbour of cosine c has exp(c / temperature) votes (Wu et al. 2018, section 3.4)."""
    strength: float = 0.1
    """scikit-learn's C of the probe when there are too few labels to choose it."""
    strengths: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    """Candidates for C when there are enough."""
    prior: float = 10.0
    """The spread of a network's column is estimated as if this many more scans had shown the average spread of them."""
    folds: int = 5
    """Folds of the choice of C; it is made only if every class has this many labelled subjects."""
    attention: attending.AttendConfig = field(default_factory=attending.AttendConfig)
    """What is looked at in `attention`, and how that is fitted."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a count, a temperature or a strength without sense.
        """
        if self.neighbours < 1 or self.folds < 2:  # noqa: PLR2004
            raise ValueError(f"neighbours must be >= 1 and folds >= 2, got {self.neighbours} and {self.folds}")
        if min(self.temperature, self.strength, *self.strengths) <= 0 or self.prior < 0:
            raise ValueError("temperature, strength and strengths must be positive, and prior not negative")

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit `knn`, `probe` or `attention` to labelled scans: one head, or one for each class that is there or not.

        Raises:
            ValueError: fewer than two classes among the examples (or a class of which all say the same), an unknown
                mode, or nothing to attend to.
        """
        if mode not in self.modes:
            raise ValueError(f"classify has no mode '{mode}'")
        if manylabels.asks_each(examples):
            return self._fit_each(examples, classes, mode, seed)
        rows = np.stack([example.features.scan for example in examples]).astype(np.float64)
        truth = np.array([classes.index(example.label or "") for example in examples])
        if len(np.unique(truth)) < 2:  # noqa: PLR2004
            raise ValueError("the labelled scans are all of one class")
        if mode == "attention":
            return self._attend(examples, truth, classes, seed)
        measured = measured_columns([example.features for example in examples])
        if mode == "knn":
            how = ruler(rows, measured)
            return Head(
                mode=mode,
                classes=classes,
                arrays=how | {"rows": unit(laid(how, rows)), "truth": truth},
                facts={SOFTENED: 1.0},
            )
        seen = standard(rows, measured, prior=self.prior)
        rows = (rows - seen.middle) / seen.scale
        subjects = np.array([example.subject for example in examples])
        strength = self._choose(rows, truth, subjects, seed)
        weight, bias = _regress(rows, truth, len(classes), strength)
        arrays = {"middle": seen.middle, "scale": seen.scale, "weight": weight, "bias": bias}
        return Head(mode=mode, classes=classes, arrays=arrays, facts={"strength": strength})

    def looks_at_tokens(self, mode: str) -> bool:
        """Whether scans must come with patch tokens in this mode."""
        return mode == "attention" and self.attention.bag != "blocks"

    def answer(self, head: Head, features: Features) -> Float[np.ndarray, "classes"]:
        """Probability of each class of the head for one scan, in every mode.

        Raises:
            ValueError: the head looks at what the scan does not have.
        """
        if manylabels.answers_each(head):
            return manylabels.chances(head, features, neighbours=self.neighbours, temperature=self.temperature)
        if head.mode == "attention":
            return softmax(attending.score(head, features).logits)
        return self.predict(head, features.scan)

    def predict(self, head: Head, scan: Float[np.ndarray, "dim"]) -> Float[np.ndarray, "classes"]:
        """Probability of each class of the head for one scan embedding.

        Raises:
            ValueError: the head looks at more than that, see `answer`.
        """
        if head.mode == "attention":
            raise ValueError("a head in mode attention looks at blocks or patches, not at the scan's one vector")
        row = scan.astype(np.float64)
        if head.mode == "knn":
            near = nearest(head.arrays["rows"], laid(head.arrays, row), self.neighbours)
            votes = np.zeros(len(head.classes))
            np.add.at(votes, head.arrays["truth"][near.places], near.shares(self.temperature))
            votes /= votes.sum()  # shares that add up to 1 may add up to a rounding more
            return softened(votes, len(near.places)) if SOFTENED in head.facts else votes
        logits = head.arrays["weight"] @ ((row - head.arrays["middle"]) / head.arrays["scale"]) + head.arrays["bias"]
        return softmax(logits)

    def findings(self, head: Head, features: Features, weights: Weights, sure: Assurance) -> tuple[Finding, ...]:
        """What is said of one scan: its class, calibrated where the run could be; or yes or no to each class."""
        if manylabels.answers_each(head):
            asked = zip(head.classes, self.answer(head, features).tolist(), manylabels.thresholds(head), strict=True)
            said = [(name, *sure.answered(name, chance, threshold=limit)) for name, chance, limit in asked]
            return tuple(
                Finding(
                    name=name,
                    kind="class",
                    answer=manylabels.NO_YES[there],
                    weights=weights,
                    certainty=certainty,
                )
                for name, there, certainty in said
            )
        answer, certainty = sure.certainty(head.classes, self.answer(head, features))
        return (
            Finding(
                name=weights.name,
                kind="class",
                answer=answer,
                weights=weights,
                certainty=certainty,
            ),
        )

    def outcome(self, head: Head, example: Example) -> Guess | Answer:
        """Predict one scan and keep its truth beside.

        Raises:
            ValueError: the truth is a class that the head was never shown.
        """
        scores = self.answer(head, example.features)
        if manylabels.answers_each(head):
            return manylabels.answer_of(head, example, scores)
        return Guess(truth=head.classes.index(example.label or ""), scores=tuple(scores.tolist()))

    def combine(self, outcomes: Sequence[Any]) -> Any:
        """Average the probabilities over a subject's scans."""
        scores = np.mean([outcome.scores for outcome in outcomes], axis=0)
        return replace(outcomes[0], scores=tuple(scores.tolist()))

    def statistic(self, metric: str) -> Measure:
        """`auroc` (macro over classes, one against the rest) or `balanced_accuracy`, over subjects.

        Of classes of which each is there or not, the mean of their figures, or by `auroc:NAME` one of them; NaN where
        all subjects that are known say the same.
        """
        return Measure(metric)

    def _fit_each(self, examples: Sequence[Example], classes: tuple[str, ...], mode: str, seed: int) -> Head:
        """Fit classes of which each is there or not."""
        if mode == "knn":
            return manylabels.fit_votes(examples, classes, mode=mode)
        if mode == "attention":
            return manylabels.fit_attention(examples, classes, mode=mode, config=self.attention, seed=seed)
        return manylabels.fit_linear(
            examples, classes, mode=mode, fit=lambda some, kinds: self.fit(some, kinds, mode=mode, seed=seed)
        )

    def _attend(
        self, examples: Sequence[Example], truth: Int[np.ndarray, "scan"], classes: tuple[str, ...], seed: int
    ) -> Head:
        """Fit attention over blocks or patches. A class without examples gets a bias that rules it out."""
        features = [example.features for example in examples]
        kind = kind_of(features, self.attention.bag)
        fitted = attending.fit(
            [bag_of(one, kind).members for one in features],
            balanced_entropy(truth),
            len(classes),
            config=self.attention,
            parts=attending.parts_of([example.subject for example in examples], truth, self.attention, seed=seed),
            seed=seed,
        )
        shown = np.isin(np.arange(len(classes)), truth)
        bias = np.where(shown, fitted.attention.bias, np.float32(RULED_OUT))
        arrays = replace(fitted.attention, bias=bias).arrays()
        return Head(mode="attention", classes=classes, arrays=arrays, facts={"bag": kind, "steps": float(fitted.steps)})

    def _choose(
        self,
        rows: Float[np.ndarray, "scan dim"],
        truth: Int[np.ndarray, "scan"],
        subjects: np.ndarray,
        seed: int,
    ) -> float:
        """Take C by cross-validated log loss within the labelled subjects, if they are enough; else the default."""
        from sklearn.model_selection import StratifiedGroupKFold

        kinds = np.unique(truth)
        if min(len(np.unique(subjects[truth == kind])) for kind in kinds) < self.folds:
            return self.strength
        loss = dict.fromkeys(self.strengths, 0.0)
        folds = StratifiedGroupKFold(self.folds, shuffle=True, random_state=seed)
        for kept, held in folds.split(rows, truth, subjects):
            if len(np.unique(truth[kept])) < len(kinds):
                continue
            for strength in self.strengths:
                weight, bias = _regress(rows[kept], truth[kept], int(truth.max()) + 1, strength)
                chances = log_softmax(rows[held] @ weight.T + bias, axis=1)
                loss[strength] -= float(chances[np.arange(len(held)), truth[held]].sum())
        return min(self.strengths, key=lambda strength: loss[strength])


def balanced_entropy(truth: Int[np.ndarray, "scan"]) -> attending.Loss:
    """Cross entropy in which every class that is there weighs alike, however many scans show it."""
    known = torch.from_numpy(truth.astype(np.int64))
    counts = torch.bincount(known)

    def loss(logits: Float[Tensor, "row classes"], rows: Int[np.ndarray, "row"]) -> Float[Tensor, ""]:
        weight = torch.zeros(logits.shape[1])
        weight[: len(counts)] = torch.where(counts > 0, len(known) / counts, 0.0)
        return F.cross_entropy(logits, known[torch.from_numpy(rows)], weight=weight)

    return loss


def majority(truth: Sequence[str], classes: tuple[str, ...]) -> tuple[float, ...]:
    """Share of each class among the labelled scans: what one can say about a scan without seeing it."""
    return tuple(truth.count(label) / len(truth) for label in classes)


def _regress(
    rows: Float[np.ndarray, "row dim"], truth: Int[np.ndarray, "row"], classes: int, strength: float
) -> tuple[Float[np.ndarray, "classes dim"], Float[np.ndarray, "classes"]]:
    """Balanced logistic regression. A class without examples gets a bias that rules it out."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a weak penalty may use up its iterations: still a fit
        fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=500).fit(rows, truth)
    weight, bias = np.zeros((classes, rows.shape[1])), np.full(classes, RULED_OUT)
    if len(fitted.classes_) == 2:  # noqa: PLR2004 - scikit-learn keeps one row for two classes
        weight[fitted.classes_[1]], bias[fitted.classes_] = fitted.coef_[0], [0.0, fitted.intercept_[0]]
    else:
        weight[fitted.classes_], bias[fitted.classes_] = fitted.coef_, fitted.intercept_
    return weight, bias
