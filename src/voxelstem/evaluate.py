"""Evaluate: adapted runs on held-out subjects, beside the baselines that keep everyone honest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxelstem.adapted import TUNED, Adapted
from voxelstem.card import read_card
from voxelstem.certainty.crossfit import as_facts
from voxelstem.errors import AuditError, CheckpointError, ConfigError
from voxelstem.judging.bought import bought
from voxelstem.judging.config import EvaluateConfig
from voxelstem.judging.contest import (
    INITS,
    MORPHOMETRY,
    RADIOMICS,
    Contest,
    Outcomes,
    Repeats,
    counted,
    intensity_features,
    once,
)
from voxelstem.judging.entries import Entry, check_leakage, enter, labels_line, read_runs
from voxelstem.judging.evidence import Played, against, between, prevalence, question, sureness
from voxelstem.judging.exposure import Exposure, expose, told_by_card
from voxelstem.judging.gallery import gallery
from voxelstem.judging.nested import Nested, is_wanted, nested
from voxelstem.judging.operating import operating_point
from voxelstem.judging.rival import UNET, caveats, resting_rival, rival_config
from voxelstem.judging.scoring import REFERENCES, few_label_table, table_of
from voxelstem.judging.volumes import sizes_of
from voxelstem.manifest import write_whole
from voxelstem.metrics import Score
from voxelstem.progress import progress
from voxelstem.report import page
from voxelstem.report.checks import Cost, Crossed, costs_section, crossed_section, exposure_section
from voxelstem.report.evidence import Compared, OperatingPoint, Prevalence, Sureness, evidence_sections
from voxelstem.report.verdict import unmeasured, verdict_section
from voxelstem.spent import Spent
from voxelstem.store import Store
from voxelstem.tasks.segment import Segment
from voxelstem.truth import is_aligned

__all__ = [
    "INITS",
    "Contest",
    "EvaluateConfig",
    "Evaluation",
    "Outcomes",
    "Repeats",
    "check_leakage",
    "few_label_table",
    "intensity_features",
    "run",
    "table_of",
]

RESERVED = (*REFERENCES, "atlas", "majority", "mean", "kaplan_meier", MORPHOMETRY, RADIOMICS, UNET)
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
    exposure: Mapping[str, Exposure] = field(default_factory=dict)
    """Run to what is known of its weights' pretraining and the test subjects."""
    points: tuple[OperatingPoint, ...] = ()
    """Of runs with two classes: what they are worth at a threshold that was fixed before."""
    crossed: tuple[Nested, ...] = ()
    """Every labelled subject by a head that had not seen it."""
    costs: tuple[Cost, ...] = ()
    """What fitting took."""

    @property
    def measured(self) -> dict[str, str]:
        """Of what an honest evaluation needs, what was measured, and where it stands."""
        found = {"leakage_store": "none found, see What was checked"}
        if any(score.value.low is not None for score in self.scores):
            found["intervals"] = f"95 % bootstrap over {self.test_subjects} subjects"
        where = "see How sure the runs may be"
        sure = any(one.stated or one.covered or one.volumes for one in self.sureness)
        found |= {"calibration": where} if sure else {}
        found |= {"strange": where} if any(one.flagged is not None for one in self.sureness) else {}
        seen = {one.known for one in self.exposure.values()}
        found |= {"leakage_pretraining": "; ".join(sorted(seen))} if seen and all(seen) else {}
        for facet in ("sex", "scanner"):
            if any(facet in one.by_group for one in (*self.sureness, *self.points)):
                found[facet] = (
                    f"figures of each {facet}, with intervals: see How sure the runs may be, At a fixed threshold"
                )
        return found

    def facts(self) -> dict[str, Any]:
        """Everything as plain data for JSON; an undefined figure becomes None."""
        return as_facts(self) | {"not_measured": list(unmeasured(self.measured))}


USUAL = EvaluateConfig()


