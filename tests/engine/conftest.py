"""A store of four coarse phantoms, and an objective that trains in milliseconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.heads import drawn

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.objectives.mae import Mae, MaeConfig
from voxelstem.protocols import Batch
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, write
from voxelstem.store.subjects import pseudonym


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store.create(tmp_path_factory.mktemp("engine") / "store")
    for seed in range(4):
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(6.0, 6.0, 8.0)))
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32))))
    return store


@pytest.fixture(scope="session")
def brains(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same scans as raw intensities of MR, each with a gain of its own."""
    store = Store.create(tmp_path_factory.mktemp("brains") / "store")
    for seed in range(4):
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(6.0, 6.0, 8.0)))
        (scan,) = study.volumes
        scan = replace(scan, array=(scan.array + 1100) * (0.1 + seed), modality="MR")
        write(store, replace(study, volumes=(scan,), subject=pseudonym(study.subject, bytes(32))))
    return store


class Make:
    """Small things that train: the same seed makes the same."""

    def objective(self, seed: int = 0, *, dim: int = 12) -> Mae:
        size = EncoderConfig(dim=dim, depth=1, heads=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Mae(MaeConfig(decoder=size), ScanVit(ScanVitConfig(block_ijk=(8, 8, 8), block=size, scan=size)))

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([5, step])
        views = torch.from_numpy(rng.random((2, 1, 1, 8, 8, 8), dtype=np.float32))
        return Batch(views={"global": views}, places_mm={"global": torch.ones(2, 1, 2, 3)}, seed=step)


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three heads with voxel labels."""
    store = Store.create(tmp_path_factory.mktemp("labelled") / "store")
    for seed in range(3):
        study = drawn(seed)
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32))))
    return store
