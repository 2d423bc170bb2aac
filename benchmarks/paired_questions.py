"""What paired.py asks of vectors of scans and texts, and how answers become figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from paired_spaces import Pairs, Vectors, unit

from voxelstem.metrics import Interval, auroc, bootstrap_interval
from voxelstem.prompts import Prompts

RANKS = (1, 5, 10)
SECTIONS = {"report": ("findings_text", "impression_text"), "impression": ("impression_text",)}
PRESENT: dict[str, Callable[[Mapping[str, str]], bool]] = {
    "effusion_left": lambda said: said["effusion"] in ("left", "both"),
    "effusion_right": lambda said: said["effusion"] in ("right", "both"),
    "lung_nodule": lambda said: said["lung_side"] != "none",
    "lung_nodule_left": lambda said: said["lung_side"] == "left",
    "lung_nodule_right": lambda said: said["lung_side"] == "right",
    "liver_lesion": lambda said: said["liver_lobe"] != "none",
    "liver_lesion_left": lambda said: said["liver_lobe"] == "left",
    "liver_lesion_right": lambda said: said["liver_lobe"] == "right",
    "kidney_absent_left": lambda said: said["kidneys"] == "left absent",
    "kidney_absent_right": lambda said: said["kidneys"] == "right absent",
    "spleen_enlarged": lambda said: said["spleen"] == "enlarged",
    "spleen_absent": lambda said: said["spleen"] == "absent",
    "contrast": lambda said: said["contrast"] == "portal",
}
"""When the classes of the prompt set are true."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number of the tables."""

    contestant: str
    question: str
    metric: str
    value: Interval
    seeds: tuple[float, ...]
    asked: int
    """Scans or texts that were asked about."""
    chance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What one network answered to one question, for each patient, and how that becomes a number."""

    by_subject: Mapping[str, Any]
    measure: Callable[[Sequence[Any]], float]
    asked: int
    chance: float


Asked = dict[tuple[str, str], Answers]
"""By question and metric."""


def figures_of(name: str, seeds: Sequence[Asked], draws: int) -> list[Figure]:
    """The mean over seeds of every number; patients are resampled, in all seeds the same."""
    found: list[Figure] = []
    for question, metric in seeds[0]:
        parts = [answers[question, metric] for answers in seeds]
        first = parts[0]
        together = {who: [part.by_subject[who] for part in parts] for who in first.by_subject}

        def over_seeds(sample: Sequence[Any], measure: Callable[[Any], float] = first.measure) -> float:
            return float(np.mean([measure(column) for column in zip(*sample, strict=True)]))

        value = bootstrap_interval(together, over_seeds, draws=draws)
        each = tuple(part.measure(list(part.by_subject.values())) for part in parts)
        found.append(
            Figure(
                contestant=name,
                question=question,
                metric=metric,
                value=value,
                seeds=each,
                asked=first.asked,
                chance=first.chance,
            )
        )
    return found


def recalls(vectors: Vectors, held: Pairs) -> Asked:
    """Every scan is looked for by its text among all scans, and the reverse."""
    found: Asked = {}
    pool = len(held.keys)
    for section, parts in SECTIONS.items():
        near = vectors.embed(held.texts(parts)) @ vectors.scans.T
        own = np.diagonal(near)
        # Ties count against the right one.
        ranks = {
            "text to scan": (near >= own[:, None]).sum(axis=1),
            "scan to text": (near >= own[None]).sum(axis=0),
        }
        for way, rank in ranks.items():
            for place in RANKS:
                hits = dict(zip(held.subjects, (rank <= place).astype(float).tolist(), strict=True))
                found[f"{way}, by {section}, pool {pool}", f"recall@{place}"] = Answers(
                    by_subject=hits, measure=_mean, asked=pool, chance=place / pool
                )
    return found


def ensemble(vectors: Vectors, prompts: Sequence[str]) -> np.ndarray:
    """Mean of the unit vectors of several ways to say one thing."""
    return unit(vectors.embed(list(prompts)).mean(axis=0))


def sides(vectors: Vectors, held: Pairs, prompts: Prompts) -> Asked:
    """Left or right, for every finding that lies on one side alone; also of mirror images."""
    found: Asked = {}
    every: dict[str, dict[str, list[float]]] = {"right side": {}, "mirror image: right side": {}, "answer flips": {}}
    for name, (left, right) in prompts.sides.items():
        towards = ensemble(vectors, prompts.ensembles[right].positive) - ensemble(
            vectors, prompts.ensembles[left].positive
        )
        own: dict[str, dict[str, float]] = {metric: {} for metric in every}
        answers = zip(
            held.subjects, held.facts, vectors.scans @ towards > 0, vectors.mirrored @ towards > 0, strict=True
        )
        for who, said, answer, again in answers:
            truth = PRESENT[right](said)
            if truth == PRESENT[left](said):
                continue
            outcomes = (answer == truth, again != truth, again != answer)
            for metric, good in zip(every, outcomes, strict=True):
                own[metric][who] = float(good)
                every[metric].setdefault(who, []).append(float(good))
        for metric, by_subject in own.items():
            if by_subject:
                found[name, metric] = Answers(by_subject=by_subject, measure=_mean, asked=len(by_subject), chance=0.5)
    for metric, lists in every.items():
        asked = sum(map(len, lists.values()))
        found["all findings on one side", metric] = Answers(
            by_subject=lists, measure=lambda sample: _mean(np.concatenate(sample)), asked=asked, chance=0.5
        )
    return found


def negations(vectors: Vectors, held: Pairs, learned: Pairs, prompts: Prompts) -> Asked:
    """Said or denied, for every class that can be denied."""
    found: Asked = {}
    asked = {name: said for name, said in prompts.ensembles.items() if said.negative and name in PRESENT}
    measures = {"balanced accuracy": _raw, "balanced accuracy, threshold set": _set, "AUROC": _area}
    rows: list[np.ndarray] = []
    for name, said in asked.items():
        towards = ensemble(vectors, said.positive) - ensemble(vectors, said.negative)
        truth, known = (np.array([PRESENT[name](one) for one in pairs.facts]) for pairs in (held, learned))
        leans = vectors.scans @ towards
        rows.append(np.stack([truth, leans > 0, leans > threshold(known, vectors.learned @ towards), leans]))
        by_subject = dict(zip(held.subjects, rows[-1].T, strict=True))
        for metric, measure in measures.items():
            found[name, metric] = Answers(by_subject=by_subject, measure=measure, asked=len(truth), chance=0.5)
    whole = dict(zip(held.subjects, np.stack(rows).transpose(2, 0, 1), strict=True))
    for metric, measure in measures.items():

        def over_classes(sample: Sequence[np.ndarray], measure: Callable[[Any], float] = measure) -> float:
            return float(np.nanmean([measure(column) for column in np.stack(sample, axis=1)]))

        found["mean of all classes", metric] = Answers(
            by_subject=whole, measure=over_classes, asked=len(held.keys), chance=0.5
        )
    return found


def _mean(sample: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(sample))


def _raw(sample: Sequence[np.ndarray]) -> float:
    rows = np.asarray(sample)
    return _balanced(rows[:, 0] > 0, rows[:, 1] > 0)


def _set(sample: Sequence[np.ndarray]) -> float:
    rows = np.asarray(sample)
    return _balanced(rows[:, 0] > 0, rows[:, 2] > 0)


def _area(sample: Sequence[np.ndarray]) -> float:
    rows = np.asarray(sample)
    return auroc(rows[:, 0] > 0, rows[:, 3])


def _balanced(truth: np.ndarray, answer: np.ndarray) -> float:
    if truth.all() or not truth.any():
        return float("nan")
    return 0.5 * (float(answer[truth].mean()) + float((~answer[~truth]).mean()))


def threshold(truth: np.ndarray, leans: np.ndarray) -> float:
    """Where the balanced accuracy on these scans is best; 0 where they are all alike."""
    if truth.all() or not truth.any():
        return 0.0
    order = np.sort(leans)
    tried = 0.5 * (order[1:] + order[:-1])
    return float(max(tried, key=lambda cut: _balanced(truth, leans > cut)))
