"""DICOM files that are damaged or made to do harm: refused or harmless, within bounded memory, and never the end."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections import Counter

import gdcm
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)
from scipy import ndimage

from voxelstem.errors import IngestError
from voxelstem.sources import dicom

SHAPE = (6, 5, 4)
DEFLATED = (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)
POSITION_BYTES = len("-10.000000\\-20.000000\\30.000000")
PIXELS, POSITION = b"\xe0\x7f\x10\0", b"\x20\0\x32\0DS"
MOVED_MM = 0.1 * 3**0.5
"""How far a flip may move a volume unseen: scanners round each coordinate to 0.1 mm at the coarsest."""


def picture(index, plane, series="1.2.3"):
    """One slice of a CT, with pixels of 0.8 x 0.6 mm and 2.5 mm between slices."""
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = CTImageStorage
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
    one.SeriesInstanceUID, one.PatientID, one.Modality = series, "Doe^Jane", "CT"
    one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    one.Rows, one.Columns = plane.shape
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
    one.RescaleSlope, one.RescaleIntercept, one.PixelSpacing = 1, -1024, [0.8, 0.6]
    one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    one.ImagePositionPatient = [f"{number:.6f}" for number in (-10, -20, 30 + 2.5 * index)]
    one.PixelData = plane.astype(np.int16).tobytes()
    return one


def save(folder, values, **more):
    """Write a series of (slice, row, column); `more` overrides what every header says."""
    folder.mkdir(exist_ok=True)
    for index, plane in enumerate(values):
        one = picture(index, plane)
        for keyword, value in more.items():
            setattr(one, keyword, value)
        one.save_as(folder / f"{index:03d}.dcm", enforce_file_format=True)
    return folder


def moved_mm(volume, truth):
    """How far the corner that is moved most lies from where it was."""
    corners = np.array([[*at, 1.0] for at in np.ndindex(2, 2, 2)]) * [*truth.shape_ijk, 1]
    return float(np.abs((volume.affine_ras - truth.affine_ras) @ corners.T).max())


def flip_and_cut(folder, count):
    """Damage one slice of a series at a time; count what came of it, by the bytes that nothing can check."""
    truth = dicom.read(folder, subject="s").volumes[0]
    files = sorted(folder.iterdir())
    rng = np.random.default_rng(0)
    came: Counter[str] = Counter()
    for _ in range(count):
        victim = files[int(rng.integers(len(files)))]
        whole = victim.read_bytes()
        at = int(rng.integers(len(whole)))
        cut = rng.random() < 0.3
        victim.write_bytes(whole[:at] if cut else flipped(whole, at, int(rng.integers(8))))
        try:
            volume = dicom.read(folder, subject="s").volumes[0]
        except IngestError:
            came["refused"] += 1
        else:
            same = np.array_equal(volume.array, truth.array)
            still = volume.shape_ijk == truth.shape_ijk and np.abs(volume.affine_ras - truth.affine_ras).max() < 1e-6
            place = whole.index(POSITION) + 8 <= at < whole.index(POSITION) + 8 + POSITION_BYTES
            pixels = at >= whole.index(PIXELS) + 12
            what = "harmless" if same and still else "silent: pixels" if pixels and still else "silent"
            if place and same and moved_mm(volume, truth) <= MOVED_MM and not still:
                what = "silent: place, within the tolerance"
            assert what != "silent", f"a flip at byte {at} changed the volume, after {dict(came)}"
            assert not cut, f"a cut at byte {at} was not seen"
            came[what] += 1
        victim.write_bytes(whole)
    return came


def flipped(data, at, bit):
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


@pytest.mark.parametrize("count", [80, pytest.param(1000, marks=pytest.mark.slow)])
def test_flips_and_cuts_of_plain_files_are_refused_or_harmless_but_in_plain_values(tmp_path, count):
    # Plain DICOM has no checksum: a stored value that stays possible is beyond detection, and nothing else is.
    came = flip_and_cut(save(tmp_path / "a", np.arange(120).reshape(SHAPE)), count)
    assert sum(came.values()) == count
    assert came["refused"] > 0.4 * count, dict(came)
    assert came["silent: pixels"] < 0.1 * count, dict(came)
    assert came["silent: place, within the tolerance"] < 0.02 * count, dict(came)
    print(dict(came))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"RescaleSlope": 3}, "mixed-pixels"),
        ({"RescaleIntercept": -1000}, "mixed-pixels"),
        ({"PixelSpacing": [0.8, 0.4]}, "mixed-size"),
        ({"PixelSpacing": [0.8, 0.603]}, None),
        ({"ImageOrientationPatient": [1, 0.0008, 0, 0, 1, 0]}, None),
        ({"ImageOrientationPatient": [1, 0.008, 0, 0, 1, 0]}, "mixed-orientation"),
        ({"ImagePositionPatient": [-10, -20, 30.3]}, "slice-gaps"),
        ({"ImagePositionPatient": [-10, -20.3, 30]}, "tilt"),
    ],
)
@pytest.mark.parametrize("which", [0, 3])
def test_what_one_slice_says_against_all_others_is_refused_or_moves_nothing(tmp_path, change, code, which):
    folder = save(tmp_path / "a", np.arange(120).reshape(SHAPE))
    truth = dicom.read(folder, subject="s").volumes[0]
    one = picture(which, np.arange(120).reshape(SHAPE)[which])
    for keyword, value in change.items():
        moved = np.array([0, 0, 2.5 * which]) if keyword == "ImagePositionPatient" else 0
        setattr(one, keyword, list(np.array(value) + moved) if isinstance(value, list) else value)
    one.save_as(folder / f"{which:03d}.dcm", enforce_file_format=True)
    if code is None:
        volume = dicom.read(folder, subject="s").volumes[0]
        np.testing.assert_array_equal(volume.affine_ras, truth.affine_ras)
        np.testing.assert_array_equal(volume.array, truth.array)
    else:
        with pytest.raises(IngestError) as caught:
            dicom.read(folder, subject="s")
        assert caught.value.code == code


def test_a_rescale_of_each_slice_is_no_damage(tmp_path):
    folder = save(tmp_path / "a", np.arange(120).reshape(SHAPE))
    for index, plane in enumerate(np.arange(120).reshape(SHAPE)):
        one = picture(index, plane)
        one.RescaleSlope = 1 + index
        one.save_as(folder / f"{index:03d}.dcm", enforce_file_format=True)
    assert dicom.read(folder, subject="s").volumes[0].array.max() == 6 * 119 - 1024


CODECS = {
    "rle": gdcm.TransferSyntax.RLELossless,
    "jpeg": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "jpeg-ls": gdcm.TransferSyntax.JPEGLSLossless,
    "jpeg-2000": gdcm.TransferSyntax.JPEG2000Lossless,
}
FLIPS = """
import json, sys
import numpy as np
from voxelstem.errors import IngestError
from voxelstem.sources.header import open_picture
from voxelstem.sources.pixels import layout, planes

