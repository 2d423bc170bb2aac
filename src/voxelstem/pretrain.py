"""Pretrain: store -> views -> objective -> checkpoints -> weights. Started again on the same run, it resumes."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from voxelstem import distributed, seen
from voxelstem.backbones import BACKBONES
from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.card import Card, read_card, write_weights
from voxelstem.config import flatten
from voxelstem.distributed import Ranks
from voxelstem.engine import device as devices
from voxelstem.engine.checkpoint import CheckpointConfig, Resumed, resume
from voxelstem.engine.dashboard import dashboard
from voxelstem.engine.energy import EnergyMeter
from voxelstem.engine.folder import FREE_TO_CHANGE, check_settings, claim
from voxelstem.engine.handover import begin_from, gather_training
from voxelstem.engine.hardware import Fleet
from voxelstem.engine.journal import read_journal
from voxelstem.engine.label_views import follow
from voxelstem.engine.loader import Loader, LoaderConfig, ViewsConfig
from voxelstem.engine.lock import locked
from voxelstem.engine.loop import LoopConfig, Surroundings, train
from voxelstem.engine.measuring import measure
from voxelstem.engine.monitor import HealthConfig, Monitor, draw_blocks, draw_probe_set
from voxelstem.engine.optim import OptimConfig
from voxelstem.engine.pair_counts import shares
from voxelstem.engine.parallel import ParallelConfig, Trainee
from voxelstem.engine.plan import Plan, plan
from voxelstem.engine.scans import Chosen, choose
from voxelstem.engine.state import whole
from voxelstem.engine.watch import WatchConfig
from voxelstem.errors import CheckpointError, ConfigError, StoreError, VoxelstemError
from voxelstem.objectives import OBJECTIVES
from voxelstem.objectives.mae import MaeConfig
from voxelstem.protocols import Batch
from voxelstem.show import run_page
from voxelstem.store import Store
from voxelstem.store.selection import Selection, Wanted
from voxelstem.study import InputSpec
from voxelstem.table import Table
from voxelstem.views.crop import check_spacing

_log = logging.getLogger(__name__)


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
    health: HealthConfig = field(default_factory=HealthConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    begun_from: str = ""
    """SHA-256 of the weights that the run continues; `--from` sets it. Empty: it begins with drawn ones."""

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
        views, together = self.views, self.loader.batch // self.parallel.accumulate
        if check := getattr(self.objective, "check", None):
            check(views.global_, views.local, batch=together, backbone=self.backbone)
        if views.left_out and not getattr(self.objective, "leaves_out", False):
            raise ValueError(f"views.left_out: '{name}' has no use for it; leave it empty")

    def _check_numbers(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if self.device not in devices.DEVICES:
            raise ValueError(f"device is {', '.join(devices.DEVICES)}, got '{self.device}'")
        if self.precision not in devices.PRECISIONS:
            raise ValueError(f"precision is {', '.join(devices.PRECISIONS)}, got '{self.precision}'")


def _check_kind(part: str, table: Table, settings: Any, *, hint: str) -> None:
    """See that the settings are of the kind that the table's entry of this name takes."""
    if not isinstance(settings, table[settings.name].Config):
        raise ConfigError(f"{part}.name cannot become '{settings.name}': the recipe's {part} is another", hint=hint)


def run(
    config: PretrainConfig, *, store: Path, out: Path, weights: Path | None = None, probe: Path | None = None
) -> Card:
    """Train by `config` on the store's training subjects and write `out`/weights.

    Every process that torchrun started calls this with the same arguments. A run that is finished already, with the
    same settings, is not trained again: its weights' card comes back.

    Args:
        config: The recipe with its differences.
        store: The store to learn from.
        out: Folder of the run.
        weights: Weights folder to continue, trained here or imported; the network is drawn if left out.
        probe: A small labelled store to probe the run on now and then; the labels of `store` if left out.

    Raises:
        StoreError: the store has no scan of the recipe's modality to train on.
        ConfigError: `out` cannot be written, or another process trains in it.
        CheckpointError: the run was started with other settings, `weights` do not fit, or the disk is full.
    """
    parent = read_card(weights) if weights else None
    config = replace(config, begun_from=parent.sha256 if parent else "")
    device = devices.choose(config.device)
    with distributed.joined(device, timeout_s=config.parallel.timeout_s) as ranks:
        opened = Store.open(store)
        chosen = choose(opened, config.spec, config.views)
        check_settings(out, config, free=FREE_TO_CHANGE)
        if (out / "weights").exists():
            return _finished(out)
        objective = make_objective(config)
        notes = [_begin(weights, objective)] if weights else []
        notes += [{"left_out": chosen.left_out}] if chosen.left_out else []
        if weights and probe is None and ranks.rank == 0:
            _log.warning("without --probe the run is probed on its own scans: what it forgets is not measured")
        loader = make_loader(config, opened, chosen.scans, ranks)
        loader.batch(0)
        alone = replace(config, loader=replace(config.loader, samples_per_open=1))
        notes += measure(objective, lambda: make_loader(alone, opened, chosen.scans), run=out)
        trainee = Trainee(
            objective.to(device), config.optim, config.parallel, device=device, precision=config.precision
        )
        # Not before all this could be made: settings that cannot train leave no trace.
        with locked(out):
            if ranks.rank == 0:
                # Once more: another run may have held the folder, and let go of it, since.
                check_settings(out, config, free=FREE_TO_CHANGE)
            if distributed.said((out / "weights").exists()):
                return _finished(out)
            if ranks.rank == 0:
                claim(out, config)
            distributed.barrier()
            _train(config, trainee, loader, run=out, probe=Store.open(probe) if probe else opened, notes=notes)
            card = _write(config, trainee, make_card(config, objective, opened, chosen, parent), run=out)
        return card


