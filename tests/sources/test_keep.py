from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.config import disable_value_validation
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from voxelstem.sources import keep
from voxelstem.sources.keep import FACTS, KEPT, Act, acquisition_of, clean


def header(**values: object) -> Dataset:
    """A CT slice's header, with some values changed."""
    made = Dataset()
    made.Modality = "CT"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = "1.2.3", "1.2.3.1", "1.2.9"
    made.AcquisitionDate, made.AcquisitionTime, made.AcquisitionNumber = "20240131", "101500.25", 2
    made.PatientID, made.PatientName, made.PatientSex = "MRN-4711", "Miller^Anna", "F"
    made.PatientBirthDate, made.PatientAge = "19600505", "063Y"
    made.ConvolutionKernel, made.KVP, made.SeriesDescription = ["Br40d", "3"], 120, "Thorax Miller"
    with disable_value_validation():
        for keyword, value in values.items():
            setattr(made, keyword, value)
    return made


def test_the_list_names_attributes_of_the_standard_and_says_what_happens_to_each():
    assert 55 <= len(KEPT) <= 75
    for keyword, rule in KEPT.items():
        assert tag_for_keyword(keyword) is not None, keyword
        assert (rule.words is not None) == (rule.act is Act.WORDS)
        assert rule.low < rule.high
        if rule.act is Act.NUMBER:
            assert dictionary_VR(keyword) in ("DS", "FD", "IS", "US", "US or SS")
        if rule.fact:
            assert rule.act in (Act.NUMBER, Act.WORDS, Act.HASH)


def test_no_plain_text_and_no_name_is_on_the_list():
    free = {"LT", "ST", "UT", "UC", "PN", "AE", "UR", "SQ", "OB", "UN", "TM"}
    assert {keyword for keyword in KEPT if dictionary_VR(keyword) in free} == {"PatientName", "AcquisitionTime"}
    for keyword in ("SeriesDescription", "StudyDescription", "ProtocolName", "InstitutionName", "OperatorsName"):
        assert keyword not in KEPT


def test_an_acquisition_takes_only_what_the_list_names():
    told = acquisition_of(header())
    assert (told.series, told.study) == ("1.2.3.1", "1.2.3")
    assert (told.date, told.age_years, told.sex) == ("2024-01-31", 63.0, "F")
    assert told.facts == {"ConvolutionKernel": "Br40d\\3", "KVP": "120"}
    assert "Miller" not in repr(told)
    assert "4711" not in repr(told)


@pytest.mark.parametrize("uid", ["IrradiationEventUID", "AcquisitionUID", None])
def test_kernels_of_one_acquisition_are_linked_and_other_phases_are_not(uid):
    def of(event: str, **values: object) -> str:
        named = {uid: f"1.2.7.{event}"} if uid else {"AcquisitionNumber": event}
        return acquisition_of(header(**named, **values)).group

    lung = of("1", SeriesInstanceUID="1.2.3.1", ConvolutionKernel="Bl57d", SliceThickness=1, AcquisitionTime="101500.1")
    soft = of("1", SeriesInstanceUID="1.2.3.2", ConvolutionKernel="Br40d", SliceThickness=5, AcquisitionTime="101512.9")
    assert lung == soft != ""
    assert of("2", AcquisitionTime="101530") != soft
    assert of("1", StudyInstanceUID="1.2.4") != soft
    assert of("1", FrameOfReferenceUID="1.2.10") != soft


def test_without_event_or_number_phases_are_told_by_the_minute():
    def of(time: str, **values: object) -> str:
        return acquisition_of(header(AcquisitionNumber=None, AcquisitionTime=time, **values)).group

    assert of("101502") == of("101559.5") != of("101602")
    assert of("101502", Modality="MR") != of("101559.5", Modality="MR")
    assert of("") == ""


@pytest.mark.parametrize("time", [None, "", "000000", "000000.00", "00:00:00"])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_number_without_a_time_links_nothing(time):
    """Programs that de-identify take times away, and then T1 and T2 of a study are all number 1."""

    def of(**values: object) -> str:
        return acquisition_of(header(Modality="MR", AcquisitionNumber=1, AcquisitionTime=time, **values)).group

    assert of(EchoTime=10) == of(EchoTime=90) == ""
    assert of(AcquisitionDateTime="20240131000000.000000") == ""
    assert of(AcquisitionDateTime="20240131101500.000000") != ""
    assert of(AcquisitionUID="1.2.7") == of(AcquisitionUID="1.2.7", EchoTime=90) != ""


def test_an_enhanced_image_tells_from_its_frames():
    kernel, frame, shared, one, image = Dataset(), Dataset(), Dataset(), Dataset(), header()
    del image.ConvolutionKernel, image.AcquisitionNumber
    kernel.ConvolutionKernel = "B30f"
    shared.CTReconstructionSequence = Sequence([kernel])
    frame.FrameAcquisitionNumber = 7
    one.FrameContentSequence = Sequence([frame])
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    image.PerFrameFunctionalGroupsSequence = Sequence([one])
    told = acquisition_of(image)
    assert told.facts["ConvolutionKernel"] == "B30f"
    assert told.group == acquisition_of(header(AcquisitionNumber=7)).group


