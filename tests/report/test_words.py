from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from voxelstem.card import Card, write_weights
from voxelstem.report.words import describe, describe_inside
from voxelstem.show import show
from voxelstem.study import INPUT_SPECS, PER_VOLUME

CARD = Card(
    architecture={"name": "scan_vit"},
    spec=INPUT_SPECS["ct-stage1"],
    licence="cc-by-nc-sa-4.0",
    origin="somewhere on the Hub",
    data=("chest CT: 10 series", "abdominal CT: 5 series"),
    trained=("block", "scan"),
    notes=("not validated",),
)
INSIDE = {
    "kind": "inside",
    "weights": {"preset": "ct-stage2", "licence": "cc0-1.0", "trained": ["block"], "sha256": "0123456789abcdef"},
    "at_ijk": [1, 2, 3],
    "at_mm": [-1.5, 2.0, 30.0],
    "value": 40.0,
    "unit": "HU",
    "scan_shape_ijk": [10, 11, 12],
    "scan_spacing_mm": [1.0, 1.0, 5.0],
    "fed_spacing_mm": [0.75, 0.75, 1.5],
    "seen_mm": [10.0, 11.0, 60.0],
    "window": [-1000.0, 1000.0],
    "normalisation": "window",
    "block_ijk": [128, 128, 64],
    "grid": [1, 1, 1],
    "coverage": 1.0,
    "effective_rank": None,
    "warnings": ["thick: slices"],
    "picture": "inside.png",
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write_weights(tmp_path / "w", {"a": torch.zeros(1000, 2000)}, CARD, {"heads.safetensors": {"b": torch.zeros(256)}})
    return tmp_path / "w"


def test_weights_are_told_with_input_licence_origin_size_and_what_lies_beside(weights: Path):
    facts = json.loads(json.dumps(show(weights)))
    assert facts["parameters"] == 2_000_000
    assert list(facts["beside"]) == ["heads.safetensors"]
    told = describe(facts)
    for part in (
        "weights scan_vit: 2.0 M parameters, 7.63 MiB",
        "CT at 0.5 x 0.5 x 1 mm, window -1000 to 1000, blocks of 128 x 128 x 64 voxels (preset ct-stage1)",
        "trained levels: block, scan",
        "licence: cc-by-nc-sa-4.0",
        "origin: somewhere on the Hub",
        "data: chest CT: 10 series",
        "data: abdominal CT: 5 series",
        "note: not validated",
        "beside: heads.safetensors, ",
        f"sha256: {facts['card']['sha256']}",
    ):
        assert part in told


def test_a_file_that_is_missing_beside_the_weights_is_told(weights: Path):
    (weights / "heads.safetensors").unlink()
    assert "beside: heads.safetensors, MISSING" in describe(show(weights))


def test_weights_fed_at_the_scan_s_own_spacing_say_so(tmp_path: Path):
    card = replace(CARD, spec=INPUT_SPECS["ct-native"])
    write_weights(tmp_path / "w", {"a": torch.zeros(1)}, card)
    assert "CT at its own spacing" in describe(show(tmp_path / "w"))


@pytest.mark.parametrize("name", ["mri-nnssl", "mri-fomo25"])
def test_a_normaliser_without_a_window_is_told_in_words_and_no_window_is(tmp_path: Path, name: str):
    spec = INPUT_SPECS[name]
    write_weights(tmp_path / "w", {"a": torch.zeros(1)}, replace(CARD, spec=spec))
    (line,) = [line for line in describe(show(tmp_path / "w")).splitlines() if line.startswith("input: ")]
    picture = describe_inside(INSIDE | {"normalisation": spec.normalisation})[1]
    for told in (line, picture, (tmp_path / "w" / "README.md").read_text()):
        assert PER_VOLUME[spec.normalisation] in told
        assert "1000" not in told


def test_a_card_that_says_little_is_told_as_far_as_it_goes():
    facts = {"kind": "weights", "bytes": 3, "parameters": None, "beside": {}, "card": {"licence": "mit"}}
    assert describe(facts).splitlines() == ["weights: 3 bytes", "trained levels: none", "licence: mit"]


def test_the_lines_below_a_picture_say_how_the_scan_was_fed():
    lines = describe_inside(INSIDE)
    assert lines[0] == "+ is voxel 1, 2, 3, at (-1.5, 2, 30) mm along R, A, S: 40 HU"
    assert "10 x 11 x 12 voxels of 1 x 1 x 5 mm, fed at 0.75 x 0.75 x 1.5 mm and -1000 to 1000 HU" in lines[1]
    assert "seen: 100.0% of it, 10 x 11 x 60 mm" in lines[2]
    assert "rank" not in lines[2]
    assert lines[-1] == "warning: thick: slices"
    assert "effective rank of the blocks: 3.5" in describe_inside(INSIDE | {"effective_rank": 3.5})[2]
    assert describe(INSIDE).splitlines() == [*lines, "picture: inside.png"]


def test_a_run_says_what_it_cost_how_healthy_it_is_and_what_it_left_out(tmp_path: Path):
    (tmp_path / "config.toml").write_text(
        'recipe = "tiny.dino"\nsteps = 9\nloader.batch = 4\nbegun_from = "0123456789abcdef0"\n'
    )
    look = {"probe/patch_knn": 0.25, "kwh": 0.5, "energy": "measured (NVML)", "data_wait_share": 0.03}
    lines = [
        {"step": 0, "loss": 1.0, "seconds": 2.0} | look,
        {"step": 1, "skipped": "the loss is not a number", "samples": ["3fa2", "77b1"]},
        {"step": 2, "rolled_back_to": 2, "excluded": [1, 3]},
        {"step": 2, "quarantined": "c44a", "reason": "damaged"},
        {"step": 2, "loss": 1.0, "seconds": 4.0, "probe/patch_knn": 0.5},
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = describe(show(tmp_path)).splitlines()
    for line in (
        "took: 4 s for 8 samples, 3.0% of it waiting for data",
        "energy: 0.5 kWh, measured (NVML)",
        "health since weights 0123456789abcdef, first look and last:",
        "  kNN probe: 0.25 to 0.5 (+0.25)",
        "left out, step 1: the loss is not a number (samples 3fa2, 77b1)",
        "went back, step 2: 2, without steps 1, 3",
        "unreadable, step 2: c44a: damaged",
    ):
        assert line in said
