from __future__ import annotations

import io
import random
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pydicom
import pytest
from pydicom.config import disable_value_validation
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, RLELossless

from voxelstem.deidentify import deidentify, deidentify_dataset
from voxelstem.errors import IngestError
from voxelstem.sources.keep import KEPT, acquisition_of
from voxelstem.store.subjects import PSEUDONYM, pseudonym, shift_days
from voxelstem.study import Acquisition, LabelMap, Provenance, Report, Study, Volume

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # of values that are wrong on purpose

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
PREAMBLE = b"PLANTEDPREAMBLE/Miller^Anna/19600505".ljust(128, b"!")


def study(acquisition: Acquisition, *, subject: str = "MRN-4711", notes: tuple[str, ...] = ()) -> Study:
    provenance = Provenance(source_format="dicom", sha256="0" * 64, orientation="LPS", notes=notes)
    volume = Volume(
        array=np.zeros((1, 3, 3, 3), np.float32),
        affine_ras=np.eye(4),
        modality="CT",
        provenance=provenance,
        acquisition=acquisition,
        labels=LabelMap(array=np.zeros((3, 3, 3), np.int16), classes={1: "liver"}),
    )
    return Study(subject=subject, volumes=(volume,), report=Report(findings_text="Clear."), labels={"contrast": "yes"})


def behind(acquisition: Acquisition, *, subject: str = "MRN-4711", key: bytes = KEY) -> Acquisition:
    """An acquisition behind the door."""
    return deidentify(study(acquisition, subject=subject), key).volumes[0].acquisition


