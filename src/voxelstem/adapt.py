"""Adapt: weights + few labels -> a task head, in a run folder for `evaluate`. Only mode `full` changes the weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from voxelstem.aligned import Aligned, read_aligned
from voxelstem.card import Card, check_commercial, link_files, members, read_card, write_weights
from voxelstem.config import overlay, read_toml, to_toml
from voxelstem.embed import embed_volume_cached
from voxelstem.embedding import Embedding
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, Speaker, tune
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.protocols import Example, Features, Head, Task
from voxelstem.store import Record, Store
from voxelstem.table import closest
from voxelstem.tasks import TASKS
from voxelstem.truth import Truth, class_names, draw, is_aligned, of_contrast, read_truth
from voxelstem.weights.hub import fetch, load

FULL = "full"
"""The mode that leaves nothing frozen; tasks say by `tunable` that they know it."""
FeaturesOf = Callable[[str], Features]
"""Gives the frozen features of the volume with this key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptConfig:
    """What is adapted to what, from how many labels."""

    task: str
    mode: str
    budget: int | None = None
    """Labelled training subjects to learn from; all of them if None."""
    seed: int = 0
    """Which subjects are drawn, the head's own randomness, and the weights of `scratch`."""
    like: str | None = None
    """With `scratch`, and needed there: a weights folder whose architecture and InputSpec to take."""
    commercial: bool = False
    """Claim commercial use, here and when this run is evaluated: weights whose licence forbids it are refused."""
    features: str | None = None
    """Folder in which features rest, for several runs to share; inside the run if None."""
    full: FinetuneConfig | None = None
    """How the whole network is trained, in mode `full`."""
    head: Any
    """The task's own settings."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a budget below 1 or a negative seed.
        """
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget must be at least 1 labelled subject, got {self.budget}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """A finished run of `adapt`, read back."""

    name: str
    config: AdaptConfig
    task: Task
    head: Head
    weights: Path
    labelled: tuple[str, ...]
    """Keys of the scans that the head learned from."""
    subjects: tuple[str, ...]
    """Their subjects."""
    sha256: str


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
        if config.mode == FULL:
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
    _write(work, config, plan.fit(examples), plan.model.card, plan.records)
    _keep_weights(work / "weights", weights, plan.model, text=is_aligned(config.head))


def _tune_whole(weights: str | Path, config: AdaptConfig, store: Store, labels: Path | None, work: Path) -> None:
    """Train network and head together and write the run, its weights being the trained ones."""
    model, truth, records, classes = _labelled(weights, config, store, labels)
    asked, full = Asked.of(config.task, config.head, truth, classes), config.full or FinetuneConfig()
    head, card, tensors = tune(model, store, records, asked, full, seed=config.seed)
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "weights", ignore_errors=True)
    card = write_weights(work / "weights", tensors, card)
    _write(work, config, head, card, records)


def speaker(adapted: Adapted, model: Model, store: Store) -> FeaturesOf:
    """What the network of a run in mode `full` says of scans, by the InputSpec that it was trained with.

    Raises:
        CheckpointError: head and weights belong to different runs.
    """
    asked = Asked(task=adapted.config.task, voxels=adapted.task.voxels, classes=adapted.head.classes, targets={})
    return Speaker(model, adapted.head, store, asked, adapted.config.full or FinetuneConfig())


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
        features=lambda folder: embedder(model, store, folder, tokens=task.voxels),
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


def resolve(task: str, mode: str, *, budget: int | None, settings: Mapping[str, Any]) -> AdaptConfig:
    """Make the complete config of a run.

    Raises:
        ConfigError: unknown task, a mode that this task has not, or a setting that does not exist.
    """
    kind = TASKS[task]
    modes = [*kind.modes, *([FULL] if getattr(kind, "tunable", False) else [])]
    if mode not in modes:
        raise ConfigError(f"task {task} has no mode '{mode}'", hint=closest(mode, modes))
    taken = {"task", "mode", "budget"} & set(settings)
    if taken:
        name = sorted(taken)[0]
        raise ConfigError(f"'{name}' is not a setting here", hint=f"use --{name}")
    try:
        full = FinetuneConfig() if mode == FULL else None
        config = AdaptConfig(task=task, mode=mode, budget=budget, full=full, head=kind())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return overlay(config, settings)


def examples_of(
    store: Store, records: Sequence[Record], truth: Truth, features: FeaturesOf, task: Task
) -> Iterator[Example]:
    """Features and truth of scans, one after the other."""
    for record in records:
        yield Example(
            subject=record.subject,
            key=record.key,
            features=features(record.key),
            affine_ras=record.affine_ras,
            label=truth.labels.get(record.subject),
            value=truth.values.get(record.subject),
            findings=truth.findings.get(record.subject),
            labels=store.labels(record.key) if task.voxels else None,
        )


