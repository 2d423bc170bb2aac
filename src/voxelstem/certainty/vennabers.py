"""An interval of each stated probability with a promise that needs no right network: Venn-Abers prediction.

Vovk and Petej 2014. Scores with known answers are taken together with the new scan's, once as if its answer were no and
once as if it were yes, and an isotonic regression says each time how often such scores come true. Whatever the answer
is, the one of the two probabilities that belongs to it is calibrated: of all scans of which it says p, a share of p is
positive. The two lie far apart where few scores are known, and that is what the interval tells.

The promise is about new subjects drawn like those it was fitted to, by a head that none of these took part in fitting.
Scores that are cross-fitted come from heads of a fold less each, which differ a little from the final one: then it
holds as nearly as these are alike (see `crossfit.rows_of`). One row is one subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from voxelstem.certainty.calibration import check_chances, check_labels, check_probabilities, wilson_interval
from voxelstem.certainty.thresholds import read_arrays
from voxelstem.metrics import FEW_SUBJECTS, Interval


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Between:
    """The two probabilities of each class for each row."""

    low: Float[np.ndarray, "row classes"]
    """As if the row were of another class."""
    high: Float[np.ndarray, "row classes"]
    """As if it were of this one; never below `low`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VennAbers:
    """Puts an interval about the probability of each class against all others.

    All classes' steps lie one after the other in the arrays, each class's from its lowest known score on.
    """

    scores: Float[np.ndarray, "step"]
    """Known scores, each once."""
    low: Float[np.ndarray, "step"]
    """Of a new score that is this one or lies above it and below the next, as if its answer were no; 0 below all."""
    high: Float[np.ndarray, "step"]
    """Of a new score that is this one or lies below it and above the one before, as if yes; 1 above all."""
    steps: tuple[int, ...]
    """How many each class has."""
    subjects: int
    """How many it was fitted to; of several questions, to that with most."""

    def __post_init__(self) -> None:
        """Guard the steps.

        Raises:
            ValueError: arrays that do not fit together, or steps that fall.
        """
        sizes = {len(self.scores), len(self.low), len(self.high), sum(self.steps)}
        if len(sizes) > 1 or min(self.steps, default=0) < 1 or self.subjects < 1:
            raise ValueError(f"every class has steps, and every step a score and two probabilities, got {self.steps}")
        for part in self._parts():
            rising = (np.diff(self.scores[part]) > 0).all()
            if not rising or any((np.diff(side[part]) < 0).any() for side in (self.low, self.high)):
                raise ValueError("scores and probabilities rise from step to step")
        if not ((self.low >= 0) & (self.low <= self.high) & (self.high <= 1)).all():
            raise ValueError("the two probabilities of a step are sorted and lie in [0, 1]")

    def apply(self, probabilities: Float[np.ndarray, "row classes"]) -> Between:
        """The two probabilities of each class, of which one is true.

        Args:
            probabilities: As the head states them: the same scores as those that it was fitted to.

        Raises:
            ValueError: other classes, or as `calibration.check_probabilities`.
        """
        rows = check_probabilities(probabilities)
        if rows.shape[1] != len(self.steps):
            raise ValueError(f"fitted to {len(self.steps)} classes, got {rows.shape[1]}")
        sides = [self.of_class(kind, rows[:, kind]) for kind in range(rows.shape[1])]
        low, high = (np.stack(side, axis=1) for side in zip(*sides, strict=True))
        return Between(low=low, high=high)

    def of_class(
        self, kind: int, scores: Float[np.ndarray, "row"]
    ) -> tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row"]]:
        """Both probabilities of one class, which may be one of many that do not exclude each other."""
        part = list(self._parts())[kind]
        # A no adds nothing to those above it, and a yes nothing to those below: between two known scores the first is
        # what it would be at the lower one, the second what it would be at the higher one.
        below = np.searchsorted(self.scores[part], scores, side="right")
        above = np.searchsorted(self.scores[part], scores, side="left")
        return np.append(0.0, self.low[part])[below], np.append(self.high[part], 1.0)[above]

    def arrays(self) -> dict[str, np.ndarray]:
        """As they rest on disk."""
        sides = {"scores": self.scores, "low": self.low, "high": self.high}
        return sides | {"steps": np.array(self.steps, dtype=np.int64), "subjects": np.array(self.subjects)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> VennAbers:
        """Read what `arrays` gave.

        Raises:
            ValueError: an array is missing, or they do not fit together.
        """
        scores, low, high, steps, subjects = read_arrays(arrays, "scores", "low", "high", "steps", "subjects")
        return cls(scores=scores, low=low, high=high, steps=tuple(steps.tolist()), subjects=int(subjects))

    def _parts(self) -> Iterator[slice]:
        start = 0
        for count in self.steps:
            yield slice(start, start + count)
            start += count


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalBin:
    """Rows of similar intervals, and how often what they say came true."""

    rows: int
    mean_low: float
    mean_high: float
    came_true: Interval
    """Share of the rows, with Wilson's interval."""

    @property
    def held(self) -> bool:
        """Whether the share may lie between the mean ends: its own interval reaches between them."""
        low, high = self.came_true.low, self.came_true.high
        return low is not None and high is not None and low <= self.mean_high and high >= self.mean_low


def fit_venn_abers(probabilities: Float[np.ndarray, "row classes"], truth: Int[np.ndarray, "row"]) -> VennAbers:
    """Find both probabilities at every score that held-out subjects had, of each class against all others.

    Two isotonic regressions for each score, once: Vovk, Petej and Fedorova 2015, section 3, show that between known
    scores nothing else can come out, and that all of them together take no longer than sorting the scores.

    Raises:
        ValueError: fewer than ten subjects, or as `calibration.check_probabilities` and `calibration.check_labels`.
    """
    rows = check_probabilities(probabilities)
    known = check_labels(truth, rows)
    if len(rows) < FEW_SUBJECTS:
        raise ValueError(f"intervals of probabilities need {FEW_SUBJECTS} held-out subjects, there are {len(rows)}")
    return steps_of([(rows[:, kind], known == kind) for kind in range(rows.shape[1])])


def steps_of(told: Sequence[tuple[Float[np.ndarray, "_"], Bool[np.ndarray, "_"]]]) -> VennAbers:
    """The same of questions that do not exclude each other: of each, its scores and whether the answer was yes.

    Raises:
        ValueError: no question, one without rows, or not one answer for each score.
    """
    if not told or any(len(scores) == 0 or len(scores) != len(there) for scores, there in told):
        raise ValueError("every question needs scores, and an answer for each of them")
    sides = [_steps(scores.astype(np.float64), there) for scores, there in told]
    scores, low, high = (np.concatenate(side) for side in zip(*sides, strict=True))
    subjects = max(len(scores) for scores, _ in told)
    return VennAbers(scores=scores, low=low, high=high, steps=tuple(len(side[0]) for side in sides), subjects=subjects)


def held_frequency(
    low: Float[np.ndarray, "row"],
    high: Float[np.ndarray, "row"],
    there: Bool[np.ndarray, "row"],
    *,
    bins: int = 5,
    level: float = 0.95,
) -> tuple[IntervalBin, ...]:
    """Do intervals of probabilities hold how often things come true? In bins of as many rows each.

    Rows are sorted by the middle of their interval, and those of one middle are never parted. The promise of
    Venn-Abers is about the end that belongs to the truth, so about no single row: only shares can be looked at.

    Args:
        low: Lower ends.
        high: Upper ends.
        there: Whether what the interval is about was true.
        bins: At most; every one has ten rows or more, or it is the only one.
        level: Of the interval of each share.

    Raises:
        ValueError: no rows, not two ends and one truth for each, ends that are no probabilities or the wrong way
            round, or no bin.
    """
    low, high = check_chances(low, there), check_chances(high, there)
    if bins < 1 or (low > high).any():
        raise ValueError(f"there must be a bin at least, and no lower end above its upper one, got {bins} bins")
    middle = (low + high) / 2
    _, of, counts = np.unique(middle, return_inverse=True, return_counts=True)
    parts = max(min(bins, len(low) // FEW_SUBJECTS), 1)
    last = counts.cumsum()
    # By the middle one of the rows of each value, so that ties stay together.
    places = np.minimum(parts * (2 * last - counts) // (2 * len(low)), parts - 1)[of]
    return tuple(
        IntervalBin(
            rows=int((places == part).sum()),
            mean_low=float(low[places == part].mean()),
            mean_high=float(high[places == part].mean()),
            came_true=wilson_interval(float(there[places == part].mean()), int((places == part).sum()), level=level),
        )
        for part in np.unique(places).tolist()
    )


def _steps(
    scores: Float[np.ndarray, "row"], there: Bool[np.ndarray, "row"]
) -> tuple[Float[np.ndarray, "step"], Float[np.ndarray, "step"], Float[np.ndarray, "step"]]:
    """Each score once, and what the isotonic regression says there with one more no, and with one more yes."""
    values, of = np.unique(scores, return_inverse=True)
    rows, hits = np.bincount(of), np.bincount(of[there], minlength=len(values))
    low, high = (_with_one_more(rows, hits, answer) for answer in (0, 1))
    return values, low, high


def _with_one_more(
    rows: Int[np.ndarray, "step"], hits: Int[np.ndarray, "step"], answer: Literal[0, 1]
) -> Float[np.ndarray, "step"]:
    """The isotonic regression at each step if one more row with this answer were there.

    What it says at a step is the slope there of the largest convex curve below the sums of rows and hits (Barlow et
    al. 1972, theorem 1.1). One more row moves all points from the step's own on by (1, answer), so that slope is the
    one of the line below which no point lies, neither of those before nor of those moved. From step to step both its
    ends move to the right only, as what it says rises: hence one pass. All numbers are whole, so nothing is rounded
    before the last division.
    """
    x, y = ([0, *sums.cumsum().tolist()] for sums in (rows, hits))
    later_x, later_y = [place + 1 for place in x], [height + answer for height in y]
    after = _next_corners(x, y)
    found, before = np.empty(len(rows)), list[int]()
    left, right = 0, 1
    for at in range(1, len(x)):
        _push(before, at - 1, x, y)
        left, right = min(left, len(before) - 1), max(right, at)
        while True:
            here = before[left]
            wide, tall = later_x[right] - x[here], later_y[right] - y[here]
            further = after[right]
            if further and (later_y[further] - y[here]) * wide <= tall * (later_x[further] - x[here]):
                right = further
                continue
            following = before[left + 1] if left + 1 < len(before) else here
            if (y[following] - y[here]) * wide >= tall * (x[following] - x[here]):
                break
            left += 1
        found[at - 1] = tall / wide
    return found


def _push(corners: list[int], new: int, x: Sequence[int], y: Sequence[int]) -> None:
    """Put a point to the corners of the curve below all points so far; those that lie above it then are none."""
    while len(corners) > 1:
        one, other = corners[-2], corners[-1]
        if (y[other] - y[one]) * (x[new] - x[other]) < (y[new] - y[other]) * (x[other] - x[one]):
            break
        corners.pop()
    corners.append(new)


def _next_corners(x: Sequence[int], y: Sequence[int]) -> list[int]:
    """Of each point, the next corner of the curve below it and all that follow; 0 of the last."""
    after, corners = [0] * len(x), list[int]()
    flipped = [-place for place in x]  # from the right, the same curve
    for new in range(len(x) - 1, -1, -1):
        _push(corners, new, flipped, y)
        after[new] = corners[-2] if len(corners) > 1 else 0
    return after
