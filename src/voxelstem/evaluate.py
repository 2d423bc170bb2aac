"""Evaluate: adapted runs on held-out subjects, beside the baselines that keep everyone honest."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelstem import baselines, metrics
from voxelstem.adapt import Adapted, FeaturesOf, Truth, class_names, draw, embedder, examples_of, read_run, read_truth
from voxelstem.errors import AuditError, CheckpointError, ConfigError
from voxelstem.manifest import write_whole
from voxelstem.metrics import Score
from voxelstem.model import Model
from voxelstem.progress import Advance, progress
from voxelstem.protocols import Head, Task
from voxelstem.report import page
from voxelstem.store import Record, Store
from voxelstem.store.leakage import common
from voxelstem.study import InputSpec
from voxelstem.tasks.classify import Guess, majority
from voxelstem.tasks.segment import compare, numbered
from voxelstem.weights.hub import load

INITS = 3
"""How many untrained networks stand for `scratch`."""
REFERENCES = ("scratch", "intensity")
RESERVED = (*REFERENCES, "atlas", "majority")
"""Names of baselines, which a run may not carry in the table."""

Outcomes = dict[str, Any]
"""Subject to outcome, as the task's `combine` gives it."""
Repeats = dict[str, tuple[Any, ...]]
"""Subject to the outcomes of several repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What `run` found: the table, how many subjects it rests on, and what was checked."""

    scores: tuple[Score, ...]
    test_subjects: int
    test_scans: int
    checked: tuple[str, ...]
    """Checks that passed, in words."""

    def facts(self) -> dict[str, Any]:
        """Everything as plain data for JSON; an undefined figure becomes None."""
        return _plain(dataclasses.asdict(self))


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

    def score(self, head: Head, features: FeaturesOf) -> Outcomes:
        """Outcomes of a fitted head on the held-out scans."""
        examples = examples_of(self.store, self.tested, self.truth, features, self.task)
        return self._join((example.subject, self.task.outcome(head, example)) for example in examples)

    def fit_and_score(self, features: FeaturesOf) -> Outcomes:
        """Fit the task's head to these features of the labelled scans, then score it."""
        examples = list(examples_of(self.store, self.labelled, self.truth, features, self.task))
        head = self.task.fit(examples, self.classes, mode=self.mode, seed=self.seed)
        return self.score(head, features)

    def majority(self) -> Outcomes:
        """Say of every scan what most labelled scans are."""
        shares = majority([self.truth.labels[record.subject] for record in self.labelled], self.classes)
        return self._join(
            (record.subject, Guess(truth=self.classes.index(self.truth.labels[record.subject]), scores=shares))
            for record in self.tested
        )

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
            return record.subject, compare(numbered(carried, self.classes), truth, self.classes)

        return self._join(map(outcome, self.tested))

    def _body(self, record: Record, spec: InputSpec) -> tuple[Any, baselines.Body]:
        volume = self.store.volume(record.key)
        return baselines.intensity(volume, spec, token_mm=None).scan, baselines.find_body(volume)

    def _join(self, scored: Iterable[tuple[str, Any]]) -> Outcomes:
        by_subject: dict[str, list[Any]] = {}
        for subject, outcome in scored:
            by_subject.setdefault(subject, []).append(outcome)
        return {subject: self.task.combine(outcomes) for subject, outcomes in by_subject.items()}


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
    for adapted in finished:
        model = load(adapted.weights, commercial=commercial or adapted.config.commercial)
        contest = _contest(adapted, opened, read_truth(opened, labels, adapted.task, model.spec))
        contests.append(contest)
        mark = _mark(adapted, model)
        name = f"{adapted.name} (run)" if adapted.name in RESERVED else adapted.name
        with progress(f"evaluate: {adapted.name}", len(contest.tested)) as advance:
            features = _counted(_features(contest, model, out), advance)
            mine = {name: _once(contest.score(adapted.head, features))}
        fresh = mark not in known
        if fresh:
            known[mark] = _baselines(contest, model, out)
        table = table_of(contest, mine | known[mark], task=adapted.config.task, budget=adapted.config.budget)
        scores += [score for score in table if fresh or score.name == name]
    tested = {record.key: record.subject for contest in contests for record in contest.tested}
    evaluation = Evaluation(
        scores=tuple(scores),
        test_subjects=len(set(tested.values())),
        test_scans=len(tested),
        checked=(
            "no subject, scan or identical voxels of this store on both sides of the split; "
            "what the weights saw elsewhere is not checked",
            "baselines fitted to the same labelled scans as each run",
        ),
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
            features = _remembered(maker())
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
    organs = contest.classes if contest.task.voxels else ()
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
                    parts=_parts(contest, metric, organs, own),
                    each=tuple(statistic([own[subject]]) for subject in sorted(own)) if few else (),
                )
            )
    return scores


