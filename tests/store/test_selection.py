from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.store import Store, Wanted, Writer, write
from voxelstem.store.catalogue import Catalogue
from voxelstem.store.encoding import encode_study
from voxelstem.study import Acquisition, Report


@pytest.fixture(scope="module")
def store(make, tmp_path_factory):
    """Twelve volumes of three people: two thicknesses of each acquisition, some labelled, some with a report."""
    store = Store.create(tmp_path_factory.mktemp("store"))
    people = [f"s{number:024x}" for number in range(3)]
    studies = []
    for number in range(12):
        said = Acquisition(
            group=f"g{number // 2}" if number < 10 else "",
            contrast=("T1w", "FLAIR", "")[number % 3],
            session=str(number % 2),
            age_years=None if number == 0 else 40.0 + number,
        )
        volume = make.volume(
            np.random.default_rng(number).integers(0, 9, (1, 4, 5, 6 - number % 2)),
            modality="MR" if number % 4 else "CT",
        )
        thick = np.diag([1.0, 1.0, 1.0 + 2 * (number % 2), 1.0])
        volume = dataclasses.replace(volume, acquisition=said, affine_ras=thick)
        if number == 3:
            volume = dataclasses.replace(
                volume, labels=dataclasses.replace(make.mask(), array=np.ones((4, 5, 5), np.int16))
            )
        report = Report(rest_text="clear") if number % 5 == 0 else None
        studies.append(encode_study(make.study(volume, subject=people[number % 3], report=report)))
    with Writer(store.path) as writer:
        for study in studies:
            writer.add(study)
    store.refresh()
    return store


wants = st.builds(
    Wanted,
    split=st.sampled_from(["any", "train", "validation", "test"]),
    modality=st.sampled_from(["", "CT", "MR"]),
    contrast=st.sampled_from(["", "T1w", "FLAIR"]),
    session=st.sampled_from(["", "0", "1"]),
    max_spacing_mm=st.sampled_from([math.inf, 2.0, 0.5]),
    min_voxels=st.sampled_from([0, 101, 120]),
    labelled=st.booleans(),
    reported=st.booleans(),
    one_per_group=st.booleans(),
)


def fits(record, wanted):
    return (
        wanted.split in ("any", record.split)
        and wanted.modality in ("", record.modality)
        and wanted.contrast in ("", record.acquisition.contrast)
        and wanted.session in ("", record.acquisition.session)
        and max(record.spacing_mm) <= wanted.max_spacing_mm
        and math.prod(record.shape_ijk) >= wanted.min_voxels
        and (record.has_labels or not wanted.labelled)
        and (record.report is not None or not wanted.reported)
    )


@given(wants)
def test_what_is_selected_is_what_a_loop_over_records_finds(store, wanted):
    found = [record for record in store if fits(record, wanted)]
    if wanted.one_per_group:
        best = {}
        for record in found:
            rank = (max(record.spacing_mm), -math.prod(record.shape_ijk), record.key)
            best[record.group] = min(best.get(record.group, (rank, record)), (rank, record), key=lambda pair: pair[0])
        found = sorted((record for _, record in best.values()), key=lambda record: record.key)
    assert store.select(wanted).key.tolist() == [record.key for record in found]


def test_columns_say_what_records_say(store):
    columns = store.select()
    assert len(columns) == 12
    for at, record in enumerate(store):
        assert (columns.key[at], columns.subject[at], columns.split[at]) == (record.key, record.subject, record.split)
        assert (columns.group[at], columns.bytes[at]) == (record.group, record.bytes)
        assert (tuple(columns.shape_ijk[at]), tuple(columns.spacing_mm[at])) == (record.shape_ijk, record.spacing_mm)
        assert columns.labelled[at] == record.has_labels
        age = record.acquisition.age_years
        assert columns.age_years[at] == age or (age is None and math.isnan(columns.age_years[at]))


def test_near_copies_count_once(store):
    columns = store.select()
    assert (columns.acquisitions(), columns.subjects()) == (7, 3)
    best = store.select(Wanted(one_per_group=True))
    assert len(best) == best.acquisitions() == 7
    assert (best.spacing_mm.max(axis=1) > 1).sum() == 1, "the thin one stands for both; one thick one has no twin"


def test_some_of_a_selection_can_be_taken_by_mask_or_place(store):
    columns = store.select()
    assert columns.take(columns.modality == "CT").key.tolist() == store.select(Wanted(modality="CT")).key.tolist()
    assert columns.take(np.array([2, 0])).key.tolist() == [columns.key[2], columns.key[0]]


def test_nothing_wanted_is_an_empty_selection(store):
    empty = store.select(Wanted(contrast="PET", one_per_group=True))
    assert (len(empty), empty.shape_ijk.shape, empty.acquisitions()) == (0, (0, 3), 0)


@pytest.mark.parametrize("bad", [{"max_spacing_mm": 0.0}, {"max_spacing_mm": math.nan}, {"min_voxels": -1}])
def test_impossible_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        Wanted(**bad)


def test_an_open_store_sees_what_it_saw_also_in_another_process(make, tmp_path):
    store = Store.create(tmp_path)
    (first,) = write(store, make.study())
    with Writer(tmp_path) as writer:
        (later,) = writer.add(encode_study(make.study(make.volume(seed=1))))
    for seen in (store, pickle.loads(pickle.dumps(store))):
        assert len(seen) == 1
        assert [record.key for record in seen] == seen.select().key.tolist() == [first]
        with pytest.raises(Exception, match="holds no volume"):
            seen.record(later)
    store.refresh()
    assert len(store) == len(store.select()) == 2


def test_duplicates_are_volumes_with_equal_voxels(make, tmp_path):
    store = Store.create(tmp_path)
    volume = make.volume()
    moved = dataclasses.replace(volume, affine_ras=np.diag([1.0, 1.5, 2.0, 1.0]))
    keys = write(store, make.study(volume, moved, make.volume(seed=2)))
    assert store.duplicates() == (tuple(sorted(keys[:2])),)
    assert store.select().acquisitions() == 2, "copies without an acquisition are known by their voxels"


def test_a_volume_keeps_its_number_when_more_is_said_of_it(make, tmp_path):
    store = Store.create(tmp_path)
    write(store, make.study())
    with Catalogue.read(tmp_path) as catalogue:
        before = catalogue.last()
    write(store, make.study(report=Report(rest_text="clear")))
    with Catalogue.read(tmp_path) as catalogue:
        assert catalogue.last() == before


def test_rounding_in_an_affine_takes_no_volume_out(make, tmp_path):
    store = Store.create(tmp_path)
    for seed, thick in enumerate((5.000000000000001, 5.0, 5.001)):
        volume = dataclasses.replace(make.volume(seed=seed), affine_ras=np.diag([1.0, 1.0, thick, 1.0]))
        write(store, make.study(volume))
    found = store.select(Wanted(max_spacing_mm=5.0))
    assert len(found) == 2
    assert found.spacing_mm.max() < 5.001
