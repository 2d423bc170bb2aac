"""A scan in a thousand bytes: enough to find what may be a copy of it among 250,000, without opening one of them.

A thumbnail is the body's box as 10 x 10 x 10 cells, and how large the box is in millimetres. Storage order, spacing,
noise, kernel, offset and rounding hardly touch it. A crop does: so a thumbnail is compared as it is and as it would
look after some crops (`CROPS`), which needs nothing but the thumbnail.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8
from scipy import ndimage
from scipy.fft import dct

from voxelstem.resampling import grid_coordinates, weights

CELLS = 10
MAX_BYTES = 1024
HEADER = struct.Struct("<2s4s3f")
"""A mark, the modality, and the box's edges along R, A and S in millimetres."""
MARK = b"t1"
LOOK = 64
"""Voxels looked at along each axis, at least; a scan is thinned to fewer than twice as many."""
SEEN_HU = (-1000.0, 300.0)
BODY_HU = -400.0
DARK = 0.15
"""What is darker than this share of the range belongs to the background, where values have no unit."""
EDGE_SHARE = 0.05
"""A plane lies inside the box when it holds this share of what the fullest plane holds."""
WAVES = 6
"""Cosines up to this many half waves over the box, summed over the axes, tell one picture from another."""
LEAN = 0.8
"""Finer waves are weaker in every scan; weighed by this power of their number they count about alike."""
SIZE_TURN = 3.0
"""How fast boxes of different size become unlike: radians for a factor e."""

