"""From files to findings on phantoms whose answer is known, in under a minute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from voxelstem import adapt, evaluate, geometry, pretrain
from voxelstem.adapted import read_run
from voxelstem.config import overlay
from voxelstem.demo import public_key
from voxelstem.ingest import ingest
from voxelstem.model import load
from voxelstem.recipes import named
from voxelstem.sources.phantom import PhantomConfig, PhantomFiles, phantom_files
from voxelstem.store import Store
from voxelstem.tasks.segment import Segment


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, PhantomFiles]]:
    """Files -> store -> pretrained weights -> a segmentation head fitted to five phantoms."""
    root = tmp_path_factory.mktemp("journey")
    # One key for ever: the same phantoms are held out on every machine.
    with public_key(root):
        yield root, walk(root)


def walk(root: Path) -> PhantomFiles:
    files = phantom_files(root / "files", [PhantomConfig(seed=seed, spacing_mm=(5.0, 5.0, 6.0)) for seed in range(12)])
    ingest([files.scans], root / "store", labels=files.labels, reports=files.reports)
    config = overlay(named("tiny"), {"steps": 100, "checkpoint.every": 50})
    pretrain.run(config, store=root / "store", out=root / "run")
    (root / "labels.json").write_text('{"classes": {"1": "lung_left", "2": "lung_right", "3": "liver"}}')
    adapt.run(
        weights=root / "run" / "weights",
        store=root / "store",
        labels=root / "labels.json",
        task="segment",
        mode="probe",
        out=root / "adapted",
        budget=5,
    )
    return files


def test_organs_are_found_where_they_are(journey: tuple[Path, PhantomFiles]) -> None:
    root, _ = journey
    store, adapted = Store.open(root / "store"), read_run(root / "adapted")
    model = load(adapted.weights)
    tested = [record for record in store if record.split == "test"]
    assert tested
    assert isinstance(adapted.task, Segment)
    for record in tested:
        volume, truth = store.volume(record.key), store.labels(record.key)
        assert truth is not None
        embedding = model.embed(volume, tokens=True)
        found = adapted.task.predict(adapted.head, embedding, volume.affine_ras, volume.shape_ijk)
        names = {name: value for value, name in found.classes.items()}
        for value, organ in ((1, "lung_left"), (2, "lung_right")):
            centres = [
                geometry.voxel_to_patient(np.argwhere(array == wanted).mean(axis=0)[None], volume.affine_ras)[0]
                for array, wanted in ((truth.array, value), (found.array, names[organ]))
            ]
            assert np.linalg.norm(centres[0] - centres[1]) < 30.0  # mm


def test_the_evaluation_stands_beside_its_baselines(journey: tuple[Path, PhantomFiles]) -> None:
    root, _ = journey
    found = evaluate.run(
        [root / "adapted"],
        store=root / "store",
        labels=root / "labels.json",
        out=root / "scores",
        config=evaluate.EvaluateConfig(unet_steps=0),
    )
    names = {score.name for score in found.scores}
    assert {"adapted", "scratch", "intensity", "atlas"} <= names
    lungs = next(score for score in found.scores if score.name == "adapted").parts["lung_left"]
    assert lungs.estimate > 0.5
