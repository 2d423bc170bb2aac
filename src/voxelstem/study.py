"""The frozen records that everything passes around: Volume, Study, InputSpec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Float, Int16

from voxelstem import geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a volume came from. Holds no path and no name: both can identify a person."""

    source_format: str
    """`nifti`, `dicom`, `nrrd`, `mha` or `phantom`."""
    sha256: str
    """Digest of the source's bytes (of the sorted slices for DICOM)."""
    orientation: str
    """How the source's array axes ran before they were turned to RAS+."""
    notes: tuple[str, ...] = ()
    """What was changed on the way, in plain words: rounding, repair."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Acquisition:
    """What the source says of how, when and of whom a volume was made; an empty word where it says nothing.

    A reader fills in what the file says, and only what the keep-list (`sources/keep.py`) names. `deidentify.py`
    replaces everything that could identify a person before any of it reaches a store.
    """

    series: str = ""
    """DICOM's SeriesInstanceUID; a keyed hash behind the door."""
    study: str = ""
    """DICOM's StudyInstanceUID, or the BIDS subject and session; a keyed hash behind the door."""
    group: str = ""
    """What near-copies share: all kernels and reconstructions of one acquisition. A keyed hash behind the door."""
    session: str = ""
    """The BIDS `ses-` label, without `ses-`."""
    date: str = ""
    """Day of the acquisition, `YYYY-MM-DD`; behind the door shifted by as many days for all scans of a person."""
    age_years: float | None = None
    """At the acquisition; behind the door 90 stands for everybody over 89."""
    sex: str = ""
    """`F`, `M` or `O`."""
    contrast: str = ""
    """What makes it look different from others of the session: `T1w`, `FLAIR`, …; for CT the contrast agent."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Other kept header values by DICOM keyword, such as `ConvolutionKernel`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A radiology report by its sections. It must not name the patient: texts are kept as they are."""

    findings_text: str = ""
    impression_text: str = ""
    rest_text: str = ""
    """Comparison, and what stands under no heading."""
    language: str = ""
    """Two letters (ISO 639-1) where the file says it."""
    history_text: str = ""
    """Why the scan was made: clinical history, indication."""
    technique_text: str = ""
    findings_rewrites: tuple[str, ...] = ()
    """The findings in other words, where the file has them; nothing here writes them."""
    impression_rewrites: tuple[str, ...] = ()
    icd10: tuple[str, ...] = ()
    """Short descriptions of the diagnoses coded for this examination, which the image need not show."""

    @property
    def text(self) -> str:
        """What was dictated, each section under its heading: neither rewrites nor codes."""
        headed = (
            ("Clinical history: ", self.history_text),
            ("Technique: ", self.technique_text),
            ("Findings: ", self.findings_text),
            ("Impression: ", self.impression_text),
        )
        parts = [self.rest_text, *(heading + text for heading, text in headed if text)]
        return "\n".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMap:
    """An expert's voxel labels on the grid of the volume that carries them.

    `array` is (i, j, k); 0 means background. `classes` names every other value that may occur.
    """

    array: Int16[np.ndarray, "i j k"]
    classes: dict[int, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """One acquisition: (channel, i, j, k) float32 in RAS+, CT in HU, anything else in raw intensity."""

    array: Float[np.ndarray, "channel i j k"]
    affine_ras: Float[np.ndarray, "4 4"]
    modality: str
    """DICOM's word: `CT` or `MR`."""
    provenance: Provenance
    acquisition: Acquisition = field(default_factory=Acquisition)
    labels: LabelMap | None = None

    def __post_init__(self) -> None:
        """Refuse what no later step could handle.

        Raises:
            ValueError: wrong number of axes, a bad affine, or labels on another grid.
        """
        if self.array.ndim != 4:  # noqa: PLR2004 - (channel, i, j, k)
            raise ValueError(f"a volume has 4 axes (channel, i, j, k), got shape {self.array.shape}")
        geometry.check_affine(self.affine_ras)
        if self.labels is not None and self.labels.array.shape != self.shape_ijk:
            raise ValueError(f"labels {self.labels.array.shape} do not lie on the volume's grid {self.shape_ijk}")

    @property
    def shape_ijk(self) -> tuple[int, int, int]:
        """Voxels along R, A and S."""
        _, i, j, k = self.array.shape
        return i, j, k

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel in millimetres."""
        return geometry.spacing_mm(self.affine_ras)


VOLUME_LABEL = "volume:"
"""What the name of a scan-level label begins with that tells the volume of a structure in mm3."""
INTRACRANIAL = "total intracranial"
"""The structure that all others are part of, by the name that SynthSeg gives it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One examination of one subject. `subject` is the source's own id until `ingest` replaces it by a keyed hash."""

    subject: str
    volumes: tuple[Volume, ...]
    report: Report | None = None
    labels: dict[str, str] = field(default_factory=dict)
    """Scan-level facts that the source itself knows (the phantom does), such as `lesion: yes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Survival:
    """How long a subject was watched, and whether the event came then. `time` is in the unit of the label file."""

    time: float
    event: bool

    def __post_init__(self) -> None:
        """Guard the time.

        Raises:
            ValueError: it is negative, infinite or no number.
        """
        if not 0 <= self.time < math.inf:
            raise ValueError(f"time must be a number >= 0, got {self.time}")


_WINDOW = (-1000.0, 1000.0)
Normalisation = Literal["window", "zscore", "unit99"]
PER_VOLUME: Mapping[str, str] = MappingProxyType(
    {
        "zscore": "z-scores of the whole volume (its mean to 0, its standard deviation to 1, not clamped)",
        "unit99": "the whole volume's minimum to 0 and the 99th percentile of what lies above it to 1",
    }
)
"""Normalisations that take their limits from each volume, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """What a model was trained to see. Written once, stored with the weights, obeyed at every door.

    `views/intensity.py` and `views/resample.py` apply it; nothing else may re-type these numbers.
    """

    modality: str = "CT"
    spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    low_hu: float = _WINDOW[0]
    high_hu: float = _WINDOW[1]
    block_ijk: tuple[int, int, int] = (32, 32, 32)
    preset: str = ""
    """The name in `INPUT_SPECS` that these numbers go by, where they go by one."""
    resampling: Literal["spacing", "native", "fit"] = "spacing"
    """Scans are brought to `spacing_mm`; or fed on the grid that they come with (`native`); or the box of all that lies
    above `low_hu` is stretched to exactly one block by averaging areas (`fit`). Of the last two, `spacing_mm` only says
    what to expect."""
    frame_ijk: tuple[int, int, int] | None = None
    """Whole scans are shown as a box of this many voxels about the middle of the patient's body, in training and
    wherever the model is used: what lies beyond is cut off, what is missing is air. None: the blocks cover all of a
    scan, from its low corner on."""
    normalisation: Normalisation = "window"
    """How values become the network's: [`low_hu`, `high_hu`] of every scan to [0, 1], or by what is measured of the
    whole volume (`PER_VOLUME` says each in words). Then the window means nothing, and keeps its defaults."""

    def __post_init__(self) -> None:
        """Guard the numbers.

        Raises:
            ValueError: empty window, one that nothing would obey, or a spacing or block without extent.
        """
        if self.per_volume and (self.low_hu, self.high_hu) != _WINDOW:
            raise ValueError(
                f"normalisation '{self.normalisation}' has no window: leave low_hu and high_hu out, "
                f"got {self.low_hu:g} and {self.high_hu:g}"
            )
        if self.per_volume and self.resampling == "fit":
            raise ValueError(f"resampling 'fit' looks for what lies above low_hu, and '{self.normalisation}' has none")
        if not self.low_hu < self.high_hu:
            raise ValueError(f"window is empty: low_hu={self.low_hu} must be below high_hu={self.high_hu}")
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        if min(self.block_ijk) < 1:
            raise ValueError(f"block_ijk must be at least one voxel, got {self.block_ijk}")
        if self.frame_ijk is not None:
            self._check_frame(self.frame_ijk)

    def _check_frame(self, frame_ijk: tuple[int, int, int]) -> None:
        if any(edge < 1 or edge % block for edge, block in zip(frame_ijk, self.block_ijk, strict=True)):
            raise ValueError(f"frame_ijk must be whole blocks of {self.block_ijk} voxels, got {frame_ijk}")
        if self.resampling != "spacing":
            raise ValueError(f"frame_ijk needs resampling 'spacing', got '{self.resampling}'")

    def grid_spacing_mm(
        self, have_mm: tuple[float, float, float], shape_ijk: tuple[int, int, int]
    ) -> tuple[float, float, float]:
        """Spacing at which a scan is fed to the network.

        Args:
            have_mm: The scan's own spacing.
            shape_ijk: Its voxels; for `fit` those of the box that is stretched.
        """
        match self.resampling:
            case "spacing":
                return self.spacing_mm
            case "native":
                return have_mm
            case "fit":
                i, j, k = (
                    have * size / block for have, size, block in zip(have_mm, shape_ijk, self.block_ijk, strict=True)
                )
                return i, j, k

    @property
    def per_volume(self) -> bool:
        """Whether values are normalised by what is measured of each whole volume."""
        return self.normalisation in PER_VOLUME

    @property
    def mark(self) -> str:
        """All numbers in one text, for digests. What once was all there was is not named: digests of then hold."""
        return repr(self).replace(", normalisation='window'", "").replace(", frame_ijk=None", "")

    @property
    def values_in_words(self) -> str:
        """What a scan's values become, for people."""
        return PER_VOLUME.get(self.normalisation, f"window [{self.low_hu:g}, {self.high_hu:g}] to [0, 1]")

    @property
    def grid_in_words(self) -> str:
        """Where a scan's voxels come to lie, for people."""
        match self.resampling:
            case "spacing":
                return f"{' x '.join(f'{edge:g}' for edge in self.spacing_mm)} mm"
            case "native":
                return "its own spacing"
            case "fit":
                return f"the spacing at which all above {self.low_hu:g} fits one block"


_SPECTRE = InputSpec(block_ijk=(128, 128, 64))
_BRAIN = InputSpec(modality="MR", spacing_mm=(1.0, 1.0, 1.0), block_ijk=(160, 160, 160), normalisation="zscore")

INPUT_SPECS: Mapping[str, InputSpec] = MappingProxyType(
    {
        "ct-stage1": replace(_SPECTRE, preset="ct-stage1", spacing_mm=(0.5, 0.5, 1.0)),
        "ct-stage2": replace(_SPECTRE, preset="ct-stage2", spacing_mm=(0.75, 0.75, 1.5)),
        "ct-native": replace(_SPECTRE, preset="ct-native", spacing_mm=(0.75, 0.75, 1.5), resampling="native"),
        "mri-nnssl": replace(_BRAIN, preset="mri-nnssl"),
        "mri-fomo25": replace(_BRAIN, preset="mri-fomo25", block_ijk=(64, 64, 64), normalisation="unit99"),
    }
)
"""Ways in circulation to feed released weights: SPECTRE's (arXiv 2511.17209), all in [-1000, 1000] HU, and those of
brain MRI.

`ct-stage1`: its self-supervised stage and the paper's evaluations. `ct-stage2`: its alignment with reports, the last
thing that the released weights learned. `ct-native`: the default of the package `spectre-fm`, which resamples nothing.

`mri-nnssl`: nnssl's models of OpenMind (arXiv 2412.17041), which learned on z-scores. `mri-fomo25`: the winner of
FOMO25's methods track (arXiv 2601.13166), which learned on [0, 1] with air at 0.
"""
