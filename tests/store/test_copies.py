from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from voxelstem.errors import IngestError, StoreError
from voxelstem.resampling import resample
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, Writer, write
from voxelstem.store.copies import Copy, Limits, Roll, copies_of, exact_copies, find_copies
from voxelstem.store.encoding import encode_study
from voxelstem.store.subjects import pseudonym
from voxelstem.store.thumbnails import thumbnail
from voxelstem.study import Acquisition, Study, Volume

ROOT = Path(__file__).parent.parent.parent


def scan(seed: int, phase: Any = "none") -> Volume:
    volume = phantom(PhantomConfig(seed=seed, phase=phase, spacing_mm=(5.0, 5.0, 5.0))).volumes[0]
    return replace(volume, labels=None)


@pytest.fixture(scope="module")
def volume() -> Volume:
    return scan(0)


def softer(volume: Volume) -> Volume:
    """Another kernel and spacing."""
    array, affine = resample(volume.array, volume.affine_ras, (6.0, 6.0, 6.0))
    return replace(volume, array=array, affine_ras=affine)


def cut(volume: Volume) -> Volume:
    return replace(volume, array=np.ascontiguousarray(volume.array[..., 15:]))


def store_of(root: Path, *studies: tuple[str, Volume]) -> Store:
    store = Store.create(root)
    for subject, volume in studies:
        write(store, Study(subject=pseudonym(subject, bytes(32)), volumes=(volume,)))
    return store


def owners(store: Store, copy: Copy) -> set[str]:
    return {store.record(copy.key_a).subject, store.record(copy.key_b).subject}


def test_a_near_copy_under_another_patients_id_is_found_and_no_other_pair_is(tmp_path, volume):
    store = store_of(
        tmp_path / "store",
        ("alice", volume),
        ("impostor", softer(volume)),
        ("alice", scan(0, "portal")),
        ("bob", scan(1)),
        ("carol", scan(2)),
    )
    (copy,) = find_copies(store)
    assert owners(store, copy) == {pseudonym(name, bytes(32)) for name in ("alice", "impostor")}
    assert (copy.kind, copy.same_subject, copy.linked) == ("near", False, False)
    assert copy.key_a < copy.key_b
    assert copy.correlation > 0.95
    assert copy.overlap > 0.95
    assert copy.across_splits == (len({store.record(key).split for key in (copy.key_a, copy.key_b)}) == 2)


def test_reconstructions_of_one_acquisition_are_linked_when_the_catalogue_says_so(tmp_path, volume):
    group = Acquisition(group="acquisition 1")
    known = replace(volume, acquisition=group), replace(softer(volume), acquisition=group)
    (copy,) = find_copies(store_of(tmp_path / "store", ("alice", known[0]), ("alice", known[1])))
    assert (copy.linked, copy.same_subject) == (True, True)


def test_equal_voxels_are_exact_copies_whatever_the_header_says(tmp_path, volume):
    moved = volume.affine_ras.copy()
    moved[:3, 3] += 7
    again = replace(volume, affine_ras=moved)
    (copy,) = find_copies(store_of(tmp_path / "one", ("alice", volume), ("alice", again)))
    assert (copy.kind, copy.same_subject, copy.across_splits) == ("exact", True, False)
    assert (copy.correlation, copy.overlap) == (1.0, 1.0)
    here, there = store_of(tmp_path / "here", ("alice", volume)), store_of(tmp_path / "there", ("bob", again))
    (copy,) = find_copies(here, there)
    assert (copy.kind, copy.same_subject) == ("exact", False)
    assert [copy.key_a, copy.key_b] == [*(one.key for one in here), *(one.key for one in there)]


def test_between_stores_the_crop_is_found_on_either_side(tmp_path, volume):
    whole = store_of(tmp_path / "whole", ("alice", volume), ("bob", scan(1)))
    part = store_of(tmp_path / "part", ("carol", cut(volume)), ("dan", scan(2)))
    (there,), (back,) = find_copies(whole, part), find_copies(part, whole)
    assert (there.key_a, there.key_b) == (back.key_b, back.key_a)
    assert whole.record(there.key_a).subject == pseudonym("alice", bytes(32))
    assert there.kind == back.kind == "near"


