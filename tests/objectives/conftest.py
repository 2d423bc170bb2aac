"""Small backbones and batches whose views show something that can be learned."""

from __future__ import annotations

import pytest
import torch

from voxelstem.backbones.encoder import EncoderConfig
from voxelstem.backbones.scan_vit import ScanVit, ScanVitConfig
from voxelstem.protocols import Batch


class Make:
    """Small things to learn with; the same seed makes the same."""

    def backbone(self, *, scan_depth: int = 1) -> ScanVit:
        size = EncoderConfig(dim=24, depth=2, heads=2)
        scan = EncoderConfig(dim=24, depth=scan_depth, heads=2)
        return ScanVit(ScanVitConfig(patch_ijk=(4, 4, 4), block_ijk=(8, 8, 8), block=size, scan=scan))

    def batch(self, edge: int = 8, *, samples: int = 3, views: int = 1, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        places = torch.stack(
            [torch.rand(samples, views, 3, generator=generator) * 200, torch.full((samples, views, 3), 6.0 * edge)], 2
        )
        axes = torch.linspace(0, 1, edge)
        ramp = torch.stack(torch.meshgrid(axes, axes, axes, indexing="ij")).sum(0) / 3
        noise = torch.rand(samples, views, 1, edge, edge, edge, generator=generator)
        content = {"global": (0.7 * ramp + 0.3 * noise)}
        content["local"] = content["global"][..., : edge // 2, : edge // 2, : edge // 2].contiguous()
        return Batch(views=content, places_mm=dict.fromkeys(content, places), seed=seed + 1)


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()
