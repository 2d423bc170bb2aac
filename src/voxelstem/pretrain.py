"""Pretrain: store -> views -> objective -> checkpoints -> weights. Started again on the same run, it resumes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from voxelstem.backbones import BACKBONES
from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.card import Card, read_card, write_weights
from voxelstem.config import flatten, read_toml, to_toml
from voxelstem.engine import checkpoint, monitor, optim
from voxelstem.engine import device as devices
from voxelstem.engine.checkpoint import CheckpointConfig
from voxelstem.engine.journal import read_journal
from voxelstem.engine.loader import Loader, LoaderConfig, ViewsConfig
from voxelstem.engine.loop import LoopConfig, train
from voxelstem.engine.optim import OptimConfig
from voxelstem.errors import CheckpointError, ConfigError, StoreError
from voxelstem.objectives import OBJECTIVES
from voxelstem.objectives.mae import MaeConfig
from voxelstem.progress import progress
from voxelstem.store import Store
from voxelstem.store.selection import Selection, Wanted
from voxelstem.study import InputSpec
from voxelstem.table import Table
from voxelstem.views.crop import check_spacing

FREE_TO_CHANGE = {"loader.threads", "loader.workers", "loader.timeout_s", "loader.ahead", "loader.source"}
"""Settings that change who reads, and not one bit of what is read: a run may resume with others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """A complete recipe. `recipes/` holds them; differences come from TOML or the command line."""

    recipe: str
    seed: int = 0
    steps: int = 1000
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: the GPU where there is one."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto`: bf16 where the processor or GPU multiplies it in hardware."""
    spec: InputSpec = field(default_factory=InputSpec)
    backbone: Any = field(default_factory=ScanVitConfig)
    objective: Any = field(default_factory=MaeConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor_every: int = 100
    """Steps between two looks of the online probe and the effective rank."""
    probe_blocks: int = 48

    def __post_init__(self) -> None:
        """Guard what no part can see alone.

        Raises:
            ValueError: a number out of range, an unknown precision, or parts that do not fit together.
            ConfigError: an unknown backbone or objective, one whose settings are of another kind, or no spacing.
        """
        self._check_numbers()
        check_spacing(self.spec)
        _check_kind("backbone", BACKBONES, self.backbone, hint="choose a recipe that is made for this backbone")
        family, name = self.recipe.partition(".")[0], self.objective.name
        _check_kind("objective", OBJECTIVES, self.objective, hint=f"choose recipe {family}.{name} instead")
        if self.backbone.block_ijk != self.spec.block_ijk:
            raise ValueError(
                f"backbone.block_ijk {self.backbone.block_ijk} and spec.block_ijk {self.spec.block_ijk} differ"
            )
        if getattr(self.backbone, "channels", 1) != 1:
            raise ValueError(f"backbone.channels must be 1, as in every scan of a store, got {self.backbone.channels}")
        # An objective may say what it needs of the other parts.
        check = getattr(self.objective, "check", None)
        if check is not None:
            check(self.views.global_, self.views.local, batch=self.loader.batch, backbone=self.backbone)

    def _check_numbers(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.monitor_every < 1:
            raise ValueError(f"monitor_every must be >= 1, got {self.monitor_every}")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if self.probe_blocks < 2:  # noqa: PLR2004 - one half to fit, one to test
            raise ValueError(f"probe_blocks must be >= 2, got {self.probe_blocks}")
        if self.device not in devices.DEVICES:
            raise ValueError(f"device is {', '.join(devices.DEVICES)}, got '{self.device}'")
        if self.precision not in devices.PRECISIONS:
            raise ValueError(f"precision is {', '.join(devices.PRECISIONS)}, got '{self.precision}'")


def _check_kind(part: str, table: Table, settings: Any, *, hint: str) -> None:
    """See that the settings are of the kind that the table's entry of this name takes."""
    if not isinstance(settings, table[settings.name].Config):
        raise ConfigError(f"{part}.name cannot become '{settings.name}': the recipe's {part} is another", hint=hint)


def run(config: PretrainConfig, *, store: Path, out: Path) -> Card:
    """Train by `config` on the store's training subjects and write `out`/weights.

    A run that is finished already, with the same settings, is not trained again: its weights' card comes back.

    Raises:
        StoreError: the store has no scan of the recipe's modality to train on.
        ConfigError: `out` cannot be written.
        CheckpointError: the run was started with other settings, or the disk is full.
    """
    device = devices.choose(config.device)
    opened = Store.open(store)
    chosen = trainable(opened, config.spec)
    _refuse_other_settings(out, config)
    if (out / "weights").exists():
        return read_card(out / "weights")
    objective = make_objective(config).to(device)
    optimizer = optim.make_optimizer(objective, objective.learner.param_groups(), config.optim)
    loader = make_loader(config, opened, chosen)
    loader.batch(0)
    # Not before all this could be made: settings that cannot train leave no trace.
    _claim(out, config)
    start = checkpoint.resume(out / "checkpoints", objective, optimizer)
    before = [line for line in read_journal(out) if line["step"] < start]
    loader.quarantine(line["quarantined"] for line in before if "quarantined" in line)
    look = _health(config, loader, objective.backbone, device)
    settings = LoopConfig(
        steps=config.steps,
        optim=config.optim,
        checkpoint=config.checkpoint,
        device=device,
        precision=config.precision,
        monitor_every=config.monitor_every,
        notes=loader.notes,
    )
    with progress("pretrain", config.steps - start) as advance, closing(loader.batches(start, config.steps)) as batches:
        train(objective, optimizer, batches, run=out, start=start, config=settings, monitor=look, advance=advance)
    return write_weights(out / "weights", objective.backbone.state_dict(), make_card(config, objective, opened, chosen))


def _health(
    config: PretrainConfig, loader: Loader, backbone: Any, device: torch.device
) -> Callable[[], dict[str, float]]:
    """What the loop looks at now and then; the probe only where subjects carry voxel labels."""
    probe = monitor.draw_probe_set(
        loader.store,
        [loader.store.record(key) for key in _labelled(loader)],
        config.spec,
        patch_ijk=config.backbone.patch_ijk,
        blocks=config.probe_blocks,
        seed=config.seed,
    )
    if probe is None:
        views = loader.batch(config.steps).views["global"].flatten(0, 1)[:4].to(device)
        return lambda: {"effective_rank": monitor.token_rank(backbone, views)} | loader.speed()
    probe = replace(probe, blocks=probe.blocks.to(device))
    return lambda: (
        {
            "effective_rank": monitor.token_rank(backbone, probe.blocks),
            "probe/patch_balanced_accuracy": monitor.probe_patches(backbone, probe),
        }
        | loader.speed()
    )


def _labelled(loader: Loader) -> list[str]:
    chosen = loader.store.select(Wanted(labelled=True))
    return sorted(set(chosen.key) & set(loader.keys) - loader.quarantined)


def trainable(store: Store, spec: InputSpec) -> Selection:
    """Scans of the training subjects in the recipe's modality; test subjects are never shown to a model.

    Raises:
        StoreError: there are none.
    """
    chosen = store.select(Wanted(split="train", modality=spec.modality))
    if not len(chosen):
        have = sorted(set(store.select().modality)) or ["nothing"]
        raise StoreError(
            f"the store has no {spec.modality} scan in its training split "
            f"(it holds {', '.join(have)}, {len(store)} in all)",
            hint=f"ingest {spec.modality} scans, or choose a recipe for what the store holds",
        )
    return chosen


def make_objective(config: PretrainConfig) -> Any:
    """Backbone and objective, drawn under the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = BACKBONES[config.backbone.name](config.backbone)
        return OBJECTIVES[config.objective.name](config.objective, backbone)


def make_loader(config: PretrainConfig, store: Store, chosen: Selection) -> Loader:
    """The recipe's loader over these scans."""
    return Loader(store, list(chosen.key), config.spec, views=config.views, config=config.loader, seed=config.seed)


def make_card(config: PretrainConfig, objective: Any, store: Store, chosen: Selection) -> Card:
    """What the weights' folder says of itself; reconstructions of one acquisition count once."""
    formats = Counter(store.record(key).provenance.source_format for key in chosen.key)
    counts = [f"{count} {config.spec.modality} scans from {name} sources" for name, count in sorted(formats.items())]
    counts.append(f"of {chosen.acquisitions()} acquisitions and {chosen.subjects()} subjects")
    levels = ("block", "scan") if objective.trains_scan_level else ("block",)
    return Card(
        architecture=flatten(config.backbone),
        spec=config.spec,
        licence="other",
        data=tuple(counts),
        recipe=config.recipe,
        trained=levels,
    )


def _claim(out: Path, config: PretrainConfig) -> None:
    """Write the resolved config."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # By a rename: half a file would read as another run's settings.
        unfinished = out / ".config.toml.unfinished"
        unfinished.write_text(to_toml(config), encoding="utf-8")
        unfinished.replace(out / "config.toml")
    except OSError as error:
        raise ConfigError(
            f"the run folder '{out.name}' cannot be written: {error.strerror}",
            hint="check its rights and free some space, then run the same command again",
        ) from error


def _refuse_other_settings(out: Path, config: PretrainConfig) -> None:
    """See that what was trained in the run so far was trained by the same config; without a checkpoint, all are free.

    Raises:
        CheckpointError: it was trained by another one, or nothing says by which.
    """
    finished = (out / "weights").exists()
    if not finished and not checkpoint.checkpoints(out / "checkpoints"):
        return
    if not (out / "config.toml").exists():
        raise CheckpointError(
            f"run '{out.name}' has no config.toml that says how it was trained", hint="choose a new --out"
        )
    before = read_toml(out / "config.toml")
    now = {name: _plain(value) for name, value in flatten(config).items()}
    asked = (before.keys() | now.keys()) - FREE_TO_CHANGE
    changed = sorted(name for name in asked if before.get(name) != now.get(name))
    if changed:
        raise CheckpointError(
            f"run '{out.name}' was {'trained' if finished else 'started'} with other settings: "
            f"{', '.join(changed[:4])}",
            hint="choose a new --out" if finished else "use the same settings to resume, or choose a new --out",
        )


def _plain(value: Any) -> Any:
    """A setting as TOML gives it back: lists for tuples, and a word for none."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "none" if value is None else value


def estimate(config: PretrainConfig, *, store: Path) -> dict[str, Any]:
    """What a run will cost, before the first step: scans, parameters, bytes on disk and in memory."""
    opened = Store.open(store)
    chosen = trainable(opened, config.spec)
    device = devices.choose(config.device)
    objective = make_objective(config).to(device)
    wants = config.precision == "bf16" or (config.precision == "auto" and devices.bf16_pays(device))
    learned = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    held = sum(p.numel() for p in objective.state_dict().values())
    per_checkpoint = 4 * (held + 2 * learned)
    return {
        "recipe": config.recipe,
        "scans": len(chosen),
        "acquisitions": chosen.acquisitions(),
        "subjects": chosen.subjects(),
        "steps": config.steps,
        "samples": config.steps * config.loader.batch,
        "backbone_parameters": sum(p.numel() for p in objective.backbone.parameters()),
        "trained_parameters": learned,
        "state_bytes": 4 * (held + 3 * learned),
        "checkpoint_bytes": (config.checkpoint.keep + 1) * per_checkpoint,
        "device": device.type,
        "precision": "bf16" if wants else "fp32",
        "step_seconds": _time_a_step(config, make_loader(config, opened, chosen), objective, device),
    }


def _time_a_step(config: PretrainConfig, loader: Loader, objective: Any, device: torch.device) -> float:
    """Seconds of one real step here (the second of two, so that nothing is measured cold)."""
    seconds = 0.0
    for step in range(2):
        began = time.monotonic()
        with devices.autocast(device, config.precision):
            loss = objective.step(devices.move(loader.batch(step), device), progress=0.0).loss
        loss.backward()
        seconds = time.monotonic() - began
    return seconds
