from __future__ import annotations

import importlib
import multiprocessing
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import blosc2
import numpy as np
import pytest
import torch

from voxelstem.engine.loader import Loader, LoaderConfig
from voxelstem.engine.transfer import Crops
from voxelstem.errors import ConfigError, StoreError
from voxelstem.protocols import Batch
from voxelstem.store import Store, reader, write
from voxelstem.store.reader import file_path
from voxelstem.store.tiles import write_all
from voxelstem.study import InputSpec, Study
from voxelstem.views.augment import AugmentConfig
from voxelstem.views.crop import ViewKind
from voxelstem.views.multicrop import ViewsConfig

SPEC = InputSpec(spacing_mm=(6.0, 6.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(8, 8, 8))
VIEWS = ViewsConfig(
    global_=ViewKind(count=2, size_ijk=(8, 8, 8), min_scale=0.8, max_scale=1.2),
    local=ViewKind(count=3, size_ijk=(4, 4, 4), min_scale=0.8, max_scale=1.2),
    augment=AugmentConfig(noise_std=0.1, gamma=0.1, shift=0.1),
    region_scale=1.5,
)


def keys(store: Store) -> list[str]:
    return [record.key for record in store]


def loader(
    store: Store, *, views: ViewsConfig = VIEWS, batch: int = 3, threads: int = 1, seed: int = 0, each: int = 2
) -> Loader:
    config = LoaderConfig(batch=batch, threads=threads, ahead=3, samples_per_open=each)
    return Loader(store, keys(store), SPEC, views=views, config=config, seed=seed)


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
    turned = Loader(phantoms, keys(phantoms)[::-1], SPEC, views=VIEWS, config=config, seed=0)
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


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"threads": 0},
        {"ahead": 0},
        {"samples_per_open": 0},
        {"workers": -1},
        {"timeout_s": 0.0},
        {"max_bad_share": 1.5},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoaderConfig(**wrong)


def drawn(source: Loader, steps: range, samples: int) -> list[str]:
    return [source.plan(step, index)[0].key for step in steps for index in range(samples)]


@pytest.mark.parametrize("each", [1, 2, 3])
def test_an_epoch_takes_every_scan_once_for_each_sample_of_an_opening(phantoms: Store, each: int):
    source = loader(phantoms, batch=4, each=each)
    everyone = sorted(record.key for record in phantoms)
    for step in range(4 * each):
        assert sorted(drawn(source, range(step, step + 1), 4)) == everyone
    orders = {tuple(drawn(source, range(row * each, row * each + 1), 4)) for row in range(8)}
    assert len(orders) > 1, "another epoch has another order"
    for row in range(8):
        rows = {tuple(drawn(source, range(step, step + 1), 4)) for step in range(row * each, (row + 1) * each)}
        assert len(rows) == 1, "steps that share their openings have the same scans"


def test_the_samples_of_one_opening_differ(phantoms: Store):
    source = loader(phantoms, each=3)
    places = {source.plan(step, 0)[1]["global"][0].start_mm for step in range(3)}
    assert len(places) == 3


@pytest.mark.parametrize("each", [1, 2, 3])
def test_each_scan_is_opened_once_for_all_samples_of_an_opening(
    phantoms: Store, monkeypatch: pytest.MonkeyPatch, each: int
):
    opened: list[str] = []
    real = blosc2.open

    def counting(path: str, **how: Any) -> Any:
        opened.append(Path(path).stem)
        return real(path, **how)

    monkeypatch.setattr(blosc2, "open", counting)
    monkeypatch.setattr(reader, "MAX_OPEN_FILES", 1)  # of which a large store's rows find none open
    source = loader(Store.open(phantoms.path), batch=4, each=each)
    assert len(list(source.batches(0, 6))) == 6
    assert len(opened) <= 24 / each
    assert len(opened) >= 24 / each - 6, "two rows may end and begin with the same scan"


