from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.heads import EDGE, SPEC, VIEWS, WHOLE, naive

from voxelstem.engine.label_crops import count_flags, label_view
from voxelstem.engine.loader import Loader, LoaderConfig
from voxelstem.sources.brain import BrainConfig, brain_subject
from voxelstem.store import Store, write
from voxelstem.store.subjects import pseudonym
from voxelstem.views.pair import PairConfig


@pytest.mark.parametrize(
    "place",
    [
        [[0, 0, 0], [128, 160, 128]],
        [[21, 33, 40], [50, 61, 42]],
        [[71, 94, 40], [-50, -61, 42]],
        [[-30, 100, 90], [100, 100, 100]],
        [[500, 0, 0], [60, 60, 60]],
    ],
)
def test_labels_lie_where_the_view_lies_mirrored_as_it_is_and_empty_beyond_the_scan(labelled, place):
    record = next(iter(labelled))
    found = label_view(labelled, record.key, np.array(place, np.float32), (7, 6, 9))
    wanted = naive(labelled.labels(record.key).array, place, (7, 6, 9), EDGE)
    assert (found == wanted).all()


def test_a_view_on_the_scan_s_own_grid_shows_the_label_map_itself(labelled):
    record = next(iter(labelled))
    place = np.array([[0, 0, 0], [16 * EDGE, 20 * EDGE, 16 * EDGE]], np.float32)
    assert (label_view(labelled, record.key, place, (16, 20, 16)) == labelled.labels(record.key).array).all()


@pytest.mark.parametrize("made", ["worker", "device"])
def test_a_class_that_is_left_out_is_flagged_in_every_view_and_nothing_else_changes(labelled, made):
    def loader(left_out):
        views, config = replace(VIEWS, left_out=left_out), LoaderConfig(batch=3, made=made)
        return Loader(labelled, [record.key for record in labelled], SPEC, views=views, config=config, seed=1)

    batch, plain = (loader(left_out).batch(1) for left_out in ("white_matter", ""))
    assert plain.views.keys() == {"global"}
    assert batch.views["global"].equal(plain.views["global"])
    assert batch.places_mm.keys() == {"global"}
    flags = batch.views["counted:global"]
    for row in range(3):
        record, _ = loader("").plan(1, row)
        labels = labelled.labels(record.key)
        (value,) = (value for value, name in labels.classes.items() if name == "white_matter")
        for view in range(2):
            place = batch.places_mm["global"][row, view].numpy()
            wanted = naive(labels.array, place, (8, 8, 8), EDGE) != value
            assert not wanted.all()
            assert (flags[row, view, 0].numpy() == wanted).all()


def test_scans_without_the_class_or_without_labels_count_whole(labelled):
    record = next(iter(labelled))
    place = np.array([[[0, 0, 0], [64, 64, 64]]], np.float32)
    assert count_flags(labelled, record, place, (8, 8, 8), "removed").all()
    assert count_flags(labelled, replace(record, classes={}), place, (8, 8, 8), "white_matter").all()


def test_the_second_scan_of_a_pair_has_flags_of_its_own(tmp_path):
    store = Store.create(tmp_path / "store")
    for study in brain_subject(0, sessions=2, contrasts=("T1w",), like=BrainConfig(seed=0, shape_ijk=(16, 20, 16))):
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32))))
    pair = PairConfig(same_session=0.0, other_session=1.0)
    views = replace(VIEWS, global_=replace(WHOLE, count=1), pair=pair, left_out="ventricles")
    loader = Loader(store, [one.key for one in store], SPEC, views=views, config=LoaderConfig(batch=2), seed=0)
    batch = loader.batch(0)
    for row in range(2):
        record, _ = loader.plan(0, row)
        (other,) = (one for one in store if one.key != record.key)
        for name, shown in (("global", record), ("other", other)):
            place = batch.places_mm[name][row].numpy()
            wanted = count_flags(store, shown, place, (8, 8, 8), "ventricles")
            assert (batch.views[f"counted:{name}"][row].numpy() == wanted).all()
    assert not batch.views["counted:global"].equal(batch.views["counted:other"])


def test_damaged_labels_of_a_second_scan_are_blamed_on_it(tmp_path):
    store = Store.create(tmp_path / "store")
    for study in brain_subject(0, sessions=3, contrasts=("T1w",), like=BrainConfig(seed=0, shape_ijk=(16, 20, 16))):
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32))))
    records = list(store)
    bad = records[0]
    (path,) = (store.path / "labels").rglob(f"{bad.label_key}*")
    path.write_bytes(path.read_bytes()[:40])
    pair = PairConfig(same_session=0.0, other_session=1.0)
    views = replace(VIEWS, global_=replace(WHOLE, count=1), pair=pair, left_out="ventricles")
    config = LoaderConfig(batch=2, max_bad_share=0.4)
    loader = Loader(store, [one.key for one in records], SPEC, views=views, config=config, seed=0)
    for step in range(4):
        loader.batch(step)
    assert loader.quarantined == {bad.key}
