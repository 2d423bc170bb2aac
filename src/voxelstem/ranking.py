"""The largest products of a query with many 16-bit rows: found in float32, settled in float64."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

CHUNK = 1024
"""Rows that are turned into floats at a time: the 2 MiB of them stay in the cache."""
_TURN = threading.Lock()


def scores_of(stored: Tensor, queries: Float[Tensor, "query out"]) -> Float[Tensor, "query row"]:
    """Products of 16-bit rows with queries, in float32: each errs by at most out * 2^-24 times both lengths.

    Rows are turned into floats a chunk at a time, in as many threads as torch has: on processors without 16-bit
    arithmetic the memory is the limit, and this reads it once.
    """
    scores = torch.empty(len(queries), len(stored))

    def fill(first: int, end: int) -> None:
        buffer = torch.empty(CHUNK, stored.shape[1])
        for low in range(first, end, CHUNK):
            high = min(low + CHUNK, end)
            rows = buffer[: high - low].copy_(stored[low:high])
            if len(queries) == 1:
                torch.mv(rows, queries[0], out=scores[0, low:high])
            else:
                scores[:, low:high] = queries @ rows.T

    with _one_thread_each() as usual:
        threads = max(1, min(usual, len(stored) // CHUNK))
        edges = [len(stored) * part // threads for part in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, edges[:-1], edges[1:]))
    return scores


@contextlib.contextmanager
def _one_thread_each() -> Generator[int]:
    """Torch's own threads rest: the pieces of a chunk are too small to be shared out again.

    Gives the usual number of them. It is the whole process's: questions of several threads wait for each other, or one
    would take for the usual number what another has set.
    """
    with _TURN:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)


def best_rows(
    stored: Tensor,
    keys: UInt8[np.ndarray, "row byte"],
    query: Float[np.ndarray, " out"],
    scores: Tensor,
    top: int,
    hidden: Bool[np.ndarray, " row"] | None,
) -> tuple[Int64[np.ndarray, " found"], Float[np.ndarray, " found"]]:
    """The best rows and their products in float64, out of products in float32.

    Whatever float32 could have put below the last place by its rounding is computed again, so the outcome is that of
    float64 for every row.
    """
    if hidden is not None:
        scores = scores.masked_fill(torch.from_numpy(hidden), -torch.inf)
    count = min(top, len(scores) - (0 if hidden is None else int(hidden.sum())))
    if count == 0:
        return np.zeros(0, np.int64), np.zeros(0)
    # Twice the bound (of this row, and of the last in place), and a share for lengths that rounding made exceed 1.
    slack = 2.1 * len(query) * 2.0**-24
    last = float(torch.topk(scores, count).values[-1])
    rows = torch.nonzero(scores >= last - slack)[:, 0].numpy()
    # Row by row, so that equal rows have equal products wherever they stand.
    wide = query.astype(np.float64)
    exact = np.concatenate(
        [
            (stored[torch.from_numpy(rows[at : at + CHUNK])].double().numpy() * wide).sum(axis=1)
            for at in range(0, len(rows), CHUNK)
        ]
    )
    words = np.ascontiguousarray(keys[rows]).view(">u8")
    order = np.lexsort((*words.T[::-1], -exact))[:count]
    return rows[order], exact[order]
