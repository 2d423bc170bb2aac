from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.store.encoding import body_box, encode, quantise
from voxelstem.store.reader import decode
from voxelstem.store.thumbnails import is_thumbnail


@given(order=st.permutations([0, 1, 2, 3]), flips=st.tuples(*[st.booleans()] * 4), whole=st.booleans())
def test_how_a_volume_lies_in_memory_makes_no_difference(make, order, flips, whole):
    rng = np.random.default_rng(0)
    array = rng.integers(-1000, 60, (2, 40, 7, 35)).astype(np.float32) * (1.0 if whole else 0.3)
    array[:, 3:, 2:4] = -1000
    turned = array.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)].copy()
    turned = turned[tuple(slice(None, None, -1 if flip else 1) for flip in flips)].transpose(np.argsort(order))
    np.testing.assert_array_equal(turned, array)
    one, two = encode(make.volume(array)), encode(make.volume(turned))
    assert (one.key, one.frame, one.body_start_ijk, one.body_size_ijk) == (
        two.key,
        two.frame,
        two.body_start_ijk,
        two.body_size_ijk,
    )


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 36), st.integers(0, 34)), max_size=4))
def test_the_body_box_is_the_one_that_all_dense_voxels_span(make, dense):
    array = np.full((1, 40, 37, 35), -1000.0)
    for place in dense:
        array[(0, *place)] = 40.0
    start, size = body_box(make.volume(array))
    low, high = (np.min(dense, axis=0), np.max(dense, axis=0)) if dense else ((0, 0, 0), (39, 36, 34))
    assert (start, size) == (tuple(low), tuple(np.subtract(high, low) + 1))


@pytest.mark.parametrize("order", ["C", "F"])
def test_encoding_needs_little_more_than_the_stored_numbers(make, order):
    array = np.zeros((1, 200, 200, 100), dtype=np.float32, order=order)
    array[:, 20:] = 40.0
    tracemalloc.start()
    quantise(array)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < array.nbytes / 2 * 1.5, "one copy in int16, and less than half of another"


def test_whole_numbers_that_need_a_shift_stay_exact_in_any_order_of_memory():
    array = np.asfortranarray(np.random.default_rng(0).integers(0, 60_000, (1, 70, 9, 40)).astype(np.float32))
    stored, slope, intercept, note = quantise(array)
    assert stored.flags.c_contiguous
    np.testing.assert_array_equal(decode(stored, slope, intercept), array)
    assert (slope, note) == (1.0, "")


def test_an_encoded_volume_carries_its_acquisition_and_a_thumbnail(make):
    volume = make.volume()
    volume = dataclasses.replace(volume, acquisition=dataclasses.replace(volume.acquisition, contrast="venous"))
    encoded = encode(volume)
    assert encoded.acquisition.contrast == "venous"
    assert is_thumbnail(encoded.thumbnail)