def picture(**values: object) -> FileDataset:
    """A CT slice of 4 x 6 pixels, with some header values changed."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3.1.1"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset(io.BytesIO(), {}, file_meta=meta, preamble=PREAMBLE)
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = CTImageStorage, "1.2.3.1.1", "CT"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = "1.2.3", "1.2.3.1", "1.2.9"
    made.PatientID, made.PatientName, made.PatientAge, made.PatientSex = "MRN-4711", "Miller^Anna", "061Y", "F"
    made.StudyDate, made.SeriesDate, made.AcquisitionDate, made.AcquisitionTime = *["20240131"] * 3, "101500"
    made.ImageType, made.Rows, made.Columns = ["ORIGINAL", "PRIMARY", "AXIAL"], 4, 6
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
    made.ImagePositionPatient, made.PixelSpacing = [-158.135803, -179.035797, -75.699997], [0.661468, 0.661468]
    made.ImageOrientationPatient = [1, 0, 0, 0, 0.970295726276, -0.2419218956]
    made.RescaleSlope, made.RescaleIntercept, made.KVP = 1, -1024, 120
    made.PixelData = np.arange(24, dtype="<u2").tobytes()
    with disable_value_validation():
        for keyword, value in values.items():
            setattr(made, keyword, value)
    return made


def written(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset)
    return file.getvalue()


# ------------------------------------------------------------------------------------------- studies


def test_every_id_becomes_a_keyed_hash():
    raw = Acquisition(series="1.2.3.1", study="1.2.3", group="ab" * 32, facts={"DeviceSerialNumber": "60064"})
    made = deidentify(study(raw), KEY)
    told = made.volumes[0].acquisition
    assert made.subject == pseudonym("MRN-4711", KEY)
    hashed = [told.series, told.study, told.group, told.facts["DeviceSerialNumber"]]
    assert all(len(text) == 24 and set(text) <= set("0123456789abcdef") for text in hashed)
    assert told == behind(raw)
    assert not set(hashed) & {*(vars_of := behind(raw, key=OTHER_KEY)).facts.values(), vars_of.series, vars_of.study}


def test_equal_ids_of_another_kind_cannot_be_joined():
    told = behind(Acquisition(series="7", study="7", group="7", session="0007", facts={"DeviceSerialNumber": "7"}))
    texts = [told.series, told.study, told.group, told.session, told.facts["DeviceSerialNumber"]]
    assert len({text[:12] for text in texts}) == len(texts)


def test_what_was_empty_stays_empty():
    assert behind(Acquisition()) == Acquisition()


def test_dates_of_a_person_move_together_and_those_of_others_otherwise():
    days = [behind(Acquisition(date=day)).date for day in ("2024-01-31", "2024-03-01", "2023-12-31")]
    first, later, before = map(date.fromisoformat, days)
    assert (later - first, first - before) == (timedelta(days=30), timedelta(days=31))
    assert 1 <= abs((first - date(2024, 1, 31)).days) <= 365
    others = {behind(Acquisition(date="2024-01-31"), subject=f"MRN-{n}").date for n in range(20)}
    assert len(others) > 15
    assert "2024-01-31" not in others


@pytest.mark.parametrize("text", ["Miller", "2024", "2024-13-01", "0001-01-01", "31.01.2024", "2024-01-31 " + "x" * 70])
def test_what_is_no_day_does_not_pass_as_one(text):
    assert text not in behind(Acquisition(date=text)).date
    assert behind(Acquisition(date=text)).date in ("", behind(Acquisition(date="2024-01-31")).date)


@pytest.mark.parametrize(
    ("years", "kept"),
    [(0.5, 0.5), (89.0, 89.0), (89.5, 90.0), (90.0, 90.0), (104.0, 90.0), (float("nan"), None), (-1.0, None),
     (float("inf"), None), (None, None)],
)  # fmt: skip
def test_everybody_over_89_is_90(years, kept):
    assert behind(Acquisition(age_years=years)).age_years == kept


@pytest.mark.parametrize(("sex", "kept"), [("F", "F"), ("male", "M"), ("O", "O"), ("Miller", ""), ("f; Miller", "")])
def test_sex_is_one_letter(sex, kept):
    assert behind(Acquisition(sex=sex)).sex == kept


@pytest.mark.parametrize("label", ["01", "1", "012", "baseline", "m12", "month06", "Followup2", "pre", "test"])
def test_harmless_session_labels_stay(label):
    assert behind(Acquisition(session=label)).session == label


@pytest.mark.parametrize("label", ["20240131", "2024", "0131", "Miller", "m2024", "4711", "01Miller", "x" * 70_000])
def test_session_labels_that_may_be_a_date_or_an_id_are_hashed(label):
    told = behind(Acquisition(session=label)).session
    assert len(told) == 12
    assert label not in told
    assert told == behind(Acquisition(session=label)).session
    assert told != behind(Acquisition(session=label), subject="another").session


def test_facts_pass_the_keep_list_again():
    raw = {
        "KVP": "120",
        "ConvolutionKernel": "Br40d\\3",
        "Manufacturer": "SIEMENS",
        "ManufacturerModelName": "Miller's scanner",
        "ContrastBolusAgent": "Omnipaque for Miller",
        "PatientName": "Miller^Anna",
        "SeriesDescription": "Miller",
        "StudyInstanceUID": "1.2.3",
        "Miller": "Miller",
        "BodyPartExamined": "CHEST\0Miller",
        "SliceThickness": "=cmd()",
    }
    kept = {"KVP": "120", "ConvolutionKernel": "Br40d\\3", "Manufacturer": "SIEMENS", "ContrastBolusAgent": "enhanced"}
    assert behind(Acquisition(facts=raw)).facts == kept


@pytest.mark.parametrize(("contrast", "kept"), [("T1w", "T1w"), ("portal", "portal"), ("Miller", ""), ("<script>", "")])
def test_contrast_is_a_known_word(contrast, kept):
    assert behind(Acquisition(contrast=contrast)).contrast == kept


def test_notes_lose_what_they_quote_and_keep_what_they_say():
    raw = Acquisition(series="1.2.840.113619.2.55", session="20240131", facts={"ProtocolName": "Thorax Miller"})
    notes = (
        "resampled 3 slices to 2.5 mm; values rounded to 0.000123 HU",
        "series 1.2.840.113619.2.55 of mrn-4711, Thorax Miller, 20240131\nand 987654321",
    )
    kept = deidentify(study(raw, notes=notes), KEY).volumes[0].provenance.notes
    assert kept == (notes[0], "series … of …, …, … and …")


def test_voxels_labels_and_the_report_stay():
    before = study(Acquisition())
    after = deidentify(before, KEY)
    assert replace(after, subject=before.subject, volumes=before.volumes) == before
    assert after.volumes[0].array is before.volumes[0].array
    assert after.volumes[0].labels is before.volumes[0].labels


def test_nobody_has_no_identity_to_take_away():
    with pytest.raises(ValueError, match="empty"):
        deidentify(study(Acquisition(), subject=" "), KEY)


# ------------------------------------------------------------------------------------------- DICOM images


def table() -> list[BaseTag]:
    """Every attribute that dicom-anonymizer removes, replaces or cleans by PS3.15's table of 2026c."""
    anonymizer = pytest.importorskip(
        "dicomanonymizer.simpledicomanonymizer", reason="dicom-anonymizer is not installed"
    )
    rules = anonymizer.initialize_actions("dicomfields_2026c")
    assert anonymizer.keep not in rules.values()
    # The table's groups of curves, overlay data and overlay comments are patterns (tag and mask).
    patterns = {(0x5000, 0x0000): 0x3000, (0x6000, 0x3000): 0x3000, (0x6000, 0x4000): 0x4000}
    found = {Tag(*tag) for tag in rules if len(tag) == 2 and tag[0] > 0}  # group 0 is for messages, not files
    assert {tag[:2] for tag in rules if len(tag) == 4} == set(patterns)
    groups = {Tag(group + step, element) for (group, _), element in patterns.items() for step in (0, 2, 0x1E)}
    return sorted(found | groups)


