from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.errors import StoreError
from voxelstem.store import Store, tiles, write
from voxelstem.store.reader import file_path
from voxelstem.store.tiles import ALIGNMENT, Tiles, pack_tiles, tiles_path, write_all, write_tiles

NAME = "ab" * 32
SHAPE = (20, 17, 9)
SMALL = (16, 16, 8)
"""A tile of 4 KiB, so that small volumes have several."""


@pytest.fixture
def store(tmp_path: Path, make: Any) -> Store:
    store = Store.create(tmp_path / "store")
    shifted = make.volume(np.random.default_rng(1).integers(30000, 60000, (1, *SHAPE)))
    fraction = make.volume(np.random.default_rng(2).uniform(0, 1, (2, *SHAPE)), modality="MR")
    write(store, make.study(make.volume(labels=make.mask()), shifted, fraction))
    return store


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    return np.random.default_rng(0).integers(-2000, 2000, (2, 40, 33, 19)).astype(np.int16)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, stored: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("tiles") / f"{NAME}.tiles"
    path.write_bytes(pack_tiles(stored, name=NAME, slope=0.5, intercept=3.0, tile_ijk=SMALL))
    return path


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_crop_is_that_part_of_the_array(path: Path, stored: np.ndarray, data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(0, size - 1)) for size in stored.shape[1:])
    size = tuple(data.draw(st.integers(1, end - at)) for at, end in zip(start, stored.shape[1:], strict=True))
    with Tiles.open(path) as opened:
        got = opened.stored(start, size)
        values = opened.crop(start, size)
    expected = stored[(slice(None), *(slice(at, at + n) for at, n in zip(start, size, strict=True)))]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(values, expected.astype(np.float32) * np.float32(0.5) + np.float32(3.0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_ranges_alone_are_enough_to_put_a_crop_together(
    path: Path, stored: np.ndarray, data: st.DataObject
) -> None:
    start = tuple(data.draw(st.integers(0, size - 1)) for size in stored.shape[1:])
    size = tuple(data.draw(st.integers(1, end - at)) for at, end in zip(start, stored.shape[1:], strict=True))
    content = path.read_bytes()
    crop = np.full((2, *size), 9999, np.int16)
    with Tiles.open(path) as opened:
        ranges = opened.ranges(start, size)
        assert [tile.offset for tile in ranges] == sorted({tile.offset for tile in ranges})
        for tile in ranges:
            assert tile.offset % ALIGNMENT == tile.nbytes % ALIGNMENT == 0
            part = content[tile.offset : tile.offset + tile.nbytes]
            opened.check_tile(tile.index, part)
            crop[tile.in_crop] = np.frombuffer(part, "<i2").reshape(1, *SMALL)[tile.in_tile]
    box = (slice(None), *(slice(at, at + n) for at, n in zip(start, size, strict=True)))
    np.testing.assert_array_equal(crop, stored[box])


def test_every_volume_of_a_store_reads_the_same_from_tiles_bit_for_bit(store: Store) -> None:
    write_all(store)
    for record in store:
        with Tiles.open(tiles_path(store.path, record.key)) as opened:
            for start, size in (((0, 0, 0), SHAPE), ((3, 2, 1), (9, 11, 5))):
                np.testing.assert_array_equal(opened.crop(start, size), store.crop(record.key, start, size))
            opened.check()


def test_voxel_labels_have_tiles_too(store: Store) -> None:
    record = next(record for record in store if record.has_labels)
    assert write_tiles(store, record.key) == [
        tiles_path(store.path, record.key),
        tiles_path(store.path, record.label_key),
    ]
    with Tiles.open(tiles_path(store.path, record.label_key)) as opened:
        np.testing.assert_array_equal(
            opened.stored((1, 2, 3), (5, 6, 4))[0], store.label_crop(record.key, (1, 2, 3), (5, 6, 4))
        )


def test_they_lie_beside_the_volumes_under_the_same_name(store: Store) -> None:
    record = next(iter(store))
    assert tiles_path(store.path, record.key) == store.path / "tiles" / record.key[:2] / f"{record.key}.tiles"


@pytest.mark.parametrize("name", ["../../x", "a" * 64 + "/x", "", "x" * 65536])
def test_a_name_that_is_no_digest_is_refused(store: Store, name: str) -> None:
    with pytest.raises(StoreError):
        tiles_path(store.path, name)


def test_writing_again_touches_nothing_that_is_whole_and_heals_what_is_cut(store: Store) -> None:
    told: list[int] = []

    class Counted:
        def __enter__(self) -> Any:
            return lambda amount=1, **_: told.append(amount)

        def __exit__(self, *_: object) -> None:
            pass

    total = write_all(store, show=lambda _title, _total: Counted())
    assert sum(told) == len(store)
    files = sorted((store.path / "tiles").rglob("*.tiles"))
    assert total == sum(file.stat().st_size for file in files)
    before = {file: file.stat().st_mtime_ns for file in files}
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-1])
    assert write_all(store) == total
    assert files[0].read_bytes() == whole
    assert {file: file.stat().st_mtime_ns for file in files[1:]} == {file: before[file] for file in files[1:]}


