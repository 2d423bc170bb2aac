from __future__ import annotations

import json
from pathlib import Path

import pytest

import voxelstem
from voxelstem.artefact import seal
from voxelstem.card import Card, write_weights
from voxelstem.ingest import ingest
from voxelstem.model import make_model
from voxelstem.sources.phantom import PhantomConfig, phantom_files
from voxelstem.study import InputSpec
from voxelstem.terminal import DONE


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("optimm.lr=1", "unknown setting 'optimm'"),
        ("steps", "cannot read the setting 'steps'"),
        ("steps=few", "steps must be"),
    ],
)
def test_a_misspelt_setting_is_refused_before_anything_runs(refusal, tmp_path: Path, assignment: str, sentence: str):
    answer = refusal("pretrain", "tiny", assignment, "--store", tmp_path / "store", "--out", tmp_path / "run")
    assert sentence in answer
    assert not (tmp_path / "run").exists()


def test_a_misspelt_recipe_is_refused(refusal, tmp_path: Path):
    answer = refusal("pretrain", "tinny", "--store", tmp_path / "store", "--out", tmp_path / "run")
    assert "tiny" in answer


def test_an_absent_config_file_is_refused(refusal, tmp_path: Path):
    words = ["pretrain", "tiny", "--store", tmp_path / "s", "--out", tmp_path / "r", "--config", tmp_path / "no.toml"]
    assert "there is no config file 'no.toml'" in refusal(*words)


def test_a_store_without_ct_is_refused_by_a_ct_recipe(refusal, tmp_path: Path):
    voxelstem.Store.create(tmp_path / "store")
    answer = refusal("pretrain", "tiny", "--store", tmp_path / "store", "--out", tmp_path / "run")
    assert "no CT scan" in answer
    assert not (tmp_path / "run").exists()


@pytest.fixture
def learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[object]:
    """The words of an `adapt` on phantoms, over weights that forbid commercial use."""
    (tmp_path / "site.key").write_text("01" * 32 + "\n")  # one key for ever: the same phantoms are held out
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path / "site.key"))
    files = phantom_files(tmp_path, [PhantomConfig(seed=seed, spacing_mm=(12.0, 12.0, 12.0)) for seed in range(12)])
    ingest([files.scans], tmp_path / "store")
    capsys.readouterr()  # its progress is not what is asked here
    architecture = {"name": "scan_vit", "block_ijk": (16, 16, 16), "block.dim": 24, "block.depth": 1, "block.heads": 2}
    spec = InputSpec(spacing_mm=(12.0, 12.0, 12.0), block_ijk=(16, 16, 16))
    card = Card(architecture=architecture | {"scan.depth": 0}, spec=spec, trained=("block",), licence="cc-by-nc-4.0")
    write_weights(tmp_path / "weights", make_model(card, seed=0).backbone.state_dict(), card)
    where = ["--weights", tmp_path / "weights", "--store", tmp_path / "store", "--labels", tmp_path / "contrast.csv"]
    return ["adapt", *where, "--task", "classify", "--mode", "knn", "--out", tmp_path / "run"]


def test_a_claim_of_commercial_use_is_held_to_the_licence(say, refusal, learning: list[object], tmp_path: Path):
    assert "cc-by-nc-4.0" in refusal(*learning, "--commercial")
    assert not (tmp_path / "run").exists()
    code, _, err = say(*learning)
    assert code == DONE, err
    assert "commercial = false" in (tmp_path / "run" / "config.toml").read_text()
    where = ["--store", tmp_path / "store", "--labels", tmp_path / "contrast.csv", "--out", tmp_path / "report"]
    code, out, err = say("evaluate", tmp_path / "run", *where, "--commercial")
    assert (code, out) == (2, "")
    assert "cc-by-nc-4.0" in err
    assert not (tmp_path / "report").exists()


def test_a_run_that_claimed_commercial_use_keeps_to_it_when_it_is_evaluated(
    say, learning: list[object], tmp_path: Path
):
    config = tmp_path / "weights" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"licence": "mit"}))
    code, _, err = say(*learning, "--commercial")
    assert code == DONE, err
    kept = tmp_path / "run" / "weights" / "config.json"
    card = json.loads(kept.read_text()) | {"licence": "cc-by-nc-4.0"}
    kept.unlink()  # a link to the first
    kept.write_text(json.dumps(card))
    seal(tmp_path / "run")
    where = ["--store", tmp_path / "store", "--labels", tmp_path / "contrast.csv", "--out", tmp_path / "report"]
    code, _, err = say("evaluate", tmp_path / "run", *where)
    assert code == 2
    assert "cc-by-nc-4.0" in err
