"""Lobes of the phantom's lungs and liver, and room for a lesion in one of them.

Real fissures are oblique and the liver's border is a plane through vessels. Here the height of a nodule's middle tells
the lobe of a lung, and its distance from the midline that of the liver, each with a gap in which no lesion lies.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from voxelstem.sources.anatomy import Anatomy, Lesion

SIDES = ("left", "right")
LUNG_PLACES = ("left upper", "left lower", "right upper", "right middle", "right lower")
LIVER_PLACES = ("left", "right")
BANDS = {
    ("left", "lower"): (-1.0, 0.44),
    ("left", "upper"): (0.54, 1.0),
    ("right", "lower"): (-1.0, 0.32),
    ("right", "middle"): (0.40, 0.58),
    ("right", "upper"): (0.66, 1.0),
}
"""Where the middle of a nodule lies between the diaphragm's dome (0) and the tip of the lung (1)."""
LEFT_LOBE_MM, RIGHT_LOBE_MM = 25.0, 45.0
"""To the right of the midline: a lesion of the left liver lobe has its middle before the first, one of the right lobe
beyond the second."""
SMALLEST_MM = 14
"""Diameter below which no lesion is drawn, where there is no room for the wished one."""
RIM_MM = 2.0
"""Of the organ's own tissue about a lesion."""
TRIES, TRIED = 4000, 150
"""Points drawn, and of those in the lobe how many are tried."""
DIRECTIONS = 40
FLUID_RIM = 0.03
"""Share of the lung between fluid and a nodule."""


def draw_at(
    rng: np.random.Generator, anatomy: Anatomy, organ: str, place: str, *, size_mm: int, density: str
) -> list[Lesion]:
    """A ball in this lobe, as large as wished or as there is room for; none where not even the smallest fits.

    Args:
        rng: Draws place and contrast.
        anatomy: The patient, with fluid and without what was removed.
        organ: `lung` or `liver`.
        place: One of `LUNG_PLACES` or `LIVER_PLACES`.
        size_mm: The wished diameter.
        density: `hypodense`, `hyperdense`, `calcified`, or `solid`.
    """
    differs, chalk = _contrast_hu(rng, density)
    width, depth = anatomy.cavity_mm
    floor, roof = (anatomy.liver_floor_mm, 40.0) if organ == "liver" else (-60.0, anatomy.apex_mm - 25.0)
    high = (width, depth + anatomy.cavity_shift_mm, roof)
    points = rng.uniform((-width, -depth, floor), high, size=(TRIES, 3))
    directions = rng.normal(size=(DIRECTIONS, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    dry = _driest(anatomy, points) if organ == "lung" else -np.inf
    points = points[lobe_of(anatomy, organ, place, points)][:TRIED]
    for size in range(size_mm, SMALLEST_MM - 1, -2):
        spheres = points[:, None] + (0.5 * size + RIM_MM) * directions
        fits = points[_fits(anatomy, organ, spheres, dry=dry)]
        if len(fits):
            x, y, z = (float(edge) for edge in fits[0] + anatomy.offset_ras_mm)
            return [
                Lesion(organ=organ, centre_ras_mm=(x, y, z), radius_mm=size / 2, contrast_hu=differs, chalk_hu=chalk)
            ]
    return []


def lobe_of(
    anatomy: Anatomy, organ: str, place: str, points_mm: Float[np.ndarray, "point 3"]
) -> Bool[np.ndarray, "point"]:
    """Which points of the body frame lie in this lobe, so far that its name is certain."""
    x, y, z = points_mm.T
    if organ == "liver":
        return (x < LEFT_LOBE_MM if place == "left" else x > RIGHT_LOBE_MM) & anatomy.liver(x, y, z)
    side, _, lobe = place.partition(" ")
    dome = anatomy.dome_mm[SIDES.index(side)]
    height = (z - dome) / (anatomy.apex_mm - dome)
    low, high = BANDS[side, lobe]
    return (x < 0 if side == "left" else x > 0) & (height > low) & (height < high) & anatomy.lung(x, y, z)


def _contrast_hu(rng: np.random.Generator, density: str) -> tuple[float, float]:
    """What a density adds to the liver, and what chalk adds in either organ."""
    differs = {"hypodense": (-95.0, -65.0), "hyperdense": (70.0, 110.0)}.get(density, (0.0, 0.0))
    chalk = (250.0, 450.0) if density == "calcified" else (0.0, 0.0)
    return float(rng.uniform(*differs)), float(rng.uniform(*chalk))


def _driest(anatomy: Anatomy, points_mm: Float[np.ndarray, "point 3"]) -> float:
    """The place in the order of fluid above which both lungs are dry, with a rim."""
    x, y, z = points_mm.T
    order, lung = anatomy.fluid_order(x, y, z), anatomy.lung(x, y, z)
    sides = zip((lung & (x < 0), lung & (x > 0)), anatomy.effusion, strict=True)
    return max((float(np.quantile(order[side], share + FLUID_RIM)) for side, share in sides if share), default=-np.inf)


def _fits(
    anatomy: Anatomy, organ: str, spheres_mm: Float[np.ndarray, "point direction 3"], *, dry: float
) -> Bool[np.ndarray, "point"]:
    """Which spheres lie wholly in their organ, beside what covers it, and out of the fluid."""
    x, y, z = np.moveaxis(spheres_mm, -1, 0)
    fits = (anatomy.liver if organ == "liver" else anatomy.lung)(x, y, z)
    fits &= np.hypot(x, y - anatomy.spine_y_mm) > anatomy.spine_radius_mm + 35.0  # and the great vessels
    for name in {"heart", "spleen", "kidney_left", "kidney_right"} - anatomy.removed:
        fits &= anatomy.organs[name].level(x, y, z) > 1.1  # noqa: PLR2004 - dented by a tenth at most
    if organ == "lung":
        fits &= anatomy.fluid_order(x, y, z) > dry
    return fits.all(axis=1)
