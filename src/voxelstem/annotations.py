"""What experts drew: masks in files of their own, each laid on the scan at its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from voxelstem import geometry
from voxelstem.errors import ConfigError, IngestError
from voxelstem.sources import MASKS, iterate, read_labels, stem
from voxelstem.sources.nnssl import REMOVED
from voxelstem.store.labels import is_formula
from voxelstem.study import LabelMap, Study, Volume
from voxelstem.table import closest

FACES = {1: REMOVED}
"""Classes of masks of what was taken off scans."""
LABELS_FILE = "labels.json"
SAME_PLACE_MM = 1e-3
"""How far a corner of a mask may lie from the scan's: formats keep affines as float32 or as rounded text."""
_SHAPE = (
    '{"classes": {"1": "liver"}, "masks": {"scan path": "mask path"}, "annotated": {"scan path or folder": ["liver"]}}'
)


@dataclass(kw_only=True, slots=True)
class Masks:
    """The masks of a folder, and which of them found their scan."""

    root: Path = Path()
    classes: dict[int, str] = field(default_factory=dict)
    """Names of the values; empty without a `labels.json`: every value is then called by its number."""
    by_scan: dict[str, Path] = field(default_factory=dict)
    annotated: dict[str, frozenset[str]] = field(default_factory=dict)
    """Scan, or folder of scans, to the classes that were looked for there; everywhere else all were."""
    files: set[Path] = field(default_factory=set)
    taken: set[Path] = field(default_factory=set)

    def has(self, relative: str) -> bool:
        """Whether a mask is meant for the scan at this place below SRC."""
        return relative in self.by_scan or stem(relative) in self.by_scan

    def take(self, relative: str) -> Path | None:
        """Return the mask of a scan, by its path below SRC."""
        mask = self.by_scan.get(relative) or self.by_scan.get(stem(relative))
        if mask is not None:
            self.taken.add(mask)
        return mask

    def names(self, relative: str) -> dict[int, str]:
        """Return the classes that were looked for in a scan; of several entries that fit, the longest path decides."""
        fitting = [place for place in self.annotated if _lies_at(relative, place)]
        if not fitting:
            return self.classes
        wanted = self.annotated[max(fitting, key=len)]
        return {value: name for value, name in self.classes.items() if name in wanted}

    def unused(self) -> list[Path]:
        """Return the masks whose scan did not come by."""
        return sorted(self.files - self.taken)

    def relative(self, path: Path) -> str:
        """Where a mask lies below the folder of masks."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name


class Laid:
    """The user's masks, and those that lie among the scans of a folder in another program's layout."""

    def __init__(self, masks: Masks) -> None:
        """Begin with the user's."""
        self.masks = masks
        self.own: dict[int, Masks] = {}
        """By the number of the folder: two data sets may hold a case of the same name."""

    def take(self, relative: str, dataset: int, *, drawn: bool = False) -> tuple[Path | None, dict[int, str]]:
        """The mask of a scan and the names of its classes; the user's comes first.

        `drawn`: the store holds what somebody drew on it, which a mask of faces does not replace.
        """
        both = (self.masks, self.own.get(dataset, Masks()))
        for mask, masks in [(masks.take(relative), masks) for masks in both]:
            if mask is not None and not (drawn and masks.classes == FACES):
                return mask, masks.names(relative)
        return None, {}

    def all(self) -> list[Masks]:
        """The user's, then those of each folder."""
        return [self.masks, *self.own.values()]

    def unused(self) -> list[tuple[Path, str]]:
        """Masks whose scan did not come by, and where they lie."""
        return [(path, masks.relative(path)) for masks in self.all() for path in masks.unused()]

    def relative(self, mask: Path) -> str:
        """Where a mask lies below the folder that it came with."""
        return next((masks.relative(mask) for masks in self.all() if mask in masks.files), mask.name)


def read_masks(folder: Path, sources: Sequence[Path | str] = ()) -> Masks:
    """Find the masks of a folder; no voxel is read yet.

    A mask belongs to the scan with the same relative path (another ending is fine; a DICOM folder's mask has the
    folder's path and an ending), or to the one that the folder's `labels.json` names:
    `{"classes": {"1": "liver"}, "masks": {"scan path": "mask path"}}`. Where masks lie among the scans of `sources`,
    only the named ones count. `"annotated": {"scan path or folder": ["liver"]}` says that only these classes were
    looked for there: where a mask is silent about the others, they may still be in the scan.

    Raises:
        ConfigError: no such folder, no mask in it, or a `labels.json` of another shape.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder of masks '{folder.name}'", hint="check the path after --labels")
    root = folder.resolve()
    content = _read_labels_file(root / LABELS_FILE)
    masks = Masks(root=root, classes=content.classes, annotated=content.annotated)
    among_scans = any(Path(source).resolve() == root or root in Path(source).resolve().parents for source in sources)
    for relative, path in [] if among_scans else _find(root):
        masks.files.add(path)
        masks.by_scan[relative] = path
        masks.by_scan.setdefault(stem(relative), path)
    for number, (scan, mask) in enumerate(content.masks.items(), start=1):
        path = (root / mask).resolve()
        if not path.is_file():
            raise ConfigError(
                f"{LABELS_FILE}: the mask of entry {number} of 'masks' is not there",
                hint=f"write mask paths as they lie below the folder of {LABELS_FILE}",
            )
        masks.files.add(path)
        masks.by_scan[scan] = path
    if not masks.files:
        raise ConfigError(
            f"the folder '{folder.name}' holds no masks" + (" apart from the scans" if among_scans else ""),
            hint=f"put masks where the scans lie, in a folder of their own, or name them in its {LABELS_FILE}",
        )
    for number, place in enumerate(masks.annotated, start=1):
        if not any(_lies_at(scan, place) for scan in masks.by_scan):
            raise ConfigError(
                f"{LABELS_FILE}: entry {number} of 'annotated' is the place of no scan that has a mask",
                hint="write the scan's path below SRC, or a folder of it",
            )
    return masks


def _lies_at(relative: str, place: str) -> bool:
    """Whether a scan's path is this one, whatever the ending, or lies below it."""
    place = place.rstrip("/")
    return stem(relative) == stem(place) or relative.startswith(f"{place}/")


