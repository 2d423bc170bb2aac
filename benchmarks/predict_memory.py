"""How much memory a prediction holds: a scan of 512 x 512 x 800 voxels and a hundred classes, within 4 GiB.

    python benchmarks/predict_memory.py [--out DIR] [--shape 512 512 800] [--classes 104] [--max-ram 4] [--head tokens]

Makes a phantom's noise of that size as NIfTI, a run whose head has that many classes (its weights are drawn: what is
measured is memory, not skill), and lets `voxelstem predict` mark every voxel in a process of its own. Printed are the
process's largest resident memory as the kernel counted it, and its seconds. All logits at full resolution would take
classes x voxels x 4 bytes, which is printed beside.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from voxelstem.adapted import Made, resolve, write_run
from voxelstem.assurance import Assurance
from voxelstem.card import Card, write_weights
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.network import build
from voxelstem.finetune.tune import OWN
from voxelstem.model import make_model
from voxelstem.protocols import Head
from voxelstem.study import InputSpec

GIB = 1 << 30
VIT = {"name": "scan_vit", "patch_ijk": (4, 4, 4), "block_ijk": (32, 32, 32), "block.dim": 96, "block.depth": 2,
       "block.heads": 4, "scan.depth": 0}  # fmt: skip
UNET = {"name": "unet", "features": (8, 16), "depths": (1, 1), "strides": (1, 2), "block_ijk": (64, 64, 64)}


def scan(path: Path, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> None:
    """A body of noisy soft tissue in air, as int16."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    array = np.full(shape, -1000, dtype=np.int16)
    i, j = np.ogrid[: shape[0], : shape[1]]
    inside = ((i / shape[0] - 0.5) ** 2 + (j / shape[1] - 0.5) ** 2) < 0.16
    for plane in range(shape[2]):
        array[:, :, plane][inside] = rng.normal(40, 60, int(inside.sum())).astype(np.int16)
    nib.Nifti1Image(array, np.diag([*spacing_mm, 1.0])).to_filename(path)


def token_run(folder: Path, classes: tuple[str, ...]) -> Path:
    """A linear head on tokens of 12 mm at 3 mm."""
    spec = InputSpec(spacing_mm=(3.0, 3.0, 3.0), low_hu=-200.0, high_hu=300.0, block_ijk=(32, 32, 32))
    model = make_model(Card(architecture=VIT, spec=spec), seed=0)
    card = write_weights(folder / "weights", model.backbone.state_dict(), model.card)
    rng, dim = np.random.default_rng(0), 96
    arrays = {
        "middle": np.zeros(dim, np.float32),
        "scale": np.ones(dim, np.float32),
        "weight": rng.normal(size=(dim, 8 * (len(classes) + 1))).astype(np.float32),
        "bias": np.zeros(8 * (len(classes) + 1), np.float32),
    }
    head = Head(mode="probe", classes=classes, arrays=arrays, facts={"sub": 2.0})
    config = resolve("segment", "probe", budget=None, settings={})
    write_run(folder, config, Made(head=head, records=(), assurance=Assurance()), card)
    return folder


def unet_run(folder: Path, classes: tuple[str, ...]) -> Path:
    """A U-Net that labels voxels of 1.5 mm."""
    spec = InputSpec(spacing_mm=(1.5, 1.5, 1.5), low_hu=-200.0, high_hu=300.0, block_ijk=(64, 64, 64))
    model = make_model(Card(architecture=UNET, spec=spec), seed=0)
    config = resolve("segment", "full", budget=None, settings={"full.overlap": 0.25})
    net, card = build(model, out=len(classes) + 1, config=config.full or FinetuneConfig(), voxels=True, seed=0)
    card = write_weights(folder / "weights", dict(net.backbone.state_dict()), card)
    count = len(classes) + 1
    arrays = {"middle": np.zeros(count), "scale": np.ones(count), "weight": np.eye(count), "bias": np.zeros(count)}
    arrays |= {OWN + name: tensor.numpy() for name, tensor in net.own().items()}
    head = Head(mode="full", classes=classes, arrays=arrays, facts={"sub": 1.0})
    write_run(folder, config, Made(head=head, records=(), assurance=Assurance()), card)
    return folder


RUNS = {"tokens": token_run, "unet": unet_run}


def measure(path: Path, run: Path, out: Path, max_ram: float) -> tuple[float, float, int]:
    """Peak resident GiB, seconds and exit code of one prediction."""
    words = [sys.executable, "-m", "voxelstem", "predict", str(path), "--weights", str(run), "--out", str(out)]
    began = time.monotonic()
    process = subprocess.Popen([*words, "--format", "nifti", "--max-ram", str(max_ram)])
    _, status, used = _wait(process.pid)
    return used.ru_maxrss * 1024 / GIB, time.monotonic() - began, status >> 8


def _wait(pid: int) -> tuple[int, int, resource.struct_rusage]:
    return os.wait4(pid, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/predict_memory"))
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 800])
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.75, 0.75, 1.0])
    parser.add_argument("--classes", type=int, default=104)
    parser.add_argument("--max-ram", type=float, default=4.0)
    parser.add_argument("--head", nargs="+", choices=list(RUNS), default=list(RUNS))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"scan-{'x'.join(map(str, asked.shape))}.nii.gz"
    scan(path, tuple(asked.shape), tuple(asked.spacing))
    classes = tuple(f"structure {number}" for number in range(1, asked.classes + 1))
    whole = (asked.classes + 1) * float(np.prod(asked.shape)) * 4 / GIB
    print(f"{asked.shape} voxels, {asked.classes} classes: all logits would be {whole:.0f} GiB")
    print("| head | peak GiB (limit) | seconds | exit code |\n|---|---:|---:|---:|")
    for name in asked.head:
        folder = asked.out / f"{name}-{asked.classes}"
        if not folder.exists():
            RUNS[name](folder, classes)
        peak, seconds, code = measure(path, folder, asked.out / f"found-{name}", asked.max_ram)
        print(f"| {name} | {peak:.2f} ({asked.max_ram:g}) | {seconds:.0f} | {code} |", flush=True)
        facts = {"head": name, "shape": asked.shape, "classes": asked.classes, "peak_gib": peak, "seconds": seconds}
        (asked.out / f"{name}.json").write_text(json.dumps(facts | {"exit_code": code}, indent=1))


if __name__ == "__main__":
    main()
