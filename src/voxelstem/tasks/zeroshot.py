"""Answers without a trained head: a scan's vector beside the vectors of sentences that say what might be there.

Each class is an ensemble of prompts: the mean of their unit vectors, brought back to length one (Radford et al. 2021,
CLIP, section 3.1.4). The weights must be aligned with reports. Labels, if any, only set probabilities and thresholds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax

from voxelstem import metrics
from voxelstem.errors import ConfigError
from voxelstem.prompts import Ensemble, Prompts, read_prompts
from voxelstem.protocols import Example, Head

USUAL_TEMPERATURE = math.log(10.0)
"""Where weights came without their own: what SigLIP starts from (Zhai et al. 2023, section 3.2)."""
HALF = 0.5


class TextSpace(Protocol):
    """Where texts and scans are compared; `aligned.Aligned` is one."""

    @property
    def temperature(self) -> float | None:
        """Logarithm of what cosines are multiplied by, if it is known."""
        ...

    @property
    def bias(self) -> float | None:
        """What is added then, if it is known."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "text out"]:
        """Unit vectors of texts."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is true of a subject and what was answered, class by class."""

    classes: tuple[str, ...]
    truth: tuple[float, ...]
    """1 where it is there, 0 where not, NaN where nobody said."""
    scores: tuple[float, ...]
    """Probabilities."""
    thresholds: tuple[float, ...]
    """From these on the answer is yes."""

    def __contains__(self, name: object) -> bool:
        """Whether the truth is known for this class."""
        return name in self.classes and not math.isnan(self.truth[self.classes.index(str(name))])