def _find(root: Path) -> Iterator[tuple[str, Path]]:
    try:
        for source in iterate(root):
            if source.kind in MASKS:
                yield source.relative, source.path.resolve()
    except IngestError as error:
        if error.code != "empty":
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class _LabelsFile:
    """The content of a `labels.json`."""

    classes: dict[int, str] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    annotated: dict[str, frozenset[str]] = field(default_factory=dict)


def _read_labels_file(path: Path) -> _LabelsFile:
    if not path.is_file():
        return _LabelsFile()
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} cannot be read as JSON", hint=f"write {_SHAPE}") from error
    classes: Any = content.get("classes", {}) if isinstance(content, dict) else None
    named: Any = content.get("masks", {}) if isinstance(content, dict) else None
    annotated: Any = content.get("annotated", {}) if isinstance(content, dict) else None
    if not (_is_words(classes) and all(value.isdecimal() for value in classes)):
        raise ConfigError(f"{path.name}: 'classes' must give each number a name", hint=f"write {_SHAPE}")
    for value, name in classes.items():
        if is_formula(name):
            raise ConfigError(
                f"{path.name}: the name of class {value} begins like a formula, which spreadsheets would run",
                hint="write it in words",
            )
    if not _is_words(named):
        raise ConfigError(f"{path.name}: 'masks' must give scan paths their mask's path", hint=f"write {_SHAPE}")
    if not (isinstance(annotated, dict) and all(isinstance(found, list) and found for found in annotated.values())):
        raise ConfigError(f"{path.name}: 'annotated' must give scan paths a list of classes", hint=f"write {_SHAPE}")
    strange = [name for found in annotated.values() for name in found if name not in classes.values()]
    if strange:
        raise ConfigError(
            f"{path.name}: 'annotated' lists '{strange[0]}', which is none of its 'classes'",
            hint=closest(str(strange[0]), list(classes.values())),
        )
    return _LabelsFile(
        classes={int(value): name for value, name in classes.items()},
        masks=named,
        annotated={place: frozenset(found) for place, found in annotated.items()},
    )


def _is_words(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(word, str) for word in content.values())


def lay_mask(study: Study, path: Path, classes: Mapping[int, str]) -> Study:
    """Lay a mask on the volume whose grid it shares.

    Raises:
        IngestError: `label-grid`, `label-values` (`classes` does not name one), or why the mask cannot be read.
    """
    grid = read_labels(path)
    apart_mm = [_apart_mm(volume, grid.array.shape, grid.affine_ras) for volume in study.volumes]
    nearest = int(np.argmin(apart_mm))
    if not apart_mm[nearest] <= SAME_PLACE_MM:
        shape = study.volumes[nearest].shape_ijk
        seen = f"{apart_mm[nearest]:.3g} mm from it" if shape == grid.array.shape else f"of shape {shape}"
        raise IngestError(
            f"the mask of shape {grid.array.shape} does not lie on the grid of its scan, which is {seen}",
            code="label-grid",
            hint="resample the mask to the scan",
        )
    values = [int(value) for value in np.unique(grid.array) if value]
    unnamed = [value for value in values if classes and value not in classes]
    if unnamed:
        raise IngestError(
            f"the mask holds the value {unnamed[0]} and {len(unnamed) - 1} others that {LABELS_FILE} has no name for",
            code="label-values",
            hint=f"name every value in {LABELS_FILE}: in 'classes', and in 'annotated' where it speaks of this scan",
        )
    names = {value: name for value, name in classes.items() if value} or {value: str(value) for value in values}
    volumes = list(study.volumes)
    volumes[nearest] = replace(volumes[nearest], labels=LabelMap(array=grid.array, classes=names))
    return replace(study, volumes=tuple(volumes))


def _apart_mm(volume: Volume, shape: tuple[int, ...], affine_ras: Float[np.ndarray, "4 4"]) -> float:
    """How far the farthest corner of a mask lies from the volume's; infinite for another shape."""
    if shape != volume.shape_ijk:
        return float("inf")
    corners = np.stack(np.meshgrid(*([0, edge - 1] for edge in shape), indexing="ij"), axis=-1).reshape(-1, 3)
    apart = geometry.voxel_to_patient(corners, affine_ras) - geometry.voxel_to_patient(corners, volume.affine_ras)
    return float(np.linalg.norm(apart, axis=1).max())
