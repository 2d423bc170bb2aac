from __future__ import annotations

import collections
import gzip
import itertools
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from voxelstem import geometry, sources
from voxelstem.errors import IngestError
from voxelstem.sources import nifti, raster
from voxelstem.sources.raster import Raster


def refused(code):
    return pytest.raises(IngestError, check=lambda problem: problem.code == code)


def unpack(data, *, allowed=0, wbits=raster.GZIP):
    return raster.inflate(data, name="x", limit=lambda start: allowed or len(start), wbits=wbits).tobytes()


def of(array, notes=()):
    return Raster(array=np.asarray(array), affine_ras=np.eye(4), source_format="nifti", sha256="0", notes=notes)


@settings(max_examples=30, deadline=None)
@given(data=st.binary(min_size=1, max_size=5000), level=st.integers(0, 9))
def test_unpacking_gives_back_what_was_packed(data, level):
    assert unpack(gzip.compress(data, level)) == data
    assert unpack(zlib.compress(data, level), wbits=raster.ZLIB) == data


def test_more_than_a_chunk_and_several_members_and_padding_unpack():
    data = np.random.default_rng(0).integers(0, 50, 3 * raster.CHUNK_BYTES, np.uint8).tobytes()
    cut = 2 * raster.CHUNK_BYTES + 7
    packed = gzip.compress(data[:cut], 1) + gzip.compress(data[cut:], 1) + bytes(100)
    assert unpack(packed, allowed=len(data)) == data


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.05, 0.999))
def test_a_cut_file_is_never_accepted(share):
    packed = gzip.compress(np.random.default_rng(1).bytes(2000))
    with refused("corrupt"):
        unpack(packed[: int(len(packed) * share)])


@settings(max_examples=40, deadline=None)
@given(bit=st.integers(0, 8 * 1500 - 1))
def test_a_flipped_bit_in_the_data_or_trailer_is_never_accepted(bit):
    packed = bytearray(gzip.compress(np.random.default_rng(1).bytes(1500)))
    place = len(packed) - 1 - bit // 8  # the trailer and what comes before it, not the header's clock
    packed[place] ^= 1 << bit % 8
    with refused("corrupt"):
        unpack(bytes(packed))


def test_trailing_garbage_is_refused():
    with refused("corrupt"):
        unpack(gzip.compress(b"scan") + b"garbage")


def test_a_bomb_stops_at_the_declared_size():
    seen = []
    original = raster.CHUNK_BYTES
    bomb = gzip.compress(bytes(64 * original))
    with refused("corrupt") as caught:
        raster.inflate(bomb, name="x", limit=lambda start: seen.append(len(start)) or 1000, wbits=raster.GZIP)
    assert seen == [original]
    assert "more than the 1000 bytes" in caught.value.problem


def test_a_size_that_so_few_bytes_cannot_hold_is_refused_before_it_is_reserved():
    with refused("corrupt") as caught:
        unpack(gzip.compress(bytes(1000)), allowed=10**13)
    assert "cannot hold" in caught.value.problem


def test_a_file_larger_than_the_cap_is_refused_unread(tmp_path, monkeypatch):
    with (tmp_path / "a.nii").open("wb") as handle:
        handle.truncate(raster.MOST_BYTES + raster.FRAME_BYTES + 1)  # sparse: takes no room
    with refused("too-large"):
        raster.read_bytes(tmp_path / "a.nii")


@pytest.mark.parametrize("name", ["x" * 64_000, "a\0b.nii", "../../nothing", "a\nb"], ids=["long", "NUL", "up", "line"])
def test_a_name_that_no_disk_holds_is_a_missing_file(tmp_path, name):
    with refused("missing") as caught:
        raster.read_bytes(tmp_path / name)
    assert len(caught.value.problem) < 2 * raster.NAME_LENGTH
    assert caught.value.problem.isprintable()


@pytest.mark.parametrize("edge", [0.0, 0.001, 51.0, np.nan])
def test_a_spacing_that_no_scanner_makes_is_refused(edge):
    with refused("bad-spacing"):
        raster.check_placed(np.diag([1.0, edge, 1.0, 1.0]), name="x")
    raster.check_placed(np.diag([-1.0, 1.0, 1.0, 1.0]), name="x")  # mirrored is legal


def test_a_size_above_the_cap_is_refused_before_anything_is_reserved():
    with refused("too-large"):
        raster.check_size("x", (30_000, 30_000, 30_000), 2)
    with refused("corrupt"):
        raster.check_size("x", (10, -3, 10), 2)
    assert raster.check_size("x", (10, 3, 10), 2) == 600


