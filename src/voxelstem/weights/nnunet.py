"""A tuned U-Net as nnU-Net's own predictor reads a finished training: dataset.json, plans.json, fold_0/.

Written after nnU-Net 2.8's `predict_from_raw_data` and `plans_handler`; nothing of it is needed here. The network gives
the same logits there, its segmentation heads included. nnU-Net resamples and blends windows in its own way, and takes
z-scores of what is left after it cut off a border of zeros; so masks are alike, not equal.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voxelstem.backbones.unet import UNetConfig
from voxelstem.card import README, Card
from voxelstem.config import overlay
from voxelstem.errors import CheckpointError
from voxelstem.study import InputSpec
from voxelstem.weights.foreign import read_checkpoint
from voxelstem.weights.levels import check_new
from voxelstem.weights.nnssl import FILE, IMPORTED, PLAN, RESIDUAL, WEIGHTS, plan_of, settings_of
from voxelstem.weights.nnssl_names import KJI, merged, to_ours, to_theirs

CONFIGURATION = "3d_fullres"
RESERVED = ("background", "ignore")
"""Labels that mean something to nnU-Net."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A tuned U-Net and what nnU-Net must know of it."""

    card: Card
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...]
    contrasts: tuple[str, ...]
    """Names of what is seen together, or of the one modality."""
    scans: int
    """How many were learned from."""

    @property
    def spec(self) -> InputSpec:
        """How scans are fed."""
        return self.card.spec


def export_nnunet(trained: Trained, out: Path, *, readme: Path | None) -> Path:
    """Write the folder that `nnUNetPredictor.initialize_from_trained_model_folder` takes, whole or not at all.

    The checkpoint is read back and compared bit for bit.

    Raises:
        CheckpointError: a network that nnU-Net cannot build or feed, `out` exists, or the disk does not take it.
    """
    config = _exportable(trained)
    check_new(out)
    tensors = to_ours(trained.tensors, config, axes=(0, 1, 2))
    dataset, plans = dataset_of(trained), plans_of(trained, config)
    content = {
        WEIGHTS: to_theirs(tensors),
        "init_args": {"plans": plans, "configuration": CONFIGURATION, "fold": 0, "dataset_json": dataset},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": None,
        "current_epoch": 0,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
    }
    if trained.spec.normalisation == "zscore":  # so it can be fine-tuned, and come back, like any pretraining
        content[PLAN] = plan_of(config, trained.spec, dataset=trained.card.recipe or "voxelstem")
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "fold_0").mkdir(parents=True)
        torch.save(content, unfinished / "fold_0" / FILE)
        for name, facts in {"dataset": dataset, "plans": plans}.items():
            (unfinished / f"{name}.json").write_text(json.dumps(facts, indent=4) + "\n", encoding="utf-8")
        if readme is not None:
            shutil.copyfile(readme, unfinished / README)
        _compare(unfinished / "fold_0" / FILE, tensors, config)
        unfinished.rename(out)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0][:200]
        raise CheckpointError(f"'{out.name}' could not be written: {reason}", hint="free some space") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def dataset_of(trained: Trained) -> dict[str, Any]:
    """dataset.json: what is seen and what is labelled."""
    return {
        "channel_names": {str(place): name for place, name in enumerate(trained.contrasts)},
        "labels": {name: value for value, name in enumerate(("background", *trained.classes))},
        "numTraining": trained.scans,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": _READER,
    }


def plans_of(trained: Trained, config: UNetConfig) -> dict[str, Any]:
    """plans.json: how scans are fed, and the network. Axes run (k, j, i), as nnU-Net's arrays do."""
    spec, count = trained.spec, len(trained.contrasts)
    spacing, patch = list(spec.spacing_mm[::-1]), list(spec.block_ijk[::-1])
    windowed = spec.normalisation == "window"
    data = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    likely = data | {"order": 1}
    low, high = (spec.low_hu, spec.high_hu) if windowed else (0.0, 1.0)
    # CTNormalization clips to the percentiles, takes off the mean and divides by the deviation: a window, so told.
    window = {"percentile_00_5": low, "percentile_99_5": high, "mean": low, "std": high - low}
    window |= {"min": low, "max": high, "median": low}
    configuration = {
        "data_identifier": f"voxelstem_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": [float(side) for side in patch],
        "spacing": spacing,
        "normalization_schemes": ["CTNormalization" if windowed else "ZScoreNormalization"] * count,
        "use_mask_for_norm": [False] * count,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": data,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": likely | {"is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": likely,
        "architecture": {
            "network_class_name": RESIDUAL,
            "arch_kwargs": settings_of(config),
            "_kw_requires_import": list(IMPORTED),
        },
        "batch_dice": False,
    }
    return {
        "dataset_name": "voxelstem",
        "plans_name": "voxelstemPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": patch,
        "image_reader_writer": _READER,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ResEncUNetPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(place): window for place in range(count)},
    }


_READER = "NibabelIOWithReorient"
"""Turns scans to RAS+ before they are seen, as ours are, and masks back."""


def _exportable(trained: Trained) -> UNetConfig:
    architecture, spec = trained.card.architecture, trained.spec
    if architecture["name"] != "unet":
        raise CheckpointError(
            f"the run's network is '{architecture['name']}', nnU-Net's is 'unet'", hint="export it as onnx or openvino"
        )
    config = overlay(UNetConfig(), architecture)
    if not config.decoder or config.skips == "none":
        raise CheckpointError("the run's U-Net has no decoder with skips", hint="tune a U-Net that has, for segment")
    if spec.resampling != "spacing" or spec.normalisation not in ("window", "zscore"):
        raise CheckpointError(
            f"the run's scans were fed at {spec.grid_in_words}, {spec.values_in_words}; nnU-Net cannot feed them so",
            hint="export it as onnx or openvino",
        )
    if config.channels != len(trained.contrasts):
        raise CheckpointError(
            f"the run joins {len(trained.contrasts)} contrasts behind the network, which nnU-Net cannot",
            hint="tune with full.fusion=early",
        )
    if odd := [name for name in trained.classes if name.lower() in RESERVED]:
        raise CheckpointError(
            f"a class is named '{odd[0]}', which means something else to nnU-Net", hint="rename it and adapt again"
        )
    return config


def _compare(path: Path, tensors: Mapping[str, Tensor], config: UNetConfig) -> None:
    """Read the file back as our importer does, and compare bit for bit."""
    state, different = merged(read_checkpoint(path, (WEIGHTS,)).tensors)
    back = to_ours(state, config, KJI)
    changed: Sequence[str] = [name for name, tensor in tensors.items() if not torch.equal(back[name], tensor)]
    if changed or different:
        raise CheckpointError(
            f"{len(changed) + len(different)} tensors came back changed; nothing was written",
            hint="the disk or the memory of this machine is at fault: run again, elsewhere if need be",
        )
