"""Adapt: weights + few labels -> a head, in a run folder for `evaluate`. `adapters` and `full` change the weights."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from voxelstem import __version__
from voxelstem.adapted import (
    AUTO,
    TUNED,
    AdaptConfig,
    Made,
    SeeConfig,
    keep_weights,
    needs_tokens,
    read_run,
    resolve,
    tuning_of,
    write_run,
)
from voxelstem.artefact import CACHE, Calibration, LabelFacts, Parent, RunCard, Split, seal
from voxelstem.auto import Labelled, choose
from voxelstem.card import Card, read_card, write_weights
from voxelstem.certainty.assurance import LEVEL, Assurance, assure, groups_each
from voxelstem.certainty.folds import asked_folds, strata_of
from voxelstem.certainty.unseen import hear
from voxelstem.config import flatten, spelt, without_places
from voxelstem.errors import AuditError, CheckpointError, ConfigError
from voxelstem.features import FeaturesOf, embedder, examples_of, open_space, projector
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.sure import assure_tuned
from voxelstem.finetune.tune import Asked, Speaker, tune
from voxelstem.manifest import write_whole
from voxelstem.model import Model
from voxelstem.progress import progress, tell
from voxelstem.protocols import Example, Head, Task
from voxelstem.report.ladder import ladder_page
from voxelstem.samepeople import Pairs, same_people
from voxelstem.spent import Spent
from voxelstem.store import Record, Store
from voxelstem.truth import Truth, class_names, draw, is_aligned, is_survival, of_contrast, read_truth
from voxelstem.weights.hub import PREFIX, load
from voxelstem.weights.known import KNOWN

__all__ = ["read_run", "resolve", "run"]


def run(
    *,
    weights: str | Path,
    store: Path,
    labels: Path | None,
    task: str,
    mode: str,
    out: Path,
    budget: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Fit a head for `task` on the store's labelled training subjects and write the run folder `out`.

    `weights` is a weights folder, a known name, or the word `scratch` together with the setting `like`.
    Prompts need no `labels`; with them, only the classes that they name are asked for. An interrupted run keeps its
    features and goes on.

    Raises:
        ConfigError: unknown task, mode or setting, labels that match nobody, the wrong modality, `out` is taken, or
            the setting `commercial` and a licence that forbids it.
        AuditError: the labels hold one class only.
        CheckpointError: the weights or the run folder cannot be read or written.
    """
    config = resolve(task, mode, budget=budget, settings=settings or {})
    if out.exists() and any(out.iterdir()):
        finished = (out / "adapt.json").is_file()
        raise ConfigError(
            f"'{out.name}' holds a finished run already" if finished else f"'{out.name}' holds other files already",
            hint="choose another --out, or remove this folder first",
        )
    began, opened = time.monotonic(), Store.open(store)
    work = out.with_name(f".{out.name}.unfinished")
    try:
        for name in ("auto.json", "index.html"):  # of another run that was interrupted here
            (work / name).unlink(missing_ok=True)
        asked = config
        if asked.mode == AUTO:
            config = _climb(weights, config, opened, labels, work)
        finish = _tune_whole if config.mode in TUNED else _fit_head
        chosen = asked.mode == AUTO
        finish(_Order(weights=weights, config=config, store=opened, labels=labels, chosen=chosen, began=began), work)
        seal(work)
        if out.exists():
            out.rmdir()
        work.rename(out)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own kind.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"the run '{out.name}' cannot be written: {reason}",
            hint="check the folder's rights and free some space, then run the same command again",
        ) from error
    tell(f"adapt: {config.task} by {config.mode}, {Spent.since(began)}")
    return out


def _climb(weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None, work: Path) -> AdaptConfig:
    """Let `auto` choose a mode, keep what it found beside the run, and give back the settings of that mode."""
    if config.full is not None and config.full.contrasts:
        raise ConfigError(
            "mode auto compares ways to look at one contrast",
            hint="use --mode full, or leave full.contrasts out",
        )
    model, truth, records, classes = _labelled(weights, config, store, labels)
    what = Labelled(model=model, store=store, truth=truth, records=records, classes=classes)
    work.mkdir(parents=True, exist_ok=True)
    rest = Path(config.features) if config.features else work / CACHE
    chosen = choose(what, config, rest)
    text = json.dumps(chosen.facts(), indent=2, allow_nan=False) + "\n"
    write_whole(work / "auto.json", text.encode())
    write_whole(work / "index.html", ladder_page(chosen.climb, chosen.curve, chosen.curve_of, chosen.why).encode())
    mode = chosen.climb.chosen
    if mode not in TUNED:
        return replace(config, mode=mode, full=None)
    full = replace(config.full or FinetuneConfig(), changes=tuning_of(mode))
    return replace(config, mode=mode, full=full, see=SeeConfig())  # a network that is trained sees its own tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class _Order:
    """What a run is told."""

    weights: str | Path
    config: AdaptConfig
    store: Store
    labels: Path | None
    chosen: bool
    """Whether `auto` chose the mode."""
    began: float
    """A moment of `time.monotonic`."""

    def describe(self, parent: Card, truth: Truth, records: Sequence[Record], own: Card, sure: Assurance) -> RunCard:
        """What the run will say of itself."""
        there = [record for record in self.store if record.modality == own.spec.modality]
        parts = {name: [record for record in there if record.split == name] for name in ("train", "validation", "test")}
        return RunCard(
            task=self.config.task,
            mode=self.config.mode,
            title=self.config.title or self.config.task,
            chosen=self.chosen,
            modality=own.spec.modality,
            fed=f"fed at {own.spec.grid_in_words}, {own.spec.values_in_words}",
            licence=parent.licence,
            parent=_parent(self.weights, parent),
            weights_sha256=own.sha256,
            labels=LabelFacts.of(self.labels, truth, records),
            splits={name: Split.of(some) for name, some in {"learned": records, **parts}.items()},
            calibration=Calibration.of(sure),
            command=command_of(self.weights, self.config, labelled=self.labels is not None),
            version=__version__,
            torch=torch.__version__,
        )


