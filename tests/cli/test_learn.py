from __future__ import annotations

from pathlib import Path

import pytest

import voxelstem


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
