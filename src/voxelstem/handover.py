"""A finished run of `adapt` for other programs: network and head as ONNX or OpenVINO, for nnU-Net, or as a whole.

What was written is held against what `voxelstem` itself says before it gets its name.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from voxelstem.adapted import TUNED, AdaptConfig, Adapted, read_run
from voxelstem.artefact import SEAL, check_seal, seal, sealed
from voxelstem.card import CONFIG, README, check_folder, read_tensors
from voxelstem.certainty.calibrators import Platt, Temperature
from voxelstem.config import flatten, overlay, to_toml, without_places
from voxelstem.errors import CheckpointError
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.tune import Asked, tuned
from voxelstem.heads.manylabels import answers_each
from voxelstem.model import Model
from voxelstem.truth import is_number, is_survival
from voxelstem.weights import onnx, openvino
from voxelstem.weights.heads import OUTPUTS, Crops, Kind, ScanHead, TokenHead
from voxelstem.weights.hub import load
from voxelstem.weights.levels import Level, check_new, drawn, levels_of, most_of, need, rows_to_try, write
from voxelstem.weights.nnunet import Trained, export_nnunet

ANSWERS = "answers.json"
ROWS = 16
"""Vectors or tokens that a head is tried on."""


def export_run(layout: str, folder: Path, out: Path) -> Path:
    """Write a run for others: `hub`, `onnx`, `openvino`, or `nnunet` (also called `nnssl`).

    Raises:
        ConfigError: it is no finished run, or a package is not installed.
        CheckpointError: it is damaged, cannot be expressed in this layout, `out` exists or cannot be written, or what
            was written does not say what the run says.
    """
    match layout:
        case "hub":
            return export_whole(folder, out)
        case "onnx":
            need("onnx", "onnxscript", "openvino")
            return export_graphs(folder, out, kind="onnx")
        case "openvino":
            need("openvino")
            return export_graphs(folder, out, kind="openvino")
        case "nnunet" | "nnssl":
            return export_tuned_unet(folder, out)
        case _:
            raise CheckpointError(
                f"a run cannot be written as {layout}", hint="choose hub, onnx, openvino or nnunet, or give its weights"
            )


def export_whole(folder: Path, out: Path) -> Path:
    """Copy a run after checking every file: ready to upload. Features of scans and names of folders stay behind.

    Raises:
        ConfigError: it is no finished run.
        CheckpointError: a file is damaged, the run has no card, `out` exists, or the disk does not take it.
    """
    adapted = read_run(folder)
    if not adapted.card.version:
        raise CheckpointError(
            f"the run '{folder.name}' was made by a version that wrote no card", hint="adapt again with this version"
        )
    check_seal(folder, whole=True)
    check_folder(folder / "weights")
    check_new(out)
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in (*sealed(folder), SEAL):
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, unfinished / name)
        check_seal(unfinished, whole=True)
        (unfinished / "config.toml").write_text(to_toml(placeless(adapted.config)), encoding="utf-8")
        seal(unfinished)
        unfinished.rename(out)
    except OSError as error:
        raise _unwritten(out, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _unwritten(out: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"'{out.name}' could not be written: {error.strerror}", hint="free some space and run again")


def export_graphs(folder: Path, out: Path, *, kind: str) -> Path:
    """Write network and head of a run as graphs, with answers.json, which says what they take and give.

    A frozen network leaves as its levels (`weights.levels`) and `head` above them, a tuned one as `network`, which
    takes crops.

    Raises:
        ConfigError: it is no finished run.
        CheckpointError: see `export_run`.
    """
    check_new(out)
    adapted = read_run(folder)
    run = _Run.of(adapted)
    levels = [_network(run)] if adapted.config.mode in TUNED else [*levels_of(adapted.weights), _head(run)]
    beside = {CONFIG: adapted.weights / CONFIG}
    beside |= {README: folder / README} if (folder / README).is_file() else {}
    way = onnx if kind == "onnx" else openvino
    try:
        with tempfile.TemporaryDirectory(prefix="voxelstem-") as place:
            beside[ANSWERS] = Path(place) / ANSWERS
            beside[ANSWERS].write_text(json.dumps(_told(run), indent=2) + "\n", encoding="utf-8")
            return write(levels, out, beside=beside, kind=kind, save=way.save, run=openvino.run)
    except OSError as error:  # of the folder for what is on its way
        raise _unwritten(out, error) from error


def export_tuned_unet(folder: Path, out: Path) -> Path:
    """Write a run of `segment` whose mode trained a U-Net as nnU-Net's predictor reads it.

    Raises:
        ConfigError: it is no finished run.
        CheckpointError: another task, mode or network, or as `weights.nnunet.export_nnunet`.
    """
    adapted = read_run(folder)
    if adapted.config.mode not in TUNED or adapted.config.task != "segment":
        raise CheckpointError(
            f"nnU-Net labels voxels with a network of its own; this run is {adapted.config.task} in mode "
            f"{adapted.config.mode}",
            hint="adapt with --task segment --mode full over a U-Net, or export the run as onnx",
        )
    full = adapted.config.full or FinetuneConfig()
    card = check_folder(adapted.weights)
    trained = Trained(
        card=card,
        tensors=read_tensors(adapted.weights, card),
        classes=adapted.head.classes,
        contrasts=full.contrasts or (card.spec.modality,),
        scans=len(adapted.labelled),
    )
    readme = folder / README
    return export_nnunet(trained, out, readme=readme if readme.is_file() else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """A run that can leave as graphs."""

    adapted: Adapted
    model: Model
    kind: Kind | None
    """What its head says of a scan; None where it labels voxels."""
    temperature: float
    lines: tuple[Platt | None, ...]
    """Of classes that do not exclude each other, how the log-odds of each become a probability, where that is known."""

    @classmethod
    def of(cls, adapted: Adapted) -> _Run:
        """Look whether it can.

        Raises:
            CheckpointError: its head or what the head sees cannot be expressed as a graph.
        """
        config, head = adapted.config, adapted.head
        linear = config.mode in (*TUNED, "probe") and config.task in ("classify", "regress", "survive", "segment")
        if not linear:
            raise CheckpointError(
                f"a head of {config.task} in mode {config.mode} cannot be written as a graph",
                hint="classify, regress, survive and segment can, in the modes probe, adapters and full",
            )
        if config.mode not in TUNED and (config.see.layers or config.see.region or config.see.beside != "nothing"):
            raise CheckpointError(
                "the head sees what is put together outside of the network (see.layers, see.region or see.beside)",
                hint="adapt again without these settings, or use `voxelstem predict`",
            )
        kind: Kind | None = "each" if answers_each(head) else "one"
        if is_survival(adapted.task):
            kind = "hazard" if head.facts.get("kind") == "hazard" else "cox"
        elif adapted.task.voxels or is_number(adapted.task):
            kind = None if adapted.task.voxels else "value"
        calibrator = adapted.assurance.calibrator
        scaled = kind == "one" and isinstance(calibrator, Temperature)
        yesno = adapted.assurance.yesno
        known = {} if yesno is None else dict(zip(yesno.names, yesno.lines, strict=True))
        return cls(
            adapted=adapted,
            model=load(adapted.weights),
            kind=kind,
            temperature=calibrator.temperature if scaled and calibrator is not None else 1.0,
            lines=tuple(known.get(name) for name in head.classes) if kind == "each" else (),
        )

    @property
    def calibration(self) -> str | dict[str, str]:
        """How what the graphs say became probabilities; of classes that do not exclude each other, class by class."""
        if self.kind == "each":
            how = ("none" if line is None else "platt" for line in self.lines)
            return dict(zip(self.adapted.head.classes, how, strict=True))
        return "temperature" if self.kind == "one" and self.adapted.assurance.calibrator is not None else "none"

    def scan_head(self, kind: Kind) -> ScanHead:
        """Its head, calibrated as the run is."""
        lines = [(1.0, 0.0) if line is None else (line.scale, line.shift) for line in self.lines]
        return ScanHead(self.adapted.head, kind, temperature=self.temperature, lines=lines)

    @property
    def answer(self) -> tuple[int, int] | None:
        """Which output holds the answer, and along which axis."""
        return {"one": (0, 1)}.get(self.kind or "")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Vector:
    """A scan's vector, as features."""

    scan: Float[np.ndarray, " dim"]
    tokens: None = None
    tokens_affine_ras: None = None


