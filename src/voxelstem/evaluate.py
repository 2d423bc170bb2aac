"""Evaluate: adapted runs on held-out subjects, beside the baselines that keep everyone honest."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelstem.adapted import Adapted, read_run
from voxelstem.contest import (
    INITS,
    MORPHOMETRY,
    RADIOMICS,
    Contest,
    Outcomes,
    Repeats,
    counted,
    intensity_features,
    once,
    plain_baselines,
    tuned_baselines,
    zeroshot_baselines,
)
from voxelstem.errors import AuditError, CheckpointError, ConfigError
from voxelstem.evidence import Played, between, prevalence, question, sureness
from voxelstem.features import FeaturesOf, embedder, open_space, projector, speaker
from voxelstem.gallery import gallery
from voxelstem.manifest import write_whole
from voxelstem.metrics import Score
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.report import page
from voxelstem.report.evidence import Compared, Prevalence, Sureness, evidence_sections
from voxelstem.report.verdict import unmeasured, verdict_section
from voxelstem.scoring import REFERENCES, few_label_table, table_of
from voxelstem.store import Record, Store
from voxelstem.store.leakage import common
from voxelstem.truth import Truth, is_aligned, of_contrast, read_truth
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

RESERVED = (*REFERENCES, "atlas", "majority", "mean", "kaplan_meier", MORPHOMETRY, RADIOMICS)
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
    sureness: tuple[Sureness, ...] = ()
    """How far each run's probabilities, sets and intervals can be taken at their word."""
    compared: tuple[Compared, ...] = ()
    """Every two runs of one task on the same subjects."""
    prevalence: tuple[Prevalence, ...] = ()
    """How often each class occurs where a run learned and where it is tested."""

    @property
    def measured(self) -> dict[str, str]:
        """Of what an honest evaluation needs, what was measured, and where it stands."""
        found = {"leakage_store": "none found, see What was checked"}
        if any(score.value.low is not None for score in self.scores):
            found["intervals"] = f"95 % bootstrap over {self.test_subjects} subjects"
        where = "see How sure the runs may be"
        found |= {"calibration": where} if any(one.stated or one.covered for one in self.sureness) else {}
        found |= {"strange": where} if any(one.flagged is not None for one in self.sureness) else {}
        return found

    def facts(self) -> dict[str, Any]:
        """Everything as plain data for JSON; an undefined figure becomes None."""
        return _plain(dataclasses.asdict(self)) | {"not_measured": list(unmeasured(self.measured))}


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
    told: list[_Told] = []
    known: dict[str, dict[str, Repeats]] = {}
    for adapted in finished:
        entry = _enter(adapted, opened, labels, out / "features", commercial=commercial)
        told.append(_tell(adapted, entry, known))
    tested = {record.key: record.subject for one in told for record in one.played.contest.tested}
    measured = [one.played for one in told if not one.asked]
    floors = [(one.played.name, one.floor) for one in told if one.floor is not None]
    evaluation = Evaluation(
        scores=tuple(score for one in told for score in one.scores),
        test_subjects=len(set(tested.values())),
        test_scans=len(tested),
        checked=(
            "no subject, scan or identical voxels of this store on both sides of the split; "
            "what the weights saw elsewhere is not checked",
            "baselines fitted to the same labelled scans as each run",
            *_floor(floors),
        ),
        asked=tuple(asked for one in told for asked in one.asked),
        sureness=tuple(map(sureness, measured)),
        compared=tuple(between([one.played for one in told])),
        prevalence=tuple(shares for one in told if (shares := prevalence(one.played)) is not None),
    )
    _write(out, evaluation, [section for one in told for section in one.pictures])
    return evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class _Told:
    """What is told of one run."""

    played: Played
    scores: tuple[Score, ...]
    """Its own lines, and those of the baselines where no run before has the same."""
    pictures: tuple[page.Section, ...]
    asked: tuple[Mapping[str, Any], ...]
    """How it was asked, if it answers by prompts."""
    floor: bool | None
    """Whether volumes of structures were measured beside it; None where they say nothing of its task."""


def _tell(adapted: Adapted, entry: _Entry, known: dict[str, dict[str, Repeats]]) -> _Told:
    """Score a run and, unless they are `known` from another run, its baselines."""
    name = f"{adapted.name} (run)" if adapted.name in RESERVED else adapted.name
    contest, prompts = entry.contest, is_aligned(adapted.task)
    with progress(f"evaluate: {adapted.name}", len(contest.tested)) as advance:
        outcomes = contest.score(adapted.head, counted(entry.features, advance))
    played = Played(
        name=name,
        task=adapted.config.task,
        contest=contest,
        outcomes=outcomes,
        assurance=adapted.assurance,
        features=entry.features,
    )
    fresh = entry.mark not in known
    if fresh:
        known[entry.mark] = entry.baselines()
    repeats = {name: once(outcomes)} | known[entry.mark]
    table = table_of(contest, repeats, task=adapted.config.task, budget=adapted.config.budget)
    return _Told(
        played=played,
        scores=tuple(score for score in table if fresh or score.name == name),
        pictures=() if prompts else tuple(gallery(played, repeats, table, adapted.head)),
        asked=(question(adapted, contest, name),) if prompts else (),
        floor=None if adapted.task.voxels or prompts else MORPHOMETRY in known[entry.mark],
    )


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
        features=embedder(model, store, folder, tokens=adapted.tokens, see=adapted.config.see),
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


def _write(out: Path, evaluation: Evaluation, pictures: Sequence[page.Section]) -> None:
    sections = [
        page.scores_section(evaluation.scores),
        *([page.asked_section(evaluation.asked)] if evaluation.asked else []),
        *pictures,
        *evidence_sections(evaluation.sureness, evaluation.compared, evaluation.prevalence),
        page.section("What was checked", page.bullets(evaluation.checked)),
        verdict_section(evaluation.measured),
        page.limits_section(evaluation.test_subjects),
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(evaluation.facts(), indent=2, allow_nan=False) + "\n"
        write_whole(out / "evaluation.json", text.encode())
        write_whole(out / "index.html", page.page("Evaluation", sections).encode())
    except OSError as error:
        raise CheckpointError(f"the report cannot be written: {error.strerror}", hint="check --out") from error
