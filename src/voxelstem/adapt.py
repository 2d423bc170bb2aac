"""Adapt: frozen weights + few labels -> a task head, in a run folder that `evaluate` and `predict` can read."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from voxelstem.card import members, write_weights
from voxelstem.config import overlay, read_toml, to_toml
from voxelstem.embed import embed_volume_cached
from voxelstem.errors import AuditError, CheckpointError, ConfigError
from voxelstem.model import Model
from voxelstem.progress import progress
from voxelstem.protocols import Example, Features, Head, Task
from voxelstem.store import Record, Store
from voxelstem.store.labels import match, read_labels
from voxelstem.store.subjects import site_key
from voxelstem.study import InputSpec
from voxelstem.table import closest
from voxelstem.tasks import TASKS
from voxelstem.weights.hub import fetch, load

_log = logging.getLogger(__name__)
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
class Truth:
    """What experts said about the scans of a store, for one task and one modality."""

    records: tuple[Record, ...]
    """The labelled scans, in the store's order."""
    labels: Mapping[str, str]
    """Subject to label, for scan-level tasks."""
    classes: tuple[str, ...]
    """Scan level: every label that occurs. Voxel level: the organs asked for, empty for all that are named."""

    def of(self, split: str) -> tuple[Record, ...]:
        """The labelled scans of one split."""
        return tuple(record for record in self.records if record.split == split)


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
    labels: Path,
    task: str,
    mode: str,
    out: Path,
    budget: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Fit a head for `task` on the store's labelled training subjects and write the run folder `out`.

    `weights` is a weights folder, a known name, or the word `scratch` together with the setting `like`.
    An interrupted run keeps its features and goes on.

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
    model = _model(weights, config)
    truth = read_truth(opened, labels, config.head, model.spec)
    records = draw(truth, config.budget, config.seed, voxels=config.head.voxels)
    classes = class_names(truth, records, voxels=config.head.voxels)
    work = out.with_name(f".{out.name}.unfinished")
    try:
        work.mkdir(parents=True, exist_ok=True)
        rest = Path(config.features) if config.features else work / "features"
        features = embedder(model, opened, rest, tokens=config.head.voxels)
        with progress("adapt: embed", len(records)) as advance:
            examples = list(_counted(examples_of(opened, records, truth, features, config.head), advance))
        head = config.head.fit(examples, classes, mode=config.mode, seed=config.seed)
        _write(work, config, head, model, records)
        _keep_weights(work / "weights", weights, model)
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


def resolve(task: str, mode: str, *, budget: int | None, settings: Mapping[str, Any]) -> AdaptConfig:
    """Make the complete config of a run.

    Raises:
        ConfigError: unknown task, a mode that this task has not, or a setting that does not exist.
    """
    kind = TASKS[task]
    if mode not in kind.modes:
        raise ConfigError(f"task {task} has no mode '{mode}'", hint=closest(mode, list(kind.modes)))
    taken = {"task", "mode", "budget"} & set(settings)
    if taken:
        name = sorted(taken)[0]
        raise ConfigError(f"'{name}' is not a setting here", hint=f"use --{name}")
    try:
        config = AdaptConfig(task=task, mode=mode, budget=budget, head=kind())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return overlay(config, settings)


def read_truth(store: Store, labels: Path, task: Task, spec: InputSpec) -> Truth:
    """Match the label file with the store's scans of the model's modality; a warning counts labels without a scan.

    Raises:
        ConfigError: the file is not what the task needs, nobody matches, or the modality is missing.
    """
    records = [record for record in store if record.modality == spec.modality]
    if not records:
        have = ", ".join(sorted({record.modality for record in store})) or "nothing"
        raise ConfigError(
            f"these weights were trained on {spec.modality}, the store holds {have}",
            hint=f"choose weights for {have}, or a store with {spec.modality} scans",
        )
    if task.voxels:
        wanted = _organs(labels)
        truth = Truth(records=_annotated(records, wanted, labels.name), labels={}, classes=wanted)
    else:
        read = match(read_labels(labels, "classify", site_key()), {record.subject for record in records})
        if read.missing:
            total = read.missing + len(read.labels)
            _log.warning(
                "%d of %d labelled subjects are not in the store (no %s scan)", read.missing, total, spec.modality
            )
        by_subject = {subject: str(label) for subject, label in read.labels.items()}
        records = [record for record in records if record.subject in by_subject]
        truth = Truth(records=tuple(records), labels=by_subject, classes=tuple(sorted(set(by_subject.values()))))
    if not truth.of("train"):
        raise ConfigError(
            f"no training subject of the store has {'voxel ' if task.voxels else ''}labels for this",
            hint="ingest more labelled scans: a subject's hash decides which split it is in",
        )
    return truth


