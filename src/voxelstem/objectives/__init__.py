"""What is compared with what, to learn without labels. A new objective is a file and a line here."""

from __future__ import annotations

from voxelstem.table import Table

OBJECTIVES = Table(
    "objective",
    {
        "dino": "voxelstem.objectives.dino:Dino",
        "jepa": "voxelstem.objectives.jepa:Jepa",
        "mae": "voxelstem.objectives.mae:Mae",
        "siglip": "voxelstem.objectives.siglip:Siglip",
    },
)
