"""The invented patient behind a phantom: sizes, places and densities, drawn once from a seed.

Everything is in millimetres in the *body frame*: x to the patient's right, y to the front, z up, with
the origin in the middle of the body at the height of the right half of the diaphragm. Proportions are
those of an adult torso, rounded; they are drawn wider than one person varies and promise no realism.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from voxelstem.study import Report

CLASSES = {
    1: "lung_left",
    2: "lung_right",
    3: "liver",
    4: "spleen",
    5: "kidney_left",
    6: "kidney_right",
    7: "spine",
    8: "heart",
    9: "lesion",
}
"""Label values of the phantom, shared with the real scans that `samples` fetches."""

FLUID = {"effusion_left": 10, "effusion_right": 11}
"""Label values of fluid about the lungs, which only some phantoms have."""

LESION_HOSTS = ("liver", "lung")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ellipsoid:
    """A turned ellipsoid: centre and radii in millimetres, `turn` from body axes to its own."""

    centre_mm: Float[np.ndarray, "3"]
    radii_mm: Float[np.ndarray, "3"]
    turn: Float[np.ndarray, "3 3"]

    def reach_mm(self) -> Float[np.ndarray, "3"]:
        """Half the edges of the box around it."""
        return np.linalg.norm(self.turn * self.radii_mm[:, None], axis=0)

    def level(
        self, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], z: Float[np.ndarray, "..."]
    ) -> Float[np.ndarray, "..."]:
        """Below 1 inside, 1 on the surface; the three coordinates broadcast."""
        own = self.turn / self.radii_mm[:, None]
        total: Float[np.ndarray, "..."] = np.zeros((), np.float32)
        for row in own.astype(np.float32):
            along = row[0] * (x - self.centre_mm[0]) + row[1] * (y - self.centre_mm[1])
            along = along + row[2] * (z - self.centre_mm[2])
            total = total + along * along
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesion:
    """One ball that differs from its organ. The answer that detection tests ask for."""

    organ: str
    centre_ras_mm: tuple[float, float, float]
    """Middle, in the coordinates of the scan."""
    radius_mm: float
    contrast_hu: float
    """Added to the organ's density; a nodule in the lung is soft tissue instead."""
    chalk_hu: float = 0.0
    """Added in either organ: a calcified lesion is as hard as bone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """One invented patient. The renderer reads nothing else."""

    offset_ras_mm: tuple[float, float, float]
    """Where the body's origin lies in the scan's coordinates: tables stand anywhere."""
    body_mm: tuple[float, float]
    """Half width and half depth of the skin outline."""
    muscle_mm: tuple[float, float]
    """The same without the fat under the skin."""
    cavity_mm: tuple[float, float]
    """The same for the inside of the ribs and the abdominal wall."""
    cavity_shift_mm: float
    """How far the cavity lies in front of the body's middle: the back is thicker."""
    apex_mm: float
    """Height of the tips of the lungs."""
    waist: float
    """Share by which the body narrows between ribs and hips."""
    dome_mm: tuple[float, float]
    """Height of the left and the right half of the diaphragm."""
    liver_floor_mm: float
    """Height of the lowest, outer edge of the liver."""
    liver_tip_mm: float
    """How far the left lobe reaches beyond the midline."""
    mediastinum_mm: float
    spine_y_mm: float
    spine_radius_mm: float
    kyphosis_mm: float
    organs: dict[str, Ellipsoid]
    """Heart, spleen, kidneys, stomach, and the fat inside the kidneys."""
    hu: dict[str, float]
    """Mean density of each tissue."""
    phase: str
    """`none` or `portal`: with or without contrast medium."""
    spleen_enlarged: bool
    lesions: tuple[Lesion, ...]
    removed: frozenset[str] = frozenset()
    """Organs that surgery took out: `spleen`, `kidney_left`, `kidney_right`."""
    effusion: tuple[float, float] = (0.0, 0.0)
    """Share of the room of the left and of the right lung that fluid takes."""
    effusion_hu: float = 10.0

    def cavity_level(
        self, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], z: Float[np.ndarray, "..."]
    ) -> Float[np.ndarray, "..."]:
        """Below 1 inside the ribs and the abdominal wall; narrows towards the tips of the lungs."""
        rise = np.clip((z - 30.0) / (self.apex_mm - 30.0), 0.0, 0.97)
        narrow = np.sqrt(1.0 - rise * rise) * (1.0 - self.waist * np.exp(-(((z + 120.0) / 50.0) ** 2)))
        width, depth = self.cavity_mm
        return outline(x / (width * narrow), (y - self.cavity_shift_mm) / (depth * narrow))

    def diaphragm_mm(self, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Height of the diaphragm: two domes that fall towards the ribs, low in the middle."""
        width, depth = self.cavity_mm
        side = np.where(x < 0, -1.0, 1.0)
        top = np.where(x < 0, self.dome_mm[0], self.dome_mm[1])
        across = (x - side * 0.46 * width) / (0.54 * width)
        along = (y - self.cavity_shift_mm - 5.0) / depth
        fall = 16.0 * across**2 + 34.0 * along**2 + 46.0 * np.maximum(across * side, 0.0) ** 4
        return top - fall - 16.0 * np.maximum(-along, 0.0)

    def liver_below_mm(self, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Height of the underside of the liver: rises to the left lobe's tip and over the kidney."""
        width, depth = self.cavity_mm
        left = np.clip((0.85 * width - x) / (0.85 * width + self.liver_tip_mm), 0.0, 2.0)
        back = np.clip((self.cavity_shift_mm - y) / depth, 0.0, 1.0)
        front = np.clip((y - self.cavity_shift_mm) / depth, 0.0, 1.0)
        span = -self.liver_floor_mm
        beyond = np.maximum(12.0 - x, 0.0)
        return self.liver_floor_mm + span * (0.95 * left**1.6 + 0.25 * back) + 14.0 * front**2 + 3.0 * back * beyond

    def liver(
        self, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], z: Float[np.ndarray, "..."]
    ) -> np.ndarray:
        """Whether points lie in the liver (before kidneys, vessels and spine take their share)."""
        under = (z < self.diaphragm_mm(x, y) - 3.0) & (z > self.liver_below_mm(x, y))
        return under & (self.cavity_level(x, y, z) < 0.96)  # noqa: PLR2004 - the wall's inner lining

    def lung(self, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], z: Float[np.ndarray, "..."]) -> np.ndarray:
        """Whether points lie in a lung (before the heart and vessels take their share)."""
        # The mediastinum widens towards the back, where the spine stands, and narrows to the tips.
        half = self.mediastinum_mm * (1.0 - 0.25 * np.clip(z / self.apex_mm, 0.0, 1.0))
        over = z > self.diaphragm_mm(x, y) + 2.0
        return over & (np.abs(x) > half) & (self.cavity_level(x, y, z) < 0.95)  # noqa: PLR2004 - the pleura

    def fluid_order(
        self, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], z: Float[np.ndarray, "..."]
    ) -> Float[np.ndarray, "..."]:
        """How late fluid reaches a place about a lung: low at the back and the base, and along the wall first."""
        behind = (y - self.cavity_shift_mm) / self.cavity_mm[1]
        return behind + 0.5 * z / self.apex_mm - 0.6 * self.cavity_level(x, y, z)