def embedder(model: Model, store: Store, folder: Path, *, tokens: bool) -> FeaturesOf:
    """Embed volumes with a model, each one once: the features rest in `folder`."""
    return lambda key: embed_volume_cached(model, store, key, folder, tokens=tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Projected:
    """A scan in the space of texts, as a task sees it."""

    scan: Float[np.ndarray, " out"]
    """A unit vector."""
    tokens: None = None
    tokens_affine_ras: None = None


def projector(space: Aligned, store: Store, folder: Path) -> FeaturesOf:
    """Embed volumes and bring them into the space of texts; the embeddings before that rest in `folder`."""
    plain = embedder(space.model, store, folder, tokens=False)
    return lambda key: Projected(scan=space.embed_scan(cast(Embedding, plain(key))))


def open_space(weights: str | Path, config: AdaptConfig, *, commercial: bool = False) -> Aligned:
    """Read aligned weights for a task that compares scans with texts.

    Raises:
        ConfigError: `scratch`, which has no words; a tower or tokenizer that is not here; or the licence forbids it.
        CheckpointError: the weights were not aligned with reports, or are damaged.
    """
    if str(weights) == "scratch":
        raise ConfigError(
            f"an untrained network has no words, so {config.task} cannot use it",
            hint="give aligned weights; `evaluate` shows the same network untrained beside them",
        )
    folder = fetch(weights, text=True)
    if commercial or config.commercial:
        check_commercial(read_card(folder))
    tokenizer = config.head.tokenizer
    return read_aligned(folder, tokenizer=Path(tokenizer) if tokenizer else None)


def read_run(folder: Path) -> Adapted:
    """Read a run folder that `run` wrote.

    Raises:
        ConfigError: it is no finished run of `adapt`.
        CheckpointError: a file in it is damaged.
    """
    if not (folder / "adapt.json").is_file():
        raise ConfigError(f"'{folder.name}' is not a finished run of adapt", hint="give the --out folder of `adapt`")
    try:
        facts = json.loads((folder / "adapt.json").read_text(encoding="utf-8"))
        about = json.loads((folder / "head.json").read_text(encoding="utf-8"))
        arrays = load_file(folder / "head.safetensors")
        settings = read_toml(folder / "config.toml")
        _check_spec(folder, facts["spec"])
        config = overlay(resolve(str(settings["task"]), str(settings["mode"]), budget=None, settings={}), settings)
        return Adapted(
            name=folder.name,
            config=config,
            task=config.head,
            head=Head(mode=about["mode"], classes=tuple(about["classes"]), arrays=arrays, facts=about["facts"]),
            weights=folder / "weights",
            labelled=tuple(facts["labelled"]),
            subjects=tuple(facts["subjects"]),
            sha256=facts["sha256"],
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"the run '{folder.name}' is damaged: {error}", hint="adapt again") from error


def _check_spec(folder: Path, fitted: Mapping[str, Any]) -> None:
    """See that scans are fed to a head as they were when it was fitted."""
    now = json.loads(json.dumps(dataclasses.asdict(read_card(folder / "weights").spec)))
    other = sorted(name for name, value in fitted.items() if now.get(name) != value)
    if other:
        raise CheckpointError(
            f"the run '{folder.name}' was fitted to scans fed with another {other[0]} than its weights now say",
            hint="put the run's own weights back: spacing and normalisation belong to the head",
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


def _write(folder: Path, config: AdaptConfig, head: Head, card: Card, records: Sequence[Record]) -> None:
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    save_file({name: np.ascontiguousarray(array) for name, array in head.arrays.items()}, folder / "head.safetensors")
    (folder / "head.safetensors").chmod(0o644)
    about = {"mode": head.mode, "classes": head.classes, "facts": head.facts}
    (folder / "head.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    facts = {
        "labelled": [record.key for record in records],
        "subjects": sorted({record.subject for record in records}),
        "classes": head.classes,
        "sha256": card.sha256,
        "spec": dataclasses.asdict(card.spec),
    }
    (folder / "adapt.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _keep_weights(folder: Path, weights: str | Path, model: Model, *, text: bool) -> None:
    """The run is whole by itself: weights are linked into it where the disk can, else copied."""
    shutil.rmtree(folder, ignore_errors=True)
    if str(weights) == "scratch":
        write_weights(folder, model.backbone.state_dict(), model.card)
        return
    source = fetch(weights, text=text)
    link_files(source, members(source, model.card), folder)
