"""What is compared with what, to learn without labels. A new objective is a file and a line here."""

from __future__ import annotations

from voxelstem.table import Table

OBJECTIVES = Table(
    "objective",
    {
        "anatomy": "voxelstem.objectives.anatomy:Anatomy",
        "dino": "voxelstem.objectives.dino:Dino",
        "disentangle": "voxelstem.objectives.disentangle:Disentangle",
        "jepa": "voxelstem.objectives.jepa:Jepa",
        "longitudinal": "voxelstem.objectives.longitudinal:Longitudinal",
        "mae": "voxelstem.objectives.mae:Mae",
        "segmentation_prior": "voxelstem.objectives.segmentation_prior:SegmentationPrior",
        "siglip": "voxelstem.objectives.siglip:Siglip",
    },
)
