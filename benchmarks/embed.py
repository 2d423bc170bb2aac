"""A whole scan to its embedding: ours against the original package of SPECTRE (`spectre-fm`), with the same weights.

    python benchmarks/embed.py [--sizes small base large] [--repeats 3] [--threads N] [--quick] [--peer-only]

A NIfTI file goes in and the scan's embedding comes out; every side runs in a process of its own, is made ready first
(imports, weights, one block), and then timed from opening the file. Sides take turns; medians are printed.

- peer, default: what `spectre embed` does, in fp32, 16 crops a pass, native spacing, centre crop.
- peer, best: the fastest of its precisions (fp32, bf16), crops a pass and threads, found first, on four blocks.
- ours, same voxels: `--like-spectre` at native spacing; fp32 as the network is written, by the fastest exact way, bf16.
- ours, whole scan: nothing cut away, which is more blocks than the peer looks at.

Weights are drawn from the names of tensors (`tests/golden/cases.py`) and imported by us from the peer's own files. The
scans are made here (a body in noisy air, so that no block is constant), then one with much air of one value, where we
compute one block for all of them; real ones are taken from `VOXELSTEM_DATA` or `../shared/data`. Last, a DICOM series
of 512 x 512 x 300 through our whole command with `tiny`.

Run it alone on the machine, in the peers' environment (`benchmarks/requirements-peers.txt`).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxelstem.engine.device import bf16_pays

HERE = Path(__file__).parent
REAL = ("ct/ts_aorta_full.nii.gz",)
SHAPES = {"small": (384, 384, 200), "base": (256, 256, 200), "large": (256, 256, 70)}
"""Scans made here: 27, 12 and 4 blocks for the peer, so that a turn lasts about ten seconds."""
AIRY = (512, 512, 200)
"""A scan with a body in the middle of much air."""
GOALS = {"small": (4.0, 2.0), "base": (4.0, 2.0), "large": (1.6, 1.6)}
"""How many times faster than the peer's default and best."""
GIB = 2**30
SPACING_MM = (0.75, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One way to embed."""

    name: str
    whose: str
    precision: str = "fp32"
    crops: int = 16
    threads: int = 2
    like_spectre: bool = True
    way: str = "auto"
    """Ours: the fastest that is exact, or the name of one, see `backbones.compute`."""


@dataclass(kw_only=True, slots=True)
class Measured:
    """What came of the turns of a side on one scan."""

    ready: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    way: str = ""
    failure: str = ""


# ---------------------------------------------------------------------------------------------- in a process of its own


def peer_network(weights: Path, size: str, precision: str) -> Any:
    """The peer's network as its preset makes it, with weights from files."""
    import torch
    from spectre import SpectreImageFeatureExtractor
    from spectre.presets import get_preset

    preset = get_preset(f"spectre-{size}")
    model = SpectreImageFeatureExtractor(
        preset.backbone,
        backbone_kwargs=preset.backbone_kwargs,
        backbone_checkpoint_path_or_url=str(weights / "backbone.pt"),
        feature_combiner_name=preset.feature_combiner,
        feature_combiner_kwargs=preset.feature_combiner_kwargs,
        feature_combiner_checkpoint_path_or_url=str(weights / "combiner.pt"),
    )
    return model.to(dtype=torch.bfloat16 if precision == "bf16" else torch.float32).eval()


def peer_embedding(model: Any, path: Path, crops_a_pass: int) -> np.ndarray:
    """As the peer's `embed` command goes about a file."""
    from spectre import load_and_window

    crops, grid, _ = load_and_window(path)
    (rows,) = model.extract([crops], grid_size=[grid], max_crops_per_forward=crops_a_pass)
    rows = rows.float().numpy()
    return np.concatenate([rows[0], rows[1:].mean(axis=0)])


def peer_embedder(weights: Path, size: str, side: Side) -> tuple[Callable[[Path], np.ndarray], str]:
    """The peer, ready to embed files."""
    model = peer_network(weights, size, side.precision)
    return lambda path: peer_embedding(model, path, side.crops), ""


def our_embedder(weights: Path, side: Side) -> tuple[Callable[[Path], np.ndarray], str]:
    """Ours, ready to embed files, and which way through the network it took."""
    import voxelstem
    from voxelstem.weights.hub import load

    model = load(weights / "ours")
    computing = model.computing(side.precision, only=side.way)

    def embed(path: Path) -> np.ndarray:
        return model.embed(voxelstem.read(path), computing=computing, like_spectre=side.like_spectre).scan

    return embed, computing.name


def child(order: dict[str, Any]) -> None:
    """Take one turn and say what it cost, in JSON."""
    import torch

    began = time.perf_counter()
    side, weights = Side(**order["side"]), Path(order["weights"])
    torch.set_num_threads(side.threads)
    ours = side.whose == "ours"
    embed, way = our_embedder(weights, side) if ours else peer_embedder(weights, order["size"], side)
    embed(Path(order["warm"]))
    ready = time.perf_counter() - began
    spent, began = processor_seconds(), time.perf_counter()
    embedding = embed(Path(order["scan"]))
    clock, spent = time.perf_counter() - began, processor_seconds() - spent
    np.save(order["out"], embedding)
    print(json.dumps({"ready": ready, "clock": clock, "processor": spent, "peak": peak_bytes(), "way": way}))


def processor_seconds() -> float:
    """Of this process and those that it waited for."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def peak_bytes() -> int:
    """Most memory ever held; not `ru_maxrss`, which a process inherits from the one that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def tune(order: dict[str, Any]) -> None:
    """Seconds of the peer for each crop in one precision, for all its other settings, in JSON."""
    import torch

    model = peer_network(Path(order["weights"]), order["size"], order["precision"])
    peer_embedding(model, Path(order["warm"]), 1)
    found: dict[str, float] = {}
    for crops, threads in order["settings"]:
        torch.set_num_threads(threads)
        began = time.perf_counter()
        peer_embedding(model, Path(order["scan"]), crops)
        found[f"{order['precision']} {crops} {threads}"] = (time.perf_counter() - began) / order["count"]
        if min(found.values()) > 1.5 * order["hopeless"]:
            break  # this precision can not win on this machine
    print(json.dumps(found))


# ----------------------------------------------------------------------------------------------- in the first one


def call(verb: str, order: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run a part in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), verb, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["nothing said"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_weights(folder: Path, size: str, *, ours: bool) -> int:
    """The peer's two files, and ours made from them; the bytes of the former."""
    import torch
    from parity import cases, shapes_of
    from spectre import models
    from spectre.presets import BACKBONE_KWARGS, COMBINER_KWARGS

    folder.mkdir()
    with torch.device("meta"):
        backbone = getattr(models, f"vit_{size}_patch16_128")(**BACKBONE_KWARGS)
        combiner = getattr(models, f"feat_vit_{size}")(patch_dim=2 * backbone.embed_dim, **COMBINER_KWARGS)
    for part, module in (("backbone", backbone), ("combiner", combiner)):
        state = cases.fill(part, shapes_of(module), rope_base=cases.ROPE_BASES[part])
        torch.save(state, folder / f"{part}.pt")
    if ours:
        from voxelstem.study import INPUT_SPECS
        from voxelstem.weights.spectre import SpectreFiles, import_spectre

        files = SpectreFiles(backbone=folder / "backbone.pt", combiner=folder / "combiner.pt")
        import_spectre(files, folder / "ours", spec=INPUT_SPECS["ct-native"])
    return sum((folder / f"{part}.pt").stat().st_size for part in ("backbone", "combiner"))


def write_scan(path: Path, shape: tuple[int, int, int], *, wide_air: bool = False) -> Path:
    """A body of smooth tissue in air as NIfTI; with `wide_air` a thin one, in air of one value."""
    import nibabel
    from ingest import scan

    hu = scan((shape[2], shape[1], shape[0]), seed=1).transpose(2, 1, 0) - 1024
    if wide_air:
        i, j = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
        hu[(i / 0.4) ** 2 + (j / 0.45) ** 2 > 1] = -1024
    nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), np.diag([*SPACING_MM, 1.0])), path)
    return path


