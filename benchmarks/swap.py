"""What each part of the brain-MRI objectives is good for, on phantom brains: swap, skips, and terms of anatomy.

    python benchmarks/swap.py --steps 300 --seeds 3 --out swap.json

Every line is one way to pretrain with the same data, steps and seeds; ways take turns, seed by seed, and what is done
is kept in --out, so that a run that was stopped goes on; a page with the table lies beside it. Figures are of people
whom no training saw:

- `swap`: error of a FLAIR painted from the subject in T1w and the contrast of FLAIR, by the error with T1w's contrast
  (1: the contrast's latent decides nothing; nearer to 0 is better).
- `masked`: squared error of hidden voxels, painted by the U-Net's decoder; NaN where there is none.
- `volumes`: R2 of ridge regression from the bottleneck's mean to the volume of ventricles, as a share of the head.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV

from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.engine.optim import OptimConfig, make_optimizer, set_rate
from voxelstem.losses.masked import masked_mse, smooth_l1
from voxelstem.objectives.disentangle import Disentangle, DisentangleConfig
from voxelstem.protocols import Batch
from voxelstem.report import page
from voxelstem.sources.brain import INTRACRANIAL, VOLUME_LABEL, BrainConfig, brain
from voxelstem.views.mask import draw_voxels

EDGE = 16
TRAINED, UNSEEN = 256, 48
OPTIM = OptimConfig(kind="muon", momentum=0.95, lr=6e-3)
NETWORK = UNetConfig(features=(8, 16, 32), depths=(1, 1, 1), strides=(1, 2, 2), block_ijk=(EDGE,) * 3, skips="dropped")
OURS = DisentangleConfig(
    latent=16,
    mask_ratio=0.25,
    masked_weight=1.0,
    anatomy_weight=1.0,
    columns=1,
    background="ignored",
    kl_weight=1e-4,
    subject_weight=0.0,
    nt_xent_weight=0.5,
    temperature=0.5,
    leak_weight=2.0,
    name_weight=1.0,
)
WAYS: dict[str, tuple[UNetConfig, DisentangleConfig]] = {
    "ours": (NETWORK, OURS),
    "released swap": (NETWORK, replace(OURS, swap="released", repel_copies=True)),
    "no swap": (NETWORK, replace(OURS, cross_weight=0.0)),
    "full skips": (replace(NETWORK, skips="full"), OURS),
    "no skips": (replace(NETWORK, skips="none"), OURS),
    "no anatomy": (NETWORK, replace(OURS, anatomy_weight=0.0)),
}


def people(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """T1w, FLAIR (both in [0, 1]) and the share of ventricles of invented people."""
    scans: list[torch.Tensor] = []
    shares: list[float] = []
    for contrast in ("T1w", "FLAIR"):
        like = BrainConfig(seed=0, contrast=contrast, shape_ijk=(EDGE,) * 3, spacing_mm=(160.0 / EDGE,) * 3, scanner=0)
        studies = [brain(replace(like, seed=seed)) for seed in range(first, first + count)]
        arrays = [torch.from_numpy(study.volumes[0].array).float() for study in studies]
        scans.append(torch.stack([(array / array.flatten().quantile(0.99)).clamp(0, 1) for array in arrays]))
        ventricles, head = (f"{VOLUME_LABEL}{name}" for name in ("ventricles", INTRACRANIAL))
        shares = [float(study.labels[ventricles]) / float(study.labels[head]) for study in studies]
    return scans[0], scans[1], np.array(shares)


def train(network: UNetConfig, config: DisentangleConfig, *, steps: int, seed: int) -> Disentangle:
    """Pretrain on pairs whose order is drawn."""
    a, b, shares = people(0, TRAINED)
    volumes = torch.from_numpy((shares - shares.mean()) / shares.std()).float()[:, None]
    torch.manual_seed(seed)
    objective = Disentangle(config, UNet(network))
    optimizer = make_optimizer(objective, objective.learner.param_groups(), OPTIM)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        rows = torch.from_numpy(rng.permutation(TRAINED)[:8])
        swapped = torch.from_numpy(rng.random(8) < 0.5)
        turned = swapped[:, None, None, None, None]
        pair = torch.where(turned, b[rows], a[rows]), torch.where(turned, a[rows], b[rows])
        views = {name: side[:, None] for name, side in zip(("global", "other"), pair, strict=True)}
        contrast = torch.stack([swapped, ~swapped], dim=1).float()
        targets = {"copy": torch.zeros(8, 1), "volumes": volumes[rows], "contrast": contrast}
        batch = Batch(views=views, places_mm={}, seed=seed * steps + step, targets=targets)
        set_rate(optimizer, OPTIM, progress=step / steps)
        objective.step(batch, progress=step / steps).loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return objective.eval()


@torch.no_grad()
def score(objective: Any) -> dict[str, float]:
    """The three figures, on people nobody saw."""
    network, sides = objective.backbone, objective.sides
    a, b, shares = people(10_000, UNSEEN)
    subject = sides.latents(network.features(a)).subject_mean
    contrasts = [sides.latents(network.features(each)).contrast_mean for each in (b, a)]
    own, others = (float(smooth_l1(sides.reconstruct(subject, each), b).value) for each in contrasts)
    batch = Batch(views={"global": a[:, None]}, places_mm={}, seed=1)
    hidden = draw_voxels(batch.chance, (EDGE,) * 3, block_ijk=(4, 4, 4), ratio=0.5)
    error = masked_mse(network.decode(network.features(a.masked_fill(hidden, 0.0))), a, hidden, counted=a > 0).value
    seen, _, truth = people(0, TRAINED)
    fitted = RidgeCV(np.logspace(-3, 3, 13)).fit(network.encode_blocks(seen)[0].numpy(), truth)
    r2 = fitted.score(network.encode_blocks(a)[0].numpy(), shares)
    return {"swap": own / others, "masked": float(error), "volumes": float(r2)}


def main() -> None:
    """Run what is not done yet, and print medians over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("swap.json"))
    wanted = parser.parse_args()
    done: dict[str, dict[str, float]] = json.loads(wanted.out.read_text()) if wanted.out.exists() else {}
    for seed in range(wanted.seeds):
        for way, (network, config) in WAYS.items():
            name = f"{way}, {wanted.steps} steps, seed {seed}"
            if name not in done:
                done[name] = score(train(network, config, steps=wanted.steps, seed=seed))
                wanted.out.write_text(json.dumps(done, indent=1))
    print(f"{'':15} {'swap':>8} {'masked':>8} {'volumes':>8}   (medians of {wanted.seeds} seeds)")
    rows: list[tuple[str, ...]] = []
    for way in WAYS:
        runs = [done[f"{way}, {wanted.steps} steps, seed {seed}"] for seed in range(wanted.seeds)]
        print(f"{way:15} " + " ".join(f"{statistics.median(run[name] for run in runs):8.4f}" for name in runs[0]))
        rows.append((way, *(" ".join(f"{run[name]:.3f}" for run in runs) for name in runs[0])))
    head = ("way", "swap (nearer to 0)", "masked (less)", "volumes R2 (more)")
    table = page.table(head, rows, caption=f"{wanted.steps} steps; one figure for each of {wanted.seeds} seeds")
    told = page.paragraph("Phantom brains that no training saw: drawings with known answers, nothing about patients.")
    text = page.page("Swap, skips and anatomy", [page.section("What each part is good for", told, table)])
    wanted.out.with_suffix(".html").write_text(text)


if __name__ == "__main__":
    main()