def _named(weights: str | Path) -> str:
    """What everybody calls these weights; an empty word for a folder of somebody's."""
    said = str(weights)
    return said if said == "scratch" or said in KNOWN or said.startswith(PREFIX) else ""


def _parent(weights: str | Path, card: Card) -> Parent:
    """What a run grew from; weights that were only drawn have no digest that anybody could compare."""
    name, kind = _named(weights), f"{card.architecture.get('name', 'weights')} {card.recipe}".strip()
    known = KNOWN.get(name)
    repo = known.repo if known else name.removeprefix(PREFIX).partition("@")[0] if name.startswith(PREFIX) else ""
    return Parent(
        name=f"{kind}, untrained" if name == "scratch" else name or kind,
        sha256="" if name == "scratch" else card.sha256,
        origin=card.origin,
        untrained=not card.trained and (name == "scratch" or not card.origin),
        licence=card.licence,
        repo=repo,
    )


def command_of(weights: str | Path, config: AdaptConfig, *, labelled: bool) -> str:
    """The words that make a run again: all settings but those that a fresh one has, and nobody's folders."""
    usual = spelt(flatten(resolve(config.task, config.mode, budget=None, settings={})))
    told = spelt(without_places(flatten(replace(config, features=None))))
    changes = {name: value for name, value in told.items() if usual.get(name) != value}
    for name in ("task", "mode", "budget", "commercial"):
        changes.pop(name, None)
    changes |= {"like": '"WEIGHTS"'} if "like" in changes else {}
    words = ["voxelstem", "adapt", *(f"{name}={value}" for name, value in changes.items())]
    words += ["--weights", _named(weights) or "WEIGHTS", "--store", "STORE", *(["--labels", "LABELS"] * labelled)]
    words += ["--task", config.task, "--mode", config.mode, "--out", "RUN"]
    words += [] if config.budget is None else ["--budget", str(config.budget)]
    return shlex.join([*words, "--commercial"] if config.commercial else words)


def _fit_head(order: _Order, work: Path) -> None:
    """Embed the labelled scans, fit the head and write the run."""
    config = order.config
    fitting = _aligned_fitting if is_aligned(config.head) else _plain_fitting
    plan = fitting(order.weights, config, order.store, order.labels)
    work.mkdir(parents=True, exist_ok=True)
    rest = Path(config.features) if config.features else work / CACHE
    features = plan.features(rest)
    with progress("adapt: embed", len(plan.records)) as advance:
        taken = examples_of(order.store, plan.records, plan.truth, features, config.head)
        examples = list(_counted(taken, advance))
    try:
        head = plan.fit(examples)
    except ValueError as error:
        raise AuditError(
            f"nothing can be learned from these labels: {error}", hint="label other subjects, or use another --mode"
        ) from error
    sure, card = plan.assure(examples, rest), plan.model.card
    keep_weights(work / "weights", order.weights, plan.model, text=is_aligned(config.head))
    about = order.describe(card, plan.truth, plan.records, read_card(work / "weights"), sure)
    spent = Spent.since(order.began)
    write_run(work, config, Made(head=head, records=plan.records, assurance=sure, about=about, spent=spent), card)


