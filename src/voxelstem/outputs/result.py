"""What every output is given and what it gives back, and how a file is kept under a name that tells nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from voxelstem import geometry
from voxelstem.errors import ConfigError
from voxelstem.findings import Findings, Weights
from voxelstem.pieces import check_classes
from voxelstem.study import LabelMap
from voxelstem.whole import write_whole

MOST_CLASS = int(np.iinfo(np.int16).max)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """A label map that was found, where it lies, and which weights made it."""

    labels: LabelMap
    affine_ras: Float[np.ndarray, "4 4"]
    """Of the volume that was looked at: RAS+, on its own grid."""
    weights: Weights

    def __post_init__(self) -> None:
        """Refuse what no output could write.

        Raises:
            ValueError: not three axes or no whole numbers, a number without a name or above `MOST_CLASS`, a name
                given twice, or a bad affine.
        """
        array = self.labels.array
        if array.ndim != 3 or array.dtype.kind not in "iu":  # noqa: PLR2004 - (i, j, k)
            raise ValueError(f"a label map has 3 axes of whole numbers, got {array.ndim} of {array.dtype}")
        geometry.check_affine(self.affine_ras)
        check_classes(array, self.labels.classes)
        if max(self.labels.classes, default=0) > MOST_CLASS:
            raise ValueError(f"classes are numbered up to {MOST_CLASS}, got {max(self.labels.classes)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """All that is known of one study when the outputs are written."""

    findings: Findings
    mask: Mask | None = None
    sources: tuple[Dataset, ...] = ()
    """The images of the series that was looked at, in any order, where it came as DICOM. Pixels are not needed."""
    new_uid: Callable[[], str] = generate_uid
    """Gives each DICOM object, series and tracked finding its UID."""

    def need_mask(self, output: str) -> Mask:
        """The label map.

        Raises:
            ConfigError: there is none.
        """
        if self.mask is None:
            raise ConfigError(f"the output '{output}' needs a label map, and none was made", hint="leave it out")
        return self.mask


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What one output wrote."""

    output: str
    files: tuple[Path, ...]
    """None at all where there was nothing to write."""
    left_out: tuple[str, ...] = ()
    """Classes that have no voxel, and so no segment."""
    segments: Mapping[str, int] = field(default_factory=dict)
    """Which segment number each class has in `dataset`."""
    dataset: Dataset | None = None
    """The DICOM object, for others to refer to."""


def named(stem: str, data: bytes) -> str:
    """A file's name without its ending, made of its content so that it tells nothing: `<stem>-<16 digits>`."""
    return f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}"


def keep(path: Path, data: bytes) -> Path:
    """Write a file so that it is whole or not there; its folder is made where it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
    return path
