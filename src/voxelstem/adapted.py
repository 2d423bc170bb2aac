"""A run of `adapt`: its settings, and its folder written and read back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from voxelstem.card import Card, link_files, members, read_card, write_weights
from voxelstem.config import overlay, read_toml, to_toml
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.model import Model
from voxelstem.protocols import Head, Task
from voxelstem.store import Record
from voxelstem.table import closest
from voxelstem.tasks import TASKS
from voxelstem.weights.hub import fetch

TUNED = ("adapters", "full")
"""The modes that change the network, by low-rank changes or as a whole; tasks say by `tunable` that they know them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeeConfig:
    """What a head sees of a scan besides the model's last tokens; its baselines see it in the same way."""

    layers: tuple[int, ...] = ()
    """The tokens after these layers of the first level side by side, counted from 1; the model's own if empty."""
    beside: Literal["nothing", "intensity"] = "nothing"
    """Beside each token the histogram of its patch, beside the scan that of the body: how bright they are, plainly."""

    def __post_init__(self) -> None:
        """Guard the layers.

        Raises:
            ValueError: a layer twice, or below 1.
        """
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=1) < 1:
            raise ValueError(f"see.layers are different numbers from 1 upwards, got {self.layers}")


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
    see: SeeConfig = field(default_factory=SeeConfig)
    """What a head sees, in the modes that leave the network frozen."""
    full: FinetuneConfig | None = None
    """How the network is trained, in the modes `adapters` and `full`."""
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


def resolve(task: str, mode: str, *, budget: int | None, settings: Mapping[str, Any]) -> AdaptConfig:
    """Make the complete config of a run.

    Raises:
        ConfigError: unknown task, a mode that this task has not, or a setting that does not exist.
    """
    kind = TASKS[task]
    modes = [*kind.modes, *(TUNED if getattr(kind, "tunable", False) else ())]
    if mode not in modes:
        raise ConfigError(f"task {task} has no mode '{mode}'", hint=closest(mode, modes))
    taken = {"task", "mode", "budget"} & set(settings)
    if taken:
        name = sorted(taken)[0]
        raise ConfigError(f"'{name}' is not a setting here", hint=f"use --{name}")
    try:
        full = FinetuneConfig(changes="low_rank" if mode == "adapters" else "all") if mode in TUNED else None
        config = AdaptConfig(task=task, mode=mode, budget=budget, full=full, head=kind())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return overlay(config, settings)


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


def write_run(folder: Path, config: AdaptConfig, head: Head, card: Card, records: Sequence[Record]) -> None:
    """Write everything of a run but its weights: what it was told, the head, and what that was fitted to."""
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


def keep_weights(folder: Path, weights: str | Path, model: Model, *, text: bool) -> None:
    """Put the weights into the run, which is whole by itself: linked where the disk can, else copied."""
    shutil.rmtree(folder, ignore_errors=True)
    if str(weights) == "scratch":
        write_weights(folder, model.backbone.state_dict(), model.card)
        return
    source = fetch(weights, text=text)
    link_files(source, members(source, model.card), folder)
