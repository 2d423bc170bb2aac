from __future__ import annotations

import dataclasses
import errno
import os
from contextlib import suppress

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from voxelstem.errors import IngestError, StoreError, VoxelstemError
from voxelstem.store import writer
from voxelstem.store.catalogue import Refusal, dump
from voxelstem.store.encoding import encode, encode_study, quantise
from voxelstem.store.reader import Store, decode, file_path
from voxelstem.store.writer import Writer, write
from voxelstem.study import Report

CLEAR = Report(rest_text="clear")
SMALL = hnp.array_shapes(min_dims=4, max_dims=4, max_side=6)


@given(hnp.arrays(np.int16, SMALL))
def test_whole_numbers_in_range_are_stored_as_they_are(array):
    stored, slope, intercept, note = quantise(array.astype(np.float32))
    np.testing.assert_array_equal(stored, array)
    assert (slope, intercept, note) == (1.0, 0.0, "")


@given(hnp.arrays(np.uint16, SMALL), st.integers(-60_000, 10_000_000))
def test_whole_numbers_out_of_range_are_shifted_and_stay_exact(array, shift):
    values = (array.astype(np.float64) + shift).astype(np.float32)
    stored, slope, intercept, note = quantise(values)
    np.testing.assert_array_equal(decode(stored, slope, intercept), values)
    assert note == ""


finite = st.floats(-1e9, 1e9, width=32, allow_nan=False, allow_infinity=False)


@given(hnp.arrays(np.float32, SMALL, elements=finite))
def test_rounding_stays_below_what_the_note_says_and_below_a_step(array):
    stored, slope, intercept, note = quantise(array)
    error = np.abs(decode(stored, slope, intercept).astype(np.float64) - array).max()
    said = float(note.rsplit(" ", 1)[1]) if note else 0.0
    assert error <= said * (1 + 1e-5)
    float32_digit = np.spacing(np.float32(np.abs(array).max()))
    slope_digit = 2.0**-150 * 2**16  # a slope below float32's least step is off by half of it, at every number
    assert error <= slope / 2 + 3 * float32_digit + slope_digit


@settings(max_examples=25, deadline=None)  # each makes a store on disk
@given(array=hnp.arrays(np.float32, SMALL, elements=finite))
def test_a_volume_comes_back_from_disk(make, tmp_path_factory, array):
    store = Store.create(tmp_path_factory.mktemp("store"))
    volume = make.volume(array)
    (key,) = write(store, make.study(volume))
    again, record = store.volume(key), store.record(key)
    bound = float(record.provenance.notes[0].rsplit(" ", 1)[1]) if record.provenance.notes else 0.0
    assert np.abs(again.array.astype(np.float64) - array).max() <= bound * (1 + 1e-5)
    np.testing.assert_array_equal(again.affine_ras, volume.affine_ras)
    assert again.modality == "CT"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(make, bad):
    array = np.zeros((1, 3, 3, 3))
    array[0, 1, 1, 1] = bad
    with pytest.raises(IngestError, match="not finite") as caught:
        encode(make.volume(array))
    assert caught.value.code == "not-finite"


def test_the_layout_is_the_measured_one(make, tmp_path):
    store = Store.create(tmp_path)
    (key,) = write(store, make.study(make.volume(np.zeros((1, 200, 40, 70)))))
    array = blosc2.open(str(file_path(tmp_path, "volumes", key)))
    assert (array.dtype, array.chunks, array.blocks) == (np.int16, (1, 64, 40, 64), (1, 16, 32, 32))
    assert array.cparams.codec == blosc2.Codec.LZ4
    filters = {each for each in array.cparams.filters if each != blosc2.Filter.NOFILTER}
    assert filters == {blosc2.Filter.SHUFFLE}


def test_writing_again_repeats_every_byte(make, tmp_path):
    study = make.study(make.volume(labels=make.mask()), make.volume(np.full((1, 5, 5, 5), 0.3)))
    for name in ("one", "two"):
        write(Store.create(tmp_path / name), study)
    assert len(make.digests(tmp_path / "one")) == 3
    assert make.digests(tmp_path / "one") == make.digests(tmp_path / "two")
    assert dump(tmp_path / "one") == dump(tmp_path / "two")


def test_the_same_content_twice_is_one_entry(make, tmp_path):
    store = Store.create(tmp_path)
    first = write(store, make.study())
    before = make.digests(tmp_path), dump(tmp_path)
    assert write(store, make.study()) == first
    assert (make.digests(tmp_path), dump(tmp_path)) == before


