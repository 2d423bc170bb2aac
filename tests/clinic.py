"""Made-up CT series as an archive sends them, with a made-up patient, and findings to send back."""

from __future__ import annotations

import copy
import shutil
import subprocess
from itertools import count

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from voxelstem.findings import Certainty, Finding, Findings, Looked, Novelty, Place, Quantity, Unsaid, Weights
from voxelstem.outputs.result import Mask, Result
from voxelstem.sources import dicom
from voxelstem.study import LabelMap

SECRETS = ("Roe", "Jane", "MRN-4711", "19420317", "ACC-0815", "Referrer", "Lane Clinic")
"""What of the patient must turn up in the DICOM objects, and nowhere else."""
SHAPE = (5, 6, 7)
"""Columns, rows, slices: all different, so that no two axes can be mistaken for one another."""

ANGLE = np.deg2rad(20.0)
PLANES = {
    "axial": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
    "sagittal": ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
    "coronal": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
    "prone": ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)),
    "oblique": ((1.0, 0.0, 0.0), (0.0, float(np.cos(ANGLE)), float(np.sin(ANGLE)))),
    "twice oblique": (
        (float(np.cos(ANGLE)), float(np.sin(ANGLE)), 0.0),
        (float(-np.sin(ANGLE) * np.cos(ANGLE)), float(np.cos(ANGLE) ** 2), float(np.sin(ANGLE))),
    ),
}
"""Along a row and along a column, in DICOM's LPS."""
WEIGHTS = Weights(sha256="ab" * 32, name="maker/tiny-ct", licence="Apache-2.0")


def patient(one):
    """Write the made-up patient and study into a dataset."""
    one.PatientName, one.PatientID = "Roe^Jane", "MRN-4711"
    one.PatientBirthDate, one.PatientSex, one.AccessionNumber = "19420317", "F", "ACC-0815"
    one.ReferringPhysicianName, one.StudyID = "Referrer^Rita", "17"
    one.StudyDate, one.StudyTime, one.InstitutionName = "20240229", "101112", "Lane Clinic"
    one.StudyDescription = "CT for Jane Roe"
    return one


def series(plane="axial", *, step_mm=2.5, backwards=False, modality="CT", seed=0):
    """Datasets of one series with pixels of 0.8 x 0.6 mm (row, column), in shuffled order.

    `backwards` numbers the slices against the normal, as half of all scanners do.
    """
    axes = PLANES[plane] if isinstance(plane, str) else plane
    columns, rows, slices = SHAPE
    shared = patient(Dataset())
    shared.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    shared.StudyInstanceUID, shared.SeriesInstanceUID, shared.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    shared.Modality, shared.ImageType, shared.SeriesNumber = modality, ["ORIGINAL", "PRIMARY", "AXIAL"], 3
    shared.PositionReferenceIndicator = ""
    shared.Rows, shared.Columns, shared.SamplesPerPixel = rows, columns, 1
    shared.PhotometricInterpretation = "MONOCHROME2"
    shared.BitsAllocated, shared.BitsStored, shared.HighBit, shared.PixelRepresentation = 16, 16, 15, 1
    shared.RescaleSlope, shared.RescaleIntercept, shared.SliceThickness = 1, -1000, step_mm
    shared.PixelSpacing = [0.8, 0.6]
    shared.ImageOrientationPatient = [f"{number:.9f}" for axis in axes for number in axis]
    rng = np.random.default_rng(seed)
    made = []
    for index in range(slices):
        one = copy.deepcopy(shared)  # `update` would share the elements, and a change of one would change all
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
        one.InstanceNumber = slices - index if backwards else index + 1
        height = -step_mm * index if backwards else step_mm * index
        place = np.array([-10.0, -20.0, 30.0]) + np.cross(*axes) * height
        one.ImagePositionPatient = [f"{number:.6f}" for number in place]
        one.PixelData = rng.integers(0, 2000, (rows, columns), dtype=np.int16).tobytes()
        made.append(one)
    return [made[index] for index in rng.permutation(slices)]