@pytest.mark.parametrize("shape", [(8,), (8, 8), (8, 8, 1), (8, 8, 8, 2), (1, 8, 8), (8, 8, 8, 1, 3)])
def test_what_is_not_three_dimensional_is_refused(shape):
    with refused("not-3d"):
        raster.spatial_shape("x", shape)


def test_further_axes_of_length_one_are_dropped():
    assert raster.spatial_shape("x", (8, 7, 6, 1, 1)) == (8, 7, 6)


def test_scans_of_no_use_are_refused_with_their_reason():
    noise = np.random.default_rng(0).normal(size=(4, 4, 4))
    with refused("constant"):
        raster.to_study(of(np.full((4, 4, 4), 7)), name="x", subject="s")
    with refused("not-finite"):
        raster.to_study(of(np.where(noise > 1, np.nan, noise)), name="x", subject="s")
    with refused("not-finite"):
        raster.to_study(of(np.where(noise > 1, 1e39, noise)), name="x", subject="s")


def hounsfield():
    rng = np.random.default_rng(0)
    array = rng.normal(30, 60, (30, 30, 30))
    array[:14] = rng.normal(-1000, 15, (14, 30, 30))
    return array.round().astype(np.int16)


def test_ct_values_are_hounsfield_units_or_refused():
    assert raster.to_study(of(hounsfield()), name="x", subject="s").volumes[0].modality == "CT"
    for shift in (-1024, -8192):
        with refused("rescaled-twice"):
            raster.to_study(of(hounsfield() + shift), name="x", subject="s")


def test_a_padding_of_minus_8192_round_a_ct_is_no_obstacle():
    padded = hounsfield()
    padded[:, :4] = -8192
    volume = raster.to_study(of(padded), name="x", subject="s").volumes[0]
    assert volume.modality == "CT"
    assert any("padding" in note for note in volume.provenance.notes)
    np.testing.assert_array_equal(volume.array[0], padded)


def test_a_phase_image_down_to_minus_4096_stays_mr():
    phase = np.random.default_rng(0).integers(-4096, 4096, (30, 30, 30))
    assert raster.to_study(of(phase), name="x", subject="s").volumes[0].modality == "MR"


def test_rounding_to_float32_is_noted():
    array = np.arange(64, dtype=np.int64).reshape(4, 4, 4) * 2**24 + 1
    notes = raster.to_study(of(array), name="x", subject="s").volumes[0].provenance.notes
    assert "int64 rounded to float32" in notes
    exact = raster.to_study(of(array % 1000), name="x", subject="s").volumes[0].provenance.notes
    assert not any("rounded" in note for note in exact)


@pytest.mark.parametrize("bad", [0.5, -1, 40_000, np.nan])
def test_masks_hold_whole_class_numbers_only(bad):
    mask = np.zeros((4, 4, 4))
    mask[0, 0, 0] = bad
    with refused("not-labels"):
        raster.to_labels(of(mask), name="x")


def test_an_empty_mask_is_a_mask():
    assert not raster.to_labels(of(np.zeros((4, 4, 4), np.uint8)), name="x").array.any()


def noise(shape=(12, 11, 10)):
    array = np.random.default_rng(0).integers(-200, 300, shape)
    array[0] = -1000
    return array.astype("<i2")


def write_nrrd(path, array, affine_ras, *, packed=True):
    """As the format's page describes it."""
    vectors = ["(" + ",".join(repr(float(number)) for number in column) + ")" for column in affine_ras[:3].T]
    header = (
        "NRRD0004\ntype: int16\ndimension: 3\nspace: right-anterior-superior\n"
        f"sizes: {' '.join(map(str, array.shape))}\n"
        f"space directions: {' '.join(vectors[:3])}\nendian: little\nencoding: {'gzip' if packed else 'raw'}\n"
        f"space origin: {vectors[3]}\n\n"
    )
    body = array.tobytes(order="F")
    path.write_bytes(header.encode() + (gzip.compress(body, 1, mtime=0) if packed else body))
    return len(header)


def write_mha(path, array, affine_ras, *, packed=True):
    """As the format's page describes it; positions are LPS."""
    affine = geometry.LPS_TO_RAS @ affine_ras
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    numbers = {
        "TransformMatrix": (affine[:3, :3] / spacing).T.ravel(),
        "Offset": affine[:3, 3],
        "ElementSpacing": spacing,
    }
    placed = "".join(f"{key} = {' '.join(repr(float(n)) for n in values)}\n" for key, values in numbers.items())
    header = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = {packed}\n{placed}"
        f"DimSize = {' '.join(map(str, array.shape))}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    body = array.tobytes(order="F")
    path.write_bytes(header.encode() + (zlib.compress(body, 1) if packed else body))
    return len(header)


