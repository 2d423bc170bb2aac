"""Random crops of one CT scan: our store against MONAI and tensorstore on the same scan, in one interleaved run.

    python benchmarks/crops.py [--repeats 7] [--small]

The scan is made here (512 x 512 x 300, a smooth body in air with noise, whole HU), so nobody's data is needed. Every
side hands over the same crop as contiguous float32 HU (channel, i, j, k) and each crop is checked against the array.
Sides: our store; our raw tiles (the second format); `LoadImage` + `EnsureChannelFirst` + crop from `.nii.gz` (MONAI's
usual way), the same with eight crops a file opened once (its amortised way), MONAI's own cache on disk
(`PersistentDataset`) and in memory (`CacheDataset`), and sharded zarr read by tensorstore, with its defaults and with
the fastest of several settings. Two sides are no peers but floors: what handing over floats costs at all, when the
whole scan lies in memory as int16 or as float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import monai
import nibabel
import numpy as np
import torch
from monai.data.dataset import CacheDataset, PersistentDataset
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Compose, EnsureChannelFirst, LoadImage
from scipy import ndimage

from voxelstem.engine.transfer import PreadReader, read_crop
from voxelstem.store import Store, write
from voxelstem.store.tiles import Tiles, write_tiles
from voxelstem.study import Provenance, Study, Volume

SIZES = ((96, 96, 96), (128, 128, 64))
CROPS_AN_OPEN = 8
BYTES_GOAL = 1 / 3
Box = tuple[slice, slice, slice, slice]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One way to get a crop: `crops` of them a call, and the bytes it rests in."""

    name: str
    crops: int
    read: Callable[[list[Box]], list[np.ndarray]]
    bytes: int
    goal: float = 0.0
    """How many times faster than this side ours should be; 0 where nothing is promised."""
    small: bool = False
    """Whether ours should also take no more than a third of its bytes."""


def machine() -> str:
    """Name the processor as the system does."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def scan(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """A body of smooth tissue in air, with the noise of a scanner: int16 HU (i, j, k)."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(rng.normal(size=[max(extent // 8, 4) for extent in shape]).astype(np.float32), 2)
    tissue = ndimage.zoom(coarse / coarse.std(), [n / m for n, m in zip(shape, coarse.shape, strict=True)], order=1)
    i, j, _ = np.meshgrid(
        *(np.linspace(-1, 1, extent, dtype=np.float32) for extent in shape), indexing="ij", sparse=True
    )
    inside = (i / 0.85) ** 2 + (j / 0.65) ** 2 < 1
    hu = np.where(inside, 40 + 60 * tissue, -1000) + rng.normal(0, 12, size=shape).astype(np.float32)
    return np.rint(np.clip(hu, -1024, 3071)).astype(np.int16)


def boxes(shape: tuple[int, int, int], size: tuple[int, int, int], count: int, rng: np.random.Generator) -> list[Box]:
    """Draw crops anywhere inside."""
    starts = [[int(rng.integers(0, n - m + 1)) for n, m in zip(shape, size, strict=True)] for _ in range(count)]
    return [
        (slice(None), *(slice(at, at + m) for at, m in zip(start, size, strict=True)))  # pyright: ignore[reportReturnType]
        for start in starts
    ]


def ours(store: Store, key: str) -> Side:
    """Our store."""

    def read(wanted: list[Box]) -> list[np.ndarray]:
        found = []
        for _, i, j, k in wanted:
            size = (i.stop - i.start, j.stop - j.start, k.stop - k.start)
            found.append(store.crop(key, (i.start, j.start, k.start), size))
        return found

    return Side(name="voxelstem store", crops=CROPS_AN_OPEN, read=read, bytes=store.record(key).bytes)


def raw_tiles(store: Store, key: str) -> Side:
    """Our second format, uncompressed, by `preadv`."""
    (path,) = write_tiles(store, key)
    tiles, reader = Tiles.open(path), PreadReader(torch.device("cpu"))

    def read(wanted: list[Box]) -> list[np.ndarray]:
        found = []
        for _, i, j, k in wanted:
            size = (i.stop - i.start, j.stop - j.start, k.stop - k.start)
            found.append(read_crop(reader, tiles, (i.start, j.start, k.start), size).numpy())
        return found

    return Side(name="voxelstem raw tiles (preadv)", crops=CROPS_AN_OPEN, read=read, bytes=path.stat().st_size)


