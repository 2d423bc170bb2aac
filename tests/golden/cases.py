"""What the peer and ours are both asked: weights drawn from the names of tensors, blocks and scans made by formula.

Nothing here knows either implementation. The answers of the peer (`spectre-fm`) are kept in `spectre.npz`, its names
and shapes in `spectre.json`; `benchmarks/parity.py --write` makes both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Triple = tuple[int, int, int]

ANSWERS = Path(__file__).with_name("spectre.npz")
SHAPES = Path(__file__).with_name("spectre.json")
TOLERANCE = 1e-5
SAMPLES = 256

SIZES = ("small", "base", "large")
BLOCK: Triple = (128, 128, 64)
BLOCKS: tuple[Triple, ...] = (BLOCK, (80, 48, 24))
"""The size that the models were made for, and an odd one that takes less than a second."""
GRIDS: tuple[Triple, ...] = ((1, 1, 1), (2, 2, 2), (4, 3, 1), (4, 4, 5))
EPSILONS = (1e-5, 1e-6)
HEADS = {"image_head": 2160, "text_head": 1024}
WINDOWED: tuple[Triple, ...] = (
    (128, 128, 64),
    (300, 260, 130),
    (257, 255, 63),
    (129, 383, 191),
    (100, 90, 40),
    (127, 256, 129),
    (128, 31, 200),
)
"""Whole scans: fitting, odd, and shorter than a block along some axes or all."""
SCANS: tuple[Triple, ...] = ((300, 260, 130), (150, 131, 50))
"""Whole scans that are embedded."""
TURNED: tuple[tuple[Triple, int, float], ...] = (
    ((8, 8, 8), 90, 1000.0),
    ((8, 8, 8), 96, 1000.0),
    ((5, 3, 3), 90, 1000.0),
    ((4, 3, 1), 90, 100.0),
    ((1, 1, 1), 96, 100.0),
)
"""Grid, head dimension and base of rotary positions."""


def uniform(name: str, count: int) -> np.ndarray:
    """Numbers in [-1, 1), float32, that are the same on every machine and for ever.

    A counter-based generator is keyed by the name's sha256; only its raw words are used, whose stream numpy promises
    never to change (its distributions may change). Four 16-bit numbers to a word: 340 million take two seconds.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-count // 4))
    values = words.astype("<u8", copy=False).view("<i2")[:count].astype(np.float32)
    values /= np.float32(32768)
    return values


def tensor(part: str, name: str, shape: Sequence[int]) -> Tensor:
    """One tensor of a state, drawn from its name: activations stay near 1 through the whole depth.

    Matrices keep the variance of what they multiply, so that attention is far from uniform and a wrong order of rows
    cannot hide; norms and gains are 1 ± 0.1, layer scales 0.5 ± 0.1, tokens have a spread of 0.5, biases one of 0.02.
    """
    values = uniform(f"{part}/{name}", math.prod(shape))
    leaf = name.rpartition(".")[2]
    if leaf in ("weight_g", "original0") or ("norm" in name and leaf == "weight"):
        values = 1 + np.float32(0.1) * values
    elif leaf == "gamma":
        values = np.float32(0.5) + np.float32(0.1) * values
    else:
        matrix = math.prod(shape[1:]) ** -0.5 * (0.05 if name == "patch_proj.weight" else 1)
        spread = 0.5 if "token" in leaf else 0.02 if len(shape) == 1 else matrix
        values *= np.float32(spread * math.sqrt(3))
    return torch.from_numpy(values.reshape(tuple(shape)))


def periods(head_dim: int, base: float) -> Tensor:
    """What the buffer `rope.periods` holds (SPECTRE, arXiv 2511.17209): base^(2k / (head_dim / 3))."""
    return base ** (2 * torch.arange(head_dim // 6, dtype=torch.float32) / (head_dim // 3))


def fill(part: str, shapes: Mapping[str, Sequence[int]], *, rope_base: float = 0.0) -> dict[str, Tensor]:
    """A whole state under the peer's names; the part (`backbone`, `combiner`, …) makes equal names differ."""

    def one(name: str, shape: Sequence[int]) -> Tensor:
        return periods(6 * shape[0], rope_base) if name == "rope.periods" else tensor(part, name, shape)

    return {name: one(name, shape) for name, shape in shapes.items()}


ROPE_BASES = {"backbone": 1000.0, "combiner": 100.0}


def scan(shape_ijk: Triple) -> np.ndarray:
    """A scan in whole HU (int16) by integer arithmetic: structure in every direction, noise, a corner of pure air."""
    i, j, k = np.ogrid[tuple(slice(0, size) for size in shape_ijk)]
    waves = 12 * wave(2 * i + j, 83) - 9 * wave(3 * j + k, 61) + 7 * wave(5 * k + i, 47)
    noise = (128 * uniform(f"scan {shape_ijk}", math.prod(shape_ijk))).astype(np.int16).reshape(shape_ijk)
    hu = (waves + noise - 500).astype(np.int16)
    # More than half along two axes: whole blocks of it hold one value.
    hu[: shape_ijk[0] // 2 + 1, : shape_ijk[1] // 2 + 1] = -1024
    return hu


def wave(steps: np.ndarray, period: int) -> np.ndarray:
    """A triangular wave of whole numbers from 0 to `period`."""
    return np.abs(steps % (2 * period) - period)


def block(shape_ijk: Triple) -> Tensor:
    """A windowed block, (1, 1, i, j, k) in [0, 1]."""
    hu = torch.from_numpy(scan(shape_ijk)).float()
    return ((hu + 1000) / 2000).clamp(0, 1)[None, None]


def described(dim: int, grid: Triple) -> Tensor:
    """Descriptions of the blocks of a scan, (1, n, dim)."""
    count = math.prod(grid)
    return torch.from_numpy(uniform(f"described {dim} {grid}", count * dim).reshape(1, count, dim))


def queries(grid: Triple, head_dim: int) -> Tensor:
    """Something to turn, (token, head_dim)."""
    count = math.prod(grid)
    return torch.from_numpy(uniform(f"queries {grid}", count * head_dim).reshape(count, head_dim))


def digest(answer: Tensor) -> np.ndarray:
    """A few numbers that stand for many: the largest size, root mean square and mean, then samples in order."""
    flat = answer.detach().double().flatten().numpy()
    picked = flat[[index * 2654435761 % len(flat) for index in range(SAMPLES)]] if len(flat) > SAMPLES else flat
    return np.concatenate([[np.abs(flat).max(), math.sqrt((flat**2).mean()), flat.mean()], picked])


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """max|a - b| / max|b| of two digests; the maximum of b is that of the whole answer."""
    if found.shape != wanted.shape:
        return math.inf
    return float(np.abs(found - wanted).max() / wanted[0])


def corners(blocks: Tensor) -> Tensor:
    """First, middle and last voxel and the mean of each block: where it was cut and in which order it comes."""
    flat = blocks.flatten(1)
    middle = flat.shape[1] // 2 + 37
    return torch.cat([flat[:, [0, middle, -1]].double(), flat.double().mean(dim=1, keepdim=True)], dim=1)