@pytest.mark.parametrize(
    ("world", "workers", "ranks"), [(2, 0, (0, 1)), (4, 0, (0, 1, 2, 3)), (1, 1, (0,)), (2, 2, (1,))]
)
def test_processes_and_workers_change_nothing(phantoms: Store, world: int, workers: int, ranks: tuple[int, ...]):
    whole = [loader(phantoms, batch=4).batch(step) for step in range(1, 6)]
    for rank in ranks:
        config = LoaderConfig(batch=4, ahead=3, workers=workers)
        part = Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=config, seed=0, rank=rank, world=world)
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        for batch, want in zip(part.batches(1, 6), whole, strict=True):
            assert all(torch.equal(batch.views[name], want.views[name][mine]) for name in want.views)
            assert all(torch.equal(batch.places_mm[name], want.places_mm[name][mine]) for name in want.places_mm)


@pytest.mark.parametrize("normalisation", ["zscore", "unit99"])
def test_brains_are_the_same_bits_whoever_measures_them(brains: Store, normalisation: Any):
    write_all(brains)
    spec = InputSpec(modality="MR", spacing_mm=SPEC.spacing_mm, block_ijk=(8, 8, 8), normalisation=normalisation)
    views = replace(VIEWS, augment=AugmentConfig(flip_axes=(0,)))

    def batches(start: int = 0, **how: Any) -> list[bytes]:
        config = LoaderConfig(batch=4, ahead=3, **how)
        source = Loader(brains, keys(brains), spec, views=views, config=config, seed=0)
        return [content(batch) for batch in source.batches(start, 6)]

    whole = batches()
    assert len(set(whole)) == 6
    assert batches(threads=3) == batches(source="tiles") == batches(made="device") == whole
    assert batches(3) == whole[3:], "a run that resumes has measured nothing yet"
    if normalisation == "zscore":
        assert batches(workers=1) == whole


def test_a_brain_that_cannot_be_normalised_is_put_aside_with_the_reason(brains: Store, tmp_path: Path):
    copytree(brains.path, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    good = brains.volume(min(keys(brains)))
    tissue = good.array > 300 * good.array.max() / 4000
    scored = np.where(tissue, (good.array - good.array[tissue].mean()) / good.array[tissue].std(), 0)
    subject = next(iter(store)).subject
    (bad,) = write(store, Study(subject=subject, volumes=(replace(good, array=scored.astype(np.float32)),)))
    store.refresh()
    spec = InputSpec(modality="MR", spacing_mm=SPEC.spacing_mm, block_ijk=(8, 8, 8), normalisation="unit99")
    source = Loader(store, keys(store), spec, views=VIEWS, config=LoaderConfig(batch=4), seed=0)
    for step in range(5):
        source.batch(step)
    (note,) = [note for note in source.notes() if "quarantined" in note]
    assert note["quarantined"] == bad[:16]
    assert "z-scored over tissue alone" in note["reason"]
    assert note["code"] == "z-scored"


def test_where_values_are_at_fault_the_disk_is_not_blamed(brains: Store, tmp_path: Path):
    """A window for raw values, and a store of scans that were z-scored before."""
    store = Store.create(tmp_path / "store")
    for record in brains:
        raw = brains.volume(record.key)
        scored = replace(raw, array=((raw.array - raw.array.mean()) / raw.array.std()).astype(np.float32))
        write(store, Study(subject=record.subject, volumes=(scored,)))
    spec = InputSpec(modality="MR", spacing_mm=SPEC.spacing_mm, block_ijk=(8, 8, 8), low_hu=0.0, high_hu=2000.0)
    config = LoaderConfig(batch=2)
    source = Loader(store, keys(store), spec, views=VIEWS, config=config, seed=0)
    with pytest.raises(StoreError, match=r"scans cannot be used; the last one: .*look z-scored") as caught:
        list(source.batches(0, 4))
    assert "disk" not in caught.value.hint
    assert "normalised" in caught.value.hint
    only = Loader(store, keys(store)[:1], spec, views=VIEWS, config=replace(config, repeat=True), seed=0)
    with pytest.raises(StoreError, match="no scan to train on can be read") as alone:
        only.batch(0)
    assert alone.value.hint == caught.value.hint


def test_processes_draw_for_their_samples_what_one_process_draws_for_all(phantoms: Store):
    config = LoaderConfig(batch=4)
    parts = [
        Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=config, seed=0, rank=rank, world=2)
        for rank in (0, 1)
    ]
    alone = Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=config, seed=0)
    drawn = torch.cat([part.batch(0).chance.uniform(3) for part in parts])
    assert torch.equal(drawn, alone.batch(0).chance.uniform(3))
    assert not torch.equal(drawn, alone.batch(1).chance.uniform(3))


