"""The labelled cases that are most like a scan: neighbours by cosine, as embedded or under a learned metric.

Nothing is said that no labelled case says: who reads the answer can open the cases it rests on. Where answers are
scored, no case of the scan's own subject is among them; a labelled scan that is asked about finds itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from voxelstem import metrics
from voxelstem.certainty.assurance import Assurance
from voxelstem.findings import LONGEST_NAME, Finding, Quantity, Weights
from voxelstem.heads.neighbours import nearest, unit
from voxelstem.heads.scales import laid, measured_columns, ruler
from voxelstem.protocols import Example, Features, Head

LEAST_SHRUNK = 0.01
"""The spread within classes is taken to be at least this much alike in all directions, or a few scans would make some
of them endless."""
KEY_SHOWN = 16
"""Letters of a labelled scan's key in findings; `voxelstem show STORE` finds it by them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrieved:
    """What was found for a subject."""

    truth: int
    """Its class, counted in the head's order."""
    shares: tuple[float, ...]
    """Of the nearest `k` cases, the share of each class."""
    average_precision: float
    """Over the places of all cases of its class among all labelled ones; NaN where nobody else has its class."""

    @property
    def precision(self) -> float:
        """The share of the nearest `k` that are of its class."""
        return self.shares[self.truth]


@dataclass(frozen=True, kw_only=True, slots=True)
class Like:
    """A labelled case that is like a scan."""

    key: str
    """The beginning of its key."""
    label: str
    cosine: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrieve:
    """Settings of the search among labelled cases, and the search itself."""

    modes: ClassVar[tuple[str, ...]] = ("knn", "probe")
    metrics: ClassVar[tuple[str, ...]] = ("precision_at_k", "average_precision")
    voxels: ClassVar[bool] = False

    k: int = 5
    """How many cases are shown, and judged in `precision_at_k` (fewer if there are fewer)."""

    def __post_init__(self) -> None:
        """Guard the number.

        Raises:
            ValueError: nobody is to be shown.
        """
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:  # noqa: ARG002 - nothing is left to chance
        """Keep the labelled scans as unit rows: as they are (`knn`), or where classes spread evenly (`probe`).

        `probe` undoes how scans of one class differ from each other (within-class covariance normalisation: Hatch,
        Kajarekar & Stolcke 2006, section 2), by a covariance that is shrunk as far as the scans are few (Ledoit &
        Wolf 2004).

        Raises:
            ValueError: an unknown mode, a scan without its one label, or fewer than two classes.
        """
        if mode not in self.modes:
            raise ValueError(f"retrieve has no mode '{mode}'")
        told = [example.label for example in examples]
        if None in told:
            raise ValueError("retrieve compares scans by one label each, in a column `label`")
        truth = np.array([classes.index(label or "") for label in told])
        if len(np.unique(truth)) < 2:  # noqa: PLR2004
            raise ValueError("the labelled scans are all of one class")
        rows = np.stack([example.features.scan for example in examples]).astype(np.float64)
        metric = ruler(rows, measured_columns([example.features for example in examples]))
        metric |= whitening(laid(metric, rows), truth) if mode == "probe" else {}
        arrays = metric | {
            "rows": unit(_seen(metric, rows)),
            "truth": truth,
            "subject": _letters([example.subject for example in examples]),
            "key": _letters([example.key[:KEY_SHOWN] for example in examples]),
        }
        return Head(mode=mode, classes=classes, arrays=arrays)

    def alike(self, head: Head, scan: Float[np.ndarray, "dim"]) -> tuple[Like, ...]:
        """The `k` labelled cases that are most like a scan, the most alike first."""
        near = nearest(head.arrays["rows"], _seen(head.arrays, scan[None])[0], self.k)
        keys = _words(head.arrays["key"][near.places])
        labels = [head.classes[kind] for kind in head.arrays["truth"][near.places].tolist()]
        rows = zip(keys, labels, near.cosines.tolist(), strict=True)
        return tuple(Like(key=key, label=label, cosine=cosine) for key, label, cosine in rows)

    def findings(self, head: Head, features: Features, weights: Weights, sure: Assurance) -> tuple[Finding, ...]:
        """What most of the nearest cases are, then each of them by its key and label with its cosine."""
        near = self.alike(head, features.scan)
        shares = np.array([sum(one.label == name for one in near) / len(near) for name in head.classes])
        answer, certainty = sure.certainty(head.classes, shares)
        most = Finding(name=weights.name, kind="class", answer=answer, weights=weights, certainty=certainty)
        cases = (
            Finding(
                name=f"like case {one.key}: {one.label}"[:LONGEST_NAME].strip(),
                kind="value",
                quantity=Quantity(value=one.cosine, unit="1"),
                weights=weights,
            )
            for one in near
        )
        return (most, *cases)

    def outcome(self, head: Head, example: Example) -> Retrieved:
        """Rank all labelled scans of other subjects by how like they are.

        Raises:
            ValueError: the truth is a class that the head was never shown, or nobody else is labelled.
        """
        truth = head.classes.index(example.label or "")
        own = (head.arrays["subject"] == _letters([example.subject], width=head.arrays["subject"].shape[1])).all(axis=1)
        row = _seen(head.arrays, example.features.scan[None])[0]
        near = nearest(head.arrays["rows"], row, len(own), hidden=own)
        kinds = head.arrays["truth"][near.places]
        first = np.bincount(kinds[: self.k], minlength=len(head.classes)) / min(self.k, len(kinds))
        return Retrieved(truth=truth, shares=tuple(first.tolist()), average_precision=average_precision(kinds == truth))

    def combine(self, outcomes: Sequence[Retrieved]) -> Retrieved:
        """Average over a subject's scans: each asks by itself."""
        return Retrieved(
            truth=outcomes[0].truth,
            shares=tuple(np.mean([one.shares for one in outcomes], axis=0).tolist()),
            average_precision=metrics.mean([one.average_precision for one in outcomes]),
        )

    def statistic(self, metric: str) -> Callable[[Sequence[Retrieved]], float]:
        """`precision_at_k` or `average_precision` (its mean is what is called MAP), over subjects."""
        if metric == "precision_at_k":
            return metrics.MeanOf(lambda outcome: outcome.precision)
        return metrics.MeanOf(lambda outcome: outcome.average_precision)


