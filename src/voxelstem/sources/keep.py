"""The keep-list: the DICOM attributes that may be taken over, and what the door does with each.

What is not named here is never taken over: a list of what to remove is never complete, and a scanner's next software
may put a name where nobody looked (DICOM PS3.15, Annex E, calls for the same in E.1). Text is kept only where all of
its words are known to be harmless; a person's name in a field for kernels does not become a kernel.

Readers take raw values through `acquisition_of`; `deidentify.py` applies the rules that need the site's key.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from enum import StrEnum

from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import UID

from voxelstem.sources import vocabulary
from voxelstem.study import Acquisition

MOST_VALUES = 16  # of one attribute: an orientation has six, an image type may have more
DUMMY_YEAR = 1900  # programs that de-identify write 0001-01-01 or 1900-01-01
OLDEST_YEARS = 150.0
UNDECODABLE = (
    AttributeError,
    BytesLengthException,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What pydicom raises when it decodes a damaged value."""


class Act(StrEnum):
    """What the door does with an attribute's value."""

    NUMBER = "a number within its limits goes on"
    WORDS = "goes on if every word of it is known"
    CLASS = "a UID that the standard itself assigns goes on"
    UID = "becomes a keyed hash, the same for equal UIDs"
    HASH = "becomes a keyed hash"
    SUBJECT = "becomes the subject's pseudonym"
    DATE = "is shifted by the person's number of days"
    AGE = "90 stands for everybody over 89"
    SEX = "F, M or O goes on"
    READ = "is read to find the age or the acquisition, and goes no further"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What happens to one attribute at the door."""

    act: Act
    low: float = -math.inf
    high: float = math.inf
    words: re.Pattern[str] | None = None
    """For `Act.WORDS`: what one word may look like."""
    otherwise: str = ""
    """For `Act.WORDS`: what stands for a value with unknown words; empty drops the attribute."""
    fact: bool = False
    """Whether it becomes one of an acquisition's `facts`."""


_NUMBER = Rule(act=Act.NUMBER, low=-1e6, high=1e6)
_UID = Rule(act=Act.UID)
_DATE = Rule(act=Act.DATE)
_READ = Rule(act=Act.READ)


def _number(low: float, high: float) -> Rule:
    return Rule(act=Act.NUMBER, low=low, high=high, fact=True)


def _known(words: re.Pattern[str], *, fact: bool = True) -> Rule:
    return Rule(act=Act.WORDS, words=words, fact=fact)


