"""SPECTRE's text tower as files of a weights folder; `backbones.qwen3` reads them and makes it compute."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from torch import Tensor

from voxelstem.backbones.qwen3 import TEXT_CONFIG, TEXT_TENSORS, TextConfig, text_shapes
from voxelstem.weights.foreign import fit


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
