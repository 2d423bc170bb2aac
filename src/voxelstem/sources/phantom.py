"""A procedural CT of the chest and abdomen: seeded, labelled, with lesions of known size and place.

It exists so that documentation, tests and the demo can run the whole journey on any machine. Liver,
spleen, kidneys and muscle differ by little more than the noise, so a model must learn where things lie
and not only how bright they are. It proves that machinery works and nothing about medicine.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

from voxelstem.errors import VoxelstemError
from voxelstem.sources import nifti
from voxelstem.sources.anatomy import CLASSES, Anatomy, draw_anatomy, draw_lesion, report
from voxelstem.sources.canvas import SPACING_STEP_MM, render
from voxelstem.study import LabelMap, Provenance, Report, Study, Volume

ORIENTATIONS = tuple(
    "".join(("RL", "AP", "SI")[axis][sign >> axis & 1] for axis in order)
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    for sign in range(8)
)
"""All 48 ways in which the array axes of a scan can run along a patient's axes."""

Random = Literal["random"]
MOST_VOXELS = 3.0e6


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomConfig:
    """Which invented patient, and how the scanner sees it.

    The patient depends on `seed` and the lesion settings only: another spacing, orientation or noise
    shows the same one.
    """

    seed: int
    lesions: int | Random = "random"
    """How many; drawn from 0 (half of all patients) to 3 when `random`."""
    lesion_radius_mm: tuple[float, float] = (6.0, 16.0)
    spleen: Literal["normal", "enlarged", "random"] = "random"
    phase: Literal["none", "portal", "random"] = "random"
    spacing_mm: tuple[float, float, float] | Random = "random"
    """Along R, A, S. Drawn from 1.5-3 mm in the slice and 2-5 mm between slices when `random`."""
    orientation: str = "random"
    """How the array axes of the written file run, such as `LPS`; one of all 48 when `random`."""
    noise_hu: float = 18.0

    def __post_init__(self) -> None:
        """Guard the settings.

        Raises:
            ValueError: a number is out of range or an orientation does not exist.
        """
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.lesions != "random" and not 0 <= self.lesions <= 5:  # noqa: PLR2004 - more find no room
            raise ValueError(f"lesions must be 'random' or 0 to 5, got {self.lesions}")
        if not 0 < self.lesion_radius_mm[0] <= self.lesion_radius_mm[1]:
            raise ValueError(f"lesion_radius_mm must run from small to large, got {self.lesion_radius_mm}")
        if self.spacing_mm != "random" and min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        if self.orientation != "random" and self.orientation not in ORIENTATIONS:
            raise ValueError(f"orientation must be 'random' or letters such as LPS, got '{self.orientation}'")
        if self.noise_hu < 0:
            raise ValueError(f"noise_hu must not be negative, got {self.noise_hu}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomFiles:
    """Where `phantom_files` wrote what `ingest` and `adapt` read."""

    scans: Path
    labels: Path
    reports: Path
    tables: dict[str, Path]
    """One `subject,label` table for each scan-level fact: `lesion`, `spleen`, `contrast`."""


def phantom_anatomy(config: PhantomConfig) -> Anatomy:
    """Invent the patient that `phantom` renders: the answers to every question about it.

    Raises:
        ValueError: the wanted lesions are too large to fit.
    """
    rng = np.random.default_rng([config.seed, 0])
    # All choices are drawn, also the settled ones, so that settling one does not change the others.
    spleen = str(rng.choice(["normal", "enlarged"], p=[0.7, 0.3]))
    phase = str(rng.choice(["none", "portal"]))
    count = int(rng.choice([0, 1, 2, 3], p=[0.5, 0.25, 0.15, 0.1]))
    spleen = spleen if config.spleen == "random" else config.spleen
    phase = phase if config.phase == "random" else config.phase
    count = count if config.lesions == "random" else config.lesions
    anatomy = invent(rng, spleen_enlarged=spleen == "enlarged", phase=phase)
    for _ in range(count):
        lesion = draw_lesion(rng, anatomy, taken=anatomy.lesions, radius_mm=config.lesion_radius_mm)
        anatomy = replace(anatomy, lesions=(*anatomy.lesions, lesion))
    return anatomy


def invent(rng: np.random.Generator, *, spleen_enlarged: bool, phase: str) -> Anatomy:
    """Draw a patient without lesions whose place on the table fits into float32 headers exactly."""
    anatomy = draw_anatomy(rng, spleen_enlarged=spleen_enlarged, phase=phase)
    x, y, z = (round(edge / SPACING_STEP_MM) * SPACING_STEP_MM for edge in anatomy.offset_ras_mm)
    return replace(anatomy, offset_ras_mm=(x, y, z))


def phantom(config: PhantomConfig) -> Study:
    """Render one labelled CT, in RAS+ and whole Hounsfield units.

    Returns:
        A study with one volume (about 0.5 to 3 million voxels unless `spacing_mm` says otherwise), organ
        labels, a report, and the facts `lesion`, `spleen` and `contrast`. The same config gives the same bytes.

    Raises:
        ValueError: the wanted lesions are too large to fit.
    """
    anatomy = phantom_anatomy(config)
    rng = np.random.default_rng([config.seed, 1])
    spacing = _spacing(config, rng)
    drawn = str(rng.choice(ORIENTATIONS)) if config.orientation == "random" else config.orientation
    volume = scan(anatomy, spacing, noise_hu=config.noise_hu, orientation=drawn, rng=rng)
    facts = {
        "lesion": "yes" if anatomy.lesions else "no",
        "spleen": "enlarged" if anatomy.spleen_enlarged else "normal",
        "contrast": "yes" if anatomy.phase == "portal" else "no",
    }
    return Study(subject=f"phantom-{config.seed:04d}", volumes=(volume,), report=report(anatomy), labels=facts)


def scan(
    anatomy: Anatomy,
    spacing_mm: tuple[float, float, float],
    *,
    noise_hu: float,
    orientation: str,
    rng: np.random.Generator,
    classes: Mapping[int, str] = CLASSES,
) -> Volume:
    """Render a patient: a labelled CT in RAS+ and whole Hounsfield units.

    Args:
        anatomy: The patient.
        spacing_mm: Along R, A, S.
        noise_hu: Spread of the noise.
        orientation: How the array axes of a written file run.
        rng: Draws the scan's length, lobes, vessels and noise.
        classes: Names of the label values that may occur.
    """
    picture = render(anatomy, spacing_mm, noise_hu=noise_hu, rng=rng)
    array = picture.hu[None]
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = picture.origin_mm + np.array(anatomy.offset_ras_mm)
    return Volume(
        array=array,
        affine_ras=affine,
        modality="CT",
        provenance=Provenance(
            source_format="phantom", sha256=hashlib.sha256(array.tobytes()).hexdigest(), orientation=orientation
        ),
        labels=LabelMap(array=picture.label.astype(np.int16), classes=dict(classes)),
    )


def phantom_files(folder: Path, configs: Iterable[PhantomConfig]) -> PhantomFiles:
    """Write phantoms as the files a hospital would have, for `ingest` to read.

    `scans/<subject>/ct.nii.gz` in the drawn orientation, masks at the same place below `labels/` with
    `labels/labels.json`, one line a scan in `reports.jsonl`, and `<fact>.csv` with `subject,label`.

    Raises:
        VoxelstemError: the folder cannot be written.
    """
    return study_files(folder, map(phantom, configs), tables=("lesion", "spleen", "contrast"))


def study_files(folder: Path, studies: Iterable[Study], *, tables: tuple[str, ...]) -> PhantomFiles:
    """Write drawn studies of one labelled volume as `phantom_files` does, with a table for each of these facts.

    Raises:
        VoxelstemError: the folder cannot be written.
    """
    files = PhantomFiles(
        scans=folder / "scans",
        labels=folder / "labels",
        reports=folder / "reports.jsonl",
        tables={fact: folder / f"{fact}.csv" for fact in tables},
    )
    try:
        _write_files(files, studies)
    except OSError as error:
        raise VoxelstemError(
            f"phantoms cannot be written into '{folder.name}': {error.strerror}",
            hint="check the folder's rights and free some space: a phantom takes 2 to 6 MB",
        ) from error
    return files


def _write_files(files: PhantomFiles, drawn: Iterable[Study]) -> None:
    studies: list[Study] = []
    names: dict[int, str] = {}
    for study in drawn:
        volume = study.volumes[0]
        assert volume.labels is not None  # every phantom has labels
        names |= volume.labels.classes
        relative = Path(study.subject) / "ct.nii.gz"
        orientation = volume.provenance.orientation
        arrays = volume.array[0].astype(np.int16), volume.labels.array.astype(np.uint8)
        for root, array in zip((files.scans, files.labels), arrays, strict=True):
            nifti.write(root / relative, *turn_from_ras(array, volume.affine_ras, orientation))
        # The voxels are on disk: keep the words only.
        studies.append(replace(study, volumes=()))
    files.labels.mkdir(parents=True, exist_ok=True)
    classes = {str(value): name for value, name in names.items()}
    (files.labels / "labels.json").write_text(json.dumps({"classes": classes}, indent=1) + "\n")
    with files.reports.open("w", encoding="utf-8") as lines:
        for study in studies:
            said = study.report or Report()
            sections = {"findings": said.findings_text, "impression": said.impression_text, "language": said.language}
            lines.write(json.dumps({"subject": study.subject, **sections}) + "\n")
    for fact, path in files.tables.items():
        with path.open("w", newline="", encoding="utf-8") as handle:
            table = csv.writer(handle)
            table.writerow(["subject", "label"])
            table.writerows([study.subject, study.labels[fact]] for study in studies)


def turn_from_ras(
    array_ras: Shaped[np.ndarray, "i j k"], affine_ras: Float[np.ndarray, "4 4"], orientation: str
) -> tuple[Shaped[np.ndarray, "a b c"], Float[np.ndarray, "4 4"]]:
    """Let the array axes run as `orientation` says; `geometry.to_ras` is the exact way back."""
    order = ["RAS".find(letter) if letter in "RAS" else "LPI".find(letter) for letter in orientation]
    affine = affine_ras.copy()
    affine[:, :3] = affine[:, order]
    turned = np.transpose(array_ras, order)
    for axis, letter in enumerate(orientation):
        if letter in "LPI":
            turned = np.flip(turned, axis)
            affine[:3, 3] += affine[:3, axis] * (turned.shape[axis] - 1)
            affine[:3, axis] *= -1
    return np.ascontiguousarray(turned), affine


def _spacing(config: PhantomConfig, rng: np.random.Generator) -> tuple[float, float, float]:
    in_slice, share = rng.uniform(1.5, 3.0), rng.random()
    if config.spacing_mm != "random":
        return config.spacing_mm
    # A fine slice gets thick ones: keeps every phantom below MOST_VOXELS.
    between = 350.0 * 250.0 * 370.0 / MOST_VOXELS / in_slice**2
    lowest = min(max(2.0, between), 5.0)
    in_slice, between = (
        float(np.ceil(edge / SPACING_STEP_MM) * SPACING_STEP_MM) for edge in (in_slice, lowest + share * (5.0 - lowest))
    )
    return in_slice, in_slice, between
