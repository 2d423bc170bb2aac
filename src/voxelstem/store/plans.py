"""In which order an epoch visits its samples: a pure function of seed and epoch, so no state can be lost."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int64, UInt64


def epoch_order(count: int, *, seed: int, epoch: int) -> Int64[np.ndarray, " count"]:
    """Shuffle `count` places for one epoch: each place once, in an order that any process can work out alone.

    Places are sorted by a keyed hash (SplitMix64's finalizer, Steele et al. 2014, over a key from SHA-256) rather than
    drawn by numpy's generator, whose streams may change with its version.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    key = hashlib.sha256(f"voxelstem epoch {seed} {epoch}".encode()).digest()
    first, second = (np.uint64(int.from_bytes(key[at : at + 8], "little")) for at in (0, 8))
    mixed = _mix(_mix(np.arange(count, dtype=np.uint64) ^ first) ^ second)
    return np.argsort(mixed, kind="stable").astype(np.int64)


def _mix(values: UInt64[np.ndarray, " count"]) -> UInt64[np.ndarray, " count"]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
