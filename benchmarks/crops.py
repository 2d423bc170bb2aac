"""Random crops of one CT scan as windowed float tensors: our store against MONAI and tensorstore, interleaved.

    python benchmarks/crops.py [--repeats 5] [--small]

The scan is made here (512 x 512 x 300, a smooth body in air with noise, whole HU), so nobody's data is needed. Every
side opens it and hands over eight random crops as contiguous float32 tensors (channel, i, j, k) with -1000 to 1000 HU
mapped to [0, 1]; each crop is checked against the array. Everybody has one core.

Each peer comes twice, as its users use it and as fast as we could make it:

- MONAI, usual: LoadImaged, EnsureChannelFirstd, Orientationd, ScaleIntensityRanged, RandSpatialCropSamplesd, in a
  `Dataset` on the `.nii.gz`, a `PersistentDataset`, a `CacheDataset`.
- MONAI, best: the same storage, but no dictionaries, no tracked metadata, no copies: bare slices of the loaded array.
- tensorstore, usual: zarr 3, one shard, chunks of 64^3, lz4 with byte shuffle; also with all threads.
- tensorstore, best: the fastest of several chunks, codecs and cache settings, the array kept open.

Two sides are no peers but floors: handing over floats when the whole scan lies in memory. Where a side lets us say
where its crops go, they go into memory that is used again, as a loader's pinned buffers are. Times are of the processor
(all threads) and of the clock; verdicts go by the processor's.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import monai
import nibabel
import numpy as np
import torch
from monai.data.dataset import CacheDataset, Dataset, PersistentDataset
from monai.data.meta_tensor import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    EnsureChannelFirstd,
    LoadImage,
    LoadImaged,
    Orientationd,
    RandSpatialCropSamplesd,
    ScaleIntensityRange,
    ScaleIntensityRanged,
)
from scipy import ndimage
from torch import Tensor

from voxelstem.engine.transfer import PreadReader, read_crop
from voxelstem.store import Store, reader, write
from voxelstem.store.tiles import Tiles, write_tiles
from voxelstem.study import InputSpec, Provenance, Study, Volume
from voxelstem.views.intensity import limits, window

SIZES = ((128, 128, 64), (96, 96, 96))
CROPS_AN_OPEN = 8
BYTES_GOAL = 1 / 3
TURN_S = 0.4
"""A side's turn lasts at least this long, so that fast sides are measured as well as slow ones."""
LOW_HU, HIGH_HU = -1000.0, 1000.0
SPEC = InputSpec(modality="CT", low_hu=LOW_HU, high_hu=HIGH_HU)
WINDOW: dict[str, Any] = {"a_min": LOW_HU, "a_max": HIGH_HU, "b_min": 0.0, "b_max": 1.0, "clip": True}
AFFINE = np.diag([0.75, 0.75, 1.0, 1.0])
"""Already RAS+: the kindest to a peer that turns scans."""
Triple = tuple[int, int, int]
Found = list[tuple[Triple, Tensor]]
"""Crops, and where each begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One way to get crops: it opens the scan, and gives eight, at places that are drawn by us or by itself."""

    name: str
    read: Callable[[list[Triple], Triple], Found]
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


def scan(shape: Triple, seed: int = 0) -> np.ndarray:
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


def box(start: Triple, size: Triple) -> tuple[slice, ...]:
    """All channels of a crop, as an index."""
    return (slice(None), *(slice(at, at + length) for at, length in zip(start, size, strict=True)))


@cache
def room(size: Triple) -> Tensor:
    """Memory for eight crops, the same for everybody and every time: what new memory costs is the system's mood."""
    return torch.from_numpy(np.empty((CROPS_AN_OPEN, 1, *size), np.float32))


def windowed(crop: Tensor) -> Tensor:
    """HU as a network sees them, in place: step by step the arithmetic of `views.intensity.window`."""
    return crop.sub_(LOW_HU).div_(HIGH_HU - LOW_HU).clamp_(0.0, 1.0)


def gathered(starts: list[Triple], size: Triple, crops: Iterable[np.ndarray]) -> Found:
    """Crops in HU, of whatever type, as they come, into one piece of memory and windowed."""
    found = list(zip(starts, room(size), strict=True))
    for (_, crop), hu in zip(found, crops, strict=True):
        windowed(crop.copy_(torch.from_numpy(hu)))
    return found


