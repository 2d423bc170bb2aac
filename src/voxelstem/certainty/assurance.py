"""How sure a run may be of what it says: fitted to answers about subjects whom the answering head had not seen.

Heads over frozen networks are cross-fitted over their own labelled subjects, which costs no further label. A network
that was trained itself would have to be trained anew for every fold: its answers are calibrated on subjects that were
held out of its training, or not at all (`finetune.sure`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from voxelstem.certainty.calibrators import Temperature, fit_temperature, log_probabilities
from voxelstem.certainty.conformal import ConformalIntervals, ConformalSets, fit_intervals, fit_sets
from voxelstem.certainty.crossfit import rows_of
from voxelstem.certainty.familiar import fit_familiar
from voxelstem.certainty.strangeness import KnownClasses, NearestKnown
from voxelstem.certainty.vennabers import VennAbers, fit_venn_abers
from voxelstem.certainty.volumes import rows_of_sizes
from voxelstem.certainty.yesno import Told, YesNo, fit_yesno
from voxelstem.findings import MM3_PER_ML, VOLUME_UNIT, Certainty, Curve, Finding, Novelty, Quantity, Weights
from voxelstem.protocols import Example
from voxelstem.study import Acquisition

LEVEL = 0.9
"""Share of new subjects for whom sets and intervals are made to hold the truth."""
FEWEST = 10
"""Answers that a calibrator is fitted to at least; of yes and no so many of either kind."""
VENN_ABERS = "venn_abers"
HALF = 0.5
_PARTS: Mapping[str, Any] = {
    "calibrator": Temperature,
    "between": VennAbers,
    "sets": ConformalSets,
    "intervals": ConformalIntervals,
    "yesno": YesNo,
    "volumes": ConformalIntervals,
    "group_sets": ConformalSets,
    "group_intervals": ConformalIntervals,
    "known": NearestKnown,
    "centres": KnownClasses,
    "inside": NearestKnown,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Assurance:
    """What is known of the answers of a head; None where that could not be had, and `notes` say why."""

    calibrator: Temperature | None = None
    """Makes probabilities of classes come true as often as they say."""
    between: VennAbers | None = None
    """Between which ends the probability of a class lies; it is asked for probabilities as the head states them."""
    sets: ConformalSets | None = None
    """The classes that cannot be ruled out, from calibrated probabilities."""
    intervals: ConformalIntervals | None = None
    """About a predicted number."""
    yesno: YesNo | None = None
    """Calibrates answers that do not exclude each other: whether a class is there, whether a box is right."""
    volumes: ConformalIntervals | None = None
    """About the volume of each structure, which is its group, as a share of that volume."""
    group_sets: ConformalSets | None = None
    """As `sets`, with a threshold for every group of scans, such as those of one maker: see `of_group`."""
    group_intervals: ConformalIntervals | None = None
    """As `intervals`, likewise."""
    known: NearestKnown | None = None
    """The labelled scans, to hold new ones against."""
    centres: KnownClasses | None = None
    """The means of their classes, to hold new ones against: `evaluate` shows it beside `known`."""
    inside: NearestKnown | None = None
    """As `known`, of a tuned network: by vectors from inside of it (`finetune.inside`), as its features are answers."""
    subjects: int = 0
    """How many unseen subjects all that was fitted to answers was fitted to."""
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

    def ends(self, probabilities: Float[np.ndarray, "classes"]) -> Float[np.ndarray, "2 classes"] | None:
        """Between which ends each class's probability lies: Venn-Abers's, reaching out to the calibrated one.

        None where no such intervals were made. A wider interval holds whatever the narrower one held.
        """
        if self.between is None:
            return None
        found, chances = self.between.apply(probabilities[None].astype(np.float64)), self.chances(probabilities)
        return np.stack([np.minimum(found.low[0], chances), np.maximum(found.high[0], chances)])

    def of_group(self, group: str) -> Assurance:
        """The same for a scan of a group: sets and intervals are the group's own where it has any, else the common."""
        found = self
        for part, grouped in (("sets", self.group_sets), ("intervals", self.group_intervals)):
            if grouped is not None and group in grouped.thresholds.groups and group not in grouped.thresholds.lacking:
                found = replace(found, **{part: replace(grouped, thresholds=grouped.thresholds.of_group(group))})
        return found

    def certainty(self, classes: Sequence[str], probabilities: Float[np.ndarray, "classes"]) -> tuple[str, Certainty]:
        """The most probable class, and how sure that is."""
        chances, ends = self.chances(probabilities), self.ends(probabilities)
        best = int(chances.argmax())
        kept = None if self.sets is None else self.sets.apply(chances[None]).members[0]
        return classes[best], Certainty(
            probability=float(chances[best]),
            low=None if ends is None else float(ends[0, best]),
            high=None if ends is None else float(ends[1, best]),
            interval="" if ends is None else VENN_ABERS,
            calibration="none" if self.calibrator is None else "temperature",
            conformal=None if kept is None else tuple(name for name, there in zip(classes, kept, strict=True) if there),
            level=None if self.sets is None else LEVEL,
        )

    def present(self, name: str, chance: float) -> Certainty:
        """How sure it is that something is there, a class or the thing in a box, by the chance that the head states."""
        if self.yesno is None or name not in self.yesno:
            return Certainty(probability=chance)
        said = self.yesno.apply(name, chance)
        return Certainty(
            probability=said.probability, low=said.low, high=said.high, interval=VENN_ABERS, calibration="platt"
        )

    def answered(self, name: str, chance: float, *, threshold: float = HALF) -> tuple[bool, Certainty]:
        """Yes or no to a question, and how sure that answer is.

        The answer is yes from `threshold` on of the chance that the head states: the rule by which the answers of a
        run are scored. Calibrated is how often such an answer is right, which may be below one half: a head that lets
        yes and no weigh alike says yes of something rare before it is the more probable.
        """
        sure = self.present(name, chance)
        if chance >= threshold or sure.probability is None:
            return chance >= threshold, sure
        low, high = (None if end is None else 1 - end for end in (sure.high, sure.low))
        return False, replace(sure, probability=1 - sure.probability, low=low, high=high)

    def box(self, name: str, score: float) -> Certainty:
        """How sure it is that a box is right. Where boxes of this name were not calibrated, its score stays a score.

        A detector is fitted to tokens of which it is made to see as many amid things as off them, and says 0.9 of boxes
        of which one in thousands is right.
        """
        return self.present(name, score) if self.yesno is not None and name in self.yesno else Certainty(score=score)

    def quantity(self, value: float, unit: str) -> Quantity:
        """A predicted number with its interval."""
        if self.intervals is None:
            return Quantity(value=value, unit=unit)
        found = self.intervals.apply(np.array([value]))
        low, high = float(found.low[0]), float(found.high[0])
        return Quantity(value=value, unit=unit, low=low, high=high, level=LEVEL)

    def volume(self, name: str, value_ml: float) -> Quantity | None:
        """A structure's volume with its interval, which is never below 0; None where there is none for it."""
        if self.volumes is None or value_ml <= 0:
            return None
        value = np.array([value_ml])
        found = self.volumes.apply(value, groups=[name], spread=value)
        if found.lacking:
            return None
        low, high = max(float(found.low[0]), 0.0), float(found.high[0])
        return Quantity(value=value_ml, unit=VOLUME_UNIT, low=low, high=high, level=LEVEL)

    def sized(self, finding: Finding) -> Finding:
        """The same segment with the interval of its volume in ml, where there is one for its structure."""
        volume_mm3 = None if finding.place is None else finding.place.volume_mm3
        if finding.kind != "segment" or finding.part or not volume_mm3:
            return finding
        size = self.volume(finding.name, volume_mm3 / MM3_PER_ML)
        return finding if size is None else replace(finding, quantity=size)

    def outlook(
        self,
        weights: Weights,
        days: Float[np.ndarray, "moment"],
        survival: Float[np.ndarray, "moment"],
    ) -> Finding:
        """A curve as a finding: it begins after the scan, and does not rise where rounding would have it so."""
        later = days > 0
        falling = np.minimum.accumulate(np.clip(survival[later], 0.0, 1.0))
        curve = Curve(days=tuple(days[later].tolist()), survival=tuple(falling.tolist()))
        return Finding(name=weights.name, kind="survival", weights=weights, curve=curve)

    def novelty(self, scan: Float[np.ndarray, "dim"]) -> Novelty | None:
        """Whether a scan's vector is unlike those of the labelled scans."""
        return None if self.known is None else _novelty(self.known, scan)

    def novelty_inside(self, vector: Float[np.ndarray, "dim"]) -> Novelty | None:
        """The same of a vector from inside a tuned network."""
        return None if self.inside is None else _novelty(self.inside, vector)


