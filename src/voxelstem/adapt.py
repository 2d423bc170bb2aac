"""Adapt: weights + few labels -> a head, in a run folder for `evaluate`. `adapters` and `full` change the weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from voxelstem.adapted import TUNED, AdaptConfig, keep_weights, read_run, resolve, write_run
from voxelstem.card import write_weights
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.features import FeaturesOf, embedder, examples_of, open_space, projector
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, tune
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.protocols import Example, Head, Task
from voxelstem.store import Record, Store
from voxelstem.truth import Truth, class_names, draw, is_aligned, of_contrast, read_truth
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
    write_run(work, config, plan.fit(examples), plan.model.card, plan.records)
    keep_weights(work / "weights", weights, plan.model, text=is_aligned(config.head))


def _tune_whole(weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None, work: Path) -> None:
    """Train network and head together and write the run, its weights being the trained ones."""
    model, truth, records, classes = _labelled(weights, config, store, labels)
    asked, full = Asked.of(config.task, config.head, truth, classes), config.full or FinetuneConfig()
    head, card, tensors = tune(model, store, records, asked, full, seed=config.seed)
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "weights", ignore_errors=True)
    card = write_weights(work / "weights", tensors, card)
    write_run(work, config, head, card, records)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is to be fitted, before any scan is looked at."""

    model: Model
    truth: Truth
    records: tuple[Record, ...]
    features: Callable[[Path], FeaturesOf]
    fit: Callable[[Sequence[Example]], Head]


def _plain_fitting(weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None) -> _Plan:
    task: Task = config.head
    model, truth, records, classes = _labelled(weights, config, store, labels)
    return _Plan(
        model=model,
        truth=truth,
        records=records,
        features=lambda folder: embedder(model, store, folder, tokens=task.voxels, see=config.see),
        fit=lambda examples: task.fit(examples, classes, mode=config.mode, seed=config.seed),
    )


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
