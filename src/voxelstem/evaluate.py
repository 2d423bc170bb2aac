"""Evaluate: adapted runs on held-out subjects, beside the baselines that keep everyone honest."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelstem import metrics
from voxelstem.adapted import Adapted, read_run
from voxelstem.contest import (
    INITS,
    MORPHOMETRY,
    Contest,
    Outcomes,
    Repeats,
    counted,
    intensity_features,
    once,
    plain_baselines,
    remembered,
    tuned_baselines,
    zeroshot_baselines,
)
from voxelstem.errors import AuditError, CheckpointError, ConfigError
from voxelstem.features import FeaturesOf, embedder, open_space, projector, speaker
from voxelstem.manifest import write_whole
from voxelstem.metrics import Score
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.report import page
from voxelstem.store import Record, Store
from voxelstem.store.leakage import common
from voxelstem.study import InputSpec
from voxelstem.truth import Truth, class_names, draw, is_aligned, of_contrast, read_truth
from voxelstem.weights.hub import load

__all__ = [
    "INITS",
    "Contest",
    "Evaluation",
    "Outcomes",
    "Repeats",
    "check_leakage",
    "few_label_table",
    "intensity_features",
    "run",
    "table_of",
]

REFERENCES = ("scratch", "intensity")
RESERVED = (*REFERENCES, "atlas", "majority", "mean", "kaplan_meier", MORPHOMETRY)
"""Names of baselines, which a run may not carry in the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What `run` found: the table, how many subjects it rests on, and what was checked."""

    scores: tuple[Score, ...]
    test_subjects: int
    test_scans: int
    checked: tuple[str, ...]
    """Checks that passed, in words."""
    asked: tuple[Mapping[str, Any], ...] = ()
    """For each run that answers by prompts: its set with version and SHA-256, and how many were asked about what."""

    def facts(self) -> dict[str, Any]:
        """Everything as plain data for JSON; an undefined figure becomes None."""
        return _plain(dataclasses.asdict(self))


def run(runs: Sequence[Path], *, store: Path, labels: Path, out: Path, commercial: bool = False) -> Evaluation:
    """Score runs of `adapt` on the store's test subjects and write `out`/evaluation.json and index.html.

    The baselines are fitted here to the very labels that each run saw: the same network untrained
    (three seeds), intensity features, and the majority or the nearest atlas.

    Raises:
        ConfigError: a run that is none, labels and store that do not fit it, or with `commercial` (here or in `adapt`)
            weights whose licence forbids such use.
        AuditError: no held-out subject has labels, or a labelled subject is among them.
        CheckpointError: the weights are damaged or `out` cannot be written.
    """
    if not runs:
        raise ConfigError("no run to evaluate", hint="name one or more --out folders of `adapt`")
    opened = Store.open(store)
    finished = [read_run(folder) for folder in runs]
    scores: list[Score] = []
    known: dict[str, dict[str, Repeats]] = {}
    contests: list[Contest] = []
    asked: list[Mapping[str, Any]] = []
    floors: list[tuple[str, bool]] = []
    for adapted in finished:
        name = f"{adapted.name} (run)" if adapted.name in RESERVED else adapted.name
        entry = _enter(adapted, opened, labels, out / "features", commercial=commercial)
        contest = entry.contest
        contests.append(contest)
        with progress(f"evaluate: {adapted.name}", len(contest.tested)) as advance:
            mine = {name: once(contest.score(adapted.head, counted(entry.features, advance)))}
        fresh = entry.mark not in known
        if fresh:
            known[entry.mark] = entry.baselines()
        if not (adapted.task.voxels or is_aligned(adapted.task)):
            floors.append((name, MORPHOMETRY in known[entry.mark]))
        table = table_of(contest, mine | known[entry.mark], task=adapted.config.task, budget=adapted.config.budget)
        scores += [score for score in table if fresh or score.name == name]
        asked += [_question(adapted, contest, name)] if is_aligned(adapted.task) else []
    tested = {record.key: record.subject for contest in contests for record in contest.tested}
    evaluation = Evaluation(
        scores=tuple(scores),
        test_subjects=len(set(tested.values())),
        test_scans=len(tested),
        checked=(
            "no subject, scan or identical voxels of this store on both sides of the split; "
            "what the weights saw elsewhere is not checked",
            "baselines fitted to the same labelled scans as each run",
            *_floor(floors),
        ),
        asked=tuple(asked),
    )
    _write(out, evaluation)
    return evaluation


def check_leakage(store: Store, labelled: Sequence[Record], tested: Sequence[Record]) -> None:
    """See that nobody who was learned from is tested on, neither as a subject nor as a copy of a scan.

    This covers the store's own splits: weights that were pretrained on another store cannot be checked here, and near
    copies under another subject are what `voxelstem show STORE --against STORE` looks for.

    Raises:
        AuditError: somebody is.
    """
    trained = [record for record in store if record.split == "train"]
    for what, count in common([*labelled, *trained], tested).items():
        if count:
            raise AuditError(
                f"{count} of the test {what} were also trained on: the scores would not be honest",
                hint="make a new store with `voxelstem ingest`: it splits by subject",
            )


def few_label_table(
    contest: Contest,
    contestants: Mapping[str, Sequence[Callable[[], FeaturesOf]]],
    *,
    task: str,
    budgets: Sequence[int] = (1, 2, 5),
    draws: int = 3,
    atlas: InputSpec | None = None,
) -> list[Score]:
    """Label efficiency: every contestant at every budget, averaged over draws of the labelled subjects.

    `contestants` maps a name to one maker of features for each of its seeds. A maker is called once and
    its features are kept in memory while it is its turn; heads are refitted for every budget and draw.
    `contest.labelled` is not used. With `atlas` (the InputSpec), the nearest atlas competes too.
    """
    repeats: dict[int, dict[str, list[Outcomes]]] = {budget: {} for budget in budgets}
    rounds = {(budget, index): _with_draw(contest, budget, index) for budget in budgets for index in range(draws)}
    turns = [(name, maker) for name, makers in contestants.items() for maker in makers]
    with progress("few labels", len(rounds) * (len(turns) + (atlas is not None))) as advance:
        for name, maker in turns:
            features = remembered(maker())
            for (budget, _), drawn in rounds.items():
                repeats[budget].setdefault(name, []).append(drawn.fit_and_score(features))
                advance(1, note=f"{name}, {budget} labelled")
        for (budget, _), drawn in rounds.items() if atlas is not None else ():
            repeats[budget].setdefault("atlas", []).append(drawn.atlas(atlas or InputSpec()))
            advance(1, note="atlas")
    scores: list[Score] = []
    for budget, by_name in repeats.items():
        joined = {
            name: {subject: tuple(outcome[subject] for outcome in outcomes) for subject in outcomes[0]}
            for name, outcomes in by_name.items()
        }
        scores += table_of(rounds[budget, 0], joined, task=task, budget=budget)
    return scores


def table_of(contest: Contest, repeats: Mapping[str, Repeats], *, task: str, budget: int | None) -> list[Score]:
    """Turn outcomes into scores with subject-level intervals and paired differences to the references."""
    scores: list[Score] = []
    parts = contest.classes if contest.task.voxels or contest.truth.findings else ()
    for metric in contest.task.metrics:
        statistic = metrics.averaged(contest.task.statistic(metric))
        for name, own in repeats.items():
            over = {
                other: metrics.paired_difference(own, repeats[other], statistic)
                for other in REFERENCES
                if other in repeats and other != name
            }
            value = metrics.bootstrap_interval(own, statistic)
            few = value.subjects < metrics.FEWEST_SUBJECTS and contest.task.voxels
            scores.append(
                Score(
                    name=name,
                    task=task,
                    mode=contest.mode,
                    metric=metric,
                    budget=budget,
                    labelled=len({record.subject for record in contest.labelled}),
                    repeats=len(next(iter(own.values()))),
                    value=value,
                    over_scratch=over.get("scratch"),
                    over_intensity=over.get("intensity"),
                    parts=_parts(contest, metric, parts, own),
                    each=tuple(statistic([own[subject]]) for subject in sorted(own)) if few else (),
                )
            )
    return scores


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A run that takes part."""

    contest: Contest
    features: FeaturesOf
    baselines: Callable[[], dict[str, Repeats]]
    mark: str