def _train(
    config: PretrainConfig,
    trainee: Trainee,
    loader: Loader,
    *,
    run: Path,
    probe: Store,
    notes: list[dict[str, Any]],
) -> None:
    """Go on from the newest checkpoint to the end."""
    start, scans = resume(run / "checkpoints", trainee.objective, trainee.optimizer), _scans(loader)
    before = start.facts.get("scans", scans)
    if before != scans:
        raise CheckpointError(
            f"run '{run.name}' was started on other scans ({before['count']} then, {scans['count']} now)",
            hint="resume on the store as it was, or choose a new --out",
        )
    _go_back(loader, start)
    begun = [] if start.step else list(notes)
    look = _monitor(config, trainee, loader, probe, run=run, begins=not start.step)
    # Lines of steps that run again count too: what they took is spent.
    spent = [line["kwh"] for line in read_journal(run) if start.step and "kwh" in line]
    device = trainee.device
    settings = LoopConfig(
        steps=config.steps,
        batch=config.loader.batch,
        optim=config.optim,
        checkpoint=config.checkpoint,
        watch=config.watch,
        monitor_every=config.health.every,
    )
    used = spent[-1] if spent and distributed.here().rank == 0 else 0.0
    meter = EnergyMeter(device, before=used, first_here=distributed.first_on_machine())
    with meter, dashboard(f"pretrain {config.recipe}", config.steps, start=start.step) as show:

        def health() -> dict[str, Any]:
            energy = meter.kwh()
            spent = {"kwh": sum(distributed.each(energy.kwh)), "energy": energy.source}
            came = loader.speed() | shares(distributed.each(loader.pairs.facts()))
            return trainee.look(lambda: look(trainee.objective)) | came | spent

        def notes_of_step() -> list[dict[str, Any]]:
            meter.kwh()  # counters of processors begin anew within minutes
            return [*_emptied(begun), *_everybodys(loader.notes())]

        def batches(step: int) -> Generator[Batch, None, None]:
            found = loader.batches(step, config.steps, device=device)
            return follow(loader, found, step) if getattr(trainee.objective, "needs_labels", False) else found

        around = Surroundings(
            batches=batches,
            monitor=health,
            show=show,
            names=lambda step: [name for names in distributed.each(loader.names(step)) for name in names],
            notes=notes_of_step,
            facts=lambda: {"scans": scans, **_known(loader)},
            back=lambda start: _go_back(loader, start),
        )
        train(trainee, around, run=run, start=start, config=settings)


def _begin(weights: Path, objective: Any) -> dict[str, Any]:
    """Take over what fits; a line for the journal that says how much that was."""
    begun = begin_from(weights, objective)
    return {"begun_from": begun.taken, "reason": begun.reason, "anew": begun.left_out}


