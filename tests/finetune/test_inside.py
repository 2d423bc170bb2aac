from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from voxelstem.card import Card
from voxelstem.finetune.cases import see
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.inside import vector_of
from voxelstem.finetune.network import build
from voxelstem.model import Model, make_model
from voxelstem.store import Store

VIT = {
    "name": "scan_vit",
    "block_ijk": (16, 16, 16),
    "patch_ijk": (4, 4, 4),
    "block.dim": 12,
    "block.depth": 1,
    "block.heads": 2,
    "scan.depth": 0,
}


@pytest.mark.parametrize("kind", ["unet", "vit", "disentangled"])
def test_the_vector_is_the_mean_over_windows_of_what_the_backbone_says_of_each(
    kind: str, store: Store, unet: Model, disentangled: Model
) -> None:
    spec = unet.card.spec
    models = {"unet": unet, "disentangled": disentangled}
    model = models.get(kind) or make_model(Card(architecture=VIT, spec=spec, sha256="c" * 64), seed=0)
    net, card = build(model, out=2, config=FinetuneConfig(steps=1), voxels=True, seed=0)
    net.eval()
    seen = see(store, [next(iter(store)).key], card.spec)
    found = vector_of(net, seen, card.spec)
    i, j, k = seen.image.shape[1:]
    assert (i, j, k) == (18, 20, 16)
    rows = []
    with torch.no_grad():
        for low_i in (0, i - 16):
            for low_j in (0, j - 16):
                block = seen.image[:, low_i : low_i + 16, low_j : low_j + 16]
                cls, patches = net.backbone.encode_blocks(block[None])
                rows.append(torch.cat([cls[0], patches[0].mean(dim=0)]).double().numpy())
    np.testing.assert_allclose(found, np.mean(rows, axis=0), atol=1e-6)
    assert found.dtype == np.float32
    assert len(np.unique(found)) > 1


def test_contrasts_that_go_through_one_by_one_stand_side_by_side(store: Store, unet: Model) -> None:
    late = FinetuneConfig(steps=1, contrasts=("T1w", "FLAIR"), fusion="late")
    net, card = build(unet, out=2, config=late, voxels=True, seed=0)
    net.eval()
    record = next(iter(store))
    one = see(store, [record.key], card.spec)
    both = replace(one, image=torch.cat([one.image, 2 * one.image]))
    found = vector_of(net, both, card.spec)
    alone, _ = build(unet, out=2, config=FinetuneConfig(steps=1), voxels=True, seed=0)
    alone.eval()
    wanted = [vector_of(alone, replace(one, image=image), card.spec) for image in (one.image, 2 * one.image)]
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=1e-5)