@dataclass(frozen=True, kw_only=True, slots=True)
class Zeroshot:
    """Settings of answers by prompts, and the answers themselves."""

    modes: ClassVar[tuple[str, ...]] = ("prompts", "calibrated")
    metrics: ClassVar[tuple[str, ...]] = ("auroc", "balanced_accuracy", "f1", "ece")
    voxels: ClassVar[bool] = False
    aligned: ClassVar[bool] = True
    """Takes scan vectors of the space of texts, and texts."""

    prompts: str = "ct_rate"
    """A prompt set of the package, or the path of a .toml file."""
    classes: tuple[str, ...] = ()
    """Which of its classes are asked for; without a wish those that the labels name, or all."""
    answers: Literal["each", "one"] = "each"
    """`each` class is there or not, whatever the others are, or exactly `one` of them is true."""
    against: Literal["negative", "bias"] = "negative"
    """What a positive ensemble of `each` class must outdo: the negative ensemble, or the loss's bias."""
    present: tuple[str, ...] = ()
    """Labels which say that a class is there, any other that it is not; yes or no, 1 or 0 if empty."""
    tokenizer: str | None = None
    """Folder of the tokenizer, for weights that came without one."""
    bins: int = 10
    """Of the calibration error."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: fewer than two bins.
        """
        if self.bins < 2:  # noqa: PLR2004 - one bin compares averages only
            raise ValueError(f"bins must be at least 2, got {self.bins}")

    def ask(self, names: Sequence[str] = ()) -> tuple[Prompts, dict[str, Ensemble]]:
        """The prompt set, and the ensembles of `names`, else of the wished classes, else of all.

        Raises:
            ConfigError: no such set, a class that it has not, a class without the negative prompts that are needed,
                or fewer than two classes of which one is to be true.
        """
        prompts = read_prompts(self.prompts)
        chosen = prompts.only(names or self.classes or prompts.classes)
        if self.answers == "one" and len(chosen) < 2:  # noqa: PLR2004
            raise ConfigError("one of one class is always true", hint="name two classes or more, or answers=each")
        if self.answers == "each" and self.against == "negative":
            for name, said in chosen.items():
                if not said.negative:
                    raise ConfigError(
                        f"[{name}] of {prompts.name} has no negative prompts", hint="add some, or set head.against=bias"
                    )
        return prompts, chosen

    def fit(
        self,
        examples: Sequence[Example],
        classes: tuple[str, ...],
        *,
        mode: str,
        seed: int,  # noqa: ARG002 - nothing is left to chance
        space: TextSpace | None = None,
    ) -> Head:
        """Embed the prompts of `classes`, and with `calibrated` set probabilities and thresholds by the examples.

        Raises:
            ValueError: there is no `space`, or an unknown mode.
            ConfigError: as `ask`, or `bias` is asked of weights that have none.
        """
        if space is None:
            raise ValueError("zeroshot needs a space in which texts and scans are compared")
        if mode not in self.modes:
            raise ValueError(f"zeroshot has no mode '{mode}'")
        head = dataclasses.replace(self._speak(classes, space), mode=mode)
        return self.calibrate(head, examples) if mode == "calibrated" else head

    def calibrate(self, head: Head, examples: Sequence[Example]) -> Head:
        """The same prompts with a scale, a shift and a threshold for each class by labelled examples.

        `each`: Platt scaling, then the threshold of the best balanced accuracy. `one`: a temperature for all. A scale
        is never negative: calibration leaves the order of scans as it is, or, where it is the wrong way round, gives
        all one probability. A class of which only one kind is among the examples stays as it was;
        `facts["uncalibrated"]` counts these.
        """
        plain = dataclasses.replace(head, arrays=head.arrays | _neutral(len(head.classes)))
        rows = _by_subject([(example.subject, self._logits(plain, example.features.scan)) for example in examples])
        truth = _by_subject([(example.subject, np.array(truth_of(head.classes, example))) for example in examples])
        scale, shift, threshold = (plain.arrays[name].copy() for name in ("scale", "shift", "threshold"))
        left = 0
        if self.answers == "one":
            scale[:] = temper(rows, truth.argmax(axis=1))
        for at in range(len(head.classes)) if self.answers == "each" else ():
            known = ~np.isnan(truth[:, at])
            there = truth[known, at] > HALF
            if there.all() or not there.any():
                left += 1
                continue
            scale[at], shift[at] = platt(rows[known, at], there)
            threshold[at] = best_threshold(expit(scale[at] * rows[known, at] + shift[at]), there)
        arrays = {"scale": scale, "shift": shift, "threshold": threshold}
        return dataclasses.replace(head, arrays=head.arrays | arrays, facts=head.facts | {"uncalibrated": float(left)})

    def predict(self, head: Head, scan: Float[np.ndarray, "out"]) -> Float[np.ndarray, "classes"]:
        """Probability of each class for a scan's unit vector."""
        logits = self._logits(head, scan)
        return softmax(logits) if self.answers == "one" else expit(logits)

    def outcome(self, head: Head, example: Example) -> Answer:
        """Answer for one scan and keep the truth beside."""
        return Answer(
            classes=head.classes,
            truth=truth_of(head.classes, example),
            scores=tuple(self.predict(head, example.features.scan).tolist()),
            thresholds=tuple(head.arrays["threshold"].tolist()),
        )

    def combine(self, outcomes: Sequence[Answer]) -> Answer:
        """Average the probabilities over a subject's scans."""
        scores = np.mean([outcome.scores for outcome in outcomes], axis=0)
        return dataclasses.replace(outcomes[0], scores=tuple(scores.tolist()))

    def statistic(self, metric: str) -> Figure:
        """`auroc`, `balanced_accuracy`, `f1` or `ece` (smaller is better) over subjects.

        Each class counts alike where it is defined; `auroc:lung_nodule` is the figure of one class. Where one of the
        classes is true, balanced accuracy and the calibration error are those of the most probable class.
        """
        kind, _, only = metric.partition(":")
        return Figure(kind=kind, only=only, one=self.answers == "one", bins=self.bins)

    def _speak(self, classes: Sequence[str], space: TextSpace) -> Head:
        """A head of prompt vectors, as it is without labels."""
        prompts, asked = self.ask(classes)
        bias, temperature = space.bias, space.temperature
        if self.against == "bias" and self.answers == "each" and (bias is None or temperature is None):
            raise ConfigError("these weights came without the loss's bias", hint="set head.against=negative")
        paired = self.answers == "each" and self.against == "negative"
        said = [text for one in asked.values() for text in (*one.positive, *(one.negative if paired else ()))]
        vectors = dict(zip(said, space.embed_texts(said), strict=True))
        arrays = {"positive": np.stack([ensemble([vectors[t] for t in one.positive]) for one in asked.values()])}
        if paired:
            arrays["negative"] = np.stack([ensemble([vectors[t] for t in one.negative]) for one in asked.values()])
        facts: dict[str, float | str] = {
            "temperature": USUAL_TEMPERATURE if temperature is None else temperature,
            "bias": 0.0 if bias is None or paired or self.answers == "one" else bias,
            "prompts": prompts.name,
            "prompts_version": float(prompts.version),
            "prompts_sha256": prompts.sha256,
            "prompts_said": float(len(said)),
        }
        return Head(mode="prompts", classes=tuple(asked), arrays=arrays | _neutral(len(asked)), facts=facts)

    def _logits(self, head: Head, scan: Float[np.ndarray, "out"]) -> Float[np.ndarray, "classes"]:
        """What is brought to probabilities: a softmax over two texts is the logistic function of their difference."""
        unit = scan.astype(np.float64)
        cosines = head.arrays["positive"] @ unit
        if "negative" in head.arrays:
            cosines = cosines - head.arrays["negative"] @ unit
        plain = math.exp(float(head.facts["temperature"])) * cosines + float(head.facts["bias"])
        return head.arrays["scale"] * plain + head.arrays["shift"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure over subjects, computed for all draws of a bootstrap at once."""

    kind: str
    only: str = ""
    """The one class that counts; all if empty."""
    one: bool = False
    """One of the classes is true."""
    bins: int = 10
    repeated: bool = False
    """Each subject holds a sequence of repeats: the figure is taken within every repeat, then averaged over them."""

    def __call__(self, sample: Sequence[Any]) -> float:
        """Compute the figure."""
        return float(self.resampled(sample, np.arange(len(sample))[None])[0]) if sample else math.nan

    def resampled(self, sample: Sequence[Any], picks: Int[np.ndarray, "draw pick"]) -> Float[np.ndarray, "draw"]:
        """Compute the figure of each row of picked subjects."""
        counts = np.stack([np.bincount(row, minlength=len(sample)) for row in picks]).astype(np.float64)
        repeats: Sequence[Sequence[Answer]] = list(zip(*sample, strict=True)) if self.repeated else [sample]
        return metrics.defined_mean(np.stack([self._of(answers, counts) for answers in repeats], axis=1), 1)

    def _of(self, answers: Sequence[Answer], counts: Float[np.ndarray, "draw subject"]) -> Float[np.ndarray, "draw"]:
        truth = np.array([answer.truth for answer in answers])
        scores = np.array([answer.scores for answer in answers])
        best, true = scores.argmax(axis=1), truth.argmax(axis=1)
        if self.one and not self.only and self.kind == "balanced_accuracy":
            return metrics.counted_balance(counts, true, best)
        if self.one and not self.only and self.kind == "ece":
            return metrics.counted_calibration_error(counts, true == best, scores.max(axis=1), bins=self.bins)
        said = np.eye(scores.shape[1])[best] > 0 if self.one else scores >= np.array(answers[0].thresholds)
        places = [answers[0].classes.index(self.only)] if self.only else range(scores.shape[1])
        each = [self._of_class(truth[:, at], scores[:, at], said[:, at], counts) for at in places]
        return metrics.defined_mean(np.stack(each, axis=1), 1)

    def _of_class(
        self, truth: np.ndarray, scores: np.ndarray, said: np.ndarray, counts: np.ndarray
    ) -> Float[np.ndarray, "draw"]:
        known = ~np.isnan(truth)
        there, scores, said, counts = truth[known] > HALF, scores[known], said[known], counts[:, known]
        match self.kind:
            case "auroc":
                return metrics.counted_auroc(counts, there, scores)
            case "balanced_accuracy":
                return metrics.counted_balance(counts, there, said)
            case "f1":
                return metrics.counted_f1(counts, there, said)
            case _:
                return metrics.counted_calibration_error(counts, there, scores, bins=self.bins)


def ensemble(vectors: Sequence[Float[np.ndarray, "out"]]) -> Float[np.ndarray, "out"]:
    """The mean of unit vectors, brought back to length one."""
    rows = np.asarray(vectors, np.float64)
    middle = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).mean(axis=0)
    return middle / max(float(np.linalg.norm(middle)), 1e-12)


def platt(logits: Float[np.ndarray, "row"], there: Bool[np.ndarray, "row"]) -> tuple[float, float]:
    """Scale >= 0 and shift that make logits probabilities: Platt 1999, with his targets for few labels.

    Instead of 1 and 0 the targets are (P + 1) / (P + 2) and 1 / (N + 2), for P positive and N negative rows, so that
    rows which are told apart without error do not make everything certain.
    """
    positives, negatives = int(there.sum()), int((~there).sum())
    targets = np.where(there, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    middle, spread = float(logits.mean()), max(float(logits.std()), 1e-12)
    standard = (logits - middle) / spread

    def loss(at: Float[np.ndarray, "2"]) -> tuple[float, Float[np.ndarray, "2"]]:
        z = at[0] * standard + at[1]
        error = expit(z) - targets
        # log(1 + exp(z)) - target * z, without an exp of a large number.
        return float((np.logaddexp(0.0, z) - targets * z).sum()), np.array([error @ standard, error.sum()])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0.0, None), (None, None)]).x
    return float(found[0] / spread), float(found[1] - found[0] * middle / spread)


def temper(logits: Float[np.ndarray, "row classes"], truth: np.ndarray) -> float:
    """What logits are multiplied by so that their softmax is most likely (Guo et al. 2017, section 4.2)."""

    def loss(power: float) -> float:
        return -float(log_softmax(math.exp(power) * logits, axis=1)[np.arange(len(truth)), truth].sum())

    return math.exp(float(cast(Any, minimize_scalar(loss, bounds=(-7.0, 7.0), method="bounded")).x))


def best_threshold(scores: Float[np.ndarray, "row"], there: Bool[np.ndarray, "row"]) -> float:
    """The threshold of the best balanced accuracy: amid two neighbouring scores, the one nearest to 0.5 of equals."""
    steps = np.unique(scores)
    between = np.concatenate([[steps[0]], (steps[:-1] + steps[1:]) / 2])
    figures = np.array([metrics.balanced_accuracy(there, scores >= limit) for limit in between])
    best = between[figures >= figures.max() - 1e-12]
    return float(best[np.abs(best - HALF).argmin()])


def shares(truths: Sequence[Mapping[str, bool]], classes: Sequence[str]) -> tuple[float, ...]:
    """Share of the labelled in which each class is there: what one can say about a scan without seeing it."""
    said = [[truth[name] for truth in truths if name in truth] for name in classes]
    return tuple(sum(known) / len(known) if known else HALF for known in said)


def _neutral(count: int) -> dict[str, Float[np.ndarray, "classes"]]:
    """What calibration sets, as it is without."""
    return {"scale": np.ones(count), "shift": np.zeros(count), "threshold": np.full(count, HALF)}


def truth_of(classes: Sequence[str], example: Example) -> tuple[float, ...]:
    """1 for what is true of an example, 0 for what is not, NaN for what nobody said."""
    said = example.findings
    if said is None:
        return tuple(float(name == example.label) for name in classes)
    return tuple(float(said[name]) if name in said else math.nan for name in classes)


def _by_subject(rows: Sequence[tuple[str, Float[np.ndarray, "classes"]]]) -> Float[np.ndarray, "subject classes"]:
    """Mean row of each subject: one who has many scans counts once."""
    kept: dict[str, list[np.ndarray]] = {}
    for subject, row in rows:
        kept.setdefault(subject, []).append(row)
    return np.stack([np.mean(kept[subject], axis=0) for subject in sorted(kept)])
