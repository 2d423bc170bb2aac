"""From storage to a device: byte ranges of a file of tiles into a tensor, by the best way that works here.

Three ways, best first: GPUDirect Storage (the drive writes into the GPU's memory), `preadv` into pinned memory and a
copy on a side stream, and a memory map. `choose` tries them in this order and says which one it took and why not
the others; a way that would silently become another one is refused.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.store.reader import Store
from voxelstem.store.records import Triple
from voxelstem.store.tiles import ALIGNMENT, Tiles, tiles_path
from voxelstem.study import InputSpec
from voxelstem.views.intensity import Stats, limits, measure

Range = tuple[int, int]
"""Offset and number of bytes."""
SOURCES = ("blosc2", "tiles")
GDS_DRIVER = Path("/proc/driver/nvidia-fs")
"""There while the kernel's part of GPUDirect Storage is loaded; without it cuFile copies through the processor."""

MOST_MEASURED = 1 << 17
"""Volumes whose measures a process remembers, in 50 MB; the longest unused one is measured again."""


@dataclass(slots=True)
class Tally:
    """What a reader moved so far."""

    bytes: int = 0
    seconds: float = 0.0

    @property
    def gb_per_s(self) -> float:
        """Billion bytes a second; 0 before the first."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


class Reader(Protocol):
    """One way from a file to a device. A reader belongs to one thread."""

    name: str
    device: torch.device
    tally: Tally

    def read(self, path: Path, ranges: Sequence[Range]) -> UInt8[Tensor, " byte"]:
        """Read the ranges one after another into one tensor on the device, which has them all when this returns.

        Raises:
            StoreError: the file is missing, shorter than a range says, or cannot be read.
        """
        ...


class PreadReader:
    """`preadv` into aligned memory; for a GPU, into pinned memory and from there on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        """Read into the memory of `device`.

        Raises:
            ConfigError: it is a GPU that torch cannot see.
        """
        self.device, self.tally = device, Tally()
        self.name = "preadv" if device.type == "cpu" else "pinned preadv"
        self._stream: Any = None
        if device.type != "cpu":
            _check_gpu(device, self.name)
            self._stream = torch.cuda.Stream(device)

    def read(self, path: Path, ranges: Sequence[Range]) -> UInt8[Tensor, " byte"]:
        """As `Reader.read`."""
        began = time.perf_counter()
        runs = _runs(ranges)
        total = sum(size for _, size in runs)
        # Aligned memory, so that the system can move whole pages; allocated anew: a copy may still be under way.
        room = torch.empty(total + ALIGNMENT, dtype=torch.uint8, pin_memory=self._stream is not None)
        first = -room.data_ptr() % ALIGNMENT
        host = room[first : first + total]
        view: memoryview = host.numpy().data
        with _explained(path):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                at = 0
                for offset, size in runs:
                    _fill(handle, view[at : at + size], offset)
                    at += size
            finally:
                os.close(handle)
        result = host if self._stream is None else self._send(host)
        self.tally.bytes += total
        self.tally.seconds += time.perf_counter() - began
        return result

    def _send(self, host: Tensor) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            there = host.to(self.device, non_blocking=True)
        there.record_stream(current)
        # This thread waits for the copy; the stream on which the network computes does not.
        self._stream.synchronize()
        return there


class MapReader:
    """A memory map, from which the wanted bytes are copied: works everywhere."""

    name = "mmap"

    def __init__(self, device: torch.device) -> None:
        """Read into the memory of `device`.

        Raises:
            ConfigError: it is a GPU that torch cannot see.
        """
        self.device, self.tally = device, Tally()
        if device.type != "cpu":
            _check_gpu(device, self.name)

    def read(self, path: Path, ranges: Sequence[Range]) -> UInt8[Tensor, " byte"]:
        """As `Reader.read`."""
        began = time.perf_counter()
        runs = _runs(ranges)
        host = np.empty(sum(size for _, size in runs), np.uint8)
        with _explained(path), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            at = 0
            for offset, size in runs:
                # Touching a map past the file's end would end the process.
                if offset + size > len(whole):
                    raise _CutOffError
                host[at : at + size] = np.frombuffer(whole, np.uint8, size, offset)
                at += size
        result = torch.from_numpy(host).to(self.device)
        self.tally.bytes += host.size
        self.tally.seconds += time.perf_counter() - began
        return result