def _emptied(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [lines.pop(0) for _ in range(len(lines))]


def _everybodys(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What this process's loader said, and which scans were put aside by those of the others."""
    aside = [note for note in notes if "quarantined" in note]
    if not distributed.agree(bool(aside)):
        return notes
    rest = [note for note in notes if note not in aside]
    return rest + [note for each in distributed.each(aside) for note in each]


def _scans(loader: Loader) -> dict[str, Any]:
    """Which scans are trained on: the order in which they come hangs on all of them, targets on what is known."""
    return {"count": len(loader.keys), "sha256": hashlib.sha256(loader.known.encode()).hexdigest()}


def _known(loader: Loader) -> dict[str, Any]:
    return {
        "quarantined": distributed.each(sorted(loader.quarantined)),
        "pairs": distributed.each(loader.pairs.facts()),
    }


def _go_back(loader: Loader, start: Resumed) -> None:
    """What this process had put aside and counted at the checkpoint; of another number of processes, what all had."""
    each, here = start.facts.get("quarantined", []), distributed.here()
    loader.quarantine(each[here.rank] if len(each) == here.count else [key for keys in each for key in keys])
    loader.pairs.restore(start.facts.get("pairs", []), here)


def _monitor(
    config: PretrainConfig, trainee: Trainee, loader: Loader, probe: Store, *, run: Path, begins: bool
) -> Monitor:
    """What looks at the run now and then; the probe only where subjects carry voxel labels."""
    own = probe is loader.store
    # Quarantined or not: one that cannot be read is passed over, and a run that resumes must look at the same blocks.
    keys = set(loader.keys) if own else set(probe.select().key)
    labelled = sorted(set(probe.select(Wanted(labelled=True, modality=config.spec.modality)).key) & keys)
    seen = draw_probe_set(
        probe,
        [probe.record(key) for key in labelled],
        config.spec,
        patch_ijk=trainee.objective.backbone.patch_ijk,
        blocks=config.health.blocks,
        seed=config.seed,
    )
    if seen is None and not own:
        raise StoreError(
            f"the probe store has fewer than two subjects with voxel labels on {config.spec.modality} scans",
            hint="ingest labelled scans of two subjects or more into it (`voxelstem ingest --labels`)",
        )
    blocks = draw_blocks(loader.store, loader.keys, config.spec, blocks=config.health.blocks, seed=config.seed)
    return Monitor(
        config.health,
        blocks if seen is None else seen,
        device=trainee.device,
        memory=run / "start.safetensors",
        begins=begins,
    )


def make_objective(config: PretrainConfig) -> Any:
    """Backbone and objective, drawn under the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = BACKBONES[config.backbone.name](config.backbone)
        return OBJECTIVES[config.objective.name](config.objective, backbone)


def make_loader(config: PretrainConfig, store: Store, chosen: Selection, ranks: Ranks | None = None) -> Loader:
    """The recipe's loader over these scans, for this process of several."""
    ranks = ranks or Ranks()
    return Loader(
        store,
        list(chosen.key),
        config.spec,
        views=config.views,
        config=config.loader,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.count,
    )


def make_card(config: PretrainConfig, objective: Any, store: Store, chosen: Chosen, parent: Card | None = None) -> Card:
    """What the weights' folder says of itself; what grew from other weights keeps their licence, data and origin."""
    # Reconstructions of one acquisition count once.
    scans, keys = chosen.scans, set(chosen.scans.key)
    formats = Counter(record.provenance.source_format for record in store if record.key in keys)
    counts = [f"{count} {config.spec.modality} scans from {name} sources" for name, count in sorted(formats.items())]
    counts.append(f"of {scans.acquisitions()} acquisitions and {scans.subjects()} subjects")
    counts += ["with their reports"] if config.views.report else []
    counts += [f"left out: {count} scans, {reason}" for reason, count in chosen.left_out.items()]
    counts.append(seen.seen_line(record.key for record in store if record.split == "train"))
    levels = ("block", "scan") if objective.trains_scan_level else ("block",)
    kept = ("block", "scan") if objective.learner.has_scan_level else ("block",)
    return Card(
        architecture=flatten(config.backbone),
        spec=config.spec,
        licence=parent.licence if parent else "other",
        data=(*(f"{seen.BEFORE}{line}" for line in (parent.data if parent else ())), *counts),
        recipe=config.recipe,
        trained=tuple(sorted({*levels, *(level for level in (parent.trained if parent else ()) if level in kept)})),
        parent=config.begun_from,
        origin=parent.origin if parent else "",
        notes=parent.notes if parent else (),
    )


def _write(config: PretrainConfig, trainee: Trainee, card: Card, *, run: Path) -> Card:
    """Write the weights, with all that is needed to train on, and the page; process 0 does, the others wait."""
    kept = whole(trainee.objective.backbone.state_dict())
    facts = {"recipe": config.recipe, "steps": config.steps}
    training = gather_training(trainee.objective, trainee.optimizer, facts)
    # What else belongs to the weights: heads and a tower, where scans and reports were aligned.
    beside = getattr(trainee.objective, "beside", None)
    extras, texts = beside() if beside else ({}, {})
    extras = {name: whole(tensors) for name, tensors in extras.items()}
    if distributed.here().rank == 0:
        write_weights(run / "weights", kept, card, training.extras | extras, training.texts | texts)
        _draw_page(run)
    distributed.barrier()
    return read_card(run / "weights")


def _finished(run: Path) -> Card:
    """The card of a run that is done, and its page where it could not be written then."""
    if distributed.here().rank == 0 and not (run / "report" / "index.html").exists():
        _draw_page(run)
    return read_card(run / "weights")


def _draw_page(run: Path) -> None:
    """No page is no reason to fail: the weights are there."""
    try:
        run_page(run)
    except VoxelstemError as error:
        _log.warning("the run's page was not written: %s", error.problem)


def estimate(config: PretrainConfig, *, store: Path, out: Path, fleet: Fleet | None = None) -> Plan:
    """What a run will take, before the first step: memory, disk, samples a second, days and kWh.

    `fleet` are the GPUs it is meant for; none: this machine as it is. Nothing is written.

    Raises:
        StoreError: the store has no scan of the recipe's modality to train on.
        ConfigError: the batch cannot be shared out.
    """
    opened = Store.open(store)
    scans = choose(opened, config.spec, config.views).scans
    return plan(
        config, scans, make=make_objective, load=lambda few: make_loader(few, opened, scans), out=out, fleet=fleet
    )