def test_the_same_voxels_of_another_subject_are_refused_whatever_their_header_says(make, tmp_path):
    store = Store.create(tmp_path)
    volume = make.volume()
    write(store, make.study(volume))
    moved = dataclasses.replace(volume, affine_ras=np.diag([1.0, 1.5, 2.0, 1.0]))
    for copy in (volume, moved):
        with pytest.raises(IngestError, match="under another subject") as caught:
            write(store, make.study(make.volume(seed=9), copy, subject=make.bob))
        assert caught.value.code == "duplicate"
    assert store.subjects() == (make.alice,)
    assert len(make.digests(tmp_path)) == 1


def test_a_subjects_own_id_cannot_enter(make, tmp_path):
    store = Store.create(tmp_path)
    with pytest.raises(StoreError, match="subject's id would enter"):
        write(store, make.study(subject="Miller"))
    assert make.digests(tmp_path) == {}


def test_a_later_visit_adds_labels_and_report_and_takes_nothing_away(make, tmp_path):
    store = Store.create(tmp_path)
    (key,) = write(store, make.study())
    assert not store.record(key).has_labels
    write(store, make.study(make.volume(labels=make.mask()), report=CLEAR, labels={"lesion": "no"}))
    write(store, make.study())
    record = store.record(key)
    assert (record.report, record.labels, record.classes) == (CLEAR, {"lesion": "no"}, {1: "liver", 2: "spleen"})
    np.testing.assert_array_equal(store.labels(key).array, make.mask().array)
    write(store, make.study(make.volume(labels=make.mask(seed=1))))
    np.testing.assert_array_equal(store.labels(key).array, make.mask(seed=1).array)
    with Writer(tmp_path):
        pass
    assert len(make.digests(tmp_path)) == 2, "the labels that were replaced are swept away"


def test_native_labels_stay_with_the_labels_that_they_came_with(make, tmp_path):
    store = Store.create(tmp_path)
    fine = make.volume(seed=5, labels=make.mask(seed=4))

    def visit(labels=None, native=None):
        (study,) = [encode_study(make.study(make.volume(labels=labels)))]
        kept = dataclasses.replace(study.volumes[0], native=encode(native) if native else None)
        with Writer(tmp_path) as opened:
            (key,) = opened.add(dataclasses.replace(study, volumes=(kept,)))
        with Writer(tmp_path):  # sweeps what no row speaks of
            pass
        store.refresh()
        record = store.record(key)
        assert record.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.b2nd"))
        return store.native(key).labels

    np.testing.assert_array_equal(visit(make.mask(), fine).array, fine.labels.array)
    without = dataclasses.replace(fine, labels=None)
    for again in (visit(None, without), visit(), visit(make.mask())):
        assert again is not None
        np.testing.assert_array_equal(again.array, fine.labels.array)
    renamed = dataclasses.replace(make.mask(), classes={1: "spleen", 2: "liver"})
    assert visit(renamed) is None, "their numbers would be read with the new names"
    assert visit(renamed, fine).classes == renamed.classes
    assert visit(make.mask(seed=1)) is None
    assert visit(make.mask(seed=1), fine) is not None
    assert visit(None, make.volume(seed=6)) is None, "another native scan has another grid"


def test_what_the_catalogue_says_is_what_was_written(make, tmp_path):
    store = Store.create(tmp_path)
    array = np.full((1, 12, 10, 8), -1000.0)
    array[0, 2:5, 3:9, 7] = 40.0
    ct, mr = make.volume(array), make.volume(array, modality="MR")
    keys = write(store, make.study(ct, mr))
    first, second = (store.record(key) for key in keys)
    assert (first.body_start_ijk, first.body_size_ijk) == ((2, 3, 7), (3, 6, 1))
    assert (second.body_start_ijk, second.body_size_ijk) == ((0, 0, 0), (12, 10, 8))
    assert first.study == second.study
    assert first.subject == make.alice
    assert first.spacing_mm == pytest.approx((1.0, 1.5, 2.0))
    assert first.bytes == file_path(tmp_path, "volumes", keys[0]).stat().st_size
    assert first.provenance == ct.provenance
    assert store.subjects(first.split) == (make.alice,)