def outline(u: Float[np.ndarray, "..."], v: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """A body's cross-section, between an ellipse and a rectangle: below 1 inside.

    The squares are capped before they meet, because u² + v² - u²v²/3 would turn downwards far outside.
    """
    a, b = np.minimum(u * u, 1.5), np.minimum(v * v, 1.5)
    return a + b * (1.0 - 0.35 * a)


def turn(around_x_deg: float, around_y_deg: float, around_z_deg: float) -> Float[np.ndarray, "3 3"]:
    """Rotation matrix: around z, then y, then x."""
    (cx, cy, cz), (sx, sy, sz) = (f(np.deg2rad([around_x_deg, around_y_deg, around_z_deg])) for f in (np.cos, np.sin))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


def draw_densities(rng: np.random.Generator, *, phase: str) -> dict[str, float]:
    """Mean HU of each tissue. The ranges of the solid organs overlap on purpose."""
    plain = {
        "fat": (-112, -92), "muscle": (44, 62), "liver": (40, 66), "spleen": (40, 58), "kidney": (28, 46),
        "blood": (34, 50), "bowel": (12, 45), "fluid": (2, 34),
    }  # fmt: skip
    portal = {
        "muscle": (54, 72), "liver": (88, 122), "spleen": (98, 130), "kidney": (100, 160), "blood": (110, 165),
        "bowel": (30, 80),
    }  # fmt: skip
    firm = {
        "lung": (-870, -800), "marrow": (120, 230), "cortex": (380, 620), "disc": (70, 100), "cord": (20, 38),
        "gas": (-985, -900), "rib": (250, 480), "nodule": (10, 50),
    }  # fmt: skip
    ranges = plain | (portal if phase == "portal" else {}) | firm
    return {tissue: float(rng.uniform(low, high)) for tissue, (low, high) in sorted(ranges.items())}


def draw_organs(
    rng: np.random.Generator, *, cavity_mm: tuple[float, float], shift_mm: float, spleen_scale: float
) -> dict[str, Ellipsoid]:
    """Place the organs that are ellipsoids: proportions of the cavity, and millimetres up and down."""
    width, depth = cavity_mm
    size = rng.uniform(0.93, 1.07)

    def ellipsoid(
        centre: tuple[float, float, float], radii: tuple[float, float, float], degrees: tuple[float, float, float]
    ) -> Ellipsoid:
        moved = np.array(centre) + rng.normal(0.0, 2.5, 3)
        grown = np.array(radii) * size * rng.uniform(0.92, 1.08, 3)
        return Ellipsoid(centre_mm=moved, radii_mm=grown, turn=turn(*(np.array(degrees) + rng.normal(0.0, 4.0, 3))))

    organs = {
        "heart": ellipsoid((-0.17 * width, 0.30 * depth + shift_mm, 30.0), (50.0, 38.0, 46.0), (-15.0, 25.0, -25.0)),
        "spleen": ellipsoid((-0.74 * width, -0.40 * depth + shift_mm, -52.0), (21.0, 35.0, 47.0), (18.0, -10.0, 30.0)),
        "kidney_right": ellipsoid(
            (0.44 * width, -0.56 * depth + shift_mm, -122.0), (26.0, 23.0, 53.0), (8.0, -12.0, 25.0)
        ),
        "kidney_left": ellipsoid(
            (-0.44 * width, -0.56 * depth + shift_mm, -108.0), (26.0, 23.0, 55.0), (8.0, 12.0, -25.0)
        ),
        "stomach": ellipsoid((-0.40 * width, 0.22 * depth + shift_mm, -48.0), (36.0, 32.0, 52.0), (0.0, 28.0, -10.0)),
    }
    spleen = organs["spleen"]
    organs["spleen"] = Ellipsoid(
        centre_mm=spleen.centre_mm - [0.0, 0.0, 20.0 * (spleen_scale - 1.0)],
        radii_mm=spleen.radii_mm * [0.5 + 0.5 * spleen_scale, spleen_scale, spleen_scale],
        turn=spleen.turn,
    )
    for side in ("left", "right"):
        kidney = organs[f"kidney_{side}"]
        inwards = np.array([8.0 if side == "left" else -8.0, 4.0, 0.0])
        organs[f"sinus_{side}"] = Ellipsoid(
            centre_mm=kidney.centre_mm + inwards, radii_mm=kidney.radii_mm * [0.5, 0.4, 0.55], turn=kidney.turn
        )
    return organs


def draw_anatomy(rng: np.random.Generator, *, spleen_enlarged: bool, phase: str) -> Anatomy:
    """Invent a patient without lesions."""
    width = rng.uniform(138.0, 168.0)
    depth = width * rng.uniform(0.64, 0.74)
    fat = rng.uniform(7.0, 30.0)
    muscle = (width - fat, depth - 0.8 * fat)
    wall = rng.uniform(13.0, 18.0)
    cavity = (muscle[0] - wall, muscle[1] - wall - 8.0)
    shift = rng.uniform(8.0, 14.0)
    dome = rng.uniform(-4.0, 8.0)
    scale = rng.uniform(1.32, 1.55) if spleen_enlarged else rng.uniform(0.88, 1.1)
    x, y, z = rng.uniform([-30.0, -180.0, -900.0], [30.0, 60.0, 300.0])
    return Anatomy(
        offset_ras_mm=(float(x), float(y), float(z)),
        body_mm=(width, depth),
        muscle_mm=muscle,
        cavity_mm=cavity,
        cavity_shift_mm=shift,
        apex_mm=rng.uniform(155.0, 185.0),
        waist=rng.uniform(0.0, 0.09),
        dome_mm=(dome - rng.uniform(6.0, 16.0), dome),
        liver_floor_mm=-rng.uniform(125.0, 160.0),
        liver_tip_mm=rng.uniform(30.0, 65.0),
        mediastinum_mm=rng.uniform(22.0, 30.0),
        spine_y_mm=-muscle[1] + rng.uniform(60.0, 68.0),
        spine_radius_mm=rng.uniform(19.0, 23.0),
        kyphosis_mm=rng.uniform(4.0, 12.0),
        organs=draw_organs(rng, cavity_mm=cavity, shift_mm=shift, spleen_scale=scale),
        hu=draw_densities(rng, phase=phase),
        phase=phase,
        spleen_enlarged=spleen_enlarged,
        lesions=(),
    )


def draw_lesion(
    rng: np.random.Generator, anatomy: Anatomy, *, taken: tuple[Lesion, ...], radius_mm: tuple[float, float]
) -> Lesion:
    """Find room for a ball that lies wholly inside the liver or a lung and touches no other.

    Raises:
        ValueError: no room was found; the radius is too large for an organ.
    """
    width, depth = anatomy.cavity_mm
    low = np.array([-width, -depth, anatomy.liver_floor_mm])
    high = np.array([width, depth + anatomy.cavity_shift_mm, anatomy.apex_mm])
    directions = rng.normal(size=(100, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # Every try is drawn anew, so large balls, which fit less often, come out less often.
    for _ in range(8_000):
        organ = LESION_HOSTS[int(rng.integers(len(LESION_HOSTS)))]
        radius = float(rng.uniform(*radius_mm))
        centre = rng.uniform(low, high)
        inside = anatomy.liver if organ == "liver" else anatomy.lung
        if not inside(*centre[:, None]).all():
            continue
        # Points on a sphere a little larger than the ball: when all of them are inside, so is the ball.
        x, y, z = (centre + (radius + 4.0) * directions).T
        placed = centre + anatomy.offset_ras_mm
        apart = all(
            np.linalg.norm(placed - other.centre_ras_mm) > radius + other.radius_mm + 6.0  # a rim between two
            for other in taken
        )
        free = all(other.level(x, y, z).min() > 1.0 for other in anatomy.organs.values())
        spine = np.hypot(x, y - anatomy.spine_y_mm).min() > anatomy.spine_radius_mm + 35.0  # and the great vessels
        if apart and free and spine and inside(x, y, z).all():
            return Lesion(
                organ=organ,
                centre_ras_mm=(float(placed[0]), float(placed[1]), float(placed[2])),
                radius_mm=radius,
                contrast_hu=float(-rng.uniform(35.0, 70.0)),
            )
    raise ValueError(
        f"no room for a lesion of {radius_mm[0]:.1f} to {radius_mm[1]:.1f} mm radius; lower lesion_radius_mm"
    )


def report(anatomy: Anatomy) -> Report:
    """What a radiologist would dictate about this patient, findings and impression."""
    contrast = "in the portal venous phase" if anatomy.phase == "portal" else "without contrast medium"
    by_size = sorted(anatomy.lesions, key=lambda lesion: -lesion.radius_mm)
    places = {host: [f"{2 * spot.radius_mm:.0f} mm" for spot in by_size if spot.organ == host] for host in LESION_HOSTS}
    liver = (
        f"Hypodense lesion in the liver, {' and '.join(places['liver'])}."
        if places["liver"]
        else "Liver without lesion."
    )
    lungs = f"Solid nodule, {' and '.join(places['lung'])}." if places["lung"] else "Lungs clear."
    length = 2 * float(anatomy.organs["spleen"].radii_mm.max())
    size = "enlarged" if anatomy.spleen_enlarged else "of normal size"
    findings = (
        f"CT of the chest and abdomen {contrast}. {lungs} Heart of normal size. {liver} "
        f"Spleen {size}, {length:.0f} mm long. Kidneys unremarkable. No destructive bone lesion."
    )
    named = [f"{host} lesion, largest {sizes[0]}" for host, sizes in places.items() if sizes]
    named += ["splenomegaly"] if anatomy.spleen_enlarged else []
    impression = "; ".join(named).capitalize() if named else "No focal lesion"
    return Report(findings_text=findings, impression_text=f"{impression}.", language="en")
