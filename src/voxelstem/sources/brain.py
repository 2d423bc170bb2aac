"""A procedural brain: sessions and contrasts of one head, with volumes, growth and lesions that are known.

What is asked of models of brain MRI can be proven on it: that contrasts of a session share their anatomy, that some
contrasts show what others do not, that change over years is seen. Like all phantoms it proves that machinery works and
nothing about medicine.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

from voxelstem.sources.brain_anatomy import (
    CLASSES,
    HIPPOCAMPI,
    HIPPOCAMPUS_MM,
    INSIDE,
    VALUE,
    Axes,
    Head,
    Waves,
    draw_blob,
    paint,
)
from voxelstem.sources.canvas import SPACING_STEP_MM
from voxelstem.study import INTRACRANIAL, VOLUME_LABEL, Acquisition, LabelMap, Provenance, Study, Volume

Contrast = Literal["T1w", "T2w", "FLAIR", "DWI"]
Random = Literal["random"]
INTENSITIES = MappingProxyType(
    {
        "T1w": (0, 620, 60, 130, 420, 640, 130, 400, 400, 0),
        "T2w": (0, 480, 60, 900, 520, 380, 900, 540, 540, 0),
        "FLAIR": (0, 460, 60, 90, 560, 420, 90, 600, 600, 900),
        "DWI": (0, 160, 30, 110, 480, 390, 110, 500, 500, 950),
    }
)
"""What each value of `CLASSES` looks like, from air on, by contrast. A lesion at 0 looks like the tissue it is in."""
CONTRASTS: tuple[Contrast, ...] = ("T1w", "T2w", "FLAIR", "DWI")
SCANNERS = 4
"""Machines that differ in gain, sharpness and noise."""
DAYS_A_YEAR = 365.25
YOUNG, OLD = 20.0, 85.0
"""Ages at the first session."""
VENTRICLE_SHARE, SHARE_A_YEAR = 0.012, 0.0009
"""Of the inside of the skull: at the age of 20, and what each year adds."""
HIPPOCAMPUS_A_YEAR = 0.004
"""Share of a young hippocampus that each year after 20 takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BrainConfig:
    """Which invented person, at which session, in which contrast, and how the scanner sees it.

    Person, course over the years, lesion, session and picture have streams of random numbers of their own: to settle
    one thing leaves the others as they were. The head does not depend on the grid.
    """

    seed: int
    """The person."""
    session: int = 0
    contrast: Contrast = "T1w"
    age_years: float | Random = "random"
    """At the first session: it decides how large the ventricles are."""
    years: float | Random = "random"
    """Since the first session; 0 for the first and 1 to 3 a session when `random`."""
    ventricle_growth: float | Random = "random"
    """Share by which ventricles grow a year."""
    hippocampus_loss: float | Random = "random"
    """Share by which hippocampi shrink a year."""
    pathology: Literal["none", "infarct", "random"] = "random"
    """An infarct is seen in FLAIR and DWI only. Half of all people have one."""
    scanner: int | Random = "random"
    """One of `SCANNERS`, by its number."""
    shape_ijk: tuple[int, int, int] = (32, 32, 32)
    spacing_mm: tuple[float, float, float] = (5.0, 5.0, 5.0)
    """Along R, A, S."""
    shift_mm: float = 0.0
    """How far the head lies elsewhere at each session; at 0 all sessions of a person are registered."""
    noise: float = 0.03
    """Standard deviation of the noise, as a share of white matter in T1w."""

    def __post_init__(self) -> None:
        """Guard the settings.

        Raises:
            ValueError: a number is out of range, or there is no such contrast or scanner.
        """
        if min(self.seed, self.session) < 0:
            raise ValueError(f"seed and session must not be negative, got {self.seed} and {self.session}")
        if self.contrast not in CONTRASTS:
            raise ValueError(f"contrast must be one of {', '.join(CONTRASTS)}, got '{self.contrast}'")
        if self.pathology not in ("none", "infarct", "random"):
            raise ValueError(f"pathology must be 'none', 'infarct' or 'random', got '{self.pathology}'")
        if self.age_years != "random" and not YOUNG <= self.age_years <= OLD:
            raise ValueError(f"age_years must be 'random' or {YOUNG:g} to {OLD:g}, got {self.age_years}")
        if self.scanner != "random" and not 0 <= self.scanner < SCANNERS:
            raise ValueError(f"scanner must be 'random' or 0 to {SCANNERS - 1}, got {self.scanner}")
        rates = [rate for rate in (self.ventricle_growth, self.hippocampus_loss) if rate != "random"]
        if any(not -0.5 < rate < 0.5 for rate in rates):  # noqa: PLR2004 - half of it a year is no illness any more
            raise ValueError(f"rates must be 'random' or between -0.5 and 0.5 a year, got {rates}")
        if self.years != "random" and self.years < 0:
            raise ValueError(f"years must not be negative, got {self.years}")
        if min(self.shape_ijk) < 1 or min(self.spacing_mm) <= 0:
            raise ValueError(f"shape_ijk and spacing_mm must be positive, got {self.shape_ijk} and {self.spacing_mm}")
        if self.shift_mm < 0 or self.noise < 0:
            raise ValueError(f"shift_mm and noise must not be negative, got {self.shift_mm} and {self.noise}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """What the years do to a person: the answers that longitudinal models are asked for."""

    age_years: float
    """At this session."""
    years: float
    """Since the first session."""
    date: str
    sex: str
    ventricle_growth: float
    """Share a year."""
    hippocampus_loss: float
    """Share a year."""


def brain(config: BrainConfig) -> Study:
    """Draw one contrast of one session: a labelled MR volume in whole numbers and RAS+, and all facts as labels.

    Returns:
        A study with one volume. Its voxel labels are `CLASSES`; its scan-level labels are those of `volumes_of`,
        `pathology` (yes, no), `lesion_mm3`, `rate:ventricles` and `rate:hippocampus` (change as a share a year) and
        `scanner`. The same config gives the same bytes.

    Raises:
        ValueError: the ventricles leave no room for a lesion.
    """
    course, head = invent(config)
    axes = _axes(config)
    painted = paint(head, axes)
    scanner = _scanner(config)
    array = _scan(config, painted.label, painted.tissue, axes, scanner)[None]
    affine = np.diag([*config.spacing_mm, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes] + _shift(config)
    who = subject(config.seed)
    visit = f"{config.session + 1:02d}"
    volume = Volume(
        array=array,
        affine_ras=affine,
        modality="MR",
        provenance=Provenance(
            source_format="phantom", sha256=hashlib.sha256(array.tobytes()).hexdigest(), orientation="RAS"
        ),
        acquisition=Acquisition(
            study=f"{who}_ses-{visit}",
            group=f"{who}_ses-{visit}_{config.contrast}",
            session=visit,
            date=course.date,
            age_years=course.age_years,
            sex=course.sex,
            contrast=config.contrast,
        ),
        labels=LabelMap(array=painted.label.astype(np.int16), classes=dict(CLASSES)),
    )
    lesion = np.count_nonzero(painted.label == VALUE["lesion"]) * float(np.prod(config.spacing_mm))
    labels = volumes_of(painted.tissue, config.spacing_mm) | {
        "pathology": "yes" if head.blob else "no",
        "lesion_mm3": f"{lesion:.10g}",
        "rate:ventricles": f"{course.ventricle_growth:.5f}",
        "rate:hippocampus": f"{-course.hippocampus_loss:.5f}",
        "scanner": str(scanner),
    }
    return Study(subject=who, volumes=(volume,), labels=labels)


def brain_subject(
    seed: int,
    *,
    sessions: int = 1,
    contrasts: Sequence[Contrast] = CONTRASTS,
    like: BrainConfig | None = None,
) -> list[Study]:
    """All contrasts of all sessions of a person, session by session.

    Args:
        seed: The person.
        sessions: How many.
        contrasts: Of each session.
        like: Where all other settings come from; `years` counts for each session by itself, so leave it `random`.
    """
    usual = like or BrainConfig(seed=seed)
    return [
        brain(replace(usual, seed=seed, session=session, contrast=contrast))
        for session in range(sessions)
        for contrast in contrasts
    ]


def subject(seed: int) -> str:
    """The id of a brain phantom's person."""
    return f"brain-{seed:06d}"


def volumes_of(tissue: UInt8[np.ndarray, "i j k"], spacing_mm: tuple[float, float, float]) -> dict[str, str]:
    """Scan-level labels `volume:<structure>` in mm3: voxels of a map of tissues times the voxel's volume.

    Of all that lies inside the skull, and of `INTRACRANIAL`, its sum. A lesion counts as the tissue that it lies in, as
    a program for healthy brains counts it: otherwise volumes alone would tell who has one.
    """
    counts = np.bincount(tissue.ravel(), minlength=len(CLASSES) + 1) * float(np.prod(spacing_mm))
    sizes = {name: float(counts[VALUE[name]]) for name in INSIDE}
    sizes[INTRACRANIAL] = sum(sizes.values())
    return {f"{VOLUME_LABEL}{name}": f"{size:.10g}" for name, size in sizes.items()}


def invent(config: BrainConfig) -> tuple[Course, Head]:
    """The person at this session, and what the years did.

    Raises:
        ValueError: the ventricles leave no room for a lesion.
    """
    first = _first(config)
    course = _course(config)
    head = first
    if _has_lesion(config):
        # In the head of the first session, so that the lesion stays where it is.
        head = replace(first, blob=draw_blob(first, np.random.default_rng([config.seed, 22, 1])))
    grown, left = (1 + course.ventricle_growth) ** course.years, (1 - course.hippocampus_loss) ** course.years
    return course, replace(
        head,
        ventricles_mm3=first.ventricles_mm3 * grown,
        hippocampi_mm3={name: size * left for name, size in first.hippocampi_mm3.items()},
    )


def _first_age(config: BrainConfig) -> float:
    drawn = float(np.random.default_rng([config.seed, 20]).uniform(YOUNG, OLD))
    return drawn if config.age_years == "random" else config.age_years


def _first(config: BrainConfig) -> Head:
    """The head at the first session."""
    rng = np.random.default_rng([config.seed, 21])
    radii = np.array([63.0, 74.0, 61.0]) * rng.uniform(0.94, 1.06, 3)
    thick = rng.uniform(0.8, 1.2, 4)
    bend = [Waves.draw(rng, length_mm=(70.0, 140.0), amplitude=3.0) for _ in range(3)]
    folds = Waves.draw(rng, length_mm=(22.0, 40.0), amplitude=2.5, count=10)
    own, sides = np.exp(rng.normal(0, 0.06)), np.exp(rng.normal(0, 0.06, 2))
    older = _first_age(config) - YOUNG
    share = (VENTRICLE_SHARE + SHARE_A_YEAR * older) * own
    young = 4 / 3 * np.pi * float(np.prod(HIPPOCAMPUS_MM)) * (1 - HIPPOCAMPUS_A_YEAR * older)
    head = Head(
        radii_mm=(float(radii[0]), float(radii[1]), float(radii[2])),
        skull_mm=6.0 * thick[0],
        scalp_mm=6.0 * thick[1],
        csf_mm=4.0 * thick[2],
        cortex_mm=9.0 * thick[3],
        bend=(bend[0], bend[1], bend[2]),
        folds=folds,
        ventricles_mm3=0.0,
        hippocampi_mm3={name: young * float(side) for name, side in zip(HIPPOCAMPI, sides, strict=True)},
    )
    return replace(head, ventricles_mm3=head.intracranial_mm3 * float(share))


def _course(config: BrainConfig) -> Course:
    rng = np.random.default_rng([config.seed, 23])
    growth, loss = rng.uniform(0.0, 0.12), rng.uniform(0.0, 0.08)
    sex, start = str(rng.choice(["F", "M"])), int(rng.integers(3650))
    # One gap after another: a further session leaves the earlier ones where they were.
    gaps = [float(rng.uniform(1.0, 3.0)) for _ in range(config.session)]
    wanted = sum(gaps) if config.years == "random" else config.years
    days = round(wanted * DAYS_A_YEAR)
    return Course(
        age_years=round(_first_age(config) + days / DAYS_A_YEAR, 2),
        years=days / DAYS_A_YEAR,
        date=(datetime.date(2010, 1, 1) + datetime.timedelta(days=start + days)).isoformat(),
        sex=sex,
        ventricle_growth=float(growth) if config.ventricle_growth == "random" else config.ventricle_growth,
        hippocampus_loss=float(loss) if config.hippocampus_loss == "random" else config.hippocampus_loss,
    )


def _has_lesion(config: BrainConfig) -> bool:
    drawn = bool(np.random.default_rng([config.seed, 22]).random() < 0.5)  # noqa: PLR2004 - half of all people
    return drawn if config.pathology == "random" else config.pathology == "infarct"


def _scanner(config: BrainConfig) -> int:
    drawn = int(np.random.default_rng([config.seed, 24, config.session]).integers(SCANNERS))
    return drawn if config.scanner == "random" else config.scanner


def _shift(config: BrainConfig) -> Float[np.ndarray, "3"]:
    """Where the head lies in the scanner, in steps that float32 headers hold exactly."""
    drawn = np.random.default_rng([config.seed, 25, config.session]).uniform(-1, 1, 3) * config.shift_mm
    return np.round(drawn / SPACING_STEP_MM) * SPACING_STEP_MM


def _axes(config: BrainConfig) -> Axes:
    """Places of voxel centres in the head frame."""
    x, y, z = (
        ((np.arange(count) - (count - 1) / 2) * edge).astype(np.float32)
        for count, edge in zip(config.shape_ijk, config.spacing_mm, strict=True)
    )
    shift = _shift(config).astype(np.float32)
    return x - shift[0], y - shift[1], z - shift[2]


def _scan(
    config: BrainConfig,
    label: UInt8[np.ndarray, "i j k"],
    tissue: UInt8[np.ndarray, "i j k"],
    axes: Axes,
    scanner: int,
) -> Float[np.ndarray, "i j k"]:
    """What the scanner makes of the head: contrast, bias, blur, gain and noise that is never negative."""
    number = CONTRASTS.index(config.contrast)
    machine = np.random.default_rng([scanner, 26, number])
    gain, width_mm, grain = machine.uniform(0.6, 1.6), machine.uniform(1.0, 8.0), machine.uniform(0.7, 1.3)
    rng = np.random.default_rng([config.seed, 27, config.session, number])
    table = np.array(INTENSITIES[config.contrast], np.float32) * rng.normal(1.0, 0.02, len(CLASSES) + 1)
    bias = Waves.draw(rng, length_mm=(200.0, 400.0), amplitude=0.12, count=3)
    shown = label if INTENSITIES[config.contrast][VALUE["lesion"]] else tissue
    clean = (table.astype(np.float32)[shown] + 20.0 * _grain(config, axes) * (shown > 0)) * np.exp(bias(axes))
    for axis, edge in enumerate(config.spacing_mm):
        clean = np.moveaxis(np.tensordot(_blur(len(axes[axis]), width_mm / 2.355 / edge), clean, (1, axis)), 0, axis)
    spread = config.noise * grain * INTENSITIES["T1w"][VALUE["white_matter"]]
    noise = rng.standard_normal((2, *clean.shape), dtype=np.float32) * np.float32(spread)
    return np.round(gain * np.hypot(clean + noise[0], noise[1])).astype(np.float32)


def _grain(config: BrainConfig, axes: Axes) -> Float[np.ndarray, "i j k"]:
    """Texture of the tissue, which all contrasts and sessions of a person share; unit spread."""
    rng = np.random.default_rng([config.seed, 28])
    return Waves.draw(rng, length_mm=(20.0, 50.0), amplitude=1.0, count=10)(axes)


def _blur(size: int, sigma: float) -> Float[np.ndarray, "size size"]:
    """The matrix that blurs an axis by a Gaussian of `sigma` voxels; what reaches over the edge is left out."""
    apart = np.arange(size)[:, None] - np.arange(size)[None]
    weight = np.exp(-0.5 * (apart / max(sigma, 1e-3)) ** 2)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
