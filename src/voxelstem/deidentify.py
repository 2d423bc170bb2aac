"""The door: what leaves a scan's own names and dates behind, on the way into a store or into another DICOM file.

Only what the keep-list (`sources/keep.py`) names goes through, changed as it says: ids become keyed hashes, dates move
by a number of days that belongs to the person, everybody over 89 is 90 (45 CFR 164.514(b)(2)(i)(C)). Voxels are kept
as they are: a head can be recognised by its face, and nothing here removes one. Reports are kept as they are too.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta

import numpy as np
from pydicom.config import disable_value_validation
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DSfloat

from voxelstem.errors import IngestError
from voxelstem.sources import keep
from voxelstem.sources.keep import KEPT, Act
from voxelstem.sources.vocabulary import MOST_CHARACTERS, clean_contrast
from voxelstem.store.subjects import keyed_id, keyed_uid, pseudonym, shift_days
from voxelstem.study import Acquisition, Provenance, Study

OLDEST_YEARS = 89
"""Above it, an age alone can identify a person, and `OVER_OLDEST` stands for all of them."""
OVER_OLDEST = 90
LONGEST_NOTE = 500
METHOD = ("voxelstem keep-list", "UIDs and ids by keyed hash", "dates shifted per patient", "ages over 89 are 90")
METHOD_CODES = {
    "113100": "Basic Application Confidentiality Profile",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    "113108": "Retain Patient Characteristics Option",
}
"""What was done, by DICOM's own codes (PS3.16, CID 7050); the second for dates, the third for age and sex."""
PICTURES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT, enhanced",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT, legacy converted enhanced",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR, enhanced",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR, legacy converted enhanced",
}
"""The only kinds of image that are known not to be pictures of a screen."""
FRAME_GROUPS = (
    "PixelMeasuresSequence",
    "PlaneOrientationSequence",
    "PlanePositionSequence",
    "PixelValueTransformationSequence",
    "CTReconstructionSequence",
)
"""The functional groups of enhanced images that go on, with what the keep-list names in them."""
EMPTY = ("AccessionNumber", "PatientBirthDate", "ReferringPhysicianName", "SeriesNumber", "StudyID", "StudyTime")
"""Attributes that an image must have and that may be empty (type 2)."""
_HARMLESS_SESSION = re.compile(
    r"\d{1,3}|(baseline|bl|base|pre|post|followup|fu|screening|month|mo|m|week|wk|w|year|yr|y|day|d|visit|v|scan|ses|session"
    r"|tp|timepoint|t|run|test|retest|acute|chronic)\d{0,3}",
    re.IGNORECASE | re.ASCII,
)
_NUMBER_LIKE_AN_ID = re.compile(r"\d+(\.\d+){3,}|(?<![.\d])\d{6,}")


def deidentify(study: Study, key: bytes) -> Study:
    """Take a study's identity away: every id, date and header value of all of its volumes.

    The same person, series and acquisition get the same hashes from the same key, wherever and whenever they are
    taken in; another key gives others. Voxels, labels and the report stay: a report must not name the patient.

    Args:
        study: As a source read it, with the source's own ids.
        key: The site's key, 32 bytes.

    Raises:
        ValueError: the subject's id is empty.
    """
    volumes = tuple(
        replace(
            volume,
            acquisition=_acquisition(volume.acquisition, study.subject, key),
            provenance=_provenance(volume.provenance, (study.subject, *_ids(volume.acquisition))),
        )
        for volume in study.volumes
    )
    return replace(study, subject=pseudonym(study.subject, key), volumes=volumes)


def _acquisition(raw: Acquisition, subject: str, key: bytes) -> Acquisition:
    return Acquisition(
        series=keyed_id("series", raw.series, key),
        study=keyed_id("study", raw.study, key),
        group=keyed_id("group", raw.group, key),
        session=_session(raw.session, subject, key),
        date=_shifted(raw.date, subject, key),
        age_years=_age(raw.age_years),
        sex=keep.sex(raw.sex),
        contrast=clean_contrast(raw.contrast),
        facts=_facts(raw.facts, key),
    )


def _facts(raw: Mapping[str, str], key: bytes) -> dict[str, str]:
    """The facts that the keep-list names; a device's number as a keyed hash."""
    kept = {name: text for name, text in raw.items() if name in KEPT and KEPT[name].fact}
    hashed = {name: keyed_id(name, text, key) for name, text in kept.items() if KEPT[name].act is Act.HASH}
    facts = {name: hashed.get(name) or keep.clean(name, text) for name, text in kept.items()}
    return {name: fact for name, fact in facts.items() if fact}


