"""What does a second task cost, once scans are embedded? One folder of features, shared by `adapt` and its repeats.

    python benchmarks/feature_cache.py [--out DIR] [--scans 40] [--repeats 3]

Draws phantoms at 3 mm, ingests them, and adapts an untrained network of `tiny.dino`'s size to a first task (classify
the contrast phase) with an empty folder of features, then to a second one (`survive`, invented times) with the same
folder; also as the commands that a user types, where starting Python is part of the second time. Everything is made
anew in every repeat; the median of ratios counts. Goal: at most 0.05 within one process.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from voxelstem import __version__, adapt, recipes
from voxelstem.card import Card, write_weights
from voxelstem.config import flatten
from voxelstem.demo import public_key
from voxelstem.ingest import ingest
from voxelstem.model import make_model
from voxelstem.sources.phantom import PhantomConfig, phantom_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/feature_cache"))
    parser.add_argument("--scans", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with public_key(asked.out):
        store, weights, tables = prepared(asked.out, asked.scans)
        ways: dict[str, Callable[..., None]] = {"one process": within, "commands": typed}
        print(f"voxelstem {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        print(f"{platform.platform()}, {os.cpu_count()} cores; {asked.scans} scans\n")
        print("| way | first task, s | second task, s | second / first |\n|---|---|---|---|")
        for name, way in ways.items():
            pairs = [both(asked.out, store, weights, tables, way) for _ in range(asked.repeats)]
            first, second = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
            ratio = statistics.median(two / one for one, two in pairs)
            print(f"| {name} | {first:.1f} | {second:.2f} | **{ratio:.3f}** |", flush=True)


def prepared(out: Path, scans: int) -> tuple[Path, Path, dict[str, Path]]:
    """A store, weights, and a label file for each task."""
    configs = [
        PhantomConfig(seed=seed, spacing_mm=(3.0, 3.0, 3.0), phase=("portal", "none")[seed % 2])
        for seed in range(scans)
    ]
    drawn, store, weights = out / "scans", out / "store", out / "weights"
    if not store.exists():
        files = phantom_files(drawn, configs)
        ingest([files.scans], store, labels=files.labels)
    labels = {"classify": drawn / "contrast.csv", "survive": out / "survival.csv"}
    with labels["classify"].open() as source, labels["survive"].open("w", newline="") as target:
        table = csv.writer(target)
        table.writerow(("subject", "time", "event"))
        for row, line in enumerate(csv.DictReader(source)):
            table.writerow((line["subject"], 10 + 7 * row % 31, int(row % 3 > 0)))
    if not weights.exists():
        recipe = recipes.named("tiny.dino")
        about = Card(architecture={"name": "scan_vit"} | flatten(recipe.backbone), spec=recipe.spec)
        model = make_model(about, seed=0)
        write_weights(weights, model.backbone.state_dict(), model.card)
    return store, weights, labels


def both(
    out: Path, store: Path, weights: Path, tables: dict[str, Path], way: Callable[..., None]
) -> tuple[float, float]:
    """Seconds of the first task, which embeds, and of the second."""
    shutil.rmtree(out / "features", ignore_errors=True)
    taken: list[float] = []
    for task, labels in tables.items():
        run = out / f"run-{task}"
        shutil.rmtree(run, ignore_errors=True)
        began = time.monotonic()
        way(task, weights, store, labels, run, out / "features")
        taken.append(time.monotonic() - began)
    return taken[0], taken[1]


def within(task: str, weights: Path, store: Path, labels: Path, run: Path, features: Path) -> None:
    settings = {"features": str(features)}
    adapt.run(weights=weights, store=store, labels=labels, task=task, mode="probe", out=run, settings=settings)


def typed(task: str, weights: Path, store: Path, labels: Path, run: Path, features: Path) -> None:
    words = ["--task", task, "--mode", "probe", "--weights", weights, "--store", store, "--labels", labels]
    command = [sys.executable, "-m", "voxelstem", "adapt", *words, "--out", run, f"features={features}"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


if __name__ == "__main__":
    main()
