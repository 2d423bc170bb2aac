from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxelstem.card import Card, write_weights
from voxelstem.embedder import EmbedConfig, Embedder, Task, computing_once, load_once, stamp_of, weights_at
from voxelstem.embedding import read
from voxelstem.errors import ConfigError
from voxelstem.manifest import write_whole
from voxelstem.model import make_model
from voxelstem.sources import Source, iterate, nifti
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.study import InputSpec

KEY = b"k" * 32
CARD = Card(
    architecture={
        "name": "scan_vit",
        "block_ijk": (16, 16, 16),
        "block.dim": 24,
        "block.depth": 1,
        "block.heads": 2,
        "scan.depth": 0,
    },
    spec=InputSpec(spacing_mm=(10.0, 10.0, 10.0), block_ijk=(16, 16, 16)),
    trained=("block",),
)


def written(folder: Path, seed: int = 0) -> Path:
    write_weights(folder, make_model(CARD, seed=seed).backbone.state_dict(), CARD)
    return folder


@pytest.fixture
def embedder(tmp_path: Path) -> Embedder:
    weights = weights_at(written(tmp_path / "weights"))
    digest = load_once(weights).card.sha256
    how = EmbedConfig()
    return Embedder(weights=weights, sha256=digest, how=how, way="reference", out=tmp_path / "out", key=KEY)


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    for seed in range(3):
        volume = phantom(PhantomConfig(seed=seed, spacing_mm=(12.0, 10.0, 10.0))).volumes[0]
        nifti.write(tmp_path / "scans" / f"{seed}.nii.gz", volume.array[0].astype(np.int16), volume.affine_ras)
    (tmp_path / "scans" / "1.nii.gz").write_bytes(b"no scan")
    return [Task(name=source.relative, source=source) for source in iterate(tmp_path / "scans")]


def test_one_by_one_gives_what_all_together_give(embedder: Embedder, tasks: list[Task], tmp_path: Path):
    together = list(embedder.map(tasks))
    assert [task.name for task, _ in together] == [task.name for task in tasks]
    assert [bool(outcome.code) for _, outcome in together] == [False, True, False]
    for task, outcome in together:
        alone = pickle.loads(pickle.dumps(embedder))(task)
        assert (alone.row, alone.code, alone.skipped) == (outcome.row, outcome.code, outcome.skipped)
        if outcome.packed:
            for name, data in (("a", outcome.packed), ("b", alone.packed)):
                write_whole(tmp_path / name, data)
            one, two = read(tmp_path / "a"), read(tmp_path / "b")
            assert one is not None
            assert two is not None
            assert np.allclose(one.scan, two.scan, atol=1e-5)
            assert one.facts == two.facts


def test_an_embedding_of_the_same_content_is_not_made_twice(embedder: Embedder, tasks: list[Task]):
    first = embedder(tasks[0])
    embedder.out.mkdir()
    write_whole(embedder.out / f"{first.row['key']}.npz", first.packed)
    again = embedder(tasks[0])
    assert (again.row, again.packed, again.skipped) == (first.row, b"", True)


def test_a_scan_that_cannot_be_laid_out_is_refused_in_its_turn(embedder: Embedder, tasks: list[Task]):
    fine = replace(embedder, how=EmbedConfig(spacing=(0.01, 0.01, 0.01)))
    assert [(task.name, outcome.code) for task, outcome in fine.map(tasks)] == [
        (tasks[0].name, "too-large"),
        (tasks[1].name, next(embedder.map(tasks[1:]))[1].code),
        (tasks[2].name, "too-large"),
    ]


def test_a_cluster_with_other_weights_is_refused(embedder: Embedder, tasks: list[Task]):
    with pytest.raises(ConfigError, match="other weights"):
        replace(embedder, sha256="0" * 64)(tasks[0])


def test_new_weights_at_the_same_place_are_loaded_anew(tmp_path: Path):
    one = weights_at(written(tmp_path / "weights"))
    first = load_once(one)
    assert load_once(weights_at(tmp_path / "weights")) is first
    (tmp_path / "weights").rename(tmp_path / "old")
    other = weights_at(written(tmp_path / "weights", seed=1))
    assert load_once(other).card.sha256 != first.card.sha256


def test_the_named_way_is_taken_and_an_unknown_one_is_measured_anew(tmp_path: Path):
    weights = weights_at(written(tmp_path / "weights"))
    assert computing_once(weights, EmbedConfig(), "lean").name == "lean"
    assert computing_once(weights, EmbedConfig(), "a way of tomorrow").name in ("reference", "lean", "openvino")


def test_a_stamp_changes_with_the_files_and_names_none(tmp_path: Path):
    path = tmp_path / "PlantedMiller.nii.gz"
    path.write_bytes(b"1")
    source = Source(path=path, relative=path.name, kind="nifti", subject="s")
    before = stamp_of(source, KEY)
    assert before == stamp_of(source, KEY)
    assert before != stamp_of(source, b"l" * 32)
    path.write_bytes(b"12")
    assert stamp_of(source, KEY) != before
    assert stamp_of(replace(source, path=tmp_path / "nowhere"), KEY)
