"""The demo: a small journey without a network tells everything, and says that real scans were not to be had."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from voxelstem import demo
from voxelstem.errors import ConfigError, StoreError, VoxelstemError
from voxelstem.store.splits import split_of
from voxelstem.store.subjects import pseudonym

SMALL = demo.Size(phantoms=18, steps=2, unet_steps=2, few=2, labelled=4)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journey with the network switched off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", "")
        return demo.journey(tmp_path_factory.mktemp("demo") / "demo", SMALL, None)


@pytest.mark.slow
def test_the_page_tells_every_step(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for title in (
        "What was ingested and refused",
        "Pretraining",
        "What the tokens see",
        "Nearest neighbours",
        "Segmentation on a held-out phantom",
        "Pretrained, scratch, intensity",
        "What these numbers cannot show",
        "Environment",
    ):
        assert title in text
    assert "No real scans in this run, phantoms only" in text
    assert "scratch" in text
    assert "intensity" in text
    assert "ot a medical device" in text


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text


@pytest.mark.slow
def test_started_again_it_makes_the_same_scores(page: Path) -> None:
    scores = page.parents[1] / "scores" / "segment_2" / "evaluation.json"
    before = json.loads(scores.read_text())["scores"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        demo.journey(page.parents[1], SMALL, None)
    assert json.loads(scores.read_text())["scores"] == before


def test_the_many_organ_scans_are_test_subjects_and_the_other_real_ones_train() -> None:
    splits = {name: split_of(pseudonym(name, demo.PUBLIC_KEY)) for name in (*demo.MANY_ORGANS, "ts_chest", "lung1")}
    assert splits == {"ts_abdomen": "test", "ts_upper_abdomen": "test", "ts_chest": "train", "lung1": "train"}


def test_the_public_key_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", "mine")
    with demo.public_key(tmp_path):
        assert os.environ["VOXELSTEM_KEY"] == str(tmp_path / "public.key")
    assert os.environ["VOXELSTEM_KEY"] == "mine"


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write into"):
        demo.journey(tmp_path / "file" / "demo", SMALL, None)


def test_a_full_demo_does_not_go_on_from_a_quick_one(tmp_path: Path) -> None:
    demo._claim(tmp_path, demo.QUICK)
    demo._claim(tmp_path, demo.QUICK)
    with pytest.raises(ConfigError, match="another size"):
        demo._claim(tmp_path, demo.FULL)


def test_a_data_folder_that_is_no_samples_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    data = tmp_path / "mine"
    data.mkdir()
    with pytest.raises(VoxelstemError, match="samples"):
        demo.journey(tmp_path / "demo", demo.Size(phantoms=1, steps=1, unet_steps=1, few=1, labelled=2), data)
    assert not list(data.iterdir())
