from __future__ import annotations

import numpy as np
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from voxelstem.errors import IngestError
from voxelstem.sources import dicom

COUNT, ROWS, COLUMNS = 4, 5, 6


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


def voxels():
    return np.arange(COUNT * ROWS * COLUMNS, dtype=np.int16).reshape(COUNT, ROWS, COLUMNS)


def item(**values):
    one = Dataset()
    for keyword, value in values.items():
        setattr(one, keyword, value)
    return one


def enhanced(modality="CT", *, shared_rescale=True):
    """A true enhanced image: frames from the top down, 0.8 x 0.6 mm, 2.5 mm apart."""
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    sop = uid.EnhancedCTImageStorage if modality == "CT" else uid.EnhancedMRImageStorage
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = sop
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = uid.generate_uid()
    one.SeriesInstanceUID, one.PatientID, one.Modality = uid.generate_uid(), "p", modality
    one.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    one.Rows, one.Columns, one.NumberOfFrames, one.SamplesPerPixel = ROWS, COLUMNS, COUNT, 1
    one.PhotometricInterpretation = "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[item(PixelSpacing=[0.8, 0.6], SliceThickness=99)],
    )
    if shared_rescale:
        shared.PixelValueTransformationSequence = [
            item(RescaleSlope=2, RescaleIntercept=-1000, RescaleType="HU" if modality == "CT" else "US")
        ]
    one.SharedFunctionalGroupsSequence = [shared]
    one.PerFrameFunctionalGroupsSequence = [
        item(
            FrameContentSequence=[item(StackID="1", InStackPositionNumber=index + 1, TemporalPositionIndex=1)],
            PlanePositionSequence=[item(ImagePositionPatient=[-10, -20, 30 - 2.5 * index])],
        )
        for index in range(COUNT)
    ]
    one.PixelData = voxels().tobytes()
    return one


def read(tmp_path, one):
    one.save_as(tmp_path / "1.dcm", enforce_file_format=True)
    return dicom.read(tmp_path / "1.dcm", subject="s").volumes[0]


def expected(values):
    """Frames (slice from the top, row, column) as RAS+."""
    return values[::-1].transpose(2, 1, 0)[::-1, ::-1].astype(np.float32)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_true_enhanced_image_is_read_by_its_functional_groups(tmp_path, modality):
    volume = read(tmp_path, enhanced(modality))
    np.testing.assert_array_equal(volume.array[0], expected(voxels().astype(int) * 2 - 1000))
    np.testing.assert_allclose(volume.spacing_mm, (0.6, 0.8, 2.5))
    np.testing.assert_allclose(volume.affine_ras[:3, 3], [10 - 5 * 0.6, 20 - 4 * 0.8, 22.5])
    assert volume.modality == modality


def test_frames_have_their_own_rescale_and_orientation_where_nothing_is_shared(tmp_path):
    one = enhanced("MR", shared_rescale=False)
    for index, groups in enumerate(one.PerFrameFunctionalGroupsSequence):
        groups.PixelValueTransformationSequence = [item(RescaleSlope=index + 1, RescaleIntercept=index)]
        groups.PlaneOrientationSequence = one.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    del one.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    scale = np.arange(COUNT)[:, None, None]
    np.testing.assert_array_equal(read(tmp_path, one).array[0], expected(voxels().astype(int) * (scale + 1) + scale))


def test_a_classic_series_and_its_enhanced_form_are_the_same_voxels(tmp_path):
    whole = enhanced()
    volume = read(tmp_path, whole)
    (tmp_path / "classic").mkdir()
    for index in range(COUNT):
        one = enhanced()
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = uid.CTImageStorage
        one.SeriesInstanceUID = whole.SeriesInstanceUID
        del one.SharedFunctionalGroupsSequence, one.PerFrameFunctionalGroupsSequence, one.NumberOfFrames
        one.ImageOrientationPatient, one.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.8, 0.6]
        one.ImagePositionPatient = [-10, -20, 30 - 2.5 * index]
        one.RescaleSlope, one.RescaleIntercept = 2, -1000
        one.PixelData = voxels()[index].tobytes()
        one.save_as(tmp_path / "classic" / f"{index}", enforce_file_format=True)
    other = dicom.read(tmp_path / "classic", subject="s").volumes[0]
    np.testing.assert_array_equal(volume.array, other.array)
    np.testing.assert_allclose(volume.affine_ras, other.affine_ras)


def per_frame(index, sequence, **values):
    def apply(one):
        groups = one.PerFrameFunctionalGroupsSequence[index]
        setattr(groups, sequence, [item(**values)])

    return apply


def spoil(**values):
    return lambda one: [setattr(one, keyword, value) for keyword, value in values.items()]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (per_frame(2, "FrameContentSequence", StackID="2", TemporalPositionIndex=1), "several-volumes"),
        (per_frame(2, "FrameContentSequence", StackID="1", TemporalPositionIndex=2), "several-volumes"),
        (per_frame(1, "PlaneOrientationSequence", ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "mixed-orientation"),
        (per_frame(1, "PlanePositionSequence", ImagePositionPatient=[-10, -20, 30]), "duplicate-slices"),
        (per_frame(1, "PixelMeasuresSequence", PixelSpacing=[0.9, 0.6]), "mixed-size"),
        (per_frame(1, "PixelValueTransformationSequence", RescaleSlope=0, RescaleIntercept=0), "corrupt"),
        (per_frame(1, "PixelValueTransformationSequence", RescaleSlope=1), "no-rescale"),
        (
            per_frame(1, "PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=0, RescaleType="Z_EFF"),
            "not-hu",
        ),
        (lambda one: one.PerFrameFunctionalGroupsSequence.pop(), "corrupt"),
        (lambda one: one.pop("PerFrameFunctionalGroupsSequence"), "unsupported"),
        (lambda one: one.PerFrameFunctionalGroupsSequence[0].pop("PlanePositionSequence"), "no-geometry"),
        (spoil(ModalityLUTSequence=[item(LUTExplanation="x")]), "unsupported"),
    ],
)
def test_each_fault_of_a_multi_frame_file_has_its_code(tmp_path, change, code):
    one = enhanced()
    change(one)
    with refused(code):
        read(tmp_path, one)
