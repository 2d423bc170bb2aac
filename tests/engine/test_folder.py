from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from voxelstem.config import read_toml
from voxelstem.engine.folder import check_settings, claim, differences
from voxelstem.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    threads: int = 1
    batch: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    lr: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    limit: float | None = None
    reader: Reader = field(default_factory=Reader)


def trained(run: Path, what: str = "checkpoints/step-00000002") -> Path:
    claim(run, Settings())
    (run / what).mkdir(parents=True)
    (run / what / "manifest.json").write_text("{}")
    return run


def test_a_claimed_folder_holds_the_settings(tmp_path: Path):
    claim(tmp_path / "run", Settings())
    assert read_toml(tmp_path / "run" / "config.toml")["reader.batch"] == 4


def test_the_same_settings_and_free_ones_pass(tmp_path: Path):
    run = trained(tmp_path / "run")
    check_settings(run, Settings(), free=())
    check_settings(run, Settings(reader=Reader(threads=3)), free={"reader.threads"})
    check_settings(run, Settings(reader=Reader(threads=3, batch=1)), free={"reader."})


def test_every_difference_is_listed_with_what_was_and_what_is(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"started with other settings: lr: 0\.5 -> 2\.0, sizes: \[1, 2\] -> \[3\]"
    ):
        check_settings(trained(tmp_path / "run"), Settings(lr=2.0, sizes=(3,)), free=())


def test_a_finished_run_says_that_it_is_finished(tmp_path: Path):
    run = trained(tmp_path / "run", "weights")
    with pytest.raises(CheckpointError, match="was trained with other settings"):
        check_settings(run, Settings(lr=2.0), free=())


def test_a_folder_without_a_checkpoint_is_free(tmp_path: Path):
    claim(tmp_path / "run", Settings())
    check_settings(tmp_path / "run", Settings(lr=2.0), free=())


def test_checkpoints_without_settings_belong_to_nobody(tmp_path: Path):
    run = trained(tmp_path / "run")
    (run / "config.toml").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.toml"):
        check_settings(run, Settings(), free=())


def test_settings_that_only_one_side_has_are_differences_too():
    assert differences({"a": 1}, {"b": None}) == ["a: 1 -> not there", "b: not there -> none"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the run folder 'run' cannot be written"):
        claim(tmp_path / "file" / "run", Settings())
