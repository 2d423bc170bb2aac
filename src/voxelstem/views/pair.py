"""Two scans of one subject as one sample: which pairs a recipe wants, and where a view of the one lies in the other.

A box is drawn in scan a's millimetres and carried over to scan b by both affines, so that both views show the same
place in the world. Nothing is registered here: scans whose headers disagree, or whose subject moved in between, are
only as well aligned as their affines say. What the headers show to be no pair is refused with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from jaxtyping import Float

from voxelstem.study import INTRACRANIAL
from voxelstem.views.crop import ViewPlan

Triple = tuple[float, float, float]
Kind = Literal["same_session", "other_session", "any_scan"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OTHER = "other"
"""The kind of view that shows scan b."""
CONTRASTS = ("T1w", "T2w", "FLAIR", "DWI", "ADC", "SWI", "T2starw", "PDw", "T1w_ce", "MP2RAGE", "angio")
"""Names that sources give to the contrasts of brain MRI, as BIDS spells them; `T1w_ce` is T1w with contrast agent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairConfig:
    """Which second scan a sample shows beside the first, and what `Batch.targets` say of both.

    The shares are those of samples whose partner is looked for first among scans of this kind; where the subject has
    none that can be paired, the other kinds with a share are tried in their order here, and then scan a is its own
    partner: a copy, marked as such. With all shares 0 no second scan is read, and the targets are of scan a alone.

    `Batch.targets` then holds float32 of (sample, …), NaN where nobody knows:

    - `subject` (1): a number that all scans of a subject share, and hardly any two subjects.
    - `copy` (1): 1 where scan b is scan a itself.
    - `same_session` (1): 1 where both were made in one session.
    - `contrast` (2): of a and of b, their place in `contrasts`.
    - `age` (2): of a and of b, in years.
    - `years` (1): from a to b, by their dates, else by ages; 0 within a session.
    - `volumes`, `volumes_other` (columns): the structures' shares of the volume within the skull, by name in
      alphabetical order, each column with mean 0 and standard deviation 1 over the training scans (`standardise`); not
      there where no training scan has any.
    - `pathology` (1): of a; 1 or 0.

    Without a second scan `contrast` and `age` have one column, and what compares two scans is not there.
    """

    same_session: float = 1.0
    """Share of partners with another contrast from the same session."""
    other_session: float = 0.0
    """Share of partners with the same contrast from another session."""
    any_scan: float = 0.0
    """Share of partners that are any other scan of the subject."""
    contrasts: tuple[str, ...] = CONTRASTS
    """Contrasts by name, large and small letters alike; one that is not here has no index (NaN) and is counted."""
    structures: tuple[str, ...] = ()
    """Columns of `volumes`; all that training scans have where nothing is named. A head's size hangs on them."""
    icv: str = INTRACRANIAL
    """The structure that all others are divided by; empty: volumes are taken in mm3 as they are."""
    volumes_of: Literal["scan", "session", "subject"] = "session"
    """Whose volumes are a scan's target: its own; those of its session's scan whose contrast comes first in
    `contrasts`, the same for all contrasts; or those of the subject's first session (which erases all change)."""
    standardise: bool = True
    """Whether columns of `volumes` are standardised; else they are shares as they are, each below 1."""
    least_overlap: float = 0.95
    """Share of what a's view shows of scan a that must lie in scan b's field of view, or the pair is refused."""
    tolerance_mm: float = 0.5
    """A corner of the view may lie this far from where the two scans' axes, were they parallel, would put it."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: shares that are none, a contrast or structure named twice, or a tolerance out of range.
        """
        shares = self.shares
        if min(shares) < 0 or not (math.isclose(sum(shares), 1.0, abs_tol=1e-6) or not any(shares)):
            raise ValueError(
                f"same_session, other_session and any_scan must be >= 0 and add up to 1 or 0, got {shares}"
            )
        names = [name.casefold() for name in self.contrasts]
        if len(set(names)) < len(names) or not all(names):
            raise ValueError(f"contrasts must be names that differ, got {self.contrasts}")
        if len(set(self.structures)) < len(self.structures) or self.icv in self.structures:
            raise ValueError(f"structures must be names that differ, without icv ('{self.icv}'), got {self.structures}")
        if not (0 <= self.least_overlap <= 1 and 0 <= self.tolerance_mm < math.inf):
            raise ValueError(
                f"need least_overlap in [0, 1] and tolerance_mm >= 0, got {self.least_overlap}, {self.tolerance_mm}"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of `KINDS`."""
        return self.same_session, self.other_session, self.any_scan

    @property
    def wanted(self) -> tuple[Kind, ...]:
        """The kinds of partner that have a share."""
        return tuple(kind for kind, share in zip(KINDS, self.shares, strict=True) if share)

    @property
    def paired(self) -> bool:
        """Whether there is a second scan."""
        return bool(self.wanted)

    def index(self, contrast: str) -> float:
        """Place of a contrast in `contrasts`, NaN for one that is not there.

        >>> PairConfig(contrasts=("T1w", "DWI")).index("dwi"), PairConfig().index("")
        (1.0, nan)
        """
        names = [name.casefold() for name in self.contrasts]
        return float(names.index(contrast.casefold())) if contrast.casefold() in names else math.nan

    def order(self, rng: np.random.Generator) -> tuple[Kind, ...]:
        """Draw which kind of partner is looked for first; the others with a share follow."""
        first = KINDS[int(rng.choice(len(KINDS), p=np.asarray(self.shares) / sum(self.shares)))]
        return (first, *(kind for kind in self.wanted if kind != first))


class Placed(Protocol):
    """A grid of voxels in the world; a store's records are."""

    @property
    def shape_ijk(self) -> tuple[int, int, int]:
        """Voxels along each axis."""
        ...

    @property
    def spacing_mm(self) -> Triple:
        """Edges of one."""
        ...

    @property
    def affine_ras(self) -> Float[np.ndarray, "4 4"]:
        """From the centres of voxels, by index, to millimetres in the world (RAS+)."""
        ...


def carry_over(plan: ViewPlan, a: Placed, b: Placed, *, least_overlap: float, tolerance_mm: float) -> ViewPlan | str:
    """Find the box in scan b that shows the same place in the world as `plan` does in scan a.

    The box keeps its extent: it is laid about the same centre, along b's axes. Where the two scans' axes are not
    parallel, its corners come to lie elsewhere, which `tolerance_mm` bounds.

    Returns:
        The plan for b, in millimetres from b's low corner; or why there is none: `axes` (their directions differ), or
        `field of view` (b does not cover what the view shows of a).
    """
    extent = np.asarray(plan.extent_mm)
    turn = np.linalg.inv(_axes(b)) @ _axes(a)
    signs = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3, indexing="ij")).reshape(3, -1)
    corners = signs * extent[:, None]
    if np.linalg.norm(turn @ corners - corners, axis=0).max() > tolerance_mm:
        return "axes"
    centre = np.asarray(plan.start_mm) + extent / 2
    start = np.linalg.inv(_axes(b)) @ (_axes(a) @ centre + _corner(a) - _corner(b)) - extent / 2
    # What lies outside of a already cannot be missed in b.
    shift = start - np.asarray(plan.start_mm)
    low = np.maximum(plan.start_mm, 0.0)
    high = np.minimum(np.asarray(plan.start_mm) + extent, np.multiply(a.shape_ijk, a.spacing_mm))
    shown = np.maximum(high - low, 0.0)
    covered = np.minimum(high + shift, np.multiply(b.shape_ijk, b.spacing_mm)) - np.maximum(low + shift, 0.0)
    # One part in a million: corners come out of rounded affines.
    if np.prod(np.clip(covered, 0.0, shown)) < (least_overlap - 1e-6) * np.prod(shown):
        return "field of view"
    return ViewPlan(
        start_mm=(float(start[0]), float(start[1]), float(start[2])),
        extent_mm=plan.extent_mm,
        size_ijk=plan.size_ijk,
    )


def _axes(scan: Placed) -> Float[np.ndarray, "3 3"]:
    """Columns: the directions of the array's axes, of length 1."""
    return scan.affine_ras[:3, :3] / np.linalg.norm(scan.affine_ras[:3, :3], axis=0)


def _corner(scan: Placed) -> Float[np.ndarray, "3"]:
    """Where the low corner of the first voxel lies in the world."""
    return scan.affine_ras[:3, 3] - scan.affine_ras[:3, :3] @ np.full(3, 0.5)
