"""Small aligned weights, and stores whose scans have reports: what the tests of searching share."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from voxelstem.aligned import HEADS, TOWER
from voxelstem.backbones.heads import AlignHead
from voxelstem.backbones.text import TowerConfig, tower_of
from voxelstem.card import Card, write_weights
from voxelstem.config import flatten
from voxelstem.model import make_model
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Store, write
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import Acquisition, InputSpec, Report

SPEC = InputSpec(spacing_mm=(10.0, 10.0, 10.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))
DIM, OUT = 24, 16
ARCHITECTURE = {
    "name": "scan_vit",
    "block_ijk": (16, 16, 16),
    "block.dim": DIM,
    "block.depth": 1,
    "block.heads": 2,
    "scan.depth": 0,
}
PLANTED = "PlantedMiller1947"
"""A name in every report, which must not spread."""


@cache
def minilm_digest() -> str:
    return tower_of(TowerConfig()).sha256


def head(dim: int, *, seed: int, out: int = OUT) -> AlignHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AlignHead(dim, hidden=32, bottleneck=8, out=out)
        # As they are drawn, all outputs of a fresh head lie close together.
        torch.nn.init.normal_(made.direction)
        for layer in made.mlp:
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        return made


def aligned_weights(
    folder: Path,
    *,
    seed: int = 0,
    image: AlignHead | None = None,
    text: AlignHead | None = None,
    logit: bool = True,
    sha256: str = "",
) -> Path:
    """A weights folder with heads and the packaged tower, as training writes it."""
    model = make_model(Card(architecture=ARCHITECTURE, spec=SPEC, trained=("block",)), seed=seed)
    heads = {"image": image or head(2 * DIM, seed=seed), "text": text or head(384, seed=seed + 1)}
    tensors = {f"{side}.{name}": x for side, made in heads.items() for name, x in made.state_dict().items()}
    if logit:
        tensors |= {"logit.temperature": torch.tensor([2.3026]), "logit.bias": torch.tensor([-10.0])}
    tower = flatten(TowerConfig()) | {"sha256": sha256 or minilm_digest()}
    write_weights(folder, model.backbone.state_dict(), model.card, {HEADS: tensors}, {TOWER: json.dumps(tower)})
    return folder


def reported_store(path: Path, *, scans: int = 4, subjects: int = 3, spacing_mm: float = 20.0) -> Store:
    """Phantoms with a report each; scan i is of subject i modulo `subjects`, and of a study of its own."""
    store = Store.create(path)
    for number in range(scans):
        study = phantom(PhantomConfig(seed=number, spacing_mm=(spacing_mm,) * 3, orientation="RAS"))
        (volume,) = study.volumes
        report = Report(
            findings_text=f"Mr {PLANTED}: nodule of {number + 3} mm.", impression_text=f"Follow up in {number} months."
        )
        # Subjects of phantoms stay apart, or a store would refuse two scans with equal voxels.
        volume = replace(volume, acquisition=Acquisition(study=f"study{number}"))
        subject = pseudonym(f"P{number % subjects}", site_key())
        write(store, replace(study, subject=subject, volumes=(volume,), report=report))
    store.refresh()
    return store
