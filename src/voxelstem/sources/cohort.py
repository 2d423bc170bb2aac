"""A phantom cohort: invented patients who are watched after their scan, with a hazard that can be seen in the voxels.

An event is as likely on any day as on another, and likelier the larger the spleen, the larger the lesions and the
thicker the fat under the skin. So the true risk of everybody is known, and with it how well anybody can do: who ranks
by it reaches the ceiling. It proves that machinery works and nothing about medicine.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from voxelstem.errors import VoxelstemError
from voxelstem.sources.phantom import PhantomConfig, phantom, phantom_anatomy, study_files
from voxelstem.study import Study, Survival

USUAL_SPLEEN_ML, USUAL_FAT_MM = 165.0, 19.0
"""Of the middle phantom. With these and without a lesion, half of all patients have had their event by
`CohortConfig.median_months`."""
COLUMNS: tuple[str, ...] = ("subject", "time", "event", "hazard_per_month")
"""Of the table that `cohort_files` writes. Label files may have more columns than are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CohortConfig:
    """What makes the event likelier, how long patients are watched, and how the scanner sees them.

    The usual effects spread log hazards by about 1.2 (standard deviation), by which the true risk ranks about three
    pairs of four rightly. Patient, event, watch and picture have streams of random numbers of their own.
    """

    per_spleen_doubling: float = 1.0
    """Added to the log hazard for each doubling of the spleen's volume."""
    per_lesion_cm: float = 1.0
    """For each centimetre of the radius of one ball as large as all lesions together."""
    per_fat_cm: float = 1.0
    """For each centimetre of fat at the sides of the body."""
    median_months: float = 24.0
    """Until the event, of a patient of usual spleen and fat and without a lesion."""
    watched_months: tuple[float, float] = (6.0, 60.0)
    """Watches end between these, whoever the patient is: whose event comes later is censored."""
    lesion_radius_mm: tuple[float, float] = (6.0, 16.0)
    spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0)
    """Along R, A, S."""
    orientation: str = "RAS"
    """How the array axes of a written file run; one of all 48 when `random`."""
    noise_hu: float = 18.0

    def __post_init__(self) -> None:
        """Guard the settings.

        Raises:
            ValueError: an effect that is no number, a time out of range, or what `PhantomConfig` refuses.
        """
        if not all(map(math.isfinite, (self.per_spleen_doubling, self.per_lesion_cm, self.per_fat_cm))):
            raise ValueError("effects must be finite numbers")
        if not 0 < self.median_months < math.inf:
            raise ValueError(f"median_months must be positive, got {self.median_months}")
        if not 0 < self.watched_months[0] <= self.watched_months[1] < math.inf:
            raise ValueError(f"watched_months must run from short to long, got {self.watched_months}")
        self.patient(0)

    def patient(self, seed: int) -> PhantomConfig:
        """The phantom behind a patient of the cohort.

        Raises:
            ValueError: a setting is out of range.
        """
        return PhantomConfig(
            seed=seed,
            lesion_radius_mm=self.lesion_radius_mm,
            spacing_mm=self.spacing_mm,
            orientation=self.orientation,
            noise_hu=self.noise_hu,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """What is true of a patient, and what was seen of it until the watch ended."""

    subject: str
    spleen_ml: float
    """As it was drawn, before its neighbours take their share: what is seen of it follows (0.94 in logarithms)."""
    lesion_mm: float
    """Radius of one ball as large as all lesions together; 0 without."""
    fat_mm: float
    hazard_per_month: float
    """The true one, the same at all times: the chance of no event by month t is exp(-hazard_per_month * t)."""
    survival: Survival
    """In months."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CohortFiles:
    """Where `cohort_files` wrote what `ingest` and `adapt` read."""

    scans: Path
    labels: Path
    reports: Path
    survival: Path
    """`COLUMNS`, one row a patient."""


def fate(config: CohortConfig, seed: int) -> Fate:
    """The truth about a patient, without drawing the scan.

    Raises:
        ValueError: a negative seed, or lesions too large to fit.
    """
    anatomy = phantom_anatomy(config.patient(seed))
    spleen_ml = 4 / 3 * math.pi * float(np.prod(anatomy.organs["spleen"].radii_mm)) / 1000
    lesion_mm = sum(lesion.radius_mm**3 for lesion in anatomy.lesions) ** (1 / 3)
    fat_mm = float(anatomy.body_mm[0] - anatomy.muscle_mm[0])
    log_ratio = (
        config.per_spleen_doubling * math.log2(spleen_ml / USUAL_SPLEEN_ML)
        + config.per_lesion_cm * lesion_mm / 10
        + config.per_fat_cm * (fat_mm - USUAL_FAT_MM) / 10
    )
    hazard = math.log(2) / config.median_months * math.exp(log_ratio)
    came = float(np.random.default_rng([seed, 30]).exponential()) / hazard
    ended = float(np.random.default_rng([seed, 31]).uniform(*config.watched_months))
    return Fate(
        subject=f"cohort-{seed:06d}",
        spleen_ml=spleen_ml,
        lesion_mm=lesion_mm,
        fat_mm=fat_mm,
        hazard_per_month=hazard,
        # As it is written, and never 0: an event at the scan itself comes before anybody could be compared.
        survival=Survival(time=max(round(min(came, ended), 2), 0.01), event=came <= ended),
    )


def cohort(config: CohortConfig, seeds: Iterable[int]) -> Iterator[Study]:
    """Draw patients: labelled CTs as `phantom` draws them, with `time`, `event` and `hazard_per_month` as labels.

    Raises:
        ValueError: a negative seed, or lesions too large to fit.
    """
    for seed in seeds:
        known = fate(config, seed)
        study = phantom(config.patient(seed))
        told = {
            "time": f"{known.survival.time:.2f}",
            "event": str(int(known.survival.event)),
            "hazard_per_month": f"{known.hazard_per_month:.10g}",
        }
        yield replace(study, subject=known.subject, labels=study.labels | told)


def cohort_files(folder: Path, config: CohortConfig, seeds: Iterable[int]) -> CohortFiles:
    """Write patients as the files a hospital would have, as `phantom_files` does, and `survival.csv`.

    Raises:
        ValueError: a negative seed, or lesions too large to fit.
        VoxelstemError: the folder cannot be written.
    """
    known: list[Study] = []

    def drawn() -> Iterator[Study]:
        for study in cohort(config, seeds):
            known.append(replace(study, volumes=()))
            yield study

    files = study_files(folder, drawn(), tables=())
    path = folder / "survival.csv"
    write_survival(path, known)
    return CohortFiles(scans=files.scans, labels=files.labels, reports=files.reports, survival=path)


def write_survival(path: Path, studies: Iterable[Study]) -> None:
    """Write the label file of patients of a cohort, with their true hazard in a column that `adapt` does not read.

    Raises:
        VoxelstemError: the file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as handle:
            table = csv.writer(handle)
            table.writerow(COLUMNS)
            table.writerows([study.subject, *(study.labels[name] for name in COLUMNS[1:])] for study in studies)
    except OSError as error:
        raise VoxelstemError(
            f"{path.name} cannot be written: {error.strerror}", hint="check the folder's rights and free some space"
        ) from error