def _session(raw: str, subject: str, key: bytes) -> str:
    """A session's label if it can be neither a date nor an id, such as `01` or `month12`; else a keyed hash."""
    plain = raw.strip()
    if _HARMLESS_SESSION.fullmatch(plain):
        return plain
    return keyed_id("session", f"{subject.strip()}\0{plain}", key)[:12] if plain else ""


def _shifted(raw: str, subject: str, key: bytes) -> str:
    """A day, moved as far as all of the person's days are; empty for anything that is no day."""
    day = keep.parse_day(raw)
    return (day + timedelta(days=shift_days(subject, key))).isoformat() if day else ""


def _age(years: float | None) -> float | None:
    if years is None or not math.isfinite(years) or years < 0:
        return None
    return float(OVER_OLDEST) if years > OLDEST_YEARS else years


def _ids(raw: Acquisition) -> Iterable[str]:
    unknown = (text for name, text in raw.facts.items() if not keep.clean(name, text))
    return (raw.series, raw.study, raw.group, raw.session, raw.date, *unknown)


def _provenance(raw: Provenance, ids: Iterable[str]) -> Provenance:
    """Notes are our own sentences; should one quote the source all the same, the quoted id goes, and long numbers."""
    return replace(raw, notes=tuple(_scrubbed(note, ids) for note in raw.notes))


def _scrubbed(note: str, ids: Iterable[str]) -> str:
    shortest = 4  # a subject may be called `1`, and notes hold numbers
    for name in sorted({name.strip() for name in ids}, key=len, reverse=True):
        if len(name) >= shortest:
            note = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", note, flags=re.IGNORECASE)
    printable = "".join(character if character.isprintable() else " " for character in note)
    return _NUMBER_LIKE_AN_ID.sub("…", printable)[:LONGEST_NOTE]


def deidentify_dataset(dataset: Dataset, key: bytes) -> FileDataset:
    """Make a new DICOM image of one CT or MR image, with nothing in it but what the keep-list names.

    Private blocks, curves, overlays, nested sequences and the preamble do not come along; neither do comments in
    compressed pixel data nor bits that the image does not use, because pixels are decoded and written plainly. The
    functional groups of enhanced images keep where each frame lies and how its values are scaled.

    Args:
        dataset: An image as pydicom reads it, with its pixels and, where it is compressed, its file meta group.
        key: The site's key, 32 bytes.

    Raises:
        IngestError: `burned-in` when the picture may show text (a screen's picture, or marked so), `unsupported`
            for any other kind of image or a colour one, `no-subject`, or `corrupt`.
    """
    # pydicom's warnings and log lines quote header values, which may name the patient.
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        return _remade(dataset, key)


def _remade(dataset: Dataset, key: bytes) -> FileDataset:
    _check_picture(dataset)
    subject = keep.text_of(dataset, "PatientID").strip() or keep.text_of(dataset, "StudyInstanceUID").strip()
    if not subject:
        raise IngestError(
            "the image has neither a PatientID nor a StudyInstanceUID",
            code="no-subject",
            hint="give the image the id that the site uses for its patient",
        )
    made = _kept(dataset, subject, key)
    made.PatientID = made.PatientName = pseudonym(subject, key)
    _keep_groups(made, dataset, subject, key)
    for keyword in EMPTY:
        made.add(DataElement(_tag(keyword), dictionary_VR(keyword), None))
    _mark(made)
    _write_pixels(made, dataset)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = made.SOPClassUID
    meta.MediaStorageSOPInstanceUID = made.get("SOPInstanceUID", keyed_uid("", key))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return FileDataset(io.BytesIO(), made, preamble=bytes(128), file_meta=meta)


