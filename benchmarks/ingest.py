"""Ingest of DICOM series with all cores: our `ingest` against dcm2niix and MONAI's persistent cache, interleaved.

    python benchmarks/ingest.py [--series 4] [--slices 200] [--repeats 5] [--workers N] [--dcm2niix PATH] [--small]

The series are made here (512 x 512 x 200, int16, uncompressed, a smooth body in air with noise; with `--compressed`
RLE), so nobody's data is needed. Every side starts from the same folders of DICOM files and ends with what training
reads: ours with a store (checked, de-identified, compressed, catalogued), MONAI's with the filled folder of a
`PersistentDataset` (LoadImaged, EnsureChannelFirstd, Orientationd, ScaleIntensityRanged, as its tutorials begin) over
the files that dcm2niix wrote. Peers at their default (`dcm2niix -z y`, one process) and at their best (`-z n`, as many
processes as cores for both steps). Prints the ratios, and our peak memory per worker against the largest scan, whose
size is that of its voxels as int16.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid
from scipy import ndimage

GOAL_RATIO, GOAL_MEMORY = 2.0, 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One way from DICOM folders to what training reads."""

    name: str
    run: Callable[[Path, Path, int], None]
    """Takes the folder of series, an empty folder for the result, and how many processes."""


def machine() -> str:
    """Name the processor as the system does."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def scan(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """A body of smooth tissue in air, with a scanner's noise: stored values (slice, row, column), HU + 1024."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(rng.normal(size=[max(edge // 16, 4) for edge in shape]).astype(np.float32), 1)
    tissue = ndimage.zoom(coarse / coarse.std(), [n / m for n, m in zip(shape, coarse.shape, strict=True)], order=1)
    _, i, j = np.meshgrid(*(np.linspace(-1, 1, edge, dtype=np.float32) for edge in shape), indexing="ij", sparse=True)
    inside = (i / 0.7) ** 2 + (j / 0.85) ** 2 < 1
    hu = np.where(inside, 40 + 60 * tissue, -1000) + rng.normal(0, 10, shape).astype(np.float32)
    return np.clip(np.rint(hu) + 1024, 0, 4095).astype(np.int16)


def write_series(folder: Path, shape: tuple[int, int, int], seed: int, *, compressed: bool) -> None:
    """Write one CT series of its own patient."""
    folder.mkdir(parents=True)
    values = scan(shape, seed)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for index, plane in enumerate(values):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = CTImageStorage
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.PatientID, one.PatientName, one.Modality = f"P{seed}", "", "CT"
        one.Manufacturer, one.SeriesNumber, one.InstanceNumber = "MADE", 1, index + 1
        one.StudyDate, one.SeriesDescription, one.StudyID = "20200101", "made", "1"
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.Rows, one.Columns = plane.shape
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept, one.RescaleType = 1, -1024, "HU"
        one.PixelSpacing, one.SliceThickness = [0.75, 0.75], 1.5
        one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        one.ImagePositionPatient = [-192, -192, 1.5 * index]
        one.PixelData = plane.tobytes()
        if compressed:
            one.compress(RLELossless)
        one.save_as(folder / f"IM{index:04d}.dcm", enforce_file_format=True)


def ours(src: Path, out: Path, workers: int) -> None:
    """Our command, as a user starts it."""
    command = [sys.executable, "-m", "voxelstem", "ingest", str(src), "--store", str(out / "store")]
    command += ["--workers", str(workers)]
    key = out / "site.key"
    key.write_text("00" * 32)
    environment = os.environ | {"VOXELSTEM_KEY": str(key)}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def convert(command: list[str]) -> None:
    """One call of dcm2niix."""
    subprocess.run(command, check=True, capture_output=True)


def cache(paths: list[Path], folder: Path) -> None:
    """Fill MONAI's persistent cache with some files."""
    from monai.data.dataset import PersistentDataset
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, ScaleIntensityRanged

    chain = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            ScaleIntensityRanged("image", a_min=-1000, a_max=1000, b_min=0, b_max=1, clip=True),
        ]
    )
    dataset = PersistentDataset([{"image": path} for path in paths], chain, cache_dir=folder)
    for index in range(len(paths)):
        _ = dataset[index]