@pytest.mark.parametrize(
    ("age", "years"),
    [("063Y", 63.0), ("006M", 0.5), ("000Y", None), ("999Y", None), ("old", None), ("104Y", 104.0), ("010D", 0.03)],
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_ages_are_years(age, years):
    assert acquisition_of(header(PatientAge=age, PatientBirthDate="")).age_years == years


@pytest.mark.parametrize(
    ("born", "years"),
    [("19600505", 63.0), ("20240131", None), ("20250101", None), ("18991231", None), ("May 60", None)],
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_without_an_age_the_date_of_birth_tells_it_and_goes_no_further(born, years):
    told = acquisition_of(header(PatientAge="", PatientBirthDate=born))
    assert told.age_years == years
    assert born not in repr(told)


@pytest.mark.parametrize(
    ("modality", "agent", "weighting", "contrast"),
    [
        ("CT", "ISOVUE 300 Miller", "", "enhanced"),
        ("CT", "", "", ""),
        ("MR", "Gadovist", "FLUID_ATTENUATED", "FLAIR"),
        ("MR", "", "T1", "T1w"),
        ("MR", "", "MILLER", ""),
    ],
)
def test_contrast_is_one_harmless_word(modality, agent, weighting, contrast):
    told = acquisition_of(header(Modality=modality, ContrastBolusAgent=agent, AcquisitionContrast=weighting))
    assert told.contrast == contrast
    assert "Miller" not in repr(told)


@pytest.mark.parametrize(
    ("keyword", "text", "kept"),
    [
        ("KVP", "120.0", "120"),
        ("Manufacturer", " GE \n MEDICAL ", "GE MEDICAL"),
        ("Manufacturer", "+GE", "GE"),
        ("ImageType", "", ""),
        ("KVP", "1e9", ""),
        ("KVP", "nan", ""),
        ("KVP", "inf", ""),
        ("KVP", "Miller", ""),
        ("SliceThickness", "0.625", "0.625"),
        ("ImageType", "ORIGINAL\\PRIMARY\\MILLER", "ORIGINAL\\PRIMARY\\OTHER"),
        ("ConvolutionKernel", "Br40d\\Miller", ""),
        ("ConvolutionKernel", "19 50 01 31", ""),
        ("ConvolutionKernel", "19\\50\\01\\31", ""),
        ("ConvolutionKernel", "B30f\\19-50", ""),
        ("ManufacturerModelName", "Drive 12 345 678", ""),
        ("ManufacturerModelName", "Brilliance 64", "Brilliance 64"),
        ("ImageType", "ORIGINAL\\1\\2", "ORIGINAL\\OTHER\\OTHER"),
        ("ConvolutionKernel", "\\".join(["B30f"] * 99), ""),
        ("Manufacturer", "SIEMENS\0Miller", ""),
        ("PatientID", "4711", ""),
        ("SeriesDescription", "CHEST", ""),
        ("NoSuchKeyword", "CHEST", ""),
    ],
)
def test_a_value_goes_on_whole_or_not_at_all(keyword, text, kept):
    assert clean(keyword, text) == kept


@given(st.sampled_from(FACTS), st.text(max_size=40))
def test_cleaning_twice_is_cleaning_once(keyword, text):
    once = clean(keyword, text)
    assert clean(keyword, once) == once


@given(st.sampled_from(FACTS), st.text(alphabet="qzjw^='<", min_size=2, max_size=12))
def test_unknown_words_never_go_on(keyword, text):
    assert text not in clean(keyword, text)


@given(
    st.sampled_from(sorted(KEPT)), st.binary(max_size=40), st.sampled_from(["DS", "US", "LO", "UI", "SQ", "OB", "FD"])
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_damaged_values_count_as_absent(keyword, value, kind):
    damaged = header()
    tag = Tag(tag_for_keyword(keyword) or 0)
    damaged._dict[tag] = RawDataElement(tag, kind, len(value), value, 0, False, True)
    told = acquisition_of(damaged)
    assert max(len(text) for text in (told.series, told.study, told.group, *told.facts.values())) <= 64


@pytest.mark.filterwarnings("ignore:The value length")
def test_ids_of_any_length_stay_apart_and_short():
    with_long = [acquisition_of(header(SeriesInstanceUID="9" * 65_536 + end)) for end in "12"]
    assert with_long[0].series != with_long[1].series
    assert replace(with_long[0], series="") == replace(with_long[1], series="")
    assert len(with_long[0].series) == 64


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("20240131", "2024-01-31"),
        ("2024-01-31", "2024-01-31"),
        ("2024.01.31", "2024-01-31"),
        ("2024-01-31T10:15:00", "2024-01-31"),
        ("2024-0131", None),
        ("20240231", None),
        ("00010101", None),
        ("19000101", None),
        ("", None),
        ("Miller", None),
    ],
)
def test_days_are_read_as_dicom_and_iso_write_them(text, day):
    found = keep.parse_day(text)
    assert (found and found.isoformat()) == day


def test_only_the_standards_own_uids_are_standard():
    assert keep.is_standard_uid("1.2.840.10008.5.1.4.1.1.2")
    assert not keep.is_standard_uid("1.2.840.10008.5.1.4.1.1.2.4711")
    assert not keep.is_standard_uid("1.2.3")


def test_a_value_of_bytes_that_do_not_decode_is_no_value():
    damaged = header()
    damaged._dict[Tag("Rows")] = RawDataElement(Tag("Rows"), "US", 3, struct.pack("<HB", 1, 2), 0, False, True)
    assert keep.text_of(damaged, "Rows") == ""
