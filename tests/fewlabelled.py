"""A small store of labelled phantoms and untrained weights, for tests of what stands above tasks."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

from voxelstem.card import Card, write_weights
from voxelstem.evaluate import EvaluateConfig
from voxelstem.model import make_model
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import InputSpec

SPEC = InputSpec(spacing_mm=(8.0, 8.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))
ARCHITECTURE = {
    "name": "scan_vit",
    "block_ijk": (16, 16, 16),
    "block.dim": 24,
    "block.depth": 1,
    "block.heads": 2,
    "scan.depth": 0,
}
QUICK = EvaluateConfig(unet_steps=2)
"""The U-Net beside segmentations takes two steps: that it is there is what is tested."""
FRACTIONS = Fractions(train=0.6, validation=0.0, test=0.4)


def settle_key() -> bytes:
    """One site key for ever, where the test brought none: under another one, other phantoms would be held out."""
    path = Path(os.environ["VOXELSTEM_KEY"])
    if not path.exists():
        path.write_text("01" * 32 + "\n")
    return site_key()


def make_store(folder: Path, count: int = 12) -> tuple[Store, Path, Path]:
    """A store of coarse phantoms with voxel labels, the table of who has contrast, and a labels.json."""
    store = Store.create(folder / "store", fractions=FRACTIONS)
    key = settle_key()
    rows = [("subject", "label")]
    for seed in range(count):
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(7.0, 7.0, 8.0), phase="portal" if seed % 2 else "none"))
        write(store, replace(study, subject=pseudonym(study.subject, key)))
        rows.append((study.subject, study.labels["contrast"]))
    with (folder / "contrast.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    classes = {"1": "lung_left", "2": "lung_right", "3": "liver"}
    (folder / "labels.json").write_text(json.dumps({"classes": classes}))
    return store, folder / "contrast.csv", folder / "labels.json"


def make_weights(folder: Path, **changes: object) -> Path:
    model = make_model(Card(architecture={**ARCHITECTURE, **changes}, spec=SPEC), seed=0)
    write_weights(folder / "weights", model.backbone.state_dict(), model.card)
    return folder / "weights"
