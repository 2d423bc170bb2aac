from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from voxelstem.adapted import AdaptConfig, Made, SeeConfig, read_run, resolve, write_run
from voxelstem.artefact import SEAL, RunCard, seal
from voxelstem.card import Card, write_weights
from voxelstem.certainty.assurance import Assurance
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.model import make_model
from voxelstem.protocols import Head
from voxelstem.study import InputSpec

SPEC = InputSpec(spacing_mm=(8.0, 8.0, 8.0), block_ijk=(16, 16, 16))
ARCHITECTURE = {"name": "scan_vit", "block_ijk": (16, 16, 16), "block.dim": 24, "block.depth": 1, "block.heads": 2}


def written(folder: Path) -> AdaptConfig:
    config = resolve("classify", "probe", budget=3, settings={"see.layers": (1,), "head.neighbours": 4})
    model = make_model(Card(architecture=ARCHITECTURE, spec=SPEC), seed=0)
    card = write_weights(folder / "weights", model.backbone.state_dict(), model.card)
    head = Head(mode="probe", classes=("a", "b"), arrays={"weight": np.arange(6.0)}, facts={"strength": 0.1})
    about = RunCard(task="classify", mode="probe", title="contrast", modality="CT", version="0.11.0")
    write_run(folder, config, Made(head=head, records=(), assurance=Assurance(notes=("none",)), about=about), card)
    seal(folder)
    return config


def made_by_0_10_0(folder: Path) -> AdaptConfig:
    """A run as that version left it: no card in adapt.json, no README.md, no seal."""
    config = written(folder)
    facts = json.loads((folder / "adapt.json").read_text())
    del facts["card"]
    (folder / "adapt.json").write_text(json.dumps(facts))
    (folder / "README.md").unlink()
    (folder / SEAL).unlink()
    return config


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = written(tmp_path)
    read = read_run(tmp_path)
    assert read.config == config
    assert read.head.classes == ("a", "b")
    np.testing.assert_array_equal(read.head.arrays["weight"], np.arange(6.0))
    assert read.task.neighbours == 4  # pyright: ignore[reportAttributeAccessIssue]
    assert read.card.title == "contrast"


def test_a_run_of_a_version_without_cards_is_still_read(tmp_path: Path) -> None:
    config = made_by_0_10_0(tmp_path)
    read = read_run(tmp_path)
    assert read.config == config
    assert read.card == RunCard()


def test_a_run_of_a_version_that_saw_tokens_only_is_still_read(tmp_path: Path) -> None:
    made_by_0_10_0(tmp_path)
    config = tmp_path / "config.toml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("see.")]
    config.write_text("\n".join(lines) + "\n")
    assert read_run(tmp_path).config.see == SeeConfig()


@pytest.mark.parametrize("make", [written, made_by_0_10_0])
def test_a_damaged_run_says_so(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "name", ["head.json", "head.safetensors", "assurance.safetensors", "config.toml", "adapt.json"]
)
def test_a_file_that_was_changed_is_named(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=f"^{re.escape(name)} of the run .* not the one that adapt wrote"):
        read_run(tmp_path)


def test_a_page_that_somebody_edited_is_no_matter(tmp_path: Path) -> None:
    config = written(tmp_path)
    (tmp_path / "README.md").write_text("ours, and a name of the study")
    assert read_run(tmp_path).config == config


@pytest.mark.parametrize("title", ["T2: lesion", "/data/run", "~/run", "a\\b", "x" * 65, "two\nlines"])
def test_a_title_that_findings_refuse_is_refused_before_anything_is_read(title: str) -> None:
    with pytest.raises(ConfigError, match="title must"):
        resolve("classify", "probe", budget=None, settings={"title": title})


def test_another_run_s_head_is_noticed(tmp_path: Path) -> None:
    written(tmp_path / "one")
    written(tmp_path / "other")
    head = {"weight": np.arange(6.0)[::-1].copy()}
    save_file(head, tmp_path / "other" / "head.safetensors")
    seal(tmp_path / "other")
    read_run(tmp_path / "other")
    (tmp_path / "other" / "head.safetensors").rename(tmp_path / "one" / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.safetensors of the run 'one'"):
        read_run(tmp_path / "one")


def test_a_run_whose_seal_was_lost_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / SEAL).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {SEAL}"):
        read_run(tmp_path)


@pytest.mark.parametrize("layers", [(0,), (1, 1), (-2, 3)])
def test_layers_are_counted_from_one_and_named_once(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="different numbers from 1"):
        SeeConfig(layers=layers)


def test_what_a_setting_may_be_is_said_with_the_next_step() -> None:
    with pytest.raises(ConfigError, match="budget must be at least 1") as caught:
        resolve("classify", "probe", budget=0, settings={})
    assert "--budget 1 or more" in caught.value.hint
    with pytest.raises(ConfigError, match="unknown must be one of 'refused', 'left_out'") as caught:
        resolve("classify", "probe", budget=None, settings={"unknown": "leave_out"})
    assert caught.value.hint == "did you mean 'left_out'?"
    with pytest.raises(ConfigError, match=r"auto\.rungs must be a list such as '\[\"") as caught:
        resolve("classify", "auto", budget=None, settings={"auto.rungs": "knn"})
    assert "tuple" not in str(caught.value)


def test_what_stands_beside_is_one_of_a_few(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beside"):
        resolve("classify", "probe", budget=None, settings={"see.beside": "texture"})


def test_settings_that_contradict_the_mode_are_refused() -> None:
    with pytest.raises(ConfigError, match="set by --mode"):
        resolve("classify", "full", budget=None, settings={"full.changes": "low_rank"})
    for settings in ({"see.region": "liver"}, {"see.beside": "intensity"}):
        with pytest.raises(ConfigError, match="attention looks at"):
            resolve("classify", "attention", budget=None, settings=settings)
    assert resolve("segment", "attention", budget=None, settings={"see.beside": "intensity"}).mode == "attention"
    with pytest.raises(ConfigError, match="nothing of single places"):
        resolve("segment", "probe", budget=None, settings={"see.beside": "radiomics"})
    for mode in ("full", "adapters"):
        with pytest.raises(ConfigError, match="on a frozen network"):
            resolve("classify", mode, budget=None, settings={"see.beside": "intensity"})