KEPT: Mapping[str, Rule] = {
    # who, and when
    "PatientID": Rule(act=Act.SUBJECT),
    "PatientName": Rule(act=Act.SUBJECT),
    "PatientAge": Rule(act=Act.AGE),
    "PatientSex": Rule(act=Act.SEX),
    "PatientBirthDate": _READ,
    "StudyDate": _DATE,
    "SeriesDate": _DATE,
    "AcquisitionDate": _DATE,
    "AcquisitionDateTime": _READ,
    "AcquisitionTime": _READ,
    # which image of which series
    "StudyInstanceUID": _UID,
    "SeriesInstanceUID": _UID,
    "SOPInstanceUID": _UID,
    "FrameOfReferenceUID": _UID,
    "IrradiationEventUID": _UID,
    "AcquisitionUID": _UID,
    "SOPClassUID": Rule(act=Act.CLASS),
    "AcquisitionNumber": Rule(act=Act.NUMBER, low=0, high=9_999),
    "InstanceNumber": Rule(act=Act.NUMBER, low=0, high=99_999),
    # the picture
    "Modality": _known(vocabulary.words("CT|MR"), fact=False),
    "ImageType": Rule(act=Act.WORDS, words=vocabulary.IMAGE_TYPES, otherwise="OTHER", fact=True),
    "Rows": Rule(act=Act.NUMBER, low=1, high=65_535),
    "Columns": Rule(act=Act.NUMBER, low=1, high=65_535),
    "NumberOfFrames": Rule(act=Act.NUMBER, low=1, high=99_999),
    "SamplesPerPixel": Rule(act=Act.NUMBER, low=1, high=4),
    "PhotometricInterpretation": _known(vocabulary.words("MONOCHROME[12]"), fact=False),
    "BitsAllocated": Rule(act=Act.NUMBER, low=1, high=64),
    "BitsStored": Rule(act=Act.NUMBER, low=1, high=64),
    "HighBit": Rule(act=Act.NUMBER, low=0, high=63),
    "PixelRepresentation": Rule(act=Act.NUMBER, low=0, high=1),
    "PixelPaddingValue": _NUMBER,
    "PixelPaddingRangeLimit": _NUMBER,
    "RescaleSlope": _NUMBER,
    "RescaleIntercept": _NUMBER,
    "RescaleType": _known(vocabulary.words("HU|US|NORMALIZED"), fact=False),
    "WindowCenter": _NUMBER,
    "WindowWidth": _NUMBER,
    "LossyImageCompression": _known(vocabulary.words("00|01")),
    "BurnedInAnnotation": _known(vocabulary.words("NO|YES"), fact=False),
    # where it lies
    "ImagePositionPatient": _NUMBER,
    "ImageOrientationPatient": _NUMBER,
    "PixelSpacing": _NUMBER,
    "PatientPosition": _known(vocabulary.words("[HF]F(S|P|DR|DL)|[LRAP]F(S|P|DR|DL)")),
    "SliceThickness": _number(0, 1_000),
    "SpacingBetweenSlices": _number(-1_000, 1_000),
    "GantryDetectorTilt": _number(-90, 90),
    # how it was made
    "Manufacturer": _known(vocabulary.MAKERS),
    "ManufacturerModelName": _known(vocabulary.MODELS),
    "DeviceSerialNumber": Rule(act=Act.HASH, fact=True),
    "BodyPartExamined": _known(vocabulary.PARTS),
    "ContrastBolusAgent": _known(vocabulary.CONTRASTS),
    "ConvolutionKernel": _known(vocabulary.KERNELS),
    "ScanOptions": _known(vocabulary.SCANS),
    "KVP": _number(0, 1_000),
    "XRayTubeCurrent": _number(0, 10_000),
    "Exposure": _number(0, 100_000),
    "ExposureTime": _number(0, 1e6),
    "SpiralPitchFactor": _number(0, 100),
    "CTDIvol": _number(0, 10_000),
    "ReconstructionDiameter": _number(0, 10_000),
    "DataCollectionDiameter": _number(0, 10_000),
    "MagneticFieldStrength": _number(0, 30),
    "MRAcquisitionType": _known(vocabulary.words("[123]D")),
    "ScanningSequence": _known(vocabulary.SEQUENCES),
    "SequenceVariant": _known(vocabulary.SEQUENCES),
    "RepetitionTime": _number(0, 100_000),
    "EchoTime": _number(0, 100_000),
    "InversionTime": _number(0, 100_000),
    "FlipAngle": _number(0, 360),
    "EchoTrainLength": _number(0, 10_000),
    "DiffusionBValue": _number(0, 100_000),
    "AcquisitionContrast": _known(
        vocabulary.words("T1|T2|T2_STAR|PROTON_DENSITY|FLUID_ATTENUATED|DIFFUSION|PERFUSION|UNKNOWN|MIXED")
    ),
}
"""DICOM keyword -> what the door does with its value. No keyword, no way in."""

FACTS = tuple(keyword for keyword, rule in KEPT.items() if rule.fact)
CONTRAST_OF = {"T1": "T1w", "T2": "T2w", "T2_STAR": "T2starw", "PROTON_DENSITY": "PDw", "FLUID_ATTENUATED": "FLAIR"}
"""Enhanced MR's AcquisitionContrast (PS3.3, C.8.13.4.3) in the words of BIDS."""


