"""The phantom's renderer: paints an `Anatomy` on a grid of voxels, organ over organ, and scans it.

All coordinates are in the body frame of `sources/anatomy.py`, in millimetres. Bare numbers are sizes of
an adult's organs in millimetres, or shares of an organ's own radius.
"""

# ruff: noqa: PLR2004 - anatomy is made of bare numbers, and each stands beside the organ that it shapes

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from voxelstem.sources.anatomy import CLASSES, FLUID, Anatomy, outline

LABEL_OF = {name: value for value, name in CLASSES.items()} | FLUID
SPACING_STEP_MM = 1 / 64
"""Spacings and offsets are multiples of it, so that float32 headers hold them exactly."""

DISC_SHARE = 0.2
"""Of the pitch of a vertebra."""

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Canvas:
    """The picture while it is painted, in the body frame. Later strokes cover earlier ones."""

    anatomy: Anatomy
    rng: np.random.Generator
    origin_mm: Float[np.ndarray, "3"]
    axes_mm: tuple[Float[np.ndarray, "i"], Float[np.ndarray, "j"], Float[np.ndarray, "k"]]
    hu: Float[np.ndarray, "i j k"]
    label: UInt8[np.ndarray, "i j k"]
    weave: tuple[Float[np.ndarray, "i j k"], Float[np.ndarray, "i j k"]]
    """Two smooth random fields of unit spread: lobes, bowel loops and vessels are cut from them."""

    @staticmethod
    def blank(anatomy: Anatomy, spacing: tuple[float, float, float], rng: np.random.Generator) -> _Canvas:
        """Air, with some room around the body; the scan's length varies."""
        width, depth = anatomy.body_mm
        low = np.array([-width, -depth, 0.0]) - rng.uniform([6.0, 6.0, 172.0], [20.0, 26.0, 195.0])
        high = np.array([width, depth, anatomy.apex_mm]) + rng.uniform([6.0, 6.0, -15.0], [20.0, 14.0, 12.0])
        low = np.round(low / SPACING_STEP_MM) * SPACING_STEP_MM
        shape = [max(int((top - bottom) / edge), 4) for top, bottom, edge in zip(high, low, spacing, strict=True)]
        axes = [
            (start + np.arange(count) * edge).astype(np.float32)
            for start, count, edge in zip(low, shape, spacing, strict=True)
        ]
        return _Canvas(
            anatomy=anatomy,
            rng=rng,
            origin_mm=low,
            axes_mm=(axes[0], axes[1], axes[2]),
            hu=np.full(shape, -1000.0, np.float32),
            label=np.zeros(shape, np.uint8),
            weave=(_smooth_field(rng, axes, 26.0), _smooth_field(rng, axes, 26.0)),
        )

    def box(self, low_mm: Iterable[float], high_mm: Iterable[float]) -> Box:
        """The voxels between two corners, cut to the picture."""
        i, j, k = (
            slice(int(np.searchsorted(axis, low)), int(np.searchsorted(axis, high, side="right")))
            for axis, low, high in zip(self.axes_mm, low_mm, high_mm, strict=True)
        )
        return i, j, k

    def place(
        self, box: Box
    ) -> tuple[Float[np.ndarray, "i 1 1"], Float[np.ndarray, "1 j 1"], Float[np.ndarray, "1 1 k"]]:
        """Coordinates of a box's voxels, ready to broadcast."""
        x, y, z = (axis[part] for axis, part in zip(self.axes_mm, box, strict=True))
        return x[:, None, None], y[None, :, None], z[None, None, :]

    def paint(
        self, box: Box, where: np.ndarray, hu: float | Float[np.ndarray, "i j k"], *, organ: str | None = None
    ) -> None:
        """Cover voxels of a box with a density and an organ's label (none: background)."""
        np.copyto(self.hu[box], np.asarray(hu, np.float32), where=where)
        np.copyto(self.label[box], np.uint8(LABEL_OF[organ] if organ else 0), where=where)

    def paint_ellipsoid(self, name: str, hu: float, *, organ: str | None = None, lobes: float) -> None:
        """Cover an ellipsoid of the anatomy, dented by the smooth field and kept inside its cavity."""
        body = self.anatomy.organs[name]
        reach = body.reach_mm() * (1.0 + lobes)
        box = self.box(body.centre_mm - reach, body.centre_mm + reach)
        x, y, z = self.place(box)
        inside = self.anatomy.cavity_level(x, y, z) < 0.98
        if name != "heart":
            inside &= z < self.anatomy.diaphragm_mm(x, y) - 2.0
        self.paint(box, (body.level(x, y, z) + lobes * self.weave[0][box] < 1.0) & inside, hu, organ=organ)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A rendered anatomy, in RAS order."""

    hu: Float[np.ndarray, "i j k"]
    label: UInt8[np.ndarray, "i j k"]
    origin_mm: Float[np.ndarray, "3"]
    """Centre of the first voxel, in the body frame."""


def render(
    anatomy: Anatomy, spacing_mm: tuple[float, float, float], *, noise_hu: float, rng: np.random.Generator
) -> Picture:
    """Paint the organs in the order in which they cover one another, then add noise and blur.

    Returns:
        Whole Hounsfield units (float32) and label values, both (i, j, k) along R, A, S.
    """
    canvas = _Canvas.blank(anatomy, spacing_mm, rng)
    for stroke in (_body, _abdomen, _chest, _vessels, _spine, _fluid, _lesions):
        stroke(canvas)
    return Picture(hu=_scan(canvas, spacing_mm, noise_hu), label=canvas.label, origin_mm=canvas.origin_mm)


def _smooth_field(
    rng: np.random.Generator, axes: list[Float[np.ndarray, "_"]], pitch_mm: float
) -> Float[np.ndarray, "i j k"]:
    """White noise on a coarse grid, joined by quadratic B-splines, scaled to unit spread."""
    weights: list[Float[np.ndarray, "_ _"]] = []
    for axis in axes:
        knots = int((axis[-1] - axis[0]) / pitch_mm) + 4
        away = np.abs((axis - axis[0])[:, None] / pitch_mm + 1.0 - np.arange(knots)[None, :])
        near, far = 0.75 - away**2, 0.5 * np.maximum(1.5 - away, 0.0) ** 2
        weights.append(np.where(away < 0.5, near, far).astype(np.float32))  # the spline's inner piece
    coarse = rng.standard_normal([weight.shape[1] for weight in weights], dtype=np.float32)
    field = np.tensordot(weights[0], coarse, (1, 0))
    field = np.matmul(weights[1], field)
    field = np.matmul(field, weights[2].T)
    return field / np.float32(field.std())


def _everything(canvas: _Canvas) -> Box:
    i, j, k = canvas.hu.shape
    return slice(0, i), slice(0, j), slice(0, k)


def _body(canvas: _Canvas) -> None:
    """Skin fat, muscle, and the cavity filled with loops of bowel in fat."""
    a, box = canvas.anatomy, _everything(canvas)
    x, y, z = canvas.place(box)
    waist = 1.0 - a.waist * np.exp(-(((z + 120.0) / 50.0) ** 2)) - 0.06 * np.clip((z - 90.0) / 80.0, 0.0, 1.0) ** 2
    skin = outline(x / (a.body_mm[0] * waist), y / (a.body_mm[1] * waist)) < 1.0
    muscle = outline(x / (a.muscle_mm[0] * waist), y / (a.muscle_mm[1] * waist)) < 1.0
    canvas.paint(box, skin, a.hu["fat"])
    canvas.paint(box, muscle, a.hu["muscle"] + 3.0 * canvas.weave[1])
    level = a.cavity_level(x, y, z)
    # Ribs: oblique bands in the wall of the chest, lower in front.
    ring = np.mod((z + 0.45 * (y - a.cavity_shift_mm)) / 27.0, 1.0) < 0.36  # share of a rib's pitch
    cage = ring & (z > 0.5 * y - 85.0) & (np.abs(x) > 16.0)  # open at the breastbone
    canvas.paint(box, cage & (level > 1.02) & (level < 1.15), a.hu["rib"])  # inside the wall
    loops = np.where(canvas.weave[0] > 0.15, np.float32(a.hu["bowel"]), np.float32(a.hu["fat"] + 8.0))
    gas = (canvas.weave[0] > 1.1) & (canvas.weave[1] + y / 60.0 > 1.0) & (z < a.liver_floor_mm + 50.0)
    loops = np.where(gas, np.float32(a.hu["gas"]), loops)
    canvas.paint(box, level < 1.0, loops)


def _abdomen(canvas: _Canvas) -> None:
    """Retroperitoneal fat and psoas, stomach, liver with vessels, spleen, kidneys."""
    a = canvas.anatomy
    width, depth = a.cavity_mm
    low, high = -400.0, 400.0
    back = canvas.box((-0.7 * width, -depth, low), (0.7 * width, a.spine_y_mm + 36.0, -20.0))
    x, y, z = canvas.place(back)
    inside = a.cavity_level(x, y, z) < 0.98  # the wall's inner lining
    canvas.paint(back, inside, a.hu["fat"] + 6.0 + 4.0 * canvas.weave[1][back])
    thick = np.clip((-70.0 - z) / 90.0, 0.05, 1.0)
    psoas = ((np.abs(x) - 26.0 - 10.0 * thick) / (19.0 * thick)) ** 2 + ((y - a.spine_y_mm - 2.0) / (22.0 * thick)) ** 2
    canvas.paint(back, psoas < 1.0, a.hu["muscle"])
    stomach = a.organs["stomach"]
    canvas.paint_ellipsoid("stomach", a.hu["fluid"], lobes=0.08)
    reach = 0.86 * stomach.reach_mm()
    bubble = canvas.box(stomach.centre_mm - reach, stomach.centre_mm + reach)
    x, y, z = canvas.place(bubble)
    under = z < a.diaphragm_mm(x, y) - 6.0
    gas = (stomach.level(x, y, z) < 0.72) & (y > stomach.centre_mm[1] + 9.0) & under  # within the wall
    canvas.paint(bubble, gas, a.hu["gas"])
    whole = canvas.box((-a.liver_tip_mm - 30.0, -depth, a.liver_floor_mm), (width, high, a.dome_mm[1]))
    x, y, z = canvas.place(whole)
    liver = a.liver(x, y, z)
    vessel = (np.abs(canvas.weave[0][whole]) < 0.16) & (np.abs(canvas.weave[1][whole]) < 0.16)
    canvas.paint(whole, liver, a.hu["liver"] + 3.0 * canvas.weave[1][whole], organ="liver")
    canvas.paint(whole, liver & vessel, 0.5 * (a.hu["liver"] + a.hu["blood"]) - 4.0, organ="liver")
    for name in ("spleen", "kidney_left", "kidney_right"):
        if name not in a.removed:
            canvas.paint_ellipsoid(name, a.hu[name.partition("_")[0]], organ=name, lobes=0.06)
    for side in ("left", "right"):
        if f"kidney_{side}" not in a.removed:
            canvas.paint_ellipsoid(f"sinus_{side}", a.hu["fat"] + 20.0, lobes=0.25)


def _chest(canvas: _Canvas) -> None:
    """Mediastinum, lungs with vessels and a gradient towards the back, heart, windpipe."""
    a = canvas.anatomy
    width, depth = a.cavity_mm
    box = canvas.box((-width, -depth, -90.0), (width, depth + a.cavity_shift_mm, a.apex_mm))
    x, y, z = canvas.place(box)
    over = (z > a.diaphragm_mm(x, y)) & (a.cavity_level(x, y, z) < 1.0)
    soft = np.where(canvas.weave[0][box] > 0.3, np.float32(a.hu["muscle"] - 8.0), np.float32(a.hu["fat"] + 15.0))
    canvas.paint(box, over, soft)
    lung = a.lung(x, y, z)
    air = a.hu["lung"] - 0.5 * (y - a.cavity_shift_mm) + 18.0 * canvas.weave[1][box]
    twig = (np.abs(canvas.weave[0][box]) < 0.19) & (np.abs(canvas.weave[1][box]) < 0.19)  # thin
    air = np.where(twig, np.float32(a.hu["blood"] - 20.0), air)
    canvas.paint(box, lung & (x < 0), air, organ="lung_left")
    canvas.paint(box, lung & (x > 0), air, organ="lung_right")
    canvas.paint_ellipsoid("heart", a.hu["blood"], organ="heart", lobes=0.05)
    windpipe = canvas.box((-12.0, a.spine_y_mm, 85.0), (12.0, a.spine_y_mm + 60.0, 400.0))
    x, y, z = canvas.place(windpipe)
    tube = np.hypot(x, y - a.spine_y_mm - 44.0) < 9.0 + 0.0 * z  # its radius in mm
    canvas.paint(windpipe, tube, a.hu["gas"])


def _vessels(canvas: _Canvas) -> None:
    """Aorta to the left and in front of the spine, the lower vena cava to the right up to the heart."""
    a = canvas.anatomy
    box = canvas.box((-45.0, a.spine_y_mm, -400.0), (45.0, a.spine_y_mm + 80.0, 115.0))
    x, y, z = canvas.place(box)
    front = _spine_middle(a, z) + a.spine_radius_mm
    aorta = np.hypot(x + 12.0 + 0.06 * np.clip(z, -60.0, 100.0), y - front - 9.0) < 11.5  # radius
    cava = (np.hypot((x - 17.0) / 1.2, y - front - 8.0) < 9.5) & (z < 5.0)  # radius, right atrium
    canvas.paint(box, aorta, a.hu["blood"] + 6.0)
    canvas.paint(box, cava, a.hu["blood"] - 4.0)


def _spine_middle(anatomy: Anatomy, z: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """How far in front the vertebral bodies stand: backwards in the chest, forwards in the loin."""
    return anatomy.spine_y_mm - anatomy.kyphosis_mm * np.sin((z + 40.0) / 75.0)


def _spine(canvas: _Canvas) -> None:
    """Vertebral bodies with a hard rim, discs between them, the canal and what surrounds it."""
    a = canvas.anatomy
    box = canvas.box((-45.0, -400.0, -400.0), (45.0, a.spine_y_mm + 45.0, 400.0))
    x, y, z = canvas.place(box)
    middle = _spine_middle(a, z)
    # Vertebrae grow from the neck to the loin: a pitch of 22 mm at the top of the scan, 34 mm at its end.
    rung = np.mod(-0.0375 * z - 2.3e-5 * z * z, 1.0)
    bone = rung > DISC_SHARE
    radius = a.spine_radius_mm * (1.0 - 0.0009 * np.clip(z + 60.0, -100.0, 200.0))
    level = np.hypot(x / 1.15, y - middle) / radius
    rim = (level > 0.86) | (rung < DISC_SHARE + 0.07) | (rung > 0.93)  # shares of radius and pitch
    canal = np.hypot(x, y - middle + radius + 7.0)
    ring = (canal < 13.0) & bone  # radii in mm
    across = (np.abs(y - middle + radius + 9.0) < 4.5) & (np.abs(x) < 34.0) & (np.abs(rung - 0.6) < 0.12)
    spike = (np.abs(x) < 3.5) & (y < middle - radius - 14.0) & (y > middle - radius - 40.0) & (rung > 0.45)
    canvas.paint(box, level < 1.0, a.hu["disc"])
    canvas.paint(box, ring | across | spike, 0.6 * a.hu["cortex"], organ="spine")
    canvas.paint(box, (level < 1.0) & bone, a.hu["marrow"] + 12.0 * canvas.weave[1][box], organ="spine")
    canvas.paint(box, (level < 1.0) & bone & rim, a.hu["cortex"], organ="spine")
    canvas.paint(box, canal < 8.0, a.hu["cord"])  # its radius in mm


def _fluid(canvas: _Canvas) -> None:
    """Fluid about the lungs of a patient who lies on the back: a crescent that takes its share of their room."""
    a = canvas.anatomy
    for side, share in zip(("left", "right"), a.effusion, strict=True):
        lung = np.argwhere(canvas.label == LABEL_OF[f"lung_{side}"]) if share > 0 else np.empty((0, 3), np.intp)
        if not len(lung):
            continue
        x, y, z = (axis[index] for axis, index in zip(canvas.axes_mm, lung.T, strict=True))
        order = a.fluid_order(x, y, z)
        i, j, k = lung[order < np.quantile(order, share)].T
        canvas.hu[i, j, k] = a.effusion_hu
        canvas.label[i, j, k] = LABEL_OF[f"effusion_{side}"]


def _lesions(canvas: _Canvas) -> None:
    a = canvas.anatomy
    for lesion in a.lesions:
        centre = np.array(lesion.centre_ras_mm) - np.array(a.offset_ras_mm)
        box = canvas.box(centre - lesion.radius_mm, centre + lesion.radius_mm)
        x, y, z = canvas.place(box)
        ball = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2 < lesion.radius_mm**2
        density = a.hu["nodule"] if lesion.organ == "lung" else a.hu["liver"] + lesion.contrast_hu
        canvas.paint(box, ball, density + lesion.chalk_hu, organ="lesion")


def _scan(canvas: _Canvas, spacing: tuple[float, float, float], noise_hu: float) -> Float[np.ndarray, "i j k"]:
    """Noise, then the slight blur of a reconstruction kernel; whole Hounsfield units in the range of a scanner."""
    blurs = [min(0.5 * (0.9 / edge) ** 2, 0.25) for edge in spacing]  # 0.9 mm: a soft-tissue kernel
    kept = float(np.prod([(1 - 2 * side) ** 2 + 2 * side**2 for side in blurs])) ** 0.5
    picture = canvas.rng.standard_normal(canvas.hu.shape, dtype=np.float32)
    picture *= np.float32(noise_hu / kept)  # so that the spread after the blur is noise_hu
    picture += canvas.hu
    for axis, side in enumerate(blurs):
        lines = np.moveaxis(picture, axis, 0)
        middle = lines[1:-1] * np.float32(1 - 2 * side)
        middle += np.float32(side) * lines[:-2]
        middle += np.float32(side) * lines[2:]
        lines[1:-1] = middle
    np.rint(picture, out=picture)
    return np.clip(picture, -1024.0, 3071.0, out=picture)