def test_a_batch_that_cannot_be_shared_out_is_refused(phantoms: Store):
    with pytest.raises(ConfigError, match="multiple of the 2 processes, got 3"):
        Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=LoaderConfig(batch=3), seed=0, rank=0, world=2)


@pytest.fixture
def damaged(phantoms: Store, tmp_path: Path) -> tuple[Store, str]:
    """A copy of the store of which one scan's file is cut short, and that scan's key."""
    copytree(phantoms.path, tmp_path / "store")
    key = sorted(record.key for record in phantoms)[1]
    path = file_path(tmp_path / "store", "volumes", key)
    path.write_bytes(path.read_bytes()[:-100])
    return Store.open(tmp_path / "store"), key


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_that_cannot_be_read_is_quarantined_by_name_and_the_next_one_stands_in(
    damaged: tuple[Store, str], phantoms: Store, workers: int
):
    store, bad = damaged
    config = LoaderConfig(batch=4, workers=workers)
    source = Loader(store, keys(store), SPEC, views=VIEWS, config=config, seed=0)
    seen = [content(batch) for batch in source.batches(0, 6)]
    start, *notes = source.notes()
    assert start == {"reader": "blosc2 mmap"}
    assert [note["quarantined"] for note in notes] == [bad[:16]], "once, however often its turn comes"
    assert "damaged" in notes[0]["reason"]
    assert source.notes() == []
    told = Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=LoaderConfig(batch=4), seed=0)
    told.quarantine([bad[:16]])
    assert [content(batch) for batch in told.batches(0, 6)] == seen, "whoever knows it from the start sees the same"
    assert [content(told.batch(step)) for step in range(6)] == seen
    whole = loader(phantoms, batch=4)
    for step in range(6):
        before, after = drawn(whole, range(step, step + 1), 4), drawn(told, range(step, step + 1), 4)
        assert [key for key in after if key == bad] == []
        assert [old == new for old, new in zip(before, after, strict=True)] == [key != bad for key in before]


def test_scans_that_are_well_stay_bit_by_bit_as_they_were(damaged: tuple[Store, str], phantoms: Store):
    store, bad = damaged
    source = loader(store, batch=4)
    for step, batch in enumerate(source.batches(0, 4)):
        want = loader(phantoms, batch=4).batch(step)
        for index, key in enumerate(drawn(loader(phantoms, batch=4), range(step, step + 1), 4)):
            same = torch.equal(batch.views["global"][index], want.views["global"][index])
            assert same == (key != bad)


def test_what_was_read_ahead_of_a_scan_put_aside_is_not_used(phantoms: Store, monkeypatch: pytest.MonkeyPatch):
    bad, real = sorted(keys(phantoms))[1], Crops.read

    def read(self: Crops, key: str, start: tuple[int, int, int], size: tuple[int, int, int]) -> torch.Tensor:
        if key == bad and start[0] <= 8:
            raise StoreError("one corner of the file is damaged")
        return real(self, key, start, size)

    monkeypatch.setattr(Crops, "read", read)

    def seen(ahead: int, start: int = 0, known: tuple[str, ...] = ()) -> tuple[list[bytes], list[tuple[str, ...]]]:
        config = LoaderConfig(batch=2, ahead=ahead, samples_per_open=1)
        source = Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=config, seed=0)
        source.quarantine(known)
        both = [(content(batch), tuple(source.quarantined)) for batch in source.batches(start, 16)]
        return [batch for batch, _ in both], [aside for _, aside in both]

    batches, aside = seen(1)
    assert not aside[0]
    assert aside[-1] == (bad,)
    assert seen(8)[0] == batches, "however far ahead it reads"
    met = next(step for step, known in enumerate(aside) if known)
    assert seen(8, met + 1, aside[met])[0] == batches[met + 1 :], "wherever it resumes"


