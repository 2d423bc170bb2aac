from __future__ import annotations

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import blosc2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.errors import StoreError
from voxelstem.store.reader import Store, file_path
from voxelstem.store.writer import write

SHAPE = (20, 17, 9)


@pytest.fixture(scope="module")
def filled(make, tmp_path_factory):
    """A store of three volumes: whole HU with labels, fractional HU of two channels, a larger one of many blocks."""
    store = Store.create(tmp_path_factory.mktemp("store"))
    rng = np.random.default_rng(1)
    labelled = make.volume(labels=make.mask())
    fractional = make.volume(rng.normal(size=(2, *SHAPE)) * 300)
    large = make.volume(rng.integers(-1000, 1000, size=(1, 150, 40, 70)))
    keys = [write(store, make.study(each))[0] for each in (labelled, fractional, large)]
    return store, keys


def test_a_file_with_other_numbers_than_int16_is_damaged_and_not_read_as_if_it_were(make, tmp_path):
    (key,) = write(Store.create(tmp_path), make.study(make.volume()))
    path = file_path(tmp_path, "volumes", key)
    shape = (1, *Store.open(tmp_path).record(key).shape_ijk)
    other = blosc2.asarray(np.ones(shape, np.uint16), chunks=shape, blocks=shape).to_cframe()
    path.write_bytes(other)
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as catalogue:
        catalogue.execute("update volumes set bytes = ?", (len(other),))
    catalogue.close()
    with pytest.raises(StoreError, match="header does not say"):
        Store.open(tmp_path).crop(key, (0, 0, 0), (1, 1, 1))


@given(data=st.data())
def test_a_crop_equals_the_slice_of_the_whole(filled, data):
    store, keys = filled
    key = data.draw(st.sampled_from(keys))
    shape = store.record(key).shape_ijk
    start = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
    size = tuple(data.draw(st.integers(1, extent - at)) for at, extent in zip(start, shape, strict=True))
    box = tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))
    crop = store.crop(key, start, size)
    assert crop.dtype == np.float32
    np.testing.assert_array_equal(crop, store.volume(key).array[(slice(None), *box)])
    if store.record(key).has_labels:
        np.testing.assert_array_equal(store.label_crop(key, start, size), store.labels(key).array[box])


def test_several_crops_are_the_same_as_one_by_one_also_in_memory_that_is_given(filled):
    store, keys = filled
    rng = np.random.default_rng(0)
    for key in keys:
        record = store.record(key)
        starts = [tuple(int(at) for at in rng.integers(0, np.subtract(record.shape_ijk, 7))) for _ in range(5)]
        room = np.full((5, record.channels, 8, 8, 16), np.nan, np.float32)[..., ::2]
        assert store.crops(key, starts, (8, 8, 8), out=room) is room
        np.testing.assert_array_equal(room, store.crops(key, starts, (8, 8, 8)))
        np.testing.assert_array_equal(room, [store.crop(key, start, (8, 8, 8)) for start in starts])


def test_no_crops_are_an_empty_array(filled):
    store, (key, *_) = filled
    assert store.crops(key, [], (2, 3, 4)).shape == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("room", [np.empty((1, 1, 2, 2, 3), np.float32), np.empty((1, 1, 2, 2, 2), np.float64)])
def test_memory_that_does_not_fit_is_refused(filled, room):
    store, (key, *_) = filled
    with pytest.raises(ValueError, match="out must be float32"):
        store.crops(key, [(0, 0, 0)], (2, 2, 2), out=room)


@pytest.mark.parametrize(
    ("start", "size", "said"),
    [
        ((0, 0, 0), (0, 1, 1), "at least one voxel"),
        ((0, 0, 0), (-3, 1, 1), "at least one voxel"),
        ((-1, 0, 0), (2, 2, 2), "leaves the volume"),
        ((0, 0, 0), (21, 1, 1), r"leaves the volume of shape \(20, 17, 9\)"),
        ((19, 16, 8), (1, 1, 2), "leaves the volume"),
    ],
)
def test_a_box_outside_or_empty_is_refused(filled, start, size, said):
    store, (key, *_) = filled
    with pytest.raises(StoreError, match=said):
        store.crop(key, start, size)
    with pytest.raises(StoreError, match=said):
        store.label_crop(key, start, size)


def test_labels_come_back_with_their_names_or_not_at_all(filled, make):
    store, (labelled, bare, _) = filled
    labels = store.volume(labelled).labels
    np.testing.assert_array_equal(labels.array, make.mask().array)
    assert labels.classes == {1: "liver", 2: "spleen"}
    assert store.labels(bare) is None
    with pytest.raises(StoreError, match="no voxel labels"):
        store.label_crop(bare, (0, 0, 0), (1, 1, 1))


