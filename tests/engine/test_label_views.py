from __future__ import annotations

from dataclasses import replace

import pytest
from tests.heads import EDGE, SPEC, VIEWS, drawn, naive

from voxelstem.engine.label_views import LABELS, follow, with_labels
from voxelstem.engine.loader import Loader, LoaderConfig
from voxelstem.errors import StoreError
from voxelstem.store import Store, write
from voxelstem.store.subjects import pseudonym


def loader_of(store, views=VIEWS):
    keys = [record.key for record in store]
    return Loader(store, keys, SPEC, views=views, config=LoaderConfig(batch=3), seed=1)


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
