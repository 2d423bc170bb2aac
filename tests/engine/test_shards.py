from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from voxelstem.engine.checkpoint import write_checkpoint
from voxelstem.engine.shards import INDEX, read_index
from voxelstem.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    objective = torch.nn.Linear(2, 3)
    return write_checkpoint(tmp_path, 1, objective, torch.optim.AdamW(objective.parameters()), keep=2)


def test_the_index_tells_names_shapes_and_kinds(folder: Path):
    assert read_index(folder / INDEX).tensors == {
        "objective.weight": ((3, 2), torch.float32),
        "objective.bias": ((3,), torch.float32),
    }


class Harmful:
    """Asks whoever unpickles it to make a folder, as a harmful index would ask for worse."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_code_in_an_index_is_refused_and_not_run(folder: Path, tmp_path: Path):
    (folder / INDEX).write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    with pytest.raises(CheckpointError, match="the index of step-00000001 is not one that a training of ours wrote"):
        read_index(folder / INDEX)
    assert not (tmp_path / "harm").exists()


def test_an_index_that_points_outside_its_folder_is_refused(folder: Path):
    metadata = read_index(folder / INDEX).metadata
    for place in metadata.storage_data.values():
        place.relative_path = "../../elsewhere"
    (folder / INDEX).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="not one that a training of ours wrote"):
        read_index(folder / INDEX)


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(3), pickle.dumps({}), b"\x80\x04]" * 9])
def test_junk_is_refused(folder: Path, content: bytes):
    (folder / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match="not one that a training of ours wrote"):
        read_index(folder / INDEX)
