"""ResEnc U-Nets of nnssl in and out: OpenMind's, SSL3D's and nnFoundation's checkpoints, and ours for nnU-Net.

A checkpoint holds `network_weights` and `nnssl_adaptation_plan` (nnssl at 70448644; nnU-Net's loader of such files at
0e495086). The plan says how the network was fed; that becomes the card's `InputSpec`. Tensors: `nnssl_names.py`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voxelstem.backbones.unet import UNetConfig, resenc
from voxelstem.card import NOT_STATED, README, Card, digest, read_card, read_tensors, trained_where, write_weights
from voxelstem.config import flatten, overlay
from voxelstem.errors import CheckpointError
from voxelstem.study import INPUT_SPECS, InputSpec
from voxelstem.weights.foreign import Checkpoint, check_finite, one_line, read_checkpoint
from voxelstem.weights.known import Known
from voxelstem.weights.nnssl_names import (
    KERNEL_AXES,
    KJI,
    STAGES,
    STEM,
    Axes,
    config_of,
    merged,
    to_ours,
    to_theirs,
    under_one_root,
    widened,
)

WEIGHTS, PLAN = "network_weights", "nnssl_adaptation_plan"
FILE, PLAN_FILE, CONFIG_FILE = "checkpoint_final.pth", "adaptation_plan.json", "config.json"
RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")
"""Which of a network's settings nnU-Net looks up by name."""
CITE = "Cite: "
"""What a note of a card begins with that names a work to cite."""
SPEC = INPUT_SPECS["mri-nnssl"]
LONGEST_PLAN = 1 << 20
"""Bytes of an adaptation_plan.json, or of a README beside a checkpoint, that are read at most."""
MOST_VOXELS = 1 << 28
"""Of one block, as in `model.load`."""
MOST_CITED = 8
_LICENCE = re.compile(r"^license:[ \t]*(\S[^\n]*)$", re.MULTILINE)
_NO_PLAN = "The file has no adaptation plan: 1 mm, z-scores and blocks of 160 voxels, nnssl's usual way, are assumed."
_ZSCORE = "ZScoreNormalization"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What of an adaptation plan matters here."""

    spec: InputSpec = SPEC
    axes: Axes = KJI
    """Which of their axes ours are."""
    key_to_encoder: str = STAGES
    key_to_stem: str = STEM
    stated: bool = False
    """Whether the file has a plan at all."""


def import_nnssl(
    path: Path,
    out: Path,
    *,
    about: Known | None = None,
    modality: str = "MR",
    channels: int = 1,
    encoder_only: bool = False,
) -> Card:
    """Check nnssl's checkpoint `path` and write its network to the weights folder `out`, a U-Net fed by z-scores.

    Args:
        path: Its file, with or without the state of a training. Without a plan inside, `adaptation_plan.json` beside
            it is read.
        out: The folder to make.
        about: Which known weights these are: their licence, data and origin. Else the README.md beside the file may
            state the licence, as a download from the Hub has it.
        modality: Of the scans that the weights will be fed.
        channels: How many equal channels to make of the one that the network takes, to feed it as many contrasts.
        encoder_only: Leave out whatever is not the encoder, known or not.

    Raises:
        CheckpointError: another network, code in the file, values that are not finite, a plan that cannot be obeyed,
            or `out` cannot be written.
    """
    found = read_checkpoint(path, (WEIGHTS, "state_dict"))
    plan = read_plan(path, found)
    state, different = merged(under_one_root(found.tensors, plan.key_to_encoder, plan.key_to_stem))
    others = [name for name in state if encoder_only and not name.startswith("encoder.")]
    state = {name: tensor for name, tensor in state.items() if name not in others}
    spec = replace(plan.spec, modality=modality, preset=plan.spec.preset if modality == SPEC.modality else "")
    config, tensors = _network(state, spec.block_ijk, plan.axes)
    check_finite({path.name: tensors})
    if channels > 1:
        tensors, config = widened(tensors, channels), replace(config, channels=channels)
    notes = _notes(found, plan, different, len(others)) + _cited(found.beside.get("citations"))
    card = Card(
        architecture=flatten(config),
        spec=spec,
        licence=about.licence if about else _licence(path.parent / "README.md"),
        data=about.data if about else (),
        recipe=one_line(f"nnssl {found.beside.get('trainer_name', '')}").strip(),
        trained=("block",),
        parent=digest(path),
        origin=about.origin if about else "a checkpoint of nnssl; its publisher was not named at the import",
        notes=(*notes, *(about.cite if about else ())),
    )
    return write_weights(out, tensors, card)


def export_nnssl(folder: Path, out: Path) -> Path:
    """Write a U-Net's weights as nnU-Net fine-tunes them: checkpoint_final.pth, adaptation_plan.json, config.json.

    The file holds each tensor under all of its names (956 for ResEnc-L) without a second copy, and nothing but
    tensors, numbers and words. It is read back and compared bit for bit. A decoder without skips is left out: nnU-Net
    has no place for it, and draws its own.

    Raises:
        CheckpointError: not a U-Net, not fed by z-scores, damaged, `out` exists, or the disk does not take it.
    """
    card = read_card(folder)
    config = _exportable(folder, card)
    tensors = read_tensors(folder, card)
    if config.skips == "none":
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
        config = replace(config, decoder=False, skips="full")
    tensors = to_ours(tensors, config, axes=(0, 1, 2))
    if out.exists():
        raise CheckpointError(f"{out.name} exists already", hint="choose another folder or remove this one")
    plan = plan_of(config, card.spec, dataset=card.recipe or "voxelstem")
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _save(unfinished / FILE, to_theirs(tensors), plan, card)
        (unfinished / PLAN_FILE).write_text(json.dumps(plan | {"trainer_name": "voxelstem"}, indent=4) + "\n")
        (unfinished / CONFIG_FILE).write_text(json.dumps({"library": "nnssl", "written_by": "voxelstem"}) + "\n")
        if (folder / README).is_file():
            shutil.copyfile(folder / README, unfinished / README)
        _compare(unfinished / FILE, tensors)
        unfinished.rename(out)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0][:200]
        raise CheckpointError(f"'{out.name}' could not be written: {reason}", hint="free some space") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def plan_of(config: UNetConfig, spec: InputSpec, *, dataset: str) -> dict[str, Any]:
    """The adaptation plan of a network of ours: plain values, every key that nnU-Net's loader asks for."""
    spacing = None if spec.resampling == "native" else list(spec.spacing_mm[::-1])
    style = "noresample" if spacing is None else "onemmiso" if spec.spacing_mm == (1.0, 1.0, 1.0) else "median"
    patch = list(spec.block_ijk[::-1])
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"nnsslPlans_{style}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": style,
        "normalization_schemes": [_ZSCORE],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": resampling | {"is_seg": True, "order": 1},
        "spacing": spacing,
        "patch_size": patch,
    }
    return {
        "architecture_plans": _architecture(config),
        "pretrain_plan": {
            "dataset_name": dataset,
            "plans_name": "nnsslPlans",
            "original_median_spacing_after_transp": list(spec.spacing_mm[::-1]),
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {style: configuration},
            "experiment_planner_used": "FixedResEncUNetPlanner",
        },
        "pretrain_num_input_channels": config.channels,
        "recommended_downstream_patchsize": patch,
        "key_to_encoder": STAGES,
        "key_to_stem": STEM,
        "keys_to_in_proj": [f"{STEM}.convs.0.conv", f"{STEM}.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }


def read_plan(path: Path, found: Checkpoint) -> Plan:
    """The plan inside a checkpoint, or in the file beside it, checked.

    Raises:
        CheckpointError: it asks for a preprocessing that is not done here, or is damaged.
    """
    said = found.beside.get(PLAN)
    beside = path.with_name(PLAN_FILE)
    if said is None and beside.is_file():
        try:
            with beside.open("rb") as file:
                said = json.loads(file.read(LONGEST_PLAN))
        except (OSError, ValueError, RecursionError) as error:
            raise _odd_plan("it is no JSON") from error
    if said is None:
        return Plan()
    try:
        return _plan(said)
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError, StopIteration) as error:
        raise _odd_plan(f"an entry is missing or of another kind ({type(error).__name__})") from error
    except ValueError as error:
        raise _odd_plan(one_line(error)) from error


def _plan(said: Mapping[str, Any]) -> Plan:
    pretraining = said["pretrain_plan"]
    configuration, *others = pretraining["configurations"].values()
    fed = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm")
    if any(other.get(name) != configuration.get(name) for other in others for name in fed):
        raise ValueError("it has several configurations, and does not say which one trained the weights")
    schemes = configuration.get("normalization_schemes", [_ZSCORE])
    if set(schemes) != {_ZSCORE} or any(configuration.get("use_mask_for_norm", ())):
        raise ValueError(f"normalisation {one_line(schemes)[:80]}, and only z-scores of whole volumes are done here")
    order = [int(axis) for axis in pretraining.get("transpose_forward", (0, 1, 2))]
    if sorted(order) != [0, 1, 2]:
        raise ValueError("transpose_forward names no three axes")
    # Their array runs (k, j, i), then `order` picks: our axis a is number 2 - a of their array.
    i, j, k = (order.index(2 - axis) for axis in range(3))
    patch = said.get("pretrain_patch_size") or configuration["patch_size"]
    spacing = configuration["spacing"]
    stated = spacing or pretraining.get("original_median_spacing_after_transp") or (1, 1, 1)
    edge_i, edge_j, edge_k = _in_order(patch, (i, j, k))
    spec = replace(
        SPEC,
        spacing_mm=_in_order(stated, (i, j, k)),
        block_ijk=(int(edge_i), int(edge_j), int(edge_k)),
        resampling="spacing" if spacing else "native",
        preset="",
    )
    if math.prod(spec.block_ijk) > MOST_VOXELS or not all(map(math.isfinite, spec.spacing_mm)):
        raise ValueError(f"blocks of {spec.block_ijk} voxels at {spec.spacing_mm} mm")
    return Plan(
        spec=SPEC if replace(spec, preset=SPEC.preset) == SPEC else spec,
        axes=(i, j, k),
        key_to_encoder=str(said.get("key_to_encoder", STAGES)),
        key_to_stem=str(said.get("key_to_stem", STEM)),
        stated=True,
    )


def _in_order(values: Any, axes: Axes) -> tuple[float, float, float]:
    """Three numbers of theirs in our order."""
    one, two, three = values
    i, j, k = (float((one, two, three)[axis]) for axis in axes)
    return i, j, k


def _odd_plan(why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint's adaptation plan cannot be followed: {why}",
        hint="ask its publisher for the plan that belongs to it; feeding scans otherwise would give wrong numbers",
    )


def _network(state: Mapping[str, Tensor], block_ijk: Axes, axes: Axes) -> tuple[UNetConfig, dict[str, Tensor]]:
    try:
        config = config_of(state, block_ijk)
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint describes no network that can be: {error}", hint="is its plan that of another network?"
        ) from error
    return config, to_ours(state, config, axes)


