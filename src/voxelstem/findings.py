"""What is said of a study: each finding with its place in the patient, how sure it is, and the weights behind it.

Nothing here may name the patient. A study and its series go by pseudonymous keys, or by the UIDs that a caller who
answers an archive passes on. Every finding is preliminary until a physician has read the images. Each record raises
ValueError for what it must not hold.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

SCHEMA = "voxelstem.findings/1"
"""What a file of findings begins with; another number means other fields."""
STATUS = "preliminary, unverified"
SOFTWARE = "voxelstem"
NOTICE = (
    "voxelstem is research software and not a medical device. These findings are preliminary and unverified: "
    "a physician must read the images before anyone acts on them."
)
LONGEST_NAME = 64
"""Characters: what DICOM's LO holds, so that a name is the same in every format."""

Kind = Literal["present", "class", "value", "survival", "segment", "box"]
Point = tuple[float, float, float]

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OWN: dict[str, Kind] = {"answer": "class", "quantity": "value", "curve": "survival", "part": "segment"}
"""Fields that one kind of finding has and no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """A name's place in a vocabulary, such as 10200004 in `SCT` (SNOMED CT), "Liver"."""

    value: str
    scheme: str
    meaning: str

    def __post_init__(self) -> None:
        """Refuse texts that are empty, longer than DICOM allows, or not one printable line."""
        _check_name("value", self.value, most=16)
        _check_name("scheme", self.scheme, most=16)
        _check_name("meaning", self.meaning)


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
        _check_numbers(self)
        if (self.low_ras_mm is None) != (self.high_ras_mm is None):
            raise ValueError("a box has two corners, low_ras_mm and high_ras_mm")
        if any(low >= high for low, high in zip(self.low_ras_mm or (), self.high_ras_mm or (), strict=True)):
            raise ValueError(f"low_ras_mm {self.low_ras_mm} must lie below high_ras_mm {self.high_ras_mm}")
        if self.volume_mm3 is not None and self.volume_mm3 <= 0:
            raise ValueError(f"volume_mm3 must be positive, got {self.volume_mm3}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Certainty:
    """How sure a finding is."""

    probability: float
    low: float | None = None
    """Of the probability's interval."""
    high: float | None = None
    calibration: str = "none"
    """How scores became probabilities: `none`, `temperature`, …"""
    conformal: tuple[str, ...] | None = None
    """The answers that a conformal prediction keeps, which may be none at all; None where no such set was made."""
    level: float | None = None
    """The share of cases that the interval and the set are made to cover, such as 0.95."""

    def __post_init__(self) -> None:
        """Refuse what lies outside [0, 1], an interval that leaves the probability out, and one without its level."""
        _check_numbers(self)
        _check_share("probability", self.probability)
        _check_name("calibration", self.calibration)
        _check_interval(self.probability, self.low, self.high)
        for share in (self.low, self.high):
            _check_share("the interval of a probability", self.probability if share is None else share)
        for answer in self.conformal or ():
            _check_name("an answer of the conformal set", answer)
        _check_level(self.level, wanted=self.low is not None or self.conformal is not None)


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
        _check_numbers(self)
        _check_name("unit", self.unit, most=16)
        _check_interval(self.value, self.low, self.high)
        _check_level(self.level, wanted=self.low is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The probability of no event until each of some days after the scan."""

    days: tuple[float, ...]
    survival: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse days that do not rise from above 0, and survival that rises or lies outside [0, 1]."""
        _check_numbers(self)
        if not self.days or len(self.days) != len(self.survival):
            raise ValueError(f"a curve has one survival for each day, got {len(self.days)} and {len(self.survival)}")
        if any(later <= earlier for earlier, later in zip((0.0, *self.days), self.days, strict=False)):
            raise ValueError("the days of a curve must rise from above 0")
        for share in self.survival:
            _check_share("survival", share)
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
        _check_numbers(self)
        _check_share("p", self.p)


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
        _check_name("name", self.name)
        _check_name("licence", self.licence)
        if self.name[0] in "/~." or "\\" in self.name or ":" in self.name:
            raise ValueError("the name of weights must not be a path")


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
    """Of a `value`."""
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
        _check_name("name", self.name)
        if self.status != STATUS:
            raise ValueError(f"a finding is '{STATUS}', got '{self.status}'")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got '{self.kind}'")
        if self.answer:
            _check_name("answer", self.answer)
        if self.part < 0:
            raise ValueError(f"part must not be negative, got {self.part}")
        for name, kind in _OWN.items():
            there = bool(getattr(self, name))
            if there and kind != self.kind:
                raise ValueError(f"{name} belongs to the kind '{kind}', not to '{self.kind}'")
            if not there and kind == self.kind and name != "part":
                raise ValueError(f"the kind '{kind}' needs {name}")
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
        _check_numbers(self)
        _check_key("series", self.series)
        _check_name("modality", self.modality, most=16)
        _check_share("coverage", self.coverage)
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsaid:
    """What could not be said, and why."""

    what: str
    why: str

    def __post_init__(self) -> None:
        """Refuse texts that are empty or not one printable line."""
        _check_name("what", self.what)
        _check_name("why", self.why, most=1024)


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
    software: str = SOFTWARE
    notice: str = NOTICE

    def __post_init__(self) -> None:
        """Refuse a key that could be a name or a path, findings of no series or other weights, and another notice."""
        _check_key("study", self.study)
        _check_name("software", self.software)
        _check_name("version", self.version)
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
    try:
        told = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except RecursionError as problem:
        raise ValueError("these are no findings: too deeply nested") from problem
    schema = told.pop("schema", "none") if isinstance(told, dict) else "none"
    if schema != SCHEMA:
        raise ValueError(f"these are no findings of the schema '{SCHEMA}'")
    return _build(Findings, told, "findings")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) != len(pairs):
        raise ValueError("a field is there twice")
    return told


def _build(kind: Any, told: Any, where: str) -> Any:
    """What was read from JSON, as the annotation `kind` says."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return None if told is None else _build(inner[0], told, where)
    if origin is Literal:
        kind = str
    if dataclasses.is_dataclass(kind) and isinstance(told, dict):
        return _record(kind, told, where)
    if origin is tuple and isinstance(told, list):
        kinds = inner[:1] * len(told) if inner[1:] == (...,) else inner
        if len(kinds) != len(told):
            raise ValueError(f"{where} must have {len(kinds)} values, got {len(told)}")
        return tuple(
            _build(each, one, f"{where}[{at}]") for at, (each, one) in enumerate(zip(kinds, told, strict=True))
        )
    if kind is float and type(told) is int and abs(told) <= 2**53:  # what a float holds exactly
        return float(told)
    if isinstance(kind, type) and type(told) is kind:
        return told
    raise ValueError(f"{where} is of another type: {type(told).__name__}")


def _record(kind: Any, told: dict[str, Any], where: str) -> Any:
    kinds = get_type_hints(kind)
    for name in kinds:
        if name not in told:
            raise ValueError(f"{where} lacks '{name}'")
    if len(told) > len(kinds):
        raise ValueError(f"{where} has {len(told) - len(kinds)} unknown fields")
    built = {name: _build(each, told[name], f"{where}.{name}") for name, each in kinds.items()}
    try:
        return kind(**built)
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from problem


def _check_shared(finding: Finding) -> None:
    """What several kinds of finding need."""
    place = finding.place or Place()
    if finding.kind in ("present", "class", "box") and finding.certainty is None:
        raise ValueError(f"the kind '{finding.kind}' needs certainty")
    if finding.kind == "segment" and place.volume_mm3 is None:
        raise ValueError("the kind 'segment' needs a place with its volume_mm3")
    if finding.kind == "box" and place.low_ras_mm is None:
        raise ValueError("the kind 'box' needs a place with its corners")


def _check_numbers(record: Any) -> None:
    """Only Python's own numbers, and only finite ones, so that every format writes the same."""
    for one in dataclasses.fields(record):
        value = getattr(record, one.name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, str | int | float | None) or (
                isinstance(number, float) and not math.isfinite(number)
            ):
                raise ValueError(f"{one.name} must be a finite number")


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {share}")


def _check_interval(value: float, low: float | None, high: float | None) -> None:
    if (low is None) != (high is None):
        raise ValueError("an interval has two ends, low and high")
    if low is not None and high is not None and not low <= value <= high:
        raise ValueError(f"the interval from {low} to {high} leaves out {value}")


def _check_level(level: float | None, *, wanted: bool) -> None:
    if wanted and level is None:
        raise ValueError("an interval or a conformal set needs the level that it is made to cover")
    if level is not None and not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def _check_name(name: str, text: str, *, most: int = LONGEST_NAME) -> None:
    if not (0 < len(text) <= most and text.isprintable() and text.strip() == text):
        raise ValueError(f"{name} must be 1 to {most} printable characters on one line")


def _check_key(name: str, key: str) -> None:
    # Neither a person's name (it has a caret, a comma or a space) nor a path gets through.
    if not _KEY.fullmatch(key):
        raise ValueError(f"{name} must be a pseudonymous key or a UID: at most 64 letters, digits, dots, - and _")
