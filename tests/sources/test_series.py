from __future__ import annotations

import builtins
import io
import shutil
import zipfile
from pathlib import Path

import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from voxelstem import sources
from voxelstem.errors import IngestError
from voxelstem.sources import series as module
from voxelstem.sources.series import glance, in_zip


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


def test_a_copy_of_a_series_is_a_scan_of_its_own(tmp_path):
    files = [file_of("1.1", f"7.{index}") for index in range(3)]
    put(tmp_path, {f"a/{index}": data for index, data in enumerate(files)})
    put(tmp_path, {f"b/{index}": data for index, data in enumerate(files[:2])})
    assert found(tmp_path) == {"a": [], "b": []}


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