def test_only_what_a_checkpoint_knew_is_left_out(damaged: tuple[Store, str]):
    store, bad = damaged
    source = loader(store, batch=4)
    source.batch(0)
    assert source.quarantined == {bad}
    source.quarantine([])
    assert source.quarantined == set()
    assert [note for note in source.notes() if "quarantined" in note] == []


def test_when_many_scans_cannot_be_read_the_disk_is_to_blame(damaged: tuple[Store, str]):
    store, _ = damaged
    for record in list(store)[1:3]:
        file_path(store.path, "volumes", record.key).unlink()
    with pytest.raises(StoreError, match="2 of 4 scans cannot be read") as caught:
        list(loader(store, batch=4).batches(0, 2))
    assert "disk" in caught.value.hint


def test_a_store_in_quarantine_altogether_is_an_error_and_no_endless_search(phantoms: Store):
    source = loader(phantoms)
    source.quarantine(record.key for record in phantoms)
    with pytest.raises(StoreError, match="no scan to train on can be read"):
        source.batch(0)


DEADLY = """
import os, signal, time
from voxelstem.store import Store, reader
from voxelstem.store.reader import file_path
from voxelstem.store.tiles import write_all

class Deadly(Store):
    def crop(self, key, start_ijk, size_ijk):
        if key.startswith("{die}"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if key.startswith("{hang}"):
            time.sleep(600)
        return super().crop(key, start_ijk, size_ijk)
"""


def test_a_scan_that_kills_or_stalls_its_worker_costs_itself_and_not_the_run(
    phantoms: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    die, hang, *_ = sorted(record.key for record in phantoms)
    (tmp_path / "deadly.py").write_text(DEADLY.replace("{die}", die).replace("{hang}", hang))
    monkeypatch.syspath_prepend(str(tmp_path))
    store = importlib.import_module("deadly").Deadly.open(phantoms.path)
    config = LoaderConfig(batch=4, workers=2, timeout_s=1.0, max_bad_share=0.5)
    source = Loader(store, keys(store), SPEC, views=VIEWS, config=config, seed=0)
    seen = [content(batch) for batch in source.batches(0, 2)]
    notes = {note["quarantined"]: note["reason"] for note in source.notes() if "quarantined" in note}
    assert notes.keys() == {die[:16], hang[:16]}
    assert "died, twice (signal 11" in notes[die[:16]]
    assert "did not finish within 1 seconds, twice" in notes[hang[:16]]
    told = loader(phantoms, batch=4)
    told.quarantine([die, hang])
    assert [content(batch) for batch in told.batches(0, 2)] == seen


def test_leaving_early_stops_the_readers(phantoms: Store):
    before = len(multiprocessing.active_children())
    config = LoaderConfig(batch=4, workers=1)
    with closing(Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=config, seed=0).batches(0, 100)) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == before + 1
    assert len(multiprocessing.active_children()) == before


def test_the_speed_counts_what_was_read(phantoms: Store):
    source = loader(phantoms)
    assert set(source.speed().values()) == {0.0}
    source.batch(0)
    once = source.speed()["read_gb"]
    source.batch(0)
    assert source.speed()["read_gb"] == 2 * once > 0
    assert source.speed()["read_gb_per_s"] > 0


def test_the_wait_for_data_is_counted_and_set_against_the_time_that_passed(phantoms: Store):
    source = loader(phantoms, batch=1)
    busy = 0.0
    for batch in source.batches(0, 4):
        assert len(batch) == 1
        began = time.perf_counter()
        while time.perf_counter() - began < 0.05:
            pass
        busy += time.perf_counter() - began
    wait, share = source.speed()["data_wait_s"], source.speed()["data_wait_share"]
    assert share == pytest.approx(wait / (wait + busy), rel=0.1)
    # With nothing prepared ahead, whoever trains waits for the reading itself.
    slow = Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=LoaderConfig(batch=4, ahead=1), seed=0)
    assert len(list(slow.batches(0, 6))) == 6
    assert slow.speed()["data_wait_share"] > 0.8


def test_names_are_those_of_the_scans_that_a_step_reads(phantoms: Store):
    whole = loader(phantoms, batch=4)
    for step in range(3):
        names = [key[:16] for key in drawn(whole, range(step, step + 1), 4)]
        assert whole.names(step) == names
        for rank in (0, 1):
            config = LoaderConfig(batch=4)
            part = Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=config, seed=0, rank=rank, world=2)
            assert part.names(step) == names[2 * rank : 2 * rank + 2]


