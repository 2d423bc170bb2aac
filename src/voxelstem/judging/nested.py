"""Small cohorts: every labelled subject predicted by a head that had not seen it, beside the baselines.

A test set of a dozen subjects says little. Cross-fitting over all labelled subjects asks each of them once in every
repeat, and whatever the task chooses by itself (a penalty, a number of steps) it chooses within the outer fold's
training part (nested cross-validation; Varma & Simon 2006). The figures are of the way to adapt, fitted to most of the
cohort, and not of the run's own head; intervals resample subjects and are too narrow where there are few of them
(Bates, Hastie & Tibshirani 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from voxelstem.adapted import TUNED, Adapted, needs_tokens
from voxelstem.certainty.crossfit import CrossFitted, answering, cross_fit, seed_of
from voxelstem.certainty.folds import Folds, asked_folds, strata_of
from voxelstem.choosing.ladder import CANNOT
from voxelstem.errors import IngestError
from voxelstem.features import FeaturesOf, embedder, examples_of, in_region
from voxelstem.judging.contest import Contest, intensity_features
from voxelstem.metrics import Interval
from voxelstem.model import Model
from voxelstem.progress import Advance, progress
from voxelstem.protocols import Example
from voxelstem.samepeople import same_people
from voxelstem.store import Record
from voxelstem.truth import class_names, is_aligned

When = Literal["few", "always", "never"]
FEW = 20
"""Below this many test subjects a scan-level run is cross-fitted too, if `few` is asked for."""
REPEATS = 3
VOXEL_REPEATS = 1
"""Where voxels are labelled, heads take long to fit, and every scan gives thousands of answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedScore:
    """A line of the table: one contestant, one metric, every labelled subject as unseen."""

    name: str
    metric: str
    value: Interval
    over_scratch: Interval | None
    """By how much it is better than the same network untrained, paired by subject; None for that itself."""
    over_intensity: Interval | None
    """And than intensity features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nested:
    """What cross-fitting over all labelled subjects found of one run, or why it was not done."""

    run: str
    subjects: int
    folds: int
    repeats: int
    scores: tuple[NestedScore, ...]
    why: str = ""
    """Why there are no scores; empty where there are some."""


def is_wanted(when: When, adapted: Adapted, contest: Contest) -> bool:
    """Whether a run is cross-fitted: always, never, or where few are tested and heads are fitted to whole scans."""
    if when == "few":
        return len(contest.subjects) < FEW and not adapted.task.voxels
    return when == "always"


def nested(name: str, adapted: Adapted, contest: Contest, model: Model, folder: Path) -> Nested:
    """Cross-fit a frozen run's way to adapt, the same network untrained, and plain intensities, in the same folds.

    Args:
        name: What the table calls the run.
        adapted: The run: its task, mode, seed, and what it sees.
        contest: Its store and truth.
        model: Its network.
        folder: Where embeddings rest.
    """
    reason = _not_possible(adapted)
    if reason:
        return _without(name, reason)
    voxels = adapted.task.voxels
    records = _labelled(adapted, contest)
    classes = class_names(contest.truth, records, voxels=voxels)
    makers = _contestants(name, adapted, contest, model, folder)
    try:
        first = _examples(contest, records, next(iter(makers.values()))[0]())
        together = same_people(contest.store, records, folder)
        strata = strata_of(first, classes, together=together)
        repeats = VOXEL_REPEATS if voxels else REPEATS
        told = contest.truth.folds
        plan = asked_folds(strata, count="auto", told=told, repeats=repeats, seed=adapted.config.seed)
        found: dict[str, CrossFitted] = {}
        with progress(f"evaluate: {name}, cross-fitted", len(makers) * sum(len(folds.held) for folds in plan)) as step:
            for who, several in makers.items():
                examples = [first] if who == name else [_examples(contest, records, make()) for make in several]
                found[who] = _repeated(adapted, classes, examples, plan, step)
    except (*CANNOT, IngestError) as error:
        return _without(name, f"the labelled subjects cannot be cross-fitted: {error}")
    return Nested(
        run=name,
        subjects=len(strata.kinds),
        folds=len(plan[0].held),
        repeats=len(plan),
        scores=tuple(_scores(adapted, found)),
    )


def _not_possible(adapted: Adapted) -> str:
    if is_aligned(adapted.task):
        return "prompts are not fitted to labels"
    if adapted.config.mode in TUNED:
        return "every fold would have to train the network anew"
    return ""


def _without(name: str, why: str) -> Nested:
    return Nested(run=name, subjects=0, folds=0, repeats=0, scores=(), why=why)


def _labelled(adapted: Adapted, contest: Contest) -> tuple[Record, ...]:
    """All labelled scans, of every split; of voxels those that name all the run's classes."""
    if not adapted.task.voxels:
        return contest.truth.records
    return tuple(r for r in contest.truth.records if set(contest.classes) <= set(r.classes.values()))


def _contestants(
    name: str, adapted: Adapted, contest: Contest, model: Model, folder: Path
) -> Mapping[str, Sequence[Callable[[], FeaturesOf]]]:
    """Makers of features: of the run, of untrained networks (one for each repeat), of intensities."""
    see, tokens = adapted.config.see, needs_tokens(adapted.task, adapted.config.mode)
    repeats = VOXEL_REPEATS if adapted.task.voxels else REPEATS

    def of(network: Model) -> FeaturesOf:
        return embedder(network, contest.store, folder, tokens=tokens, see=see)

    def bright() -> FeaturesOf:
        patch_ijk = model.backbone.patch_ijk if tokens or see.region else None
        plain = intensity_features(contest.store, model.spec, patch_ijk)
        if not see.region:
            return plain
        return lambda key: in_region(plain(key), contest.store, key, see.region)

    untrained = [lambda seed=seed: of(model.scratch(seed=seed)) for seed in range(repeats)]
    return {name: [lambda: of(model)], "scratch": untrained, "intensity": [bright]}


def _examples(contest: Contest, records: Sequence[Record], features: FeaturesOf) -> list[Example]:
    return list(examples_of(contest.store, records, contest.truth, features, contest.task))


def _repeated(
    adapted: Adapted,
    classes: tuple[str, ...],
    several: Sequence[Sequence[Example]],
    plan: Sequence[Folds],
    step: Advance,
) -> CrossFitted:
    """Cross-fit each repeat by itself; contestants with features of several seeds take another for each."""
    task, config = adapted.task, adapted.config
    mode = config.mode
    parts = [
        cross_fit(
            answering(task, several[repeat % len(several)], classes, mode=mode),
            [folds],
            seed=seed_of(config.seed, repeat, 0),
            advance=step,
        )
        for repeat, folds in enumerate(plan)
    ]
    return CrossFitted(
        by_subject={subject: tuple(part.by_subject[subject][0] for part in parts) for subject in parts[0].by_subject}
    )


def _scores(adapted: Adapted, found: Mapping[str, CrossFitted]) -> list[NestedScore]:
    return [
        NestedScore(
            name=who,
            metric=metric,
            value=own.figure(adapted.task, metric),
            over_scratch=None if who == "scratch" else own.better_than(found["scratch"], adapted.task, metric),
            over_intensity=None if who == "intensity" else own.better_than(found["intensity"], adapted.task, metric),
        )
        for metric in adapted.task.metrics
        for who, own in found.items()
    ]
