"""SPECTRE's text tower: Qwen3-Embedding-0.6B with low-rank changes beside it, out of an imported weights folder.

The base weights and the changes (Hu et al. 2021, LoRA) stay apart: W x + scaling * B (A x). So either can be replaced,
and what was learned from reports stays visible. Names are those of the file: transformers' `Qwen3Model` without its
prefix, with loralib's `lora_A` and `lora_B` at the four projections of attention.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from voxelstem.backbones.lowrank import Draws, LowRankConfig, put_beside
from voxelstem.backbones.pretrained import Pretrained, import_transformers, read_tokenizer, tokenizer_digest
from voxelstem.backbones.text import TextTower, TowerConfig
from voxelstem.card import Card, read_tensors, read_text
from voxelstem.config import overlay
from voxelstem.errors import CheckpointError, ConfigError

TEXT_TENSORS, TEXT_CONFIG = "text/model.safetensors", "text/config.json"
"""Names inside the weights folder."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The layers that SPECTRE changes."""
_CHANGES = ("lora_A", "lora_B")
_LONGEST = 32768
"""Tokens that Qwen3-Embedding was made for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Sizes of a Qwen3 transformer and of its low-rank changes; the defaults are SPECTRE's."""

    hidden: int = 1024
    layers: int = 28
    heads: int = 16
    kv_heads: int = 8
    """Each key and value head serves heads / kv_heads query heads (Ainslie et al. 2023)."""
    head_dim: int = 128
    inter: int = 3072
    """Width of the gated MLP."""
    vocab: int = 151669
    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    lora_rank: int = 16
    lora_alpha: float = 64.0

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: a size below 1, or query heads that the key heads do not divide.
        """
        sizes = (self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.inter, self.vocab)
        if min(*sizes, self.lora_rank) < 1:
            raise ValueError(f"every size must be >= 1, got {(*sizes, self.lora_rank)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")

    @property
    def lora_scaling(self) -> float:
        """By what the product B A is multiplied: alpha / rank, 4.0 for SPECTRE's."""
        return self.lora_alpha / self.lora_rank


def spectre_tower(
    folder: Path, card: Card, tokenizer: Path, *, trains: Literal["nothing", "lowrank"] = "nothing"
) -> TextTower:
    """The tower of SPECTRE's weights, with what SPECTRE learned from reports in it.

    Args:
        folder: Weights folder with a text tower, as `weights import spectre --text` writes it.
        card: Its card.
        tokenizer: Folder with the tokenizer of Qwen3-Embedding-0.6B, which is not part of SPECTRE's weights.
        trains: `lowrank` goes on learning SPECTRE's own changes; the base is frozen either way.

    Raises:
        CheckpointError: the weights came without a tower, or it is damaged.
        ConfigError: `transformers` or the tokenizer is missing, or the tokenizer is another network's.
    """
    config, tensors = read_tower(folder, card)
    network = _network(config, {name: x for name, x in tensors.items() if not name.endswith(_CHANGES)})
    changes = {name: x.float() for name, x in tensors.items() if name.endswith(_CHANGES)}
    sizes = LowRankConfig(rank=config.lora_rank, alpha=config.lora_alpha)
    settings = TowerConfig(
        source=folder.name,
        pooling="last",
        trains=trains,
        rank=sizes.rank,
        alpha=sizes.alpha,
        dropout=sizes.dropout,
        targets=TARGETS,
        max_tokens=1024,
    )
    files = [card.extras[TEXT_TENSORS], card.extras[TEXT_CONFIG], tokenizer_digest(tokenizer)]
    base = Pretrained(
        network=network,
        tokenizer=read_tokenizer(tokenizer),
        sha256=hashlib.sha256(json.dumps(files).encode()).hexdigest(),
    )
    if trains == "nothing":
        put_beside(network, TARGETS, sizes, Draws()).load_state_dict(changes)
        return TextTower(settings, base)
    tower = TextTower(settings, base)
    tower.changes.load_state_dict(changes)
    return tower


def text_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the order of the released file (534 of them for SPECTRE's)."""
    query, pair = config.heads * config.head_dim, config.kv_heads * config.head_dim
    projections = {
        "q_proj": (query, config.hidden),
        "k_proj": (pair, config.hidden),
        "v_proj": (pair, config.hidden),
        "o_proj": (config.hidden, query),
    }
    layer: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in projections.items():
        layer[f"self_attn.{name}.weight"] = (rows, columns)
        layer[f"self_attn.{name}.lora_A"] = (config.lora_rank, columns)
        layer[f"self_attn.{name}.lora_B"] = (rows, config.lora_rank)
    layer |= {
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
        "mlp.gate_proj.weight": (config.inter, config.hidden),
        "mlp.up_proj.weight": (config.inter, config.hidden),
        "mlp.down_proj.weight": (config.hidden, config.inter),
        "input_layernorm.weight": (config.hidden,),
        "post_attention_layernorm.weight": (config.hidden,),
    }
    layers = {f"layers.{at}.{name}": shape for at in range(config.layers) for name, shape in layer.items()}
    return {"embed_tokens.weight": (config.vocab, config.hidden), **layers, "norm.weight": (config.hidden,)}


def read_tower(folder: Path, card: Card) -> tuple[TextConfig, dict[str, Tensor]]:
    """Read the tower of a weights folder: its sizes and its tensors, mapped, under the names of `text_shapes`.

    Raises:
        CheckpointError: the weights came without one, it is damaged, or its two files do not belong together.
    """
    try:
        facts = json.loads(read_text(folder, card, TEXT_CONFIG))
        facts.pop("lora_scaling")
        config = overlay(TextConfig(), facts)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder.name}/{TEXT_CONFIG} does not describe a text tower", hint="was it written by another tool?"
        ) from error
    tensors = read_tensors(folder, card, TEXT_TENSORS)
    wanted = text_shapes(config)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
        raise CheckpointError(
            f"{folder.name}/{TEXT_TENSORS} holds other tensors than {TEXT_CONFIG} describes",
            hint="copy the whole weights folder again, or import it again",
        )
    return config, {name: tensors[name] for name in wanted}


def _network(config: TextConfig, tensors: Mapping[str, Tensor]) -> Any:
    """A `Qwen3Model` of these tensors, which stay mapped from their file where they are fp32."""
    transformers = import_transformers()
    sizes = transformers.Qwen3Config(
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.inter,
        vocab_size=config.vocab,
        rms_norm_eps=config.rms_eps,
        rope_theta=config.rope_theta,
        max_position_embeddings=_LONGEST,
        use_cache=False,
    )
    with torch.device("meta"):
        network = transformers.Qwen3Model(sizes)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    # Its angles are in no file.
    network.rotary_emb = type(network.rotary_emb)(sizes)
    return network.eval()
