from __future__ import annotations

import gzip
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.raster import Raster


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


def unpack(data, *, allowed=10**9, wbits=raster.GZIP):
    return raster.inflate(data, name="x", limit=lambda _: allowed, wbits=wbits)


def of(array, notes=()):
    return Raster(array=np.asarray(array), affine_ras=np.eye(4), source_format="nifti", sha256="0", notes=notes)


@settings(max_examples=30, deadline=None)
@given(data=st.binary(min_size=1, max_size=5000), level=st.integers(0, 9))
def test_unpacking_gives_back_what_was_packed(data, level):
    assert unpack(gzip.compress(data, level)) == data
    assert unpack(zlib.compress(data, level), wbits=raster.ZLIB) == data


def test_more_than_a_chunk_and_several_members_and_padding_unpack():
    data = np.random.default_rng(0).integers(0, 50, 3 * raster.CHUNK_BYTES, np.uint8).tobytes()
    cut = 2 * raster.CHUNK_BYTES + 7
    packed = gzip.compress(data[:cut], 1) + gzip.compress(data[cut:], 1) + bytes(100)
    assert unpack(packed) == data


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.05, 0.999))
def test_a_cut_file_is_never_accepted(share):
    packed = gzip.compress(np.random.default_rng(1).bytes(2000))
    with refused("corrupt"):
        unpack(packed[: int(len(packed) * share)])


@settings(max_examples=40, deadline=None)
@given(bit=st.integers(0, 8 * 1500 - 1))
def test_a_flipped_bit_in_the_data_or_trailer_is_never_accepted(bit):
    packed = bytearray(gzip.compress(np.random.default_rng(1).bytes(1500)))
    place = len(packed) - 1 - bit // 8  # the trailer and what comes before it, not the header's clock
    packed[place] ^= 1 << bit % 8
    with refused("corrupt"):
        unpack(bytes(packed))


def test_trailing_garbage_is_refused():
    with refused("corrupt"):
        unpack(gzip.compress(b"scan") + b"garbage")


def test_a_bomb_stops_at_the_declared_size():
    seen = []
    original = raster.CHUNK_BYTES
    bomb = gzip.compress(bytes(64 * original))
    with refused("corrupt") as caught:
        raster.inflate(bomb, name="x", limit=lambda start: seen.append(len(start)) or 1000, wbits=raster.GZIP)
    assert seen == [original]
    assert "more than the 1000 bytes" in caught.value.problem


def test_a_size_above_the_cap_is_refused_before_anything_is_reserved():
    with refused("too-large"):
        raster.check_size("x", (30_000, 30_000, 30_000), 2)
    with refused("corrupt"):
        raster.check_size("x", (10, -3, 10), 2)
    assert raster.check_size("x", (10, 3, 10), 2) == 600


@pytest.mark.parametrize("shape", [(8,), (8, 8), (8, 8, 1), (8, 8, 8, 2), (1, 8, 8), (8, 8, 8, 1, 3)])
def test_what_is_not_three_dimensional_is_refused(shape):
    with refused("not-3d"):
        raster.spatial_shape("x", shape)


def test_further_axes_of_length_one_are_dropped():
    assert raster.spatial_shape("x", (8, 7, 6, 1, 1)) == (8, 7, 6)


def test_air_makes_a_ct():
    scan = np.random.default_rng(0).normal(40, 20, (10, 10, 10))
    scan[:5] = -1000
    assert raster.tell_kind(scan)[0] == "CT"
    assert raster.tell_kind(scan - scan.min())[0] == "MR"


def test_a_little_air_and_bone_make_a_ct_too():
    scan = np.random.default_rng(0).normal(40, 20, (20, 20, 20))
    scan[0, 0, 0], scan[0, 0, 1] = -1000, 900
    assert raster.tell_kind(scan)[0] == "CT"


def test_a_phase_image_is_no_ct():
    phase = np.random.default_rng(0).integers(-4096, 4096, (10, 10, 10))
    phase[0, 0, 0] = -4096
    assert raster.tell_kind(phase)[0] == "MR"


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_even_regions_of_few_whole_numbers_are_a_label_map(dtype):
    mask = np.zeros((20, 20, 20), dtype)
    mask[5:15, 5:15, 5:15] = 3
    mask[8:12, 8:12, 8:12] = 40
    assert raster.tell_kind(mask)[0] == "label-map"


def test_an_eight_bit_picture_is_no_label_map():
    picture = np.random.default_rng(0).integers(0, 60, (20, 20, 20)).astype(np.uint8)
    assert raster.tell_kind(picture)[0] == "MR"


def test_a_scattered_binary_mask_is_still_a_label_map():
    mask = (np.random.default_rng(0).random((20, 20, 20)) < 0.05).astype(np.uint8)
    assert raster.tell_kind(mask)[0] == "label-map"


def test_scans_of_no_use_are_refused_with_their_reason():
    noise = np.random.default_rng(0).normal(size=(4, 4, 4))
    with refused("constant"):
        raster.to_study(of(np.full((4, 4, 4), 7)), name="x", subject="s")
    with refused("not-finite"):
        raster.to_study(of(np.where(noise > 1, np.nan, noise)), name="x", subject="s")


def test_rounding_to_float32_is_noted():
    array = np.arange(64, dtype=np.int64).reshape(4, 4, 4) * 2**24 + 1
    notes = raster.to_study(of(array), name="x", subject="s").volumes[0].provenance.notes
    assert "int64 rounded to float32" in notes
    exact = raster.to_study(of(array % 1000), name="x", subject="s").volumes[0].provenance.notes
    assert not any("rounded" in note for note in exact)


@pytest.mark.parametrize("bad", [0.5, -1, 40_000, np.nan])
def test_masks_hold_whole_class_numbers_only(bad):
    mask = np.zeros((4, 4, 4))
    mask[0, 0, 0] = bad
    with refused("not-labels"):
        raster.to_labels(of(mask), name="x")


def test_an_empty_mask_is_a_mask():
    assert not raster.to_labels(of(np.zeros((4, 4, 4), np.uint8)), name="x").array.any()