def test_a_damaged_volume_never_becomes_tiles(store: Store) -> None:
    record = next(iter(store))
    path = file_path(store.path, "volumes", record.key)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        write_tiles(Store.open(store.path), record.key)
    assert not tiles_path(store.path, record.key).exists()


def test_equal_voxels_give_equal_bytes(stored: np.ndarray) -> None:
    assert pack_tiles(stored, name=NAME) == pack_tiles(np.asfortranarray(stored), name=NAME)


def test_beyond_the_far_edge_the_padding_repeats_it(path: Path, stored: np.ndarray) -> None:
    with Tiles.open(path) as opened:
        last = opened.ranges((39, 32, 18), (1, 1, 1))[0]
    content = path.read_bytes()[last.offset : last.offset + last.nbytes]
    assert np.frombuffer(content, "<i2")[-1] == stored[0, -1, -1, -1]


@pytest.mark.parametrize(
    ("start", "size"),
    [((0, 0, 0), (0, 1, 1)), ((-1, 0, 0), (1, 1, 1)), ((0, 0, 0), (41, 1, 1)), ((0, 33, 0), (1, 1, 1))],
)
def test_a_box_that_is_empty_or_leaves_the_volume_is_refused(path: Path, start: Any, size: Any) -> None:
    with Tiles.open(path) as opened, pytest.raises(StoreError, match="empty or leaves"):
        opened.crop(start, size)


def test_a_flip_or_cut_anywhere_is_found_or_changes_nothing(tmp_path: Path, path: Path, stored: np.ndarray) -> None:
    rng = np.random.default_rng(7)
    content = path.read_bytes()
    header = len(content) - 2 * 3 * 3 * 3 * 4096
    found = harmless = 0
    for number in range(2000):
        data = bytearray(content)
        if number % 10 == 9:
            del data[int(rng.integers(0, len(data))) :]
        else:
            # Half of the flips go where the header is: it is small and everything hangs on it.
            data[int(rng.integers(0, header if number % 2 else len(data)))] ^= 1 << int(rng.integers(0, 8))
        damaged = tmp_path / f"{NAME}.tiles"
        damaged.write_bytes(data)
        try:
            with Tiles.open(damaged) as opened:
                np.testing.assert_array_equal(opened.stored((0, 0, 0), (40, 33, 19)), stored)
                assert (opened.layout.slope, opened.layout.intercept) == (0.5, 3.0)
            harmless += 1
        except StoreError:
            found += 1
    assert found + harmless == 2000
    assert found > 1000