def write_nii(path, array, affine_ras):
    image = nib.Nifti1Image(array, affine_ras)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine_ras, code=1)
    image.set_sform(affine_ras, code=1)
    path.write_bytes(image.to_bytes())


WRITERS = {
    "a.nii": write_nii,
    "a.nii.gz": nifti.write,
    "a.nrrd": write_nrrd,
    "a.mha": write_mha,
}
OBLIQUE = np.array([[0.1, -2.0, 0.0, 50.0], [1.5, 0.1333, 0.0, -20.0], [0.0, 0.0, 3.0, 7.0], [0.0, 0.0, 0.0, 1.0]])


def volume_of(path):
    return sources.read(path).volumes[0]


@st.composite
def affines(draw):
    """Any right-angled placement, mirrored ones too."""
    affine = np.eye(4)
    angles = draw(st.tuples(*[st.floats(-180.0, 180.0)] * 3))
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine[:3, :3] *= draw(st.tuples(*[st.floats(0.2, 8.0)] * 3))
    affine[:3, 0] *= draw(st.sampled_from([-1.0, 1.0]))
    affine[:3, 3] = draw(st.tuples(*[st.floats(-500.0, 500.0)] * 3))
    return affine


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=25, deadline=None)
@given(affine=affines(), shape=st.tuples(*[st.integers(2, 7)] * 3))
def test_every_corner_stays_where_it_was_and_what_it_was(name, affine, shape):
    array = np.random.default_rng(0).permutation(np.arange(np.prod(shape), dtype="<i2")).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[name](Path(folder, name), array, affine)
        volume = volume_of(Path(folder, name))
    corners = np.array(list(itertools.product(*[(0, edge - 1) for edge in shape])))
    places = geometry.voxel_to_patient(corners, affine)
    found = np.rint(geometry.patient_to_voxel(places, volume.affine_ras)).astype(int)
    apart = geometry.voxel_to_patient(found, volume.affine_ras) - places
    assert np.abs(apart).max() < 1e-3
    for corner, here in zip(corners, found, strict=True):
        assert volume.array[0][tuple(here)] == array[tuple(corner)]


@pytest.mark.parametrize("name", WRITERS)
def test_48_orientations_of_one_scan_are_one_scan(tmp_path, name):
    image = nib.Nifti1Image(noise(), np.diag([1.5, 2.0, 3.0, 1.0]))
    codes = ["".join(o) for letters in itertools.product("RL", "AP", "SI") for o in itertools.permutations(letters)]
    assert len(set(codes)) == 48
    for letters in codes:
        turned = image.as_reoriented(nib.orientations.axcodes2ornt(letters))
        WRITERS[name](tmp_path / name, np.asarray(turned.dataobj), turned.affine)
        volume = volume_of(tmp_path / name)
        np.testing.assert_array_equal(volume.array[0], noise())
        np.testing.assert_allclose(volume.affine_ras, image.affine, atol=1e-4)
        assert volume.array.flags.c_contiguous


def damage(path, count, *, first=0, seed=0):
    """Flip one byte, cut the end off, or cut a piece out, behind `first`; and say how often which answer came."""
    whole, before = path.read_bytes(), volume_of(path)
    rng = np.random.default_rng(seed)
    answers = collections.Counter()
    for turn in range(count):
        at = int(rng.integers(first, len(whole)))
        length = int(rng.integers(1, 40))
        broken = {
            0: whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :],
            1: whole[:at],
            2: whole[:at] + whole[at + length :],
        }[turn % 3 if turn % 2 else 0]
        path.write_bytes(broken)
        try:
            after = volume_of(path)
        except IngestError:
            answers["refused"] += 1
            continue
        same = np.array_equal(before.array, after.array) and np.array_equal(before.affine_ras, after.affine_ras)
        answers["harmless" if same else "silent"] += 1
    path.write_bytes(whole)
    return answers


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_damage_to_a_packed_nifti_is_refused_or_harmless(tmp_path, count):
    nifti.write(tmp_path / "a.nii.gz", noise((24, 24, 24)), OBLIQUE)
    answers = damage(tmp_path / "a.nii.gz", count)
    assert not answers["silent"], answers
    assert answers["refused"] > 0.9 * count, answers


@pytest.mark.parametrize(("name", "write"), [("a.nrrd", write_nrrd), ("a.mha", write_mha)])
def test_every_damage_to_packed_voxels_of_nrrd_and_mha_is_refused_or_harmless(tmp_path, name, write):
    first = write(tmp_path / name, noise(), OBLIQUE)
    answers = damage(tmp_path / name, 100, first=first)
    assert not answers["silent"], answers
    assert answers["refused"] > 90, answers