Corner = tuple[float, float, float]
Cut = tuple[Corner, Corner]
"""A part of a box, from one corner to the other as shares of its edges."""
WHOLE: Cut = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _cuts() -> tuple[Cut, ...]:
    """List the crops that are looked for: one side cut off, both ends of an axis, or some of every axis."""
    spans = {0.85: (0.0, 0.15), 0.7: (0.0, 0.15, 0.3)}
    cuts: list[Cut] = []
    for axis in range(3):
        for kept, starts in spans.items():
            for start in starts:
                low, high = [0.0] * 3, [1.0] * 3
                low[axis], high[axis] = start, start + kept
                cuts.append(((low[0], low[1], low[2]), (high[0], high[1], high[2])))
    kept, free = 0.86, 0.14
    corners = [(i * free, j * free, k * free) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    for i, j, k in [*corners, (free / 2, free / 2, free / 2)]:
        cuts.append(((i, j, k), (i + kept, j + kept, k + kept)))
    return tuple(cuts)


CROPS = _cuts()
_NUMBERS = np.array([(i, j, k) for i, j, k in np.ndindex((WAVES + 1,) * 3) if 0 < i + j + k <= WAVES])
DIMENSIONS = len(_NUMBERS) + 6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Thumbnail:
    """What the bytes say."""

    modality: str
    extent_mm: tuple[float, float, float]
    """Edges of the box along R, A and S."""
    picture: UInt8[np.ndarray, "cell cell cell"]
    """The box's cells from its darkest (0) to its brightest (255)."""


def thumbnail(array: Shaped[np.ndarray, "channel i j k"], affine_ras: Float[np.ndarray, "4 4"], modality: str) -> bytes:
    """Draw the thumbnail of a volume; of several channels the first is taken.

    Args:
        array: HU for `CT`, else intensity; finite, in RAS+.
        affine_ras: Only the voxels' edge lengths matter.
        modality: DICOM's word.

    Returns:
        At most 1 KiB; equal volumes give equal bytes.

    Raises:
        ValueError: the modality is no word of one to four ASCII characters.
    """
    word = modality.encode("ascii", "replace")
    if not 0 < len(word) <= 4 or word != modality.encode():  # noqa: PLR2004 - its place in the header
        raise ValueError(f"a modality is a word of one to four letters, got {len(modality)}")
    steps = [max(1, size // LOOK) for size in array.shape[1:]]
    seen = np.asarray(array[0, :: steps[0], :: steps[1], :: steps[2]], np.float32)
    edges_mm = np.linalg.norm(affine_ras[:3, :3], axis=0) * np.array(array.shape[1:]) / np.array(seen.shape)
    seen, body = _body(seen, modality)
    box = [_inside(body.mean(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    extent = [(high - low) * float(edge) for (low, high), edge in zip(box, edges_mm, strict=True)]
    picture = seen[tuple(slice(low, high) for low, high in box)]
    for axis in range(3):
        picture = _along(_cells(picture.shape[axis]), picture, axis)
    low, high = float(picture.min()), float(picture.max())
    rounded = np.rint((picture - low) * (255 / (high - low) if high > low else 0.0)).astype(np.uint8)
    return HEADER.pack(MARK, word, *extent) + rounded.tobytes()


def unpack(data: bytes) -> Thumbnail:
    """Read a thumbnail's bytes.

    Raises:
        ValueError: these are not the bytes of a thumbnail.
    """
    if not is_thumbnail(data):
        raise ValueError(f"{len(data)} bytes that are no thumbnail of this version")
    _, word, i, j, k = HEADER.unpack_from(data)
    picture = np.frombuffer(data, np.uint8, offset=HEADER.size).reshape((CELLS,) * 3)
    return Thumbnail(modality=word.rstrip(b"\0").decode("ascii"), extent_mm=(i, j, k), picture=picture)


def is_thumbnail(data: bytes) -> bool:
    """Tell whether these are the bytes of a thumbnail of this version."""
    return len(data) == HEADER.size + CELLS**3 and data.startswith(MARK)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Album:
    """Many thumbnails as arrays: a quarter of a gigabyte for 250,000."""

    modality: Shaped[np.ndarray, " scan"]
    extent_mm: Float32[np.ndarray, "scan 3"]
    pictures: UInt8[np.ndarray, "scan cells"]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.modality)

    def take(self, which: Int64[np.ndarray, " chosen"]) -> Album:
        """Return some of them."""
        return Album(modality=self.modality[which], extent_mm=self.extent_mm[which], pictures=self.pictures[which])


def album(thumbnails: Sequence[bytes]) -> Album:
    """Put thumbnails side by side.

    Raises:
        ValueError: as `unpack`.
    """
    count = len(thumbnails)
    modality = np.empty(count, dtype="U4")
    extent, pictures = np.empty((count, 3), np.float32), np.empty((count, CELLS**3), np.uint8)
    for at, data in enumerate(thumbnails):
        one = unpack(data)
        modality[at], extent[at], pictures[at] = one.modality, one.extent_mm, one.picture.ravel()
    return Album(modality=modality, extent_mm=extent, pictures=pictures)


def embed(thumbnails: Sequence[bytes] | Album, cut: Cut = WHOLE) -> Float32[np.ndarray, "scan dim"]:
    """Turn thumbnails into unit vectors whose product says how alike scans look: 1 for copies.

    Half of a vector's length is the picture's low spatial frequencies (cosine transform, as in perceptual image
    hashes) without the mean, half is the size of the box.

    Args:
        thumbnails: As bytes, or put side by side.
        cut: Which part of each box is to be seen, as if the scan had been cropped so.

    Returns:
        (scan, `DIMENSIONS`) float32.
    """
    many = thumbnails if isinstance(thumbnails, Album) else album(thumbnails)
    waves = _waves(cut)
    vectors = np.empty((len(many), DIMENSIONS), np.float32)
    shares = np.array(cut[1]) - np.array(cut[0])
    turn = SIZE_TURN * np.log(np.maximum(many.extent_mm * shares, 1e-3))
    vectors[:, -6:-3], vectors[:, -3:] = np.cos(turn), np.sin(turn)
    vectors[:, -6:] /= np.sqrt(6.0)  # three pairs of length one each: together the square root of a half
    for at in range(0, len(many), 4096):
        part = many.pictures[at : at + 4096].astype(np.float32) @ waves.T
        length = np.linalg.norm(part, axis=1, keepdims=True)
        # A picture of one single grey has no waves; the first one stands for it, so that the vector has length one.
        part[length[:, 0] < 1e-3, 0] = 1.0  # noqa: PLR2004 - a step of grey in one cell gives a thousand times as much
        vectors[at : at + 4096, :-6] = part / np.linalg.norm(part, axis=1, keepdims=True) * np.sqrt(0.5)
    return vectors


def _waves(cut: Cut) -> Float32[np.ndarray, "wave cells"]:
    """Matrix from a picture's cells to its weighed cosines after a cut; both are linear, so one matrix does it."""
    per_axis = [
        dct(_resize(low, high), axis=0, norm="ortho")[: WAVES + 1] for low, high in zip(cut[0], cut[1], strict=True)
    ]
    i, j, k = _NUMBERS.T
    every = np.einsum("wa,wb,wc->wabc", per_axis[0][i], per_axis[1][j], per_axis[2][k])
    weigh = np.linalg.norm(_NUMBERS, axis=1) ** LEAN
    return (every * weigh[:, None, None, None]).reshape(len(_NUMBERS), -1).astype(np.float32)


def _resize(low: float, high: float) -> Float[np.ndarray, "cell cell"]:
    return weights(_places(CELLS, low * CELLS, (high - low) * CELLS), CELLS, step=high - low)


def _places(size: int, start: float, length: float) -> Float[np.ndarray, "cell"]:
    return np.clip(grid_coordinates(CELLS, start=start, step=length / CELLS), -0.5, size - 0.5)


def _cells(size: int) -> Float32[np.ndarray, "cell in"]:
    return weights(_places(size, 0.0, size), size, step=size / CELLS).astype(np.float32)


def _along(
    matrix: Float32[np.ndarray, "out in"], array: Float32[np.ndarray, "i j k"], axis: int
) -> Float32[np.ndarray, "a b c"]:
    return np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)


def _body(
    seen: Float32[np.ndarray, "i j k"], modality: str
) -> tuple[Float32[np.ndarray, "i j k"], Bool[np.ndarray, "i j k"]]:
    """Clip what says little, and tell the body from the air around it."""
    # Averaged over neighbours, or noise in the air of an MR scan would count as body.
    calm = ndimage.uniform_filter(seen, 3, mode="nearest")
    if modality == "CT":
        return np.clip(seen, *SEEN_HU), calm > BODY_HU
    low, high = (float(value) for value in np.percentile(calm, [1, 99]))
    return np.clip(seen, low, high), calm > low + DARK * (high - low)


def _inside(filled: Float[np.ndarray, " plane"]) -> tuple[int, int]:
    """From the first to behind the last plane that holds some of the body; all planes where none does."""
    planes = np.flatnonzero(filled >= EDGE_SHARE * filled.max()) if filled.max() > 0 else np.arange(len(filled))
    return int(planes[0]), int(planes[-1]) + 1
