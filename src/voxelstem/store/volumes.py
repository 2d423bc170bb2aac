"""Volumes of structures as programs measured them: tables with named columns, SynthSeg's above all, and label maps.

SynthSeg (Billot et al. 2023) writes one row a scan: its file's name in `subject`, volumes in mm3 by the structure's
name, and in another table scores of quality between 0 and 1. Columns are found by their names, wherever they stand.
Messages name rows and columns, never what stands in `subject`.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from voxelstem.errors import ConfigError
from voxelstem.store.labels import read_table
from voxelstem.study import INTRACRANIAL, VOLUME_LABEL, LabelMap

LEAST_MM3 = 1000.0
"""With a smaller volume inside the skull, nothing was measured."""
PLAUSIBLE_MM3 = (0.9e6, 2.6e6)
"""Of the inside of the skull."""
MISSING = ("", "nan", "n/a", "na", "none")
SUBJECT = "subject"
_NO_STRUCTURE = re.compile(r"(^|[\W_])(id|mrn|pid|age|date|sex|session|number|accession)([\W_]|$)", re.IGNORECASE)
"""Words of columns that say who somebody is; a column without a name is left out anyway."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One run of a program over one scan."""

    volumes: Mapping[str, float]
    """In mm3 by the structure's name; NaN where the cell is empty."""
    scores: tuple[float, ...] = ()
    """Of quality, between 0 and 1; none where there is no table of them."""

    @property
    def intracranial_mm3(self) -> float | None:
        """Volume inside the skull, None where it is not known."""
        size = self.volumes.get(INTRACRANIAL, math.nan)
        return size if math.isfinite(size) else None

    @property
    def usable(self) -> bool:
        """Whether there is an inside of the skull to divide by."""
        return (self.intracranial_mm3 or 0.0) >= LEAST_MM3

    def score(self) -> float:
        """How far a run is to be trusted, by the rule with which SSL3D's winner chose among several.

        From 100: minus 8 for each missing volume, 6 for each negative one and 0.25 for each of at most 1 mm3; plus 10
        for a plausible inside of the skull, minus 10 for none, minus up to 40 (1 for each 25000 mm3 beyond) for an
        implausible one; plus 20 times the mean score of quality.
        """
        sizes = np.array(list(self.volumes.values()))
        total = 100.0 - 8.0 * float(np.isnan(sizes).sum()) - 6.0 * float((sizes < 0).sum())
        total -= 0.25 * float((sizes <= 1).sum())
        scores = [score for score in self.scores if math.isfinite(score)]
        total += 20.0 * float(np.mean(scores)) if scores else 0.0
        if self.intracranial_mm3 is None:
            return total - 10.0
        low, high = PLAUSIBLE_MM3
        beyond = max(low - self.intracranial_mm3, self.intracranial_mm3 - high, 0.0)
        return total - min(40.0, beyond / 25000.0) if beyond else total + 10.0

    def labels(self) -> dict[str, str]:
        """Scan-level labels `volume:<structure>` in mm3, of all that is known and not negative."""
        known = {name: size for name, size in self.volumes.items() if math.isfinite(size) and size >= 0}
        return {f"{VOLUME_LABEL}{name}": f"{size:.10g}" for name, size in sorted(known.items())}


@dataclass(frozen=True, kw_only=True, slots=True)
class VolumeTable:
    """What tables tell of scans."""

    by_scan: Mapping[str, Measured] = field(default_factory=dict)
    """By the name or path of the scan's file, without its ending; of several runs over a scan the best."""
    unusable: int = 0
    """Scans of whose runs none has an inside of the skull."""

    def find(self, names: Iterable[str]) -> tuple[str, Measured] | None:
        """What is told of a scan under the first of its names that is known, and that name."""
        return next(((name, self.by_scan[name]) for name in names if name in self.by_scan), None)


def read_volumes(volumes: Sequence[Path], qc: Sequence[Path] = ()) -> VolumeTable:
    """Read tables of volumes, and tables of scores that belong to them, each pair in the same place of its list.

    Args:
        volumes: `.csv` files with a column `subject` (the scan's file, with or without its ending and folders), one
            `total intracranial`, and one for each structure. The order of the columns does not matter.
        qc: For each of them the scores of the same scans; or none at all.

    Raises:
        ConfigError: a file cannot be read, a column is missing or named twice, a row has too few or too many cells, a
            cell is neither a number nor empty (a formula, say), a scan comes twice in one table, or as many tables of
            scores as of volumes are needed.
    """
    if qc and len(qc) != len(volumes):
        raise ConfigError(
            f"there are {len(volumes)} tables of volumes and {len(qc)} of scores",
            hint="give one table of scores for each table of volumes, in the same order, or none",
        )
    runs: dict[str, list[Measured]] = {}
    for place, path in enumerate(volumes):
        scores = _rows(qc[place], needed=(SUBJECT,)) if qc else {}
        for scan, sizes in _rows(path, needed=(SUBJECT, INTRACRANIAL)).items():
            runs.setdefault(scan, []).append(Measured(volumes=sizes, scores=tuple(scores.get(scan, {}).values())))
    best = {scan: choose(found) for scan, found in runs.items()}
    return VolumeTable(
        by_scan={scan: run for scan, run in best.items() if run is not None},
        unusable=sum(run is None for run in best.values()),
    )