def kind_of(tag: BaseTag) -> str:
    try:
        return dictionary_VR(tag).split(" or ")[-1]
    except KeyError:
        return "LO"


def planted(number: int, kind: str) -> object:
    """A value that is found again: none is part of another, and none is what a clean header holds."""
    if kind == "SQ":
        item = Dataset()
        item.PatientName, item.ReferencedSOPInstanceUID = f"QN{number:04d}NEST", f"1.77.{number}.5417"
        item.PatientBirthDate = "19010203"
        return Sequence([item])
    texts = {
        "UI": f"1.99.{number}.6317",
        "DA": (date(1902, 1, 5) + timedelta(days=7 * number)).strftime("%Y%m%d"),
        "DT": f"1899{number % 12 + 1:02d}11{number:06d}",
        "TM": f"{number % 24:02d}{number % 60:02d}{number % 59:02d}.{910_000 + number}",
        "AS": "097Y",
        "DS": f"77{number:05d}.5",
        "IS": f"88{number:06d}",
    }
    if kind in ("US", "UL", "SS", "SL", "FL", "FD"):
        return 7_919 + number
    if kind in ("OB", "OW", "UN"):
        return f"QB{number:04d}BYTE".encode()
    return texts.get(kind, f"QT{number:04d}TEXT")


def planted_picture() -> tuple[FileDataset, dict[BaseTag, object]]:
    """A CT slice with a value of its own in every attribute of the table and in every one that is kept."""
    made = picture()
    values: dict[BaseTag, object] = {}
    text_kept = {
        Tag(keyword) for keyword in KEPT if dictionary_VR(keyword) in ("CS", "LO", "SH", "PN", "UI", "DA", "AS")
    }
    needed = {Tag(keyword) for keyword in ("SOPClassUID", "Modality", "PhotometricInterpretation")}
    with disable_value_validation():
        for number, tag in enumerate(sorted({*table(), *text_kept} - needed), start=1):
            kind = kind_of(tag)
            values[tag] = planted(number, kind)
            place = made.file_meta if tag.group == 2 else made
            place[tag] = DataElement(tag, kind, values[tag])
        made.file_meta.SourceApplicationEntityTitle = "QMETATITLE"
        made.file_meta.PrivateInformationCreatorUID, made.file_meta.PrivateInformation = "1.2.5417", b"QMETAPRIVATE"
        block = made.private_block(0x0009, "QPRIVATECREATOR", create=True)
        block.add_new(0x01, "LO", "QPRIVATETEXT")
        made.add(DataElement(Tag(0x6000, 0x0022), "LO", "QOVERLAYNAME"))
    return made, values


def tokens(value: object) -> list[bytes]:
    if isinstance(value, Sequence):
        return [str(element.value).encode() for element in value[0]]
    return [value if isinstance(value, bytes) else str(value).encode()]


def test_nothing_survives_that_the_standards_table_would_remove():
    raw, values = planted_picture()
    assert len(values) > 640
    with disable_value_validation():
        before = written(raw)
        after = written(deidentify_dataset(pydicom.dcmread(io.BytesIO(before)), KEY))
    numbers = {tag: value for tag, value in values.items() if isinstance(value, int)}
    names = {token for tag, value in values.items() if tag not in numbers for token in tokens(value)}
    names |= {b"QMETATITLE", b"QMETAPRIVATE", b"QPRIVATECREATOR", b"QPRIVATETEXT", b"QOVERLAYNAME", b"PLANTEDPREAMBLE"}
    assert {name for name in names if name not in before} == set(), "the test does not plant what it looks for"
    assert shift_days(str(values[Tag("PatientID")]), KEY) % 7, "a shifted day would fall on another planted one"
    assert {name for name in names if name in after} == set()
    read_back = pydicom.dcmread(io.BytesIO(after))
    assert {keyword_for_tag(tag) for tag in numbers if tag in read_back} == set()
    assert {element.keyword for element in read_back if element.tag in values} <= {*KEPT, *made_empty()}