def floor(name: str, whole: np.ndarray) -> Side:
    """Crops of an array in memory: no storage can be faster than this."""

    def read(wanted: list[Box]) -> list[np.ndarray]:
        return [np.array(whole[box], np.float32, order="C") for box in wanted]

    return Side(name=name, crops=CROPS_AN_OPEN, read=read, bytes=whole.nbytes)


def monai_file(path: Path, crops: int) -> Side:
    """MONAI from the file itself, decompressing it at every call."""
    load = Compose([LoadImage(image_only=True), EnsureChannelFirst()])

    def read(wanted: list[Box]) -> list[np.ndarray]:
        whole: Any = load(path)
        return [np.ascontiguousarray(whole[box]) for box in wanted]

    name = f"MONAI LoadImage, {crops} crop(s) an open"
    return Side(name=name, crops=crops, read=read, bytes=path.stat().st_size, goal=80.0)


def monai_dataset(name: str, dataset: Any, size: int) -> Side:
    """One of MONAI's caches, already filled."""
    _ = dataset[0]

    def read(wanted: list[Box]) -> list[np.ndarray]:
        # Outside the cropping, a MetaTensor's bookkeeping is paid once an open: the best this side can do.
        whole = dataset[0]
        plain = whole.as_tensor() if isinstance(whole, MetaTensor) else whole
        return [plain[box].clone(memory_format=torch.contiguous_format).numpy() for box in wanted]

    return Side(name=name, crops=CROPS_AN_OPEN, read=read, bytes=size, goal=6.0, small=True)


def zarr_sides(folder: Path, array: np.ndarray) -> list[Side]:
    """Sharded zarr by tensorstore: as it comes, and the fastest of several settings; none where it is missing."""
    if importlib.util.find_spec("tensorstore") is None:
        print("tensorstore is not installed: `pip install tensorstore` in this environment adds sharded zarr")
        return []
    usual = zarr_side(folder / "usual", array, (64, 64, 64), {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}, {})
    one_thread = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    codecs = [
        {"cname": "lz4", "clevel": level, "shuffle": shuffle} for level, shuffle in [(5, "bitshuffle"), (1, "shuffle")]
    ]
    tried: list[tuple[float, Side]] = []
    choices = itertools.product(((32, 32, 16), (32, 32, 32), (64, 64, 32)), codecs, ({}, one_thread))
    for number, (inner, codec, context) in enumerate(choices):
        side = zarr_side(folder / f"zarr{number}", array, inner, codec, context)
        rng = np.random.default_rng(2)
        wanted = [box for size in SIZES for box in boxes(array.shape, size, 8, rng)]
        side.read(wanted)
        began = time.perf_counter()
        side.read(wanted)
        tried.append((time.perf_counter() - began, side))
    best = min(tried, key=lambda pair: pair[0])[1]
    return [
        replace(usual, name="tensorstore sharded zarr, usual (64^3 lz4)"),
        replace(best, name=f"tensorstore, best ({best.name})"),
    ]


def zarr_side(
    folder: Path, array: np.ndarray, inner: tuple[int, int, int], codec: dict[str, Any], context: dict[str, Any]
) -> Side:
    """One shard that holds chunks of `inner` voxels."""
    import tensorstore

    chunks = {"name": "regular", "configuration": {"chunk_shape": [1, *(-(-n // 128) * 128 for n in array.shape)]}}
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, *inner],
            "codecs": [{"name": "bytes"}, {"name": "blosc", "configuration": codec | {"typesize": 2}}],
        },
    }
    made = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder)},
            "metadata": {
                "shape": [1, *array.shape],
                "data_type": "int16",
                "chunk_grid": chunks,
                "codecs": [sharding],
            },
        },
        context=tensorstore.Context(context),
        create=True,
    ).result()
    made.write(array[None]).result()

    def read(wanted: list[Box]) -> list[np.ndarray]:
        # All at once, so that it may overlap reading and decoding as it likes.
        asked = [made[box].read() for box in wanted]
        return [np.asarray(future.result()).astype(np.float32, order="C") for future in asked]

    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    threads = "1 thread" if context else "all threads"
    name = f"{'x'.join(map(str, inner))} {codec['shuffle']} {threads}"
    return Side(name=name, crops=CROPS_AN_OPEN, read=read, bytes=size, goal=1.5)