def _check_picture(dataset: Dataset) -> None:
    """Let through only images in which nobody can have burned a name."""
    kind = keep.text_of(dataset, "SOPClassUID")
    words = keep.text_of(dataset, "ImageType").upper().split("\\")
    captured = kind.startswith("1.2.840.10008.5.1.4.1.1.7") or words[:2] == ["DERIVED", "SECONDARY"]
    marked = keep.text_of(dataset, "BurnedInAnnotation").strip().upper() == "YES"
    if captured or marked or "SCREEN" in " ".join(words) or keep.text_of(dataset, "ConversionType"):
        raise IngestError(
            "the image is a picture of a screen, or marked as showing text, which may be the patient's name",
            code="burned-in",
            hint="give the original images of the scanner",
        )
    if kind not in PICTURES or keep.text_of(dataset, "SamplesPerPixel") not in ("", "1"):
        raise IngestError(
            "the image is no grey CT or MR image", code="unsupported", hint="give the original CT or MR images"
        )


def _kept(dataset: Dataset, subject: str, key: bytes) -> Dataset:
    """The attributes of one level that the keep-list names, each as its rule says."""
    made = Dataset()
    for keyword in KEPT:
        text = keep.text_of(dataset, keyword)
        value = _changed(keyword, text, subject, key) if text.strip() else None
        if value not in (None, "", []):
            kind = dictionary_VR(keyword)
            made.add(DataElement(_tag(keyword), "US" if kind == "US or SS" else kind, value))
    return made


def _changed(keyword: str, text: str, subject: str, key: bytes) -> object:
    """One attribute's value as it goes on, or nothing."""
    changes: dict[Act, Callable[[], object]] = {
        Act.NUMBER: lambda: _numbers(keyword, text),
        Act.WORDS: lambda: keep.clean(keyword, text).split("\\"),
        Act.CLASS: lambda: text if keep.is_standard_uid(text) else None,
        Act.UID: lambda: [keyed_uid(uid, key) for uid in text.split("\\")],
        Act.HASH: lambda: keyed_id(keyword, text, key),
        Act.SUBJECT: lambda: pseudonym(subject, key),
        Act.DATE: lambda: _shifted(text[:MOST_CHARACTERS], subject, key).replace("-", ""),
        Act.AGE: lambda: _age_text(text),
        Act.SEX: lambda: keep.sex(text),
        Act.READ: lambda: None,
    }
    return changes[KEPT[keyword].act]()


def _numbers(keyword: str, text: str) -> list[object]:
    found = keep.numbers(keyword, text)
    if dictionary_VR(keyword) in ("DS", "FD"):
        return [DSfloat(number, auto_format=True) for number in found]
    if dictionary_VR(keyword) == "US or SS":
        return [int(number) % 2**16 for number in found]  # as bits, because scanners write either for signed pixels
    return [int(number) for number in found]


def _age_text(text: str) -> str:
    found = re.fullmatch(r"(\d{3})([YMWD])", text.strip(), re.ASCII)
    if found is None:
        return ""
    years = int(found[1]) / {"Y": 1.0, "M": 12.0, "W": 52.18, "D": 365.25}[found[2]]
    return f"{OVER_OLDEST:03d}Y" if years > OLDEST_YEARS else found[0]


def _keep_groups(made: Dataset, dataset: Dataset, subject: str, key: bytes) -> None:
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        frames = [_groups(frame, subject, key) for frame in keep.items_of(dataset, keyword)]
        if frames:
            made.add(DataElement(_tag(keyword), "SQ", Sequence(frames)))


def _groups(frame: Dataset, subject: str, key: bytes) -> Dataset:
    made = Dataset()
    for keyword in FRAME_GROUPS:
        items = [_kept(item, subject, key) for item in keep.items_of(frame, keyword)]
        if items:
            made.add(DataElement(_tag(keyword), "SQ", Sequence(items)))
    return made


def _mark(made: Dataset) -> None:
    """Say in the image what was done to it (PS3.15, E.1.1)."""
    made.PatientIdentityRemoved = "YES"
    made.DeidentificationMethod = list(METHOD)
    made.LongitudinalTemporalInformationModified = "MODIFIED"
    codes = [Dataset() for _ in METHOD_CODES]
    for item, (code, meaning) in zip(codes, METHOD_CODES.items(), strict=True):
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, "DCM", meaning
    made.DeidentificationMethodCodeSequence = Sequence(codes)


def _write_pixels(made: Dataset, dataset: Dataset) -> None:
    try:
        pixels = np.ascontiguousarray(pixel_array(dataset))
    except keep.UNDECODABLE as problem:
        raise IngestError(
            "the image's pixels cannot be decoded", code="corrupt", hint="export the image again"
        ) from problem
    made.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    made["PixelData"].VR = "OW"


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword  # the keep-list's own test proves that all are keywords
    return tag
