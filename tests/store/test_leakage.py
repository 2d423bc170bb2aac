from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voxelstem.errors import AuditError, ConfigError
from voxelstem.resampling import resample
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, write
from voxelstem.store.catalogue import Catalogue
from voxelstem.store.leakage import MOST_LINES, Leakage, across_splits, common, describe, leakage
from voxelstem.store.splits import split_of
from voxelstem.store.subjects import key_mark, pseudonym
from voxelstem.study import Acquisition, Provenance, Study, Volume

KEY, OTHER_KEY = bytes(32), bytes([1] * 32)


def small(seed: int, group: str = "") -> Volume:
    array = np.random.default_rng(seed).integers(-1000, 1000, (1, 12, 10, 8)).astype(np.float32)
    return Volume(
        array=array,
        affine_ras=np.diag([2.0, 2.0, 3.0, 1.0]),
        modality="CT",
        provenance=Provenance(source_format="phantom", sha256="0" * 64, orientation="RAS"),
        acquisition=Acquisition(group=group),
    )


def store_of(root: Path, *scans: tuple[str, Volume], key: bytes = KEY) -> Store:
    store = Store.create(root)
    with Catalogue.write(root) as catalogue, catalogue.transaction():
        catalogue.set_meta("key", key_mark(key))
    for subject, volume in scans:
        write(store, Study(subject=pseudonym(subject, key), volumes=(volume,)))
    return store


def labels(path: Path, *subjects: str) -> Path:
    path.write_text("\n".join(["subject,label", *(f"{subject},1" for subject in subjects)]) + "\n")
    return path


def somebody_in(split: str, key: bytes = KEY, after: int = 0) -> str:
    """An id that the hash puts into a split."""
    return next(name for n in range(after, 10_000) if split_of(pseudonym(name := f"patient {n}", key)) == split)


@pytest.fixture(scope="module")
def scan() -> Volume:
    return replace(phantom(PhantomConfig(seed=0, spacing_mm=(4.0, 4.0, 5.0))).volumes[0], labels=None)


def softer(volume: Volume) -> Volume:
    array, affine = resample(volume.array, volume.affine_ras, (5.0, 5.0, 6.0))
    return replace(volume, array=array, affine_ras=affine)


def test_stores_of_different_people_share_nothing(tmp_path):
    store_of(tmp_path / "a", ("alice", small(0)))
    store_of(tmp_path / "b", ("bob", small(1)))
    found = leakage(tmp_path / "a", tmp_path / "b", KEY)
    assert not found.found
    assert found.checked == ("subjects", "acquisitions", "exact copies", "near copies")
    assert found.unchecked == ()
    assert describe(found).startswith("nothing shared\n0 subjects")


def test_a_person_with_other_scans_in_the_other_store_is_shared(tmp_path):
    one, two = store_of(tmp_path / "a", ("alice", small(0))), store_of(tmp_path / "b", ("alice", small(1)))
    found = leakage(tmp_path / "a", tmp_path / "b", KEY)
    assert found.counts == {
        "subjects": 1,
        "acquisitions": 0,
        "exact_copies": 0,
        "near_copies": 0,
        "copies_under_another_subject": 0,
        "copies_within_a_split": 0,
    }
    (shared,) = found.subjects
    assert (shared.in_a, shared.in_b) == (tuple(r.key for r in one), tuple(r.key for r in two))


def test_an_acquisition_with_another_kernel_in_the_other_store_is_shared(tmp_path):
    store_of(tmp_path / "a", ("alice", small(0, group="g1")), ("bob", small(1)))
    store_of(tmp_path / "b", ("carol", small(2, group="g1")), ("dan", small(3)))
    found = leakage(tmp_path / "a", tmp_path / "b", KEY)
    assert len(found.acquisitions) == 1
    assert found.found
    assert not found.subjects


def test_copies_are_found_across_keys_where_subjects_cannot_be_compared(tmp_path, scan):
    store_of(tmp_path / "a", ("alice", scan), ("bob", small(1)))
    store_of(tmp_path / "b", ("alice", softer(scan)), ("bob", small(1)), key=OTHER_KEY)
    found = leakage(tmp_path / "a", tmp_path / "b", KEY)
    assert sorted(copy.kind for copy in found.copies) == ["exact", "near"]
    assert found.counts["copies_under_another_subject"] == 2
    assert found.checked == ("exact copies", "near copies")
    assert found.unchecked == (
        "subjects and acquisitions: made with different site keys, so one person has two pseudonyms",
    )


def test_a_store_that_does_not_say_its_key_is_never_called_clean_of_subjects(tmp_path):
    for name in ("a", "b"):
        write(Store.create(tmp_path / name), Study(subject=pseudonym(name, KEY), volumes=(small(ord(name)),)))
    found = leakage(tmp_path / "a", tmp_path / "b", KEY)
    assert "subjects" not in found.checked
    assert "a site key that is not known" in found.unchecked[0]


def test_label_files_are_compared_by_row(tmp_path):
    store = store_of(tmp_path / "a", ("alice", small(0)), ("bob", small(1)))
    table = labels(tmp_path / "b.csv", "carol", "alice", "alice")
    found = leakage(tmp_path / "a", table, KEY)
    (shared,) = found.subjects
    assert shared.in_b == ("row 3", "row 4")
    assert store.record(shared.in_a[0]).subject == pseudonym("alice", KEY)
    assert found.unchecked == ("copies: a label file holds no scans",)
    both = leakage(table, labels(tmp_path / "c.csv", "dan", "carol"), KEY)
    assert [(one.in_a, one.in_b) for one in both.subjects] == [(("row 2",), ("row 3",))]


