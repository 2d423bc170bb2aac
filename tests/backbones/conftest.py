"""A Hugging Face folder with a Qwen3 of a few thousand numbers, and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

WORDS = ["no pleural effusion", "a nodule in the left lower lobe of the lung", "the liver is normal"]


def write_tokenizer(folder: Path, *, ends: bool = True) -> None:
    """Byte-level BPE; `ends`: a text ends in a token of its own that fills rows up too, as Qwen3-Embedding's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[end, "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": end, "eos_token": "<|im_end|>", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("qwen") / "tiny-qwen3"
    write_tokenizer(folder)
    config = transformers.Qwen3Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=32,
        vocab_size=300,
        max_position_embeddings=4096,
        rope_theta=1e6,
        initializer_range=0.2,  # far enough from zero that attention looks somewhere
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Qwen3Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that adds nothing to a text's end."""
    folder = tmp_path_factory.mktemp("endless")
    write_tokenizer(folder, ends=False)
    return folder
