"""SPECTRE's text tower, kept for alignment with reports: Qwen3-Embedding-0.6B with low-rank changes beside it.

The base weights and the changes (Hu et al. 2021, LoRA) stay apart: W x + scaling * B (A x). So either can be replaced,
and what was learned from reports stays visible. Names are those of the file: transformers' `Qwen3Model` without its
prefix, with loralib's `lora_A` and `lora_B` at the four projections of attention.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from voxelstem.card import Card, read_tensors, read_text
from voxelstem.config import overlay
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.weights.foreign import fit

TEXT_TENSORS, TEXT_CONFIG = "text/model.safetensors", "text/config.json"
"""Names inside the weights folder."""


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


def text_files(
    tensors: Mapping[str, Tensor], config: TextConfig
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, str]]:
    """The tower as `card.write_weights` takes it: files of tensors, and small files beside them.

    The tensors stay as they are, mapped from the file that they were read from: nothing is gathered in memory.

    Raises:
        CheckpointError: not the tensors of `config`; all that differ are listed.
    """
    fit(tensors, text_shapes(config), what="text tower")
    facts = dataclasses.asdict(config) | {"lora_scaling": config.lora_scaling}
    return {TEXT_TENSORS: tensors}, {TEXT_CONFIG: json.dumps(facts, indent=2) + "\n"}


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
    fit(tensors, wanted, what="text tower")
    return config, {name: tensors[name] for name in wanted}
