"""Findings as JSON, for programs and for reading: the one format that holds all that is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from voxelstem.findings import to_json
from voxelstem.outputs.result import Result, Written, keep, named


def write(result: Result, folder: Path, *, before: Sequence[Written] = ()) -> Written:  # noqa: ARG001 - all have it
    """Write the findings to `findings-<digest>.json`; `findings.of_json` reads them back.

    Args:
        result: What was found.
        folder: Where to; made where it is absent.
        before: What other outputs wrote of the same result.
    """
    data = f"{to_json(result.findings)}\n".encode()
    return Written(output="json", files=(keep(folder / f"{named('findings', data)}.json", data),))
