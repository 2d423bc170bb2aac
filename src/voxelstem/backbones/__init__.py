"""Networks that give embeddings. A new one is a file and a line here."""

from __future__ import annotations

from voxelstem.table import Table

BACKBONES = Table(
    "backbone",
    {
        "scan_vit": "voxelstem.backbones.scan_vit:ScanVit",
        "i3resnet": "voxelstem.backbones.i3resnet:I3ResNet",
        "unet": "voxelstem.backbones.unet:UNet",
        "disentangled": "voxelstem.backbones.disentangled:Disentangled",
    },
)
