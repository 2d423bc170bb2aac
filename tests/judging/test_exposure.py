from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest

from voxelstem.card import Card
from voxelstem.errors import AuditError
from voxelstem.judging.exposure import Touched, expose, told_by_card, touched
from voxelstem.seen import BEFORE, seen_line
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Record, Store, write
from voxelstem.store.catalogue import Catalogue
from voxelstem.store.copies import Copy
from voxelstem.store.leakage import Leakage, Shared
from voxelstem.store.subjects import key_mark, pseudonym, site_key
from voxelstem.study import InputSpec

TRAIN, TEST = Fractions(train=1.0, validation=0.0, test=0.0), Fractions(train=0.0, validation=0.0, test=1.0)
MIXED = Fractions(train=0.5, validation=0.0, test=0.5)


def made(folder: Path, seeds: range, fractions: Fractions, *, rename: str = "") -> Store:
    store = Store.create(folder, fractions=fractions)
    with Catalogue.write(folder) as catalogue, catalogue.transaction():
        catalogue.set_meta("key", key_mark(site_key()))  # as `ingest` does
    for seed in seeds:
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(12.0, 12.0, 12.0)))
        write(store, replace(study, subject=pseudonym(rename + study.subject, site_key())))
    return store


def parts(store: Store) -> tuple[list[Record], list[Record]]:
    records = list(store)
    return [one for one in records if one.split == "train"], [one for one in records if one.split == "test"]


def test_a_test_subject_that_the_pretraining_trained_on_is_refused_with_counts(tmp_path: Path) -> None:
    store = made(tmp_path / "tested", range(4), TEST)
    before = made(tmp_path / "pool", range(2, 8), TRAIN)
    with pytest.raises(AuditError, match=r"2 subjects, \d acquisitions, 2 exact copies") as caught:
        expose(store, [before.path], [], list(store))
    assert "no pretraining has seen" in str(caught.value.hint)


def test_a_copy_under_another_name_is_refused_too(tmp_path: Path) -> None:
    store = made(tmp_path / "tested", range(3), TEST)
    before = made(tmp_path / "pool", range(2, 6), TRAIN, rename="other")
    with pytest.raises(AuditError, match=r"0 subjects, .* 1 exact copies"):
        expose(store, [before.path], [], list(store))


def test_nothing_shared_is_said_to_have_been_compared(tmp_path: Path) -> None:
    store = made(tmp_path / "tested", range(3), TEST)
    pools = [made(tmp_path / name, seeds, TRAIN).path for name, seeds in (("a", range(3, 5)), ("b", range(5, 7)))]
    found = expose(store, pools, [], list(store))
    assert found.state == "compared"
    assert found.tested == Touched(subjects=0, acquisitions=0, exact_copies=0, near_copies=0)
    assert found.known.startswith("compared with the pretraining: nothing")
    assert sum("pretraining store" in line for line in found.lines) == 2


def test_what_the_pretraining_held_out_is_no_leak_and_labelled_subjects_are_counted(tmp_path: Path) -> None:
    store = made(tmp_path / "tested", range(12), MIXED)
    labelled, tested = parts(store)
    assert labelled
    assert tested
    # The same split again: whoever is tested here was held out there, and whoever is labelled was trained on.
    before = made(tmp_path / "pool", range(12), MIXED)
    found = expose(store, [before.path], labelled, tested)
    assert found.labelled is not None
    assert found.labelled.subjects == len({record.subject for record in labelled})
    assert "without labels" in found.lines[1]
    assert expose(store, [store.path], labelled, tested).state == "compared"


def test_other_site_keys_leave_copies_alone_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made(tmp_path / "tested", range(3), TEST)
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path / "other.key"))
    clean, dirty = made(tmp_path / "clean", range(3, 6), TRAIN), made(tmp_path / "dirty", range(2, 6), TRAIN)
    found = expose(store, [clean.path], [], list(store))
    assert found.state == "in part"
    assert found.known == ""
    assert "by copies only" in found.lines[0]
    assert any("not compared: subjects and acquisitions" in line for line in found.lines)
    with pytest.raises(AuditError, match=r"0 subjects, .*1 exact copies"):
        expose(store, [dirty.path], [], list(store))


def test_pairs_count_whichever_side_stands_first() -> None:
    copy = Copy(
        key_a="t",
        key_b="m",
        kind="near",
        correlation=0.99,
        overlap=1.0,
        same_subject=True,
        linked=False,
        across_splits=True,
    )
    found = Leakage(
        subjects=(Shared(in_a=("t",), in_b=("m", "n")), Shared(in_a=("v",), in_b=("m",))),
        acquisitions=(),
        copies=(copy, dataclasses.replace(copy, key_a="x")),
        checked=(),
        unchecked=(),
    )
    wanted = Touched(subjects=1, acquisitions=0, exact_copies=0, near_copies=1)
    assert touched(found, {"m"}, {"t"}) == touched(found, {"t"}, {"m"}) == wanted
    assert wanted.found
    assert not touched(found, {"m"}, {"z"}).found


def test_weights_say_by_themselves_what_is_known(tmp_path: Path) -> None:
    store = made(tmp_path / "store", range(6), MIXED)
    own = seen_line(record.key for record in store if record.split == "train")
    card = Card(architecture={"name": "scan_vit"}, spec=InputSpec(), trained=("block",), data=("6 CT scans", own))
    assert told_by_card(card, store).state == "same splits"
    assert "splits protect" in told_by_card(card, store).known
    for data in (("6 CT scans",), ("6 CT scans", seen_line(["z"])), (f"{BEFORE}5 CT scans", own)):
        found = told_by_card(replace(card, data=data), store)
        assert (found.state, found.known) == ("unknown", "")
        assert "NOT MEASURED" in found.lines[0]
    assert told_by_card(replace(card, trained=(), data=()), store).state == "untrained"