def ours(store: Store, key: str) -> Side:
    """Our store; `main` sees to it that it opens the file anew for every eight crops."""

    def read(starts: list[Triple], size: Triple) -> Found:
        crops = room(size)
        store.crops(key, starts, size, out=crops.numpy())
        return [(start, windowed(crop)) for start, crop in zip(starts, crops, strict=True)]

    return Side(name="voxelstem store", read=read, bytes=store.record(key).bytes)


def raw_tiles(store: Store, key: str) -> Side:
    """Our second format, uncompressed, by `preadv`."""
    (path,) = write_tiles(store, key)
    way = PreadReader(torch.device("cpu"))

    def read(starts: list[Triple], size: Triple) -> Found:
        tiles = Tiles.open(path)
        return [(start, windowed(read_crop(way, tiles, start, size))) for start in starts]

    return Side(name="voxelstem raw tiles (preadv)", read=read, bytes=path.stat().st_size)


def floors(array: np.ndarray) -> list[Side]:
    """Crops of an array in memory: no storage can be faster than this."""
    ready = windowed(torch.from_numpy(array[None].astype(np.float32)))

    def from_hu(starts: list[Triple], size: Triple) -> Found:
        return gathered(starts, size, (array[None][box(start, size)] for start in starts))

    return [
        Side(name="floor: int16 array in RAM", read=from_hu, bytes=array.nbytes),
        Side(name="floor: windowed float32 array in RAM", read=slices(lambda: ready), bytes=ready.nbytes),
    ]


def monai_sides(path: Path, folder: Path, voxels: int) -> list[Side]:
    """MONAI from the file, from its cache on disk and from its cache in memory."""
    crop = RandSpatialCropSamplesd(keys="image", roi_size=SIZES[0], num_samples=CROPS_AN_OPEN, random_size=False)
    usual = Compose(
        [
            LoadImaged(keys="image"),
            EnsureChannelFirstd(keys="image"),
            Orientationd(keys="image", axcodes="RAS"),
            ScaleIntensityRanged(keys="image", **WINDOW),
            crop,
        ]
    )
    bare = Compose([LoadImage(image_only=True), EnsureChannelFirst(), ScaleIntensityRange(**WINDOW)])
    items, files = [{"image": str(path)}], [str(path)]
    sides: list[Side] = []
    for make in (Dataset, PersistentDataset, CacheDataset):
        name, goal = make.__name__, 80.0 if make is Dataset else 6.0
        for kind in ("usual", "best"):
            cache = folder / f"{name}_{kind}"
            extra: dict[str, Any] = {"cache_dir": cache} if make is PersistentDataset else {}
            extra |= {"progress": False} if make is CacheDataset else {}
            dataset: Any = make(items if kind == "usual" else files, usual if kind == "usual" else bare, **extra)
            read = monai_usual(dataset, crop) if kind == "usual" else slices(partial(dataset.__getitem__, 0))
            size = path.stat().st_size
            if make is PersistentDataset:
                _ = dataset[0]
                size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
            elif make is CacheDataset:
                size = 4 * voxels
            sides.append(
                Side(name=f"MONAI {name}, {kind}", read=read, bytes=size, goal=goal, small=make is not Dataset)
            )
    return sides


def monai_usual(dataset: Any, crop: Any) -> Callable[[list[Triple], Triple], Found]:
    """What a training loop calls; MONAI draws the places itself, and says in the affine where they are."""

    def read(_: list[Triple], size: Triple) -> Found:
        crop.cropper.cropper.roi_size = size
        # In one piece, as a loader's collation would leave them.
        found = [item["image"].contiguous() for item in dataset[0]]
        # The scan begins at the origin; a PersistentDataset forgets its spacing, so each crop's own affine tells.
        affines = [each.affine.numpy() for each in found]
        corners = [np.rint(np.linalg.solve(affine[:3, :3], affine[:3, 3])).astype(int) for affine in affines]
        return [((int(i), int(j), int(k)), each.as_tensor()) for (i, j, k), each in zip(corners, found, strict=True)]

    return read