def _novelty(known: NearestKnown, scan: Float[np.ndarray, "dim"]) -> Novelty:
    found = known.apply(scan[None].astype(np.float64))
    return Novelty(flagged=bool(found.flagged[0]), score=float(found.score[0]), p=float(found.as_strange[0]))


def group_of(acquisition: Acquisition) -> str:
    """The group of a scan whose sets and intervals may have thresholds of their own: its scanner's maker, if known.

    It is the first word of the maker's name in small letters, so that the many names of one maker are one group.
    """
    words = re.findall(r"[^\W_]+", acquisition.facts.get("Manufacturer", ""))
    return words[0].casefold() if words else ""


def groups_each(scans: Iterable[tuple[str, Acquisition]]) -> dict[str, str]:
    """The group of each subject, of whose scans all are of it; who has scans of two, or one of none, is not there."""
    told: dict[str, set[str]] = {}
    for subject, acquisition in scans:
        told.setdefault(subject, set()).add(group_of(acquisition))
    return {subject: next(iter(own)) for subject, own in told.items() if len(own) == 1 and "" not in own}


def assure(
    outcomes: Mapping[str, Any],
    examples: Sequence[Example],
    *,
    groups: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Assurance:
    """Fit everything that these answers allow.

    Args:
        outcomes: Of unseen subjects: those of a classification (`truth`, `scores`, of one class or of each), of a
            number (`truth`, `predicted`), of boxes (`by_class`) or of volumes (`volumes.Sizes`); of other tasks
            nothing is fitted to them, and the notes say so.
        examples: The labelled scans, to hold new ones against.
        groups: Of subjects, where it is known: what their scans have in common, such as the scanner. A group with
            enough of them gets a threshold of its own (Vovk et al. 2005, section 4.5), beside that of all together,
            for which those count too whose group is not known.
        notes: What to say beside: why there are no outcomes, for one.
    """
    said = list(notes)
    parts: dict[str, Any] = {}
    first: Any = next(iter(outcomes.values()), None)
    if hasattr(first, "scores") and hasattr(first, "truth"):
        parts = _of_each(outcomes, said) if isinstance(first.truth, tuple) else _of_classes(outcomes, groups, said)
    elif hasattr(first, "predicted"):
        parts = _of_numbers(outcomes, groups, said)
    elif hasattr(first, "by_class"):
        parts = _of_boxes(outcomes, said)
    elif hasattr(first, "predicted_mm3"):
        parts = _of_volumes(outcomes, said)
    elif hasattr(first, "shares"):
        said.append("not calibrated: the probability of the answer is the share of the nearest labelled cases")
    elif first is not None:
        said.append("not calibrated: nothing is fitted to answers of this kind")
    familiar = fit_familiar(examples, level=LEVEL)
    subjects = len(outcomes) if parts else 0
    notes = (*said, *familiar.notes)
    return Assurance(**parts, known=familiar.known, centres=familiar.centres, subjects=subjects, notes=notes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Grouped:
    """Those whose group is known."""

    rows: Int[np.ndarray, "row"]
    groups: list[str]
    """Of each of these rows."""


def _grouped(subjects: Sequence[str], groups: Mapping[str, str] | None) -> _Grouped | None:
    """The rows of subjects of one known group; None where these are not of two groups at least."""
    told = [(groups or {}).get(subject, "") for subject in subjects]
    rows = [at for at, group in enumerate(told) if group]
    own = [told[at] for at in rows]
    return _Grouped(rows=np.array(rows, dtype=np.int64), groups=own) if len(set(own)) > 1 else None


def _of_classes(outcomes: Mapping[str, Any], groups: Mapping[str, str] | None, said: list[str]) -> dict[str, Any]:
    rows = rows_of(outcomes)
    if len(rows.subjects) < FEWEST:
        said.append(f"not calibrated: {len(rows.subjects)} subjects are fewer than {FEWEST}")
        return {}
    parts: dict[str, Any] = {"between": fit_venn_abers(rows.probabilities, rows.truth)}
    probabilities = rows.probabilities
    try:
        calibrator = fit_temperature(log_probabilities(probabilities), rows.truth, modest=True)
        parts["calibrator"], probabilities = calibrator, calibrator.apply(probabilities)
        if calibrator.at_bound:
            said.append(
                f"the temperature {calibrator.temperature:g} lies at the end of what is searched: these labels did not "
                "determine it, and probabilities say little"
            )
    except ValueError as error:
        said.append(f"not calibrated: {error}")
    try:
        parts["sets"] = fit_sets(probabilities, rows.truth, level=LEVEL)
    except ValueError as error:
        said.append(f"no conformal sets: {error}")
    if own := _grouped(rows.subjects, groups):
        try:
            parts["group_sets"] = fit_sets(
                probabilities[own.rows], rows.truth[own.rows], level=LEVEL, groups=own.groups
            )
        except ValueError as error:
            said.append(f"no conformal sets of groups: {error}")
    return parts


def _of_each(outcomes: Mapping[str, Any], said: list[str]) -> dict[str, Any]:
    """Classes that do not exclude each other: of each, the subjects of whom it is known."""
    subjects = sorted(outcomes)
    truth = np.array([outcomes[subject].truth for subject in subjects], dtype=np.float64)
    scores = np.array([outcomes[subject].scores for subject in subjects], dtype=np.float64)
    known = ~np.isnan(truth)
    told = {
        name: Told(chance=scores[known[:, at], at], there=truth[known[:, at], at] > HALF)
        for at, name in enumerate(outcomes[subjects[0]].classes)
    }
    return _yesno(told, "answers", said)


def _of_boxes(outcomes: Mapping[str, Any], said: list[str]) -> dict[str, Any]:
    """Boxes of unseen subjects: those that count in the task's own scores, and whether they were right."""
    told: dict[str, Told] = {}
    for name in dict.fromkeys(name for one in outcomes.values() for name in one.by_class):
        matched = [outcomes[subject].by_class[name] for subject in sorted(outcomes) if name in outcomes[subject]]
        scores, hits = ([value for one in matched for value in getattr(one, side)] for side in ("scores", "hits"))
        told[name] = Told(chance=np.array(scores, dtype=np.float64), there=np.array(hits, dtype=np.bool_))
    return _yesno(told, "boxes", said, ": their scores are no probabilities")


def _yesno(told: Mapping[str, Told], what: str, said: list[str], then: str = "") -> dict[str, Any]:
    found = fit_yesno(told, fewest=FEWEST)
    said += [f"{what} of '{name}' are not calibrated: {why}{then}" for name, why in found.lacking.items()]
    return {} if found.yesno is None else {"yesno": found.yesno}


def _of_volumes(outcomes: Mapping[str, Any], said: list[str]) -> dict[str, Any]:
    rows = rows_of_sizes(outcomes)
    try:
        found = fit_intervals(
            rows.predicted_mm3, rows.true_mm3, level=LEVEL, groups=rows.structures, spread=rows.predicted_mm3
        )
    except ValueError as error:
        said.append(f"volumes without intervals: {error}")
        return {}
    lacking = found.thresholds.lacking
    said += [f"the volume of '{name}' has no interval: too few labelled subjects show it" for name in lacking]
    return {"volumes": found}


def _of_numbers(outcomes: Mapping[str, Any], groups: Mapping[str, str] | None, said: list[str]) -> dict[str, Any]:
    subjects = sorted(outcomes)
    predicted, truth = (
        np.array([getattr(outcomes[subject], side) for subject in subjects], dtype=np.float64)
        for side in ("predicted", "truth")
    )
    try:
        parts = {"intervals": fit_intervals(predicted, truth, level=LEVEL)}
    except ValueError as error:
        said.append(f"no intervals: {error}")
        return {}
    if own := _grouped(subjects, groups):
        try:
            parts["group_intervals"] = fit_intervals(
                predicted[own.rows], truth[own.rows], level=LEVEL, groups=own.groups
            )
        except ValueError as error:
            said.append(f"no intervals of groups: {error}")
    return parts
