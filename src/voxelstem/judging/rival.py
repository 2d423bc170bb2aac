"""The rival of every segmentation: a U-Net that begins with nothing and learns from the very same labelled scans."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from voxelstem.adapted import AdaptConfig
from voxelstem.engine.device import choose
from voxelstem.errors import ConfigError
from voxelstem.finetune.cases import companions, labelled, see
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.dynunet import ScratchUnet
from voxelstem.finetune.loop import fit, loss_of
from voxelstem.finetune.tune import Asked, Said, hold_out, say
from voxelstem.judging.contest import Contest, Outcomes, counted
from voxelstem.progress import progress
from voxelstem.protocols import Head
from voxelstem.spent import Spent
from voxelstem.store import Store
from voxelstem.study import InputSpec
from voxelstem.whole import write_whole

UNET = "unet"
STEPS = 200
"""Of the U-Net beside frozen heads: some minutes on two cores with blocks of 64 voxels, seconds on a GPU."""
CAVEAT = (
    "The U-Net from scratch (unet) had a small part of the 250,000 steps that nnU-Net takes: what it cannot do here "
    "says nothing of what such a network can."
)
VERSION = 1
"""Of what rests on disk: raised whenever the same request would get other outcomes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """What a U-Net from scratch answered, and what it took."""

    outcomes: Outcomes
    steps: int
    parameters: int
    spent: Spent


def caveats(contestants: Iterable[str]) -> tuple[str, ...]:
    """What a page must say of the contestants in its tables: of the U-Net, that it had little time."""
    return (CAVEAT,) if UNET in contestants else ()


def rival_config(config: AdaptConfig, steps: int = STEPS) -> FinetuneConfig:
    """How the U-Net beside a run is trained.

    Beside a network that was tuned: with the run's own steps, batch, patch, sampling, augmentation and loss. Beside a
    frozen one: for `steps` with the defaults. The optimiser is nnU-Net's own always, because rates that suit
    pretrained weights do not suit new ones: SGD at 1e-2 with Nesterov momentum, falling by a power.
    """
    base = config.full if config.full is not None else FinetuneConfig(steps=steps)
    plain = FinetuneConfig()
    return replace(
        base,
        lr=1e-2,
        optimiser="sgd",
        weight_decay=plain.weight_decay,
        clip=plain.clip,
        schedule="default",
        transfer="all",
        sizes="kept",
        changes="all",
        layer_decay=1.0,
        fusion="early",
    )


def rival(contest: Contest, spec: InputSpec, config: FinetuneConfig) -> Rival:
    """Train the U-Net on the contest's labelled scans, and score it by the contest's task on its tested scans.

    Args:
        contest: Of voxels; `seed` draws the network and the patches.
        spec: How scans are fed: spacing, intensities and (unless the config names a patch) the patch.
        config: Everything else.

    Raises:
        ConfigError: a patch that is too small, scans that are fitted to a block, or contrasts on different grids.
        AuditError: training diverged.
        IngestError: a scan that cannot be brought to the spacing.
    """
    if spec.resampling == "fit":
        raise ConfigError("scans are fitted to one block: windows cannot slide over them", hint="none: not measured")
    began = time.monotonic()
    spec = replace(spec, frame_ijk=None, block_ijk=config.patch_ijk or spec.block_ijk, preset="")
    config = replace(config, patch_ijk=spec.block_ijk)
    asked = Asked(task="segment", voxels=True, classes=contest.classes, targets={})
    net = ScratchUnet(
        contrasts=config.channels,
        out=asked.out,
        spacing_mm=_usual_spacing(contest, spec),
        patch_ijk=spec.block_ijk,
        seed=contest.seed,
    )
    together = companions(contest.store, contest.labelled, config.contrasts)
    records = [record for record in contest.labelled if record.key in together]
    apart = hold_out([record.subject for record in records], asked, config.held, contest.seed)
    cases = {record.key: labelled(contest.store, together[record.key], spec, contest.classes) for record in records}
    net.to(choose("auto"))
    with progress("evaluate: U-Net from scratch", config.steps) as advance:
        fit(
            net,
            [cases[record.key] for record in records if record.subject not in apart],
            config,
            loss=loss_of("segment", config),
            seed=contest.seed,
            report=lambda loss: advance(1, note=f"loss {loss:.3f}"),
            held=[cases[record.key] for record in records if record.subject in apart],
        )
    spent = Spent.since(began)
    speaker = UnetSpeaker(net, contest.store, spec, asked, config)
    with progress("evaluate: U-Net from scratch, test scans", len(contest.tested)) as advance:
        outcomes = contest.score(plain_head(contest.classes), counted(speaker, advance))
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return Rival(outcomes=outcomes, steps=config.steps, parameters=parameters, spent=spent)


class UnetSpeaker:
    """Says of any scan of a store what the U-Net makes of it, as `finetune.tune.Speaker` does of a tuned network."""

    def __init__(self, net: ScratchUnet, store: Store, spec: InputSpec, asked: Asked, config: FinetuneConfig) -> None:
        """Keep everything that is needed."""
        self.net, self.store, self.spec, self.asked, self.config = net, store, spec, asked, config

    def __call__(self, key: str) -> Said:
        """Look at one scan and its companions, under windows that slide."""
        (keys,) = companions(self.store, [self.store.record(key)], self.config.contrasts).values()
        return say(self.net, see(self.store, keys, self.spec), self.spec, self.asked, self.config)


def plain_head(classes: tuple[str, ...]) -> Head:
    """A head that takes logits as they are."""
    count = len(classes) + 1
    arrays = {"middle": np.zeros(count), "scale": np.ones(count), "weight": np.eye(count), "bias": np.zeros(count)}
    return Head(mode="full", classes=classes, arrays=arrays, facts={"sub": 1.0})


def resting_rival(contest: Contest, spec: InputSpec, config: FinetuneConfig, folder: Path) -> Rival:
    """`rival`, trained once: what came of it rests in `folder`, under a digest of everything that it hangs on.

    Raises:
        ConfigError, AuditError, IngestError: as `rival`.
        OSError: the folder cannot be written.
    """
    mark = _mark(contest, spec, config)
    path = folder / f"{UNET}-{mark[:24]}.json"
    if path.is_file():
        found = _read(path, mark)
        if found is not None:
            return found
    made = rival(contest, spec, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"mark": mark, **asdict(made)}, indent=1).encode())
    return made


def _read(path: Path, mark: str) -> Rival | None:
    """What rests there; None where it is another's or was cut short, and is made anew."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("mark") != mark:
            return None
        spent = Spent(**raw["spent"])
        return Rival(outcomes=raw["outcomes"], steps=raw["steps"], parameters=raw["parameters"], spent=spent)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _mark(contest: Contest, spec: InputSpec, config: FinetuneConfig) -> str:
    sides = [[(record.key, record.label_key) for record in side] for side in (contest.labelled, contest.tested)]
    # Contrasts that are seen beside the labelled ones are found in the store by themselves.
    beside = sorted(record.key for record in contest.store) if config.contrasts else []
    what = [VERSION, sides, beside, contest.classes, contest.seed, repr(contest.task), repr(spec), repr(config)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _usual_spacing(contest: Contest, spec: InputSpec) -> tuple[float, float, float]:
    """What a voxel measures to the network: as the InputSpec says, or the median of the labelled scans as they are."""
    if spec.resampling == "spacing":
        return spec.spacing_mm
    i, j, k = (sorted(edges)[len(edges) // 2] for edges in zip(*(r.spacing_mm for r in contest.labelled), strict=True))
    return i, j, k
