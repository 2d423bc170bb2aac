from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from voxelstem.engine.label_views import LABELS, count_flags, follow, label_view, with_labels
from voxelstem.engine.loader import Loader, LoaderConfig
from voxelstem.errors import StoreError
from voxelstem.sources.brain import BrainConfig, brain, brain_subject
from voxelstem.store import Store, write
from voxelstem.store.subjects import pseudonym
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind
from voxelstem.views.multicrop import ViewsConfig
from voxelstem.views.pair import PairConfig

EDGE = 8.0
SPEC = InputSpec(modality="MR", spacing_mm=(EDGE,) * 3, low_hu=0.0, high_hu=1000.0, block_ijk=(8, 8, 8))
WHOLE = ViewKind(size_ijk=(8, 8, 8), count=2)
VIEWS = ViewsConfig(global_=WHOLE, local=replace(WHOLE, count=0), augment=AugmentConfig(flip_axes=(0, 2)))


def drawn(seed, **settings):
    return brain(BrainConfig(seed=seed, shape_ijk=(16, 20, 16), spacing_mm=(EDGE,) * 3, **settings))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("labelled") / "store")
    for seed in range(3):
        study = drawn(seed)
        write(store, replace(study, subject=pseudonym(study.subject, bytes(32))))
    return store


def loader_of(store, views=VIEWS):
    keys = [record.key for record in store]
    return Loader(store, keys, SPEC, views=views, config=LoaderConfig(batch=3), seed=1)


def naive(labels, place, size, edge):
    """One voxel after another: the value in whose cell its middle lies."""
    found = np.zeros(size, np.int16)
    for at in np.ndindex(*size):
        middle = [place[0][axis] + (at[axis] + 0.5) * place[1][axis] / size[axis] for axis in range(3)]
        index = [int(np.floor(middle[axis] / edge)) for axis in range(3)]
        if all(0 <= index[axis] < labels.shape[axis] for axis in range(3)):
            found[at] = labels[tuple(index)]
    return found


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


def test_every_batch_gets_the_label_maps_of_its_own_views(labelled):
    loader = loader_of(labelled)
    plain = list(loader.batches(0, 3))
    for step, (batch, before) in enumerate(zip(follow(loader, loader.batches(0, 3), 0), plain, strict=True)):
        assert batch.views["global"].equal(before.views["global"])
        labels = batch.views[LABELS]
        assert labels.shape == batch.views["global"].shape
        for row in range(3):
            record, _ = loader.plan(step, row)
            truth = labelled.labels(record.key).array
            for view in range(2):
                place = batch.places_mm["global"][row, view].numpy()
                assert (labels[row, view, 0].numpy() == naive(truth, place, (8, 8, 8), EDGE)).all()
        # What is air in the label map is dark, and what is brain is bright: they lie on the same place.
        inside, views = labels > 3, batch.views["global"]
        assert views[inside].mean() > 2 * views[labels == 0].mean()


def test_a_share_of_a_batch_gets_its_own_label_maps(labelled):
    loader = loader_of(labelled)
    batch = loader.batch(1)
    whole, part = with_labels(loader, batch, 1), with_labels(loader, batch.part(2, 3), 1)
    assert part.views[LABELS].equal(whole.views[LABELS][2:])


def test_a_scan_without_labels_is_refused_by_its_key(tmp_path):
    store = Store.create(tmp_path / "store")
    for seed in range(3):
        study = drawn(seed)
        bare = replace(study.volumes[0], labels=None)
        write(store, replace(study, volumes=(bare,), subject=pseudonym(study.subject, bytes(32))))
    loader = loader_of(store)
    with pytest.raises(StoreError, match="has no voxel labels, and the objective learns from them"):
        next(follow(loader, loader.batches(0, 1), 0))


def test_labels_of_another_scan_are_never_laid_under_a_view(labelled):
    loader = loader_of(labelled)
    batch = loader.batch(0)
    with pytest.raises(StoreError, match="is of another scan"):
        with_labels(loader, batch, 1)


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
