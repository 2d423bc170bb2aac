"""Planted identifiers: whatever the sources say of a person, none of it is in anything that the tool writes.

Names, numbers, dates and UIDs are planted in DICOM headers, in the names of folders, files and members of a zip, in
BIDS tables and sidecars, in headers of NIfTI, NRRD and MetaImage files, and in the files of masks, labels and reports.
The whole journey is run, with scans of every kind that is refused. Then everything that was written is searched: as it
lies there, unpacked, and in the encodings in which text hides.

One thing may name a scan: standard output, where `ingest` and `embed` tell the person who gave the files which of
them were refused. It is the user's own terminal, and a refused scan that nobody can find cannot be put right; the same
lines in the store's ledger, in logs and on standard error have no names.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import csv
import gzip
import io
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Extension, Nifti1Header, Nifti1Image
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from voxelstem import cli
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store.reader import Store
from voxelstem.study import Volume
from voxelstem.terminal import DONE, SOME_REFUSED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # of values that are wrong on purpose

MARK = "QzxVornq"
"""Part of every planted name."""
NUMBER = "90817263"
"""Part of every planted UID and number."""
DAYS = ("20190523", "2019-05-23", "19470319", "1947-03-19", "101713.437")
FEW_STEPS = ["steps=1", "loader.batch=1", "backbone.block.depth=1", "backbone.scan.depth=1"]
PATIENTS = 8
TEXTS = (
    *("PatientName", "PatientID", "OtherPatientNames", "PatientAddress", "PatientMotherBirthName", "PatientComments"),
    *(
        "PatientBirthName",
        "PatientReligiousPreference",
        "MilitaryRank",
        "Occupation",
        "EthnicGroup",
        "CountryOfResidence",
    ),
    *("AccessionNumber", "StudyID", "StudyDescription", "SeriesDescription", "ProtocolName", "ImageComments"),
    *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName", "DeviceSerialNumber"),
    *(
        "ReferringPhysicianName",
        "PerformingPhysicianName",
        "OperatorsName",
        "PhysiciansOfRecord",
        "RequestingPhysician",
    ),
    *("ManufacturerModelName", "Manufacturer", "BodyPartExamined", "ConvolutionKernel", "ContrastBolusAgent"),
    *("SoftwareVersions", "RequestedProcedureDescription", "PerformedProcedureStepDescription", "AdmissionID"),
    *("DerivationDescription", "ImageType", "FilterType", "AdditionalPatientHistory", "ScanOptions", "PatientState"),
)
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID", "IrradiationEventUID")


# ------------------------------------------------------------------------------------------- what is planted


def slices(volume: Volume, person: int) -> list[Dataset]:
    """A CT series of a phantom, with something planted in every attribute that could hold it."""
    hu = np.rint(volume.array[0][::-1, ::-1]).astype("<i2")
    corner = volume.affine_ras @ np.array([volume.shape_ijk[0] - 1, volume.shape_ijk[1] - 1, 0, 1])
    return [one_slice(hu[:, :, index], corner, volume.spacing_mm, index, person) for index in range(hu.shape[2])]


def one_slice(hu: np.ndarray, corner: np.ndarray, spacing_mm: tuple[float, ...], index: int, person: int) -> Dataset:
    made = Dataset()
    with disable_value_validation():
        for number, keyword in enumerate(TEXTS):
            setattr(made, keyword, f"{MARK}{number:02d}")
        for number, keyword in enumerate(UIDS):
            setattr(made, keyword, f"1.2.{number}.{NUMBER}.{person}")
        made.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", f"{MARK}T".upper()]
        made.PatientID = f"{MARK}P{person}"
        made.SOPInstanceUID = f"1.2.3.{NUMBER}.{person}.{index}"
        made.PatientTelephoneNumbers = f"0{NUMBER}"
        made.StudyDate = made.SeriesDate = made.AcquisitionDate = made.ContentDate = DAYS[0]
        made.StudyTime = made.SeriesTime = made.AcquisitionTime = DAYS[4]
        made.PatientBirthDate, made.PatientAge, made.PatientSex = DAYS[2], "097Y", "F"
        nested = Dataset()
        nested.PatientName, nested.ReferencedSOPInstanceUID = f"{MARK}NEST", f"1.2.9.{NUMBER}"
        made.OtherPatientIDsSequence = made.ReferencedImageSequence = Sequence([nested])
        made.private_block(0x0029, f"{MARK} CREATOR", create=True).add_new(0x10, "LO", f"{MARK}PRIVATE")
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.Modality = CTImageStorage, "CT"
    made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = *hu.shape[::-1], 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.RescaleSlope, made.RescaleIntercept, made.KVP = 1, 0, 120
    made.PixelSpacing = [spacing_mm[1], spacing_mm[0]]
    made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    made.ImagePositionPatient = [-corner[0], -corner[1], corner[2] + index * spacing_mm[2]]
    made.PixelData = np.ascontiguousarray(hu.T).tobytes()
    return made


def packed(one: Dataset) -> bytes:
    file = io.BytesIO()
    one.preamble = f"{MARK}PREAMBLE".encode().ljust(128, b"\0")
    one.save_as(file, enforce_file_format=True)
    return file.getvalue()


def write_series(folder: Path, series: list[Dataset]) -> None:
    folder.mkdir(parents=True)
    for index, one in enumerate(series):
        (folder / f"{MARK}-{index:03d}.dcm").write_bytes(packed(one))


def write_zip(path: Path, series: list[Dataset], *, inside: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for index, one in enumerate(series):
            file.writestr(f"{inside}/{MARK}MEMBER{index:03d}", packed(one))


def nifti(path: Path, volume: Volume, *, shape: tuple[int, ...] | None = None) -> Path:
    """A NIfTI file with a name in each of its texts."""
    array = volume.array[0] if shape is None else np.zeros(shape)
    header = Nifti1Header()
    header["descrip"], header["aux_file"] = f"{MARK} descrip".encode(), f"{MARK} aux".encode()
    header["intent_name"], header["db_name"] = f"{MARK}int".encode(), f"{MARK}db".encode()
    header.extensions.append(Nifti1Extension("comment", f"{MARK} comment".encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    Nifti1Image(np.rint(array).astype(np.int16), volume.affine_ras, header).to_filename(path)
    return path


def of_its_own(series: list[Dataset], number: int) -> list[Dataset]:
    """The same slices under other UIDs: part of a series that is there already would be left out as a copy."""
    made = copy.deepcopy(series)
    for index, one in enumerate(made):
        one.SeriesInstanceUID, one.SOPInstanceUID = f"1.2.8.{NUMBER}.{number}", f"1.2.8.{NUMBER}.{number}.{index}"
    return made


def plant_refused(raw: Path, series: list[Dataset], volume: Volume) -> None:
    """Scans that are refused, each for its own reason."""
    few = series[:8]
    write_series(raw / f"{MARK}GAP", of_its_own(few[:4] + few[5:], 1))
    write_series(raw / f"{MARK}CUT", of_its_own(few, 2))
    cut = sorted((raw / f"{MARK}CUT").iterdir())[3]
    cut.write_bytes(cut.read_bytes()[:-200])
    wrong = (
        ("PET", "Modality", "CS", f"{MARK}M"),
        ("BURNED", "BurnedInAnnotation", "CS", "YES"),
        ("WORDS", "PixelSpacing", "LO", [MARK, MARK]),
        ("PLACE", "ImagePositionPatient", "LO", [MARK] * 3),
        ("SLOPE", "RescaleSlope", "LO", MARK),
    )
    for number, (name, keyword, kind, value) in enumerate(wrong, start=3):
        changed = of_its_own(few, number)
        with disable_value_validation():
            for one in changed:
                one.add_new(keyword, kind, value)
        write_series(raw / f"{MARK}{name}", changed)
    twin = copy.deepcopy(series)  # the first patient's voxels under another name
    for one in twin:
        one.PatientID, one.SeriesInstanceUID = f"{MARK}TWIN", f"1.2.7.{NUMBER}"
    write_series(raw / f"{MARK}TWIN", twin)
    write_zip(raw / f"{MARK}UP.zip", of_its_own(few, 9), inside=f"../../{MARK}")
    (raw / f"{MARK}.zip").write_bytes(b"PK\3\4" + MARK.encode())
    whole = nifti(raw / f"sub-{MARK}HALF" / f"sub-{MARK}HALF_T1w.nii.gz", volume).read_bytes()
    (raw / f"sub-{MARK}HALF" / f"sub-{MARK}HALF_T1w.nii.gz").write_bytes(whole[: len(whole) // 2])
    nifti(raw / f"{MARK}FLAT" / f"{MARK}.nii.gz", volume, shape=(20, 20))
    (raw / f"{MARK}.nrrd").write_bytes(f"NRRD0005\n# {MARK}\ntype: {MARK}\ndimension: 3\n\n".encode())
    (raw / f"{MARK}.mha").write_bytes(f"ObjectType = Image\nComment = {MARK}\nNDims = {MARK}\n".encode())


def plant_bids(raw: Path, volume: Volume) -> None:
    """One brain in BIDS, with a date for a session's name and names in its tables."""
    session = f"ses-{DAYS[0]}"
    name = f"sub-{MARK}B_{session}_T1w"
    nifti(raw / f"sub-{MARK}B" / session / "anat" / f"{name}.nii.gz", volume)
    sidecar = {"PatientName": MARK, "InstitutionName": MARK, "AcquisitionDateTime": DAYS[1], "Manufacturer": MARK}
    sidecar |= {"SeriesInstanceUID": f"1.2.{NUMBER}", "DeviceSerialNumber": NUMBER, "EchoTime": 0.003}
    (raw / f"sub-{MARK}B" / session / "anat" / f"{name}.json").write_text(json.dumps(sidecar))
    (raw / "dataset_description.json").write_text(json.dumps({"Name": MARK, "BIDSVersion": "1.8.0", "Authors": [MARK]}))
    (raw / "participants.tsv").write_text(f"participant_id\tage\tsex\tcomment\nsub-{MARK}B\t97\tF\t{MARK}\n")
    scans = f"filename\tacq_time\nanat/{name}.nii.gz\t{DAYS[1]}T10:17:13\n"
    (raw / f"sub-{MARK}B" / session / f"sub-{MARK}B_{session}_scans.tsv").write_text(scans)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the verbs are given, all of it with names; `out` is theirs to fill."""
    home = tmp_path_factory.mktemp("planted")
    raw, tables, masks = home / "raw", home / "tables", home / "masks"
    (home / "out").mkdir()
    tables.mkdir()
    labels, said, named = [], [], {}
    series: list[Dataset] = []
    for person in range(PATIENTS):
        config = PhantomConfig(seed=person, spacing_mm=(12.0, 12.0, 12.0), phase="portal" if person % 2 else "none")
        volume = phantom(config).volumes[0]
        made = slices(volume, person)
        series = series or made
        place = f"{MARK}F{person}/{MARK}S"
        if person == 1:
            place = f"{MARK}Z{person}.zip"
            write_zip(raw / place, made, inside=f"{MARK}/{DAYS[0]}")
        else:
            write_series(raw / place, made)
        labels.append({"subject": f"{MARK}P{person}", "label": "yes" if person % 2 else "no"})
        said.append({"subject": f"{MARK}P{person}", "scan": place, "findings": "Clear."})
        if person == 2:
            region = nifti(masks / f"{MARK}MASK.nii.gz", volume, shape=volume.shape_ijk)
            named[place] = region.name
        if person == 3:
            named[place] = nifti(masks / f"{MARK}OTHER.nii.gz", volume, shape=(7, 7, 7)).name
        if person == 4:
            nifti(masks / f"{MARK}ORPHAN.nii.gz", volume, shape=(7, 7, 7))
    write_series(raw / f"{MARK}DEADLY", slices(phantom(PhantomConfig(seed=99, spacing_mm=(12.0,) * 3)).volumes[0], 99))
    plant_refused(raw, series, phantom(PhantomConfig(seed=50, spacing_mm=(12.0,) * 3)).volumes[0])
    noise = np.random.default_rng(0).integers(0, 900, (1, 24, 24, 24)).astype(np.float32)
    brain = phantom(PhantomConfig(seed=51, spacing_mm=(12.0,) * 3)).volumes[0]
    plant_bids(raw, Volume(array=noise, affine_ras=np.diag([2, 2, 2, 1.0]), modality="MR", provenance=brain.provenance))
    (masks / "labels.json").write_text(json.dumps({"classes": {"1": "liver"}, "masks": named}))
    for path, rows in ((tables / f"{MARK}.csv", labels), (tables / f"{MARK}-reports.csv", said)):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    (home / "site.key").write_text("01" * 32 + "\n")  # a settled one: it decides which phantoms are held out
    return home


# ------------------------------------------------------------------------------------------- the journey

DEADLY = """
import logging, os, signal, sys, warnings
from voxelstem import cli
from voxelstem.intake import Intake

