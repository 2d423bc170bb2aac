"""Foreign weights in and out. A new family is a file and a line here."""

from __future__ import annotations

from voxelstem.table import Table

WEIGHTS = Table(
    "weight format",
    {
        "fomo25": "voxelstem.weights.fomo25:import_fomo25",
        "i3resnet": "voxelstem.weights.i3resnet:import_i3resnet",
        "nnssl": "voxelstem.weights.nnssl:import_nnssl",
        "spectre": "voxelstem.weights.spectre:import_spectre",
    },
)
