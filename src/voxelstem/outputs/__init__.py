"""Findings in the formats of those who asked: one file and one line for each."""

from __future__ import annotations

from voxelstem.table import Table

OUTPUTS = Table(
    "output",
    {
        "json": "voxelstem.outputs.plain:write",
        "nifti": "voxelstem.outputs.nifti:write",
        "seg": "voxelstem.outputs.seg:write",
        "sr": "voxelstem.outputs.sr:write",
    },
)
"""Each is called with a `Result`, a folder, and what was written of the same result before; it returns `Written`."""
