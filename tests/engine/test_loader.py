from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from voxelstem.engine.loader import Loader, LoaderConfig, ViewsConfig
from voxelstem.errors import StoreError
from voxelstem.protocols import Batch
from voxelstem.store import Store
from voxelstem.study import InputSpec
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind

SPEC = InputSpec(spacing_mm=(6.0, 6.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(8, 8, 8))
VIEWS = ViewsConfig(
    global_=ViewKind(count=2, size_ijk=(8, 8, 8), min_scale=0.8, max_scale=1.2),
    local=ViewKind(count=3, size_ijk=(4, 4, 4), min_scale=0.8, max_scale=1.2),
    augment=AugmentConfig(noise_std=0.1, gamma=0.1, shift=0.1),
    region_scale=1.5,
)


@pytest.mark.parametrize(
    "wrong", [{"global_": ViewKind(count=0)}, {"region_scale": -1.0}, {"region_scale": 0.0}, {"overhang": -0.1}]
)
def test_views_that_cannot_be_drawn_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ViewsConfig(**wrong)


def loader(store: Store, *, views: ViewsConfig = VIEWS, batch: int = 3, threads: int = 1, seed: int = 0) -> Loader:
    config = LoaderConfig(batch=batch, threads=threads, ahead=3)
    return Loader(store, list(store), SPEC, views=views, config=config, seed=seed)


def content(batch: Batch) -> bytes:
    parts = [batch.views[name].numpy().tobytes() for name in sorted(batch.views)]
    places = [batch.places_mm[name].numpy().tobytes() for name in sorted(batch.places_mm)]
    return b"".join([*parts, *places, batch.seed.to_bytes(8, "big")])


def test_the_batch_of_a_step_does_not_depend_on_what_was_asked_before(phantoms: Store):
    forwards, backwards = loader(phantoms), loader(phantoms)
    there = {step: content(forwards.batch(step)) for step in (0, 1, 2, 3)}
    back = {step: content(backwards.batch(step)) for step in (3, 2, 1, 0)}
    assert there == back
    assert len(set(there.values())) == 4


def test_three_threads_give_the_same_bytes_in_the_same_order_as_one(phantoms: Store):
    one = [content(batch) for batch in loader(phantoms).batches(2, 9)]
    three = [content(batch) for batch in loader(phantoms, threads=3).batches(2, 9)]
    assert one == three == [content(loader(phantoms).batch(step)) for step in range(2, 9)]


def test_no_steps_left_gives_no_batches(phantoms: Store):
    assert list(loader(phantoms).batches(5, 5)) == []


def test_another_seed_gives_other_samples(phantoms: Store):
    assert content(loader(phantoms).batch(0)) != content(loader(phantoms, seed=1).batch(0))


def test_the_order_in_which_records_come_does_not_matter(phantoms: Store):
    config = LoaderConfig(batch=3)
    turned = Loader(phantoms, list(phantoms)[::-1], SPEC, views=VIEWS, config=config, seed=0)
    assert content(turned.batch(1)) == content(loader(phantoms).batch(1))


def test_shapes_are_sample_view_channel_ijk_and_values_lie_in_the_window(phantoms: Store):
    batch = loader(phantoms).batch(0)
    assert batch.views["global"].shape == (3, 2, 1, 8, 8, 8)
    assert batch.views["local"].shape == (3, 3, 1, 4, 4, 4)
    assert batch.places_mm["global"].shape == (3, 2, 2, 3)
    assert all(0 <= view.min() and view.max() <= 1 for view in batch.views.values())


def test_without_local_views_there_are_none(phantoms: Store):
    views = replace(VIEWS, local=replace(VIEWS.local, count=0))
    assert set(loader(phantoms, views=views).batch(0).views) == {"global"}


def test_all_views_of_a_sample_fit_into_one_region(phantoms: Store):
    edge_mm = np.array(VIEWS.global_.size_ijk) * SPEC.spacing_mm * VIEWS.region_scale
    for step in range(30):
        _, plans = loader(phantoms).plan(step, 0)
        views = [plan for kind in plans.values() for plan in kind]
        low = np.min([plan.start_mm for plan in views], axis=0)
        high = np.max([np.add(plan.start_mm, plan.extent_mm) for plan in views], axis=0)
        assert (high - low <= edge_mm + 1e-6).all()


@pytest.mark.parametrize("overhang", [0.0, 0.25])
def test_views_reach_past_the_body_by_the_overhang_and_no_further(phantoms: Store, overhang: float):
    source = loader(phantoms, views=replace(VIEWS, overhang=overhang))
    edge_mm = np.array(VIEWS.global_.size_ijk) * SPEC.spacing_mm * VIEWS.region_scale
    for step in range(30):
        record, plans = source.plan(step, 0)
        low = np.multiply(record.body_start_ijk, record.spacing_mm) - overhang * edge_mm
        high = low + np.multiply(record.body_size_ijk, record.spacing_mm) + 2 * overhang * edge_mm
        for plan in plans["global"] + plans["local"]:
            assert (np.array(plan.start_mm) >= low - 1e-6).all()
            assert (np.add(plan.start_mm, plan.extent_mm) <= high + 1e-6).all()


def test_every_scan_is_drawn(phantoms: Store):
    drawn = {loader(phantoms).plan(step, index)[0].key for step in range(20) for index in range(3)}
    assert drawn == {record.key for record in phantoms}


def test_the_voxel_in_a_view_is_the_scan_s_voxel_at_that_place(phantoms: Store):
    # At the scan's own spacing a view is a shifted copy, so linear interpolation can be done by hand.
    # Mirrored views count their place backwards; without overhang no voxel lies outside the scan.
    augment = AugmentConfig(flip_axes=(0, 2))
    views = ViewsConfig(global_=ViewKind(size_ijk=(8, 8, 8)), region_scale=1.25, overhang=0.0, augment=augment)
    source = loader(phantoms, views=views, batch=4)
    mirrored = 0
    for step in range(3):
        batch = source.batch(step)
        for index in range(4):
            record, _ = source.plan(step, index)
            scan = phantoms.volume(record.key).array[0].astype(np.float64)
            start_mm, extent_mm = batch.places_mm["global"][index, 0].double().numpy()
            for place in [(0, 0, 0), (7, 7, 7), (3, 5, 2)]:
                centre_mm = start_mm + (np.array(place) + 0.5) / 8 * extent_mm
                want = (interpolate(scan, centre_mm / record.spacing_mm - 0.5) + 200) / 500
                seen = float(batch.views["global"][(index, 0, 0, *place)])
                assert seen == pytest.approx(min(max(want, 0.0), 1.0), abs=2e-4)
                mirrored += bool((extent_mm < 0).any())
    assert mirrored


def interpolate(scan: np.ndarray, at: np.ndarray) -> float:
    low, total = np.floor(at).astype(int), 0.0
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod([share if up else 1 - share for up, share in zip(corner, at - low, strict=True)])
        total += weight * scan[tuple(np.clip(low + corner, 0, np.array(scan.shape) - 1))]
    return float(total)


def test_augmentation_is_replayed_too(phantoms: Store):
    plain = loader(phantoms, views=replace(VIEWS, augment=AugmentConfig())).batch(0)
    changed = loader(phantoms).batch(0)
    assert torch.equal(plain.places_mm["global"], changed.places_mm["global"])
    assert not torch.equal(plain.views["global"], changed.views["global"])


def test_no_scan_is_a_store_error(phantoms: Store):
    with pytest.raises(StoreError, match="no scan to train on"):
        Loader(phantoms, [], SPEC, views=VIEWS, config=LoaderConfig(), seed=0)


@pytest.mark.parametrize("name", ["batch", "threads", "ahead"])
def test_numbers_below_one_are_refused(name: str):
    with pytest.raises(ValueError, match=">= 1"):
        LoaderConfig(**{name: 0})
