from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from voxelstem.backbones.qwen3 import TEXT_CONFIG, TextConfig, read_tower, text_shapes
from voxelstem.card import Card, digest, write_weights
from voxelstem.errors import CheckpointError
from voxelstem.study import InputSpec
from voxelstem.weights.text import text_files

TINY = TextConfig(hidden=8, layers=2, heads=4, kv_heads=2, head_dim=6, inter=12, vocab=20, lora_rank=2, lora_alpha=8.0)


def drawn(config: TextConfig = TINY) -> dict[str, Tensor]:
    return {name: torch.rand(shape) for name, shape in text_shapes(config).items()}


def written(folder: Path, tensors: Mapping[str, Tensor], config: TextConfig = TINY) -> Card:
    card = Card(architecture={"name": "scan_vit"}, spec=InputSpec())
    return write_weights(folder, {"a": torch.zeros(1)}, card, *text_files(tensors, config))


def test_names_shapes_and_order_are_the_released_ones(spectre_keys: Mapping[str, Mapping[str, tuple[int, ...]]]):
    assert list(text_shapes(TextConfig()).items()) == list(spectre_keys["text"].items())


def test_base_and_changes_are_kept_apart_bit_by_bit(tmp_path: Path):
    tensors = drawn()
    card = written(tmp_path / "w", tensors)
    config, back = read_tower(tmp_path / "w", card)
    assert config == TINY
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert back["layers.1.self_attn.v_proj.lora_A"].shape == (2, 8)
    assert back["layers.1.self_attn.v_proj.lora_B"].shape == (12, 2)


def test_the_config_beside_it_says_what_the_tensors_cannot(tmp_path: Path):
    card = written(tmp_path / "w", drawn())
    facts = json.loads((tmp_path / "w" / TEXT_CONFIG).read_text())
    assert {name: facts[name] for name in ("rms_eps", "rope_theta", "lora_alpha", "lora_scaling")} == {
        "rms_eps": 1e-6,
        "rope_theta": 1e6,
        "lora_alpha": 8.0,
        "lora_scaling": 4.0,
    }
    assert card.extras[TEXT_CONFIG] == digest(tmp_path / "w" / TEXT_CONFIG)


def test_a_tower_that_does_not_fit_is_refused_with_everything_that_differs():
    tensors = drawn()
    del tensors["layers.0.self_attn.q_proj.lora_A"]
    tensors |= {"lm_head.weight": torch.zeros(1), "norm.weight": torch.zeros(9)}
    with pytest.raises(CheckpointError) as error:
        text_files(tensors, TINY)
    for fact in (
        "1 missing: layers.0.self_attn.q_proj.lora_A",
        "1 unknown: lm_head.weight",
        "norm.weight (9,) instead of (8,)",
    ):
        assert fact in error.value.problem


def test_a_tower_of_another_depth_is_refused():
    with pytest.raises(CheckpointError, match=r"19 unknown: layers\.1\."):
        text_files(drawn(), replace(TINY, layers=1))
