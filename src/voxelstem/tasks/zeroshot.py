"""Answers without a trained head: a scan's vector beside the vectors of sentences that say what might be there.

Each class is an ensemble of prompts: the mean of their unit vectors, brought back to length one (Radford et al. 2021,
CLIP, section 3.1.4). The weights must be aligned with reports. Labels, if any, only set probabilities and thresholds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from jaxtyping import Float
from scipy.special import expit, softmax

from voxelstem.answers import HALF, Answer, Figure, best_threshold, truth_of
from voxelstem.certainty.calibrators import best_line, best_temperature
from voxelstem.errors import ConfigError
from voxelstem.prompts import Ensemble, Prompts, read_prompts
from voxelstem.protocols import Example, Head

USUAL_TEMPERATURE = math.log(10.0)
"""Where weights came without their own: what SigLIP starts from (Zhai et al. 2023, section 3.2)."""
COOLEST, HOTTEST = math.exp(-7.0), math.exp(7.0)
"""Temperatures that are searched: prompts of foreign weights may be off by far more than a trained head."""


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
            scale[:] = 1 / best_temperature(rows, truth.argmax(axis=1), lowest=COOLEST, highest=HOTTEST)
        for at in range(len(head.classes)) if self.answers == "each" else ():
            known = ~np.isnan(truth[:, at])
            there = truth[known, at] > HALF
            if there.all() or not there.any():
                left += 1
                continue
            scale[at], shift[at] = best_line(rows[known, at], there)
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


def ensemble(vectors: Sequence[Float[np.ndarray, "out"]]) -> Float[np.ndarray, "out"]:
    """The mean of unit vectors, brought back to length one."""
    rows = np.asarray(vectors, np.float64)
    middle = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).mean(axis=0)
    return middle / max(float(np.linalg.norm(middle)), 1e-12)


def _neutral(count: int) -> dict[str, Float[np.ndarray, "classes"]]:
    """What calibration sets, as it is without."""
    return {"scale": np.ones(count), "shift": np.zeros(count), "threshold": np.full(count, HALF)}


def _by_subject(rows: Sequence[tuple[str, Float[np.ndarray, "classes"]]]) -> Float[np.ndarray, "subject classes"]:
    """Mean row of each subject: one who has many scans counts once."""
    kept: dict[str, list[np.ndarray]] = {}
    for subject, row in rows:
        kept.setdefault(subject, []).append(row)
    return np.stack([np.mean(kept[subject], axis=0) for subject in sorted(kept)])