def draw(truth: Truth, budget: int | None, seed: int, *, voxels: bool) -> tuple[Record, ...]:
    """Draw the labelled training subjects and return their scans. With labels per scan, classes take turns.

    Raises:
        ConfigError: fewer subjects than the budget, or a budget below the number of classes.
        AuditError: the training subjects are all of one class.
    """
    train = truth.of("train")
    subjects = sorted({record.subject for record in train})
    order = [subjects[index] for index in np.random.default_rng([seed, 11]).permutation(len(subjects))]
    if not voxels:
        order = _take_turns(order, truth.labels)
        kinds = len({truth.labels[subject] for subject in order})
        if kinds < 2:  # noqa: PLR2004
            raise AuditError(
                f"all {len(order)} labelled training subjects have the same label: nothing to tell apart",
                hint="label subjects of another class too",
            )
        if budget is not None and budget < kinds:
            raise ConfigError(f"budget {budget} cannot show each of {kinds} classes once", hint=f"use --budget {kinds}")
    if budget is not None and budget > len(order):
        raise ConfigError(
            f"budget {budget} is more than the {len(order)} labelled training subjects",
            hint=f"use --budget {len(order)}, or leave it out to use all",
        )
    drawn = set(order[:budget])
    return tuple(record for record in train if record.subject in drawn)


def class_names(truth: Truth, records: Sequence[Record], *, voxels: bool) -> tuple[str, ...]:
    """Names of the head's classes; without a wish, the organs that every drawn scan has names for.

    Raises:
        AuditError: the drawn scans have no organ in common.
    """
    if not voxels or truth.classes:
        return truth.classes
    shared = set.intersection(*(set(record.classes.values()) for record in records))
    if not shared:
        raise AuditError("the labelled scans have no structure in common", hint="name the classes in labels.json")
    return tuple(sorted(shared))


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
            labels=store.labels(record.key) if task.voxels else None,
        )


def embedder(model: Model, store: Store, folder: Path, *, tokens: bool) -> FeaturesOf:
    """Embed volumes with a model, each one once: the features rest in `folder`."""
    return lambda key: embed_volume_cached(model, store, key, folder, tokens=tokens)


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
        bare = AdaptConfig(task=str(settings["task"]), mode=str(settings["mode"]), head=TASKS[settings["task"]]())
        config = overlay(bare, settings)
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


def _organs(path: Path) -> tuple[str, ...]:
    """The names in the `classes` of a labels.json, in its order."""
    try:
        classes = json.loads(path.read_text(encoding="utf-8")).get("classes", {})
        return tuple(dict.fromkeys(str(name) for name in classes.values()))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no label file '{path.name}'", hint="check the path after --labels") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path.name} is not a label file for voxel labels",
            hint='it is JSON such as {"classes": {"1": "liver"}}',
        ) from error


def _annotated(records: Sequence[Record], wanted: tuple[str, ...], source: str) -> tuple[Record, ...]:
    """The scans in which every wanted organ was looked for: where one was not, silence does not mean absence."""
    labelled = [record for record in records if record.has_labels]
    known = {name for record in labelled for name in record.classes.values()}
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"{source} asks for '{name}', which no scan in the store has",
                hint=closest(name, sorted(known)) if known else "ingest masks with --labels",
            )
    whole = tuple(record for record in labelled if set(wanted) <= set(record.classes.values()))
    if not whole and labelled:
        lacking = {name: sum(name not in record.classes.values() for record in labelled) for name in wanted}
        why = ", ".join(f"'{name}' in {count}" for name, count in lacking.items() if count)
        raise ConfigError(
            f"{source} asks for {len(wanted)} classes, and all {len(labelled)} labelled scans are left out, because "
            f"not every class was looked for in them: {why}",
            hint=f"name in {source} only classes that were looked for in the same scans",
        )
    return whole


def _take_turns(order: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """Reorder subjects so that every class comes by in turn: the first n are as balanced as they can be."""
    queues = {name: [s for s in order if labels[s] == name] for name in sorted({labels[s] for s in order})}
    longest = max((len(queue) for queue in queues.values()), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)]


def _counted(items: Iterator[Example], advance: Callable[[], None]) -> Iterator[Example]:
    for item in items:
        yield item
        advance()


def _write(folder: Path, config: AdaptConfig, head: Head, model: Model, records: Sequence[Record]) -> None:
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    save_file({name: np.ascontiguousarray(array) for name, array in head.arrays.items()}, folder / "head.safetensors")
    (folder / "head.safetensors").chmod(0o644)
    about = {"mode": head.mode, "classes": head.classes, "facts": head.facts}
    (folder / "head.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    facts = {
        "labelled": [record.key for record in records],
        "subjects": sorted({record.subject for record in records}),
        "classes": head.classes,
        "sha256": model.card.sha256,
        "spec": dataclasses.asdict(model.spec),
    }
    (folder / "adapt.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _keep_weights(folder: Path, weights: str | Path, model: Model) -> None:
    """The run is whole by itself: weights are linked into it where the disk can, else copied."""
    shutil.rmtree(folder, ignore_errors=True)
    if str(weights) == "scratch":
        write_weights(folder, model.backbone.state_dict(), model.card)
        return
    source = fetch(weights)
    for name in members(source, model.card):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target)
        except OSError:
            shutil.copy2(source / name, target)
