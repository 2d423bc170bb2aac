"""How often the value gates err: real scans and phantoms that must pass, and faults made from them that must not.

    python benchmarks/gates.py [--data ../shared/data] [--phantoms 20] [--quick]

Each fault is made from every real CT that it changes (from every real MR where it says so) and shown to `check_hu` as
a whole CT, as a DICOM reader does: the header says CT. `as a file` shows the same voxels without a modality, as a
NIfTI reader does: refused, or told to be no CT, which keeps it out of a CT store. Faults that leave values which some
patient may have are listed apart, with the rate that was found, and count in no total.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy import ndimage

from voxelstem import sources
from voxelstem.errors import IngestError
from voxelstem.sources import gates
from voxelstem.sources.phantom import PhantomConfig, phantom

FOLDERS = (
    "starter",
    "ct",
    "sts",
    "hippocampus/images",
    "dicom_odd/gantry_tilt_ge",
    "dicom_odd/dcmqi_ct3slice/ct-3slice",
)
MASKS = ("mask", "label", "gtv", "gold", "lesion", "_seg_")
FEWEST_CHANGED = 20  # voxels: a fault that touches fewer is no fault
GOAL_FAULTS, GOAL_CLEAN = 0.99, 0.01
Array = np.ndarray
Fault = Callable[[Array], Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """One clean volume (i, j, k) and what it truly is."""

    name: str
    modality: str
    array: Array


def raw(hu: Array, intercept: float = 1024.0) -> Array:
    """Stored numbers: whole, from zero up as far as the scan itself is."""
    return np.rint(hu + intercept)


def twelve_bits(hu: Array, *, low: float) -> Array:
    """What 12 bits from `low` up make of larger and smaller values."""
    whole = np.rint(hu)
    inside = whole > -1500  # padding is written apart
    return np.where(inside, (whole - low) % 4096 + low, whole)


def with_metal(hu: Array) -> Array:
    """Bone made as dense as metal: what lies above 700 HU grows eightfold."""
    return np.where(hu > 700, 700 + (hu - 700) * 8, hu)


def window(hu: Array, low: float, high: float, top: float) -> Array:
    """Cut to a window and scaled to 0..top."""
    return np.clip((hu - low) / (high - low), 0, 1) * top


def pet(hu: Array) -> Array:
    """Uptake in Bq/ml: smooth, positive, high in few places."""
    rng = np.random.default_rng(0)
    body = ndimage.gaussian_filter((hu > -300).astype(np.float32), 1.5)
    hot = ndimage.gaussian_filter(rng.exponential(size=hu.shape).astype(np.float32), 2) ** 4
    return body * (1500 + 20000 * hot) + rng.poisson(20, hu.shape)


OF_CT: Mapping[str, Fault] = {
    "no rescale, +1024": raw,
    "no rescale, +1000": lambda a: raw(a, 1000),
    "no rescale, +1024, cut at 0": lambda a: np.maximum(raw(a), 0),
    "no rescale, +8192": lambda a: raw(a, 8192),
    "rescaled twice, -1024": lambda a: a - 1024,
    "rescaled twice, -1000": lambda a: a - 1000,
    "rescaled twice, -8192": lambda a: a - 8192,
    "stored numbers read unsigned, +32768": lambda a: raw(a, 32768),
    "HU x 2": lambda a: a * 2,
    "HU x 1/2": lambda a: a / 2,
    "HU x 10": lambda a: a * 10,
    "stored x 2, then -1024": lambda a: raw(a) * 2 - 1024,
    "stored x 1/2, then -1024": lambda a: raw(a) / 2 - 1024,
    "stored x 1/16 (left-aligned bits)": lambda a: raw(a) / 16,
    "sign turned": lambda a: -a,
    "bright and dark exchanged": lambda a: 2047 - a,
    "12-bit wrap above 1023": lambda a: twelve_bits(a, low=-3072),
    "12-bit wrap of metal above 3071": lambda a: twelve_bits(with_metal(a), low=-1024),
    "12-bit wrap of air below -1000": lambda a: twelve_bits(a, low=-1000),
    "8-bit picture of -160..240": lambda a: np.rint(window(a, -160, 240, 255)),
    "8-bit picture of -1000..1000": lambda a: np.rint(window(a, -1000, 1000, 255)),
    "8-bit picture of -1350..150": lambda a: np.rint(window(a, -1350, 150, 255)),
    "-1000..1000 scaled to 0..1": lambda a: window(a, -1000, 1000, 1),
    "-1000..1000 scaled to -1..1": lambda a: window(a, -1000, 1000, 2) - 1,
    "a thousandth of HU": lambda a: a / 1000,
    "mean 0, deviation 1": lambda a: (a - a.mean()) / a.std(),
    "cut to -160..240 HU": lambda a: np.clip(a, -160, 240),
    "bytes swapped": lambda a: np.rint(a).astype(np.int16).byteswap().astype(np.float32),
    "noise from -1024 to 3071": lambda a: np.random.default_rng(0).uniform(-1024, 3071, a.shape),
    "PET": pet,
}
OF_MR: Mapping[str, Fault] = {
    "MR said to be CT": lambda a: a,
    "MR said to be CT, 1024 subtracted": lambda a: a - 1024,
    "MR said to be CT, -1024 to 3071": lambda a: window(a, 0, np.percentile(a, 99.9), 4095) - 1024,
}
HARD: Mapping[str, Fault] = {
    "HU + 24 (1000 for 1024)": lambda a: a + 24,
    "HU + 100": lambda a: a + 100,
    "HU - 100": lambda a: a - 100,
    "HU + 200": lambda a: a + 200,
    "HU - 200": lambda a: a - 200,
    "HU x 1.1": lambda a: a * 1.1,
    "HU x 1.25": lambda a: a * 1.25,
    "HU x 0.8": lambda a: a * 0.8,
    "stored x 1.1, then -1024": lambda a: raw(a) * 1.1 - 1024,
    "left and right exchanged": lambda a: a[::-1],
    "upside down": lambda a: a[:, :, ::-1],
}


def clean(data: Path, phantoms: int) -> Iterator[tuple[Scan | None, str]]:
    """Every scan of the data folders and some phantoms; None with the code where a reader refuses one."""
    for folder in FOLDERS:
        if not (data / folder).exists():
            continue
        for source in sources.iterate(data / folder):
            if any(word in source.relative.lower() for word in MASKS):
                continue
            try:
                volume = read(source).volumes[0]
            except IngestError as problem:
                yield None, f"{folder}: {problem.code}"
                continue
            truth = "CT" if "ct" in source.relative.lower().split("/")[-1] or volume.modality == "CT" else "MR"
            yield Scan(name=f"{folder}/{source.relative}", modality=truth, array=volume.array[0]), ""
    for seed in range(phantoms):
        made = phantom(PhantomConfig(seed=seed)).volumes[0]
        yield Scan(name=f"phantom {seed}", modality="CT", array=made.array[0]), ""


def read(source: sources.Source) -> sources.Study:
    """Read with repair where the source offers it: a tilted head is a clean scan to the value gates."""
    return source.read(repair=True)


def as_ct(array: Array) -> str:
    """The code with which a whole CT is refused; empty when it passes."""
    if array.min() == array.max():
        return "constant"
    try:
        gates.check_hu(np.asarray(array, np.float32))
    except IngestError as problem:
        return problem.code
    return ""


def as_file(array: Array) -> str:
    """The code with which a file without modality is refused, or what it was told to be."""
    if array.min() == array.max():
        return "constant"
    kind, _ = gates.tell_kind(array)
    if kind == "label-map":
        return kind
    try:
        check = gates.check_mr if kind == "MR" else gates.check_hu
        check(np.asarray(array, np.float32), **({"airless": True} if kind == "CT" else {}))
    except IngestError as problem:
        return problem.code
    return kind


def measure(faults: Mapping[str, Fault], scans: list[Scan]) -> tuple[int, int]:
    """Print a row for each fault; give how many faults were made and how many were refused as a CT."""
    made = caught = 0
    for name, fault in faults.items():
        codes: list[str] = []
        files: list[str] = []
        for scan in scans:
            broken = fault(scan.array)
            if name.startswith("12-bit") and np.count_nonzero(np.abs(broken - scan.array) > 2000) < FEWEST_CHANGED:
                continue
            if name.startswith("12-bit wrap of metal"):
                wrapped = np.count_nonzero(np.rint(with_metal(scan.array)) != broken)
                if wrapped < FEWEST_CHANGED:
                    continue
            codes.append(as_ct(broken))
            files.append(as_file(broken))
        refused = sum(bool(code) for code in codes)
        out = sum(code != "CT" for code in files)
        told = sum(code == "MR" for code in files)
        words = ", ".join(sorted(set(codes) - {""}))
        rate = refused / max(len(codes), 1)
        print(f"{name:40s} {len(codes):4d} {refused:4d} {rate:7.1%}   {out:4d} ({told} as MR)   {words}")
        made, caught = made + len(codes), caught + refused
    return made, caught


def print_clean(scans: list[Scan], lost: list[str]) -> int:
    """Print how many clean scans are refused, by both doors; give the larger number."""
    print(f"{'clean':40s} {'n':>4s} {'refused':>8s}")
    worst = len(lost)
    for modality in ("CT", "MR"):
        chosen = [scan for scan in scans if scan.modality == modality]
        files = {scan.name: as_file(scan.array) for scan in chosen}
        wrong = {name: code for name, code in files.items() if code != modality}
        if modality == "CT":
            wrong |= {scan.name: code for scan in chosen if (code := as_ct(scan.array))}
        print(f"{modality:40s} {len(chosen):4d} {len(wrong):8d}   {', '.join(sorted(set(wrong.values())))}")
        worst += len(wrong)
    for what in lost:
        print(f"refused by its reader: {what}")
    return worst


def print_cost() -> None:
    """Print what a gate costs on a scan of the usual size."""
    array = np.random.default_rng(0).normal(0, 60, (512, 512, 300)).astype(np.float32)
    array[:150] = -1000
    array[150, :, :] -= 500
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        gates.check_hu(array)
        times.append(time.perf_counter() - start)
    print(f"check_hu of 512 x 512 x 300: {sorted(times)[2]:.3f} s (median of 5)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("VOXELSTEM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="the folder of real scans")
    parser.add_argument("--phantoms", type=int, default=20, help="how many invented scans stand beside them")
    parser.add_argument("--quick", action="store_true", help="every eighth scan only")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    found = list(clean(chosen.data, chosen.phantoms))
    scans = [scan for scan, _ in found if scan is not None][:: 8 if chosen.quick else 1]
    lost = [what for scan, what in found if scan is None]
    refused = print_clean(scans, lost)
    total = len(scans) + len(lost)
    real = [scan for scan in scans if scan.modality == "CT" and not scan.name.startswith("phantom")]
    print(f"\n{'made from real scans':40s} {'n':>4s} {'refused as a CT':>12s}   as a file: kept out   codes")
    made, caught = measure(OF_CT, real)
    more, also = measure(OF_MR, [scan for scan in scans if scan.modality == "MR"])
    print("\nnot counted: values that some patient may have, and mirrors")
    measure(HARD, real)
    print()
    print_cost()
    share, false = (caught + also) / max(made + more, 1), refused / max(total, 1)
    print(f"faults refused: {caught + also} of {made + more}, {share:.2%} (goal >= {GOAL_FAULTS:.0%})")
    print(f"clean refused: {refused} of {total}, {false:.2%} (goal <= {GOAL_CLEAN:.0%})")


if __name__ == "__main__":
    main()
