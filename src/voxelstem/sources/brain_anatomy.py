"""The invented head behind a brain phantom: nested ellipsoids, bent by smooth waves that tell people apart.

Everything is in millimetres in the *head frame*: x to the patient's right, y to the front, z up, with the origin in the
middle of the brain. Sizes are those of an adult, rounded; layers and hippocampi are thicker than in life, so that they
are seen at voxels of 5 mm, and rates of change are larger. Nothing here promises realism.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

CLASSES = {
    1: "scalp",
    2: "skull",
    3: "csf",
    4: "grey_matter",
    5: "white_matter",
    6: "ventricles",
    7: "hippocampus_left",
    8: "hippocampus_right",
    9: "lesion",
}
"""Label values of a brain phantom."""
VALUE = {name: value for value, name in CLASSES.items()}
INSIDE = ("csf", "grey_matter", "white_matter", "ventricles", "hippocampus_left", "hippocampus_right")
"""What lies inside the skull: the sum is the intracranial volume."""
HIPPOCAMPI = {"hippocampus_left": -1.0, "hippocampus_right": 1.0}
"""The sign of x on each side."""
VENTRICLE_SHAPE = (0.35, 1.0, 0.45)
"""Radii of one lateral ventricle, as shares of the longest."""
HIPPOCAMPUS_MM = (9.0, 20.0, 9.0)
"""Radii of a young hippocampus."""
Axes = tuple[Float[np.ndarray, " i"], Float[np.ndarray, " j"], Float[np.ndarray, " k"]]
Grid = Float[np.ndarray, "i j k"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Waves:
    """A smooth random field: a sum of plane waves. It has a value at every place, so no grid decides what it is."""

    vectors: Float[np.ndarray, "wave 3"]
    """Radians a millimetre along x, y, z."""
    phases: Float[np.ndarray, " wave"]
    amplitude: float
    """Standard deviation of the field over all of space."""

    @staticmethod
    def draw(rng: np.random.Generator, *, length_mm: tuple[float, float], amplitude: float, count: int = 6) -> Waves:
        """Waves of random directions, with lengths from a range."""
        direction = rng.standard_normal((count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        lengths = rng.uniform(*length_mm, size=(count, 1))
        return Waves(
            vectors=direction * 2 * np.pi / lengths, phases=rng.uniform(0, 2 * np.pi, count), amplitude=amplitude
        )

    def __call__(self, axes: Axes) -> Grid:
        """The field on the grid that three axes span, in the unit of `amplitude`."""
        # cos(a + b + c) is the real part of a product, so each axis is looked at by itself.
        x, y, z = (
            np.exp(1j * np.outer(self.vectors[:, axis], place)).astype(np.complex64) for axis, place in enumerate(axes)
        )
        x = x * np.exp(1j * self.phases)[:, None].astype(np.complex64)
        plane = np.einsum("wi,wj->ijw", x, y).reshape(-1, len(x))
        scale = self.amplitude * np.sqrt(2.0 / len(self.phases))
        return ((plane @ z).real * np.float32(scale)).reshape(len(axes[0]), len(axes[1]), len(axes[2]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """A ball of damaged tissue."""

    centre_mm: tuple[float, float, float]
    """In the head frame, before the bending."""
    radius_mm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """One invented person at one time. The painter reads nothing else."""

    radii_mm: tuple[float, float, float]
    """Half axes of the inside of the skull."""
    skull_mm: float
    scalp_mm: float
    csf_mm: float
    cortex_mm: float
    bend: tuple[Waves, Waves, Waves]
    """How far each place is moved along x, y, z: who this is."""
    folds: Waves
    """Where the cortex is thick and thin, in millimetres."""
    ventricles_mm3: float
    """Both, before the bending."""
    hippocampi_mm3: Mapping[str, float]
    blob: Blob | None = None

    @property
    def intracranial_mm3(self) -> float:
        """What the skull holds, before the bending."""
        return 4 / 3 * np.pi * float(np.prod(self.radii_mm))

    def place(self, axes: Axes) -> tuple[Grid, Grid, Grid]:
        """Where the points of a grid lie before the bending."""
        x, y, z = axes
        bent = [wave(axes) for wave in self.bend]
        return x[:, None, None] + bent[0], y[None, :, None] + bent[1], z[None, None, :] + bent[2]

    def depth_mm(self, place: tuple[Grid, Grid, Grid]) -> Grid:
        """How deep below the inside of the skull a place lies, about; negative outside."""
        level = _level(place, (0.0, 0.0, 0.0), self.radii_mm)
        return (1.0 - level) * np.float32(np.cbrt(np.prod(self.radii_mm)))

    def ventricle_level(self, place: tuple[Grid, Grid, Grid]) -> Grid:
        """Below 1 inside either lateral ventricle."""
        radii = _radii(VENTRICLE_SHAPE, self.ventricles_mm3 / 2)
        x, y, z = place
        return _level((np.abs(x), y, z), (radii[0] + 2.0, -2.0, 10.0), radii)

    def hippocampus_level(self, place: tuple[Grid, Grid, Grid], name: str) -> Grid:
        """Below 1 inside the hippocampus of this side."""
        radii = _radii(HIPPOCAMPUS_MM, self.hippocampi_mm3[name])
        return _level(place, (HIPPOCAMPI[name] * 30.0, -12.0, -24.0), radii)


@dataclass(frozen=True, kw_only=True, slots=True)
class Painted:
    """A head on a grid of voxels."""

    label: UInt8[np.ndarray, "i j k"]
    """Values of `CLASSES`."""
    tissue: UInt8[np.ndarray, "i j k"]
    """The same without the lesion: the tissue that it lies in."""


def paint(head: Head, axes: Axes) -> Painted:
    """Paint the layers in the order in which they cover one another."""
    place = head.place(axes)
    depth = head.depth_mm(place)
    folds = head.folds(axes)
    label = np.zeros(depth.shape, np.uint8)
    for name, limit in (
        ("scalp", -head.skull_mm - head.scalp_mm),
        ("skull", -head.skull_mm),
        ("csf", 0.0),
        ("grey_matter", head.csf_mm + 0.25 * folds),
        ("white_matter", head.csf_mm + head.cortex_mm + folds),
    ):
        label[depth > limit] = VALUE[name]
    for name in HIPPOCAMPI:
        label[head.hippocampus_level(place, name) < 1.0] = VALUE[name]
    label[head.ventricle_level(place) < 1.0] = VALUE["ventricles"]
    tissue = label.copy()
    if head.blob is not None:
        ball = _level(place, head.blob.centre_mm, (head.blob.radius_mm,) * 3) < 1.0
        label[ball & _is_one_of(tissue, ("grey_matter", "white_matter"))] = VALUE["lesion"]
    return Painted(label=label, tissue=tissue)


def draw_blob(head: Head, rng: np.random.Generator) -> Blob:
    """Choose a ball of white matter that touches neither ventricles nor hippocampi, whatever the grid."""
    radius = float(rng.uniform(10.0, 15.0))
    for _ in range(1000):
        x, y, z = (float(rng.uniform(-edge, edge)) for edge in head.radii_mm)
        point = (np.full((1, 1, 1), x), np.full((1, 1, 1), y), np.full((1, 1, 1), z))
        inner = _radii(VENTRICLE_SHAPE, head.ventricles_mm3 / 2)[0]
        far = [head.ventricle_level(point) > 1.0 + radius / inner]
        far += [head.hippocampus_level(point, name) > 1.0 + radius / HIPPOCAMPUS_MM[0] for name in HIPPOCAMPI]
        if head.depth_mm(point) > head.csf_mm + head.cortex_mm and all(far):
            return Blob(centre_mm=(x, y, z), radius_mm=radius)
    raise ValueError("no place in the white matter is far enough from ventricles and hippocampi for a lesion")


def _level(place: tuple[Grid, Grid, Grid], centre: tuple[float, ...], radii: tuple[float, ...]) -> Grid:
    """Distance from the centre in units of the radius in that direction: 1 on the surface."""
    total = sum(
        ((along - np.float32(middle)) / np.float32(radius)) ** 2
        for along, middle, radius in zip(place, centre, radii, strict=True)
    )
    return np.sqrt(total)


def _radii(shape: tuple[float, float, float], volume_mm3: float) -> tuple[float, float, float]:
    """Radii of the ellipsoid of this shape and volume."""
    scale = float(np.cbrt(volume_mm3 / (4 / 3 * np.pi * np.prod(shape))))
    return shape[0] * scale, shape[1] * scale, shape[2] * scale


def _is_one_of(label: UInt8[np.ndarray, "i j k"], names: tuple[str, ...]) -> Bool[np.ndarray, "i j k"]:
    return np.isin(label, [VALUE[name] for name in names])