def peer(dcm2niix: str, *, best: bool) -> Callable[[Path, Path, int], None]:
    """dcm2niix, then MONAI's cache: one after another as usual, or both in as many processes as ours."""

    def run(src: Path, out: Path, workers: int) -> None:
        (out / "nii").mkdir()
        options = ["-z", "n" if best else "y", "-b", "n", "-o", str(out / "nii")]
        count = workers if best else 1
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            folders = sorted(src.iterdir()) if best else [src]
            commands = [[dcm2niix, *options, "-f", "%i_%s", str(folder)] for folder in folders]
            list(pool.map(convert, commands))
            files = sorted((out / "nii").glob("*.nii*"))
            list(pool.map(cache, [files[start::count] for start in range(count)], [out / "cache"] * count))
        if len(list((out / "cache").glob("*.pt"))) != len(list(src.iterdir())):
            raise RuntimeError("the peer did not cache every series")

    return run


def compare(everyone: list[Side], src: Path, scratch: Path, repeats: int, workers: int) -> dict[str, float]:
    """Time all sides in turn, again and again; the median seconds of each."""
    seconds: dict[str, list[float]] = {side.name: [] for side in everyone}
    for _ in range(repeats):
        for side in everyone:
            out = scratch / "out"
            out.mkdir()
            begin = time.perf_counter()
            side.run(src, out, workers)
            seconds[side.name].append(time.perf_counter() - begin)
            shutil.rmtree(out)
    return {name: statistics.median(times) for name, times in seconds.items()}


PEAK = """
import sys
from pathlib import Path
from voxelstem.intake import Intake, Task
from voxelstem.sources import dicom, iterate

def peak():
    # Not ru_maxrss: a process inherits that of the one that started it.
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before = peak()
source = next(iterate(Path(sys.argv[1])))
outcome = Intake(key=bytes(32))(Task(source=source, name="x"))
assert outcome.study is not None, outcome.reason
print(before, peak())
"""


def peak_of_a_worker(folder: Path) -> tuple[int, int]:
    """Bytes that a process holds before and at the peak of taking in one series, as a worker does."""
    run = subprocess.run([sys.executable, "-c", PEAK, str(folder)], check=True, capture_output=True, text=True)
    before, after = (int(number) * 1024 for number in run.stdout.split())
    return before, after


def main() -> None:
    """Make the series, take them in on every side, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=4)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dcm2niix", default=shutil.which("dcm2niix"), help="its program, where it is not on PATH")
    parser.add_argument("--compressed", action="store_true", help="RLE instead of plain pixels")
    parser.add_argument("--small", action="store_true", help="2 series of 128 x 128 x 32 once, to see that it runs")
    asked = parser.parse_args()
    if not asked.dcm2niix:
        parser.error("dcm2niix is not on PATH; name it with --dcm2niix")
    shape = (32, 128, 128) if asked.small else (asked.slices, 512, 512)
    count, repeats = (2, 1) if asked.small else (asked.series, asked.repeats)
    print(f"{machine()}, Python {platform.python_version()}, {asked.workers} processes")
    print(f"{count} CT series of {' x '.join(map(str, shape[::-1]))}, {'RLE' if asked.compressed else 'uncompressed'}")
    everyone = [
        Side(name="voxelstem ingest", run=ours),
        Side(name="dcm2niix -z y + MONAI PersistentDataset", run=peer(asked.dcm2niix, best=False)),
        Side(name="dcm2niix -z n + the same, all cores (best)", run=peer(asked.dcm2niix, best=True)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder, "src")
        for seed in range(count):
            write_series(src / f"case{seed}", shape, seed, compressed=asked.compressed)
        median = compare(everyone, src, Path(folder), repeats, asked.workers)
        before, after = peak_of_a_worker(src / "case0")
    first = everyone[0].name
    print(f"\n{'':48} {'s a series':>10} {'ours is':>9}   median of {repeats}")
    for side in everyone:
        print(f"{side.name:48} {median[side.name] / count:10.2f} {median[side.name] / median[first]:8.2f}x")
    for side in everyone[1:]:
        ratio = median[side.name] / median[first]
        print(
            f"against {side.name}: {ratio:.2f}x (goal >= {GOAL_RATIO}x: {'met' if ratio >= GOAL_RATIO else 'MISSED'})"
        )
    size = int(np.prod(shape)) * 2
    share, grown = after / size, (after - before) / size
    print(f"peak of a worker: {after / 2**20:.0f} MiB = {share:.2f}x the scan's {size / 2**20:.0f} MiB of int16;")
    print(f"without the program itself ({before / 2**20:.0f} MiB after its imports): {grown:.2f}x", end=" ")
    print(f"(goal <= {GOAL_MEMORY}x: {'met' if grown <= GOAL_MEMORY else 'MISSED'})")


if __name__ == "__main__":
    main()
