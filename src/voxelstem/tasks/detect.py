"""A box about every lesion or organ: one linear map from a frozen patch token and what lies about it to box and score.

Tokens decide alone, as in FCOS (Tian et al. 2019): each says whether it lies amid a thing, and where the thing ends.
The map sees a token, the means of its neighbourhoods and the slopes across it, all of which commute with it: nothing
here is learned but a matrix, so what it can do shows what the tokens know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from scipy.special import expit
from torch import Tensor

from voxelstem import metrics
from voxelstem.certainty.assurance import Assurance
from voxelstem.findings import Finding, Place, Weights
from voxelstem.heads import boxes
from voxelstem.heads.anchors import HALF, Anchors, surroundings
from voxelstem.heads.boxes import Box, Hit, Kind, Matched, Sweep
from voxelstem.protocols import Example, Features, Head
from voxelstem.study import LabelMap

POSITIVE_SHARE = 0.25
"""What the tokens amid a class's things weigh together, against three quarters for those off them."""
OUT = 7
"""What a token says of each class: a logit, the way to the box's centre, and the logarithms of its edges."""
CANDIDATES = 1000
"""So many of a scan's tokens may speak for a class, before boxes are suppressed (Tian et al. 2019, section 4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Detected:
    """What was found and what was missed of each class that was looked for, in one subject."""

    by_class: dict[str, Matched]

    def __contains__(self, name: object) -> bool:
        """Whether this class was looked for: where nothing of it is there, false positives still count."""
        return name in self.by_class


@dataclass(frozen=True, kw_only=True, slots=True)
class Detect:
    """Settings of the detection head, and the head itself."""

    modes: ClassVar[tuple[str, ...]] = ("probe",)
    metrics: ClassVar[tuple[str, ...]] = ("froc", "average_precision")
    voxels: ClassVar[bool] = True

    around: int = 2
    """How many tokens the head sees to every side: a mean for each distance, and the slopes; 0: the token alone."""
    reach: float = 1.0
    """A token lies amid a thing within so many of its own edges from the thing's centre, and within its box. Other
    tokens that touch the box are not learned from."""
    decay: float = 1e-2
    """Weight of the squared norm of the head in its loss."""
    iterations: int = 50
    """Steps of L-BFGS in each round; the problem is convex."""
    background: int = 8000
    """Tokens of the background that are learned from at most: half drawn by chance, half the hardest to tell apart."""
    rounds: int = 3
    """In each of them the head is fitted again, with more of the tokens that it has just taken for a thing."""
    smallest_mm3: float = 0.0
    """Smaller pieces of a label are no thing, neither to learn nor to find."""
    overlap: float = 0.1
    """Of two boxes of one class whose IoU is higher, the one that is less sure goes."""
    most: int = 100
    """Boxes of one class in a scan, at most."""
    hit: Kind = "radius"
    """When a box has found a thing, see `boxes.Hit`."""
    iou: float = 0.1
    """The overlap of a hit of kind `iou`."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a count below 1, a negative weight, an overlap outside [0, 1), or no such kind of hit.
        """
        if min(self.iterations, self.most) < 1 or self.background < 2:  # noqa: PLR2004 - half of it is drawn by chance
            raise ValueError("iterations and most must be at least 1, and background at least 2")
        if min(self.around, self.rounds, self.decay, self.smallest_mm3) < 0:
            raise ValueError("around, rounds, decay and smallest_mm3 must not be negative")
        if self.reach <= 0:
            raise ValueError(f"reach must be positive, got {self.reach}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must lie in [0, 1), got {self.overlap}")
        Hit(kind=self.hit, iou=self.iou)

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit the head to labelled scans; every connected piece of a class is a thing of its own.

        Raises:
            ValueError: an unknown mode, an example without tokens or labels, or a class of which no token of the
                labelled scans lies amid a thing.
        """
        if mode not in self.modes:
            raise ValueError(f"detect has no mode '{mode}'")
        scans = [self._labelled(example, classes) for example in examples]
        for place, name in enumerate(classes):
            if not any((scan.kinds[:, place] == 1).any() for scan in scans):
                raise ValueError(f"no labelled scan shows a '{name}' within its tokens: label subjects who have one")
        half = self.background // 2
        chosen = [scan.drawn(part, seed) for scan, part in zip(scans, _parts(half, len(scans)), strict=True)]
        lesson = _Lesson.of(scans, chosen, self.around)
        head = self._descend(lesson, self._blank(lesson, classes, mode))
        for part in _parts(self.background - half, self.rounds):
            harder = _hardest(head, scans, chosen, part)
            lesson = lesson.with_more(_Lesson.of(scans, harder, self.around))
            chosen = [np.concatenate(both) for both in zip(chosen, harder, strict=True)]
            head = self._descend(lesson, head)
        return head

    def predict(
        self, head: Head, features: Features, affine_ras: Float[np.ndarray, "4 4"], shape_ijk: tuple[int, int, int]
    ) -> tuple[Box, ...]:
        """Boxes of every class with their scores in (0, 1), the surest of each class first.

        Raises:
            ValueError: the features have no tokens, or these do not run along the scan's axes.
        """
        anchors = Anchors.of(features, affine_ras, shape_ijk)
        said = _say(head, anchors.tokens)
        found: list[Box] = []
        for place, name in enumerate(head.classes):
            logits = said[:, place, 0]
            best = np.argsort(-logits, kind="stable")[:CANDIDATES]
            corners = anchors.corners_of(best, _clipped(head, place, said[best, place, 1:]))
            kept = boxes.suppress(corners, logits[best], overlap=self.overlap, most=self.most)
            for box, score in zip(corners[kept].tolist(), expit(logits[best][kept]).tolist(), strict=True):
                low, high = (box[0], box[1], box[2]), (box[3], box[4], box[5])
                found.append(Box(name=name, low_ras_mm=low, high_ras_mm=high, score=score))
        return tuple(found)

    def boxes(
        self,
        head: Head,
        features: Features,
        affine_ras: Float[np.ndarray, "4 4"],
        shape_ijk: tuple[int, int, int],
        weights: Weights,
        sure: Assurance,
    ) -> tuple[Finding, ...]:
        """The boxes of `predict`: calibrated, a probability is the share that are a `hit`; else there is a score."""
        return tuple(
            Finding(
                name=box.name,
                kind="box",
                weights=weights,
                place=Place(low_ras_mm=box.low_ras_mm, high_ras_mm=box.high_ras_mm),
                certainty=sure.box(box.name, box.score),
            )
            for box in self.predict(head, features, affine_ras, shape_ijk)
        )

    def outcome(self, head: Head, example: Example) -> Detected:
        """Boxes that the head finds in one scan, compared with those of its labels.

        Raises:
            ValueError: the example has no voxel labels, or as `predict`.
        """
        labels = _labels(example)
        shape = labels.array.shape
        predicted = self.predict(head, example.features, example.affine_ras, (shape[0], shape[1], shape[2]))
        return self._compare(predicted, labels, example.affine_ras, head.classes)

    def outcome_of_labels(
        self, carried: LabelMap, truth: LabelMap, affine_ras: Float[np.ndarray, "4 4"], classes: tuple[str, ...]
    ) -> Detected:
        """The boxes of labels that somebody else gave this scan, all of them as sure, compared with the truth's."""
        predicted = boxes.of_labels(carried, affine_ras, classes, smallest_mm3=self.smallest_mm3)
        return self._compare(predicted, truth, affine_ras, classes)

    def combine(self, outcomes: Sequence[Detected]) -> Detected:
        """Put the scans of a subject together: rates are per scan, whosever it is."""
        names = dict.fromkeys(name for outcome in outcomes for name in outcome.by_class)
        return Detected(by_class={name: boxes.joined(_having(outcomes, name)) for name in names})

    def statistic(self, metric: str) -> Figure:
        """`froc` or `average_precision`, each the mean over classes; `froc:NAME` is that of one class.

        `froc` is the mean sensitivity at 1/8 to 8 false positives per scan (Setio et al. 2017).

        Raises:
            ValueError: there is no such metric.
        """
        kind, _, only = metric.partition(":")
        if kind not in self.metrics:
            raise ValueError(f"detect has no metric '{kind}'")
        return Figure(kind=kind, only=only)

    def _compare(
        self,
        predicted: Sequence[Box],
        truth: LabelMap,
        affine_ras: Float[np.ndarray, "4 4"],
        classes: tuple[str, ...],
    ) -> Detected:
        there = boxes.of_labels(truth, affine_ras, classes, smallest_mm3=self.smallest_mm3)
        hit = Hit(kind=self.hit, iou=self.iou)
        sides = {name: (_named(predicted, name), _named(there, name)) for name in classes}
        return Detected(by_class={name: boxes.match(said, true, hit) for name, (said, true) in sides.items()})

    def _labelled(self, example: Example, classes: tuple[str, ...]) -> _Labelled:
        labels = _labels(example)
        shape = labels.array.shape
        anchors = Anchors.of(example.features, example.affine_ras, (shape[0], shape[1], shape[2]))
        there = boxes.of_labels(labels, example.affine_ras, classes, smallest_mm3=self.smallest_mm3)
        things = tuple(boxes.corners(_named(there, name)) for name in classes)
        kinds = np.stack([anchors.kinds(corners, self.reach) for corners in things], axis=1)
        return _Labelled(anchors=anchors, things=things, kinds=kinds)

    def _blank(self, lesson: _Lesson, classes: tuple[str, ...], mode: str) -> Head:
        """A head that says of every token the same: hardly amid a thing, and then amid the mean one."""
        middle, spread = lesson.rows.mean(axis=0, dtype=np.float64), lesson.rows.std(axis=0, dtype=np.float64)
        amid = (lesson.kinds == 1)[:, :, None]
        edges = np.exp(lesson.aims[:, :, 3:].astype(np.float64))
        bias = np.full((len(classes), OUT), math.log(POSITIVE_SHARE / (1 - POSITIVE_SHARE)), np.float32)
        bias[:, 1:] = (lesson.aims * amid).sum(axis=0) / amid.sum(axis=0)
        arrays = {
            "middle": middle,
            # Columns that hardly vary among these tokens may not shout where they do.
            "scale": np.maximum(spread, max(float(np.median(spread)) / 10, 1e-6)),
            "weight": np.zeros((len(middle), bias.size), np.float32),
            "bias": bias.ravel(),
            "shortest_mm": np.where(amid, edges, math.inf).min(axis=0),
            "longest_mm": np.where(amid, edges, 0.0).max(axis=0),
        }
        facts: dict[str, float | str] = {"around": float(self.around), "farthest": max(self.reach, HALF)}
        return Head(mode=mode, classes=classes, arrays=arrays, facts=facts)

    def _descend(self, lesson: _Lesson, head: Head) -> Head:
        """Minimise the balanced cross entropy of tokens, and the smooth L1 loss of the boxes of those amid a thing."""
        rows = ((lesson.rows - head.arrays["middle"]) / head.arrays["scale"]).astype(np.float32)
        inputs, kinds, aims = (torch.from_numpy(side) for side in (rows, lesson.kinds, lesson.aims))
        weight, bias = (torch.from_numpy(head.arrays[name].copy()).requires_grad_() for name in ("weight", "bias"))
        amid, off = (kinds == 1).float(), (kinds == 0).float()
        # Each class counts alike, however many tokens lie amid its things.
        within = amid / amid.sum(dim=0) / amid.shape[1]
        loud = POSITIVE_SHARE * within + (1 - POSITIVE_SHARE) * off / off.sum(dim=0).clamp_min(1) / amid.shape[1]
        solver = torch.optim.LBFGS([weight, bias], max_iter=self.iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            said = (inputs @ weight + bias).reshape(len(inputs), -1, OUT)
            surprise = F.binary_cross_entropy_with_logits(said[:, :, 0], amid, reduction="none")
            gaps = F.smooth_l1_loss(said[:, :, 1:], aims, reduction="none").mean(dim=2)
            loss = (loud * surprise).sum() + (within * gaps).sum() + self.decay * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        learned = {"weight": weight.detach().numpy(), "bias": bias.detach().numpy()}
        return replace(head, arrays=head.arrays | learned)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure(metrics.Counted):
    """A figure over subjects; NaN where nothing is there to be found."""

    kind: str
    only: str = ""
    """The one class that counts; the mean over all if empty."""

    def counted(
        self, outcomes: Sequence[Detected], counts: Float[np.ndarray, "draw subject"]
    ) -> Float[np.ndarray, "draw"]:
        """Compute the figure in each draw."""
        every = dict.fromkeys(name for outcome in outcomes for name in outcome.by_class)

        def of_class(few: Float[np.ndarray, "draw subject"], name: str) -> Float[np.ndarray, "draw"]:
            sweep = Sweep.of(_having(outcomes, name))
            asked = few[:, [name in outcome for outcome in outcomes]]
            if self.kind == "froc":
                return sweep.sensitivity_at(asked, boxes.RATES).mean(axis=1)
            return sweep.average_precision(asked)

        return metrics.over_classes(of_class, [self.only] if self.only else every, counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Labelled:
    """A scan to learn from."""

    anchors: Anchors
    things: tuple[Float[np.ndarray, "_ 6"], ...]
    """The boxes of each class."""
    kinds: Int8[np.ndarray, "token class"]
    """1 amid a thing, 0 off it, -1 where it is neither."""

    def drawn(self, most: int, seed: int) -> Int[np.ndarray, "row"]:
        """All tokens amid a thing, and at most so many others."""
        amid, off = (self.kinds == 1).any(axis=1), (self.kinds == 0).any(axis=1)
        others = np.random.default_rng([seed, 13]).permutation(np.flatnonzero(off & ~amid))[:most]
        return np.sort(np.concatenate([np.flatnonzero(amid), others]))

    def aims(self, chosen: Int[np.ndarray, "row"]) -> Float[np.ndarray, "row class 6"]:
        """What some tokens should say of the things of each class."""
        return np.stack([self.anchors.aims(chosen, corners) for corners in self.things], axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lesson:
    """What is learned from."""

    rows: Float[np.ndarray, "row column"]
    kinds: Int8[np.ndarray, "row class"]
    aims: Float[np.ndarray, "row class 6"]

    @staticmethod
    def of(scans: Sequence[_Labelled], chosen: Sequence[Int[np.ndarray, "_"]], around: int) -> _Lesson:
        """What is to be seen at some tokens of each scan, and what should be said there."""
        pairs = list(zip(scans, chosen, strict=True))
        return _Lesson(
            rows=np.concatenate([scan.anchors.rows(at, around) for scan, at in pairs]),
            kinds=np.concatenate([scan.kinds[at] for scan, at in pairs]),
            aims=np.concatenate([scan.aims(at) for scan, at in pairs]),
        )

    def with_more(self, other: _Lesson) -> _Lesson:
        """Both together."""
        sides = ((self.rows, other.rows), (self.kinds, other.kinds), (self.aims, other.aims))
        rows, kinds, aims = (np.concatenate(side) for side in sides)
        return _Lesson(rows=rows, kinds=kinds, aims=aims)


def _hardest(
    head: Head, scans: Sequence[_Labelled], chosen: Sequence[Int[np.ndarray, "_"]], most: int
) -> list[Int[np.ndarray, "_"]]:
    """Of each scan, which tokens not chosen yet are among those that the head takes for a thing most firmly, wrongly.

    Felzenszwalb et al. 2010, section 4.4.
    """
    wrong: list[np.ndarray] = []
    for scan, at in zip(scans, chosen, strict=True):
        logits = np.where(scan.kinds == 0, _say(head, scan.anchors.tokens)[:, :, 0], -math.inf).max(axis=1)
        logits[at] = -math.inf
        wrong.append(logits)
    every = np.concatenate(wrong)
    best = np.argsort(-every, kind="stable")[:most]
    hard = np.zeros(len(every), dtype=bool)
    hard[best[every[best] > -math.inf]] = True
    return [np.flatnonzero(part) for part in np.split(hard, np.cumsum([len(one) for one in wrong])[:-1])]


def _parts(total: int, count: int) -> list[int]:
    """Whole numbers that differ by one at most and make `total` together."""
    return [total * (place + 1) // count - total * place // count for place in range(count)]


def _named(found: Sequence[Box], name: str) -> list[Box]:
    return [box for box in found if box.name == name]


def _having(outcomes: Sequence[Detected], name: str) -> list[Matched]:
    return [outcome.by_class[name] for outcome in outcomes if name in outcome]


def _labels(example: Example) -> LabelMap:
    if example.labels is None:
        raise ValueError("a voxel-level task needs voxel labels")
    return example.labels


def _say(head: Head, tokens: Float[np.ndarray, "ti tj tk dim"]) -> Float[np.ndarray, "token class 7"]:
    """What the head says at every token.

    A linear map of the mean of tokens is the mean of what it makes of each, which is far smaller; so it is with slopes.
    """
    views = surroundings(int(head.facts["around"]))
    weight = head.arrays["weight"] / head.arrays["scale"][:, None]
    said = np.zeros(tokens.shape[:3] + weight.shape[1:]) + (head.arrays["bias"] - head.arrays["middle"] @ weight)
    for view, part in zip(views, np.split(weight, len(views)), strict=True):
        said += view(tokens @ part.astype(np.float32))
    return said.reshape(-1, len(head.classes), OUT)


def _clipped(head: Head, place: int, said: Float[np.ndarray, "row 6"]) -> Float[np.ndarray, "row 6"]:
    """What is said of boxes of a class, no farther away and no smaller or larger than those that were learned from."""
    farthest = float(head.facts["farthest"])
    shortest, longest = (np.log(head.arrays[name][place]) for name in ("shortest_mm", "longest_mm"))
    return np.concatenate([np.clip(said[:, :3], -farthest, farthest), np.clip(said[:, 3:], shortest, longest)], axis=1)