def _notes(found: Checkpoint, plan: Plan, different: tuple[str, ...], others: int) -> tuple[str, ...]:
    notes = ["Kernels were turned from nnssl's (k, j, i) to (i, j, k); all bits are the file's."]
    if not plan.stated:
        notes.append(_NO_PLAN)
    if different:
        notes.append(
            f"{len(different)} tensors differ under their two names; those under all_modules were taken, which the "
            "network computes with."
        )
    if others:
        notes.append(f"{others} tensors beside the encoder were left out.")
    if found.left_out:
        notes.append(f"Objects of {one_line(', '.join(found.left_out))} in the file were left unread.")
    return tuple(notes)


def _cited(found: Any) -> tuple[str, ...]:
    """The works that a checkpoint asks to cite, as notes."""
    cited: list[str] = []
    for entry in found if isinstance(found, list) else ():
        if not isinstance(entry, Mapping):
            continue
        for kind in ("apa_citations", "bibtex_citations"):
            texts = entry.get(kind) or ()
            cited += [f"{CITE}{one_line(text)}" for text in ((texts,) if isinstance(texts, str) else texts)]
    return tuple(dict.fromkeys(cited))[:MOST_CITED]


def _licence(readme: Path) -> str:
    """What the head of a Hub README says, as its publisher declares it."""
    if not readme.is_file():
        return NOT_STATED
    with readme.open("rb") as file:
        text = file.read(LONGEST_PLAN).decode("utf-8", errors="replace")
    found = _LICENCE.search(text.split("---")[1]) if text.startswith("---") else None
    return one_line(found[1].strip("\"' ")).lower() if found else NOT_STATED