def best_of_peer(weights: Path, size: str, threads: int) -> Side:
    """Try the settings of the peer that change its speed, print all, take the fastest."""
    found: dict[str, float] = {}
    settings = [(crops, threads) for crops in (1, 2, 4)] + [(1, 1)] * (threads > 1)
    order: dict[str, Any] = {"weights": str(weights), "size": size, "settings": settings, "count": 4}
    order |= {name: str(weights.parent / f"{file}.nii.gz") for name, file in (("scan", "four"), ("warm", "warm"))}
    for precision in ("fp32", "bf16"):
        order |= {"precision": precision, "hopeless": min(found.values(), default=float("inf"))}
        answer = call("tune", order, threads)
        if "failed" in answer:
            print(f"  peer in {precision}: {answer['failed']}")
        else:
            found |= answer
    said = ", ".join(f"{name.replace(' ', '/')} {seconds:.2f}" for name, seconds in sorted(found.items()))
    print(f"\npeer, {size}: seconds a crop by precision/crops a pass/threads: {said}", flush=True)
    precision, crops, count = min(found, key=lambda name: found[name]).split()
    name = f"peer, best ({precision}, {crops} a pass, {count} threads)"
    return Side(name=name, whose="peer", precision=precision, crops=int(crops), threads=int(count))