def test_fewer_scans_than_samples_are_refused_unless_they_may_repeat(phantoms: Store):
    def source(**how: Any) -> Loader:
        return Loader(phantoms, keys(phantoms), SPEC, views=VIEWS, config=LoaderConfig(batch=6, **how), seed=0)

    with pytest.raises(StoreError, match="a batch of 6 samples needs as many scans, and there are 4") as caught:
        source()
    assert "loader.batch=4 or less" in caught.value.hint
    assert "loader.repeat=true" in caught.value.hint
    names = source(repeat=True).names(0)
    assert len(names) == 6
    assert len(set(names)) == 4
    batch = source(repeat=True).batch(0)
    assert len({view.numpy().tobytes() for view in batch.views["global"]}) == 6, "each time another part of the scan"


def test_the_device_that_trains_makes_what_the_workers_make(phantoms: Store):
    strong = AugmentConfig(
        flip_axes=(0, 1, 2), noise_std=0.1, gamma=0.1, shift=0.1, smooth_p=0.4, sharpen_p=0.4, sharpen_amount=(1.0, 2.0)
    )
    views = replace(VIEWS, augment=strong)
    whole = loader(phantoms, views=views)
    config = LoaderConfig(batch=3, ahead=3, workers=1, made="device")
    source = Loader(phantoms, keys(phantoms), SPEC, views=views, config=config, seed=0)
    made = [source.batch(0), *source.batches(1, 3, device=torch.device("cpu"))]
    for step, batch in enumerate(made):
        want = whole.batch(step)
        assert (batch.seed, batch.first) == (want.seed, want.first)
        for name, views in want.views.items():
            assert torch.equal(batch.places_mm[name], want.places_mm[name])
            torch.testing.assert_close(batch.views[name], views, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_voxels_that_are_no_numbers_cost_their_scan_and_not_the_run(phantoms: Store, tmp_path: Path):
    copytree(phantoms.path, tmp_path / "store")
    bad = sorted(record.key for record in phantoms)[2]
    (catalogue,) = (path for path in (tmp_path / "store").iterdir() if path.suffix in {".sqlite", ".db", ".sqlite3"})
    with closing(sqlite3.connect(catalogue)) as damaged, damaged:
        assert damaged.execute("UPDATE volumes SET slope = 9e999 WHERE key = ?", (bad,)).rowcount == 1
    store = Store.open(tmp_path / "store")
    source = loader(store, batch=4)
    seen = [content(batch) for batch in source.batches(0, 4)]
    notes = {note["quarantined"]: note["reason"] for note in source.notes() if "quarantined" in note}
    assert notes.keys() == {bad[:16]}
    assert "not numbers" in notes[bad[:16]]
    told = loader(phantoms, batch=4)
    told.quarantine([bad])
    assert [content(batch) for batch in told.batches(0, 4)] == seen


def test_raw_tiles_give_the_same_batches_and_say_so(phantoms: Store, tmp_path: Path):
    copytree(phantoms.path, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    tiled = LoaderConfig(batch=3, ahead=3, source="tiles")
    with pytest.raises(StoreError, match="cannot be read"):
        Loader(store, keys(store), SPEC, views=VIEWS, config=tiled, seed=0).batch(0)
    write_all(store)
    source = Loader(store, keys(store), SPEC, views=VIEWS, config=tiled, seed=0)
    plain = Loader(store, keys(store), SPEC, views=VIEWS, config=LoaderConfig(batch=3, ahead=3), seed=0)
    assert content(source.batch(0)) == content(plain.batch(0))
    (note,) = source.notes()
    assert note["reader"] == "preadv"
    assert "gds" in " ".join(note)
    by_workers = LoaderConfig(batch=3, ahead=3, source="tiles", workers=1)
    apart = Loader(store, keys(store), SPEC, views=VIEWS, config=by_workers, seed=0)
    with closing(apart.batches(0, 2)) as batches:
        assert [content(batch) for batch in batches] == [content(plain.batch(step)) for step in range(2)]