logging.basicConfig(filename=f"out/log-{os.getpid()}.txt", level=logging.DEBUG)
logging.captureWarnings(True)
warnings.simplefilter("always")
real = Intake.__call__

def deadly(intake, task):
    if task.source.relative.startswith("MARKDEADLY"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(intake, task)

Intake.__call__ = deadly
if __name__ == "__main__":
    cli.main(sys.argv[1:])
"""


def say(home: Path, name: str, *words: str) -> str:
    """Run one command here; its standard error, log records and warnings become files beside what it writes."""
    out, err, log = io.StringIO(), io.StringIO(), io.StringIO()
    handler, root = logging.StreamHandler(log), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.chdir(home):
            warnings.simplefilter("always")
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.run(words)
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
    told = [err.getvalue(), log.getvalue(), *(str(one.message) for one in warned)]
    (home / "out" / f"{name}-said.txt").write_text("\n".join(told))
    assert code in (DONE, SOME_REFUSED), err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def journey(planted: Path) -> dict[str, str]:
    """Run every verb; returns what each said on standard output. All else lies in `out`."""
    script = planted / "deadly.py"
    script.write_text(DEADLY.replace("MARK", MARK))
    labels, said = f"tables/{MARK}.csv", {}
    classify = ["--task", "classify", "--mode", "knn", "--out", "out/knn"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(planted / "site.key"))
        store = ["--store", "out/store"]
        ingest = ["ingest", "raw", *store, "--labels", "masks", "--reports", f"tables/{MARK}-reports.csv", "--json"]
        # As processes, because one of them is to die.
        answer = subprocess.run(
            [sys.executable, script.name, *ingest, "--workers", "2"],
            cwd=planted,
            capture_output=True,
            text=True,
            check=False,
        )
        (planted / "out" / "ingest-said.txt").write_text(answer.stderr)
        assert answer.returncode == SOME_REFUSED, answer.stderr
        said["ingest"] = answer.stdout
        for name, words in {
            "show": ["show", "out/store", "--json"],
            "show-text": ["show", "out/store"],
            "pretrain": [
                "pretrain",
                "tiny",
                *store,
                "--out",
                "out/run",
                *FEW_STEPS,
                "spec.spacing_mm=[12.0,12.0,12.0]",
            ],
            "embed": ["embed", "raw", "--weights", "out/run/weights", "--out", "out/embeddings", "--json"],
            "adapt": ["adapt", "--weights", "out/run/weights", *store, "--labels", labels, *classify],
            "evaluate": ["evaluate", "out/knn", *store, "--labels", labels, "--out", "out/report", "--json"],
            "show-run": ["show", "out/run", "--json"],
            "show-weights": ["show", "out/run/weights", "--json"],
            "show-report": ["show", "out/report", "--json"],
        }.items():
            said[name] = say(planted, name, *words)
    return said


# ------------------------------------------------------------------------------------------- the search


def spellings(word: str) -> dict[str, bytes]:
    """How a word may lie in bytes: those in small letters are searched in the bytes' small letters."""
    wide = word.lower().encode("utf-16-le")[:-1]  # without the last zero it is found in big-endian order too
    found = {"text": word.lower().encode(), "utf-16": wide, "hex": word.encode().hex().encode()}
    found |= {"hex of small letters": word.lower().encode().hex().encode()}
    for text in {word, word.lower(), word.upper()}:
        for skipped in range(3):
            # Of base64, what does not depend on the bytes around the word.
            coded = base64.b64encode(bytes(skipped) + text.encode() + b"\0\0\0")
            end = 4 * ((skipped + len(word)) // 3)
            found[f"base64 of {text}, {skipped}"] = coded[4 * (skipped > 0) : end]
    return found


NEEDLES = {needle: f"{word} as {how}" for word in (MARK, NUMBER, *DAYS) for how, needle in spellings(word).items()}


def planted_in(data: bytes) -> list[str]:
    """What of all that was planted lies in some bytes, as they are."""
    small = data.lower()
    return [name for needle, name in NEEDLES.items() if needle in (data if "base64" in name else small)]


STREAMS = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08")
BASE64 = re.compile(rb"[A-Za-z0-9+/]{64,}={0,2}")


def inside(data: bytes) -> Iterator[bytes]:
    """What unpacks from some bytes: zlib and gzip streams, members of a zip or tar, long base64."""
    for found in STREAMS.finditer(data):
        with contextlib.suppress(zlib.error):
            unpacked = zlib.decompressobj(31 if found[0][0] == 0x1F else 15).decompress(data[found.start() :], 2**26)
            if unpacked:
                yield unpacked
    for found in BASE64.finditer(data):
        with contextlib.suppress(ValueError):
            yield base64.b64decode(found[0])
    if data[:4] == b"PK\3\4":
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(data)) as file:
            for member in file.namelist():
                yield member.encode()
                yield file.read(member)
    with contextlib.suppress(tarfile.TarError, EOFError), tarfile.open(fileobj=io.BytesIO(data), mode="r:") as file:
        for member in file.getmembers():
            opened = file.extractfile(member)
            yield opened.read() if opened else b""


def rows(path: Path) -> Iterator[bytes]:
    """Every cell of every table of an SQLite file."""
    with contextlib.closing(sqlite3.connect(path)) as opened:
        for (table,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in opened.execute(f'SELECT * FROM "{table}"'):
                yield from (cell if isinstance(cell, bytes) else str(cell).encode() for cell in row)


def layers(path: Path) -> Iterator[bytes]:
    """A file's name, its bytes, and what a program that knows its format reads from it."""
    data = path.read_bytes()
    yield data
    if data[:15] == b"SQLite format 3":
        yield from rows(path)
    if path.suffix == ".b2nd":
        array = blosc2.open(str(path), mode="r")
        yield np.ascontiguousarray(array[:]).tobytes()
        yield repr((dict(array.schunk.meta), array.schunk.vlmeta[:])).encode()


def hits(root: Path) -> list[str]:
    """Where below a folder something planted is found, and how it lies there."""
    found: list[str] = []

    def look(place: str, data: bytes, depth: int) -> None:
        found.extend(f"{place}: {name}" for name in planted_in(data))
        if depth:
            for part in inside(data):
                look(f"{place} > unpacked", part, depth - 1)

    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root).as_posix()
        look(f"name of {relative}", relative.encode("utf-8", "surrogateescape"), 0)
        if path.is_file():
            for data in layers(path):
                look(relative, data, 3)
    return found


# ------------------------------------------------------------------------------------------- the facts


def test_nothing_planted_is_in_anything_that_was_written(planted: Path, journey: dict[str, str]):
    assert hits(planted / "out") == []
    written = [path for path in (planted / "out").rglob("*") if path.is_file()]
    kinds = {path.suffix for path in written}
    assert {".sqlite", ".b2nd", ".npz", ".safetensors", ".html", ".jsonl", ".csv", ".toml", ".txt"} <= kinds


def test_the_journey_met_every_kind_of_refusal(journey: dict[str, str]):
    told = json.loads(journey["ingest"])
    assert told["kept"] == PATIENTS + 1
    codes = {line["code"] for line in told["refusals"]}
    assert {"corrupt", "worker-died", "slice-gaps", "burned-in", "label-grid", "label-without-scan", "not-3d"} <= codes
    assert len(told["refusals"]) >= 15
    assert len(codes) >= 9


def test_standard_output_names_only_places_of_what_was_refused(journey: dict[str, str]):
    for name, text in journey.items():
        if name in ("ingest", "embed"):
            told = json.loads(text)
            for line in told["refusals"]:
                assert MARK in line.pop("scan")
            assert planted_in(json.dumps(told).encode()) == [], name
        else:
            assert planted_in(text.encode()) == [], name


def test_ages_and_dates_in_the_store_are_nobodys(planted: Path, journey: dict[str, str]):
    records = [record for record in Store.open(planted / "out" / "store") if record.modality == "CT"]
    assert {record.acquisition.age_years for record in records} == {90.0}
    days = {record.acquisition.date for record in records}
    assert len(days) == len({record.subject for record in records}) == PATIENTS
    assert all(record.acquisition.facts["KVP"] == "120" for record in records)


def test_enough_is_planted():
    assert len(TEXTS) + len(UIDS) >= 30
    assert MARK in str(one_slice(np.zeros((2, 2), "<i2"), np.zeros(4), (1.0, 1.0, 1.0), 0, 0))


# ------------------------------------------------------------------------------------------- hostile texts

SCRIPT, FORMULA, CLIMB = "<script>alert('QzxVornq')</script>", "=cmd()|' /C calc'!A0", "../../../QzxVornq"


def written_below(root: Path) -> list[Path]:
    """All that was written, each proved to lie below `root` whatever links lead through."""
    found = sorted(root.rglob("*"))
    inside_root = os.path.realpath(root) + os.sep
    assert [path for path in found if not os.path.realpath(path).startswith(inside_root)] == []
    return found


def check_cells(path: Path) -> None:
    """No cell of a table is a formula to a spreadsheet (OWASP's list of first characters; numbers may be negative)."""
    with path.open(newline="", encoding="utf-8") as file:
        for cell in (cell for row in csv.reader(file) for cell in row if cell[:1] in ("=", "+", "-", "@", "\t", "\r")):
            float(cell)


@pytest.fixture(scope="module")
def hostile(planted: Path) -> Path:
    """Scans whose headers, folders and files are called what breaks paths, pages and tables."""
    raw = planted / "hostile"
    names = [FORMULA.replace("/", "_"), SCRIPT.replace("/", "_"), "line\nbreak", "a" * 200, "?#%00$(x)", b"\xff\xfe"]
    for person, name in enumerate(names):
        series = slices(phantom(PhantomConfig(seed=60 + person, spacing_mm=(12.0, 12.0, 12.0))).volumes[0], 60 + person)
        with disable_value_validation():
            for one in series:
                one.StudyInstanceUID, one.SeriesInstanceUID = CLIMB, f"{CLIMB}\0{person}" if person else "A" * 65_536
                one.PatientID = (CLIMB, SCRIPT, FORMULA, "x" * 65_536, f"a\0{MARK}", "\t@SUM(1)")[person]
                one.PatientName, one.Manufacturer, one.SeriesDescription = SCRIPT, FORMULA, "\0" * 1_000
                one.ConvolutionKernel = one.ContrastBolusAgent = one.ManufacturerModelName = (SCRIPT, FORMULA)[
                    person % 2
                ]
                one.FrameOfReferenceUID, one.StudyDate, one.PatientAge = "\0" * 64, CLIMB, FORMULA
        folder = Path(
            os.fsdecode(os.path.join(os.fsencode(raw), name if isinstance(name, bytes) else os.fsencode(name)))
        )
        write_series(folder, series)
    return raw


def test_hostile_texts_neither_leave_the_folder_nor_reach_a_table(
    planted: Path, journey: dict[str, str], hostile: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VOXELSTEM_KEY", str(planted / "site.key"))
    before = set(planted.rglob("*"))
    out = planted / "out" / "hostile"
    told = json.loads(say(planted, "hostile", "ingest", "hostile", "--store", "out/hostile/store", "--json"))
    assert (told["kept"], told["refused"]) == (6, 0)
    weights = ["--weights", "out/run/weights"]
    say(planted, "hostile-embed", "embed", "hostile", *weights, "--out", "out/hostile/embeddings")
    say(planted, "hostile-show", "show", "out/hostile/store")
    said = {planted / "out" / f"{name}-said.txt" for name in ("hostile", "hostile-embed", "hostile-show")}
    assert set(planted.rglob("*")) - before - said == {out, *written_below(out)}
    plain = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
    assert [path.name for path in written_below(out) if not plain.fullmatch(path.name)] == []
    tables = list((planted / "out").rglob("*.csv"))
    assert len(tables) >= 2
    for table in tables:
        check_cells(table)
    assert hits(out) == []
    texts = [cell for path in out.rglob("*.sqlite") for cell in rows(path)]
    assert texts
    assert [cell for cell in texts for word in (b"../", b"<script", b"cmd()", b"SUM(") if word in cell] == []
    assert max(len(cell) for cell in texts) < 10_000


def test_a_formula_would_be_found_in_a_table(tmp_path: Path):
    (tmp_path / "x.csv").write_text("a,b\n-1.5,+2\n")
    check_cells(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text(f'a,b\n1,"{FORMULA}"\n')
    with pytest.raises(ValueError, match="cmd"):
        check_cells(tmp_path / "x.csv")


@pytest.mark.parametrize("said", [SCRIPT, "$\\frac{" + "a" * 50])
def test_hostile_names_of_classes_are_only_text_in_the_report(
    planted: Path, journey: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
):
    monkeypatch.setenv("VOXELSTEM_KEY", str(planted / "site.key"))
    labels = tmp_path / "labels.csv"
    with labels.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["subject", "label"])
        table.writerows([f"{MARK}P{person}", said if person % 2 else "no"] for person in range(PATIENTS))
    given = ["--store", "out/store", "--labels", str(labels)]
    classify = ["--weights", "out/run/weights", "--task", "classify", "--mode", "knn", "--out", str(tmp_path / "knn")]
    say(planted, "class-adapt", "adapt", *classify, *given)
    say(planted, "class-evaluate", "evaluate", str(tmp_path / "knn"), *given, "--out", str(tmp_path / "report"))
    for name in ("class-adapt", "class-evaluate"):
        (planted / "out" / f"{name}-said.txt").unlink()
    (page,) = (tmp_path / "report").glob("*.html")
    assert "<script" not in page.read_text().lower()


HIDING = {
    "plain": lambda word: word.encode(),
    "small": lambda word: word.lower().encode(),
    "large": lambda word: b"\xff" + word.upper().encode(),
    "utf-16": lambda word: b"x" + word.encode("utf-16-le"),
    "utf-16 big": lambda word: word.encode("utf-16-be"),
    "zlib": lambda word: b"junk" + zlib.compress(b"before" + word.encode()),
    "zlib in gzip": lambda word: gzip.compress(zlib.compress(word.encode())),
    "base64": lambda word: base64.b64encode(b"a" + word.encode() + b"b"),
    "base64 next": lambda word: base64.b64encode(b"ab" + word.encode() + b"b"),
    "base64 of zlib": lambda word: base64.b64encode(zlib.compress(word.encode() + os.urandom(99))),
    "hex": lambda word: word.encode().hex().encode(),
}


@pytest.mark.parametrize("hidden", HIDING)
@pytest.mark.parametrize("word", [MARK, NUMBER, DAYS[0], DAYS[3]])
def test_the_search_finds_a_word_however_it_is_hidden(tmp_path: Path, hidden: str, word: str):
    (tmp_path / "clean").write_bytes(os.urandom(10_000))
    assert hits(tmp_path) == []
    (tmp_path / "artefact").write_bytes(HIDING[hidden](f"<{word}>"))
    assert hits(tmp_path)


def test_the_search_finds_a_word_in_every_kind_of_file_that_is_written(tmp_path: Path):
    names = f"x{MARK}y".encode()
    voxels = np.frombuffer(names.ljust(64, b"\0"), np.uint8)
    blosc2.asarray(np.tile(voxels, 2_000), urlpath=str(tmp_path / "voxels.b2nd"), mode="w")
    np.savez_compressed(tmp_path / "embedding.npz", scan=voxels)
    np.savez(tmp_path / "member.npz", **{MARK: np.zeros(3)})
    Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)).to_filename(tmp_path / f"{MARK}.nii.gz")
    described = Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4))
    described.header["descrip"] = names
    nib.save(described, tmp_path / "described.nii.gz")
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as opened:
        opened.execute("CREATE TABLE t (a BLOB)")
        opened.execute("INSERT INTO t VALUES (?)", (zlib.compress(names),))
    opened.close()
    places = {line.partition(":")[0].partition(" >")[0] for line in hits(tmp_path)}
    assert places == {
        "voxels.b2nd",
        "embedding.npz",
        "member.npz",
        f"name of {MARK}.nii.gz",
        "described.nii.gz",
        "catalogue.sqlite",
    }
