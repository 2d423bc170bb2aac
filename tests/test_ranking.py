from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.ranking import CHUNK, best_rows, scores_of


def units(rows: int, dim: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def naive(stored: np.ndarray, keys: np.ndarray, query: np.ndarray, top: int, hidden: np.ndarray) -> list[tuple]:
    rows = [
        (-sum((stored[row].astype(np.float64) * query).tolist()), keys[row].tobytes(), row)
        for row in range(len(stored))
        if not hidden[row]
    ]
    return sorted(rows)[:top]


@settings(max_examples=30)
@given(
    rows=st.integers(1, 60),
    dim=st.integers(1, 7),
    kinds=st.integers(1, 8),
    top=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_the_best_are_those_of_a_plain_sort_with_ties_in_the_order_of_keys(rows, dim, kinds, top, seed):
    random = np.random.default_rng(seed)
    # Few different rows, so that many tie.
    stored = units(kinds, dim, seed)[random.integers(0, kinds, rows)].astype(np.float16)
    keys = random.permuted(np.arange(32 * rows, dtype=np.uint64) % 251).astype(np.uint8).reshape(rows, 32)
    hidden = random.random(rows) < 0.2
    query = units(1, dim, seed + 100)[0]
    scores = scores_of(torch.from_numpy(stored), torch.from_numpy(query[None]))[0]
    found, exact = best_rows(torch.from_numpy(stored), keys, query, scores, top, hidden)
    wanted = naive(stored, keys, query, top, hidden)
    assert len(found) == len(wanted)
    assert exact.tolist() == [-line[0] for line in wanted]
    assert [keys[row].tobytes() for row in found] == [line[1] for line in wanted]


def test_what_float32_puts_in_the_wrong_order_is_settled_in_float64():
    # A large number, small ones that float32 loses beside it, and the large one taken away again.
    small = np.float16(2.0**-14)
    first = np.zeros(512, np.float16)
    first[0], first[1:400], first[-1] = 1.0, small, -1.0
    second = np.zeros(512, np.float16)
    second[1:401] = small
    stored, query = np.stack([first, second]), np.ones(512, np.float32)
    keys = np.zeros((2, 32), np.uint8)
    keys[1] = 1
    scores = torch.tensor([400 * float(small), 0.0])  # as wrong as the bound allows a sum of these lengths to be
    scores[1] = scores[0] - 512 * 2.0**-24
    rows, exact = best_rows(torch.from_numpy(stored), keys, query, scores, 1, None)
    assert rows.tolist() == [1]
    assert exact.tolist() == [400 * float(small)]


@pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_those_of_float64_within_their_bound(rows: int, queries: int, threads: int):
    stored, asked = units(rows, 24, 0).astype(np.float16), units(queries, 24, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = scores_of(torch.from_numpy(stored), torch.from_numpy(asked)).numpy()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    wanted = asked.astype(np.float64) @ stored.astype(np.float64).T
    assert np.abs(found - wanted).max() <= 24 * 2.0**-24 * 1.01


def test_where_all_are_hidden_nothing_is_found():
    stored = torch.ones(3, 4, dtype=torch.float16)
    rows, exact = best_rows(stored, np.zeros((3, 32), np.uint8), np.ones(4), torch.ones(3), 2, np.ones(3, bool))
    assert (len(rows), len(exact)) == (0, 0)


def test_questions_of_several_threads_leave_the_number_of_threads_as_it_was():
    stored, asked = torch.from_numpy(units(4 * CHUNK, 24, 0).astype(np.float16)), torch.from_numpy(units(1, 24, 1))
    before, after = torch.get_num_threads(), []
    torch.set_num_threads(2)

    def ask() -> None:
        for _ in range(10):
            scores_of(stored, asked)
        after.append(torch.get_num_threads())

    try:
        askers = [threading.Thread(target=ask) for _ in range(3)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert [*after, torch.get_num_threads()] == [2] * 4
    finally:
        torch.set_num_threads(before)
