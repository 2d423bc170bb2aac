"""Predict: scans and a run of `adapt` -> findings, label maps, the clinic's formats. All of it stays preliminary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from jaxtyping import Bool

from voxelstem import __version__
from voxelstem.adapted import TUNED, Adapted, read_run
from voxelstem.card import Card
from voxelstem.certainty import familiar
from voxelstem.certainty.assurance import Assurance, group_of
from voxelstem.errors import ConfigError, IngestError, StoreError
from voxelstem.features import look
from voxelstem.findings import Finding, Findings, Looked, Novelty, Unsaid, Weights
from voxelstem.finetune.cases import Seen
from voxelstem.finetune.cases import look as lay_out
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.inside import vector_of
from voxelstem.finetune.tune import Asked, mark, say, tuned
from voxelstem.heads.manylabels import answers_each
from voxelstem.looking import region_of, volumes_of
from voxelstem.outputs import OUTPUTS
from voxelstem.outputs.result import Mask, Result, Written
from voxelstem.pieces import measure
from voxelstem.progress import progress
from voxelstem.protocols import Features
from voxelstem.room import allowed, at_most, check_room
from voxelstem.sources import Source, iterate
from voxelstem.store.subjects import site_key, source_name
from voxelstem.streaming import of_volume
from voxelstem.study import LabelMap, Study, Volume
from voxelstem.table import closest
from voxelstem.truth import is_aligned
from voxelstem.weights.hub import load

MARK_BYTES = 4
"""What labelled voxels take at least: two of the label map, and two while it is measured or written."""
DICOM = ("seg", "sr")
"""Outputs that go back to the series that was looked at, and so need one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """What is written, and how much memory that may take."""

    formats: tuple[str, ...] = ()
    """Names in `outputs.OUTPUTS`; `nifti` and `seg` need a task that labels voxels. Empty: json, and nifti where there
    are such labels."""
    max_ram_gib: float = 0.0
    """The process may not hold more than this: a scan that needs more is refused. 0 sets no limit."""
    least_mm3: float = 0.0
    """Smaller pieces of a structure are counted in its volume and not listed by themselves."""
    most_parts: int = 20
    """So many pieces of a structure are listed, the largest first."""
    repair: bool = False
    """Resample a DICOM series with gantry tilt or uneven slices instead of refusing it; no DICOM can go back to it."""
    region: Path | None = None
    """A mask on the scan's grid, of the region that the run looks at; for one scan at a time."""
    box_ras_mm: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    """The region as a box instead: its low and its high corner in the patient."""
    commercial: bool = False
    """Claim commercial use: weights whose licence forbids it are refused."""

    def __post_init__(self) -> None:
        """Guard names and numbers.

        Raises:
            ConfigError: a format that is not known.
            ValueError: a limit that is negative.
        """
        for name in self.formats:
            if name not in list(OUTPUTS):
                raise ConfigError(f"there is no output '{name}'", hint=closest(name, OUTPUTS))
        if min(self.max_ram_gib, self.least_mm3, self.most_parts) < 0:
            raise ValueError("max_ram_gib, least_mm3 and most_parts must not be negative")
        if self.region is not None and self.box_ras_mm is not None:
            raise ValueError("a region is a mask or a box, not both")

    @property
    def somewhere(self) -> bool:
        """Whether a region is given."""
        return self.region is not None or self.box_ras_mm is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A scan of which nothing was said, for the person at the terminal."""

    relative: str
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictReport:
    """What came of a prediction."""

    findings: tuple[Findings, ...]
    written: tuple[Written, ...]
    refusals: tuple[Refused, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that was written."""
        return tuple(path for one in self.written for path in one.files)


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What a run says of one study."""

    findings: Findings
    mask: Mask | None = None


def run(sources: Sequence[Path], *, weights: Path, out: Path, how: PredictConfig = PredictConfig()) -> PredictReport:
    """Say what a run of `adapt` finds in every scan below `sources`, and write it below `out`.

    Files are named by hashes. One bad scan never stops the others.

    Raises:
        ConfigError: `weights` is no run of `adapt`, or a format does not go with its task.
        CheckpointError: the run is damaged.
        StoreError: `out` cannot be written.
    """
    predictor = Predictor(weights, commercial=how.commercial)
    if not how.formats:
        how = replace(how, formats=("json", "nifti") if predictor.marks else ("json",))
    predictor.check(how)
    found = [source for path in sources for source in iterate(path)]
    if how.somewhere and len(found) > 1:
        raise ConfigError(f"one region does not fit {len(found)} scans", hint="predict one scan at a time")
    findings: list[Findings] = []
    written: list[Written] = []
    refusals: list[Refused] = []
    with progress("predict", len(found)) as advance:
        for source in found:
            try:
                with at_most(how.max_ram_gib):
                    _answer(predictor, source, out, how, findings, written)
            except IngestError as error:
                refusals.append(Refused(relative=source.relative, code=error.code, reason=error.problem))
            except ConfigError as error:
                refusals.append(Refused(relative=source.relative, code="does-not-fit", reason=error.problem))
            except MemoryError:
                reason = f"it needs more than {allowed(how.max_ram_gib)}"
                refusals.append(Refused(relative=source.relative, code="out-of-memory", reason=reason))
            advance(1, note="refused" if refusals and refusals[-1].relative == source.relative else "")
    return PredictReport(findings=tuple(findings), written=tuple(written), refusals=tuple(refusals))


class Predictor:
    """A run of `adapt` that answers about scans."""

    def __init__(self, folder: Path, *, commercial: bool = False) -> None:
        """Load the run.

        Raises:
            ConfigError: it is none, its task answers by prompts, or the licence forbids commercial use.
            CheckpointError: it is damaged.
        """
        self.adapted: Adapted = read_run(folder)
        self.task: Any = self.adapted.task
        if is_aligned(self.adapted.task):
            raise ConfigError(
                "prompts are not answered one scan at a time here", hint="use `voxelstem search`, or adapt another task"
            )
        self.model = load(self.adapted.weights, commercial=commercial or self.adapted.config.commercial)
        self.full = self.adapted.config.full or FinetuneConfig()
        config, classes = self.adapted.config, self.adapted.head.classes
        each = answers_each(self.adapted.head)
        self._asked = Asked(task=config.task, voxels=self.adapted.task.voxels, classes=classes, targets={}, each=each)
        self._net = tuned(self.model, self.adapted.head, self._asked, self.full) if config.mode in TUNED else None

    @property
    def card(self) -> Card:
        """Of the weights below the head."""
        return self.model.card

    @property
    def weights(self) -> Weights:
        """What findings say of who said them."""
        name = self.adapted.config.title or self.adapted.config.task
        return Weights(sha256=self.card.sha256, name=name, licence=self.card.licence)

    @property
    def marks(self) -> bool:
        """Whether the run labels voxels."""
        return hasattr(self.task, "mark")

    def check(self, how: PredictConfig) -> None:
        """See that the run can be asked and written so, before any scan is read.

        Raises:
            ConfigError: it cannot.
        """
        for name in how.formats:
            if name in ("nifti", "seg") and not self.marks:
                raise ConfigError(
                    f"the task {self.adapted.config.task} labels no voxels, so there is nothing to write as {name}",
                    hint="use --format json",
                )
        wanted = self.adapted.config.see.region if self._net is None and not self.task.voxels else ""
        if how.somewhere and not wanted:
            raise ConfigError("this run looks at no region", hint="leave --region and --box out")
        if wanted and not how.somewhere:
            raise ConfigError(f"this run looks at a region, '{wanted}'", hint="give its mask with --region, or --box")
        if self._net is not None and len(self.full.contrasts) > 1:
            raise ConfigError(
                f"this run sees {', '.join(self.full.contrasts)} together, and files are read one by one",
                hint="ask it from Python: Predictor.predict takes a Study with all of them",
            )

    def predict(
        self,
        study: Study,
        *,
        region: Bool[np.ndarray, "i j k"] | None = None,
        least_mm3: float = 0.0,
        most_parts: int = 20,
    ) -> Predicted:
        """Say what the run finds in a study; `region` is the mask that a run with `see.region` looks at.

        Raises:
            ConfigError: the study has not the contrasts that the run was trained on.
            IngestError: a volume is refused.
        """
        volumes = volumes_of(study, self.model.spec, self.full.contrasts if self._net is not None else ())
        first = volumes[0]
        if self._net is None and self.adapted.config.see.region and region is None and not self.task.voxels:
            raise ConfigError("this run looks at a region", hint="give its mask")
        looked = tuple(self._looked(volume) for volume in volumes)
        sure = self.adapted.assurance.of_group(group_of(first.acquisition))
        seen = self._look(volumes, region)
        strange = self._strange(sure, seen)
        if self.marks:
            mask = Mask(labels=self._mark(seen, first), affine_ras=first.affine_ras, weights=self.weights)
            del seen  # measuring takes memory of its own
            found = measure(
                mask.labels.array,
                first.affine_ras,
                mask.labels.classes,
                weights=self.weights,
                least_mm3=least_mm3,
                most_parts=most_parts,
            )
            unsaid = (*found.unsaid, *(Unsaid(what=name, why="no voxel of it was found") for name in found.absent))
            findings = tuple(sure.sized(finding) for finding in found.findings)
            told = self._told(first, looked, findings, (*unsaid, *_unsure(sure)), strange)
            return Predicted(findings=told, mask=mask)
        said = self._say(seen)
        if hasattr(self.task, "boxes"):
            findings = self.task.boxes(self.adapted.head, said, first.affine_ras, first.shape_ijk, self.weights, sure)
        else:
            findings = self.task.findings(self.adapted.head, said, self.weights, sure)
        return Predicted(findings=self._told(first, looked, findings, _unsure(sure), strange))

    def _told(
        self,
        first: Volume,
        looked: tuple[Looked, ...],
        findings: Sequence[Finding],
        unsaid: Sequence[Unsaid],
        strange: Novelty | Unsaid,
    ) -> Findings:
        """All of it together, every finding with how strange the scan is, or with why that is not known."""
        novelty = strange if isinstance(strange, Novelty) else None
        scored = dict.fromkeys(one.name for one in findings if one.certainty and one.certainty.probability is None)
        lacking = [Unsaid(what="probability", why=f"the scores of '{name}' are not calibrated") for name in scored]
        return Findings(
            study=_key(first),
            looked=looked,
            weights=(self.weights,),
            version=__version__,
            findings=tuple(replace(one, novelty=novelty) for one in findings),
            unsaid=(*unsaid, *lacking, *([strange] if isinstance(strange, Unsaid) else [])),
            novelty=novelty,
        )

    def _look(self, volumes: Sequence[Volume], region: Bool[np.ndarray, "i j k"] | None) -> Features | Seen:
        """Features of a frozen network, or the scans as a tuned one will see them."""
        if self._net is not None:
            return lay_out([of_volume(volume) for volume in volumes], self.model.spec)
        see = self.adapted.config.see
        return look(self.model, volumes[0], tokens=self.adapted.tokens, see=see, region=region)

    def _strange(self, sure: Assurance, seen: Features | Seen) -> Novelty | Unsaid:
        """How strange the scan is, by the one vector that a frozen network gave, or that of a tuned one's inside."""
        why, found = "the run holds no labelled scans to compare with", None
        try:
            if self._net is None or not isinstance(seen, Seen):
                assert not isinstance(seen, Seen)
                found = sure.novelty(familiar.vector_of(seen))
            elif sure.inside is not None:
                found = sure.novelty_inside(vector_of(self._net, seen, self.model.spec))
        except ValueError as error:  # of a vector that has no direction, or is no number
            why = str(error)
        return found or Unsaid(what="novelty", why=f"not known whether the scan is strange: {why}")

    def _mark(self, seen: Features | Seen, first: Volume) -> LabelMap:
        head = self.adapted.head
        if self._net is not None and isinstance(seen, Seen):
            array = mark(self._net, seen, self.model.spec, self.full, first.affine_ras, first.shape_ijk)
        else:
            array = self.task.mark(head, seen, first.affine_ras, first.shape_ijk)
        return LabelMap(array=array.astype(np.int16, copy=False), classes=dict(enumerate(head.classes, start=1)))

    def _say(self, seen: Features | Seen) -> Features:
        if self._net is not None and isinstance(seen, Seen):
            return say(self._net, seen, self.model.spec, self._asked, self.full)
        assert not isinstance(seen, Seen)
        return seen

    def _looked(self, volume: Volume) -> Looked:
        spacing = self.model.spec.grid_spacing_mm(volume.spacing_mm, volume.shape_ijk)
        # A tuned network slides over all of a scan; a frozen one may see a frame or a box of it.
        seen = 1.0 if self._net is not None else self.model.covers(volume)
        return Looked(series=_key(volume), modality=volume.modality, spacing_mm=spacing, coverage=seen)


