"""The labelled scans as new ones are held against them: by the nearest of them, and by the means of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from voxelstem.certainty.strangeness import KnownClasses, NearestKnown, fit_classes, fit_nearest
from voxelstem.protocols import Example, Features, Measured

NEIGHBOURS = 5
NOBODY = "no labelled scan has a vector to compare with"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Familiar:
    """What could be fitted to the labelled scans; `notes` say why the rest could not."""

    known: NearestKnown | None = None
    centres: KnownClasses | None = None
    notes: tuple[str, ...] = ()


def vector_of(features: Features) -> Float[np.ndarray, " dim"]:
    """What a network says of a scan. Values that are measured beside it have units: the largest would say it all."""
    return features.scan[~features.measured] if isinstance(features, Measured) else features.scan


def fit_familiar(examples: Sequence[Example], *, level: float) -> Familiar:
    """Keep the vectors of the labelled scans, each measured as if its subject had been unknown.

    Args:
        examples: The labelled scans; one whose features have no vector is left out.
        level: About this share of scans like these is not flagged.
    """
    seen = [example for example in examples if vector_of(example.features).size]
    if not seen:
        return Familiar(notes=(f"strange scans are not told apart: {NOBODY}",) if examples else ())
    subjects = [example.subject for example in seen]
    try:
        rows = np.stack([vector_of(example.features) for example in seen]).astype(np.float64)
        known = fit_nearest(rows, subjects, neighbours=min(NEIGHBOURS, max(len(seen) - 1, 1)), level=level)
    except ValueError as error:
        return Familiar(notes=(f"strange scans are not told apart: {error}",))
    try:
        # Where a scan is of no one class, all scans are one.
        labels = [example.label or "all" for example in seen]
        return Familiar(known=known, centres=fit_classes(rows, labels, subjects, level=level))
    except ValueError as error:
        why = f"strange scans are not told apart by the means of their classes: {error}"
        return Familiar(known=known, notes=(why,))
