"""How sure a run may be of what it says: fitted to answers about subjects whom the answering head had not seen.

Heads over frozen networks are cross-fitted over their own labelled subjects, which costs no further label. A network
that was trained itself would have to be trained anew for every fold, and its answers are not calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from voxelstem.calibrators import Temperature, fit_temperature, log_probabilities
from voxelstem.conformal import ConformalIntervals, ConformalSets, fit_intervals, fit_sets
from voxelstem.crossfit import rows_of
from voxelstem.findings import Certainty, Curve, Finding, Novelty, Quantity, Weights
from voxelstem.protocols import Example
from voxelstem.strangeness import NearestKnown, fit_nearest

LEVEL = 0.9
"""Share of new subjects for whom sets and intervals are made to hold the truth."""
FEWEST = 10
"""Answers that a calibrator is fitted to at least."""
NEIGHBOURS = 5
_PARTS: Mapping[str, Any] = {
    "calibrator": Temperature,
    "sets": ConformalSets,
    "intervals": ConformalIntervals,
    "known": NearestKnown,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Assurance:
    """What is known of the answers of a head; None where that could not be had, and `notes` say why."""

    calibrator: Temperature | None = None
    """Makes probabilities of classes come true as often as they say."""
    sets: ConformalSets | None = None
    """The classes that cannot be ruled out, from calibrated probabilities."""
    intervals: ConformalIntervals | None = None
    """About a predicted number."""
    known: NearestKnown | None = None
    """The labelled scans, to hold new ones against."""
    subjects: int = 0
    """How many unseen subjects calibrator, sets and intervals were fitted to."""
    notes: tuple[str, ...] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """As it rests on disk, without the notes."""
        found = {"subjects": np.array(self.subjects)}
        for part in _PARTS:
            held = getattr(self, part)
            if held is not None:
                found |= {f"{part}.{name}": array for name, array in held.arrays().items()}
        return found

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], notes: Sequence[str] = ()) -> Assurance:
        """Read what `arrays` gave.

        Raises:
            ValueError: an array is missing, or they do not fit together.
        """
        parts: dict[str, Any] = {}
        for part, kind in _PARTS.items():
            own = {
                name.removeprefix(f"{part}."): array for name, array in arrays.items() if name.startswith(f"{part}.")
            }
            if own:
                parts[part] = kind.of(own)
        if "subjects" not in arrays:
            raise ValueError("the number of subjects is missing")
        return cls(**parts, subjects=int(arrays["subjects"]), notes=tuple(notes))

    def chances(self, probabilities: Float[np.ndarray, "classes"]) -> Float[np.ndarray, "classes"]:
        """Calibrated probabilities of classes, or the same ones."""
        return probabilities if self.calibrator is None else self.calibrator.apply(probabilities[None])[0]

    def certainty(self, classes: Sequence[str], probabilities: Float[np.ndarray, "classes"]) -> tuple[str, Certainty]:
        """The most probable class, and how sure that is."""
        chances = self.chances(probabilities)
        best = int(chances.argmax())
        kept = None if self.sets is None else self.sets.apply(chances[None]).members[0]
        return classes[best], Certainty(
            probability=float(chances[best]),
            calibration="none" if self.calibrator is None else "temperature",
            conformal=None if kept is None else tuple(name for name, there in zip(classes, kept, strict=True) if there),
            level=None if self.sets is None else LEVEL,
        )

    def quantity(self, value: float, unit: str) -> Quantity:
        """A predicted number with its interval."""
        if self.intervals is None:
            return Quantity(value=value, unit=unit)
        found = self.intervals.apply(np.array([value]))
        low, high = float(found.low[0]), float(found.high[0])
        return Quantity(value=value, unit=unit, low=low, high=high, level=LEVEL)

    def outlook(
        self,
        weights: Weights,
        days: Float[np.ndarray, "moment"],
        survival: Float[np.ndarray, "moment"],
        scan: Float[np.ndarray, "dim"],
    ) -> Finding:
        """A curve as a finding: it begins after the scan, and does not rise where rounding would have it so."""
        later = days > 0
        falling = np.minimum.accumulate(np.clip(survival[later], 0.0, 1.0))
        curve = Curve(days=tuple(days[later].tolist()), survival=tuple(falling.tolist()))
        return Finding(name=weights.name, kind="survival", weights=weights, curve=curve, novelty=self.novelty(scan))

    def novelty(self, scan: Float[np.ndarray, "dim"]) -> Novelty | None:
        """Whether a scan's vector is unlike those of the labelled scans."""
        if self.known is None:
            return None
        found = self.known.apply(scan[None].astype(np.float64))
        return Novelty(flagged=bool(found.flagged[0]), score=float(found.score[0]), p=float(found.as_strange[0]))


def assure(outcomes: Mapping[str, Any], examples: Sequence[Example], *, notes: Sequence[str] = ()) -> Assurance:
    """Fit everything that these answers allow.

    Args:
        outcomes: Of unseen subjects: those of a classification (`truth`, `scores`) or of a number (`truth`,
            `predicted`); of other tasks nothing is fitted to them.
        examples: The labelled scans, to hold new ones against.
        notes: What to say beside: why there are no outcomes, for one.
    """
    said = list(notes)
    parts: dict[str, Any] = {}
    first = next(iter(outcomes.values()), None)
    if hasattr(first, "scores") and hasattr(first, "truth"):
        parts = _of_classes(outcomes, said)
    elif hasattr(first, "predicted"):
        parts = _of_numbers(outcomes, said)
    known = _known(examples, said)
    return Assurance(**parts, known=known, subjects=len(outcomes) if parts else 0, notes=tuple(said))


def _of_classes(outcomes: Mapping[str, Any], said: list[str]) -> dict[str, Any]:
    rows = rows_of(outcomes)
    if len(rows.subjects) < FEWEST:
        said.append(f"not calibrated: {len(rows.subjects)} subjects are fewer than {FEWEST}")
        return {}
    parts: dict[str, Any] = {}
    probabilities = rows.probabilities
    try:
        calibrator = fit_temperature(log_probabilities(probabilities), rows.truth)
        parts["calibrator"], probabilities = calibrator, calibrator.apply(probabilities)
    except ValueError as error:
        said.append(f"not calibrated: {error}")
    try:
        parts["sets"] = fit_sets(probabilities, rows.truth, level=LEVEL)
    except ValueError as error:
        said.append(f"no conformal sets: {error}")
    return parts


def _of_numbers(outcomes: Mapping[str, Any], said: list[str]) -> dict[str, Any]:
    subjects = sorted(outcomes)
    predicted, truth = (
        np.array([getattr(outcomes[subject], side) for subject in subjects], dtype=np.float64)
        for side in ("predicted", "truth")
    )
    try:
        return {"intervals": fit_intervals(predicted, truth, level=LEVEL)}
    except ValueError as error:
        said.append(f"no intervals: {error}")
        return {}


def _known(examples: Sequence[Example], said: list[str]) -> NearestKnown | None:
    seen = [example for example in examples if example.features.scan.size]
    if not seen:
        return None
    try:
        rows = np.stack([example.features.scan for example in seen]).astype(np.float64)
        return fit_nearest(
            rows, [example.subject for example in seen], neighbours=min(NEIGHBOURS, max(len(seen) - 1, 1)), level=LEVEL
        )
    except ValueError as error:
        said.append(f"strange scans are not told apart: {error}")
        return None
