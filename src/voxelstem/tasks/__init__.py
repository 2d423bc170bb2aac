"""What can be predicted from frozen features: one file and one line for each task."""

from __future__ import annotations

from voxelstem.table import Table

TASKS = Table(
    "task",
    {
        "classify": "voxelstem.tasks.classify:Classify",
        "detect": "voxelstem.tasks.detect:Detect",
        "regress": "voxelstem.tasks.regress:Regress",
        "retrieve": "voxelstem.tasks.retrieve:Retrieve",
        "segment": "voxelstem.tasks.segment:Segment",
        "survive": "voxelstem.tasks.survive:Survive",
        "zeroshot": "voxelstem.tasks.zeroshot:Zeroshot",
    },
)
