from __future__ import annotations

import hashlib
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelstem.card import Card, read_card, read_tensors, write_weights
from voxelstem.errors import CheckpointError
from voxelstem.study import InputSpec

SPEC = InputSpec(modality="CT", spacing_mm=(1.5, 2.0, 3.0), low_hu=-150.0, high_hu=250.0, block_ijk=(8, 8, 4))
CARD = Card(
    architecture={"name": "scan_vit", "patch_ijk": (4, 4, 2), "block.dim": 24},
    spec=SPEC,
    licence="apache-2.0",
    data=("12 CT scans from phantom sources",),
    recipe="tiny",
    trained=("block", "scan"),
    notes=("made for a test",),
)
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5)}


def test_tensors_and_card_come_back_as_they_were(tmp_path: Path):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    assert read_card(tmp_path / "w") == card
    assert replace(card, sha256="") == CARD
    back = read_tensors(tmp_path / "w", card)
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)


def test_the_folder_is_the_hub_s_layout_readable_by_others(tmp_path: Path):
    write_weights(tmp_path / "w", TENSORS, CARD)
    files = sorted((tmp_path / "w").iterdir())
    assert [path.name for path in files] == ["README.md", "config.json", "model.safetensors"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in files)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_the_readme_says_what_it_is_what_it_saw_and_that_it_is_no_medical_device(tmp_path: Path):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    readme = (tmp_path / "w" / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: voxelstem\nlicense: apache-2.0\n---\n")
    for fact in ["Not a medical device", "12 CT scans", "(1.5, 2.0, 3.0) mm", "[-150, 250]", card.sha256, "made for"]:
        assert fact in readme


def test_an_untrained_model_s_readme_says_so(tmp_path: Path):
    write_weights(tmp_path / "w", TENSORS, replace(CARD, trained=()))
    assert "none (untrained)" in (tmp_path / "w" / "README.md").read_text()


def test_weights_are_never_written_over(tmp_path: Path):
    write_weights(tmp_path / "w", TENSORS, CARD)
    before = (tmp_path / "w" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="w exists already"):
        write_weights(tmp_path / "w", {"other": torch.zeros(1)}, CARD)
    assert (tmp_path / "w" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("at", [0, 9, -1])
def test_damaged_tensors_are_refused(tmp_path: Path, at: int):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    path = tmp_path / "w" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from the card's sha256"):
        read_tensors(tmp_path / "w", card)


def test_tensors_that_are_not_there_are_missed(tmp_path: Path):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    (tmp_path / "w" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        read_tensors(tmp_path / "w", card)


@pytest.mark.parametrize(
    "header",
    [(2**63 - 1).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}", b"", b"\x02" + b"\0" * 7 + b"[]", b"PK\x03\x04"],
)
def test_a_poisoned_header_is_refused_though_its_digest_is_right(tmp_path: Path, header: bytes):
    card = write_weights(tmp_path / "w", TENSORS, CARD)
    path = tmp_path / "w" / "model.safetensors"
    path.write_bytes(header)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(tmp_path / "w", replace(card, sha256=hashlib.sha256(header).hexdigest()))


GOOD: dict[str, Any] = {"architecture": {"name": "scan_vit"}, "spec": {"modality": "CT"}}


@pytest.mark.parametrize(
    "foreign",
    [
        {"model_type": "vit", "hidden_size": 768},
        [1, 2],
        {},
        GOOD | {"spec": {"colour": "red"}},
        GOOD | {"spec": {"low_hu": 5.0, "high_hu": -5.0}},
        GOOD | {"spec": "CT"},
        GOOD | {"architecture": "resnet"},
        GOOD | {"architecture": {"layers": 3}},
        GOOD | {"architecture": {"name": 3}},
        GOOD | {"trained": "block"},
        GOOD | {"sha256": 5},
    ],
)
def test_another_tool_s_config_is_refused(tmp_path: Path, foreign: Any):
    (tmp_path / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(CheckpointError, match="is not a voxelstem card"):
        read_card(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}"])
def test_a_damaged_config_is_refused(tmp_path: Path, data: bytes):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match="is not a voxelstem card"):
        read_card(tmp_path)


def test_what_a_newer_version_added_is_left_out(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD | {"colour": "red"}))
    assert read_card(tmp_path) == Card(architecture={"name": "scan_vit"}, spec=InputSpec())


def test_a_folder_without_config_is_no_weights_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a weights folder"):
        read_card(tmp_path / "nowhere")


def test_a_full_disk_is_a_clear_error_and_nothing_is_left(tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"weights 'w' \(0.4 MB\) could not be written: .*too large"):
            write_weights(tmp_path / "w", {"a": torch.zeros(100_000)}, CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