def grown():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def unpack(data):
    picture = open_picture(data, name="image 1")
    return np.stack(list(planes(picture, layout(picture))))

whole, count = open(sys.argv[1], "rb").read(), int(sys.argv[2])
truth, start, before = unpack(whole), open_picture(whole, name="image 1").start, grown()
came = {"refused": 0, "harmless": 0, "silent": 0}
rng = np.random.default_rng(0)
head = [(at, bit) for at in range(start, start + 140) for bit in range(8)]
for at, bit in head + [(int(rng.integers(start, len(whole))), int(rng.integers(8))) for _ in range(count)]:
    try:
        found = unpack(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
    except IngestError:
        came["refused"] += 1
    else:
        came["harmless" if np.array_equal(found, truth) else "silent"] += 1
print(json.dumps([came, (grown() - before) / 1024]))
"""


def packed(folder, syntax):
    """A smooth picture in noise, packed by GDCM."""
    noise = np.random.default_rng(0).normal(0, 3000, (64, 48))
    picture(0, ndimage.gaussian_filter(noise, 2) + 1024).save_as(folder / "plain.dcm", enforce_file_format=True)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(folder / "plain.dcm"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(folder / "packed.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return folder / "packed.dcm"


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("codec", CODECS)
def test_flips_in_packed_pixels_never_end_the_process_or_fill_its_memory(tmp_path, codec, count):
    # These codecs have no checksum, so many flips give other values and no error; none may do more.
    # Every bit of the codestream's first bytes, where its sizes, widths and tables stand, and others anywhere.
    run = subprocess.run(
        [sys.executable, "-c", FLIPS, str(packed(tmp_path, CODECS[codec])), str(count)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-500:]
    came, grown_mib = json.loads(run.stdout)
    print(codec, came, f"{grown_mib:.0f} MiB")
    assert sum(came.values()) == 140 * 8 + count
    assert came["refused"] > 0
    assert grown_mib < 64


MEASURE = """
import sys
from pathlib import Path
from voxelstem.intake import Intake, Task
from voxelstem.sources import dicom, iterate, nifti, raster

def peak():
    # Not ru_maxrss: a process inherits that of the one that started it.
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

raster.MOST_BYTES = 2**20 * int(sys.argv[2])
before = peak()
(source,) = iterate(Path(sys.argv[1]))
outcome = Intake(key=bytes(32))(Task(source=source, name="x"))
print(outcome.code or "kept", peak() - before)
"""


def measured(path, cap_mib):
    """What came of taking `path` in, in a process of its own, and by how much its memory grew."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(cap_mib)], capture_output=True, text=True, check=True
    )
    code, grown = run.stdout.split()
    return code, int(grown)