def test_what_an_unpacked_nifti_cannot_notice_is_known():
    """Nothing in a `.nii` carries a checksum: a flip in its voxels, or in these fields, cannot be seen by anybody."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.nii")
        write_nii(path, noise(), OBLIQUE)
        whole, before = path.read_bytes(), volume_of(path)
        silent = collections.Counter()
        for at in range(352):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            try:
                after = nifti.read(path, subject="s").volumes[0]
            except IngestError:
                silent["refused"] += 1
                continue
            assert after.array.shape == before.array.shape
            moved = np.abs(after.affine_ras - before.affine_ras).max()
            if np.array_equal(before.array, after.array) and moved < 1e-4:
                silent["harmless"] += 1
            elif 280 <= at < 328 or 252 <= at < 280:  # sform and qform: one holds the other to a quarter of a voxel
                assert moved <= 0.25 * 1.6
                silent["moved a little"] += 1
            else:
                silent[at] += 1
    scaling, sign = set(range(112, 120)), {70, 71}
    assert set(silent) <= {"refused", "harmless", "moved a little"} | scaling | sign
    assert silent["refused"] > 50


def packed_zeros(prefix, size, *, gz):
    packer = zlib.compressobj(1, wbits=raster.GZIP if gz else raster.ZLIB)
    zeros = bytes(2**20)
    return b"".join([packer.compress(prefix), *(packer.compress(zeros) for _ in range(size // 2**20)), packer.flush()])


def test_a_bomb_is_refused_within_the_cap(tmp_path):
    cap, size, shape = 64 * 2**20, 128 * 2**20, (400, 400, 209)  # the shape is just below the cap
    write_nii(tmp_path / "a.nii", noise(), OBLIQUE)
    header = (tmp_path / "a.nii").read_bytes()[:352]

    def declaring(*edges):
        return header[:42] + np.array(edges, "<i2").tobytes() + header[48:]

    (tmp_path / "1.nii.gz").write_bytes(packed_zeros(header, size, gz=True))
    (tmp_path / "2.nii.gz").write_bytes(packed_zeros(declaring(*shape), size, gz=True))
    (tmp_path / "3.nii.gz").write_bytes(packed_zeros(declaring(30_000, 30_000, 2), size, gz=True))
    (tmp_path / "4.nii.gz").write_bytes(gzip.compress(declaring(*shape)))
    for name, write, gz in (("5.nrrd", write_nrrd, True), ("6.mha", write_mha, False)):
        first = write(tmp_path / name, noise(), OBLIQUE)
        data = (tmp_path / name).read_bytes()[:first].replace(b"12 11 10", b"400 400 209")
        (tmp_path / name).write_bytes(data + packed_zeros(b"", size, gz=gz))
    script = f"""
import sys
from pathlib import Path
from voxelstem import sources
from voxelstem.errors import IngestError
from voxelstem.sources import raster, nifti, nrrd, mha

def status(word):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(word))

raster.MOST_BYTES = {cap}
sources.read(Path(sys.argv[1], "a.nii"))
before = status("VmRSS")
for path in sorted(Path(sys.argv[1]).glob("[0-9]*")):
    try:
        sources.read(path)
    except IngestError as error:
        print(path.name, error.code)
print("peak", status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    answers = dict(line.split() for line in done.stdout.splitlines())
    peak = int(answers.pop("peak"))
    bombs = {"1.nii.gz": "corrupt", "2.nii.gz": "corrupt", "3.nii.gz": "too-large", "4.nii.gz": "corrupt"}
    assert answers == bombs | {"5.nrrd": "corrupt", "6.mha": "corrupt"}
    assert peak <= 1.1 * cap, peak


def test_reading_makes_one_float_copy_of_the_stored_voxels(tmp_path):
    array = np.random.default_rng(0).integers(-60, 60, (128, 128, 900)).astype(np.int16)
    array[:40] -= 1000
    nifti.write(tmp_path / "a.nii.gz", array, np.diag([-1.0, -1.0, 1.0, 1.0]))
    nifti.write(tmp_path / "first.nii.gz", array[30:50, :30, :30], np.eye(4))  # what is imported on first use
    script = """
import sys
from pathlib import Path
from voxelstem.sources import nifti

def status(word):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(word))

nifti.read(Path(sys.argv[1], "first.nii.gz"), subject="s")
before = status("VmRSS")
nifti.read(Path(sys.argv[1], "a.nii.gz"), subject="s")
print(status("VmHWM") - before)
"""
    run = [sys.executable, "-c", script, str(tmp_path)]
    peak = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    # Stored 1, float32 2, and what the gates look at; one more copy in float32 would make it 5.5.
    assert peak <= 4.2 * array.nbytes, peak / array.nbytes