def _answer(
    predictor: Predictor,
    source: Source,
    out: Path,
    how: PredictConfig,
    findings: list[Findings],
    written: list[Written],
) -> None:
    """Predict one scan and write what was asked for; what was written before one output refused counts as told."""
    study = source.read(repair=how.repair)
    if predictor.marks:
        check_room(math.prod(study.volumes[0].shape_ijk) * MARK_BYTES, how.max_ram_gib)
    region = region_of(study.volumes[0], how.region, how.box_ras_mm) if how.somewhere else None
    images = _images(source) if any(name in DICOM for name in how.formats) else ()
    predicted = predictor.predict(study, region=region, least_mm3=how.least_mm3, most_parts=how.most_parts)
    del study  # of a long scan most of the memory that is held by now, and writing takes some too
    result = Result(findings=predicted.findings, mask=predicted.mask, sources=images)
    folder = out / source_name(source.path.resolve().as_posix() + "\0" + source.series, site_key())
    mine: list[Written] = []
    try:
        for name in sorted(how.formats, key=list(OUTPUTS).index):
            mine.append(OUTPUTS[name](result, folder, before=tuple(mine)))
    except OSError as error:
        raise StoreError(
            f"'{out.name}' cannot be written: {error.strerror}", hint="free some space and run again"
        ) from error
    finally:
        written += mine
        findings += [predicted.findings] if mine else []


def _images(source: Source) -> tuple[Any, ...]:
    """The headers of the series that was looked at."""
    if source.kind != "dicom" or source.members:
        raise ConfigError(
            "DICOM goes back to a DICOM series, and the scan is none"
            if source.kind != "dicom"
            else "DICOM goes back to a series in files, and the scan lies in a zip",
            hint="use --format nifti,json, or give the folder of the series",
        )
    return tuple(pydicom.dcmread(path, stop_before_pixels=True) for path in source.all_files())


def _unsure(sure: Assurance) -> tuple[Unsaid, ...]:
    return tuple(Unsaid(what="certainty", why=note) for note in sure.notes)


def _key(volume: Volume) -> str:
    return volume.provenance.sha256[:32]