def sides(best: Side, threads: int, *, peer_only: bool) -> list[Side]:
    """Everybody, the peer's default first."""
    peers = [Side(name="peer, default (fp32, 16 crops)", whose="peer", threads=threads), best]
    if peer_only:
        return peers
    ours = functools.partial(Side, whose="ours", threads=threads)
    wanted = [
        *peers,
        ours(name="ours, same voxels, fp32 as written", way="reference"),
        ours(name="ours, same voxels, fp32"),
        ours(name="ours, whole scan, fp32", like_spectre=False),
    ]
    if bf16_pays(torch.device("cpu")):
        wanted += [
            ours(name="ours, same voxels, bf16", precision="bf16"),
            ours(name="ours, whole scan, bf16", like_spectre=False, precision="bf16"),
        ]
    return wanted


def emulated(weights: Path) -> None:
    """What bf16 costs on a processor without it, on one block: a whole scan would take too long."""
    from voxelstem.model import load

    model = load(weights / "ours")
    tried = [model.computing(precision, only="lean") for precision in ("fp32", "bf16")]
    said = " and ".join(f"{one.seconds_per_block:.2f} s in {one.precision}" for one in tried)
    print(f"\nno bf16 in this processor: ours takes {said} for a block; error in bf16 {tried[1].relative_error:.1e}")


def compare(
    title: str, everyone: list[Side], size: str, scan: Path, weights: Path, *, bytes_of_weights: int, repeats: int
) -> None:
    """Let all sides take turns on one scan and print the medians."""
    measured = {side.name: Measured() for side in everyone}
    for _, side in itertools.product(range(repeats), everyone):
        into = measured[side.name]
        order: dict[str, Any] = {"side": asdict(side), "size": size, "weights": str(weights), "scan": str(scan)}
        order |= {"warm": str(weights.parent / "warm.nii.gz"), "out": str(weights / f"{side.name}.npy")}
        answer = call("child", order, side.threads)
        if "failed" in answer:
            into.failure = answer["failed"]
            continue
        into.way = answer["way"]
        for name in ("ready", "clock", "processor", "peak"):
            getattr(into, name).append(answer[name])
    print_table(title, everyone, measured, size, weights, bytes_of_weights=bytes_of_weights)


def print_table(
    title: str, everyone: list[Side], measured: dict[str, Measured], size: str, weights: Path, *, bytes_of_weights: int
) -> None:
    """Medians of all sides; ratios by the clock."""
    limit = 1.5 * bytes_of_weights + GIB
    print(f"\n| {title} | clock s | processor s | ready s | peak GiB | x default | x best | max\\|a-b\\|/max\\|b\\| |")
    print("|---|---|---|---|---|---|---|---|")
    base = [statistics.median(measured[side.name].clock or [float("nan")]) for side in everyone[:2]]
    for side in everyone:
        one = measured[side.name]
        if not one.clock:
            print(f"| {side.name} | failed: {one.failure} |")
            continue
        clock, spent, ready, peak = (
            statistics.median(values) for values in (one.clock, one.processor, one.ready, one.peak)
        )
        apart = distance(weights, side, everyone[0]) if side.like_spectre else "other voxels"
        ratios = " | ".join(f"{other / clock:.2f}" for other in base)
        name = f"{side.name} ({one.way})" if one.way else side.name
        print(f"| {name} | {clock:.2f} | {spent:.1f} | {ready:.1f} | {peak / GIB:.2f} | {ratios} | {apart} |")
    goals = GOALS.get(size, (1.0, 1.0))
    print(
        f"goals, same voxels: >= {goals[0]}x default, >= {goals[1]}x best; <= 1e-2 in bf16; "
        f"peak <= {limit / GIB:.2f} GiB (weights {bytes_of_weights / GIB:.2f})",
        flush=True,
    )


def distance(weights: Path, side: Side, reference: Side) -> str:
    """How far a side's embedding is from that of the peer's default."""
    found, wanted = (np.load(weights / f"{each.name}.npy") for each in (side, reference))
    return (
        f"{np.abs(found - wanted).max() / np.abs(wanted).max():.1e}" if found.shape == wanted.shape else "other shape"
    )


