"""Search over 250,000 vectors of 512: size, time to build, ms a question, and whether the best are exactly the best.

    python benchmarks/search.py                       the whole table
    python benchmarks/search.py --rows 20000          a quick look

Vectors are drawn around 2,000 centres, so that the best of each question lie close together as those of scans do; a
hundredth of them are copies of others, so that there are ties. The index is made in a temporary folder. Against it
stands the obvious way: all vectors as float32 in memory (twice the size), one product, and a sort.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from voxelstem.index import Entry, Hit, Index

CENTRES, AT_ONCE, TOP, BATCH = 2000, 25_000, 10, 32
SLOWEST_MS, LARGEST_MB = 50, 300


def drawn(rows: int, dim: int, *, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((CENTRES, dim), np.float32)
    made = centres[random.integers(0, CENTRES, rows)] + random.standard_normal((rows, dim), np.float32)
    made[rows // 100 :: 100] = made[: len(made[rows // 100 :: 100])]
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def build(path: Path, rows: int, dim: int) -> tuple[Index, float]:
    """An index, and the seconds that writing it took without drawing."""
    index, seconds = Index.create(path, space="0" * 64, out=dim), 0.0
    for low in range(0, rows, AT_ONCE):
        vectors = drawn(min(AT_ONCE, rows - low), dim, seed=low + 1)
        names = [hashlib.sha256(str(low + place).encode()).hexdigest() for place in range(len(vectors))]
        entries = [
            Entry(key=name, subject="s" + name[:24], vector=vector) for name, vector in zip(names, vectors, strict=True)
        ]
        began = time.perf_counter()
        index = index.add(entries)
        seconds += time.perf_counter() - began
    return index, seconds


def plain(stored: np.ndarray, keys: list[str], query: np.ndarray) -> list[str]:
    """The obvious way."""
    scores = stored @ query
    return [keys[row] for row in sorted(range(len(keys)), key=lambda row: (-scores[row], keys[row]))[:TOP]]


def in_float64(stored: np.ndarray, keys: list[str], query: np.ndarray) -> list[str]:
    """What is right: every product in float64, equal ones in the order of their keys."""
    scores = np.concatenate(
        [
            (part.astype(np.float64) * query).sum(axis=1)
            for part in np.array_split(stored, max(1, len(stored) // 10_000))
        ]
    )
    rows = np.argpartition(-scores, min(5 * TOP, len(scores) - 1))[: 5 * TOP]
    last = np.sort(-scores[rows])[min(TOP, len(rows)) - 1]
    rows = np.flatnonzero(-scores <= last)
    return [keys[row] for row in sorted(rows, key=lambda row: (-scores[row], keys[row]))[:TOP]]


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds by a clock: the wall's, or what this process was given of the processors."""
    began = clock()
    work()
    return 1000 * (clock() - began)


def exactness(index: Index, queries: np.ndarray, found: list[list[Hit]]) -> tuple[int, int]:
    """Of how many questions the best are those of float64, and of how many those of the obvious way."""
    stored, keys = index.vectors(np.arange(len(index))), list(index.keys())
    names = [[hit.key for hit in hits] for hits in found]
    right = sum(in_float64(stored, keys, query) == hits for query, hits in zip(queries, names, strict=True))
    same = sum(plain(stored, keys, query) == hits for query, hits in zip(queries, names, strict=True))
    return right, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--questions", type=int, default=50)
    chosen = parser.parse_args()
    queries = drawn(chosen.questions, chosen.dim, seed=10**9)
    batch = drawn(BATCH, chosen.dim, seed=10**9 + 1)
    with tempfile.TemporaryDirectory() as folder:
        index, seconds = build(Path(folder) / "index", chosen.rows, chosen.dim)
        size = sum(path.stat().st_size for path in index.path.rglob("*")) / 1e6
        print(f"{chosen.rows} x {chosen.dim}: {size:.0f} MB on disk (limit {LARGEST_MB}), written in {seconds:.1f} s")
        opening = timed(lambda: Index.open(index.path))
        index.best(queries[0], TOP)  # the file comes into the system's cache
        alone: dict[int, list[float]] = {1: [], 2: []}
        together: dict[int, list[float]] = {1: [], 2: []}
        busy: dict[int, list[float]] = {1: [], 2: []}
        found: list[list[Hit]] = []
        for number, query in enumerate(queries):
            for threads, times in alone.items():  # interleaved, so that whatever else the machine does meets both
                torch.set_num_threads(threads)
                busy[threads].append(timed(lambda query=query: index.best(query, TOP), time.process_time))
                times.append(timed(lambda query=query: found.append(index.best(query, TOP))))
                if number % 10 == 0:
                    together[threads].append(timed(lambda: index.best_of_each(batch, TOP)) / BATCH)
        print(f"opened in {opening:.0f} ms")
        for threads, times in alone.items():
            one, many = statistics.median(times), statistics.median(together[threads])
            print(
                f"{threads} thread(s): {one:.1f} ms a question (median of {len(times)}, fastest {min(times):.1f}, "
                f"limit {SLOWEST_MS}), {statistics.median(busy[threads]):.1f} ms of processor time; "
                f"in batches of {BATCH} {many:.1f} ms each"
            )
        stored = index.vectors(np.arange(len(index)))
        slow = statistics.median(
            timed(lambda query=query: np.argsort(-(stored @ query))[:TOP]) for query in queries[:5]
        )
        print(f"float32 in memory ({stored.nbytes / 1e6:.0f} MB) and a sort: {slow:.1f} ms a question")
        del stored
        asked = min(10, len(queries))
        right, same = exactness(index, queries[:asked], found[: 2 * asked : 2])
        print(f"the best {TOP} are those of float64 in {right} of {asked} questions, of the obvious way in {same}")
        if right < asked:
            raise SystemExit("not exact")


if __name__ == "__main__":
    main()
