"""Many labels for one scan: heads over classes of which each is there or not, whatever the others are.

Every class is learned by itself from those of whom it is known, and in every class those who have it weigh as much as
those who have not. What nobody knows of a subject neither helps nor harms. A head says by its fact `answers` that it is
of this kind; a network that was trained as a whole gives logits, and the head above it passes them on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import expit
from torch import Tensor

from voxelstem.answers import HALF, Answer, truth_of
from voxelstem.heads import attending
from voxelstem.heads.bags import bag_of, kind_of
from voxelstem.heads.neighbours import SOFTENED, Nearest, nearest, softened, unit
from voxelstem.heads.scales import laid, measured_columns, ruler
from voxelstem.losses.binary import balanced_binary_entropy, kind_weights
from voxelstem.protocols import Example, Features, Head

FACTS = {"answers": "each"}
"""What heads of this kind say of themselves."""
NO_YES = ("no", "yes")
Fit = Callable[[Sequence[Example], tuple[str, ...]], Head]
"""Fits a linear head to scans of which each has one of two labels."""


def asks_each(examples: Sequence[Example]) -> bool:
    """Whether what is known of scans is which of many classes are there."""
    return all(example.label is None and example.findings is not None for example in examples)


def answers_each(head: Head) -> bool:
    """Whether a head says of each class by itself how probable it is."""
    return head.facts.get("answers") == FACTS["answers"]


def truths(examples: Sequence[Example], classes: Sequence[str]) -> Float[np.ndarray, "scan classes"]:
    """1 for what is there, 0 for what is not, NaN for what nobody knows.

    Raises:
        ValueError: of a class, by its name, nothing or only one kind is known: there is nothing to tell apart.
    """
    truth = np.array([truth_of(classes, example) for example in examples], dtype=np.float64)
    for name, column in zip(classes, truth.T, strict=True):
        kinds = np.unique(column[~np.isnan(column)])
        if len(kinds) < 2:  # noqa: PLR2004 - there, and not there
            said = f"all say {NO_YES[int(kinds[0])]}" if len(kinds) else "nobody says anything"
            raise ValueError(f"of '{name}' {said}")
    return truth


def about(examples: Sequence[Example], name: str) -> list[Example]:
    """The examples of which this class is known, labelled `yes` or `no` by it."""
    told = [(example, (example.findings or {}).get(name)) for example in examples]
    return [replace(example, label=NO_YES[there], findings=None) for example, there in told if there is not None]


def fit_linear(examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, fit: Fit) -> Head:
    """One linear head for each class, fitted to those of whom it is known.

    Raises:
        ValueError: as `truths` and `fit`.
    """
    truths(examples, classes)
    heads = [fit(about(examples, name), NO_YES) for name in classes]
    arrays = {name: np.stack([head.arrays[name] for head in heads]) for name in ("middle", "scale")}
    # Two rows of one head count by their difference alone.
    arrays["weight"] = np.stack([head.arrays["weight"][1] - head.arrays["weight"][0] for head in heads])
    arrays["bias"] = np.array([head.arrays["bias"][1] - head.arrays["bias"][0] for head in heads])
    strengths = {f"strength.{name}": head.facts["strength"] for name, head in zip(classes, heads, strict=True)}
    return Head(mode=mode, classes=classes, arrays=arrays, facts=FACTS | strengths)


def fit_votes(examples: Sequence[Example], classes: tuple[str, ...], *, mode: str) -> Head:
    """Keep the scans, as unit vectors, and what is known of them.

    Raises:
        ValueError: as `truths`.
    """
    rows = np.stack([example.features.scan for example in examples])
    how = ruler(rows, measured_columns([example.features for example in examples]))
    arrays = how | {"rows": unit(laid(how, rows)), "truth": truths(examples, classes)}
    return Head(mode=mode, classes=classes, arrays=arrays, facts=FACTS | {SOFTENED: 1.0})


def fit_attention(
    examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, config: attending.AttendConfig, seed: int
) -> Head:
    """Attention to blocks or patches that all classes share, and a linear map for each.

    How many steps are taken is said by subjects held out in turn, if the rarest kind of any class has enough of them.

    Raises:
        ValueError: as `truths`, or there is nothing to attend to.
    """
    truth, features = truths(examples, classes), [example.features for example in examples]
    kind = kind_of(features, config.bag)
    subjects = [example.subject for example in examples]
    fitted = attending.fit(
        [bag_of(one, kind).members for one in features],
        balanced_loss(truth),
        len(classes),
        config=config,
        parts=_parts(subjects, truth, config, seed=seed),
        seed=seed,
    )
    facts: dict[str, float | str] = FACTS | {"bag": kind, "steps": float(fitted.steps)}
    return Head(mode=mode, classes=classes, arrays=fitted.attention.arrays(), facts=facts)


def balanced_loss(truth: Float[np.ndarray, "scan classes"]) -> attending.Loss:
    """The loss of `losses.binary`, in which both kinds of a class weigh alike among all scans."""
    known = torch.from_numpy(truth.astype(np.float32))
    weights = kind_weights(known)

    def loss(logits: Float[Tensor, "row classes"], rows: Int[np.ndarray, "row"]) -> Float[Tensor, ""]:
        return balanced_binary_entropy(logits, known[torch.from_numpy(rows)], weights)

    return loss


def chances(head: Head, features: Features, *, neighbours: int, temperature: float) -> Float[np.ndarray, "classes"]:
    """The probability of each class that it is there; they need not add up to anything.

    Args:
        head: A head of this kind, in any mode.
        features: Of one scan.
        neighbours: Of `knn`: how many of the scans of which a class is known vote on it.
        temperature: Of `knn`: a neighbour of cosine c has exp(c / temperature) votes.

    Raises:
        ValueError: the head looks at what the scan does not have.
    """
    if head.mode == "attention":
        return expit(attending.score(head, features).logits)
    row = features.scan.astype(np.float64)
    if head.mode == "knn":
        rows, row, truth = head.arrays["rows"], laid(head.arrays, row), head.arrays["truth"].T
        near = [nearest(rows, row, neighbours, hidden=np.isnan(column)) for column in truth]
        voted = np.array([_vote(few, column, temperature) for few, column in zip(near, truth, strict=True)])
        if SOFTENED not in head.facts:
            return voted
        return np.array(
            [softened(np.array([1 - v, v]), len(few.places))[1] for v, few in zip(voted, near, strict=True)]
        )
    standard = (row - head.arrays["middle"]) / head.arrays["scale"]
    return expit((head.arrays["weight"] * standard).sum(axis=-1) + head.arrays["bias"])


def thresholds(head: Head) -> tuple[float, ...]:
    """From which probability of `chances` on the answer is yes, class by class, in findings as in scores.

    One half: as yes and no weigh alike in a class, that is where sensitivity and specificity weigh alike too.
    """
    return (HALF,) * len(head.classes)


def answer_of(head: Head, example: Example, scores: Float[np.ndarray, "classes"]) -> Answer:
    """Probabilities beside the truth, and from which on the answer is yes."""
    return Answer(
        classes=head.classes,
        truth=truth_of(head.classes, example),
        scores=tuple(scores.tolist()),
        thresholds=thresholds(head),
    )


def _vote(near: Nearest, truth: Float[np.ndarray, "scan"], temperature: float) -> float:
    """Of those that know, the share that says yes."""
    return float(np.clip(near.shares(temperature) @ truth[near.places], 0.0, 1.0))


def _parts(
    subjects: Sequence[str], truth: Float[np.ndarray, "scan classes"], config: attending.AttendConfig, *, seed: int
) -> Int[np.ndarray, "scan"]:
    """Who is held out together: spread by the class of which a kind is rarest; nobody where that is too rare."""
    names = np.array(subjects)
    rarest = [min(len(np.unique(names[column == kind])) for kind in (0.0, 1.0)) for column in truth.T]
    if min(rarest) < max(config.enough, config.folds):
        return np.zeros(len(subjects), dtype=np.int64)
    column = truth[:, int(np.argmin(rarest))]
    return attending.parts_of(subjects, np.nan_to_num(column), config, seed=seed)
