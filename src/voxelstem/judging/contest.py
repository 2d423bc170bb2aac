"""Contest: the same labelled scans, the same held-out scans and the same task for a run and for what it must beat."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float

from voxelstem import baselines, metrics, regions
from voxelstem.adapted import AdaptConfig, SeeConfig, needs_tokens
from voxelstem.aligned import Aligned
from voxelstem.answers import HALF, Answer, shares, truth_of
from voxelstem.engine.targets import volume_mm3
from voxelstem.features import FeaturesOf, embedder, examples_of, in_region, projector
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, Speaker, tune
from voxelstem.heads.manylabels import NO_YES, about
from voxelstem.model import Model
from voxelstem.progress import Advance, progress
from voxelstem.protocols import Example, Head, Task
from voxelstem.spent import Spent
from voxelstem.store import Record, Store
from voxelstem.study import VOLUME_LABEL, InputSpec
from voxelstem.tasks.classify import Classify, Guess, majority
from voxelstem.tasks.regress import Measured
from voxelstem.tasks.retrieve import Retrieve, by_chance
from voxelstem.tasks.survive import Survive
from voxelstem.tasks.zeroshot import Zeroshot
from voxelstem.truth import Truth

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blind:
    """Features of a scan that nobody looked at."""

    scan: Float[np.ndarray, "0"] = field(default_factory=lambda: np.zeros(0))
    tokens: None = None
    tokens_affine_ras: None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Vector:
    """Features of a scan that are numbers somebody measured."""

    scan: Float[np.ndarray, " column"]
    tokens: None = None
    tokens_affine_ras: None = None

    @property
    def measured(self) -> Bool[np.ndarray, " column"]:
        """All of them have units of their own."""
        return np.ones(len(self.scan), dtype=bool)


MORPHOMETRY, RADIOMICS = "morphometry", "radiomics"
INITS = 3
"""How many untrained networks stand for `scratch`."""
Outcomes = dict[str, Any]
"""Subject to outcome, as the task's `combine` gives it."""
Repeats = dict[str, tuple[Any, ...]]
"""Subject to the outcomes of several repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """What all contestants share: the same labelled scans, the same held-out scans, the same task."""

    store: Store
    truth: Truth
    task: Task
    mode: str
    classes: tuple[str, ...]
    labelled: tuple[Record, ...]
    tested: tuple[Record, ...]
    seed: int

    @property
    def subjects(self) -> tuple[str, ...]:
        """Who is tested."""
        return tuple(sorted({record.subject for record in self.tested}))

    def score(self, head: Head, features: FeaturesOf) -> Outcomes:
        """Outcomes of a fitted head on the held-out scans."""
        examples = examples_of(self.store, self.tested, self.truth, features, self.task)
        return self._join((example.subject, self.task.outcome(head, example)) for example in examples)

    def fit_and_score(self, features: FeaturesOf, *, parts: bool = True) -> Outcomes:
        """Fit the task's head to these features of the labelled scans, in the mode of `mode_of`, then score it."""
        examples = list(examples_of(self.store, self.labelled, self.truth, features, self.task))
        mode = mode_of(self.task, self.mode, parts=parts)
        head = self.task.fit(examples, self.classes, mode=mode, seed=self.seed)
        return self.score(head, features)

    def calibrated(self, head: Head, features: FeaturesOf) -> Head:
        """A head of prompts, set by these features of the labelled scans; as it is where none are labelled."""
        if not self.labelled:
            return head
        examples = list(examples_of(self.store, self.labelled, self.truth, features, self.task))
        return cast(Zeroshot, self.task).calibrate(head, examples)

    def answers(self, scored: Sequence[tuple[Example, tuple[float, ...]]]) -> Outcomes:
        """Outcomes of probabilities that came from somewhere else than prompts."""
        half = (HALF,) * len(self.classes)
        return self._join(
            (
                example.subject,
                Answer(classes=self.classes, truth=truth_of(self.classes, example), scores=scores, thresholds=half),
            )
            for example, scores in scored
        )

    def majority(self) -> Outcomes:
        """Say of every scan what most labelled scans are."""
        shares = majority([self.truth.labels[record.subject] for record in self.labelled], self.classes)
        return self._join(
            (record.subject, Guess(truth=self.classes.index(self.truth.labels[record.subject]), scores=shares))
            for record in self.tested
        )

    def by_chance(self) -> Outcomes:
        """Show the labelled scans in any order."""
        kinds = np.array([self.classes.index(self.truth.labels[record.subject]) for record in self.labelled])
        return self._join(
            (one.subject, by_chance(self.classes.index(self.truth.labels[one.subject]), kinds, len(self.classes)))
            for one in self.tested
        )

    def average(self) -> Outcomes:
        """Say of every scan the mean of the labelled subjects' numbers."""
        values = self.truth.values
        mean = metrics.mean([values[subject] for subject in sorted({record.subject for record in self.labelled})])
        return self._join(
            (record.subject, Measured(truth=values[record.subject], predicted=mean)) for record in self.tested
        )

    def kaplan_meier(self) -> Outcomes:
        """Say of every scan the Kaplan-Meier curve of the labelled subjects, and that all risks are equal."""

        def blind(_: str) -> Blind:
            return Blind()

        examples = list(examples_of(self.store, self.labelled, self.truth, blind, self.task))
        return self.score(cast(Survive, self.task).usual(examples, self.classes), blind)

    def morphometry(self) -> Outcomes | None:
        """What volumes of structures alone can do; None where no volume is known of all scans."""
        told = {
            record.key: {
                name: volume_mm3(text) for name, text in record.labels.items() if name.startswith(VOLUME_LABEL)
            }
            for record in (*self.labelled, *self.tested)
        }
        known = [{name for name, volume in volumes.items() if math.isfinite(volume)} for volumes in told.values()]
        columns = sorted(set[str].intersection(*known))
        if not columns:
            return None
        rows = {key: Vector(scan=np.array([volumes[name] for name in columns])) for key, volumes in told.items()}
        return self.fit_and_score(rows.__getitem__, parts=False)

    def atlas(self, spec: InputSpec, advance: Advance | None = None) -> Outcomes:
        """Carry the labels of the labelled scan with the most similar body over each held-out scan."""

        def look(record: Record) -> tuple[Any, baselines.Body]:
            if advance is not None:
                advance(1, note="atlas")
            return self._body(record, spec)

        known = [look(record) for record in self.labelled]

        def outcome(record: Record) -> tuple[str, Any]:
            scan, body = look(record)
            nearest = baselines.nearest(scan, [other for other, _ in known])
            labels = self.store.labels(self.labelled[nearest].key)
            truth = self.store.labels(record.key)
            assert labels is not None
            assert truth is not None
            carried = baselines.carry(labels, known[nearest][1], body, record.shape_ijk)
            task: Any = self.task
            return record.subject, task.outcome_of_labels(carried, truth, record.affine_ras, self.classes)

        return self._join(map(outcome, self.tested))

    def _body(self, record: Record, spec: InputSpec) -> tuple[Any, baselines.Body]:
        volume = self.store.volume(record.key)
        return baselines.intensity(volume, spec, token_mm=None).scan, baselines.find_body(volume)

    def _join(self, scored: Iterable[tuple[str, Any]]) -> Outcomes:
        by_subject: dict[str, list[Any]] = {}
        for subject, outcome in scored:
            by_subject.setdefault(subject, []).append(outcome)
        return {subject: self.task.combine(outcomes) for subject, outcomes in by_subject.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What stands beside a run, and what it took to fit those of which that is known."""

    repeats: dict[str, Repeats]
    spent: dict[str, Spent] = field(default_factory=dict)


def plain_baselines(contest: Contest, model: Model, see: SeeConfig, folder: Path) -> Beside:
    """Outcomes of everything that a model must beat, fitted to the same labels; embeddings rest in `folder`."""
    began = time.monotonic()
    tokens = needs_tokens(contest.task, contest.mode)
    scans = len(contest.labelled) + len(contest.tested)
    with progress("evaluate: baselines", (INITS + 2) * scans) as advance:
        untrained: list[Outcomes] = []
        for seed in range(INITS):
            fresh = embedder(model.scratch(seed=seed), contest.store, folder, tokens=tokens, see=see)
            untrained.append(contest.fit_and_score(counted(fresh, advance, note="scratch")))
        spent = Spent.since(began)
        simple = simple_baselines(contest, model, see.region, advance)
    scratch = {subject: tuple(outcomes[subject] for outcomes in untrained) for subject in untrained[0]}
    return Beside(repeats={"scratch": scratch} | simple, spent={"scratch": spent})


def tuned_baselines(contest: Contest, model: Model, config: AdaptConfig) -> Beside:
    """What a network that was trained whole must beat: itself from scratch, with the same labels, steps and seed."""
    untrained, full = model.scratch(seed=config.seed), config.full or FinetuneConfig()
    asked = Asked.of(config.task, contest.task, contest.truth, contest.classes)
    began = time.monotonic()
    head, card, tensors = tune(untrained, contest.store, contest.labelled, asked, full, seed=config.seed)
    spent = Spent.since(began)
    untrained.backbone.load_state_dict(tensors)
    speaker = Speaker(dataclasses.replace(untrained, card=card), head, contest.store, asked, full)
    scans = len(contest.labelled) + len(contest.tested)
    with progress("evaluate: baselines", 2 * scans + len(contest.tested)) as advance:
        scratch = once(contest.score(head, counted(speaker, advance, note="scratch")))
        repeats = {"scratch": scratch} | simple_baselines(contest, model, "", advance)
    return Beside(repeats=repeats, spent={"scratch": spent})


def simple_baselines(contest: Contest, model: Model, region: str, advance: Advance) -> dict[str, Repeats]:
    """What can be done without a network: by intensities, by radiomics, by what is usual, and by known volumes."""
    voxels = contest.task.voxels
    patch_ijk = model.backbone.patch_ijk if needs_tokens(contest.task, contest.mode) or region else None
    plain = intensity_features(contest.store, model.spec, patch_ijk)

    def bright(key: str, /) -> Any:
        return in_region(plain(key), contest.store, key, region) if region else plain(key)

    found = {"intensity": once(contest.fit_and_score(counted(bright, advance, note="intensity")))}
    if voxels:
        return found | {"atlas": once(contest.atlas(model.spec, advance))}
    told = radiomics_features(contest.store, (*contest.labelled, *contest.tested), region)
    if told is not None:
        found[RADIOMICS] = once(contest.fit_and_score(told, parts=False))
    name, said = usual(contest)
    found[name] = once(said())
    advance(len(contest.labelled) + len(contest.tested), note=name)
    measured = contest.morphometry()
    return found | ({} if measured is None else {MORPHOMETRY: once(measured)})


def radiomics_features(store: Store, records: Iterable[Record], region: str) -> FeaturesOf | None:
    """First-order radiomics of these scans' region, or body; None, and a warning, where one lacks a feature."""

    def described(key: str) -> Any:
        volume = store.volume(key)
        labels = store.labels(key) if region else None
        where = baselines.find_body(volume) if labels is None else regions.of_class(labels, region)
        return baselines.radiomics(volume, where)

    try:
        return {record.key: described(record.key) for record in records}.__getitem__
    except ValueError as error:
        _log.warning("no radiomics baseline: %s", error)
        return None


def mode_of(task: Task, mode: str, *, parts: bool) -> str:
    """The mode in which what a run must beat is fitted: the run's own, as far as that can be.

    It is the task's usual one where the run's trains a network whole, or, of values without `parts`, attends to parts.
    """
    return mode if mode in task.modes and (parts or mode != "attention") else task.modes[0]


def usual(contest: Contest) -> tuple[str, Callable[[], Outcomes]]:
    """What can be said of a scan that nobody looked at, and its name."""
    if contest.truth.survival:
        return "kaplan_meier", contest.kaplan_meier
    if isinstance(contest.task, Retrieve):
        return "majority", contest.by_chance
    if contest.truth.findings:
        return "majority", lambda: _shared(contest)
    return ("mean", contest.average) if contest.truth.values else ("majority", contest.majority)


def zeroshot_baselines(contest: Contest, head: Head, space: Aligned, folder: Path) -> dict[str, Repeats]:
    """What answers by prompts must beat: the same prompts before networks that learned nothing.

    Where labels were used for calibration, the untrained networks get the same, and two that do without words join:
    a probe on intensities fitted to those labels, and the shares of the classes among them.
    """
    calibrated = bool(contest.labelled)
    scans = len(contest.labelled) + len(contest.tested)
    with progress("evaluate: baselines", (INITS + calibrated) * scans) as advance:
        untrained: list[Outcomes] = []
        for seed in range(INITS):
            drawn = dataclasses.replace(space, model=space.model.scratch(seed=seed))
            features = counted(projector(drawn, contest.store, folder), advance, note="scratch")
            untrained.append(contest.score(contest.calibrated(head, features), features))
        found = {
            "scratch": {subject: tuple(outcomes[subject] for outcomes in untrained) for subject in untrained[0]},
        }
        if calibrated:
            bright = intensity_features(contest.store, space.model.spec, None)
            found["intensity"] = once(_probed(contest, counted(bright, advance, note="intensity")))
            found["majority"] = once(_shared(contest))
    return found


def intensity_features(store: Store, spec: InputSpec, patch_ijk: tuple[int, int, int] | None) -> FeaturesOf:
    """Features of the intensity baseline, each volume once; its tokens are as large as patches of `patch_ijk` voxels.

    Without `patch_ijk` there are no tokens.
    """

    def look(key: str) -> Any:
        volume = store.volume(key)
        edges = baselines.token_mm(volume, spec, patch_ijk) if patch_ijk else None
        return baselines.intensity(volume, spec, token_mm=edges)

    return remembered(look)


def once(outcomes: Outcomes) -> Repeats:
    """The outcomes of a single repeat."""
    return {subject: (outcome,) for subject, outcome in outcomes.items()}


def counted(features: FeaturesOf, advance: Advance, note: str = "") -> FeaturesOf:
    """The same features; each scan moves the bar on."""

    def count(key: str) -> Any:
        found = features(key)
        advance(1, note=note)
        return found

    return count


def remembered(features: FeaturesOf) -> FeaturesOf:
    """The same features, each scan's computed once and kept in memory."""
    kept: dict[str, Any] = {}

    def recall(key: str) -> Any:
        if key not in kept:
            kept[key] = features(key)
        return kept[key]

    return recall


def _probed(contest: Contest, features: FeaturesOf) -> Outcomes:
    """Answers of probes fitted to the labels of the calibration: one for all classes, or one for each."""
    labelled = list(examples_of(contest.store, contest.labelled, contest.truth, features, contest.task))
    tested = list(examples_of(contest.store, contest.tested, contest.truth, features, contest.task))
    if contest.truth.labels:
        scores = _probe(labelled, tested, contest.classes)
    else:
        columns = [_probe(about(labelled, name), tested, NO_YES)[:, 1] for name in contest.classes]
        scores = np.stack(columns, axis=1)
    return contest.answers([(example, tuple(row)) for example, row in zip(tested, scores.tolist(), strict=True)])


def _probe(
    labelled: Sequence[Example], tested: Sequence[Example], classes: tuple[str, ...]
) -> Float[np.ndarray, "scan classes"]:
    """Probabilities of a probe's classes; with fewer than two kinds to learn from, all classes alike."""
    if len({example.label for example in labelled}) < 2:  # noqa: PLR2004
        return np.full((len(tested), len(classes)), 1 / len(classes))
    probe = Classify()
    head = probe.fit(labelled, classes, mode="probe", seed=0)
    return np.stack([probe.predict(head, example.features.scan) for example in tested])


def _shared(contest: Contest) -> Outcomes:
    """Say of every scan how often each class is there among the labelled subjects."""
    if contest.truth.labels:
        chances = majority([contest.truth.labels[record.subject] for record in contest.labelled], contest.classes)
    else:
        subjects = sorted({record.subject for record in contest.labelled})
        chances = shares([contest.truth.findings[subject] for subject in subjects], contest.classes)
    blind = examples_of(contest.store, contest.tested, contest.truth, lambda _: Blind(), contest.task)
    return contest.answers([(example, chances) for example in blind])