def choose(runs: Sequence[Measured]) -> Measured | None:
    """The usable run with the highest score, the first of equals; None where none is usable."""
    usable = [run for run in runs if run.usable]
    return max(usable, key=Measured.score) if usable else None


def normalise(volumes: Mapping[str, float], *, icv: str = INTRACRANIAL) -> dict[str, float]:
    """Volumes as shares of the volume inside the skull, without that itself; by name in alphabetical order.

    Raises:
        ValueError: there is no usable volume inside the skull.
    """
    whole = volumes.get(icv, math.nan)
    if not whole >= LEAST_MM3:
        raise ValueError(f"'{icv}' must be at least {LEAST_MM3:g} mm3 to divide by, got {whole:g}")
    return {name: volumes[name] / whole for name in sorted(volumes) if name != icv}


def volumes_of(labels: LabelMap, voxel_mm3: float, *, inside: Collection[str] = ()) -> Measured:
    """Volumes from a label map, where no program has measured any: voxels of each class times a voxel's volume.

    Args:
        labels: A map of structures.
        voxel_mm3: Volume of one voxel.
        inside: Classes that together are the inside of the skull; without any, `total intracranial` is not known.

    Raises:
        ValueError: `inside` names a class that the map does not have.
    """
    strange = set(inside) - set(labels.classes.values())
    if strange:
        raise ValueError(f"'{min(strange)}' is none of the label map's classes")
    values, counts = np.unique(labels.array, return_counts=True)
    found = dict(zip(values.tolist(), (counts * voxel_mm3).tolist(), strict=True))
    sizes = {name: float(found.get(value, 0.0)) for value, name in labels.classes.items()}
    whole = {INTRACRANIAL: math.fsum(sizes[name] for name in inside)} if inside else {}
    return Measured(volumes=sizes | whole)


def _rows(path: Path, *, needed: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Numbers by scan and column; columns without a name are left out."""
    table = list(read_table(path, needed[:1]))
    _check_form(path, needed)
    if len(needed) > 1 and (strange := [name for name in (table[0][1] if table else {}) if _NO_STRUCTURE.search(name)]):
        raise ConfigError(
            f"{path.name}: row 1 names the column '{strange[0]}', which is no structure",
            hint="keep the subject and the volumes only: every column is stored by its name",
        )
    rows: dict[str, dict[str, float]] = {}
    for row, cells in table:
        scan = _scan(cells[SUBJECT])
        if scan in rows:
            raise ConfigError(
                f"{path.name}: row {row} tells of a scan of which an earlier row tells already",
                hint="keep one row a scan, or put other runs into a table of their own",
            )
        rows[scan] = {
            name: _number(text, path=path, row=row, column=name)
            for name, text in cells.items()
            if name and name != SUBJECT
        }
    return rows


def _check_form(path: Path, needed: tuple[str, ...]) -> None:
    """Refuse what a reader of named cells would not see: names that come twice, and rows that break off."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, skipinitialspace=True)
        names = [name.strip() for name in next(lines, [])]
        twice = [name for name in names if name and names.count(name) > 1]
        lacking = [name for name in needed if name not in names]
        if twice or lacking:
            what = f"names the column '{twice[0]}' twice" if twice else f"does not name the column '{lacking[0]}'"
            raise ConfigError(
                f"{path.name}: row 1 {what}", hint="write the table again as SynthSeg's --vol and --qc write it"
            )
        for cells in lines:
            if any(cell.strip() for cell in cells) and len(cells) < len(names):
                raise ConfigError(
                    f"{path.name}: row {lines.line_num} has {len(cells)} cells, row 1 names {len(names)}",
                    hint="the row breaks off; write the table again",
                )


def _scan(name: str) -> str:
    """The path of a scan's file without the ending that programs leave out or not."""
    plain = name.strip().replace("\\", "/")
    for ending in (".nii.gz", ".nii", ".mgz"):
        plain = plain.removesuffix(ending)
    return plain


def _number(text: str, *, path: Path, row: int, column: str) -> float:
    if text.lower() in MISSING:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        number = math.inf
    if not math.isinf(number):
        return number
    what = "a formula" if text[:1] in "=@+" else "no number"
    raise ConfigError(
        f"{path.name}: row {row}: '{column}' is {what}",
        hint="write decimals with a point, leave what is not known empty, and save values instead of formulas",
    )
