"""A run of `adapt`: its settings, and its folder written and read back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from voxelstem.artefact import RunCard, check_seal, page
from voxelstem.card import README, RUN, Card, is_run, link_files, members, read_card, write_weights
from voxelstem.certainty.assurance import Assurance
from voxelstem.certainty.folds import Count
from voxelstem.choosing.efficiency import CurveConfig
from voxelstem.choosing.ladder import LadderConfig
from voxelstem.config import overlay, read_toml, to_toml
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.findings import check_weights_name
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.model import Model
from voxelstem.protocols import Head, Task
from voxelstem.spent import Spent
from voxelstem.store import Record
from voxelstem.store.labels import Unknown
from voxelstem.table import closest
from voxelstem.tasks import TASKS
from voxelstem.weights.hub import fetch

TUNED = ("adapters", "full")
"""The modes that change the network, by low-rank changes or as a whole; tasks say by `tunable` that they know them."""
AUTO = "auto"
"""Climbs through the other modes and takes one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeeConfig:
    """What a head sees of a scan besides the model's last tokens; its baselines see it in the same way."""

    layers: tuple[int, ...] = ()
    """The tokens after these layers of the first level side by side, counted from 1; the model's own if empty."""
    region: str = ""
    """Of scan-level tasks: the structure in the scans' label maps whose tokens alone are pooled; the whole scan if
    empty. `predict` is given a mask."""
    beside: Literal["nothing", "intensity", "radiomics"] = "nothing"
    """`intensity`: beside each token the histogram of its patch, beside the scan that of the body. `radiomics`, of
    scan-level tasks: beside the scan IBSI's first-order radiomics and shape of the body, and of the `region`."""

    def __post_init__(self) -> None:
        """Guard the layers.

        Raises:
            ValueError: a layer twice, or below 1.
        """
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=1) < 1:
            raise ValueError(f"see.layers are different numbers from 1 upwards, got {self.layers}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoConfig:
    """How mode `auto` climbs."""

    rungs: tuple[str, ...] = ()
    """Modes that are tried, from cheap to dear; all that the task and the network have if empty."""
    folds: Count = "auto"
    """Of the labelled subjects, as `folds` of the run."""
    repeats: int = 2
    """So often they are parted anew for the climb."""
    curve_repeats: int = 5
    """And for the curve: with fewer its intervals are too narrow."""
    curve_minutes: float = 30.0
    """Where a curve of the chosen mode would take longer, because each of its points trains networks, that of the best
    frozen mode is drawn."""
    ladder: LadderConfig = field(default_factory=LadderConfig)
    curve: CurveConfig = field(default_factory=CurveConfig)

    def __post_init__(self) -> None:
        """Guard the counts.

        Raises:
            ValueError: fewer than two folds, or no repeat.
        """
        if (self.folds != "auto" and self.folds < 2) or min(self.repeats, self.curve_repeats) < 1:  # noqa: PLR2004
            raise ValueError(f"auto.folds must be at least 2, repeats 1, got {self.folds} and {self.repeats}")
        if not self.curve_minutes >= 0:
            raise ValueError(f"auto.curve_minutes must not be negative, got {self.curve_minutes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptConfig:
    """What is adapted to what, from how many labels."""

    task: str
    mode: str
    budget: int | None = None
    """Labelled training subjects to learn from; all of them if None."""
    title: str = ""
    """What is asked, in findings and on pages, such as `liver metastasis`; the task's name if empty."""
    seed: int = 0
    """Which subjects are drawn, the head's own randomness, and the weights of `scratch`."""
    like: str | None = None
    """With `scratch`, and needed there: a weights folder whose architecture and InputSpec to take."""
    folds: Count = "auto"
    """Folds of the labelled subjects by which a frozen network's answers are calibrated; 0 leaves that out. `auto`:
    those of the label file's column `fold`, else five, or as many as the rarest class allows. A number is taken at its
    word: where labels are too few for it nothing is fitted."""
    unknown: Unknown = "refused"
    """What becomes of labels of subjects who have no scan that can be used: they are refused with their rows, or
    `left_out`, counted and said."""
    commercial: bool = False
    """Claim commercial use, here and when this run is evaluated: weights whose licence forbids it are refused."""
    features: str | None = None
    """Folder in which features rest, for several runs to share; inside the run if None."""
    see: SeeConfig = field(default_factory=SeeConfig)
    """What a head sees, in the modes that leave the network frozen."""
    auto: AutoConfig = field(default_factory=AutoConfig)
    """How mode `auto` chooses."""
    full: FinetuneConfig | None = None
    """How the network is trained, in the modes `adapters` and `full`."""
    head: Any
    """The task's own settings."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a budget below 1, a negative seed, or a title that findings could not carry.
        """
        if self.title:
            check_weights_name("title", self.title)
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget must be at least 1 labelled subject, got {self.budget}")
        if self.folds != "auto" and (self.folds < 0 or self.folds == 1):
            raise ValueError(f"folds must be auto, 0, or 2 and more, got {self.folds}")
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
    assurance: Assurance = field(default_factory=Assurance)
    """How sure it may be of what it says."""
    card: RunCard = field(default_factory=RunCard)
    """What the run says of itself; an empty one where a version before 0.11 wrote none."""
    spent: Spent | None = None
    """What it took to make; None where a version before 0.11 measured nothing."""

    @property
    def tokens(self) -> bool:
        """Whether the head looks at patch tokens, or at the scan's vector alone."""
        return needs_tokens(self.task, self.config.mode)


def modes_of(task: Any) -> tuple[str, ...]:
    """The ways to adapt that a task knows, those included that change the network."""
    return (*task.modes, *(TUNED if getattr(task, "tunable", False) else ()))


def tuning_of(mode: str) -> Literal["all", "low_rank"]:
    """What of a network the modes that change it train."""
    return "low_rank" if mode == "adapters" else "all"


def needs_tokens(task: Task, mode: str) -> bool:
    """Whether a task's head looks at patch tokens in this mode; a scan-level task says so by `looks_at_tokens`."""
    asked = getattr(task, "looks_at_tokens", None)
    return task.voxels or (asked is not None and bool(asked(mode)))


def resolve(task: str, mode: str, *, budget: int | None, settings: Mapping[str, Any]) -> AdaptConfig:
    """Make the complete config of a run.

    Raises:
        ConfigError: unknown task, a mode that this task has not, or a setting that does not exist.
    """
    kind = TASKS[task]
    modes = [*modes_of(kind), *([AUTO] if not getattr(kind, "aligned", False) else [])]
    if mode not in modes:
        raise ConfigError(f"task {task} has no mode '{mode}'", hint=closest(mode, modes))
    taken = {"task", "mode", "budget"} & set(settings)
    if taken:
        name = sorted(taken)[0]
        raise ConfigError(f"'{name}' is not a setting here", hint=f"use --{name}")
    try:
        full = FinetuneConfig(changes=tuning_of(mode)) if mode in (*TUNED, AUTO) else None
        config = AdaptConfig(task=task, mode=mode, budget=budget, full=full, head=kind())
    except ValueError as error:
        raise ConfigError(str(error), hint="use --budget 1 or more, or leave it out to use all") from error
    config = overlay(config, settings)
    if config.full is not None and mode in TUNED and config.full.changes != tuning_of(mode):
        raise ConfigError("full.changes is set by --mode", hint="use --mode adapters or --mode full")
    if mode in TUNED and config.see != SeeConfig():
        raise ConfigError("see.* is for heads on a frozen network", hint="leave it out, or use --mode probe")
    if kind.voxels and config.see.beside == "radiomics":
        raise ConfigError("radiomics says nothing of single places", hint="use see.beside=intensity")
    if mode == "attention" and not kind.voxels and (config.see.region or config.see.beside != "nothing"):
        raise ConfigError(
            "attention looks at a scan's own blocks or patches: with see.region or see.beside there are none to weigh",
            hint="use --mode probe, or leave them out",
        )
    return config


def read_run(folder: Path) -> Adapted:
    """Read a run folder that `run` wrote.

    Raises:
        ConfigError: it is no finished run of `adapt`.
        CheckpointError: a file in it is damaged, or another one than `adapt` wrote there.
    """
    if not is_run(folder):
        raise ConfigError(f"'{folder.name}' is not a finished run of adapt", hint="give the --out folder of `adapt`")
    try:
        facts = json.loads((folder / RUN).read_text(encoding="utf-8"))
        _check_spec(folder, facts["spec"])
        if "card" in facts:  # what versions before 0.11 wrote is taken as it is
            check_seal(folder, whole=False)
        about = json.loads((folder / "head.json").read_text(encoding="utf-8"))
        arrays = load_file(folder / "head.safetensors")
        settings = read_toml(folder / "config.toml")
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
            assurance=_read_assurance(folder, facts),
            card=RunCard.of(facts.get("card", {})),
            spent=Spent.of(facts.get("spent") or {}),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"the run '{folder.name}' is damaged: {error}", hint="adapt again") from error


def _read_assurance(folder: Path, facts: Mapping[str, Any]) -> Assurance:
    """What `write_run` wrote; runs of versions before 0.10 know nothing."""
    if "assurance" not in facts:
        return Assurance(notes=("the run was made before answers were calibrated",))
    return Assurance.of(load_file(folder / "assurance.safetensors"), facts["assurance"])


def _check_spec(folder: Path, fitted: Mapping[str, Any]) -> None:
    """See that scans are fed to a head as they were when it was fitted."""
    now = json.loads(json.dumps(dataclasses.asdict(read_card(folder / "weights").spec)))
    other = sorted(name for name, value in fitted.items() if now.get(name) != value)
    if other:
        raise CheckpointError(
            f"the run '{folder.name}' was fitted to scans fed with another {other[0]} than its weights now say",
            hint="put the run's own weights back: spacing and normalisation belong to the head",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What `adapt` made of labelled scans."""

    head: Head
    records: tuple[Record, ...]
    """The scans that were learned from."""
    assurance: Assurance
    about: RunCard = field(default_factory=RunCard)
    spent: Spent | None = None
    """What all of it cost, the climb of `auto` included; None where nobody measured."""


def write_run(folder: Path, config: AdaptConfig, made: Made, card: Card) -> None:
    """Write everything of a run but its weights and its seal: what it was told, the head, and what that was fitted to.

    adapt.json and README.md hold one card.
    """
    head, records = made.head, made.records
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    for name, arrays in {"head": head.arrays, "assurance": made.assurance.arrays()}.items():
        path = folder / f"{name}.safetensors"
        save_file({part: np.asarray(array, order="C") for part, array in arrays.items()}, path)
        path.chmod(0o644)
    about = {"mode": head.mode, "classes": head.classes, "facts": head.facts}
    (folder / "head.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    facts = {
        "labelled": [record.key for record in records],
        "subjects": sorted({record.subject for record in records}),
        "classes": head.classes,
        "sha256": card.sha256,
        "spec": dataclasses.asdict(card.spec),
        "assurance": made.assurance.notes,
        "card": made.about.facts(),
        "spent": None if made.spent is None else made.spent.facts(),
    }
    (folder / README).write_text(page(made.about), encoding="utf-8")
    (folder / RUN).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def keep_weights(folder: Path, weights: str | Path, model: Model, *, text: bool) -> None:
    """Put the weights into the run, which is whole by itself: linked where the disk can, else copied."""
    shutil.rmtree(folder, ignore_errors=True)
    if str(weights) == "scratch":
        write_weights(folder, model.backbone.state_dict(), model.card)
        return
    source = fetch(weights, text=text)
    link_files(source, members(source, model.card), folder)