def test_an_unknown_key_is_a_clear_error(filled):
    with pytest.raises(StoreError, match="no volume 'abc'"):
        filled[0].crop("abc", (0, 0, 0), (1, 1, 1))


def test_records_come_in_the_order_of_keys(filled):
    store, keys = filled
    assert [record.key for record in store] == sorted(keys)
    assert len(store) == 3


def test_no_store_is_a_clear_error(tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        Store.open(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_not_made_among_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(StoreError, match="holds other files"):
        Store.create(tmp_path)
    with pytest.raises(StoreError, match="no store can be made"):
        Store.create(tmp_path / "thesis.txt" / "store")


def test_a_store_travels_to_another_process(filled):
    store, (key, *_) = filled
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.volume(key).array, store.volume(key).array)


def test_threads_read_crops_at_once(filled):
    store, keys = filled
    key = keys[2]
    whole = store.volume(key).array
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            start = [int(rng.integers(0, extent - 8)) for extent in whole.shape[1:]]
            box = tuple(slice(at, at + 8) for at in start)
            if not np.array_equal(store.crop(key, tuple(start), (8, 8, 8)), whole[(slice(None), *box)]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_more_files_than_may_stay_open_can_be_read(make, tmp_path, monkeypatch):
    monkeypatch.setattr("voxelstem.store.reader.MAX_OPEN_FILES", 2)
    store = Store.create(tmp_path)
    keys = [write(store, make.study(make.volume(seed=seed)))[0] for seed in range(4)]
    for seed, key in [*enumerate(keys), *enumerate(keys)]:
        np.testing.assert_array_equal(store.volume(key).array, make.volume(seed=seed).array)


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_file_is_found_and_coming_by_again_heals_it(make, tmp_path, damage):
    store = Store.create(tmp_path)
    study = make.study(make.volume(labels=make.mask()))
    (key,) = write(store, study)
    path = file_path(tmp_path, "volumes", key)
    healthy = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(healthy) // 2
        flipped = healthy[:middle] + bytes([healthy[middle] ^ 0x10]) + healthy[middle + 1 :]
        path.write_bytes(healthy[:middle] if damage == "cut" else flipped)
    with pytest.raises(StoreError, match="damaged"):
        Store.open(tmp_path).check(key)
    write(Store.open(tmp_path), study)
    Store.open(tmp_path).check(key)
    assert path.read_bytes() == healthy


def test_a_read_only_folder_can_be_read(make):
    # Not tmp_path, whose parents only their owner may enter.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        read_as_somebody_without_rights(make, Path(folder) / "store")


def read_as_somebody_without_rights(make, root):
    (key,) = write(Store.create(root), make.study())
    # Rights do not bind root, so the reader is another user where the tests run as root.
    code = (
        "import os, sys\n"
        "from voxelstem.store import Store\n"
        "os.getuid() == 0 and os.setuid(65534)\n"
        "store = Store.open('.')\n"
        f"print(len(store), store.crop('{key}', (0, 0, 0), (2, 2, 2)).shape, os.access('.', os.W_OK))\n"
    )
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert answer.stdout.strip() == "1 (1, 2, 2, 2) False"


@pytest.mark.parametrize("name", ["../../etc/passwd", "ab", "AB" * 32, "ab" * 32 + "\n"])
def test_no_name_leads_out_of_the_store(tmp_path, name):
    with pytest.raises(StoreError, match="no digest"):
        file_path(tmp_path, "labels", name)


@pytest.mark.parametrize("part", ["header", "trailer"])
def test_a_flipped_bit_of_a_header_is_found_or_changes_nothing(make, tmp_path, part):
    """Each byte in a process's own fork, because a lie that gets through may ask for petabytes or read for ever."""
    (key,) = write(Store.create(tmp_path), make.study())
    path = file_path(tmp_path, "volumes", key)
    healthy = path.read_bytes()
    places = range(0, 180, 3) if part == "header" else range(len(healthy) - 90, len(healthy), 3)
    found = 0
    for at in places:
        path.write_bytes(healthy[:at] + bytes([healthy[at] ^ (1 << at % 8)]) + healthy[at + 1 :])
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            try:
                Store.open(tmp_path).check(key)
                os._exit(0)
            except StoreError:
                os._exit(3)
            except BaseException:
                os._exit(1)
        end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert end in (0, 3), f"byte {at}"
        found += end == 3
    assert found
