from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_together

from voxelstem import distributed, pretrain
from voxelstem.backbones.scan_vit import ScanVit, patchify
from voxelstem.config import overlay
from voxelstem.engine import measuring
from voxelstem.engine.journal import facts_of, read_journal
from voxelstem.engine.loader import Loader
from voxelstem.engine.measuring import measure
from voxelstem.engine.scans import choose
from voxelstem.model import load
from voxelstem.recipes import named
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym

SMALL = {
    "steps": 4,
    "backbone.atlas_directions": (5, 4),
    "backbone.block.dim": 24,
    "backbone.block.heads": 2,
    "backbone.scan.dim": 24,
    "backbone.scan.heads": 2,
    "objective.hidden": 16,
    "checkpoint.every": 2,
    "health.every": 4,
    "loader.batch": 2,
}


def config() -> pretrain.PretrainConfig:
    return overlay(named("tiny.align"), SMALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measuring") / "store"
    store = Store.create(folder, fractions=Fractions(train=1.0, validation=0.0, test=0.0))
    for seed in range(4):
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(8.0, 8.0, 8.0)))
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32))))
    return folder


def loader_of(store: Path) -> Callable[[], Loader]:
    def make() -> Loader:
        opened = Store.open(store)
        return pretrain.make_loader(config(), opened, choose(opened, config().spec, config().views).scans)

    return make


def test_what_is_usual_is_that_of_the_first_views_of_training(store: Path, tmp_path: Path) -> None:
    objective, loader = pretrain.make_objective(config()), loader_of(store)()
    assert measure(objective, loader_of(store), run=tmp_path) == [{"measured": 8}]  # two views of each of four scans
    atlas = objective.backbone.atlas
    views = torch.cat([loader.batch(step).views["global"][:, 0] for step in range(4)])
    torch.testing.assert_close(
        atlas.middle, atlas.numbers(patchify(views, (8, 8, 8))).mean(dim=0), atol=1e-5, rtol=1e-4
    )
    before = atlas.turn.clone()
    assert measure(objective, loader_of(store), run=tmp_path) == []
    assert torch.equal(atlas.turn, before)


@pytest.mark.parametrize(("name", "most", "count"), [("SCANS", 3, 3), ("BYTES", 5 * 48 * 40 * 48 * 4, 5)])
def test_no_more_views_are_held_than_are_needed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int, count: int
) -> None:
    monkeypatch.setattr(measuring, name, most)
    assert measure(pretrain.make_objective(config()), loader_of(store), run=tmp_path) == [{"measured": count}]


def nothing() -> Loader:
    raise AssertionError("nothing should be read")


def test_a_network_that_compares_nothing_is_shown_nothing(tmp_path: Path) -> None:
    plain = pretrain.make_objective(overlay(config(), {"backbone.atlas_cell": 0}))
    assert measure(plain, nothing, run=tmp_path) == []


def measured_here(store: Path, run: Path) -> dict[str, Any]:
    objective = pretrain.make_objective(config())
    measure(objective, nothing if distributed.here().rank else loader_of(store), run=run)
    return objective.backbone.atlas.state_dict()


def test_all_processes_know_what_the_first_one_measured(store: Path, tmp_path: Path) -> None:
    one, other = run_together(measured_here, 2, tmp_path, (store, tmp_path))
    assert bool(one["turn"].any())
    assert all(torch.equal(one[name], other[name]) for name in one)


class StoppedError(Exception):
    pass


def test_a_run_measures_once_and_resumes_to_the_last_bit(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain.run(config(), store=store, out=tmp_path / "whole")
    train = pretrain.Trainee.backward

    def stops(self: Any, batch: Any, *, progress: float) -> Any:
        if progress >= 0.75:
            raise StoppedError
        return train(self, batch, progress=progress)

    monkeypatch.setattr(pretrain.Trainee, "backward", stops)
    with pytest.raises(StoppedError):
        pretrain.run(config(), store=store, out=tmp_path / "run")
    monkeypatch.undo()
    with monkeypatch.context() as patched:
        patched.setattr(ScanVit, "measure", None)  # a checkpoint holds what was measured
        pretrain.run(config(), store=store, out=tmp_path / "run")
    lines = facts_of(read_journal(tmp_path / "whole"))
    assert [line["measured"] for line in lines if "measured" in line] == [8]
    assert facts_of(read_journal(tmp_path / "run")) == lines
    one, other = (load(tmp_path / name / "weights").backbone.state_dict() for name in ("whole", "run"))
    assert bool(one["atlas.turn"].any())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_measured_goes_on_with_the_weights(store: Path, tmp_path: Path) -> None:
    pretrain.run(config(), store=store, out=tmp_path / "first")
    # Half of the scans: measured anew, other things would be usual.
    half = tmp_path / "half"
    opened = Store.create(half, fractions=Fractions(train=1.0, validation=0.0, test=0.0))
    for seed in (7, 8):
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(8.0, 8.0, 8.0)))
        write(opened, replace(study, subject=pseudonym(study.subject, bytes(32))))
    pretrain.run(config(), store=half, out=tmp_path / "second", weights=tmp_path / "first/weights")
    one, other = (load(tmp_path / name / "weights").backbone.state_dict() for name in ("first", "second"))
    assert torch.equal(one["atlas.usual"], other["atlas.usual"])
    assert not torch.equal(one["atlas.read.weight"], other["atlas.read.weight"])