def made_empty() -> set[str]:
    """What must be there and holds nothing."""
    return {"AccessionNumber", "PatientBirthDate", "ReferringPhysicianName", "StudyID", "StudyTime"}


def test_only_named_attributes_remain_and_the_preamble_is_zero():
    raw, _ = planted_picture()
    after = written(deidentify_dataset(raw, KEY))
    read_back = pydicom.dcmread(io.BytesIO(after))
    ours = {"PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence", "PixelData"}
    ours |= {"LongitudinalTemporalInformationModified", "SeriesNumber", *made_empty()}
    assert {element.keyword for element in read_back} <= {*KEPT, *ours}
    assert all(not read_back[keyword].value for keyword in made_empty())
    assert after[:128] == bytes(128)
    assert not any(element.tag.is_private for element in read_back)


def test_age_and_sex_are_the_only_values_of_the_table_that_stay_and_the_image_says_so():
    raw = picture()
    made = deidentify_dataset(raw, KEY)
    same = {
        keyword_for_tag(tag)
        for tag in table()
        if tag in raw and tag in made and raw[tag].value == made[tag].value and made[tag].value
    }
    assert same == {"PatientAge", "PatientSex"}
    codes = {item.CodeValue: item.CodeMeaning for item in made.DeidentificationMethodCodeSequence}
    assert set(codes) == {"113100", "113107", "113108"}
    assert {item.CodingSchemeDesignator for item in made.DeidentificationMethodCodeSequence} == {"DCM"}
    assert made.PatientIdentityRemoved == "YES"
    assert made.LongitudinalTemporalInformationModified == "MODIFIED"


@pytest.mark.parametrize(("age", "kept"), [("089Y", "089Y"), ("090Y", "090Y"), ("104Y", "090Y"), ("999M", "999M")])
def test_ages_over_89_are_capped_in_images_too(age, kept):
    assert deidentify_dataset(picture(PatientAge=age), KEY).PatientAge == kept
    assert "PatientAge" not in deidentify_dataset(picture(PatientAge="old"), KEY)


def test_the_person_is_the_pseudonym_that_stores_use_and_dates_move_alike():
    made = deidentify_dataset(picture(), KEY)
    assert made.PatientID == str(made.PatientName) == pseudonym("MRN-4711", KEY)
    assert PSEUDONYM.fullmatch(made.PatientID)
    moved = behind(acquisition_of(picture())).date.replace("-", "")
    assert made.StudyDate == made.SeriesDate == made.AcquisitionDate == moved != "20240131"
    nameless = deidentify_dataset(picture(PatientID=""), KEY)
    assert nameless.PatientID == pseudonym("1.2.3", KEY)
    with pytest.raises(IngestError) as refused:
        deidentify_dataset(picture(PatientID="", StudyInstanceUID=""), KEY)
    assert refused.value.code == "no-subject"


def test_equal_uids_stay_equal_and_different_ones_different():
    one = deidentify_dataset(picture(), KEY)
    two = deidentify_dataset(picture(SOPInstanceUID="1.2.3.1.2", IrradiationEventUID=["1.2.3", "1.2.8"]), KEY)
    assert one.StudyInstanceUID == two.StudyInstanceUID == two.IrradiationEventUID[0]
    assert one.FrameOfReferenceUID == two.FrameOfReferenceUID != one.SeriesInstanceUID
    assert one.SOPInstanceUID != two.SOPInstanceUID == two.file_meta.MediaStorageSOPInstanceUID
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in (one.StudyInstanceUID, two.SOPInstanceUID))
    assert deidentify_dataset(picture(), OTHER_KEY).StudyInstanceUID != one.StudyInstanceUID


def test_the_image_and_its_place_are_the_same():
    raw = picture()
    made = pydicom.dcmread(io.BytesIO(written(deidentify_dataset(raw, KEY))))
    assert np.array_equal(made.pixel_array, raw.pixel_array)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleIntercept", "Rows"):
        assert made[keyword].value == raw[keyword].value, keyword


def test_compressed_images_are_written_plainly_so_that_their_comments_do_not_come_along():
    raw = picture()
    expected = raw.pixel_array.copy()
    raw.compress(RLELossless)
    raw.PixelData += b"\xfe\xff\x00\xe0\x0c\x00\x00\x00QCOMMENTDATA"
    made = deidentify_dataset(raw, KEY)
    assert made.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert np.array_equal(made.pixel_array, expected)
    assert b"QCOMMENTDATA" not in written(made)