def run(
    runs: Sequence[Path],
    *,
    store: Path,
    labels: Path,
    out: Path,
    commercial: bool = False,
    config: EvaluateConfig = USUAL,
) -> Evaluation:
    """Score runs of `adapt` on the store's test subjects and write `out`/evaluation.json and index.html.

    The baselines are fitted here to the very labels that each run saw: the same network untrained
    (three seeds), intensity features, the majority or the nearest atlas, and for segmentations a U-Net from scratch.

    Raises:
        ConfigError: a run that is none, labels and store that do not fit it, or with `commercial` (here or in `adapt`)
            weights whose licence forbids such use.
        AuditError: no held-out subject has labels, a labelled subject is among them, or one of the stores that the
            weights were pretrained on holds one among its training subjects.
        CheckpointError: the weights are damaged or `out` cannot be written.
    """
    if not runs:
        raise ConfigError("no run to evaluate", hint="name one or more --out folders of `adapt`")
    opened = Store.open(store)
    finished = read_runs(runs)
    entries = [enter(adapted, opened, labels, config.rest(out), commercial=commercial) for adapted in finished]
    exposure = _expose(opened, finished, entries, config)
    told: list[_Told] = []
    known: dict[str, _Rest] = {}
    for adapted, entry in zip(finished, entries, strict=True):
        told.append(_tell(adapted, entry, known, out, config))
    tested = {record.key: record.subject for one in told for record in one.played.contest.tested}
    measured = [one.played for one in told if not one.asked]
    floors = [(one.played.name, one.floor) for one in told if one.floor is not None]
    evaluation = Evaluation(
        scores=tuple(score for one in told for score in one.scores),
        test_subjects=len(set(tested.values())),
        test_scans=len(tested),
        checked=(
            "no subject, scan or identical voxels of this store on both sides of the split; what the weights saw "
            "before is told under Did pretraining see the test subjects?",
            "baselines fitted to the same labelled scans as each run",
            *filter(None, map(labels_line, finished)),
            *_floor(floors),
            *dict.fromkeys(line for one in told for line in one.lacking),
        ),
        asked=tuple(asked for one in told for asked in one.asked),
        sureness=tuple(map(sureness, measured)),
        compared=(*between([one.played for one in told]), *(pair for one in told for pair in one.compared)),
        prevalence=tuple(shares for one in told if (shares := prevalence(one.played)) is not None),
        exposure=exposure,
        points=tuple(one.point for one in told if one.point is not None),
        crossed=tuple(one.crossed for one in told if one.crossed is not None),
        costs=tuple(cost for one in told for cost in one.costs),
    )
    _write(out, evaluation, [section for one in told for section in one.pictures])
    return evaluation


def _expose(
    store: Store, finished: Sequence[Adapted], entries: Sequence[Entry], config: EvaluateConfig
) -> dict[str, Exposure]:
    """What is known of each run's pretraining; compared where its stores are named."""
    names = [_name(adapted) for adapted in finished]
    if config.pretrained_on:
        labelled, tested = (
            list({record.key: record for entry in entries for record in getattr(entry.contest, side)}.values())
            for side in ("labelled", "tested")
        )
        return dict.fromkeys(names, expose(store, config.pretrained_on, labelled, tested))
    told = [
        (name, adapted.config.like is not None, adapted.weights) for name, adapted in zip(names, finished, strict=True)
    ]
    return {
        name: told_by_card(dataclasses.replace(read_card(weights), trained=()) if drawn else read_card(weights), store)
        for name, drawn, weights in told
    }


def _name(adapted: Adapted) -> str:
    return f"{adapted.name} (run)" if adapted.name in RESERVED else adapted.name


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rest:
    """Baselines that runs of one mark share."""

    repeats: dict[str, Repeats]
    costs: tuple[Cost, ...]
    lacking: tuple[str, ...]
    """Of those that should stand there, which could not be had, and why."""


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
    lacking: tuple[str, ...]
    compared: tuple[Compared, ...]
    """It and the U-Net from scratch."""
    point: OperatingPoint | None
    crossed: Nested | None
    costs: tuple[Cost, ...]


def _tell(adapted: Adapted, entry: Entry, known: dict[str, _Rest], out: Path, config: EvaluateConfig) -> _Told:
    """Score a run and, unless they are `known` from another run, its baselines."""
    name = _name(adapted)
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
        sizes=sizes_of(adapted.name, contest, adapted.head, entry.features) if adapted.assurance.volumes else {},
    )
    fresh = entry.mark not in known
    if fresh:
        known[entry.mark] = _baselines(name, adapted, entry, out, config)
    rest = known[entry.mark]
    repeats = {name: once(outcomes)} | rest.repeats
    table = table_of(contest, repeats, task=adapted.config.task, budget=adapted.config.budget)
    return _Told(
        played=played,
        scores=tuple(score for score in table if fresh or score.name == name),
        pictures=(
            *gallery(played, repeats, table, adapted.head),
            *(() if prompts else (bought(name, adapted),)),
        ),
        asked=(question(adapted, contest, name),) if prompts else (),
        floor=None if adapted.task.voxels or prompts else MORPHOMETRY in rest.repeats,
        lacking=rest.lacking,
        compared=tuple(against(played, UNET, rest.repeats[UNET])) if UNET in rest.repeats else (),
        point=None if prompts else operating_point(played, adapted, config.rest(out)),
        crossed=_cross(name, adapted, entry, out, config),
        costs=(_own_cost(name, adapted), *(rest.costs if fresh else ())) if not prompts else (),
    )


