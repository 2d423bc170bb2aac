"""Resampling of one CT scan on one core: ours against scipy, interleaved.

    python benchmarks/resample.py [--repeats 5] [--small]

The scan is noise of 512 x 512 x 300 voxels at 0.75 x 0.75 x 1 mm. Coarser: to 1.5 x 1.5 x 2 mm; scipy needs a filter of
its own against aliasing (`gaussian_filter`, then `zoom`). Finer: to 1 mm from there, where both give the same voxels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
from scipy import ndimage

from voxelstem.resampling import resample

Triple = tuple[float, float, float]


def ours(array: np.ndarray, have: Triple, wanted: Triple) -> np.ndarray:
    return resample(array[None], np.diag([*have, 1.0]), wanted)[0][0]


def by_scipy(array: np.ndarray, have: Triple, wanted: Triple) -> np.ndarray:
    steps = [new / old for old, new in zip(have, wanted, strict=True)]
    if max(steps) > 1:
        array = ndimage.gaussian_filter(array, [max(0.0, (step - 1) / 2) for step in steps])
    return ndimage.zoom(array, [1 / step for step in steps], order=1, mode="nearest", grid_mode=True)


def seconds(call: Callable[[], np.ndarray]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    shape = (128, 128, 75) if options.small else (512, 512, 300)
    scan = np.random.default_rng(0).normal(0, 300, shape).astype(np.float32)
    half = ours(scan, (0.75, 0.75, 1.0), (1.5, 1.5, 2.0))
    cases: dict[str, tuple[np.ndarray, Triple, Triple]] = {
        "coarser": (scan, (0.75, 0.75, 1.0), (1.5, 1.5, 2.0)),
        "finer": (half, (1.5, 1.5, 2.0), (1.0, 1.0, 1.0)),
    }
    apart = np.abs(ours(*cases["finer"]) - by_scipy(*cases["finer"])).max()
    print(f"finer: largest difference to scipy {apart:.2g}")
    for name, case in cases.items():
        times = [(seconds(lambda: ours(*case)), seconds(lambda: by_scipy(*case))) for _ in range(options.repeats)]  # noqa: B023
        mine, theirs = (statistics.median(side) for side in zip(*times, strict=True))
        tracemalloc.start()
        result = ours(*case)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(
            f"{name}: {case[0].shape} -> {result.shape}: ours {mine:.2f} s, scipy {theirs:.2f} s, ratio "
            f"{theirs / mine:.1f}; beside input and output {(peak - result.nbytes) / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