def test_a_label_file_beside_a_store_of_another_key_is_an_error(tmp_path):
    store_of(tmp_path / "a", ("alice", small(0)), key=OTHER_KEY)
    with pytest.raises(AuditError, match="another site key") as told:
        leakage(tmp_path / "a", labels(tmp_path / "b.csv", "alice"), KEY)
    assert "VOXELSTEM_KEY" in told.value.hint


def test_what_is_neither_store_nor_label_file_is_refused(tmp_path):
    (tmp_path / "b.csv").write_text("name\nalice\n")
    for wrong in (tmp_path / "nowhere", tmp_path / "b.csv", tmp_path):
        with pytest.raises(ConfigError) as told:
            leakage(labels(tmp_path / "a.csv", "bob"), wrong, KEY)
        assert "alice" not in told.value.problem


def test_a_copy_under_another_id_in_another_split_is_told_of_one_store(tmp_path, scan):
    train, test = somebody_in("train"), somebody_in("test")
    store = store_of(tmp_path / "a", (train, scan), (test, softer(scan)), (train, small(0)), (test, small(1)))
    found = leakage(tmp_path / "a", tmp_path / "a", KEY)
    assert found == across_splits(store)
    (copy,) = found.copies
    assert (copy.kind, copy.same_subject, copy.across_splits) == ("near", False, True)
    assert {store.record(key).split for key in (copy.key_a, copy.key_b)} == {"train", "test"}
    assert "1 of these copies under another subject" in describe(found)


def test_a_copy_within_a_split_is_no_leakage(tmp_path, scan):
    one = somebody_in("train")
    two = somebody_in("train", after=int(one.split()[1]) + 1)
    store = store_of(tmp_path / "a", (one, scan), (two, softer(scan)), (one, small(0)))
    found = across_splits(store)
    assert not found.found
    assert [copy.kind for copy in found.within_a_split] == ["near"]
    assert "1 copies within one split" in describe(found)


def test_an_acquisition_in_two_splits_is_leakage(tmp_path):
    train, test = somebody_in("train"), somebody_in("validation")
    store = store_of(tmp_path / "a", (train, small(0, group="g")), (test, small(1, group="g")), (test, small(2)))
    assert across_splits(store).counts["acquisitions"] == 1


def test_common_counts_each_kind_and_ignores_what_is_not_known(tmp_path):
    store = store_of(tmp_path / "a", ("alice", small(0)), ("bob", small(1)), ("carol", small(2, group="g")))
    by_owner = {record.subject: record for record in store}
    alice, bob, carol = (by_owner[pseudonym(name, KEY)] for name in ("alice", "bob", "carol"))
    names = ("subjects", "scans", "scans, voxel for voxel,", "acquisitions")
    assert common([alice, carol], [bob]) == dict.fromkeys(names, 0)
    for change, name in (
        ({"subject": alice.subject}, "subjects"),
        ({"key": alice.key}, "scans"),
        ({"voxels": alice.voxels}, "scans, voxel for voxel,"),
        ({"acquisition": carol.acquisition}, "acquisitions"),
    ):
        assert common([alice, carol], [replace(bob, **change)]) == dict.fromkeys(names, 0) | {name: 1}


def test_what_is_told_names_nobody_and_is_plain_json(tmp_path):
    store_of(tmp_path / "a", *((f"secret {n}", small(n)) for n in range(MOST_LINES + 5)))
    table = labels(tmp_path / "b.csv", *(f"secret {n}" for n in range(MOST_LINES + 5)))
    found = leakage(tmp_path / "a", table, KEY)
    text, facts = describe(found), json.dumps(found.facts())
    assert "… and 5 more" in text
    for told in (text, facts):
        assert "secret" not in told
        assert not any(pseudonym(f"secret {n}", KEY) in told for n in range(MOST_LINES + 5))
    assert json.loads(facts)["counts"]["subjects"] == MOST_LINES + 5


def test_nothing_compared_is_not_nothing_shared():
    nothing = Leakage(subjects=(), acquisitions=(), copies=(), checked=(), unchecked=("subjects: …",))
    assert describe(nothing).startswith("nothing could be compared")


def splits(root: Path, order: list[int], *, again: bool = False) -> dict[str, str]:
    store = store_of(root, *((f"patient {n // 2}", small(n)) for n in order))
    if again:
        for n in order[::-1]:
            write(store, Study(subject=pseudonym(f"patient {n // 2}", KEY), volumes=(small(n),)))
    return {record.key: record.split for record in store}


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(8)), st.booleans(), st.integers(1, 8))
def test_splits_do_not_depend_on_the_order_of_scans_on_what_else_is_there_or_on_a_second_ingest(
    tmp_path_factory, order, again, first
):
    root = tmp_path_factory.mktemp("splits")
    usual = splits(root / "usual", list(range(8)))
    assert len(set(usual.values())) > 1
    assert splits(root / "shuffled", order, again=again) == usual
    some = splits(root / "some", order[:first])
    assert some.items() <= usual.items()
