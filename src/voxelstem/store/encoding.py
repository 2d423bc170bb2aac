"""Bring a volume into the form in which it is stored: int16, exact where its values allow it, compressed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import blosc2
import numpy as np
from jaxtyping import Float, Int16

from voxelstem.errors import IngestError
from voxelstem.store.reader import decode, digest
from voxelstem.store.records import Triple
from voxelstem.store.thumbnails import thumbnail
from voxelstem.study import Acquisition, LabelMap, Provenance, Report, Study, Volume

CHUNKS = (1, 64, 64, 64)
BLOCKS = (1, 16, 32, 32)
"""Measured on random crops (`benchmarks/crops.py`). A crop decodes the blocks that it touches, through memory for one
chunk: half a MiB stays in the cache of a core. Longer rows along k are copied faster."""
AIR_HU = -500.0
"""Halfway between air and water: what is denser belongs to the patient (or the table)."""
INT16 = np.iinfo(np.int16)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A label map as the store keeps it."""

    key: str
    frame: bytes
    classes: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """A volume as the store keeps it. Made from the volume alone, so it can be made in another process."""

    key: str
    voxels: str
    frame: bytes
    """The bytes of its `.b2nd` file."""
    modality: str
    channels: int
    shape_ijk: Triple
    spacing_mm: tuple[float, float, float]
    affine_ras: Float[np.ndarray, "4 4"]
    body_start_ijk: Triple
    body_size_ijk: Triple
    slope: float
    intercept: float
    provenance: Provenance
    labels: Packed | None
    acquisition: Acquisition = field(default_factory=Acquisition)
    thumbnail: bytes = b""
    native: Encoded | None = None
    """The scan before it was resampled, where it is to be kept; with voxel labels on its own grid, if any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedStudy:
    """A study ready to be written. `subject` is a pseudonym."""

    subject: str
    volumes: tuple[Encoded, ...]
    report: Report | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prepared:
    """A volume as it will be stored, before it is packed. It holds nothing of the floats that it was made from."""

    facts: Encoded
    """All but the frame."""
    stored: Int16[np.ndarray, "channel i j k"]

    def packed(self) -> Encoded:
        """Pack the voxels."""
        return replace(self.facts, frame=pack(self.stored))


def encode_study(study: Study) -> EncodedStudy:
    """Bring a study into the form in which it is stored."""
    return EncodedStudy(
        subject=study.subject,
        volumes=tuple(encode(volume) for volume in study.volumes),
        report=study.report,
        labels=study.labels,
    )


def encode(volume: Volume) -> Encoded:
    """Bring a volume into the form in which it is stored: int16, exact where its values allow it.

    Raises:
        IngestError: a value is not finite (code `not-finite`).
    """
    return prepare(volume).packed()


def prepare(volume: Volume) -> Prepared:
    """Do all of `encode` that needs the floats; who lets go of them before `packed` saves their memory.

    Raises:
        IngestError: a value is not finite (code `not-finite`).
    """
    stored, slope, intercept, note = quantise(volume.array)
    voxels = digest(stored, slope, intercept)
    start, size = body_box(volume)
    notes = volume.provenance.notes + ((note,) if note else ())
    facts = Encoded(
        key=_key(voxels, volume),
        voxels=voxels,
        frame=b"",
        modality=volume.modality,
        channels=volume.array.shape[0],
        shape_ijk=volume.shape_ijk,
        spacing_mm=volume.spacing_mm,
        affine_ras=volume.affine_ras.astype(np.float64),
        body_start_ijk=start,
        body_size_ijk=size,
        slope=slope,
        intercept=intercept,
        provenance=replace(volume.provenance, notes=notes),
        labels=None if volume.labels is None else _encode_labels(volume.labels),
        acquisition=volume.acquisition,
        thumbnail=thumbnail(volume.array, volume.affine_ras, volume.modality),
    )
    return Prepared(facts=facts, stored=stored)


def content_key(volume: Volume) -> str:
    """The key that the volume has, or would have, in a store.

    Raises:
        IngestError: a value is not finite (code `not-finite`).
    """
    stored, slope, intercept, _ = quantise(volume.array)
    return _key(digest(stored, slope, intercept), volume)


def _key(voxels: str, volume: Volume) -> str:
    affine = np.round(volume.affine_ras.astype(np.float64), 4) + 0.0  # + 0.0 turns -0.0 into 0.0
    header = {"voxels": voxels, "affine": affine.tolist(), "modality": volume.modality, "dtype": "int16"}
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def quantise(
    array: Float[np.ndarray, "channel i j k"],
) -> tuple[Int16[np.ndarray, "channel i j k"], float, float, str]:
    """Fit values into int16: as they are, shifted, or rounded to 65536 steps between the least and the greatest.

    Returns:
        The stored numbers, slope, intercept, and a note on the largest rounding error ("" where it is exact).

    Raises:
        IngestError: a value is not finite.
    """
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise IngestError(
            "the volume holds values that are not finite (NaN or infinite)",
            code="not-finite",
            hint="export it again, or replace them before ingesting",
        )
    stored = np.empty(array.shape, np.int16)
    if max(-low, high) < 2**24 and high - low <= INT16.max - INT16.min:
        # Whole numbers below 2^24 are exact in float32, so the shift rounds nothing.
        intercept = 0.0 if low >= INT16.min and high <= INT16.max else low - INT16.min
        if all(_keep_exactly(array[tile], stored[tile], intercept) for tile in _tiles(array)):
            return stored, 1.0, intercept, ""
    slope = (high - low) / (INT16.max - INT16.min) or 1.0
    intercept, error = (low - INT16.min * slope if high > low else low), 0.0
    for tile in _tiles(array):
        error = max(error, _keep_rounded(array[tile], stored[tile], slope, intercept))
    return stored, slope, intercept, f"stored as int16 in steps of {slope:.6g}; largest rounding error {error:.6g}"


def _tiles(array: Array) -> Iterator[tuple[slice, ...]]:
    """Cut a volume into planes of the axis along which it lies in one piece in memory, and of its last axis.

    Along the last axis the stored copy lies in one piece. So both are met in whole lines, which matters: a DICOM series
    lies in memory slice after slice, and is turned here. And no step needs a second copy of the volume.
    """
    across = 2 if int(np.argmin(np.abs(array.strides[1:]))) == 0 else 1
    for at in range(array.shape[across]):
        yield tuple(slice(at, at + 1) if axis == across else slice(None) for axis in range(array.ndim))


def _keep_exactly(values: Array, stored: Array, intercept: float) -> bool:
    shifted: Array = values - np.float32(intercept) if intercept else values
    whole: Array = shifted.astype(np.int16, order="K")  # first as the values lie, then turned: twice as fast
    stored[...] = whole
    return bool((whole == shifted).all())


def _keep_rounded(values: Array, stored: Array, slope: float, intercept: float) -> float:
    """Round to steps and return the largest error."""
    steps: Array = values.astype(np.float64, order="K")
    steps -= intercept
    steps /= slope
    np.clip(np.rint(steps, out=steps), INT16.min, INT16.max, out=steps)
    whole: Array = steps.astype(np.int16, order="K")
    stored[...] = whole
    np.subtract(decode(whole, slope, intercept), values, out=steps, dtype=np.float64)
    return float(np.abs(steps, out=steps).max())


def body_box(volume: Volume) -> tuple[Triple, Triple]:
    """Find the box of all voxels of a CT denser than -500 HU, as start and size; else the whole volume."""
    whole = (0, 0, 0), volume.shape_ijk
    if volume.modality != "CT":
        return whole
    sides = [np.zeros(extent, dtype=bool) for extent in volume.shape_ijk]
    for tile in _tiles(volume.array):
        dense: Any = volume.array[tile] > AIR_HU
        over_k = dense.any(axis=3)
        found = (over_k.any(axis=(0, 2)), over_k.any(axis=(0, 1)), dense.any(axis=(0, 1, 2)))
        for side, along, seen in zip(sides, tile[1:], found, strict=True):
            side[along] |= seen
    if not sides[0].any():
        return whole
    i, j, k = ((int(filled[0]), int(filled[-1] - filled[0] + 1)) for filled in map(np.flatnonzero, sides))
    return (i[0], j[0], k[0]), (i[1], j[1], k[1])


def pack(stored: Int16[np.ndarray, "channel i j k"]) -> bytes:
    """Compress to the bytes of a `.b2nd` file. One thread and fixed settings: equal input gives equal bytes."""
    contiguous: Any = np.ascontiguousarray(stored)
    packed: Any = blosc2.asarray(
        contiguous,
        chunks=tuple(map(min, CHUNKS, stored.shape)),
        blocks=tuple(map(min, BLOCKS, stored.shape)),
        cparams=blosc2.CParams(
            codec=blosc2.Codec.LZ4,
            clevel=5,
            typesize=2,
            nthreads=1,
            # By bytes, not bits: 1.4 times as fast to undo, for 2 to 14 % more bytes of a real CT. And never bits
            # together with DELTA, which did not round-trip.
            filters=[blosc2.Filter.SHUFFLE],
            filters_meta=[0],
        ),
    )
    return bytes(packed.to_cframe())


def _encode_labels(labels: LabelMap) -> Packed:
    stored = np.ascontiguousarray(labels.array[None], dtype=np.int16)
    return Packed(key=digest(stored, 1.0, 0.0), frame=pack(stored), classes=dict(labels.classes))