def enhanced(plane="axial"):
    """One multi-frame CT of the same slices, its frames in shuffled order."""
    single = series(plane)
    one = copy.deepcopy(single[0])
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    one.NumberOfFrames = len(single)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(one, keyword)
    del one.RescaleSlope, one.RescaleIntercept
    shared, rescale, measures, plane_item = Dataset(), Dataset(), Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1000, "HU"
    measures.PixelSpacing, measures.SliceThickness = [0.8, 0.6], 2.5
    plane_item.ImageOrientationPatient = single[0].ImageOrientationPatient
    shared.PixelValueTransformationSequence = Sequence([rescale])
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([plane_item])
    one.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for each in single:
        groups, position = Dataset(), Dataset()
        position.ImagePositionPatient = each.ImagePositionPatient
        groups.PlanePositionSequence = Sequence([position])
        frames.append(groups)
    one.PerFrameFunctionalGroupsSequence = Sequence(frames)
    one.PixelData = b"".join(each.PixelData for each in single)
    return [one]


def numbered_uids():
    """UIDs that count, for tests."""
    numbers = count(1)
    return lambda: f"2.25.{next(numbers)}"


def labels(shape, seed=0, classes=None):
    """A label map of noise: no two of its slices are alike, so that none can be mistaken for another."""
    classes = classes or {1: "liver", 3: "kidney_left", 4: "liver_lesion"}
    array = np.random.default_rng(seed).choice([0, *classes], size=shape).astype(np.int16)
    return LabelMap(array=array, classes=classes)


def findings(**changes):
    """Two findings of one made-up study."""
    sure = Certainty(
        probability=0.8,
        low=0.7,
        high=0.9,
        calibration="temperature",
        interval="venn_abers",
        conformal=("yes",),
        level=0.9,
    )
    told = (
        Finding(
            name="pleural effusion",
            kind="present",
            weights=WEIGHTS,
            certainty=sure,
            novelty=Novelty(flagged=True, score=3.5, p=0.01),
        ),
        Finding(
            name="liver",
            kind="segment",
            weights=WEIGHTS,
            place=Place(
                centre_ras_mm=(1.0, 2.0, 3.0), low_ras_mm=(0.0, 0.0, 0.0), high_ras_mm=(2.0, 4.0, 6.0), volume_mm3=48.25
            ),
            quantity=Quantity(value=0.04825, unit="mL", low=0.03, high=0.08, level=0.9),
        ),
    )
    settings = {
        "study": "a1b2c3",
        "looked": (Looked(series="d4e5f6", modality="CT", spacing_mm=(0.6, 0.8, 2.5), coverage=1.0),),
        "weights": (WEIGHTS,),
        "version": "1.2.3",
        "findings": told,
        "unsaid": (Unsaid(what="spleen", why="it lies outside the scan"),),
    }
    return Findings(**(settings | changes))


def result(volume, sources, *, mask=None, **changes):
    """Everything an output is given: a label map on the grid of a volume that was read from `sources`."""
    found = mask or labels(volume.array.shape[1:])
    return Result(
        **(
            {
                "findings": findings(),
                "mask": Mask(labels=found, affine_ras=volume.affine_ras, weights=WEIGHTS),
                "sources": tuple(sources),
                "new_uid": numbered_uids(),
            }
            | changes
        )
    )


def save(folder, datasets):
    """Write the images as an archive would, under names that say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, one in enumerate(datasets):
        one.save_as(folder / f"IM{index:04d}", enforce_file_format=True)
    return folder


def read(folder, datasets):
    """The volume that our own reader makes of the images."""
    return dicom.read(save(folder, datasets), subject="s").volumes[0]


def given_back(tmp_path, output, datasets, **changes):
    """Read the images, find something on them, write it; the volume, the result and what was written."""
    from voxelstem.outputs import OUTPUTS

    volume = read(tmp_path / "in", datasets)
    found = result(volume, datasets, **changes)
    return volume, found, OUTPUTS[output](found, tmp_path / "out")


def complaints(path):
    """What `dciodvfy` has against a file. That it does not know our private scheme is no complaint."""
    program = shutil.which("dciodvfy")
    if program is None:
        pytest.skip("dciodvfy is not installed (Debian: dicom3tools)")
    told = subprocess.run([program, "-new", str(path)], capture_output=True, text=True, check=False)
    lines = [line for line in (told.stdout + told.stderr).splitlines() if line.startswith(("Error", "Warning"))]
    assert "Segmentation" in told.stderr + told.stdout or "Comprehensive3DSR" in told.stderr + told.stdout
    return [line for line in lines if not line.endswith("Unrecognized defined term = <99VOXELSTEM>")]