def test_a_new_scan_finds_its_copies_before_it_is_stored(tmp_path, volume):
    store = store_of(tmp_path / "store", ("alice", volume), ("bob", scan(1)))
    alice = pseudonym("alice", bytes(32))
    (exact,) = copies_of(volume, store, subject=alice)
    assert (exact.kind, exact.key_a, exact.same_subject) == ("exact", "", True)
    (near,) = copies_of(softer(volume), store)
    assert (near.kind, near.same_subject) == ("near", False)
    assert store.record(near.key_b).subject == alice
    assert copies_of(scan(0, "portal"), store) == ()
    assert copies_of(scan(3), store) == ()
    with pytest.raises(IngestError, match="not finite"):
        copies_of(replace(volume, array=volume.array * np.nan), store)


def test_thumbnails_in_the_catalogue_are_believed_and_missing_ones_are_drawn(tmp_path, volume):
    def fill(root: Path, data: bytes) -> Store:
        store = store_of(root, ("alice", volume))
        other = encode_study(Study(subject=pseudonym("bob", bytes(32)), volumes=(softer(volume),)))
        with Writer(store.path) as writer:
            writer.add(replace(other, volumes=(replace(other.volumes[0], thumbnail=data),)))
        store.refresh()
        return store

    stranger = scan(5)
    wrong = thumbnail(stranger.array[:, 30:], stranger.affine_ras, "MR")
    assert find_copies(fill(tmp_path / "wrong", wrong)) == ()
    assert len(find_copies(fill(tmp_path / "none", b""))) == 1
    assert len(find_copies(fill(tmp_path / "foreign", b"of another version"))) == 1


def test_empty_stores_and_strangers_share_nothing(tmp_path, volume):
    empty, one = Store.create(tmp_path / "empty"), store_of(tmp_path / "one", ("alice", volume))
    assert find_copies(empty) == find_copies(one) == find_copies(empty, one) == find_copies(one, empty) == ()
    assert copies_of(volume, empty) == ()


def test_a_damaged_file_is_told_and_never_passed_over(tmp_path, volume):
    store = store_of(tmp_path / "store", ("alice", volume), ("bob", softer(volume)))
    for path in (store.path / "volumes").glob("*/*"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match="damaged"):
        find_copies(Store.open(store.path))


@pytest.mark.parametrize(
    "wrong", [{"likeness": 0.0}, {"correlation": 1.5}, {"overlap": -1.0}, {"difference": 0.0}, {"most": 0}]
)
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="must be in"):
        Limits(**wrong)


def test_equal_digests_before_resampling_are_exact_copies_too(tmp_path, volume):
    one = Roll(key=("a",), subject=("s",), voxels=("now",), native=("before",), group=("",), split=("train",))
    two = replace(one, key=("b",), voxels=("before",), native=("",))
    three = replace(one, key=("c",), voxels=("other",), native=("",))
    assert [(copy.key_a, copy.key_b) for copy in exact_copies(one, two)] == [("a", "b")]
    assert exact_copies(one, three) == ()
    assert exact_copies(two, three) == ()


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_copies", ROOT / "benchmarks" / "copies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_made_copies_of_phantoms_are_found_and_their_other_phases_are_not(tmp_path, benchmark):
    def scans() -> Iterator[Any]:
        for one in benchmark.phantoms(1):
            array, affine = resample(one.volume.array, one.volume.affine_ras, (5.0, 5.0, 5.0))
            yield replace(one, volume=replace(one.volume, array=array, affine_ras=affine))

    outcome = benchmark.measure(tmp_path, scans, makers=("export", "resample", "crop"))
    assert outcome.there == {"export": 2, "resample": 2, "crop": 2, "export, exact": 2}
    assert outcome.found == outcome.there
    assert outcome.wrong == []


@pytest.mark.slow
def test_made_copies_of_real_scans_are_found(tmp_path, benchmark):
    data = Path(os.environ.get("VOXELSTEM_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "starter").is_dir():
        pytest.skip("no real scans: set VOXELSTEM_DATA")

    def scans() -> Iterator[Any]:
        found = list(benchmark.real_scans(data, 8))
        twice = [one for one in found if sum(one.origin == other.origin for other in found) > 1]
        yield from {one.name: one for one in [*found[::6], *twice]}.values()

    outcome = benchmark.measure(tmp_path, scans, makers=("export", "resample", "crop", "everything"))
    assert outcome.found["export, exact"] == outcome.there["export, exact"] > 10
    assert outcome.found["published twice"] == 3
    assert outcome.recall >= 0.95
    assert outcome.precision >= 0.95


def test_copies_come_in_the_order_of_their_keys(tmp_path, volume):
    store = store_of(tmp_path / "store", ("a", volume), ("b", softer(volume)), ("c", cut(volume)))
    found = find_copies(store)
    assert len(found) == 3
    assert all((one.key_a, one.key_b) < (two.key_a, two.key_b) for one, two in pairwise(found))