def _baselines(name: str, adapted: Adapted, entry: Entry, out: Path, config: EvaluateConfig) -> _Rest:
    """Everything that a run must beat, the U-Net from scratch included where voxels are labelled."""
    beside, lacking = entry.baselines(), list[str]()
    whole = adapted.config.mode in TUNED
    words = (
        "the same network, trained from scratch" if whole else f"{INITS} untrained networks: embedding, heads, scores"
    )
    costs = [_cost(name, who, words, spent) for who, spent in beside.spent.items()]
    repeats = dict(beside.repeats)
    if not adapted.task.voxels and not is_aligned(adapted.task) and RADIOMICS not in repeats:
        lacking.append(f"{RADIOMICS} beside {name}: NOT MEASURED, a scan lacks one of the features: see the log")
    if isinstance(adapted.task, Segment):
        said = "" if whole or config.unet_steps else "0 steps were asked for"
        try:
            if not said:
                full = rival_config(adapted.config, max(config.unet_steps, 1))
                made = resting_rival(entry.contest, entry.model.spec, full, out / "baselines")
                repeats[UNET] = once(made.outcomes)
                words = f"U-Net from scratch, {made.parameters / 1e6:.1f} M parameters, {made.steps} steps"
                costs.append(_cost(name, UNET, words, made.spent))
        except (ConfigError, AuditError) as error:
            said = str(error)
        except OSError as error:
            raise CheckpointError(
                f"the U-Net's answers cannot be written: {error.strerror}", hint="check --out"
            ) from error
        lacking += [f"U-Net from scratch beside {name}: NOT MEASURED: {said}"] if said else []
    return _Rest(repeats=repeats, costs=tuple(costs), lacking=tuple(lacking))


def _cross(name: str, adapted: Adapted, entry: Entry, out: Path, config: EvaluateConfig) -> Nested | None:
    if is_aligned(adapted.task) or not is_wanted(config.nested, adapted, entry.contest):
        return None
    return nested(name, adapted, entry.contest, entry.model, config.rest(out))


def _own_cost(name: str, adapted: Adapted) -> Cost:
    what = "network and head" if adapted.config.mode in TUNED else "head on frozen features"
    return _cost(name, name, f"{what}, mode {adapted.config.mode}", adapted.spent)


def _cost(run: str, name: str, what: str, spent: Spent | None) -> Cost:
    seconds, peak = (None, None) if spent is None else (spent.seconds, spent.peak_gib)
    return Cost(run=run, name=name, what=what, seconds=seconds, peak_gib=peak)


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


def _crossed(crossed: Sequence[Nested]) -> page.Section:
    lines = [
        Crossed(
            run=one.run,
            name=score.name,
            metric=score.metric,
            value=score.value,
            over_scratch=score.over_scratch,
            over_intensity=score.over_intensity,
        )
        for one in crossed
        for score in one.scores
    ]
    about = [
        f"{one.run}: {one.subjects} subjects in {one.folds} folds, parted anew {one.repeats} times"
        for one in crossed
        if one.scores
    ]
    about += [f"{one.run}: {note}" for one in crossed for note in one.notes]
    return crossed_section(lines, about, [f"{one.run}: NOT MEASURED: {one.why}" for one in crossed if one.why])


def _write(out: Path, evaluation: Evaluation, pictures: Sequence[page.Section]) -> None:
    sections = [
        page.scores_section(evaluation.scores),
        *([page.asked_section(evaluation.asked)] if evaluation.asked else []),
        *pictures,
        *([_crossed(evaluation.crossed)] if evaluation.crossed else []),
        *evidence_sections(evaluation.sureness, evaluation.compared, evaluation.prevalence, evaluation.points),
        exposure_section([f"{name}: {line}" for name, one in evaluation.exposure.items() for line in one.lines]),
        *([costs_section(evaluation.costs)] if evaluation.costs else []),
        page.section("What was checked", page.bullets(evaluation.checked)),
        verdict_section(evaluation.measured),
        page.limits_section(evaluation.test_subjects, remarks=caveats(score.name for score in evaluation.scores)),
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(evaluation.facts(), indent=2, allow_nan=False) + "\n"
        write_whole(out / "evaluation.json", text.encode())
        write_whole(out / "index.html", page.page("Evaluation", sections).encode())
    except OSError as error:
        raise CheckpointError(f"the report cannot be written: {error.strerror}", hint="check --out") from error