def test_bits_that_the_image_does_not_use_and_bytes_behind_it_do_not_come_along():
    hidden = np.arange(24, dtype="<u2") | 0xA000  # an old place for overlays: the bits above HighBit
    raw = picture(PixelData=hidden.tobytes() + b"QTRAILINGQ")
    made = deidentify_dataset(raw, KEY)
    assert np.array_equal(made.pixel_array.ravel(), np.arange(24))
    assert len(made.PixelData) == 48


def test_padding_of_signed_pixels_written_as_unsigned_keeps_its_bits():
    signed = picture(PixelRepresentation=1)
    signed.add(DataElement(Tag("PixelPaddingValue"), "US", 63_536))
    made = pydicom.dcmread(io.BytesIO(written(deidentify_dataset(signed, KEY))))
    assert int(made.PixelPaddingValue) % 65_536 == 63_536


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"BurnedInAnnotation": "YES"}, "burned-in"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "burned-in"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}, "burned-in"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, "burned-in"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "SCREEN SAVE"]}, "burned-in"),
        ({"ConversionType": "WSD"}, "burned-in"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.67"}, "unsupported"),
        ({"SOPClassUID": ""}, "unsupported"),
        ({"SamplesPerPixel": 3}, "unsupported"),
        ({"PixelData": b"\0" * 10}, "corrupt"),
    ],
)
def test_pictures_that_may_show_a_name_are_refused(values, code):
    with pytest.raises(IngestError) as refused:
        deidentify_dataset(picture(**values), KEY)
    assert refused.value.code == code
    assert "Miller" not in str(refused.value)
    assert "4711" not in str(refused.value)


def enhanced() -> FileDataset:
    """Two frames with a name in their groups."""
    made = picture(SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=2)
    made.PixelData = np.arange(48, dtype="<u2").tobytes()
    measures, shared, described = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness, measures.FrameComments = [0.5, 0.5], 2, "Miller"
    described.FrameComments = "Miller"
    shared.PixelMeasuresSequence, shared.FrameContentSequence = Sequence([measures]), Sequence([described])
    shared.PatientName = "Miller^Anna"
    made.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for height in (0.0, 2.0):
        place, frame = Dataset(), Dataset()
        place.ImagePositionPatient, place.PatientComments = [0, 0, height], "Miller"
        frame.PlanePositionSequence, frame.ReferencedImageSequence = Sequence([place]), Sequence([described])
        frames.append(frame)
    made.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return made


def test_of_enhanced_images_only_places_and_measures_of_frames_stay():
    made = pydicom.dcmread(io.BytesIO(written(deidentify_dataset(enhanced(), KEY))))
    (shared,) = made.SharedFunctionalGroupsSequence
    assert [element.keyword for element in shared] == ["PixelMeasuresSequence"]
    assert {element.keyword for element in shared.PixelMeasuresSequence[0]} == {"PixelSpacing", "SliceThickness"}
    heights = [f.PlanePositionSequence[0].ImagePositionPatient[2] for f in made.PerFrameFunctionalGroupsSequence]
    assert heights == [0.0, 2.0]
    assert {element.keyword for element in made.PerFrameFunctionalGroupsSequence[0]} == {"PlanePositionSequence"}
    assert made.pixel_array.shape == (2, 4, 6)
    assert b"Miller" not in written(made)


def test_hostile_header_texts_do_not_come_along():
    long = "A" * 65_536
    hostile = picture(
        StudyInstanceUID="../../etc/passwd",
        SeriesInstanceUID=long,
        PatientName="<script>alert(1)</script>",
        PatientID="=cmd()|' /C calc'!A0",
        Manufacturer="GE\0<script>",
        ConvolutionKernel="../../x",
        ImageType=["ORIGINAL", "PRIMARY", "../../x"],
    )
    after = written(deidentify_dataset(hostile, KEY))
    assert not [word for word in (b"..", b"<script", b"cmd", b"passwd", b"AAAA") if word in after]
    assert len(after) < 3_000


def test_random_headers_never_survive_by_value():
    rng = random.Random(7)
    for _ in range(30):
        names = rng.sample([keyword for keyword in KEPT if dictionary_VR(keyword) in ("LO", "SH", "CS", "PN", "UI")], 6)
        word = "".join(rng.choices("QXZJVKW", k=9))
        values = {name: word for name in names if name not in ("SOPClassUID", "PhotometricInterpretation")}
        assert word.encode() not in written(deidentify_dataset(picture(**values), KEY))