def forged(content: bytes, **lies: Any) -> bytes:
    """The same file with a header that says something else, checksum and all."""
    _, version, length, _ = struct.unpack("<8sIII", content[:20])
    said = json.loads(content[20 : 20 + length]) | lies
    text = json.dumps(said).encode()
    head = struct.pack("<8sIII", b"voxtiles", version, len(text), zlib.crc32(text)) + text
    return head.ljust(-(-len(head) // 4096) * 4096, b"\0") + content[-(-(20 + length) // 4096) * 4096 :]


@pytest.mark.parametrize(
    "lies",
    [
        {"shape": [2, 40000, 33, 19]},
        {"shape": [2, 10**9, 10**9, 10**9]},
        {"shape": [2, 40, 33]},
        {"shape": [2, 40, -33, 19]},
        {"shape": [2, 40.5, 33, 19]},
        {"shape": "40"},
        {"tile_ijk": [0, 16, 8]},
        {"tile_ijk": [16, 16, 7]},
        {"tile_ijk": [10**6, 10**6, 10**6]},
        {"crc32": []},
        {"slope": "x"},
        {"slope": float("nan")},
        {"name": "../../etc"},
        {"name": None},
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_reserved(
    tmp_path: Path, path: Path, lies: dict[str, Any]
) -> None:
    liar = tmp_path / f"{NAME}.tiles"
    liar.write_bytes(forged(path.read_bytes(), **lies))
    with pytest.raises(StoreError, match="damaged"):
        Tiles.open(liar)


def test_a_header_forged_without_a_lie_is_read(tmp_path: Path, path: Path, stored: np.ndarray) -> None:
    same = tmp_path / f"{NAME}.tiles"
    same.write_bytes(forged(path.read_bytes()))
    with Tiles.open(same) as opened:
        np.testing.assert_array_equal(opened.stored((0, 0, 0), (40, 33, 19)), stored)


@pytest.mark.parametrize(
    ("start", "word"),
    [
        (b"", "begin"),
        (b"something else entirely, longer than a header", "begin"),
        (struct.pack("<8sIII", b"voxtiles", 2, 10, 0), "version"),
        (struct.pack("<8sIII", b"voxtiles", 1, 2**32 - 1, 0), "claims"),
        (struct.pack("<8sIII", b"voxtiles", 1, 3, 0) + b"[]]", "changed"),
        (struct.pack("<8sIII", b"voxtiles", 1, 2, zlib.crc32(b"[]")) + b"[]", "damaged"),
        (struct.pack("<8sIII", b"voxtiles", 1, 10**5, zlib.crc32(b"[" * 10**5)) + b"[" * 10**5, "damaged"),
    ],
)
def test_what_is_no_file_of_tiles_is_refused(tmp_path: Path, start: bytes, word: str) -> None:
    (tmp_path / "x.tiles").write_bytes(start)
    with pytest.raises(StoreError, match=word):
        Tiles.open(tmp_path / "x.tiles")


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        Tiles.open(tmp_path / "x.tiles")


def test_a_file_cut_under_an_open_reader_is_an_error_and_no_crash(tmp_path: Path, path: Path) -> None:
    copy = tmp_path / f"{NAME}.tiles"
    copy.write_bytes(path.read_bytes())
    with Tiles.open(copy) as opened:
        os.truncate(copy, 8192)
        with pytest.raises(StoreError, match="cut off"):
            opened.stored((0, 0, 0), (40, 33, 19))


def test_an_open_file_travels_to_another_process(path: Path, stored: np.ndarray) -> None:
    with Tiles.open(path) as opened:
        copy = pickle.loads(pickle.dumps(opened))
    with copy:
        np.testing.assert_array_equal(copy.stored((0, 0, 0), (40, 33, 19)), stored)


def test_a_tile_is_a_whole_number_of_pages(stored: np.ndarray) -> None:
    assert np.prod(tiles.TILE) * 2 % ALIGNMENT == 0
    with pytest.raises(ValueError, match="4096"):
        pack_tiles(stored, name=NAME, tile_ijk=(10, 10, 10))
