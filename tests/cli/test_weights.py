from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxelstem.backbones.unet import resenc
from voxelstem.card import Card, write_weights
from voxelstem.config import flatten
from voxelstem.model import make_model
from voxelstem.sources import nifti
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.study import INPUT_SPECS, InputSpec
from voxelstem.terminal import DONE

SUBCOMMANDS = {
    "import spectre": [
        "--backbone",
        "--combiner",
        "--image-head",
        "--text-head",
        "--text",
        "--spacing",
        "--eps",
        "--out",
    ],
    "import i3resnet": ["--out", "--json"],
    "import nnssl": ["--release", "--channels", "--encoder-only", "--out", "--json"],
    "import fomo25": ["--out", "--json"],
    "export": ["--out", "--commercial", "--json"],
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    architecture = {"name": "scan_vit", "block_ijk": (16, 16, 16), "block.dim": 24, "block.depth": 1, "block.heads": 2}
    spec = InputSpec(spacing_mm=(10.0, 10.0, 10.0), block_ijk=(16, 16, 16))
    card = Card(architecture=architecture | {"scan.depth": 0}, spec=spec, trained=("block",), licence="cc-by-nc-4.0")
    write_weights(tmp_path / "weights", make_model(card, seed=0).backbone.state_dict(), card)
    return tmp_path / "weights"


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    volume = phantom(PhantomConfig(seed=1, spacing_mm=(10.0, 10.0, 10.0))).volumes[0]
    nifti.write(tmp_path / "scans" / "ct.nii.gz", volume.array[0].astype(np.int16), volume.affine_ras)
    return tmp_path / "scans"


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_names_every_flag_and_shows_an_example(say, command: str):
    code, out, _ = say("weights", *command.split(), "--help")
    assert code == DONE
    assert f"voxelstem weights {command}" in out.split("For example:")[1]
    assert [flag for flag in SUBCOMMANDS[command] if flag not in out] == []


def test_the_known_weights_are_listed_with_their_licence(say):
    code, out, _ = say("models", "--json")
    names = {facts["name"]: facts for facts in json.loads(out)}
    assert code == DONE
    assert names["spectre-large"]["commercial_use"] is False
    code, out, _ = say("models")
    assert code == DONE
    assert [name for name in names if name not in out] == []


@pytest.fixture
def brain(tmp_path: Path) -> Path:
    config = resenc("tiny")
    spec = replace(INPUT_SPECS["mri-nnssl"], preset="", block_ijk=config.block_ijk)
    card = Card(architecture=flatten(config), spec=spec, trained=("block",), licence="cc0-1.0")
    write_weights(tmp_path / "brain", make_model(card, seed=0).backbone.state_dict(), card)
    return tmp_path / "brain"


@pytest.mark.parametrize("layout", ["nnssl", "nnunet"])
def test_a_u_net_goes_out_for_nnu_net_and_comes_in_again(say, layout: str, brain: Path, tmp_path: Path):
    assert say("weights", "export", layout, brain, "--out", tmp_path / "out")[0] == DONE
    given = ["weights", "import", "nnssl", tmp_path / "out" / "checkpoint_final.pth", "--out", tmp_path / "again"]
    code, out, _ = say(*given, "--release", "openmind-resenc-l-mae", "--channels", "2", "--json")
    card = json.loads(out)["card"]
    assert (code, card["licence"], card["spec"]["normalisation"]) == (DONE, "cc-by-4.0", "zscore")
    assert card["architecture"]["channels"] == 2


def test_what_nnssl_cannot_take_is_refused(refusal, weights: Path, brain: Path, tmp_path: Path):
    out = ["--out", tmp_path / "out"]
    assert "'scan_vit'" in refusal("weights", "export", "nnunet", weights, *out)
    assert "no known weights" in refusal("weights", "import", "nnssl", tmp_path / "x.pth", "--release", "spectre", *out)
    assert "at least 1" in refusal("weights", "import", "nnssl", tmp_path / "x.pth", "--channels", "0", *out)
    assert not (tmp_path / "out").exists()


def test_a_foreign_file_that_is_none_is_refused(refusal, tmp_path: Path):
    (tmp_path / "no.pt").write_bytes(b"no weights")
    for words in (["spectre", "--backbone"], ["i3resnet"], ["nnssl"], ["fomo25"]):
        refusal("weights", "import", *words, tmp_path / "no.pt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_our_folder_goes_out_ready_to_upload(say, refusal, weights: Path, tmp_path: Path):
    code, out, _ = say("weights", "export", "hub", weights, "--out", tmp_path / "upload", "--json")
    assert (code, json.loads(out)["out"]) == (DONE, str(tmp_path / "upload"))
    assert {path.name for path in (tmp_path / "upload").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert "exists already" in refusal("weights", "export", "hub", weights, "--out", tmp_path / "upload")


def test_every_flag_of_embed_reaches_the_embedding(say, scan: Path, weights: Path, tmp_path: Path):
    flags = ["--tokens", "--like-spectre", "--spacing", "12,12,12", "--pool", "mean", "--precision", "fp32"]
    code, out, _ = say("embed", scan, "--weights", weights, "--out", tmp_path / "out", *flags, "--json")
    facts = json.loads(out)
    assert (code, facts["kept"]) == (DONE, 1)
    assert any("spacing" in line for line in facts["warnings"])
    (row,) = csv.DictReader((tmp_path / "out" / "manifest.csv").open())
    with np.load(tmp_path / "out" / f"{row['key']}.npz") as arrays:
        assert arrays["scan"].shape == (24,)
        assert arrays["tokens"].ndim == 4
        assert float(arrays["coverage"]) < 1


def test_a_claim_of_commercial_use_is_held_to_the_licence(refusal, scan: Path, weights: Path, tmp_path: Path):
    out = ["--out", tmp_path / "out"]
    for words in (["embed", scan, "--weights", weights], ["weights", "export", "hub", weights]):
        assert "cc-by-nc-4.0" in refusal(*words, *out, "--commercial")
    assert "cc-by-nc-4.0" in refusal("show", scan / "ct.nii.gz", "--weights", weights, *out, "--commercial")
    assert not (tmp_path / "out").exists()


def test_a_file_where_embeddings_should_go_is_named_as_such(refusal, scan: Path, weights: Path):
    said = refusal("embed", scan, "--weights", weights, "--out", scan / "ct.nii.gz")
    assert "'ct.nii.gz' is a file" in said
    assert "space" not in said


def test_a_card_that_no_weights_can_have_is_refused(refusal, weights: Path):
    card = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps(card | {"trained": [1, 2]}))
    assert "not a voxelstem card" in refusal("show", weights)


def test_a_spacing_that_is_none_is_refused(refusal, scan: Path, weights: Path, tmp_path: Path):
    for spacing in ("ct-stage7", "1,2", "1,2,0"):
        refusal("embed", scan, "--weights", weights, "--out", tmp_path / "out", "--spacing", spacing)