def dicom_series(folder: Path, threads: int, repeats: int, *, slices: int, edge: int) -> None:
    """Time our whole command on a DICOM series, with `tiny`, in the spacing that SPECTRE's second stage saw."""
    from ingest import write_series

    weights, series = folder / "tiny", folder / "series"
    write_weights(weights, "tiny", ours=True)
    write_series(series, (slices, edge, edge), 1, compressed=False)
    command = [sys.executable, "-m", "voxelstem", "embed", str(series), "--weights", str(weights / "ours")]
    key = weights.parent / "site.key"
    key.write_text("00" * 32)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VOXELSTEM_KEY": str(key)}
    print(f"\n| DICOM {edge} x {edge} x {slices} with tiny, whole command | clock s | processor s |\n|---|---|---|")
    bf16 = [["--precision", "bf16"]] if bf16_pays(torch.device("cpu")) else []
    for options in ([], ["--like-spectre"], *bf16):
        clock, spent = [], []
        for turn in range(repeats):
            used, began = processor_seconds(), time.perf_counter()
            out = folder / f"out-{turn}-{'-'.join(options)}"
            whole = [*command, "--out", str(out), *options]
            done = subprocess.run(whole, env=environment, capture_output=True, text=True, check=False)
            clock.append(time.perf_counter() - began)
            spent.append(processor_seconds() - used)
            if done.returncode:
                print(f"| {' '.join(options)} | failed: {(done.stderr.strip().splitlines() or [''])[-1]} |")
                break
        else:
            name = " ".join(["voxelstem embed", *options])
            print(f"| {name} | {statistics.median(clock):.2f} | {statistics.median(spent):.1f} |")
    print("goal: <= 10 s", flush=True)


def real_scans() -> list[Path]:
    """Those that are here."""
    data = Path(os.environ.get("VOXELSTEM_DATA", HERE.parent.parent / "shared" / "data"))
    return [data / name for name in REAL if (data / name).exists()]


def compare_size(size: str, folder: Path, asked: argparse.Namespace) -> None:
    """All scans for one size of the network."""
    weights = folder / size
    held = write_weights(weights, size, ours=not asked.peer_only)
    shape = (256, 128, 70) if asked.quick else SHAPES[size]
    best = best_of_peer(weights, size, asked.threads)
    everyone = sides(best, asked.threads, peer_only=asked.peer_only)
    name = " x ".join(map(str, shape))
    if not asked.peer_only and not bf16_pays(torch.device("cpu")):
        emulated(weights)
    scans = {f"{size}, made {name}": write_scan(folder / f"{size}-made.nii.gz", shape)}
    if not asked.quick and size == asked.sizes[0]:
        scans |= {f"{size}, real {path.name}": path for path in real_scans()}
    for title, scan in scans.items():
        compare(title, everyone, size, scan, weights, bytes_of_weights=held, repeats=asked.repeats)
    if size == asked.sizes[0]:
        airy = write_scan(folder / f"{size}-airy.nii.gz", shape if asked.quick else AIRY, wide_air=True)
        few = [side for side in everyone if side.whose == "peer" or side.precision == "fp32"]
        title = f"{size}, much air of one value, made {' x '.join(map(str, AIRY))}"
        compare(title, few, size, airy, weights, bytes_of_weights=held, repeats=max(1, asked.repeats - 2))
    for file in weights.rglob("*.*"):
        file.unlink()


def main() -> None:
    """Prepare, take turns, print tables that can be pasted."""
    if len(sys.argv) == 3 and sys.argv[1] in ("child", "tune"):
        {"child": child, "tune": tune}[sys.argv[1]](json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a scan of two blocks, to see that it runs")
    parser.add_argument("--peer-only", action="store_true", help="leave ours out")
    parser.add_argument("--no-dicom", action="store_true", help="leave the DICOM series out")
    asked = parser.parse_args()
    from parity import machine

    versions = ", ".join(f"{name} {version(name)}" for name in ("spectre-fm", "voxelstem", "torch"))
    print(f"{machine()}, {asked.threads} threads, {versions}; median of {asked.repeats} turns, a process each")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_scan(folder / "warm.nii.gz", (128, 128, 64))
        write_scan(folder / "four.nii.gz", (256, 256, 64))
        for size in asked.sizes:
            compare_size(size, folder, asked)
        if not (asked.no_dicom or asked.peer_only):
            slices, edge = (70, 256) if asked.quick else (300, 512)
            dicom_series(folder, asked.threads, asked.repeats, slices=slices, edge=edge)


if __name__ == "__main__":
    main()