def _enter(adapted: Adapted, store: Store, labels: Path, folder: Path, *, commercial: bool) -> _Entry:
    """Load a run's weights and put its contest together; embeddings rest in `folder`."""
    if is_aligned(adapted.task):
        space = open_space(adapted.weights, adapted.config, commercial=commercial)
        contest = _contest(adapted, store, read_truth(store, labels, adapted.task, space.model.spec))
        return _Entry(
            contest=contest,
            features=projector(space, store, folder),
            baselines=lambda: zeroshot_baselines(contest, adapted.head, space, folder),
            # Untrained networks are heard through the heads that were trained: other weights, other baselines.
            # A file of prompts may have been changed between two runs.
            mark=_mark(adapted, space.model) + space.sha256 + str(adapted.head.facts["prompts_sha256"]),
        )
    model = load(adapted.weights, commercial=commercial or adapted.config.commercial)
    truth = read_truth(store, labels, adapted.task, model.spec)
    if adapted.config.full is not None:
        contest = _contest(adapted, store, of_contrast(truth, adapted.config.full.contrasts))
        return _Entry(
            contest=contest,
            features=speaker(adapted, model, store),
            baselines=lambda: tuned_baselines(contest, model, adapted.config),
            mark=_mark(adapted, model),
        )
    contest = _contest(adapted, store, truth)
    return _Entry(
        contest=contest,
        features=embedder(model, store, folder, tokens=adapted.task.voxels, see=adapted.config.see),
        baselines=lambda: plain_baselines(contest, model, adapted.config.see, folder),
        mark=_mark(adapted, model),
    )