def slices(whole: Callable[[], Tensor]) -> Callable[[list[Triple], Triple], Found]:
    """The whole windowed scan, its metadata left behind, and bare slices of it."""

    def read(starts: list[Triple], size: Triple) -> Found:
        read_whole = whole()
        plain = read_whole.as_tensor() if isinstance(read_whole, MetaTensor) else read_whole
        found = list(zip(starts, room(size), strict=True))
        for start, crop in found:
            crop.copy_(plain[box(start, size)])
        return found

    return read


ONE_THREAD = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
SMALL_CACHE = {"cache_pool": {"total_bytes_limit": 4_000_000}}
"""Keeps the shard's index."""


def zarr_sides(folder: Path, array: np.ndarray) -> list[Side]:
    """Sharded zarr by tensorstore; none where it is missing."""
    if importlib.util.find_spec("tensorstore") is None:
        print("tensorstore is not installed: `pip install tensorstore` in this environment adds sharded zarr")
        return []
    plain = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}
    first = write_zarr(folder / "zarr", array, (64, 64, 64), plain)
    usual = zarr_side(first, ONE_THREAD, keep_open=False)
    free = zarr_side(first, {}, keep_open=False)
    tried: list[tuple[float, Side]] = []
    codecs = (plain, plain | {"shuffle": "bitshuffle"})
    for number, (inner, codec) in enumerate(itertools.product(((64, 64, 64), (32, 32, 32), (32, 32, 64)), codecs)):
        path = write_zarr(folder / f"zarr{number}", array, inner, codec)
        for more, extra in (("", {}), (", cached index", SMALL_CACHE)):
            side = zarr_side(path, ONE_THREAD | extra, keep_open=True)
            side = replace(side, name=f"{'x'.join(map(str, inner))} {codec['shuffle']}{more}")
            rng = np.random.default_rng(2)
            draws = [(places(array.shape, size, rng), size) for size in SIZES * 2]
            side.read(*draws[0])
            began = time.process_time()
            for draw in draws:
                side.read(*draw)
            tried.append((time.process_time() - began, side))
    best = min(tried, key=lambda pair: pair[0])[1]
    return [
        replace(usual, name="tensorstore sharded zarr, usual"),
        replace(best, name=f"tensorstore, best ({best.name})"),
        replace(free, name="tensorstore, usual, all threads"),
    ]


