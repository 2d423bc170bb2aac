"""Small cohorts: every labelled subject predicted by a head that had not seen it, beside the baselines.

A test set of a dozen subjects says little. Cross-fitting over all labelled subjects asks each of them once in every
repeat, and whatever the task chooses by itself (a penalty, a number of steps) it chooses within the outer fold's
training part (nested cross-validation; Varma & Simon 2006). The figures are of the way to adapt, fitted to most of the
cohort, and not of the run's own head; intervals resample subjects and are too narrow where there are few of them
(Bates, Hastie & Tibshirani 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from voxelstem.adapted import TUNED, Adapted, needs_tokens
from voxelstem.certainty.crossfit import Answer, CrossFitted, Outcomes, answering, cross_fit, seed_of
from voxelstem.certainty.folds import Folds, asked_folds, strata_of
from voxelstem.choosing.ladder import CANNOT
from voxelstem.errors import IngestError
from voxelstem.features import FeaturesOf, embedder, examples_of, in_region
from voxelstem.judging.contest import (
    RADIOMICS,
    Contest,
    intensity_features,
    mode_of,
    radiomics_features,
    usual,
)
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
    notes: tuple[str, ...] = ()
    """What must be known of the scores, each a sentence about the run."""


CHOSEN = (
    "mode auto chose how this run adapts with its labelled subjects before these folds were drawn, and did not choose "
    "anew in each of them: its figures here are a little too good"
)
NO_RADIOMICS = f"{RADIOMICS}: NOT MEASURED, a scan lacks one of the features: see the log"


def is_wanted(when: When, adapted: Adapted, contest: Contest) -> bool:
    """Whether a run is cross-fitted: always, never, or where few are tested and heads are fitted to whole scans."""
    if when == "few":
        return len(contest.subjects) < FEW and not adapted.task.voxels
    return when == "always"


def nested(name: str, adapted: Adapted, contest: Contest, model: Model, folder: Path) -> Nested:
    """Cross-fit a frozen run's way to adapt and what it must beat in the same folds.

    That is the same network untrained, plain intensities, radiomics, and what is said without a look at the scan; where
    voxels are labelled, the first two.

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
    everybody = replace(contest, labelled=records, tested=records, classes=classes)
    makers = _contestants(adapted, everybody, model, folder)
    try:
        first = _examples(everybody, _embedded(adapted, contest, model, folder))
        together = same_people(contest.store, records, folder)
        strata = strata_of(first, classes, together=together)
        repeats = VOXEL_REPEATS if voxels else REPEATS
        told = contest.truth.folds
        plan = asked_folds(strata, count="auto", told=told, repeats=repeats, seed=adapted.config.seed)
        own: Makers = {name: [lambda: answering(adapted.task, first, classes, mode=adapted.config.mode)]}
        fits = (1 + len(makers)) * sum(len(folds.held) for folds in plan)
        with progress(f"evaluate: {name}, cross-fitted", fits) as step:
            found = {
                who: _repeated(adapted, [make() for make in several], plan, step)
                for who, several in (own | makers).items()
            }
    except (*CANNOT, IngestError) as error:
        return _without(name, f"the labelled subjects cannot be cross-fitted: {error}")
    return Nested(
        run=name,
        subjects=len(strata.kinds),
        folds=len(plan[0].held),
        repeats=len(plan),
        scores=tuple(_scores(adapted, found, floor="" if voxels else usual(everybody)[0])),
        notes=tuple(_notes(adapted, found)),
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


Makers = dict[str, Sequence[Callable[[], Answer]]]
"""Of each contestant: what makes its answers, for each repeat in turn."""


def _contestants(adapted: Adapted, everybody: Contest, model: Model, folder: Path) -> Makers:
    """Untrained networks (one for each repeat), intensities, radiomics where all have it, and the floor."""
    see, tokens, task = adapted.config.see, needs_tokens(adapted.task, adapted.config.mode), adapted.task

    def fitted(features: Callable[[], FeaturesOf], *, parts: bool = True) -> Callable[[], Answer]:
        mode = mode_of(task, adapted.config.mode, parts=parts)
        return lambda: answering(task, _examples(everybody, features()), everybody.classes, mode=mode)

    def bright() -> FeaturesOf:
        patch_ijk = model.backbone.patch_ijk if tokens or see.region else None
        plain = intensity_features(everybody.store, model.spec, patch_ijk)
        if not see.region:
            return plain
        return lambda key: in_region(plain(key), everybody.store, key, see.region)

    def untrained(seed: int) -> Callable[[], FeaturesOf]:
        return lambda: _embedded(adapted, everybody, model.scratch(seed=seed), folder)

    repeats = VOXEL_REPEATS if task.voxels else REPEATS
    found: Makers = {"scratch": [fitted(untrained(seed)) for seed in range(repeats)], "intensity": [fitted(bright)]}
    if task.voxels:
        return found
    told = radiomics_features(everybody.store, everybody.labelled, see.region)
    radiomics: Makers = {} if told is None else {RADIOMICS: [fitted(lambda: told, parts=False)]}
    return found | radiomics | {usual(everybody)[0]: [lambda: _floor(everybody)]}


def _floor(everybody: Contest) -> Answer:
    """What is said of those held out without a look at their scans: by those learned from alone, as everything is."""

    def answer(kept: frozenset[str], held: frozenset[str], _: int) -> Outcomes:
        labelled, tested = (
            tuple(record for record in everybody.labelled if record.subject in some) for some in (kept, held)
        )
        return usual(replace(everybody, labelled=labelled, tested=tested))[1]()

    return answer


def _embedded(adapted: Adapted, contest: Contest, network: Model, folder: Path) -> FeaturesOf:
    tokens = needs_tokens(adapted.task, adapted.config.mode)
    return embedder(network, contest.store, folder, tokens=tokens, see=adapted.config.see)


def _examples(everybody: Contest, features: FeaturesOf) -> list[Example]:
    return list(examples_of(everybody.store, everybody.labelled, everybody.truth, features, everybody.task))


def _repeated(adapted: Adapted, several: Sequence[Answer], plan: Sequence[Folds], step: Advance) -> CrossFitted:
    """Cross-fit each repeat by itself; contestants with features of several seeds take another for each."""
    seeds = [seed_of(adapted.config.seed, repeat, 0) for repeat in range(len(plan))]
    parts = [
        cross_fit(several[repeat % len(several)], [folds], seed=seeds[repeat], advance=step)
        for repeat, folds in enumerate(plan)
    ]
    return CrossFitted(
        by_subject={subject: tuple(part.by_subject[subject][0] for part in parts) for subject in parts[0].by_subject}
    )


def _notes(adapted: Adapted, found: Mapping[str, CrossFitted]) -> list[str]:
    missing = not adapted.task.voxels and RADIOMICS not in found
    return [note for note, true in ((CHOSEN, adapted.card.chosen), (NO_RADIOMICS, missing)) if true]


def _scores(adapted: Adapted, found: Mapping[str, CrossFitted], *, floor: str) -> list[NestedScore]:
    """Every metric of everybody, but no correlation of a mean.

    The mean of those learned from is low in a fold that holds high numbers out: over folds it would run against them.
    """
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
        if (who, metric) != (floor, "r")
    ]
