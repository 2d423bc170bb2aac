from __future__ import annotations

import builtins
import io
import os
import shutil
import signal
import struct
import zipfile
from pathlib import Path

import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from voxelstem import sources
from voxelstem.errors import IngestError
from voxelstem.sources import series as module
from voxelstem.sources.header import UNREADABLE
from voxelstem.sources.series import glance, in_zip, members


def file_of(series="1.2.3", instance=None, *, syntax=uid.ExplicitVRLittleEndian, **values):
    """A file's header; finding needs no pixels."""
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = syntax
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = instance or uid.generate_uid()
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = values.pop("SOPClassUID", uid.CTImageStorage)
    one.Modality, one.SeriesInstanceUID, one.StudyInstanceUID = "CT", series, "1.2"
    one.Rows = 4
    for keyword, value in values.items():
        setattr(one, keyword, value)
    with io.BytesIO() as opened:
        implicit, little = syntax == uid.ImplicitVRLittleEndian, syntax != uid.ExplicitVRBigEndian
        one.save_as(opened, enforce_file_format=True, implicit_vr=implicit, little_endian=little)
        return opened.getvalue()


def put(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def found(root):
    """Series by where they lie: their mark apart, with the names of the files they list."""
    return {
        source.relative.partition("#")[0] + ("#" if "#" in source.relative else "") + source.series: sorted(
            file.relative_to(root).as_posix() for file in source.files
        )
        for source in sources.iterate(root)
    }


SYNTAXES = [
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.JPEG2000Lossless,
]


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("nested", [False, True])
def test_the_uid_is_found_under_every_transfer_syntax(tmp_path, syntax, nested):
    item = Dataset()
    item.ReferencedSOPInstanceUID = "9.9"
    item.is_undefined_length_sequence_item = True
    more = {"ReferencedImageSequence": [item], "InstitutionName": "x" * (20_000 if nested else 8)} if nested else {}
    (tmp_path / "IM1").write_bytes(file_of("1.2.77", "5.6", syntax=syntax, **more))
    seen = glance(tmp_path / "IM1")
    assert seen is not None
    assert (seen.picture, seen.series, seen.instance) == (True, "1.2.77", "5.6")


@pytest.mark.parametrize(
    ("values", "picture"),
    [
        ({}, True),
        ({"Modality": "US"}, True),  # refused by name when it is read, not passed over
        ({"Modality": "SEG"}, False),
        ({"Modality": "KO"}, False),
        ({"SOPClassUID": uid.MediaStorageDirectoryStorage}, False),
        ({"SOPClassUID": uid.EnhancedSRStorage, "Modality": ""}, False),
        ({"SOPClassUID": "1.2.3.4"}, True),
    ],
)
def test_only_what_surely_is_no_picture_is_passed_over(tmp_path, values, picture):
    (tmp_path / "IM1").write_bytes(file_of(**values))
    assert glance(tmp_path / "IM1").picture is picture


def test_damaged_files_count_as_pictures_and_others_as_nothing(tmp_path):
    put(tmp_path, {"a.dcm": b"", "b": bytes(128) + b"DICM", "c": file_of()[:300], "d.txt": b"text", "e": b""})
    assert [glance(tmp_path / name) and glance(tmp_path / name).picture for name in ("a.dcm", "b", "c")] == [True] * 3
    assert [glance(tmp_path / name) for name in ("d.txt", "e")] == [None, None]


def test_mixed_studies_in_one_folder_are_found_by_uid(tmp_path):
    put(
        tmp_path,
        {"x/1": file_of("1.1"), "x/2": file_of("1.2"), "x/3": file_of("1.1"), "x/DICOMDIR": b"", "x/t.txt": b""},
    )
    assert found(tmp_path) == {"x#1.1": ["x/1", "x/3"], "x#1.2": ["x/2"]}
    with pytest.raises(IngestError) as caught:
        sources.read(tmp_path)
    assert caught.value.code == "several-studies"
    assert "1.1" not in str(caught.value)


def test_a_series_alone_in_its_folder_is_the_folder(tmp_path):
    put(tmp_path, {"a/1.dcm": file_of("1.1"), "a/sr.dcm": file_of("1.9", Modality="SR"), "b/1.dcm": file_of("1.2")})
    assert found(tmp_path) == {"a": [], "b": []}


def test_a_series_spread_over_folders_is_one(tmp_path):
    put(tmp_path, {"p/a/1": file_of("1.1"), "p/b/c/2": file_of("1.1"), "p/b/3": file_of("1.2")})
    assert found(tmp_path) == {"p#1.1": ["p/a/1", "p/b/c/2"], "p/b": []}


def copies(root, **folders):
    """One series: in each folder the slices with these numbers; 0 has no SOPInstanceUID."""
    for folder, numbers in folders.items():
        for place, number in enumerate(numbers):
            data = file_of("1.1", f"7.{number}") if number else file_of("1.1", "7.8")[:300]
            put(root, {f"{folder}/{place}": data})
    return {name.removeprefix(root.name): files for name, files in found(root).items()}


def test_an_equal_copy_of_a_series_is_a_scan_of_its_own(tmp_path):
    assert copies(tmp_path, a=[1, 2, 3], b=[3, 1, 2]) == {"a": [], "b": []}


def test_a_part_copy_of_a_series_is_left_out(tmp_path):
    assert copies(tmp_path, a=[1, 2], b=[1, 2, 3], c=[3]) == {"b": []}


def test_parts_that_overlap_are_one_scan_without_doubles(tmp_path):
    assert copies(tmp_path, a=[1, 2], b=[2, 3], c=[4]) == {"#1.1": ["a/0", "a/1", "b/1", "c/0"]}


def test_a_double_inside_a_folder_is_left_to_the_reader(tmp_path):
    assert copies(tmp_path, a=[1, 1, 2], b=[2, 3]) == {"#1.1": ["a/0", "a/1", "a/2", "b/1"]}


def test_nothing_is_left_out_where_a_file_s_place_in_the_series_is_unknown(tmp_path):
    assert copies(tmp_path, a=[1, 2, 0], b=[1, 2, 3]) == {"a": [], "b": []}


def unreadable(root):
    """Where the sources lie that are refused because something cannot be opened."""
    lost = []
    for source in sources.iterate(root):
        if source.unreadable:
            with pytest.raises(IngestError) as caught:
                source.read()
            assert caught.value.code == "unreadable"
            assert source.all_files() == ()
            lost.append(source.relative)
    return lost


@pytest.mark.parametrize("name", ["3", "3.dcm"])
def test_a_series_with_a_slice_that_cannot_be_opened_is_refused(tmp_path, name):
    put(tmp_path, {"a/1": file_of("1.1"), "a/2": file_of("1.1"), "b/1": file_of("1.2")})
    (tmp_path / "a" / name).symlink_to("nowhere")
    assert unreadable(tmp_path) == ["a"]
    assert found(tmp_path) == {"a": [], "b": []}


def test_a_file_that_cannot_be_opened_is_passed_over_where_nothing_says_that_it_is_a_picture(tmp_path):
    put(tmp_path, {"b/1": file_of("1.2"), "a/notes.txt": b"text"})
    (tmp_path / "a" / "link").symlink_to("nowhere")
    assert found(tmp_path) == {"b": []}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_nobody_waits_for_a_pipe(tmp_path):
    def late(*_):
        pytest.fail("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    put(tmp_path, {"a/1": file_of("1.1"), "c/1": file_of("1.2"), "c/2": file_of("1.3")})
    for name in ("a/pipe", "b.nii", "b.zip", "c/x.dcm", "d.dcm"):
        os.mkfifo(tmp_path / name)
    try:
        lost = sorted(place.partition("#")[0] for place in unreadable(tmp_path))
        kept = [source.relative for source in sources.iterate(tmp_path) if not source.unreadable]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert lost == sorted(["b.nii", "b.zip", "c", tmp_path.name])
    assert [place.partition("#")[0] for place in kept] == ["a", "c", "c"]


def test_a_damaged_file_stays_with_the_only_series_beside_it(tmp_path):
    put(tmp_path, {"a/1.dcm": file_of("1.1"), "a/2.dcm": file_of("1.1")[:200]})
    put(tmp_path, {"b/1.dcm": file_of("1.2"), "b/2.dcm": file_of("1.3"), "b/3.dcm": b""})
    assert found(tmp_path) == {"a": [], "b#1.2": ["b/1.dcm"], "b#1.3": ["b/2.dcm"], "b#": ["b/3.dcm"]}


def test_marks_stay_when_files_are_renamed_and_series_come_and_go(tmp_path):
    put(tmp_path, {"a/1": file_of("1.1"), "a/2": file_of("1.2"), "a/3": file_of("1.3")})
    before = {source.series: source.relative for source in sources.iterate(tmp_path)}
    (tmp_path / "a/3").unlink()
    shutil.move(tmp_path / "a/1", tmp_path / "a/9")
    after = {source.series: source.relative for source in sources.iterate(tmp_path)}
    assert after == {series: before[series] for series in ("1.1", "1.2")}
    assert len(set(before.values())) == 3


def test_beyond_a_number_of_files_series_are_handed_out_before_the_walk_ends(tmp_path, monkeypatch):
    put(tmp_path, {f"{folder:02d}/{index}": file_of(f"1.{folder}") for folder in range(1, 9) for index in range(3)})
    monkeypatch.setattr(module, "MOST_HELD", 7)
    walked = []
    real_glance = module.glance
    monkeypatch.setattr(sources, "glance", lambda path: walked.append(path) or real_glance(path))
    walk = sources.iterate(tmp_path)
    assert next(walk).relative == "01"
    assert len(walked) == 9
    assert [source.relative for source in walk] == [f"{folder:02d}" for folder in range(2, 9)]


def test_every_file_is_opened_once(tmp_path, monkeypatch):
    put(tmp_path, {"a/1.dcm": file_of("1.1"), "a/2": file_of("1.2"), "a/notes": b"text", "b/3": file_of("1.1")})
    opened = []
    real_open = io.open

    def counted(path, *more, **named):
        opened.append(Path(path).name)
        return real_open(path, *more, **named)

    monkeypatch.setattr(io, "open", counted)
    monkeypatch.setattr(builtins, "open", counted)
    assert len(list(sources.iterate(tmp_path))) == 2
    assert sorted(opened) == ["1.dcm", "2", "3", "notes"]


def test_the_paths_in_a_dicomdir_are_not_followed(tmp_path):
    outside = put(tmp_path / "outside", {"1.dcm": file_of("6.6")})
    record = Dataset()
    record.DirectoryRecordType = "IMAGE"
    record.ReferencedFileID = ["..", "..", outside.name, "1.dcm"]
    directory = file_of("1.9", SOPClassUID=uid.MediaStorageDirectoryStorage, DirectoryRecordSequence=[record])
    root = put(tmp_path / "disc", {"DICOMDIR": directory, "IM/1": file_of("1.1")})
    assert found(root) == {"IM": []}


def test_each_series_of_a_zip_is_found(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        for name, data in {
            "d/1": file_of("1.1"),
            "e/2": file_of("1.2"),
            "e/3": file_of("1.1"),
            "x.txt": b"text",
        }.items():
            packed.writestr(name, data)
    assert {one.series: one.members for one in in_zip(tmp_path / "all.zip")} == {"1.1": ("d/1", "e/3"), "1.2": ("e/2",)}
    assert [source.relative.partition("#")[0] for source in sources.iterate(tmp_path)] == ["all.zip"] * 2


def test_a_zip_that_cannot_be_opened_or_unpacks_to_too_much_is_left_to_the_reader(tmp_path, monkeypatch):
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4 and nothing more")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("1.dcm", bytes(2**16))
    monkeypatch.setattr(module.raster, "MOST_BYTES", 2**10)
    for source, code in zip(sources.iterate(tmp_path), ("corrupt", "too-large"), strict=True):
        with pytest.raises(IngestError) as caught:
            source.read()
        assert caught.value.code == code


def test_a_member_without_a_uid_stays_with_the_only_series_beside_it(tmp_path):
    def series_of(*series):
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
            for index, uid_ in enumerate(series):
                packed.writestr(f"{index}", file_of(uid_))
        return {one.series: one.members for one in in_zip(tmp_path / "all.zip")}

    assert series_of("", "1.1", "1.1") == {"1.1": ()}
    assert series_of("", "1.1", "1.2") == {"": ("0",), "1.1": ("1",), "1.2": ("2",)}
    assert series_of("", "") == {"": ()}


def contents(path):
    with zipfile.ZipFile(path) as packed:
        return sorted(packed.read(one) for one in members(packed))


def test_a_flipped_bit_in_a_zip_s_directory_never_loses_a_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as packed:
        # One bit makes the first letter a dot (hidden), or the last one a slash (a folder).
        for name in ("n1/1o", "n2/2o", "n3/3o"):
            packed.writestr(name, name * 3)
    good = (tmp_path / "good.zip").read_bytes()
    (start,) = struct.unpack_from("<I", good, len(good) - 6)
    seen = {"harmless": 0, "refused": 0}
    for at in range(start, len(good)):
        for bit in range(8):
            (tmp_path / "flipped.zip").write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            try:
                assert contents(tmp_path / "flipped.zip") == contents(tmp_path / "good.zip"), (at - start, bit)
                seen["harmless"] += 1
            except (*UNREADABLE, IngestError):
                seen["refused"] += 1
    assert all(seen.values())


def test_zips_of_the_large_kind_and_with_a_comment_or_hidden_files_are_read(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as packed:
        packed.comment = b"a comment"
        for name in ("d/", "d/.hidden", "d/1", "2"):
            packed.writestr(name, name)
    assert contents(tmp_path / "plain.zip") == [b"2", b"d/1"]
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as packed:
        for name in "123":
            packed.writestr(name, name)
    data = (tmp_path / "large.zip").read_bytes()
    assert b"PK\6\6" in data
    assert contents(tmp_path / "large.zip") == [b"1", b"2", b"3"]
    # The plain record of a truly large zip is full; the count of the large one decides.
    end, end64 = data.rfind(b"PK\5\6"), data.rfind(b"PK\6\6")
    for count, fits in ((3, True), (4, False)):
        changed = bytearray(data)
        struct.pack_into("<HH", changed, end + 8, 0xFFFF, 0xFFFF)
        struct.pack_into("<QQ", changed, end64 + 24, count, count)
        (tmp_path / "large.zip").write_bytes(changed)
        if fits:
            assert contents(tmp_path / "large.zip") == [b"1", b"2", b"3"]
        else:
            with pytest.raises(IngestError, check=lambda problem: problem.code == "corrupt"):
                contents(tmp_path / "large.zip")
