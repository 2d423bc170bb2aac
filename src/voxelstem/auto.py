"""`adapt --mode auto`: climbs from the cheapest way to adapt while that pays, and draws what labels buy.

Every way is cross-fitted on the same labelled subjects in the same folds: no test subject is touched. Frozen features
are made once; the modes that change the network train it anew for every fold, which is why they come last.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelstem.adapted import TUNED, AdaptConfig, modes_of, needs_tokens, tuning_of
from voxelstem.certainty.crossfit import Answer, Outcomes, answering, cross_fit
from voxelstem.certainty.folds import Folds, Strata, asked_folds, strata_of
from voxelstem.choosing.efficiency import Curve, folds_of_curve, label_curve
from voxelstem.choosing.ladder import CANNOT, Climb, Rung, Tried, climb, said
from voxelstem.errors import AuditError, ConfigError
from voxelstem.features import embedder, examples_of
from voxelstem.finetune import fates
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, Speaker, tune
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.protocols import Example, Task
from voxelstem.samepeople import same_people
from voxelstem.store import Record, Store
from voxelstem.table import closest
from voxelstem.tasks.survive import Survive
from voxelstem.truth import Truth

CHEAP_FIRST = ("knn", "probe", "attention", *TUNED)
"""The order of the rungs; a task's other modes come before those that change the network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """What a run learns from."""

    model: Model
    store: Store
    truth: Truth
    records: tuple[Record, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What the climb chose, and what labels buy."""

    climb: Climb
    curve: Curve | None
    """None where the labelled subjects are too few for one: `why` says so."""
    curve_of: str
    """Its mode: the chosen one; a frozen one where a curve of the chosen one would take too long, as `why` says."""
    why: str

    def facts(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        curve = None if self.curve is None else self.curve.facts()
        return {"climb": self.climb.facts(), "curve": curve, "curve_of": self.curve_of, "why": self.why}


def choose(what: Labelled, config: AdaptConfig, rest: Path) -> Chosen:
    """Climb the ladder on the labelled subjects alone; features rest in `rest`.

    Raises:
        AuditError: the labelled subjects are too few to hold any out, or nothing can be learned on the first rung.
        ConfigError: a rung is asked for that the task, the network or the other settings do not allow.
    """
    task, settings = config.head, config.auto
    modes, left_out = allowed_rungs(what, config)
    lookers = _Lookers(what, config, rest)
    try:
        together = same_people(what.store, what.records, rest)
        strata = strata_of(lookers.examples(tokens=False), what.classes, together=together)
        plan = asked_folds(
            strata, count=settings.folds, told=what.truth.folds, repeats=settings.repeats, seed=config.seed
        )
    except ValueError as error:
        raise AuditError(
            f"the labelled subjects cannot be cross-fitted: {error}", hint="label more subjects, or name a mode"
        ) from error
    metric = task.metrics[0]
    answers = {mode: lookers.answer(mode) for mode in modes}
    rungs = [Rung(mode=mode, attempt=_attempt(answers[mode], plan, config, mode)) for mode in modes]
    try:
        found = climb(rungs, task=task, metric=metric, config=settings.ladder, left_out=left_out)
    except ValueError as error:
        raise AuditError(
            f"a fold of the labelled subjects cannot be learned from: {error}",
            hint="label more subjects, or name a mode",
        ) from error
    drawn = asked_folds(
        strata, count=settings.folds, told=what.truth.folds, repeats=settings.curve_repeats, seed=config.seed
    )
    mode, why = _of_which(found, strata, plan, drawn, config)
    return _with_curve(found, mode, answers[mode], strata, drawn, config, why) if mode else _without(found, why)


def allowed_rungs(what: Labelled, config: AdaptConfig) -> tuple[list[str], dict[str, str]]:
    """The rungs to climb, and why others are left out.

    Raises:
        ConfigError: a rung is asked for by name that the task, the network or the other settings do not allow.
    """
    task, asked = config.head, config.auto.rungs
    # Beside one vector for the scan there is nothing to attend to.
    bare = task.voxels or not (config.see.region or config.see.beside != "nothing")
    known = [mode for mode in rungs_of(task, what.model) if bare or mode != "attention"]
    if odd := sorted(set(asked) - set(known)):
        raise ConfigError(f"auto.rungs: '{odd[0]}' is no rung of {config.task} here", hint=closest(odd[0], known))
    modes = [mode for mode in known if not asked or mode in asked]
    try:
        if isinstance(task, Survive):
            fates.check(task, config.full or FinetuneConfig())
    except ConfigError as error:
        if set(asked) & set(TUNED):
            raise
        return [mode for mode in modes if mode not in TUNED], {m: error.problem for m in modes if m in TUNED}
    return modes, {}


def rungs_of(task: Task, model: Model) -> list[str]:
    """The modes of a task that this model has, from cheap to dear."""
    modes = [mode for mode in modes_of(task) if mode != "adapters" or hasattr(model.backbone, "block_encoder")]
    known = [mode for mode in CHEAP_FIRST if mode in modes]
    others = [mode for mode in modes if mode not in known]
    frozen = [mode for mode in known if mode not in TUNED]
    return [*frozen, *others, *(mode for mode in known if mode in TUNED)]


def _of_which(
    found: Climb, strata: Strata, plan: Sequence[Folds], drawn: Sequence[Folds], config: AdaptConfig
) -> tuple[str, str]:
    """The mode whose curve is drawn, and why it is not the chosen one: every point of a curve is fitted many times."""
    if found.chosen not in TUNED:
        return found.chosen, ""
    settings = dataclasses.replace(config.auto.curve, seed=config.seed)
    try:
        count = folds_of_curve(strata, drawn, settings)
    except ValueError as error:
        return "", f"no curve: {error}"
    seconds = next(step.seconds for step in found.steps if step.mode == found.chosen)
    minutes = count * seconds / sum(len(folds.held) for folds in plan) / 60
    if minutes <= config.auto.curve_minutes:
        return found.chosen, ""
    why = (
        f"a curve of {found.chosen} would train {count} networks, about {minutes:.0f} minutes; "
        f"auto.curve_minutes allows {config.auto.curve_minutes:g}"
    )
    frozen = [step.mode for step in found.steps if step.taken and step.mode not in TUNED]
    return (frozen[-1], f"this curve is of {frozen[-1]}: {why}") if frozen else ("", f"no curve: {why}")


def _with_curve(
    found: Climb, mode: str, answer: Answer, strata: Strata, plan: Sequence[Folds], config: AdaptConfig, why: str
) -> Chosen:
    settings = dataclasses.replace(config.auto.curve, seed=config.seed)
    try:
        count = folds_of_curve(strata, plan, settings)
        with progress("auto: what labels buy", count) as advance:
            curve = label_curve(
                answer, strata, plan, task=config.head, metric=found.metric, config=settings, advance=advance
            )
    except CANNOT as error:  # a draw of few subjects may show too little to be learned from: the page says so
        return _without(found, f"no curve: {said(error)}")
    return Chosen(climb=found, curve=curve, curve_of=mode, why=why)


def _without(found: Climb, why: str) -> Chosen:
    return Chosen(climb=found, curve=None, curve_of="", why=why)


def _attempt(answer: Answer, plan: Sequence[Folds], config: AdaptConfig, mode: str) -> Callable[[], Tried]:
    def attempt() -> Tried:
        began = time.monotonic()
        with progress(f"auto: {mode}", sum(len(folds.held) for folds in plan)) as advance:
            fitted = cross_fit(answer, plan, seed=config.seed, advance=advance)
        return Tried(fitted=fitted, seconds=time.monotonic() - began)

    return attempt


class _Lookers:
    """Gives every mode its way to answer; features are made when a mode first needs them, and once."""

    def __init__(self, what: Labelled, config: AdaptConfig, rest: Path) -> None:
        self.what, self.config, self.rest = what, config, rest
        self._examples: dict[bool, list[Example]] = {}

    def examples(self, *, tokens: bool) -> list[Example]:
        """The labelled scans with their frozen features."""
        what, task = self.what, self.config.head
        tokens = tokens or task.voxels
        if tokens not in self._examples:
            features = embedder(what.model, what.store, self.rest, tokens=tokens, see=self.config.see)
            with progress("auto: embed", len(what.records)) as advance:
                found: list[Example] = []
                for example in examples_of(what.store, what.records, what.truth, features, task):
                    found.append(example)
                    advance(1)
            self._examples[tokens] = found
        return self._examples[tokens]

    def answer(self, mode: str) -> Answer:
        """How a mode answers about held-out subjects."""
        task: Task = self.config.head
        if mode in TUNED:
            return self._tuned(mode)

        def frozen(kept: frozenset[str], held: frozenset[str], seed: int) -> Outcomes:
            examples = self.examples(tokens=needs_tokens(task, mode))
            return answering(task, examples, self.what.classes, mode=mode)(kept, held, seed)

        return frozen

    def _tuned(self, mode: str) -> Answer:
        what, task = self.what, self.config.head
        full = self.config.full or FinetuneConfig()
        full = dataclasses.replace(full, changes=tuning_of(mode))
        asked = Asked.of(self.config.task, task, what.truth, what.classes)

        def answer(kept: frozenset[str], held: frozenset[str], seed: int) -> Outcomes:
            learned = [record for record in what.records if record.subject in kept]
            head, card, tensors = tune(what.model, what.store, learned, asked, full, seed=seed)
            speaker = Speaker(what.model.with_weights(card, tensors), head, what.store, asked, full)
            shown = [record for record in what.records if record.subject in held]
            by_subject: dict[str, list[Any]] = {}
            for example in examples_of(what.store, shown, what.truth, speaker, task):
                by_subject.setdefault(example.subject, []).append(task.outcome(head, example))
            return {subject: task.combine(outcomes) for subject, outcomes in by_subject.items()}

        return answer
