from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from voxelstem.certainty.folds import draw_folds, strata_of
from voxelstem.protocols import Example
from voxelstem.samepeople import same_people
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store, write
from voxelstem.store.copies import find_copies
from voxelstem.store.subjects import pseudonym

SPACING = (8.0, 8.0, 8.0)


def named(name: str) -> str:
    return pseudonym(name, b"k" * 32)


ONE = {named(name) for name in ("person2", "far", "near")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four people, one of them also under two other names, with values that were changed a little."""
    made = Store.create(
        tmp_path_factory.mktemp("same") / "store", fractions=Fractions(train=1.0, validation=0.0, test=0.0)
    )
    for seed in range(4):
        write(made, replace(phantom(PhantomConfig(seed=seed, spacing_mm=SPACING)), subject=named(f"person{seed}")))
    study = phantom(PhantomConfig(seed=2, spacing_mm=SPACING))
    volume = study.volumes[0]
    noise = np.random.default_rng(0).normal(0, 3, volume.array.shape).astype(np.float32)
    for name, array, digest in (("far", volume.array + 3 * noise, "1" * 64), ("near", volume.array + noise, "2" * 64)):
        provenance = replace(volume.provenance, sha256=digest)
        acquisition = replace(volume.acquisition, series=name, study=name)
        other = replace(volume, array=array, provenance=provenance, acquisition=acquisition)
        write(made, replace(study, subject=named(name), volumes=(other,)))
    return made


def test_copies_under_other_names_are_one_person(store: Store, tmp_path: Path) -> None:
    pairs = same_people(store, list(store), tmp_path)
    joined = {name for pair in pairs for name in pair}
    assert joined == ONE
    assert all(a < b for a, b in pairs)
    assert len(set(pairs)) == len(pairs)


def test_only_the_scans_that_are_asked_about_are_looked_at(store: Store, tmp_path: Path) -> None:
    others = [record for record in store if record.subject not in ONE - {named("person2")}]
    assert same_people(store, others, tmp_path) == ()
    assert find_copies(store, among=others) == ()
    both = [record for record in store if record.subject in (named("person2"), named("near"))]
    assert same_people(store, both, tmp_path) == (tuple(sorted((named("near"), named("person2")))),)
    assert same_people(store, both[:1], tmp_path) == ()


def test_what_was_found_rests_and_belongs_to_these_scans_alone(store: Store, tmp_path: Path) -> None:
    records = list(store)
    first = same_people(store, records, tmp_path)
    (kept,) = tmp_path.glob("copies-*.json")
    kept.write_text('[["a", "b"]]\n')
    assert same_people(store, records[::-1], tmp_path) == (("a", "b"),)
    assert same_people(store, records[1:], tmp_path) != (("a", "b"),)
    kept.unlink()
    assert same_people(store, records, tmp_path) == first


def test_copies_are_never_on_both_sides_of_a_fold(store: Store, tmp_path: Path) -> None:
    records = list(store)
    examples = [
        Example(
            subject=record.subject,
            key=record.key,
            features=None,  # pyright: ignore[reportArgumentType]
            affine_ras=np.eye(4),
            value=float(at),
        )
        for at, record in enumerate(records)
    ]
    together = same_people(store, records, tmp_path)
    for seed in range(10):
        folds = draw_folds(strata_of(examples, (), together=together), count=3, seed=seed)
        assert sum(bool(held & ONE) for held in folds.held) == 1
