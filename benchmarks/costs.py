"""What small parts cost that many others stand on: gates, phantoms, calibration, intervals and surface Dice.

    python benchmarks/costs.py [--rounds 5]

Each round runs every part once, one after another, so that a busy machine slows all of them; the median of the rounds
is printed, with MONAI's surface Dice beside ours on the same masks: a shape that has moved, and one with marks
scattered over the scan, as networks of few labels leave them. One thread.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from monai.metrics.surface_dice import compute_surface_dice

from voxelstem import metrics
from voxelstem.certainty.vennabers import steps_of
from voxelstem.heads.risks import Concordance, Foretold
from voxelstem.sources import gates
from voxelstem.sources.brain import BrainConfig, brain
from voxelstem.sources.paired import PairedConfig, paired
from voxelstem.study import Survival
from voxelstem.surfaces import surface_dice
from voxelstem.tasks.classify import Guess, Measure

SPACING_MM, TOLERANCE_MM = (1.5, 1.5, 1.5), 2.0


def masks(scattered: bool) -> tuple[np.ndarray, np.ndarray]:
    """A block of 80 voxels in a scan of 160, and the same moved by two, with or without marks all over the scan."""
    truth = np.zeros((160, 160, 160), np.bool_)
    truth[40:120, 40:120, 40:120] = True
    found = np.roll(truth, 2, 0)
    return (found ^ (np.random.default_rng(0).random(truth.shape) < 0.01) if scattered else found), truth


def monai_surface_dice(found: np.ndarray, truth: np.ndarray) -> float:
    """MONAI's own, in the box of both masks, which is its best."""
    box = tuple(slice(int(along.min()), int(along.max()) + 1) for along in np.nonzero(found | truth))
    sides = [torch.from_numpy(np.pad(mask[box], 1).astype(np.float32))[None, None] for mask in (found, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        value = compute_surface_dice(
            sides[0],
            sides[1],
            class_thresholds=[TOLERANCE_MM],
            include_background=True,
            spacing=list(SPACING_MM),
            use_subvoxels=True,
        )
    return float(value[0, 0])


def parts() -> dict[str, Callable[[], object]]:
    """Name to what is timed."""
    rng, seeds = np.random.default_rng(0), itertools.count()  # nobody is drawn twice: parts of them are remembered
    scan = np.empty((512, 512, 300), np.float32)
    scan[:] = np.linspace(-120, 130, 300, dtype=np.float32)
    scan[:, :, :150] = -1000
    stated = rng.random(16_000)
    came = rng.random(16_000) < stated
    chances = rng.random(300).tolist()
    guesses = {f"{at:03}": Guess(truth=int(p > rng.random()), scores=(1 - p, p)) for at, p in enumerate(chances)}
    watched = {
        f"{at:03}": Foretold(
            truth=Survival(time=float(rng.exponential()), event=bool(rng.random() < 0.6)),
            risk=risk,
            chances=(),
            alive=(),
            shares=(),
            weight=1.0,
        )
        for at, risk in enumerate(chances)
    }
    found: dict[str, Callable[[], object]] = {
        "gate of values, CT of 512 x 512 x 300": lambda: gates.check_hu(scan),
        "phantom brain": lambda: brain(BrainConfig(seed=next(seeds))),
        "phantom with a report, 4 mm": lambda: paired(PairedConfig(seed=next(seeds))),
        "Venn-Abers, 4,000 scores": lambda: steps_of([(stated[:4000], came[:4000])]),
        "Venn-Abers, 16,000 scores": lambda: steps_of([(stated, came)]),
        "interval of AUROC, 300 subjects": lambda: metrics.bootstrap_interval(guesses, Measure("auroc")),
        "interval of Harrell's C, 300 subjects": lambda: metrics.bootstrap_interval(watched, Concordance(uno=False)),
    }
    for kind, scattered in (("moved", False), ("scattered", True)):
        one, other = masks(scattered)
        found[f"surface Dice, {kind}"] = lambda a=one, b=other: surface_dice(
            a, b, SPACING_MM, tolerance_mm=TOLERANCE_MM
        )
        found[f"surface Dice, {kind}, MONAI"] = lambda a=one, b=other: monai_surface_dice(a, b)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tried = parts()
    seconds: dict[str, list[float]] = {name: [] for name in tried}
    for _ in range(asked.rounds + 1):  # the first one warms up
        for name, part in tried.items():
            began = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(took[1:])) for name, took in seconds.items()}
    print("| part | median s |\n|---|---|")
    for name, took in median.items():
        beside = median.get(f"{name}, MONAI")
        print(f"| {name} | {took:.3f}{'' if beside is None else f' ({beside / took:.1f} times as fast as MONAI)'} |")


if __name__ == "__main__":
    main()
