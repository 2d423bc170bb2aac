"""Random crops of one CT scan: our store against MONAI on the same scan, in one interleaved run.

    python benchmarks/crops.py [--repeats 7] [--small]

The scan is made here (512 x 512 x 300, a smooth body in air with noise, whole HU), so nobody's data is needed. Every
side hands over the same crop as float32 HU (channel, i, j, k); each crop is checked against the array before timing.
Sides: `LoadImage` + `EnsureChannelFirst` + crop from `.nii.gz` (MONAI's usual way), the same with eight crops a file
opened once (its amortised way), and MONAI's own cache on disk (`PersistentDataset`) and in memory (`CacheDataset`).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import monai
import nibabel
import numpy as np
import torch
from monai.data.dataset import CacheDataset, PersistentDataset
from monai.transforms import Compose, EnsureChannelFirst, LoadImage
from scipy import ndimage

from voxelstem.store import Store, write
from voxelstem.study import Provenance, Study, Volume

SIZES = ((96, 96, 96), (128, 128, 64))
CROPS_AN_OPEN = 8
GOAL = 40.0
Box = tuple[slice, slice, slice, slice]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One way to get a crop: `crops` of them a call, and the bytes it rests in."""

    name: str
    crops: int
    read: Callable[[list[Box]], list[np.ndarray]]
    bytes: int


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


def monai_file(path: Path, crops: int) -> Side:
    """MONAI from the file itself, decompressing it at every call."""
    load = Compose([LoadImage(image_only=True), EnsureChannelFirst()])

    def read(wanted: list[Box]) -> list[np.ndarray]:
        whole: Any = load(path)
        return [np.asarray(whole[box]) for box in wanted]

    return Side(name=f"MONAI LoadImage, {crops} crop(s) an open", crops=crops, read=read, bytes=path.stat().st_size)


def monai_dataset(name: str, dataset: Any, size: int) -> Side:
    """One of MONAI's caches, already filled."""
    _ = dataset[0]

    def read(wanted: list[Box]) -> list[np.ndarray]:
        whole = dataset[0]
        return [np.array(whole[box].numpy()) for box in wanted]

    return Side(name=name, crops=CROPS_AN_OPEN, read=read, bytes=size)


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
        monai_file(path, 1),
        monai_file(path, CROPS_AN_OPEN),
        monai_dataset("MONAI PersistentDataset (its best on disk)", persistent, on_disk),
        monai_dataset("MONAI CacheDataset (whole scan in RAM)", cached, array.size * 4),
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
    first = everyone[0].name
    print(f"\ncrops of {' x '.join(map(str, size))}, median of {repeats}")
    print(f"{'':44} {'ms a crop':>10} {'crops/s':>9} {'MB a scan':>10} {'ours is':>9}")
    for side in everyone:
        cost = median[side.name]
        ratio = f"{cost / median[first]:.1f}x"
        print(f"{side.name:44} {1e3 * cost:10.2f} {1 / cost:9.1f} {side.bytes / 1e6:10.1f} {ratio:>9}")
    ratio = median[everyone[1].name] / median[first]
    print(f"against {everyone[1].name}: {ratio:.0f}x (goal >= {GOAL:.0f}x: {'met' if ratio >= GOAL else 'MISSED'})")


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