class GdsReader:
    """GPUDirect Storage, through `torch.cuda.gds`: past the processor and its memory."""

    name = "gds"

    def __init__(self, device: torch.device) -> None:
        """Read into the memory of `device`.

        Raises:
            ConfigError: torch, the GPU, the kernel's driver or the system is not made for it; the error says which.
        """
        self.device, self.tally = device, Tally()
        _check_gpu(device, self.name)
        if not GDS_DRIVER.exists():
            raise ConfigError(
                "gds: the kernel driver nvidia-fs is not loaded, so cuFile would copy through the processor",
                hint="load it (`modprobe nvidia-fs`), on a file system that GPUDirect Storage knows",
            )

    def read(self, path: Path, ranges: Sequence[Range]) -> UInt8[Tensor, " byte"]:
        """As `Reader.read`."""
        began = time.perf_counter()
        runs = _runs(ranges)
        if any(number % ALIGNMENT for run in runs for number in run):
            raise StoreError(f"gds reads whole pages of {ALIGNMENT} bytes only", hint="read files of tiles")
        with _explained(path):
            _check_length(path, runs)
            parts = [torch.empty(size, dtype=torch.uint8, device=self.device) for _, size in runs]
            try:
                file: Any = torch.cuda.gds.GdsFile(str(path), os.O_RDONLY)
                for part, (offset, _) in zip(parts, runs, strict=True):
                    file.load_storage(part.untyped_storage(), offset)
            except RuntimeError as error:
                raise StoreError("gds cannot read this file", hint=str(error).partition("\n")[0]) from error
        result = parts[0] if len(parts) == 1 else torch.cat(parts)
        torch.cuda.current_stream(self.device).synchronize()
        self.tally.bytes += sum(size for _, size in runs)
        self.tally.seconds += time.perf_counter() - began
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The way that is taken, and why better ones are not."""

    reader: Reader
    refused: dict[str, str] = field(default_factory=dict)

    def note(self) -> dict[str, str]:
        """Say it as a line of a run's journal."""
        return {"reader": self.reader.name} | {f"not {name}": reason for name, reason in self.refused.items()}


WAYS: tuple[Callable[[torch.device], Reader], ...] = (GdsReader, PreadReader, MapReader)


def choose(device: torch.device, probe: Path | None = None) -> Choice:
    """Take the best way that works: one that can be set up and, given a file to `probe`, reads its first page.

    Raises:
        ConfigError: none works; the error says why of each.
    """
    refused: dict[str, str] = {}
    for way in WAYS:
        try:
            reader = way(device)
            if probe is not None:
                _try(reader, probe)
        except (ConfigError, StoreError) as error:
            name = getattr(way, "name", "pinned preadv" if device.type == "cuda" else "preadv")
            refused[name] = f"{error.problem} ({error.hint})" if error.hint else error.problem
        else:
            return Choice(reader=reader, refused=refused)
    raise ConfigError("no way from storage to the device works: " + "; ".join(refused.values()), hint="set device=cpu")


def _try(reader: Reader, probe: Path) -> None:
    with _explained(probe), probe.open("rb") as file:
        page = file.read(ALIGNMENT)
    if len(page) < ALIGNMENT:
        raise ConfigError(f"{reader.name}: the file to try it on is shorter than a page", hint="name a file of tiles")
    if reader.read(probe, [(0, ALIGNMENT)]).cpu().numpy().tobytes() != page:
        raise ConfigError(f"{reader.name}: it reads other bytes than the processor does", hint="update its driver")
    reader.tally = Tally()


def read_crop(reader: Reader, tiles: Tiles, start_ijk: Triple, size_ijk: Triple) -> Float32[Tensor, "channel i j k"]:
    """Read a box of a file of tiles, put together and turned into HU or intensity on the reader's device.

    Bytes cross as int16, half of what floats take. Checksums of tiles are not compared: `Tiles.check` does that.

    Raises:
        StoreError: the box is empty or leaves the volume, or the file cannot be read.
    """
    layout, wanted = tiles.layout, tiles.ranges(start_ijk, size_ijk)
    data = reader.read(tiles.path, [(tile.offset, tile.nbytes) for tile in wanted])
    rows = data.view(torch.int16).view(len(wanted), 1, *layout.tile_ijk)
    crop = torch.empty((layout.shape[0], *size_ijk), dtype=torch.float32, device=reader.device)
    for row, tile in zip(rows, wanted, strict=True):
        crop[tile.in_crop] = row[tile.in_tile].to(torch.float32)
    # As `store.reader.decode`, step by step, so that both give the same bits.
    if layout.slope != 1.0:
        crop *= float(np.float32(layout.slope))
    if layout.intercept != 0.0:
        crop += float(np.float32(layout.intercept))
    return crop


