"""What gradient caching costs and saves: aligning whole scans with their reports, a frozen text tower beside them.

    python benchmarks/align.py [--threads 1] [--repeats 3] [--keep align.json] [--recompute] [--precision fp32]

Memory: a step (forward, backward, AdamW) of a batch of 4 whole scans and of 64, each in a process of its own: the
highest resident memory less what the program held before the batch was made (both are printed), so the scans themselves
count. Goal: 64 scans take at most 1.3 times what 4 take. Without caching 4 and 16 show what it would have been.

Time: a step of 8 scans, two at a time, against the ideal sum: twice the forward of every scan and once its backward,
measured apart. Goal: at most 1.6 times. Sides take turns in one process; medians. The table also names the step without
caching, of the same scans at once.

A scan is 64 x 64 x 32 voxels in 2 x 2 x 1 blocks of 512 patches; both levels are 144 wide, six and two deep. Small
models need small patches here for the same reason that large ones do not: a patch's activations must outweigh its
voxels, which all wait in memory, for memory to be bounded by activations at all.

A chunk is two scans. Besides its activations and the scans, every further chunk added about half a MB here; with
chunks of one scan this small model's 64 scans took 1.35 times what 4 took.

Each process whose memory is measured asks the C library to give large pieces back as soon as they are free
(MALLOC_MMAP_THRESHOLD_): by itself it moves that limit up to 32 MB, and holes between what was freed count as in use.

With `--keep`, what was measured is kept in that file and not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GRID, BLOCK, PATCH = (2, 2, 1), (32, 32, 32), (4, 4, 4)
WIDTH, DEPTH = 144, 6
FEW, MANY, PLAIN, TIMED = 4, 64, 16, 8
CHUNK = 2
MEMORY_GOAL, TIME_GOAL = 1.3, 1.6
MB = 1 << 20


def make_trainee(chunk: int, asked: argparse.Namespace) -> Any:
    import torch

    from voxelstem.backbones.encoder import EncoderConfig
    from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
    from voxelstem.engine.optim import OptimConfig
    from voxelstem.engine.parallel import ParallelConfig, Trainee
    from voxelstem.objectives.siglip import Siglip, SiglipConfig

    torch.manual_seed(0)
    sizes = {"dim": WIDTH, "heads": 4}
    level, scan = EncoderConfig(depth=DEPTH, **sizes), EncoderConfig(depth=2, rope_base=100.0, **sizes)
    backbone = ScanVit(ScanVitConfig(patch_ijk=PATCH, block_ijk=BLOCK, block=level, scan=scan))
    objective = Siglip(SiglipConfig(hidden=512, bottleneck=128, out=256, chunk=chunk), backbone)
    parallel = ParallelConfig(recompute=asked.recompute)
    return Trainee(objective, OptimConfig(), parallel, device=torch.device("cpu"), precision=asked.precision)


def texts_of(scans: int) -> tuple[str, ...]:
    return tuple(f"Nodule of {n} mm in the left upper lobe. No effusion." for n in range(scans))


def make_batch(scans: int) -> Any:
    import torch

    from voxelstem.protocols import Batch

    size = [cells * edge for cells, edge in zip(GRID, BLOCK, strict=True)]
    voxels = torch.rand(scans, 1, 1, *size, generator=torch.Generator().manual_seed(0))
    places = {"global": torch.zeros(scans, 1, 2, 3)}
    return Batch(views={"global": voxels}, places_mm=places, seed=1, texts=texts_of(scans))


def resident(line: str) -> float:
    """MB from the kernel's book: `VmRSS` now, `VmHWM` at most so far. The latter does not hold what a parent used."""
    (found,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(line)]
    return int(found.split()[1]) / 1024


def memory(scans: int, chunk: int, asked: argparse.Namespace) -> dict[str, float]:
    """One step in this process; the tower has read the texts before, as it would have in an earlier step."""
    trainee = make_trainee(chunk, asked)
    trainee.objective.tower(texts_of(scans))
    before, high = resident("VmRSS"), resident("VmHWM")
    batch = make_batch(scans)
    began = time.perf_counter()
    trainee.backward(batch, progress=0.5)
    trainee.update()
    seconds = time.perf_counter() - began
    if resident("VmHWM") <= high:
        raise SystemExit("the step stayed below what the start took: nothing was measured")
    return {"baseline": before, "added": resident("VmHWM") - before, "seconds": seconds, "scans_mb": scans_mb(batch)}


def scans_mb(batch: Any) -> float:
    view = batch.views["global"]
    return view.numel() * view.element_size() / MB