def _floor(measured: Sequence[tuple[str, bool]]) -> tuple[str, ...]:
    """What volumes of structures alone can do of a scan-level task must be known before anything is said of a model.

    `measured` says of each run with such a task whether that is known: of its own labels, not of another run's.
    """
    said = {
        True: "morphometry{}: a head on volumes of structures alone, fitted to the same labels",
        False: "morphometry floor{}: NOT MEASURED, not every scan of the store has the same `volume:<structure>` "
        "labels",
    }
    names = {known: [name for name, floor in measured if floor is known] for known in said}
    mixed = all(names.values())
    return tuple(line.format(f" of {', '.join(names[known])}" * mixed) for known, line in said.items() if names[known])


def _question(adapted: Adapted, contest: Contest, name: str) -> dict[str, Any]:
    """What a run was asked in words, and of how many."""
    facts = adapted.head.facts
    truth = contest.truth
    if truth.labels:
        counts = {word: sum(truth.labels[subject] == word for subject in contest.subjects) for word in contest.classes}
    else:
        told = [truth.findings[subject] for subject in contest.subjects]
        counts = {word: sum(word in one for one in told) for word in contest.classes}
    return {
        "run": name,
        "prompts": facts["prompts"],
        "version": int(facts["prompts_version"]),
        "sha256": facts["prompts_sha256"],
        "prompts_said": int(facts["prompts_said"]),
        "answers": adapted.config.head.answers,
        "mode": adapted.config.mode,
        "calibrated_on": len(adapted.subjects),
        "pool": len(contest.tested),
        "subjects": len(contest.subjects),
        "classes": counts,
        "counted": "test subjects of which this is true" if truth.labels else "test subjects of whom this is known",
    }


def _contest(adapted: Adapted, store: Store, truth: Truth) -> Contest:
    """The run's own labelled scans against all labelled test scans, after the check for leakage."""
    by_key = {record.key: record for record in truth.records}
    missing = [key for key in adapted.labelled if key not in by_key]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the scans that '{adapted.name}' learned from are not in this store, or not labelled",
            hint="evaluate with the store and the labels that `adapt` was given",
        )
    classes = adapted.head.classes
    tested = [
        record for record in truth.of("test") if _can_be_scored(record, truth, classes, voxels=adapted.task.voxels)
    ]
    if not tested:
        raise AuditError("no held-out test subject has labels", hint="ingest and label more subjects")
    strange = sorted({truth.labels[record.subject] for record in tested} - set(classes)) if truth.labels else []
    if strange:
        raise ConfigError(f"test label '{strange[0]}' is none that '{adapted.name}' knows: {', '.join(classes)}")
    labelled = tuple(by_key[key] for key in adapted.labelled)
    check_leakage(store, labelled, tested)
    return Contest(
        store=store,
        truth=truth,
        task=adapted.task,
        mode=adapted.config.mode,
        classes=classes,
        labelled=labelled,
        tested=tuple(tested),
        seed=adapted.config.seed,
    )


def _can_be_scored(record: Record, truth: Truth, classes: tuple[str, ...], *, voxels: bool) -> bool:
    if voxels:
        return set(classes) <= set(record.classes.values())
    return not truth.findings or bool(set(classes) & set(truth.findings[record.subject]))


def _with_draw(contest: Contest, budget: int, index: int) -> Contest:
    labelled = draw(contest.truth, budget, index, voxels=contest.task.voxels)
    classes = contest.classes or class_names(contest.truth, labelled, voxels=contest.task.voxels)
    return dataclasses.replace(contest, labelled=labelled, classes=classes, seed=index)


def _parts(contest: Contest, metric: str, organs: tuple[str, ...], own: Repeats) -> dict[str, metrics.Interval]:
    """The figure of each organ, or of each class that is there or not, over the subjects whose truth holds it."""
    parts: dict[str, metrics.Interval] = {}
    for organ in organs:
        having = {subject: outcomes for subject, outcomes in own.items() if organ in outcomes[0]}
        if having:
            statistic = metrics.averaged(contest.task.statistic(f"{metric}:{organ}"))
            parts[organ] = metrics.bootstrap_interval(having, statistic)
    return parts


def _mark(adapted: Adapted, model: Model) -> str:
    """Runs with the same mark share their baselines: same labels, head settings and architecture."""
    config = dataclasses.replace(adapted.config, like=None, features=None, commercial=False)
    return repr((config, adapted.labelled, adapted.head.classes, sorted(model.card.architecture.items()), model.spec))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write(out: Path, evaluation: Evaluation) -> None:
    sections = [
        page.scores_section(evaluation.scores),
        *([page.asked_section(evaluation.asked)] if evaluation.asked else []),
        page.section("What was checked", page.bullets(evaluation.checked)),
        page.limits_section(evaluation.test_subjects),
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(evaluation.facts(), indent=2, allow_nan=False) + "\n"
        write_whole(out / "evaluation.json", text.encode())
        write_whole(out / "index.html", page.page("Evaluation", sections).encode())
    except OSError as error:
        raise CheckpointError(f"the report cannot be written: {error.strerror}", hint="check --out") from error
