"""What is said of a study: each finding with its place in the patient, how sure it is, and the weights behind it.

Nothing here may name the patient. A study and its series go by pseudonymous keys, or by the UIDs that a caller who
answers an archive passes on. Every finding is preliminary until a physician has read the images. Each record raises
ValueError for what it must not hold.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Literal, get_args

from voxelstem import strictjson
from voxelstem.allowed import (
    LONGEST_NAME,
    check_interval,
    check_key,
    check_level,
    check_name,
    check_numbers,
    check_share,
)

SCHEMA = "voxelstem.findings/3"
"""What a file of findings begins with; another number means other fields."""
STATUS = "preliminary, unverified"
SOFTWARE = "voxelstem"
NOTICE = (
    "voxelstem is research software and not a medical device. These findings are preliminary and unverified: "
    "a physician must read the images before anyone acts on them."
)

VOLUME_UNIT = "mL"
MM3_PER_ML = 1000.0

Kind = Literal["present", "class", "value", "survival", "segment", "box"]
Point = tuple[float, float, float]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_OWN: dict[str, tuple[Kind, ...]] = {
    "answer": ("class",),
    "quantity": ("value", "segment"),
    "curve": ("survival",),
    "part": ("segment",),
}
"""Fields that one kind of finding needs, the first, and no other may have, but those that follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """A name's place in a vocabulary, such as 10200004 in `SCT` (SNOMED CT), "Liver"."""

    value: str
    scheme: str
    meaning: str

    def __post_init__(self) -> None:
        """Refuse texts that are empty, longer than DICOM allows, or not one printable line."""
        check_name("value", self.value, most=16)
        check_name("scheme", self.scheme, most=16)
        check_name("meaning", self.meaning, most=LONGEST_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where in the patient, in millimetres (RAS+); what is not known is None."""

    centre_ras_mm: Point | None = None
    low_ras_mm: Point | None = None
    """The corner of the box along R, A and S that is farthest to the left, back and feet."""
    high_ras_mm: Point | None = None
    volume_mm3: float | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that are not finite, a corner alone or not below the other, and a volume of nothing."""
        check_numbers(self)
        if (self.low_ras_mm is None) != (self.high_ras_mm is None):
            raise ValueError("a box has two corners, low_ras_mm and high_ras_mm")
        if any(low >= high for low, high in zip(self.low_ras_mm or (), self.high_ras_mm or (), strict=True)):
            raise ValueError(f"low_ras_mm {self.low_ras_mm} must lie below high_ras_mm {self.high_ras_mm}")
        if self.volume_mm3 is not None and self.volume_mm3 <= 0:
            raise ValueError(f"volume_mm3 must be positive, got {self.volume_mm3}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Certainty:
    """How sure a finding is."""

    probability: float | None = None
    """None where nothing is known of how often such an answer is right: there is only a score then."""
    score: float | None = None
    """What the head states where that is no probability: of two findings the one with more is the surer, no more."""
    low: float | None = None
    """Of the probability's interval."""
    high: float | None = None
    calibration: str = "none"
    """How scores became probabilities: `none`, `temperature`, `platt`, …"""
    interval: str = ""
    """How the interval was made, where that covers no share of cases: `venn_abers`, whose promise is that whatever the
    truth is, one of the probabilities between its ends is calibrated."""
    conformal: tuple[str, ...] | None = None
    """The answers that a conformal prediction keeps, which may be none at all; None where no such set was made."""
    level: float | None = None
    """The share of cases that the set, and an interval without a name, are made to cover, such as 0.95."""

    def __post_init__(self) -> None:
        """Refuse what lies outside [0, 1], an interval that leaves the probability out, and one without its level."""
        check_numbers(self)
        if (self.probability is None) == (self.score is None):
            raise ValueError("a finding has a probability, or a score that is none")
        if self.probability is None and (self.low is not None or self.high is not None or self.calibration != "none"):
            raise ValueError("a score that is no probability has no interval and is not calibrated")
        probability = 0.0 if self.probability is None else self.probability
        check_share("probability", probability)
        check_name("calibration", self.calibration)
        check_interval(probability, self.low, self.high)
        for share in (self.low, self.high):
            check_share("the interval of a probability", probability if share is None else share)
        for answer in self.conformal or ():
            check_name("an answer of the conformal set", answer)
        if self.interval:
            check_name("interval", self.interval)
            if self.low is None:
                raise ValueError(f"there is no interval that '{self.interval}' could have made")
        covers = self.low is not None and not self.interval
        check_level(self.level, wanted=covers or self.conformal is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """A number with its unit."""

    value: float
    unit: str
    """As UCUM writes it: `mm`, `a` for years, `[hnsf'U]` for Hounsfield units, `1` for a plain number."""
    low: float | None = None
    high: float | None = None
    level: float | None = None
    """The share of cases that the interval is made to cover, such as 0.95."""

    def __post_init__(self) -> None:
        """Refuse a number without a unit, an interval that leaves the value out, and one without its level."""
        check_numbers(self)
        check_name("unit", self.unit, most=16)
        check_interval(self.value, self.low, self.high)
        check_level(self.level, wanted=self.low is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The probability of no event until each of some days after the scan."""

    days: tuple[float, ...]
    survival: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse days that do not rise from above 0, and survival that rises or lies outside [0, 1]."""
        check_numbers(self)
        if not self.days or len(self.days) != len(self.survival):
            raise ValueError(f"a curve has one survival for each day, got {len(self.days)} and {len(self.survival)}")
        if any(later <= earlier for earlier, later in zip((0.0, *self.days), self.days, strict=False)):
            raise ValueError("the days of a curve must rise from above 0")
        for share in self.survival:
            check_share("survival", share)
        if any(later > earlier for earlier, later in zip(self.survival, self.survival[1:], strict=False)):
            raise ValueError("survival must not rise with time")


@dataclass(frozen=True, kw_only=True, slots=True)
class Novelty:
    """Whether the study is unlike those that the weights learned from (out of distribution)."""

    flagged: bool
    score: float
    p: float
    """The share of studies like those of training that would score at least as high."""

    def __post_init__(self) -> None:
        """Refuse a score that is not finite, and p outside [0, 1]."""
        check_numbers(self)
        check_share("p", self.p)


def check_weights_name(name: str, text: str) -> None:
    """Accept what weights, and so the titles of runs, may be called.

    Raises:
        ValueError: it is not one printable line of 1 to 64 characters, or could be a place on a disk.
    """
    check_name(name, text)
    if text[0] in "/~." or "\\" in text or ":" in text:
        raise ValueError(f"{name} must not be a path: no '/', '~' or '.' in front, and no '\\' or ':' at all")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Which weights said it."""

    sha256: str
    name: str
    licence: str

    def __post_init__(self) -> None:
        """Refuse what is no SHA-256, and a name that is a place on a disk."""
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError("sha256 must be 64 hexadecimal digits in lower case")
        check_weights_name("name", self.name)
        check_name("licence", self.licence)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is said of a study. It is a proposal and stays one: `status` has only one value."""

    name: str
    kind: Kind
    weights: Weights
    code: Code | None = None
    """What the name is in a vocabulary, where that is known."""
    answer: str = ""
    """Of a `class`: which one."""
    quantity: Quantity | None = None
    """Of a `value`; of a `segment` of all voxels its volume in `mL`, where that comes with an interval."""
    curve: Curve | None = None
    """Of a `survival`."""
    place: Place | None = None
    certainty: Certainty | None = None
    novelty: Novelty | None = None
    part: int = 0
    """Of a `segment`: 0 for all voxels of the class, n for its n-th largest piece."""
    status: str = STATUS

    def __post_init__(self) -> None:
        """Refuse a finding that lacks what its kind needs, or has what belongs to another kind."""
        check_name("name", self.name)
        if self.status != STATUS:
            raise ValueError(f"a finding is '{STATUS}', got '{self.status}'")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got '{self.kind}'")
        if self.answer:
            check_name("answer", self.answer)
        if self.part < 0:
            raise ValueError(f"part must not be negative, got {self.part}")
        for name, kinds in _OWN.items():
            there = bool(getattr(self, name))
            if there and self.kind not in kinds:
                raise ValueError(f"{name} belongs to the kind '{kinds[0]}', not to '{self.kind}'")
            if not there and kinds[0] == self.kind and name != "part":
                raise ValueError(f"the kind '{self.kind}' needs {name}")
        _check_shared(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """One series that was looked at."""

    series: str
    """Its pseudonymous key, or its UID for an archive that asked."""
    modality: str
    spacing_mm: tuple[float, float, float]
    """At which the network saw it."""
    coverage: float
    """The share of the series' voxels that the network saw."""

    def __post_init__(self) -> None:
        """Refuse a key that could be a name or a path, a spacing of nothing, and a coverage outside [0, 1]."""
        check_numbers(self)
        check_key("series", self.series)
        check_name("modality", self.modality, most=16)
        check_share("coverage", self.coverage)
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsaid:
    """What could not be said, and why."""

    what: str
    why: str

    def __post_init__(self) -> None:
        """Refuse texts that are empty or not one printable line."""
        check_name("what", self.what)
        check_name("why", self.why, most=1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything that is said of one study, and what was looked at to say it."""

    study: str
    """Its pseudonymous key, or its UID for an archive that asked."""
    looked: tuple[Looked, ...]
    weights: tuple[Weights, ...]
    """All that looked, also those that found nothing."""
    version: str
    """Of the software that wrote it: `voxelstem.__version__`."""
    findings: tuple[Finding, ...] = ()
    unsaid: tuple[Unsaid, ...] = ()
    novelty: Novelty | None = None
    """Of the scan, beside that of each finding: where nothing was found, this is what there is to know of that."""
    software: str = SOFTWARE
    notice: str = NOTICE

    def __post_init__(self) -> None:
        """Refuse a key that could be a name or a path, findings of no series or other weights, and another notice."""
        check_key("study", self.study)
        check_name("software", self.software)
        check_name("version", self.version)
        if not self.looked:
            raise ValueError("findings need at least one series that was looked at")
        if not self.weights or any(one.weights not in self.weights for one in self.findings):
            raise ValueError("weights must name all that looked, and so those behind each finding")
        if self.notice != NOTICE:
            raise ValueError("the notice that findings are unverified must not be changed")


def to_json(findings: Findings) -> str:
    """Findings as JSON text, which `of_json` reads back to equal findings."""
    return json.dumps({"schema": SCHEMA, **dataclasses.asdict(findings)}, allow_nan=False, ensure_ascii=False, indent=1)


def of_json(text: str) -> Findings:
    """Read what `to_json` wrote.

    Raises:
        ValueError: no JSON, another schema, a field that is missing, unknown or doubled, a value of another type or
            no finite number, or what a record refuses.
    """
    told = strictjson.read(text)
    schema = told.pop("schema", "none") if isinstance(told, dict) else "none"
    if schema != SCHEMA:
        raise ValueError(f"these are no findings of the schema '{SCHEMA}'")
    return strictjson.build(Findings, told, "findings")


def _check_shared(finding: Finding) -> None:
    """What several kinds of finding need."""
    place = finding.place or Place()
    if finding.kind in ("present", "class", "box") and finding.certainty is None:
        raise ValueError(f"the kind '{finding.kind}' needs certainty")
    if finding.kind == "segment" and place.volume_mm3 is None:
        raise ValueError("the kind 'segment' needs a place with its volume_mm3")
    if finding.kind == "segment" and finding.quantity is not None:
        _check_volume(finding.quantity, place.volume_mm3 or 0.0, finding.part)
    if finding.kind == "box" and place.low_ras_mm is None:
        raise ValueError("the kind 'box' needs a place with its corners")


def _check_volume(quantity: Quantity, volume_mm3: float, part: int) -> None:
    """The quantity of a segment says nothing but how sure its volume is."""
    if part or quantity.unit != VOLUME_UNIT or abs(quantity.value * MM3_PER_ML - volume_mm3) > 1e-6 * volume_mm3:
        raise ValueError(f"the quantity of a 'segment' is the volume of all its voxels in {VOLUME_UNIT}")