def _exportable(folder: Path, card: Card) -> UNetConfig:
    if card.architecture["name"] != "unet":
        raise CheckpointError(
            f"{folder.name} holds the network '{card.architecture['name']}', nnU-Net's is 'unet'",
            hint="export it as hub, or pretrain a unet",
        )
    if card.spec.normalisation != "zscore" or card.spec.resampling == "fit":
        raise CheckpointError(
            f"{folder.name} was fed by {card.spec.values_in_words}; nnU-Net would feed these weights z-scores",
            hint="pretrain with normalisation 'zscore' for weights that nnU-Net can fine-tune",
        )
    return overlay(UNetConfig(), card.architecture)


def _architecture(config: UNetConfig) -> dict[str, Any]:
    large = resenc("L")
    if (config.features, config.depths, config.strides) == (large.features, large.depths, large.strides):
        return {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    return {
        "arch_class_name": RESIDUAL,
        "arch_kwargs": settings_of(config),
        "arch_kwargs_requiring_import": list(IMPORTED),
    }


def settings_of(config: UNetConfig) -> dict[str, Any]:
    """What nnU-Net builds a network of ours from."""
    stages = len(config.features)
    return {
        "n_stages": stages,
        "features_per_stage": list(config.features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[stride] * 3 for stride in config.strides],
        "n_blocks_per_stage": list(config.depths),
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _save(path: Path, state: Mapping[str, Tensor], plan: Mapping[str, Any], card: Card) -> None:
    cited = [note.removeprefix(CITE) for note in card.notes if note.startswith(CITE)]
    torch.save(
        {
            WEIGHTS: dict(state),
            PLAN: dict(plan),
            "init_args": {"licence": card.licence, "origin": card.origin or trained_where(trained=bool(card.trained))},
            "trainer_name": "voxelstem",
            "citations": [{"type": "weights", "name": card.recipe, "apa_citations": cited}] if cited else [],
        },
        path,
    )


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read the file back and compare every name's tensor with ours, bit for bit."""
    back, different = merged(read_checkpoint(path, (WEIGHTS,)).tensors)
    turned = {
        name: tensor.permute(0, 1, 4, 3, 2) if tensor.ndim == KERNEL_AXES else tensor for name, tensor in back.items()
    }
    changed = [name for name, tensor in tensors.items() if name not in turned or not torch.equal(turned[name], tensor)]
    if changed or different:
        raise CheckpointError(
            f"{len(changed) + len(different)} tensors came back changed; nothing was written",
            hint="the disk or the memory of this machine is at fault: run again, elsewhere if need be",
        )
