"""Three numbers in one word: how a spacing and a place in a scan are written on the command line."""

from __future__ import annotations

import math

from voxelstem.errors import ConfigError

Triple = tuple[float, float, float]


def triple(text: str) -> Triple | None:
    """Read `a,b,c`; None when the text is anything else than three finite numbers."""
    try:
        i, j, k = (float(part) for part in text.split(","))
    except ValueError:
        return None
    return (i, j, k) if all(map(math.isfinite, (i, j, k))) else None


def spacing_mm(text: str | None) -> Triple | None:
    """Read a spacing in mm along right, anterior and superior, such as `1.5,1.5,3`; nothing stays nothing.

    Raises:
        ConfigError: it is not three lengths above 0.
    """
    if text is None:
        return None
    edges = triple(text)
    if edges is None or min(edges) <= 0:
        problem = f"'{text}' is no spacing" + (": each number must be above 0" if edges else "")
        raise ConfigError(problem, hint="write three numbers of mm, such as --spacing 1.5,1.5,3")
    return edges


def place(text: str | None) -> tuple[tuple[int, int, int] | None, Triple | None]:
    """Read a place in a scan: a voxel such as `120,96,40`, or mm in the patient (RAS+) such as `-20,35,110mm`.

    One of both comes back, or neither where nothing was given.

    Raises:
        ConfigError: it is neither.
    """
    if text is None:
        return None, None
    edges = triple(text.removesuffix("mm"))
    if edges is None or not (text.endswith("mm") or all(edge == int(edge) for edge in edges)):
        raise ConfigError(
            f"'{text}' is no place in a scan",
            hint="write a voxel, such as --at 120,96,40, or mm in the patient, such as --at -20,35,110mm",
        )
    if text.endswith("mm"):
        return None, edges
    i, j, k = map(int, edges)
    return (i, j, k), None


def box_ras_mm(text: str | None) -> tuple[Triple, Triple] | None:
    """Read a box in mm in the patient, such as `-90,-20,40:-60,15,70`; nothing stays nothing.

    Raises:
        ConfigError: it is not two corners, the low one first.
    """
    if text is None:
        return None
    low, high = (triple(part) for part in (text.partition(":")[0], text.partition(":")[2]))
    if low is None or high is None or any(a > b for a, b in zip(low, high, strict=True)):
        raise ConfigError(
            f"'{text}' is no box",
            hint="write its low and its high corner in mm in the patient, such as --box=-90,-20,40:-60,15,70",
        )
    return low, high
