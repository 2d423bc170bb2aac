"""The second format: raw tiles at 4 KiB boundaries, which a device can fetch without a processor unpacking them.

A `.tiles` file is a header and then tiles of one size in one order; nothing is compressed. Each tile begins at a
multiple of 4 KiB, as direct reads (`O_DIRECT`, GPUDirect Storage) ask for, and has a checksum of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any

import blosc2
import numpy as np
from jaxtyping import Float32, Int16

from voxelstem.errors import StoreError
from voxelstem.progress import Advance, progress
from voxelstem.store.reader import Store, decode, digest, file_path, files_of
from voxelstem.store.records import Triple
from voxelstem.store.writer import write_durably

TILE = (64, 64, 32)
"""Voxels of a tile along i, j and k: 256 KiB. Shorter along k, where voxels are longer."""
ALIGNMENT = 4096
VERSION = 1
MOST_HEADER_BYTES = 2**24
_START = struct.Struct("<8sIII")
_MAGIC = b"voxtiles"
_ITEM = np.dtype("<i2")
_AGAIN = "write the tiles again from the store: tiles.write_all"
_WRITTEN = ("volumes", "labels")
Box = tuple[slice, slice, slice, slice]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the header of a `.tiles` file says."""

    name: str
    """The digest that names the volume or label map in its store."""
    shape: tuple[int, int, int, int]
    """Voxels: channel, i, j, k. Tiles at the far edges are padded by repeating the edge."""
    tile_ijk: Triple
    slope: float
    """Value = stored number * slope + intercept."""
    intercept: float
    crc32: tuple[int, ...]
    """Of every tile, in their order: channel, i, j, k, the last fastest."""

    def __post_init__(self) -> None:
        """Refuse what no file of tiles can be.

        Raises:
            ValueError: a shape or a number without sense, or another number of checksums than of tiles.
        """
        sizes = (*self.shape, *self.tile_ijk)
        if len(self.shape) != 4 or len(self.tile_ijk) != 3 or not all(type(n) is int and n > 0 for n in sizes):  # noqa: PLR2004
            raise ValueError("shapes must be whole numbers above zero")
        if self.tile_bytes % ALIGNMENT or self.tile_bytes > MOST_HEADER_BYTES:
            raise ValueError(f"a tile takes a multiple of {ALIGNMENT} bytes")
        if len(self.crc32) != math.prod(self.grid):
            raise ValueError("there is not one checksum for each tile")
        if not all(type(n) is float and math.isfinite(n) for n in (self.slope, self.intercept)):
            raise ValueError("slope and intercept must be numbers")
        if not re.fullmatch(r"[0-9a-f]{64}", self.name):
            raise ValueError("the name is no digest")

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile."""
        return math.prod(self.tile_ijk) * _ITEM.itemsize

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Tiles along channel, i, j and k."""
        i, j, k = (-(-size // edge) for size, edge in zip(self.shape[1:], self.tile_ijk, strict=True))
        return self.shape[0], i, j, k


@dataclass(frozen=True, kw_only=True, slots=True)
class TileRange:
    """One tile that a box touches: where its bytes lie, and where its voxels go."""

    offset: int
    nbytes: int
    index: int
    """Which tile of the file it is."""
    in_tile: Box
    """The part of the tile (1, i, j, k) that lies in the box …"""
    in_crop: Box
    """… and where that goes in the crop (channel, i, j, k)."""


class Tiles:
    """An open `.tiles` file. Any number of threads may read from it."""

    def __init__(self, path: Path) -> None:
        """Read and check the header; `open` says it in words.

        Raises:
            StoreError: there is no such file, it is no file of tiles, or not whole.
        """
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            try:
                self.layout, self.first_byte = _read_header(self._file.fileno())
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise StoreError(f"the tiles '{path.stem[:16]}' cannot be read: {error.strerror}", hint=_AGAIN) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(f"the tiles '{path.stem[:16]}' are damaged: {error}", hint=_AGAIN) from error
        self._sound = bytearray(len(self.layout.crc32))

    @classmethod
    def open(cls, path: Path | str) -> Tiles:
        """Open a file of tiles; `with` closes it again.

        Raises:
            StoreError: there is no such file, it is no file of tiles, or not whole.
        """
        return cls(Path(path))

    def __enter__(self) -> Tiles:
        """Give itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __getstate__(self) -> Path:
        """Travel to another process as a path: an open file cannot."""
        return self.path

    def __setstate__(self, path: Path) -> None:
        """Open again on the other side."""
        self.__init__(path)

    @property
    def shape_ijk(self) -> Triple:
        """Voxels along R, A and S."""
        _, i, j, k = self.layout.shape
        return i, j, k

    def ranges(self, start_ijk: Triple, size_ijk: Triple) -> list[TileRange]:
        """List the tiles that a box touches, in the order in which they lie in the file.

        Raises:
            StoreError: the box is empty or leaves the volume.
        """
        layout = self.layout
        starts, sizes = tuple(map(index, start_ijk)), tuple(map(index, size_ijk))
        axes = list(zip(starts, sizes, layout.shape[1:], strict=True))
        if any(size < 1 or start < 0 or start + size > extent for start, size, extent in axes):
            raise StoreError(
                f"the crop from {starts} of size {sizes} is empty or leaves the volume of shape {self.shape_ijk}",
                hint="draw it inside, or pad the volume after reading",
            )
        touched = [
            range(start // edge, (start + size - 1) // edge + 1)
            for start, size, edge in zip(starts, sizes, layout.tile_ijk, strict=True)
        ]
        found: list[TileRange] = []
        for channel, *place in itertools.product(range(layout.shape[0]), *touched):
            number = int(np.ravel_multi_index((channel, *place), layout.grid))
            inner, outer = [slice(0, 1)], [slice(channel, channel + 1)]
            for at, start, size, edge in zip(place, starts, sizes, layout.tile_ijk, strict=True):
                low, high = max(start, at * edge), min(start + size, (at + 1) * edge)
                inner.append(slice(low - at * edge, high - at * edge))
                outer.append(slice(low - start, high - start))
            found.append(
                TileRange(
                    offset=self.first_byte + number * layout.tile_bytes,
                    nbytes=layout.tile_bytes,
                    index=number,
                    in_tile=(inner[0], inner[1], inner[2], inner[3]),
                    in_crop=(outer[0], outer[1], outer[2], outer[3]),
                )
            )
        return found

    def check_tile(self, number: int, data: bytes | memoryview) -> None:
        """Compare a tile's bytes with its checksum.

        Raises:
            StoreError: they differ.
        """
        if zlib.crc32(data) != self.layout.crc32[number]:
            raise StoreError(f"tile {number} of '{self.path.stem[:16]}' is damaged", hint=_AGAIN)

    def stored(self, start_ijk: Triple, size_ijk: Triple) -> Int16[np.ndarray, "channel i j k"]:
        """Read a box as the numbers that are stored; each tile's checksum is compared when it is first read.

        Raises:
            StoreError: the box is empty or leaves the volume, or a tile is damaged.
        """
        wanted = self.ranges(start_ijk, size_ijk)
        crop = np.empty((self.layout.shape[0], *map(index, size_ijk)), np.int16)
        buffer = np.empty((1, *self.layout.tile_ijk), _ITEM)
        data = buffer.data.cast("B")
        for tile in wanted:
            try:
                got = os.preadv(self._file.fileno(), [data], tile.offset)
            except OSError as error:
                raise StoreError(
                    f"tile {tile.index} of '{self.path.stem[:16]}' cannot be read: {error.strerror}", hint=_AGAIN
                ) from error
            if got != tile.nbytes:
                raise StoreError(f"the tiles '{self.path.stem[:16]}' are cut off", hint=_AGAIN)
            if not self._sound[tile.index]:
                self.check_tile(tile.index, data)
                self._sound[tile.index] = 1
            crop[tile.in_crop] = buffer[tile.in_tile]
        return crop

    def crop(self, start_ijk: Triple, size_ijk: Triple) -> Float32[np.ndarray, "channel i j k"]:
        """Read a box in HU or intensity: bit for bit what `Store.crop` gives.

        Raises:
            StoreError: as `stored`.
        """
        return decode(self.stored(start_ijk, size_ijk), self.layout.slope, self.layout.intercept)

    def check(self) -> None:
        """Read everything, and compare every checksum.

        Raises:
            StoreError: a tile is damaged.
        """
        self._sound = bytearray(len(self._sound))
        edge = self.layout.tile_ijk[0]
        for at in range(0, self.shape_ijk[0], edge):
            self.stored((at, 0, 0), (min(edge, self.shape_ijk[0] - at), *self.shape_ijk[1:]))


def _read_header(handle: int) -> tuple[Layout, int]:
    start = os.pread(handle, _START.size, 0)
    if len(start) != _START.size or start[: len(_MAGIC)] != _MAGIC:
        raise ValueError("it does not begin as a file of tiles")
    _, version, length, crc32 = _START.unpack(start)
    if version != VERSION:
        raise ValueError(f"its format is version {version}, this program reads {VERSION}")
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes")
    text = os.pread(handle, length, _START.size)
    if len(text) != length or zlib.crc32(text) != crc32:
        raise ValueError("its header is cut off or changed")
    said: dict[str, Any] = json.loads(text)
    layout = Layout(
        name=said["name"],
        shape=tuple(said["shape"]),  # pyright: ignore[reportArgumentType] - counted by Layout
        tile_ijk=tuple(said["tile_ijk"]),  # pyright: ignore[reportArgumentType]
        slope=said["slope"],
        intercept=said["intercept"],
        crc32=tuple(said["crc32"]),
    )
    first = _padded(_START.size + length)
    expected = first + len(layout.crc32) * layout.tile_bytes
    if (seen := os.fstat(handle).st_size) != expected:
        raise ValueError(f"it has {seen} of {expected} bytes")
    return layout, first


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def tiles_path(root: Path, name: str) -> Path:
    """Say where the tiles of a volume or label map lie in a store.

    Raises:
        StoreError: `name` is no digest.
    """
    return file_path(root, "tiles", name).with_suffix(".tiles")


def write_tiles(store: Store, key: str) -> list[Path]:
    """Write the tiles of a volume, and of its voxel labels if it has some, into the store; what is whole stays.

    Returns:
        Their files, the volume's first.

    Raises:
        StoreError: no such volume, its own file is damaged, or the disk is full.
    """
    record = store.record(key)
    paths: list[Path] = []
    for (kind, name), (size, slope, intercept, voxels) in files_of(record).items():
        if kind not in _WRITTEN or name not in (record.key, record.label_key):
            continue
        path = tiles_path(store.path, name)
        paths.append(path)
        if not _is_whole(path, name):
            stored = _stored(file_path(store.path, kind, name), size)
            if digest(stored, slope, intercept) != voxels:
                raise StoreError(f"the file of '{name[:16]}' is damaged: its voxels changed", hint="ingest it again")
            write_durably(path, pack_tiles(stored, name=name, slope=slope, intercept=intercept))
    return paths


Show = Callable[[str, int], AbstractContextManager[Advance]]


def write_all(store: Store, *, show: Show = progress) -> int:
    """Write the tiles of every volume of a store; run again, it goes on where it was stopped.

    Returns:
        How many bytes the tiles of this store take.

    Raises:
        StoreError: as `write_tiles`.
    """
    total = 0
    with show("tiles", len(store)) as advance:
        for record in store:
            total += sum(path.stat().st_size for path in write_tiles(store, record.key))
            advance(1)
    return total


def _is_whole(path: Path, name: str) -> bool:
    """Whether the file is there with a sound header and all its bytes; its tiles are checked when they are read."""
    try:
        with Tiles.open(path) as tiles:
            return tiles.layout.name == name
    except StoreError:
        return False


def _stored(path: Path, size: int) -> Int16[np.ndarray, "channel i j k"]:
    try:
        if (seen := path.stat().st_size) != size:
            raise ValueError(f"it has {seen} of {size} bytes")
        how: dict[str, Any] = {"mode": "r", "dparams": blosc2.DParams(nthreads=1)}
        opened: Any = blosc2.open(str(path), **how)
        return opened[...]
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"the file of '{path.stem[:16]}' is damaged: {error}", hint="ingest it again") from error


def pack_tiles(
    stored: Int16[np.ndarray, "channel i j k"],
    *,
    name: str,
    slope: float = 1.0,
    intercept: float = 0.0,
    tile_ijk: Triple = TILE,
) -> bytes:
    """Make the bytes of a `.tiles` file; equal input gives equal bytes.

    Raises:
        ValueError: the tile's bytes are no multiple of 4 KiB, or `name` is no digest.
    """
    pads = [(0, -size % edge) for size, edge in zip(stored.shape[1:], tile_ijk, strict=True)]
    # Not zeros: whoever looks a voxel too far sees the scan go on.
    full = np.pad(np.asarray(stored, _ITEM), [(0, 0), *pads], mode="edge")
    checks = [zlib.crc32(tile) for tile in _cut(full, tile_ijk)]
    channels, i, j, k = map(int, stored.shape)
    layout = Layout(
        name=name,
        shape=(channels, i, j, k),
        tile_ijk=tile_ijk,
        slope=float(slope),
        intercept=float(intercept),
        crc32=tuple(checks),
    )
    text = json.dumps(asdict(layout), sort_keys=True, separators=(",", ":")).encode()
    head = _START.pack(_MAGIC, VERSION, len(text), zlib.crc32(text)) + text
    return head.ljust(_padded(len(head)), b"\0") + b"".join(_cut(full, tile_ijk))


def _cut(full: Int16[np.ndarray, "channel i j k"], tile_ijk: Triple) -> Iterator[bytes]:
    step_i, step_j, step_k = tile_ijk
    channels, *sizes = full.shape
    corners = itertools.product(range(channels), *map(range, [0] * 3, sizes, tile_ijk))
    for channel, i, j, k in corners:
        yield full[channel, i : i + step_i, j : j + step_j, k : k + step_k].tobytes()