def bomb(kind):
    """A picture that is small and unpacks to 160 MiB and more."""
    one = picture(0, np.zeros(SHAPE[1:]))
    if kind == "rows":
        one.Rows = one.Columns = 20_000
    if kind.startswith("rle"):
        one.Rows = one.Columns = 11_585 if kind == "rle" else 64
        segment = bytes([129, 7]) * (80 * 2**20 // 128)
        frame = struct.pack("<16I", 2, 64, 64 + len(segment), *[0] * 13) + segment * 2
        one.PixelData = encapsulate([frame])
        one["PixelData"].VR = "OB"
        one.file_meta.TransferSyntaxUID = RLELossless
    if kind.startswith("deflated"):
        if kind == "deflated pixels":
            one.PixelData = bytes(160 * 2**20)
        else:
            one["PatientComments"] = DataElement("PatientComments", "UT", "x" * (160 * 2**20))
    return one


def deflated(data):
    """A plain file's bytes under the deflated transfer syntax; pydicom would take long over so many zeros."""
    end = 144 + struct.unpack_from("<I", data, 140)[0]
    plain, other = (f"{syntax}\0"[: len(syntax) + len(syntax) % 2].encode() for syntax in DEFLATED)
    old, new = (b"\x02\0\x10\0UI" + struct.pack("<H", len(name)) + name for name in (plain, other))
    meta = data[:140] + struct.pack("<I", end - 144 + len(new) - len(old)) + data[144:end].replace(old, new)
    packer = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    return meta + packer.compress(data[end:]) + packer.flush()


@pytest.mark.parametrize("kind", ["rows", "rle", "rle hidden", "deflated pixels", "deflated header"])
def test_a_bomb_is_refused_within_the_cap(tmp_path, kind):
    folder = tmp_path / "a"
    folder.mkdir()
    one = bomb(kind)
    for index in range(3 if kind.startswith("rle") else 1):
        one.ImagePositionPatient = [0, 0, index]
        path = folder / f"{index}.dcm"
        one.save_as(path, enforce_file_format=True)
        if kind.startswith("deflated"):
            path.write_bytes(deflated(path.read_bytes()))
    assert path.stat().st_size < 6 * 2**20
    code, grown = measured(folder, 128)
    assert code in ("too-large", "corrupt")
    assert grown < 1.1 * 128 * 2**20


def body(shape):
    """A body of soft tissue with noise, in air: stored values (slice, row, column), HU + 1024."""
    rng = np.random.default_rng(0)
    _, j, i = np.meshgrid(*(np.linspace(-1, 1, edge, dtype=np.float32) for edge in shape), indexing="ij", sparse=True)
    inside = np.broadcast_to((i / 0.7) ** 2 + (j / 0.85) ** 2 < 1, shape)
    return np.where(inside, 1064, 24).astype(np.int16) + rng.integers(-20, 20, shape, np.int16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "kept to the end", "packed", "noise", "nifti"])
def test_taking_a_scan_in_needs_at_most_four_times_its_stored_voxels(tmp_path, kind):
    shape = (300, 512, 512)
    values = body(shape)
    if kind == "noise":  # as good as incompressible
        values += np.random.default_rng(1).integers(0, 200, shape, np.int16)
    if kind == "nifti":
        path = tmp_path / "a.nii.gz"
        nib.save(nib.Nifti1Image(values.T - np.int16(1024), np.diag([-0.7, -0.7, 1.0, 1.0])), path)
    else:
        # Numbers whose sign may turn out to be wrong are kept until all are known.
        late = {"BitsStored": 12, "HighBit": 11} if kind == "kept to the end" else {}
        path = save(tmp_path / "a", values, **late)
    if kind == "packed":
        for file in path.iterdir():
            one = pydicom.dcmread(file)
            one.compress(RLELossless)
            one.save_as(file)
    code, grown = measured(path, 4096)
    print(kind, f"{grown / values.nbytes:.2f}x")
    assert code == "kept"
    assert grown < 4 * values.nbytes