def test_a_ct_of_air_alone_has_its_whole_volume_as_body(make):
    encoded = encode(make.volume(np.full((1, 4, 5, 6), -1000.0)))
    assert (encoded.body_start_ijk, encoded.body_size_ijk) == ((0, 0, 0), (4, 5, 6))


def test_a_source_that_got_in_is_remembered_until_its_file_is_hurt(make, tmp_path):
    Store.create(tmp_path)
    with Writer(tmp_path) as opened:
        opened.refuse(Refusal(source="a", code="corrupt", reason="cut off"))
        (key,) = opened.add(encode_study(make.study()), source="a", fingerprint="1")
        assert opened.holds("a", "1")
        assert not opened.holds("a", "2")
        assert not opened.holds("b", "1")
        file_path(tmp_path, "volumes", key).write_bytes(b"")
        assert not opened.holds("a", "1")
    assert Store.open(tmp_path).refusals() == ()


class FaultyDisk:
    """Fails the n-th of the calls by which files get to disk: as a full disk does, or as a kill would."""

    def __init__(self, monkeypatch, at: int, error: BaseException) -> None:
        self.left, self.error = at, error
        for name in ("fsync", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *args, real=real: self.step(real, *args))

    def step(self, real, *args):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return real(*args)


class Killed(BaseException):
    """Nothing in the library catches this, as nothing survives SIGKILL."""


@pytest.fixture
def two(make):
    return [make.study(make.volume(labels=make.mask())), make.study(make.volume(seed=1), subject=make.bob)]


def add_all(root, studies):
    with Writer(root) as opened:
        for number, study in enumerate(studies):
            opened.add(encode_study(study), source=f"source {number}", fingerprint="1")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()], ids=["full", "killed"])
def test_failing_at_every_single_step_leaves_a_whole_store_that_a_rerun_completes(make, tmp_path, two, error):
    write_all = tmp_path / "straight"
    Store.create(write_all)
    add_all(write_all, two)
    failures = 0
    for at in range(1, 100):
        root = tmp_path / f"broken {at}"
        Store.create(root)
        with pytest.MonkeyPatch.context() as patch:
            disk = FaultyDisk(patch, at, error)
            with suppress(Killed, VoxelstemError):
                add_all(root, two)
        if disk.left > 0:
            break
        failures += 1
        store = Store.open(root)
        for record in store:
            store.check(record.key)
        add_all(root, two)
        assert make.digests(root) == make.digests(write_all)
        assert dump(root) == dump(write_all)
    assert failures >= 9, "three files, each with its own sync, rename and sync of the folder"


def test_a_kill_between_file_and_row_leaves_a_store_that_opens(make, tmp_path, two, monkeypatch):
    Store.create(tmp_path)
    real = writer.Catalogue.put

    def killed(*_):
        raise Killed

    monkeypatch.setattr(writer.Catalogue, "put", killed)
    with suppress(Killed):
        add_all(tmp_path, two)
    monkeypatch.setattr(writer.Catalogue, "put", real)
    assert len(make.digests(tmp_path)) == 2, "the files of the first study are there, and no row speaks of them"
    assert len(Store.open(tmp_path)) == 0
    with Writer(tmp_path):
        assert make.digests(tmp_path) == {}
    add_all(tmp_path, two)
    assert len(Store.open(tmp_path)) == 2


def test_a_full_disk_is_told_with_the_bytes_needed_and_nothing_stays_half_written(make, tmp_path, two, monkeypatch):
    Store.create(tmp_path)
    FaultyDisk(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    needed = len(encode(two[0].volumes[0]).frame)
    with pytest.raises(StoreError, match=f"the disk is full: the next scan needs {needed} bytes") as caught:
        add_all(tmp_path, two)
    assert str(tmp_path) in caught.value.problem
    assert make.digests(tmp_path) == {}


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "volumes").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        writer.write_durably(file_path(tmp_path, "volumes", "ab" * 32), b"frame")


def test_nobody_is_in_two_splits(make, tmp_path):
    store = Store.create(tmp_path)
    people = [f"s{number:024x}" for number in range(6)]
    for seed in range(12):
        write(store, make.study(make.volume(seed=seed), subject=people[seed % 6]))
    homes = {person: {record.split for record in store if record.subject == person} for person in people}
    assert all(len(splits) == 1 for splits in homes.values())
    assert sum(len(store.subjects(split)) for split in ("train", "validation", "test")) == 6
