"""Adapt: weights + few labels -> a head, in a run folder for `evaluate`. `adapters` and `full` change the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from voxelstem.adapted import (
    AUTO,
    TUNED,
    AdaptConfig,
    Made,
    keep_weights,
    needs_tokens,
    read_run,
    resolve,
    tuning_of,
    write_run,
)
from voxelstem.assurance import Assurance, assure
from voxelstem.auto import Labelled, choose
from voxelstem.card import write_weights
from voxelstem.crossfit import out_of_fold
from voxelstem.errors import AuditError, CheckpointError, ConfigError
from voxelstem.features import FeaturesOf, embedder, examples_of, open_space, projector
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, tune
from voxelstem.folds import draw_folds, strata_of
from voxelstem.manifest import write_whole
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.protocols import Example, Head, Task
from voxelstem.report.ladder import ladder_page
from voxelstem.store import Record, Store
from voxelstem.truth import Truth, class_names, draw, is_aligned, is_survival, of_contrast, read_truth
from voxelstem.weights.hub import load

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
    opened = Store.open(store)
    work = out.with_name(f".{out.name}.unfinished")
    try:
        if config.mode == AUTO:
            config = _climb(weights, config, opened, labels, work)
        if config.mode in TUNED:
            _tune_whole(weights, config, opened, labels, work)
        else:
            _fit_head(weights, config, opened, labels, work)
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
    rest = Path(config.features) if config.features else work / "features"
    chosen = choose(what, config, rest)
    text = json.dumps(chosen.facts(), indent=2, allow_nan=False) + "\n"
    write_whole(work / "auto.json", text.encode())
    write_whole(work / "index.html", ladder_page(chosen.climb, chosen.curve, chosen.why).encode())
    mode = chosen.climb.chosen
    full = replace(config.full or FinetuneConfig(), changes=tuning_of(mode)) if mode in TUNED else None
    return replace(config, mode=mode, full=full)


def _fit_head(weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None, work: Path) -> None:
    """Embed the labelled scans, fit the head and write the run."""
    fitting = _aligned_fitting if is_aligned(config.head) else _plain_fitting
    plan = fitting(weights, config, store, labels)
    work.mkdir(parents=True, exist_ok=True)
    rest = Path(config.features) if config.features else work / "features"
    features = plan.features(rest)
    with progress("adapt: embed", len(plan.records)) as advance:
        taken = examples_of(store, plan.records, plan.truth, features, config.head)
        examples = list(_counted(taken, advance))
    try:
        head = plan.fit(examples)
    except ValueError as error:
        raise AuditError(
            f"nothing can be learned from these labels: {error}", hint="label other subjects, or use another --mode"
        ) from error
    made = Made(head=head, records=plan.records, assurance=plan.assure(examples))
    write_run(work, config, made, plan.model.card)
    keep_weights(work / "weights", weights, plan.model, text=is_aligned(config.head))


def _tune_whole(weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None, work: Path) -> None:
    """Train network and head together and write the run, its weights being the trained ones."""
    model, truth, records, classes = _labelled(weights, config, store, labels)
    asked, full = Asked.of(config.task, config.head, truth, classes), config.full or FinetuneConfig()
    head, card, tensors = tune(model, store, records, asked, full, seed=config.seed)
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "weights", ignore_errors=True)
    card = write_weights(work / "weights", tensors, card)
    why = "not calibrated: every fold would have to train the network anew"
    made = Made(head=head, records=records, assurance=assure({}, (), notes=(why,)))
    write_run(work, config, made, card)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is to be fitted, before any scan is looked at."""

    model: Model
    truth: Truth
    records: tuple[Record, ...]
    features: Callable[[Path], FeaturesOf]
    fit: Callable[[Sequence[Example]], Head]
    assure: Callable[[Sequence[Example]], Assurance]


def _plain_fitting(weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None) -> _Plan:
    task: Task = config.head
    model, truth, records, classes = _labelled(weights, config, store, labels)
    return _Plan(
        model=model,
        truth=truth,
        records=records,
        features=lambda folder: embedder(model, store, folder, tokens=needs_tokens(task, config.mode), see=config.see),
        fit=lambda examples: task.fit(examples, classes, mode=config.mode, seed=config.seed),
        assure=lambda examples: _assure(config, examples, classes),
    )


def _assure(config: AdaptConfig, examples: Sequence[Example], classes: tuple[str, ...]) -> Assurance:
    """Cross-fit the labelled subjects, where something can be calibrated by that."""
    task: Task = config.head
    reasons = {
        "voxels are not calibrated": task.voxels,
        "survival curves are not calibrated": is_survival(task),
        "not calibrated: folds=0": not config.folds,
    }
    if why := next((said for said, holds in reasons.items() if holds), ""):
        return assure({}, examples, notes=(why,))
    try:
        folds = draw_folds(strata_of(examples, classes), count=config.folds, seed=config.seed)
        outcomes = out_of_fold(task, examples, classes, mode=config.mode, seed=config.seed, folds=folds)
    except ValueError as error:
        return assure({}, examples, notes=(f"not calibrated: {error}",))
    return assure(outcomes, examples)


def _labelled(
    weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None
) -> tuple[Model, Truth, tuple[Record, ...], tuple[str, ...]]:
    """The model, what is known, whose scans are learned from, and the classes."""
    task: Task = config.head
    if labels is None:
        raise ConfigError(f"{config.task} learns from labels", hint="add --labels")
    model = _model(weights, config)
    truth = read_truth(store, labels, task, model.spec)
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
        truth = read_truth(store, labels, config.head, space.model.spec)
    records = draw(truth, config.budget, config.seed, voxels=False, split="validation") if calibrated else ()
    classes = truth.classes or tuple(config.head.ask()[1])
    return _Plan(
        model=space.model,
        truth=truth,
        records=records,
        features=lambda folder: projector(space, store, folder),
        fit=lambda examples: config.head.fit(examples, classes, mode=config.mode, seed=config.seed, space=space),
        assure=lambda _: Assurance(notes=("prompts are calibrated by mode `calibrated`, in their own way",)),
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