def forward_and_backward(trainee: Any, batch: Any) -> tuple[float, float]:
    """Seconds of the forwards of all scans, chunk by chunk, and of their backwards."""
    import torch

    from voxelstem.engine import device as devices

    forward = backward = 0.0
    for at in range(0, len(batch), CHUNK):
        one = batch.part(at, at + CHUNK)
        began = time.perf_counter()
        with devices.autocast(torch.device("cpu"), trainee._precision):
            rows = trainee.objective.embed_scans(one.views["global"][:, 0], one.chance)
        middle = time.perf_counter()
        rows.backward(torch.ones_like(rows))
        forward, backward = forward + middle - began, backward + time.perf_counter() - middle
    trainee.drop()
    return forward, backward


def timed_step(trainee: Any, batch: Any) -> float:
    began = time.perf_counter()
    trainee.backward(batch, progress=0.5)
    seconds = time.perf_counter() - began
    trainee.drop()
    return seconds


def clock(asked: argparse.Namespace) -> dict[str, float]:
    """Medians of turns: forward and backward apart, a step with caching, a step without."""
    cached, plain = make_trainee(CHUNK, asked), make_trainee(TIMED, asked)
    batch = make_batch(TIMED)
    for trainee in (cached, plain):
        timed_step(trainee, batch.part(0, 2))
    turns: dict[str, list[float]] = {"forward": [], "backward": [], "cached": [], "plain": []}
    for _ in range(asked.repeats):
        forward, backward = forward_and_backward(cached, batch)
        found = {"forward": forward, "backward": backward}
        found |= {"cached": timed_step(cached, batch), "plain": timed_step(plain, batch)}
        for name, seconds in found.items():
            turns[name].append(seconds)
    ratios = [
        step / (2 * one + back)
        for step, one, back in zip(turns["cached"], turns["forward"], turns["backward"], strict=True)
    ]
    return {name: statistics.median(seconds) for name, seconds in turns.items()} | {"ratio": statistics.median(ratios)}


CASES = {
    "4 cached": lambda asked: memory(FEW, CHUNK, asked),
    "64 cached": lambda asked: memory(MANY, CHUNK, asked),
    "4 plain": lambda asked: memory(FEW, FEW, asked),
    "16 plain": lambda asked: memory(PLAIN, PLAIN, asked),
    "time": clock,
}


def measured(name: str, asked: argparse.Namespace) -> dict[str, float]:
    """The case in a process of its own, or what is kept of it."""
    kept: dict[str, Any] = json.loads(asked.keep.read_text()) if asked.keep and asked.keep.exists() else {}
    key = f"{name}, {asked.precision}, {asked.threads} threads{', recompute' * asked.recompute}"
    if key not in kept:
        options = ["--threads", asked.threads, "--repeats", asked.repeats, "--precision", asked.precision]
        command = [sys.executable, __file__, "--case", name, *options, *["--recompute"] * asked.recompute]
        around = os.environ | ({} if name == "time" else {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)})
        words = [str(word) for word in command]
        told = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=around).stdout
        kept[key] = json.loads(told.splitlines()[-1])
        if asked.keep:
            asked.keep.write_text(json.dumps(kept, indent=1))
    return kept[key]


def report(asked: argparse.Namespace) -> None:
    print(f"{'case':<12}{'program MB':>12}{'added MB':>10}{'of it scans':>13}{'step s':>9}")
    found = {name: measured(name, asked) for name in CASES}
    for name, one in found.items():
        if name != "time":
            row = (one["baseline"], one["added"], one["scans_mb"], one["seconds"])
            print(f"{name:<12}{row[0]:>12.0f}{row[1]:>10.0f}{row[2]:>13.0f}{row[3]:>9.1f}")
    few, many, plain = (found[name]["added"] for name in ("4 cached", "64 cached", "16 plain"))
    print(f"memory, 64 scans against 4: {many / few:.2f} x (goal <= {MEMORY_GOAL})")
    print(f"memory, 16 scans without caching against 64 with: {plain / many:.1f} x")
    one = found["time"]
    print(
        f"step of {TIMED} scans: {one['cached']:.2f} s (forward {one['forward']:.2f}, backward {one['backward']:.2f})"
    )
    print(f"time against 2 forwards + 1 backward: {one['ratio']:.2f} x (goal <= {TIME_GOAL})")
    print(f"time against a step without caching ({one['plain']:.2f} s): {one['cached'] / one['plain']:.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing inside each chunk, too")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--case", choices=tuple(CASES), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is None:
        report(asked)
        return
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    import torch

    torch.set_num_threads(asked.threads)
    print(json.dumps(CASES[asked.case](asked)))


if __name__ == "__main__":
    main()