def clean(keyword: str, text: str) -> str:
    r"""What may go on of a value that needs no key: numbers within limits, and texts whose every word is known.

    Values are parted by a backslash, as in DICOM. What is not allowed becomes empty; there are no halves, because
    what is left of a sentence without its unknown words may still say whose it is.

    >>> clean("ConvolutionKernel", r"Br40d\3"), clean("ConvolutionKernel", "Miller B30f"), clean("KVP", "120.0")
    ('Br40d\\3', '', '120')
    """
    rule = KEPT.get(keyword)
    values = text.split("\\")
    if (
        rule is None
        or not text.strip()
        or len(values) > MOST_VALUES
        or len(text) > MOST_VALUES * vocabulary.MOST_CHARACTERS
    ):
        return ""
    if keyword == "ContrastBolusAgent":
        return vocabulary.contrast_agent(text)
    if rule.act is Act.NUMBER:
        return "\\".join(f"{number:.8g}" for number in numbers(keyword, text))
    if rule.act is Act.WORDS and rule.words is not None:
        if not rule.otherwise and not vocabulary.at_most_one_number(text):
            return ""
        known = [
            vocabulary.tidy(value) if vocabulary.all_known(value, rule.words) else rule.otherwise for value in values
        ]
        return "\\".join(known) if all(known) else ""
    return ""


def numbers(keyword: str, text: str) -> tuple[float, ...]:
    """The numbers that a value holds, if all of them are within the keep-list's limits; else none."""
    rule = KEPT[keyword]
    try:
        found = tuple(float(value) for value in text.split("\\"))
    except ValueError:
        return ()
    return found if all(rule.low <= number <= rule.high for number in found) else ()


def acquisition_of(dataset: Dataset) -> Acquisition:
    """What an image's header says of its acquisition, by the keep-list.

    Enhanced images say part of it in their functional groups; the first frame speaks for all. Ids and dates are the
    header's own and leave this machine only through `deidentify.py`. A value that cannot be decoded counts as absent:
    whether the image can be used is not decided here.
    """
    day = _day(dataset)
    modality = _text(dataset, "Modality")
    facts = {keyword: _fact(dataset, keyword) for keyword in FACTS}
    agent = facts["ContrastBolusAgent"]
    return Acquisition(
        series=short(_text(dataset, "SeriesInstanceUID")),
        study=short(_text(dataset, "StudyInstanceUID")),
        group=_group(dataset, modality, day),
        date=day.isoformat() if day else "",
        age_years=_age_years(dataset, day),
        sex=sex(_text(dataset, "PatientSex")),
        contrast=agent if modality == "CT" else CONTRAST_OF.get(facts["AcquisitionContrast"].upper(), ""),
        facts={keyword: fact for keyword, fact in facts.items() if fact},
    )


def text_of(dataset: Dataset, keyword: str) -> str:
    """An attribute's values as text, parted by backslashes; empty where it has none that can be decoded."""
    try:
        value = dataset[keyword].value if keyword in dataset else None
        return (
            "" if value is None else "\\".join(map(str, value)) if isinstance(value, MultiValue | list) else str(value)
        )
    except UNDECODABLE:
        return ""


def short(text: str) -> str:
    """A text, or a digest of it where it is longer than any id: different ids stay different."""
    text = text.strip().strip("\0")
    return (
        text if len(text) <= vocabulary.MOST_CHARACTERS else hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    )


def sex(text: str) -> str:
    """`F`, `M` or `O`, or empty for anything else.

    >>> sex("female"), sex("m"), sex("n/a")
    ('F', 'M', '')
    """
    known = {"F": "F", "FEMALE": "F", "M": "M", "MALE": "M", "O": "O", "OTHER": "O"}
    return known.get(text.strip().upper(), "")


