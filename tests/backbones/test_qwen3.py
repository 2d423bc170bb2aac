from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.backbones.pretrained import read_tokenizer
from voxelstem.backbones.qwen3 import (
    TEXT_CONFIG,
    TEXT_TENSORS,
    TextConfig,
    read_tower,
    spectre_tower,
    text_shapes,
)
from voxelstem.card import Card, write_weights
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.study import InputSpec

TINY = TextConfig(
    hidden=24, layers=2, heads=4, kv_heads=2, head_dim=6, inter=32, vocab=300, lora_rank=2, lora_alpha=8.0
)
TEXTS = ["No pleural effusion.", "A nodule of 12 mm in the left lower lobe of the lung.", "The liver is normal."]


def drawn(config: TextConfig = TINY) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: 0.3 * torch.randn(shape, generator=draw) + ("norm" in name) for name, shape in text_shapes(config).items()
    }


def written(folder: Path, tensors: Mapping[str, Tensor], facts: str | None = None) -> Card:
    if facts is None:
        sizes = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
        facts = json.dumps(sizes | {"lora_scaling": TINY.lora_scaling})
    card = Card(architecture={"name": "scan_vit"}, spec=InputSpec())
    return write_weights(folder, {"a": torch.zeros(1)}, card, {TEXT_TENSORS: tensors}, {TEXT_CONFIG: facts})


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W + 4 B A, as loralib leaves a layer in evaluation."""
    state = {name: x.clone() for name, x in tensors.items() if "lora" not in name}
    for name in [name for name in tensors if name.endswith("lora_A")]:
        layer = name.removesuffix("lora_A")
        state[f"{layer}weight"] += 4.0 * tensors[f"{layer}lora_B"] @ tensors[name]
    return state


def test_the_released_tower_has_as_many_numbers_as_stated():
    shapes = text_shapes(TextConfig())
    assert len(shapes) == 534
    assert sum(map(math.prod, shapes.values())) == 600_364_032


def test_the_released_tower_s_changes_are_scaled_by_four():
    assert TextConfig().lora_scaling == 4.0


def test_the_tower_is_transformers_qwen3_with_the_changes_added_to_its_weights(tmp_path: Path, qwen: Path):
    import transformers

    tensors = drawn()
    tower = spectre_tower(tmp_path / "w", written(tmp_path / "w", tensors), qwen)
    sizes = transformers.Qwen3Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=32,
        vocab_size=300,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    network, words = transformers.Qwen3Model(sizes).eval(), read_tokenizer(qwen)
    network.load_state_dict(merged(tensors))
    for sentence, vector in zip(TEXTS, tower(TEXTS), strict=True):
        with torch.no_grad():
            wanted = network(input_ids=torch.tensor([words(sentence)["input_ids"]])).last_hidden_state[0, -1]
        torch.testing.assert_close(vector, wanted, rtol=1e-4, atol=1e-5)
    network.load_state_dict({name: x for name, x in tensors.items() if "lora" not in name})
    with torch.no_grad():
        without = network(input_ids=torch.tensor([words(TEXTS[0])["input_ids"]])).last_hidden_state[0, -1]
    assert not torch.allclose(tower(TEXTS)[0], without, atol=1e-2)


def test_as_it_comes_it_has_nothing_to_learn(tmp_path: Path, qwen: Path):
    tower = spectre_tower(tmp_path / "w", written(tmp_path / "w", drawn()), qwen)
    assert not list(tower.parameters())
    assert not tower.state_dict()


def test_its_changes_go_on_learning_and_its_base_does_not(tmp_path: Path, qwen: Path):
    tensors = drawn()
    card = written(tmp_path / "w", tensors)
    tower = spectre_tower(tmp_path / "w", card, qwen, trains="lowrank")
    state = {name.removeprefix("changes."): x for name, x in tower.state_dict().items()}
    assert set(state) == {name for name in tensors if "lora" in name}
    assert all(torch.equal(x, tensors[name]) for name, x in state.items())
    frozen = spectre_tower(tmp_path / "w", card, qwen)
    torch.testing.assert_close(tower(TEXTS), frozen(TEXTS), rtol=1e-4, atol=1e-5)
    tower(TEXTS).sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


def test_its_settings_are_spectre_s(tmp_path: Path, qwen: Path):
    config = spectre_tower(tmp_path / "w", written(tmp_path / "w", drawn()), qwen).config
    assert (config.pooling, config.dropout, config.max_tokens, config.prefix) == ("last", 0.05, 1024, "")
    assert config.targets == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_its_digest_is_of_weights_and_tokenizer(tmp_path: Path, qwen: Path, endless: Path):
    one, other = drawn(), drawn()
    other["norm.weight"] = other["norm.weight"] + 1
    digests = {
        spectre_tower(tmp_path / name, written(tmp_path / name, tensors), qwen).sha256
        for name, tensors in (("a", one), ("b", other), ("c", one))
    }
    assert len(digests) == 2


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path):
    card = written(tmp_path / "w", drawn())
    with pytest.raises(ConfigError, match="no folder 'words' with a tokenizer"):
        spectre_tower(tmp_path / "w", card, tmp_path / "words")


def test_a_tokenizer_that_does_not_end_texts_is_refused(tmp_path: Path, endless: Path):
    card = written(tmp_path / "w", drawn())
    with pytest.raises(ConfigError, match="ends a text with no token of its own"):
        spectre_tower(tmp_path / "w", card, endless)


@pytest.mark.parametrize(
    "facts", ["{", "[]", "{}", '{"hidden": "wide", "lora_scaling": 4.0}', '{"lora_scaling": 1, "x": 2}']
)
def test_a_config_that_describes_no_tower_is_refused(tmp_path: Path, facts: str):
    card = written(tmp_path / "w", drawn(), facts)
    with pytest.raises(CheckpointError, match="does not describe a text tower"):
        read_tower(tmp_path / "w", card)


@pytest.mark.parametrize("odd", [{"layers.1.self_attn.v_proj.lora_A": None}, {"norm.weight": torch.zeros(9)}])
def test_a_config_of_another_tower_is_refused(tmp_path: Path, odd: dict[str, Any]):
    tensors = {name: x for name, x in (drawn() | odd).items() if x is not None}
    card = written(tmp_path / "w", tensors)
    with pytest.raises(CheckpointError, match="holds other tensors than"):
        read_tower(tmp_path / "w", card)


def test_weights_without_a_tower_say_so(tmp_path: Path):
    card = write_weights(
        tmp_path / "w", {"a": torch.zeros(1)}, Card(architecture={"name": "scan_vit"}, spec=InputSpec())
    )
    with pytest.raises(CheckpointError, match=f"came without {TEXT_CONFIG}"):
        read_tower(tmp_path / "w", card)


def test_a_damaged_tower_is_refused(tmp_path: Path):
    card = written(tmp_path / "w", drawn())
    path = tmp_path / "w" / TEXT_TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from the card's sha256"):
        read_tower(tmp_path / "w", card)


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"lora_rank": 0}, {"heads": 3}])
def test_impossible_sizes_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match="must"):
        replace(TINY, **wrong)