def sides(folder: Path, array: np.ndarray) -> list[Side]:
    """Write the scan in every form."""
    path = folder / "scan.nii.gz"
    affine = np.diag([0.75, 0.75, 1.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    store = Store.create(folder / "store")
    provenance = Provenance(source_format="phantom", sha256="", orientation="RAS")
    volume = Volume(array=array[None].astype(np.float32), affine_ras=affine, modality="CT", provenance=provenance)
    (key,) = write(store, Study(subject="s" + "0" * 24, volumes=(volume,)))
    transform = Compose([LoadImage(image_only=True), EnsureChannelFirst()])
    persistent = PersistentDataset([path], transform, cache_dir=folder / "cache")
    cached = CacheDataset([path], transform, progress=False)
    _ = persistent[0]
    on_disk = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    return [
        ours(store, key),
        raw_tiles(store, key),
        monai_file(path, 1),
        monai_file(path, CROPS_AN_OPEN),
        monai_dataset("MONAI PersistentDataset (its best on disk)", persistent, on_disk),
        monai_dataset("MONAI CacheDataset (whole scan in RAM)", cached, array.size * 4),
        *zarr_sides(folder, array),
        floor("floor: int16 array in RAM", array[None]),
        floor("floor: float32 array in RAM", array[None].astype(np.float32)),
    ]


def compare(everyone: list[Side], array: np.ndarray, size: tuple[int, int, int], repeats: int) -> None:
    """Time all sides in turn, again and again, and print the medians."""
    rng = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {side.name: [] for side in everyone}
    for repeat in range(repeats + 1):
        for side in everyone:
            wanted = boxes(array.shape, size, side.crops, rng)
            begin = time.perf_counter()
            found = side.read(wanted)
            spent = (time.perf_counter() - begin) / side.crops
            for crop, box in zip(found, wanted, strict=True):
                assert crop.dtype == np.float32
                assert np.array_equal(crop, array[None][box])
            if repeat:  # the first round warms up files and code
                seconds[side.name].append(spent)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    mine = everyone[0]
    print(f"\ncrops of {' x '.join(map(str, size))}, median of {repeats}")
    print(f"{'':52} {'ms a crop':>10} {'MB a scan':>10} {'ours is':>9} {'our bytes':>10}  goal")
    for side in everyone:
        cost, bytes_ratio = median[side.name], mine.bytes / side.bytes
        ratio = cost / median[mine.name]
        print(
            f"{side.name:52} {1e3 * cost:10.2f} {side.bytes / 1e6:10.1f} {ratio:8.1f}x {bytes_ratio:9.0%}  "
            f"{verdict(side, ratio, bytes_ratio)}"
        )


def verdict(side: Side, ratio: float, bytes_ratio: float) -> str:
    """Say whether what is promised against this side is kept."""
    if not side.goal:
        return ""
    met = ratio >= side.goal and (not side.small or bytes_ratio <= BYTES_GOAL)
    limit = " at <= 33 % of its bytes" if side.small else ""
    return f">= {side.goal:g}x{limit}: {'met' if met else 'MISSED'}"


def main() -> None:
    """Make the scan, write it in every form, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a scan of 192 x 192 x 128, to see that it runs")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="monai")
    shape = (192, 192, 128) if asked.small else (512, 512, 300)
    versions = f"Python {platform.python_version()}, MONAI {monai.__version__}, torch {torch.__version__}"
    print(f"{machine()}, 1 thread, {versions}")
    print(f"scan of {' x '.join(map(str, shape))} int16; sides take turns; every crop is checked against the array")
    array = scan(shape)
    with tempfile.TemporaryDirectory() as folder:
        everyone = sides(Path(folder), array)
        for size in SIZES:
            compare(everyone, array, size, asked.repeats)


if __name__ == "__main__":
    main()
