"""Pictures of change over time: what was expected, what came, and where the two differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps

from voxelstem.change import ChangeMap
from voxelstem.report.figures import Picture, Plane, blank, show_slice, slice_axes, to_png

STRONGEST = 99.5
"""Percentile of the absolute differences that gets the full colour."""


def change_picture(found: ChangeMap) -> Picture:
    """Expected, observed and their difference in an axial and a coronal slice, where they differ most."""
    difference = found.difference.array[0]
    strongest = max(float(np.percentile(np.abs(difference), STRONGEST)), 1e-6)
    both = np.stack([found.expected.array[0], found.observed.array[0]])
    low, high = (float(bound) for bound in np.quantile(both[1], [0.01, 0.995]))
    planes: tuple[Plane, ...] = ("axial", "coronal")
    figure = blank(8.0, 5.6)
    for row, plane in enumerate(planes):
        index = _fullest(difference, plane)
        greys = [np.clip((show_slice(one, plane, index) - low) / max(high - low, 1e-6), 0, 1) for one in both]
        colour = _coloured(show_slice(difference, plane, index) / strongest, greys[1])
        came = f"observed - expected (full at {strongest:.2f})"
        titles = (f"expected after {found.years:.1f} years", "observed", came)
        pictures: tuple[Any, ...] = (*greys, colour)
        for column, (title, picture) in enumerate(zip(titles, pictures, strict=True), start=1):
            axes = figure.add_subplot(2, 3, row * 3 + column)
            slice_axes(axes, picture, found.observed, plane, title=title if row == 0 else "")
    return Picture(
        png=to_png(figure),
        alt=f"Follow-up after {found.years:.1f} years as a network expected it, as it came, and the difference; the "
        f"mean absolute difference is {np.abs(difference).mean():.3f} of the range of intensities.",
        caption="Red is brighter and blue darker than expected. Blurred edges show what the network cannot paint, "
        "noise and misregistration show too: a map to look at, not a measurement.",
    )


def _fullest(difference: Float[np.ndarray, "i j k"], plane: Plane) -> int:
    """The slice with most difference, of the middle half: at the rim it is the skull's edge."""
    axis = 2 if plane == "axial" else 1
    much = np.square(difference).sum(axis=tuple(other for other in range(3) if other != axis))
    start, stop = len(much) // 4, max(3 * len(much) // 4, len(much) // 4 + 1)
    return start + int(much[start:stop].argmax())


def _coloured(
    share: Float[np.ndarray, "down across"], grey: Float[np.ndarray, "down across"]
) -> Float[np.ndarray, "down across 3"]:
    """Grey where nothing differs, red above and blue below."""
    colour = colormaps["RdBu_r"](np.clip(share, -1, 1) / 2 + 0.5)[..., :3]
    much = np.minimum(np.abs(share), 1)[..., None]
    return (1 - much) * grey[..., None] + much * colour