def by_chance(truth: int, kinds: Int[np.ndarray, "case"], classes: int) -> Retrieved:
    """What is found for a subject of class `truth` where cases of these kinds come in any order.

    Of R right cases among N the mean of average precision over all orders is (H + (R - 1) / (N - 1) (N - H)) / N, for H
    the N-th harmonic number: the i-th place holds a right one in R of N orders, and then (i - 1) (R - 1) / (N - 1) of
    those before it are right.
    """
    counts = np.bincount(kinds, minlength=classes)
    right, all_ = int(counts[truth]), len(kinds)
    harmonic = math.fsum(1 / place for place in range(1, all_ + 1))
    beside = (right - 1) / (all_ - 1) if all_ > 1 else 0.0
    expected = (harmonic + beside * (all_ - harmonic)) / all_ if right else math.nan
    return Retrieved(truth=truth, shares=tuple((counts / all_).tolist()), average_precision=expected)


def average_precision(right: Bool[np.ndarray, "place"]) -> float:
    """Mean, over the places of all right cases, of the share of right ones until there; NaN without any."""
    places = np.flatnonzero(right) + 1
    return float((np.arange(1, len(places) + 1) / places).mean()) if len(places) else math.nan


def whitening(rows: Float[np.ndarray, "scan dim"], truth: Int[np.ndarray, "scan"]) -> dict[str, np.ndarray]:
    """What makes scans of a class spread evenly about it: the middle, directions, and how each of them is stretched.

    `plain` stretches whatever lies in none of the directions.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    middle = rows.mean(axis=0)
    about = np.stack([row - rows[truth == kind].mean(axis=0) for row, kind in zip(rows, truth, strict=True)])
    total = float(np.square(about).mean())
    if total <= 1e-12 * float(np.square(rows).mean()):  # every class shows one scan, or many that are the same
        return {"middle": middle, "turn": np.zeros((0, rows.shape[1])), "stretch": np.zeros(0), "plain": np.ones(1)}
    shrunk = max(float(ledoit_wolf_shrinkage(about, assume_centered=True)), LEAST_SHRUNK)
    _, sizes, turn = np.linalg.svd(about, full_matrices=False)
    variances = (1 - shrunk) * sizes**2 / len(rows) + shrunk * total
    return {"middle": middle, "turn": turn, "stretch": variances**-0.5, "plain": np.array([(shrunk * total) ** -0.5])}


def _seen(metric: dict[str, np.ndarray], rows: Float[np.ndarray, "row dim"]) -> Float[np.ndarray, "row dim"]:
    """Rows as a head compares them."""
    rows = laid(metric, rows)
    if "turn" not in metric:
        return rows
    about = rows - metric["middle"]
    return metric["plain"] * about + (about @ metric["turn"].T) * (metric["stretch"] - metric["plain"]) @ metric["turn"]


def _letters(words: Sequence[str], width: int = 0) -> UInt8[np.ndarray, "word letter"]:
    """Words as an array that rests on disk without a pickle; cut off at `width`, which no word of ours reaches."""
    raw = [word.encode() for word in words]
    width = width or max(map(len, raw))
    return np.stack([np.frombuffer(one[:width].ljust(width, b"\0"), dtype=np.uint8) for one in raw])


def _words(letters: UInt8[np.ndarray, "word letter"]) -> list[str]:
    return [bytes(row).rstrip(b"\0").decode() for row in np.ascontiguousarray(letters)]