def intensity_features(store: Store, spec: InputSpec, patch_ijk: tuple[int, int, int] | None) -> FeaturesOf:
    """Features of the intensity baseline, each volume once; its tokens are as large as patches of `patch_ijk` voxels.

    Without `patch_ijk` there are no tokens.
    """

    def look(key: str) -> Any:
        volume = store.volume(key)
        edges = baselines.token_mm(volume, spec, patch_ijk) if patch_ijk else None
        return baselines.intensity(volume, spec, token_mm=edges)

    return _remembered(look)


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
        record for record in truth.of("test") if not adapted.task.voxels or set(classes) <= set(record.classes.values())
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


def _with_draw(contest: Contest, budget: int, index: int) -> Contest:
    labelled = draw(contest.truth, budget, index, voxels=contest.task.voxels)
    classes = contest.classes or class_names(contest.truth, labelled, voxels=contest.task.voxels)
    return dataclasses.replace(contest, labelled=labelled, classes=classes, seed=index)


def _features(contest: Contest, model: Model, out: Path) -> FeaturesOf:
    return embedder(model, contest.store, out / "features", tokens=contest.task.voxels)


def _baselines(contest: Contest, model: Model, out: Path) -> dict[str, Repeats]:
    """Outcomes of everything that a model must beat, fitted to the same labels."""
    voxels = contest.task.voxels
    scans = len(contest.labelled) + len(contest.tested)
    with progress("evaluate: baselines", (INITS + 2) * scans) as advance:
        untrained: list[Outcomes] = []
        for seed in range(INITS):
            fresh = _features(contest, model.scratch(seed=seed), out)
            untrained.append(contest.fit_and_score(_counted(fresh, advance, note="scratch")))
        bright = intensity_features(contest.store, model.spec, model.backbone.patch_ijk if voxels else None)
        bright = contest.fit_and_score(_counted(bright, advance, note="intensity"))
        floor = _once(contest.atlas(model.spec, advance) if voxels else contest.majority())
        if not voxels:
            advance(scans, note="majority")
    scratch = {subject: tuple(outcomes[subject] for outcomes in untrained) for subject in untrained[0]}
    return {"scratch": scratch, "intensity": _once(bright), "atlas" if voxels else "majority": floor}


def _parts(contest: Contest, metric: str, organs: tuple[str, ...], own: Repeats) -> dict[str, metrics.Interval]:
    """The figure of each organ, over the subjects whose truth holds it."""
    parts: dict[str, metrics.Interval] = {}
    for organ in organs:
        having = {subject: outcomes for subject, outcomes in own.items() if organ in outcomes[0]}
        if having:
            statistic = metrics.averaged(contest.task.statistic(f"{metric}:{organ}"))
            parts[organ] = metrics.bootstrap_interval(having, statistic)
    return parts


def _once(outcomes: Outcomes) -> Repeats:
    return {subject: (outcome,) for subject, outcome in outcomes.items()}


def _counted(features: FeaturesOf, advance: Advance, note: str = "") -> FeaturesOf:
    """The same features; each scan moves the bar on."""

    def count(key: str) -> Any:
        found = features(key)
        advance(1, note=note)
        return found

    return count


def _remembered(features: FeaturesOf) -> FeaturesOf:
    kept: dict[str, Any] = {}

    def recall(key: str) -> Any:
        if key not in kept:
            kept[key] = features(key)
        return kept[key]

    return recall


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