def parse_day(text: str) -> date | None:
    """A day written as DICOM (`20240131`) or ISO 8601 (`2024-01-31`) do, a time behind it allowed; else nothing."""
    found = re.match(r"\s*(\d{4})([-.]?)(\d\d)\2(\d\d)(?!\d\d?\b)", text, re.ASCII)
    try:
        day = date(int(found[1]), int(found[3]), int(found[4])) if found else None
    except ValueError:
        return None
    return day if day and day.year > DUMMY_YEAR else None


def is_standard_uid(text: str) -> bool:
    """Whether a UID is one that the standard itself assigns, such as that of CT Image Storage."""
    return text.startswith("1.2.840.10008.") and UID(text).name != text


def _group(dataset: Dataset, modality: str, day: date | None) -> str:
    """Equal for all kernels and reconstructions of one acquisition, and other for the next phase.

    Scanners since about 2007 give an acquisition its own UID. Older ones are told by number and time; slices have
    their own times in some makers' images, so that CT, where two phases are hardly in one minute under one number,
    counts minutes. A number alone says nothing, as all series of a study may be number 1. Where this fails, two
    reconstructions are not linked here, and only their likeness shows it.
    """
    study = _text(dataset, "StudyInstanceUID")
    event = _text(dataset, "IrradiationEventUID") or _text(dataset, "AcquisitionUID")
    if not event:
        number = _text(dataset, "AcquisitionNumber") or _text(dataset, "FrameAcquisitionNumber")
        times = (_text(dataset, "AcquisitionTime")[:6], _text(dataset, "AcquisitionDateTime")[8:14])
        time = next((time for time in times if time.strip(" 0:")), "")  # zeros are what programs write that remove it
        if not time:
            return ""
        event = f"{number} {day or ''} {time[:4] if modality == 'CT' else time}"
    parts = "\0".join((study, _text(dataset, "FrameOfReferenceUID"), event))
    return hashlib.sha256(parts.encode("utf-8", "replace")).hexdigest()


def _age_years(dataset: Dataset, day: date | None) -> float | None:
    found = re.fullmatch(r"(\d{1,3})([YMWD])", _text(dataset, "PatientAge").strip().upper(), re.ASCII)
    if found and (int(found[1]) > 0 or found[2] != "Y"):  # 000Y is what programs write that remove ages
        years = int(found[1]) / {"Y": 1.0, "M": 12.0, "W": 52.18, "D": 365.25}[found[2]]
        return round(years, 2) if years <= OLDEST_YEARS else None
    born = parse_day(_text(dataset, "PatientBirthDate"))
    if born is None or day is None or born >= day:  # equal where a program wrote one dummy for every date
        return None
    return float(int((day - born).days / 365.25))


def _day(dataset: Dataset) -> date | None:
    for keyword in ("AcquisitionDate", "AcquisitionDateTime", "SeriesDate", "StudyDate"):
        day = parse_day(_text(dataset, keyword)[:8])
        if day:
            return day
    return None


def _fact(dataset: Dataset, keyword: str) -> str:
    text = _text(dataset, keyword)
    return short(text) if KEPT[keyword].act is Act.HASH else clean(keyword, text)


def _text(dataset: Dataset, keyword: str) -> str:
    """An attribute as text, from the header or from the first of its functional groups; empty where it has none."""
    return next(filter(None, (text_of(place, keyword) for place in _places(dataset))), "")


def _places(dataset: Dataset) -> Iterator[Dataset]:
    """The header itself, then what all frames share, then what the first frame has of its own."""
    yield dataset
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for groups in items_of(dataset, keyword)[:1]:
            yield groups
            for tag in list(groups.keys()):
                yield from items_of(groups, tag)[:1]


def items_of(dataset: Dataset, name: str | BaseTag) -> list[Dataset]:
    """The items of a sequence; none where there is no sequence, or one that cannot be decoded."""
    try:
        value = dataset[name].value if name in dataset else None
    except UNDECODABLE:
        return []
    return list(value) if isinstance(value, Sequence) else []
