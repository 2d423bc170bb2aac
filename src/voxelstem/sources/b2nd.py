"""`.b2nd` as nnU-Net and nnssl keep preprocessed scans: blosc2, axes (channel, z, y, x).

Their files say nothing of where voxels lie: that stands in a pickle beside them, and reading a pickle runs whatever
program it holds, so it is never opened. Ours carry their place inside (`vlmeta`); for others a `.json` beside says it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from jaxtyping import Float, Shaped

from voxelstem.errors import IngestError
from voxelstem.sources import raster
from voxelstem.sources.raster import LabelGrid, Raster
from voxelstem.study import Study

PLACE = "voxelstem"
"""Name of the entry in `vlmeta` that says where the voxels lie."""
CHUNKS, BLOCKS = (1, 64, 128, 128), (1, 32, 32, 32)
"""nnU-Net allows 6 MiB and 128 KiB of float32, along the axes (channel, z, y, x)."""
MODALITIES = ("CT", "MR")
MOST_JSON_BYTES = 2**20
AXES = 4


def read(path: Path, *, subject: str) -> Study:
    """Read one CT or MR volume.

    The place comes from the file itself where voxelstem wrote it, else from a `.json` of the same name:
    `{"affine_ras": 4 x 4 numbers in mm for (x, y, z), "modality": "CT" or "MR"}`. Nothing of it is guessed. Voxels of
    our own files are compared with their digest; the format has no checksum, so damage to others can go unseen, which
    the provenance says. nnU-Net's preprocessing takes away Hounsfield units: such a CT is refused.

    Raises:
        IngestError: `missing`, `corrupt`, `too-large`, `not-3d`, `unsupported-dtype`, `bad-affine`, `not-finite`,
            `constant`, `label-map`, `not-hu` (a CT without Hounsfield units) or `wrong-modality`.
    """
    name = raster.shown(path.name)
    parsed, declared = _parse(path)
    study = raster.to_study(parsed, name=name, subject=subject)
    told = study.volumes[0].modality
    if told == declared:
        return study
    if declared == "CT":
        raise IngestError(
            f"'{name}' is said to be a CT, and its values are no Hounsfield units; they were probably normalised",
            code="not-hu",
            hint="take the scan from before nnU-Net's preprocessing: its raw dataset",
        )
    raise IngestError(
        f"'{name}' is said to be {declared}, and its values look like {told}",
        code="wrong-modality",
        hint="put right what is said of it",
    )


def read_labels(path: Path) -> LabelGrid:
    """Read a mask of class numbers, turned to RAS+. nnU-Net's -1 (outside of the cropped scan) becomes background.

    Raises:
        IngestError: as for `read`, and `not-labels`.
    """
    parsed, _ = _parse(path)
    if parsed.array.dtype.kind == "i":
        np.maximum(parsed.array, 0, out=parsed.array)
    return raster.to_labels(parsed, name=raster.shown(path.name))


def pack(array: Shaped[np.ndarray, "channel i j k"], affine_ras: Float[np.ndarray, "4 4"], modality: str) -> bytes:
    """Make the bytes of a `.b2nd` file in nnU-Net's axis order, with its place inside. Equal input, equal bytes."""
    turned: Any = np.ascontiguousarray(np.transpose(array, (0, 3, 2, 1)))
    packed: Any = blosc2.asarray(
        turned,
        chunks=tuple(map(min, CHUNKS, turned.shape)),
        blocks=tuple(map(min, BLOCKS, turned.shape)),
        cparams=blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=5, typesize=turned.dtype.itemsize, nthreads=1),
    )
    place: dict[str, Any] = {"affine_ras": affine_ras.tolist(), "modality": modality}
    place["sha256"] = _digest(turned, place)
    packed.schunk.vlmeta[PLACE] = json.dumps(place, sort_keys=True)
    return bytes(packed.to_cframe())


def _parse(path: Path) -> tuple[Raster, str]:
    name = raster.shown(path.name)
    packed = raster.read_bytes(path)
    try:
        how: dict[str, Any] = {"mode": "r", "dparams": blosc2.DParams(nthreads=1)}
        opened: Any = blosc2.open(str(path), **how)
        if not isinstance(opened, blosc2.NDArray):
            raise raster.corrupt(name, "it holds no plain array")
        inside = _inside(opened)
        _check_kind(name, tuple(int(edge) for edge in opened.shape), opened.dtype)
        array: Any = opened[:]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as problem:
        raise raster.corrupt(name, f"blosc2 cannot read it ({type(problem).__name__})") from problem
    if inside is None and not path.with_suffix(".json").is_file():
        raise _no_place(name, "neither it nor a .json of the same name says where its voxels lie")
    place = _place(inside if inside is not None else _beside(path, name), name)
    notes = ()
    if inside is None:
        notes = ("placed by a .json beside it; the file has no checksum, and intensities may be normalised",)
    elif place.get("sha256") != _digest(array, place):
        raise raster.corrupt(name, "its voxels, or their place, are not those that were written")
    affine = np.array(place["affine_ras"], np.float64)
    raster.check_placed(affine, name=name)
    voxels = np.transpose(array[0], (2, 1, 0))
    sha256 = raster.digest(packed)
    return Raster(array=voxels, affine_ras=affine, source_format="b2nd", sha256=sha256, notes=notes), place["modality"]


def _inside(opened: Any) -> Any:
    kept = opened.schunk.vlmeta
    return kept[PLACE] if PLACE in kept.getall() else None


def _check_kind(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in "iuf" or dtype.itemsize > 8:  # noqa: PLR2004 - float64 and int64
        raise IngestError(f"'{name}' stores {dtype}", code="unsupported-dtype", hint="give one real number a voxel")
    raster.check_size(name, shape, dtype.itemsize)
    if len(shape) != AXES or shape[0] != 1:
        raise IngestError(
            f"'{name}' has the shape {shape}; a scan has (1, z, y, x)",
            code="not-3d",
            hint="give each channel a file of its own",
        )
    raster.spatial_shape(name, shape[1:])


def _beside(path: Path, name: str) -> str:
    beside = path.with_suffix(".json")
    if beside.stat().st_size > MOST_JSON_BYTES:
        raise _no_place(name, f"the .json beside it is longer than {MOST_JSON_BYTES} bytes")
    try:
        return beside.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise _no_place(name, "the .json beside it is no text") from problem


def _place(text: Any, name: str) -> Mapping[str, Any]:
    try:
        said = json.loads(text)
        affine = np.array(said["affine_ras"], np.float64)
        if affine.shape != (4, 4) or said["modality"] not in MODALITIES:
            raise ValueError("another shape")
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise _no_place(name, "what is said of its place cannot be understood") from problem
    return said


def _no_place(name: str, what: str) -> IngestError:
    return IngestError(
        f"'{name}': {what}",
        code="bad-affine",
        hint='write {"affine_ras": [4 x 4 numbers in mm], "modality": "MR"} into a .json of the same name',
    )


def _digest(array: Shaped[np.ndarray, "channel z y x"], place: Mapping[str, Any]) -> str:
    meaning = json.dumps([array.shape, array.dtype.str, place["affine_ras"], place["modality"]])
    return hashlib.sha256(meaning.encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