def _tune_whole(order: _Order, work: Path) -> None:
    """Train network and head together and write the run, its weights being the trained ones."""
    config = order.config
    model, truth, records, classes = _labelled(order.weights, config, order.store, order.labels)
    asked, full = Asked.of(config.task, config.head, truth, classes), config.full or FinetuneConfig()
    head, card, tensors = tune(model, order.store, records, asked, full, seed=config.seed)
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "weights", ignore_errors=True)
    card = write_weights(work / "weights", tensors, card)
    delivered = Speaker(model.with_weights(card, tensors), head, order.store, asked, full)
    sure = assure_tuned(delivered, config.head, head, truth, records, seed=config.seed)
    about = order.describe(model.card, truth, records, card, sure)
    spent = Spent.since(order.began)
    write_run(work, config, Made(head=head, records=records, assurance=sure, about=about, spent=spent), card)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is to be fitted, before any scan is looked at."""

    model: Model
    truth: Truth
    records: tuple[Record, ...]
    features: Callable[[Path], FeaturesOf]
    fit: Callable[[Sequence[Example]], Head]
    assure: Callable[[Sequence[Example], Path], Assurance]
    """Given also where features rest, and copies that were found."""


def _plain_fitting(weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None) -> _Plan:
    task: Task = config.head
    model, truth, records, classes = _labelled(weights, config, store, labels)
    return _Plan(
        model=model,
        truth=truth,
        records=records,
        features=lambda folder: embedder(model, store, folder, tokens=needs_tokens(task, config.mode), see=config.see),
        fit=lambda examples: task.fit(examples, classes, mode=config.mode, seed=config.seed),
        assure=lambda examples, folder: _assure(
            config, examples, classes, truth, _Kin.of(store, records, folder if config.folds else None)
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kin:
    """Which labelled subjects belong together."""

    together: Pairs
    """Those who are one person under two names: held out together."""
    groups: Mapping[str, str]
    """The group of each subject's scans, where they have one."""

    @staticmethod
    def of(store: Store, records: Sequence[Record], rest: Path | None) -> _Kin:
        """Look for copies where anybody is to be held out; what is found rests in `rest`."""
        groups = groups_each((record.subject, record.acquisition) for record in records)
        return _Kin(together=() if rest is None else same_people(store, records, rest), groups=groups)


def _assure(
    config: AdaptConfig, examples: Sequence[Example], classes: tuple[str, ...], truth: Truth, kin: _Kin
) -> Assurance:
    """Cross-fit the labelled subjects, where something can be calibrated by that."""
    task: Task = config.head
    reasons = {
        "survival curves are not calibrated": is_survival(task),
        "not calibrated: folds=0": not config.folds,
    }
    if why := next((said for said, holds in reasons.items() if holds), ""):
        return assure({}, examples, notes=(why,))
    try:
        strata = strata_of(examples, classes, together=kin.together)
        (folds,) = asked_folds(strata, count=config.folds, told=truth.folds, repeats=1, seed=config.seed)
        heard = hear(task, examples, classes, mode=config.mode, seed=config.seed, folds=folds, level=LEVEL)
    except ValueError as error:
        if truth.folds or config.folds != "auto":  # what a user asks for is not left out in silence
            raise AuditError(
                f"the labelled subjects cannot be cross-fitted: {error}",
                hint="label more subjects, leave `folds` out, or set folds=0: then nothing is calibrated",
            ) from error
        return assure({}, examples, notes=(f"not calibrated: {error}",))
    return assure(heard.outcomes, examples, groups=kin.groups, notes=heard.notes)


def _labelled(
    weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None
) -> tuple[Model, Truth, tuple[Record, ...], tuple[str, ...]]:
    """The model, what is known, whose scans are learned from, and the classes."""
    task: Task = config.head
    if labels is None:
        raise ConfigError(f"{config.task} learns from labels", hint="add --labels")
    model = _model(weights, config)
    truth = read_truth(store, labels, task, model.spec, unknown=config.unknown)
    if config.full is not None:
        truth = of_contrast(truth, config.full.contrasts)
    records = draw(truth, config.budget, config.seed, voxels=task.voxels)
    return model, truth, records, class_names(truth, records, voxels=task.voxels)


def _aligned_fitting(weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None) -> _Plan:
    """Prompts are fitted to nobody; probabilities and thresholds to validation subjects, and to no others."""
    calibrated = config.mode != config.head.modes[0]
    if calibrated and labels is None:
        raise ConfigError(f"mode {config.mode} learns from labels", hint="add --labels, or use --mode prompts")
    if config.budget is not None and not calibrated:
        raise ConfigError(f"mode {config.mode} learns from no labels", hint="leave --budget out")
    config.head.ask()  # a misspelt class is said before gigabytes are read
    space = open_space(weights, config)
    truth = Truth(records=(), labels={}, classes=())
    if labels is not None:
        truth = read_truth(store, labels, config.head, space.model.spec, unknown=config.unknown)
    records = draw(truth, config.budget, config.seed, voxels=False, split="validation") if calibrated else ()
    classes = truth.classes or tuple(config.head.ask()[1])
    return _Plan(
        model=space.model,
        truth=truth,
        records=records,
        features=lambda folder: projector(space, store, folder),
        fit=lambda examples: config.head.fit(examples, classes, mode=config.mode, seed=config.seed, space=space),
        assure=lambda _, __: Assurance(notes=("prompts are calibrated by mode `calibrated`, in their own way",)),
    )


def _model(weights: str | Path, config: AdaptConfig) -> Model:
    if str(weights) != "scratch":
        if config.like is not None:
            raise ConfigError("'like' goes with --weights scratch only", hint="leave it out")
        return load(weights, commercial=config.commercial)
    if config.like is None:
        raise ConfigError(
            "--weights scratch does not say which network stays untrained",
            hint="add like=<weights folder>, such as like=runs/first/weights",
        )
    return load(config.like, commercial=config.commercial).scratch(seed=config.seed)


def _counted(items: Iterator[Example], advance: Callable[[], None]) -> Iterator[Example]:
    for item in items:
        yield item
        advance()