class Crops:
    """Boxes of a store's volumes as tensors, from its compressed files or from its raw tiles. Any thread may ask."""

    def __init__(self, store: Store, source: str) -> None:
        """Choose between `blosc2` and `tiles`.

        Raises:
            ConfigError: `source` is neither.
        """
        if source not in SOURCES:
            raise ConfigError(f"crops are read from {' or '.join(SOURCES)}, got '{source}'")
        self.store, self.source = store, source
        self._mine = threading.local()
        self._measured: OrderedDict[str, Stats] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[Store, str]:
        """Travel to another process without open files."""
        return self.store, self.source

    def __setstate__(self, state: tuple[Store, str]) -> None:
        """Begin anew on the other side."""
        self.__init__(*state)

    def note(self) -> dict[str, str]:
        """What the run log says of the way that is taken."""
        return {"reader": "blosc2 mmap"} if self.source == "blosc2" else self._choice().note()

    def read(self, key: str, start_ijk: Triple, size_ijk: Triple) -> Float32[Tensor, "channel i j k"]:
        """Read a box in HU or intensity, the same bits from either source.

        Raises:
            StoreError: the file is missing or damaged, or the box leaves the volume.
        """
        if self.source == "blosc2":
            return torch.from_numpy(self.store.crop(key, start_ijk, size_ijk))
        try:
            tiles = Tiles.open(tiles_path(self.store.path, key))
        except StoreError as error:
            raise StoreError(error.problem, hint=f"`voxelstem export tiles --store {self.store.path.name}`") from error
        with tiles:
            return read_crop(self._choice().reader, tiles, start_ijk, size_ijk)

    def stats(self, key: str, spec: InputSpec) -> Stats | None:
        """What the spec's normalisation asks of the whole volume, which is read for it once; None where it is nothing.

        A window of HU asks nothing. One of values without a unit asks whether they were normalised before.

        Raises:
            StoreError: the volume cannot be read, or not be normalised so (with the `code` of the reason).
        """
        if not spec.per_volume and spec.modality == "CT":
            return None
        with self._lock:
            if key in self._measured:
                self._measured.move_to_end(key)
                return self._measured[key]
        record = self.store.record(key)
        if not spec.per_volume and record.channels > 1:
            return None
        i, j, k = record.shape_ijk
        try:
            found = measure(lambda low, high: self.read(key, (low, 0, 0), (high - low, j, k)).numpy(), i)
            limits(found, spec)
        except IngestError as error:
            raise StoreError(f"volume '{key[:16]}': {error.problem}", hint=error.hint, code=error.code) from error
        with self._lock:
            self._measured[key] = found
            if len(self._measured) > MOST_MEASURED:
                self._measured.popitem(last=False)
        return found

    def _choice(self) -> Choice:
        # A reader belongs to one thread.
        if not hasattr(self._mine, "choice"):
            self._mine.choice = choose(torch.device("cpu"))
        return self._mine.choice


class _CutOffError(Exception):
    """The file ends before a range does."""


@contextmanager
def _explained(path: Path) -> Generator[None, None, None]:
    """Turn what the system says into an error of ours that names no folder."""
    try:
        yield
    except _CutOffError as error:
        raise StoreError(f"the file '{path.stem[:16]}' is cut off", hint=_AGAIN) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is empty"
        raise StoreError(f"the file '{path.stem[:16]}' cannot be read: {why}", hint=_AGAIN) from error


_AGAIN = "write it again from the store"


def _check_gpu(device: torch.device, name: str) -> None:
    if device.type != "cuda":
        raise ConfigError(f"{name}: the device is {device.type}, and no GPU", hint="set device=cuda where there is one")
    if not torch.cuda.is_available():
        raise ConfigError(f"{name}: torch sees no GPU here", hint="install torch for CUDA and the GPU's driver")


def _check_length(path: Path, runs: Sequence[Range]) -> None:
    size = path.stat().st_size
    if any(offset + count > size for offset, count in runs):
        raise _CutOffError


def _runs(ranges: Sequence[Range]) -> list[Range]:
    """Join ranges that follow one another in the file as they do in the list."""
    if not ranges:
        raise ValueError("there is nothing to read")
    runs: list[Range] = []
    for offset, size in ranges:
        if offset < 0 or size < 1:
            raise ValueError(f"a range begins at 0 or later and has a byte at least, got {(offset, size)}")
        if runs and sum(runs[-1]) == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        else:
            runs.append((offset, size))
    return runs


def _fill(handle: int, view: memoryview, offset: int) -> None:
    at = 0
    while at < len(view):
        # One call moves 2 GiB at most, and may always move less.
        got = os.preadv(handle, [view[at:]], offset + at)
        if not got:
            raise _CutOffError
        at += got