def _head(run: _Run) -> Level:
    """The head above a frozen network."""
    head, draw = run.adapted.head, torch.Generator().manual_seed(0)
    middle, scale = (np.asarray(head.arrays[name], dtype=np.float64) for name in ("middle", "scale"))
    if middle.ndim > 1:  # one row for each class
        middle, scale = middle.mean(axis=0), scale.mean(axis=0)
    noise = torch.randn(ROWS, len(middle), generator=draw, dtype=torch.float64)
    rows = (torch.from_numpy(middle) + torch.from_numpy(scale) * noise).float()
    if run.kind is None:
        module, name, outputs = TokenHead(head), "tokens", ("logits",)
        wanted, answer = (_cells(run, rows),), (0, 4)
    else:
        module, name, outputs = run.scan_head(run.kind), "scan", OUTPUTS[run.kind]
        wanted, answer = _said(run, rows), run.answer
    return Level(
        name="head",
        module=module.eval(),
        inputs=(name,),
        outputs=outputs,
        dynamic=({0: "row"},),
        example=(rows[:2],),
        trial=(rows,),
        wanted=wanted,
        answer=answer,
    )


@torch.inference_mode()
def _network(run: _Run) -> Level:
    """A tuned network with its head."""
    config, head, spec = run.adapted.config, run.adapted.head, run.model.spec
    full = config.full or FinetuneConfig()
    asked = Asked(task=config.task, voxels=run.adapted.task.voxels, classes=head.classes, targets={})
    net = tuned(run.model, head, asked, full)
    rows = rows_to_try(spec.block_ijk)
    crops = drawn(2 + rows, full.channels, spec, spec.block_ijk)
    above = None if run.kind is None else run.scan_head(run.kind)
    said = net(crops[2:])
    module = Crops(copy.deepcopy(net), above).eval()
    return Level(
        name="network",
        module=module,
        inputs=("crop",),
        outputs=("logits",) if run.kind is None else OUTPUTS[run.kind],
        dynamic=({0: "row"},),
        example=(crops[:2],),
        trial=(crops[2:],),
        wanted=(said,) if run.kind is None else _said(run, said),
        most=most_of(net.backbone),
        answer=(0, 1) if run.kind is None else run.answer,
    )


