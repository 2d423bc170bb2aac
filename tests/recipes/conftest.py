"""A store of four coarse phantoms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("recipes") / "store"
    store = Store.create(folder, fractions=Fractions(train=1.0, validation=0.0, test=0.0))
    for seed in range(4):
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(6.0, 6.0, 8.0)))
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32))))
    return store