def write_zarr(folder: Path, array: np.ndarray, inner: Triple, codec: dict[str, Any]) -> Path:
    """One shard that holds chunks of `inner` voxels."""
    import tensorstore

    shard = {"name": "regular", "configuration": {"chunk_shape": [1, *(-(-n // 128) * 128 for n in array.shape)]}}
    blosc = {"name": "blosc", "configuration": codec | {"typesize": 2}}
    inside = {"chunk_shape": [1, *inner], "codecs": [{"name": "bytes"}, blosc]}
    sharding = {"name": "sharding_indexed", "configuration": inside}
    metadata = {"shape": [1, *array.shape], "data_type": "int16", "chunk_grid": shard, "codecs": [sharding]}
    place = {"driver": "file", "path": str(folder)}
    made = tensorstore.open({"driver": "zarr3", "kvstore": place, "metadata": metadata}, create=True).result()
    made.write(array[None]).result()
    return folder


def zarr_side(folder: Path, context: dict[str, Any], *, keep_open: bool) -> Side:
    """Read it with these resources, opened anew for every eight crops or kept open."""
    import tensorstore

    shared = tensorstore.Context(context)
    place = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    opened = tensorstore.open(place, context=shared, read=True).result()

    def read(starts: list[Triple], size: Triple) -> Found:
        whole = opened if keep_open else tensorstore.open(place, context=shared, read=True).result()
        # All asked for at once, so that it may overlap reading and decoding as it likes.
        asked = [whole[box(start, size)].read() for start in starts]
        return gathered(starts, size, (np.asarray(each.result()) for each in asked))

    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Side(name=folder.name, read=read, bytes=size, goal=1.5)


def sides(folder: Path, array: np.ndarray) -> list[Side]:
    """Write the scan in every form."""
    path = folder / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)
    store = Store.create(folder / "store")
    provenance = Provenance(source_format="phantom", sha256="", orientation="RAS")
    volume = Volume(array=array[None].astype(np.float32), affine_ras=AFFINE, modality="CT", provenance=provenance)
    (key,) = write(store, Study(subject="s" + "0" * 24, volumes=(volume,)))
    store.refresh()
    return [
        ours(store, key),
        raw_tiles(store, key),
        *monai_sides(path, folder, array.size),
        *zarr_sides(folder, array),
        *floors(array),
    ]


def places(shape: tuple[int, ...], size: Triple, rng: np.random.Generator) -> list[Triple]:
    """Draw crops anywhere inside."""
    room = np.subtract(shape[-3:], size) + 1
    return [(int(i), int(j), int(k)) for i, j, k in rng.integers(0, room, (CROPS_AN_OPEN, 3))]


def turn(side: Side, shape: tuple[int, ...], size: Triple, rng: np.random.Generator) -> tuple[float, float, Found]:
    """Seconds a crop of the processor and of the clock, and the last crops."""
    calls, found = 0, []
    processor, clock = 0.0, 0.0
    while clock < TURN_S:
        starts = places(shape, size, rng)
        before, began = time.process_time(), time.perf_counter()
        found = side.read(starts, size)
        clock += time.perf_counter() - began
        processor += time.process_time() - before
        calls += 1
    return processor / calls / CROPS_AN_OPEN, clock / calls / CROPS_AN_OPEN, found


def check(found: Found, array: np.ndarray, size: Triple) -> None:
    """Stop where a side hands over something else."""
    assert len(found) == CROPS_AN_OPEN
    for start, crop in found:
        assert crop.dtype == torch.float32
        assert crop.is_contiguous()
        want = window(torch.from_numpy(array[None][box(start, size)]), limits(None, SPEC))
        torch.testing.assert_close(crop, want, rtol=0, atol=1e-6)


def compare(everyone: list[Side], array: np.ndarray, size: Triple, repeats: int) -> None:
    """Time all sides in turn, again and again, and print the medians."""
    rng = np.random.default_rng(1)
    processor: dict[str, list[float]] = {side.name: [] for side in everyone}
    clock: dict[str, list[float]] = {side.name: [] for side in everyone}
    for repeat in range(repeats + 1):
        for side in everyone:
            spent, passed, found = turn(side, array.shape, size, rng)
            check(found, array, size)
            if repeat:  # the first round warms up files and code
                processor[side.name].append(spent)
                clock[side.name].append(passed)
    mine = everyone[0]
    print(f"\ncrops of {' x '.join(map(str, size))}, {CROPS_AN_OPEN} an open, median of {repeats} turns")
    print(f"{'':52} {'core ms':>8} {'ms':>7} {'MB':>6} {'ours is':>9} {'by clock':>9} {'our bytes':>9}  goal")
    for side in everyone:
        core, wall = statistics.median(processor[side.name]), statistics.median(clock[side.name])
        ratio = core / statistics.median(processor[mine.name])
        by_clock, part = wall / statistics.median(clock[mine.name]), mine.bytes / side.bytes
        print(
            f"{side.name:52} {1e3 * core:8.2f} {1e3 * wall:7.2f} {side.bytes / 1e6:6.1f} {ratio:8.1f}x "
            f"{by_clock:8.1f}x {part:9.0%}  {verdict(side, ratio, part)}"
        )


def verdict(side: Side, ratio: float, part: float) -> str:
    """Say whether what is promised against this side is kept."""
    if not side.goal:
        return ""
    met = ratio >= side.goal and (not side.small or part <= BYTES_GOAL)
    limit = " at <= 33 % of its bytes" if side.small else ""
    return f">= {side.goal:g}x{limit}: {'met' if met else 'MISSED'}"


def main() -> None:
    """Make the scan, write it in every form, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a scan of 192 x 192 x 128, to see that it runs")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    reader.MAX_OPEN_FILES = 0  # a training on many scans rarely meets a file that is still open
    warnings.filterwarnings("ignore", module="monai")
    warnings.filterwarnings("ignore", message="monai")
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