def _said(run: _Run, rows: Float[Tensor, "row dim"]) -> tuple[Tensor, ...]:
    """What `voxelstem` says of scans with these vectors, in the order of the graph's outputs."""
    task: Any = run.adapted.task
    head = run.adapted.head
    answers = [task.answer(head, _Vector(scan=row)) for row in rows.numpy().astype(np.float64)]
    match run.kind:
        case "value":
            return (_stacked(answers),)
        case "cox":
            return _stacked([one.risk for one in answers]), _stacked([one.curve.value for one in answers])
        case "hazard":
            return (_stacked([one.curve.value for one in answers]),)
        case "each":
            odds = [np.log(one) - np.log1p(-one) for one in answers]
            sure = run.adapted.assurance
            told = [
                [sure.present(n, float(p)).probability for n, p in zip(head.classes, one, strict=True)]
                for one in answers
            ]
            return _stacked(odds), _stacked(told)
        case _:
            # A softmax keeps all but a constant: that is what a linear map gives beyond it.
            array = {name: np.asarray(head.arrays[name], dtype=np.float64) for name in ("middle", "scale", "weight")}
            plain = (rows.numpy().astype(np.float64) - array["middle"]) / array["scale"] @ array["weight"].T
            chances = [run.adapted.assurance.chances(one) for one in answers]
            return _stacked(list(plain + head.arrays["bias"])), _stacked(chances)


def _cells(run: _Run, rows: Float[Tensor, "token dim"]) -> Tensor:
    """What the head of `segment` says of the cells of single tokens."""
    task: Any = run.adapted.task
    said = task.logits(run.adapted.head, rows.numpy()[:, None, None])
    sub = said.shape[1]
    return torch.from_numpy(np.ascontiguousarray(said)).float().reshape(len(rows), sub, sub, sub, -1)


def _stacked(rows: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(row, dtype=np.float64) for row in rows])).float()


def _told(run: _Run) -> dict[str, Any]:
    """What whoever runs the graphs must know: what goes in, what comes out, and what is done in between."""
    config, head, spec = run.adapted.config, run.adapted.head, run.model.spec
    facts: dict[str, Any] = {
        "task": config.task,
        "mode": config.mode,
        "title": config.title or config.task,
        "classes": (["background"] if run.adapted.task.voxels else []) + list(head.classes),
        "notice": "Not a medical device. Every answer is preliminary until a physician has read the images.",
    }
    if config.mode in TUNED:
        full = config.full or FinetuneConfig()
        joined = {"one": "mean of log-probabilities over windows", None: "mean of logits under a Gaussian bell"}
        facts["crop"] = {
            "contrasts": list(full.contrasts) or [spec.modality],
            "voxels_ijk": list(spec.block_ijk),
            "overlap": full.overlap,
            "windows": joined.get(run.kind, "median over windows"),
        }
    elif run.kind is None:
        facts["tokens"] = "patches of the blocks level, one row each; cells run along i, j and k of the patch"
    elif run.model.use_scan_level:
        facts["scan"] = "concat(scan, mean of blocks) of the scan level"
    else:
        facts["scan"] = (
            "mean over blocks, each weighed by the share of it that is scan, of concat(cls, mean of patches likewise)"
        )
    if run.kind == "one":
        facts["temperature"] = run.temperature
    if run.kind == "each":
        facts["yes"] = "a logit above 0; calibration changes how sure an answer is, and no answer"
    facts["calibration"] = run.calibration
    if run.kind == "value":
        facts["unit"] = getattr(run.adapted.task, "unit", "1")
    for name in ("time", "edges"):
        if run.kind in ("cox", "hazard") and name in head.arrays:
            facts[name] = head.arrays[name].tolist()
    return facts


def placeless(config: AdaptConfig) -> AdaptConfig:
    """The settings without folders of whoever made the run: of their files the names alone."""
    plain = replace(config, features=None)
    settings = flatten(plain)
    return overlay(plain, {name: told for name, told in without_places(settings).items() if told != settings[name]})
