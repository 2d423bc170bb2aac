"""What nnU-Net's own classes make of such a folder was tried once, with `dynamic_network_architectures` 0.4.4.

The network built from plans.json took the state strictly (104 names for two stages), and on two crops of 16 x 24 x 32
voxels its logits differed from ours by 9e-7 of the largest; no label changed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelstem import model
from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.card import Card
from voxelstem.config import flatten
from voxelstem.errors import CheckpointError
from voxelstem.study import InputSpec
from voxelstem.weights.nnssl import import_nnssl
from voxelstem.weights.nnssl_names import to_theirs
from voxelstem.weights.nnunet import CONFIGURATION, Trained, dataset_of, export_nnunet, plans_of

CONFIG = UNetConfig(features=(4, 8), depths=(1, 2), strides=(1, 2), block_ijk=(16, 8, 8), channels=2, out_channels=3)
SPEC = InputSpec(modality="MR", spacing_mm=(1.0, 2.0, 3.0), block_ijk=CONFIG.block_ijk, normalisation="zscore")
WINDOW = InputSpec(spacing_mm=(1.0, 2.0, 3.0), low_hu=-200.0, high_hu=300.0, block_ijk=CONFIG.block_ijk)


def trained(config: UNetConfig = CONFIG, spec: InputSpec = SPEC, **changes: Any) -> Trained:
    torch.manual_seed(0)
    plain = Trained(
        card=Card(architecture=flatten(config), spec=spec, recipe="brain + full", licence="cc-by-4.0"),
        tensors=UNet(config).state_dict(),
        classes=("gtv", "oar"),
        contrasts=("T1w", "FLAIR"),
        scans=7,
    )
    return replace(plain, **changes)


def test_the_folder_is_what_nnu_net_s_predictor_opens(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text("the run's card")
    out = export_nnunet(trained(), tmp_path / "out", readme=readme)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {"README.md", "dataset.json", "plans.json", "fold_0/checkpoint_final.pth"}
    assert (out / "README.md").read_text() == "the run's card"
    held = torch.load(out / "fold_0" / "checkpoint_final.pth", weights_only=True)
    # What `initialize_from_trained_model_folder` asks a checkpoint for.
    assert held["trainer_name"] == "nnUNetTrainer"
    assert held["init_args"]["configuration"] == CONFIGURATION
    assert held["inference_allowed_mirroring_axes"] is None
    assert held["init_args"]["plans"] == json.loads((out / "plans.json").read_text())
    assert held["init_args"]["dataset_json"] == json.loads((out / "dataset.json").read_text())
    wanted = to_theirs(dict(trained().tensors))
    assert set(held["network_weights"]) == set(wanted)
    assert all(torch.equal(held["network_weights"][name], tensor) for name, tensor in wanted.items())


def test_our_importer_reads_it_back_and_says_the_same_voxel_by_voxel(tmp_path: Path):
    given = trained()
    out = export_nnunet(given, tmp_path / "out", readme=None)
    card = import_nnssl(out / "fold_0" / "checkpoint_final.pth", tmp_path / "back")
    assert card.spec == replace(SPEC, preset="")
    back = model.load(tmp_path / "back").backbone
    assert back.config == CONFIG
    ours = UNet(CONFIG).eval()
    ours.load_state_dict(dict(given.tensors))
    crop = torch.randn(1, 2, 8, 4, 6)
    with torch.no_grad():
        assert torch.equal(back.decode(back.features(crop)), ours.decode(ours.features(crop)))


def test_plans_say_how_scans_are_fed_with_axes_turned():
    plans = plans_of(trained(), CONFIG)
    said = plans["configurations"][CONFIGURATION]
    assert said["spacing"] == [3.0, 2.0, 1.0]
    assert said["patch_size"] == [8, 8, 16]
    assert said["normalization_schemes"] == ["ZScoreNormalization"] * 2
    assert said["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8]
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"
    # What nnU-Net's PlansManager and ConfigurationManager look up while predicting.
    assert {"transpose_forward", "transpose_backward", "label_manager", "dataset_name", "plans_name"} <= set(plans)
    assert {"data_identifier", "preprocessor_name", "batch_size", "use_mask_for_norm", "batch_dice"} <= set(said)
    for kind in ("data", "seg", "probabilities"):
        assert {f"resampling_fn_{kind}", f"resampling_fn_{kind}_kwargs"} <= set(said)


def test_a_window_is_ct_normalization_by_other_words():
    """nnU-Net clips to the percentiles, takes off the mean and divides by the deviation."""
    plans = plans_of(trained(spec=WINDOW), CONFIG)
    assert plans["configurations"][CONFIGURATION]["normalization_schemes"] == ["CTNormalization"] * 2
    told = plans["foreground_intensity_properties_per_channel"]["0"]
    for value, wanted in ((-500.0, 0.0), (-200.0, 0.0), (50.0, 0.5), (300.0, 1.0), (2000.0, 1.0)):
        clipped = min(max(value, told["percentile_00_5"]), told["percentile_99_5"])
        assert (clipped - told["mean"]) / max(told["std"], 1e-8) == wanted


def test_labels_count_on_from_background():
    told = dataset_of(trained())
    assert told["labels"] == {"background": 0, "gtv": 1, "oar": 2}
    assert told["channel_names"] == {"0": "T1w", "1": "FLAIR"}
    assert told["numTraining"] == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (trained(replace(CONFIG, skips="none")), "no decoder with skips"),
        (trained(replace(CONFIG, decoder=False)), "no decoder with skips"),
        (trained(spec=replace(SPEC, resampling="native")), "nnU-Net cannot feed them so"),
        (trained(contrasts=("T1w",)), "joins 1 contrasts behind the network"),
        (trained(classes=("ignore", "oar")), "named 'ignore'"),
        (trained(card=replace(trained().card, architecture={"name": "scan_vit"})), "'scan_vit', nnU-Net's is 'unet'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_nnu_net_cannot_build_or_feed_is_refused(given: Trained, said: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=said):
        export_nnunet(given, tmp_path / "out", readme=None)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(tmp_path: Path):
    with pytest.raises(CheckpointError, match="exists already"):
        export_nnunet(trained(), tmp_path, readme=None)
