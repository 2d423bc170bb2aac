from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.heads.neighbours import nearest, softened, unit


def naive(rows: np.ndarray, asked: np.ndarray, count: int, hidden: list[int]) -> list[tuple[float, int]]:
    found = []
    for place, row in enumerate(rows):
        if place not in hidden:
            product = sum(float(a) * float(b) for a, b in zip(row, asked, strict=True))
            lengths = math.sqrt(sum(float(a) ** 2 for a in row)) * math.sqrt(sum(float(b) ** 2 for b in asked))
            found.append((-product / lengths, place))
    return [(-cosine, place) for cosine, place in sorted(found)[:count]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 12), dim=st.integers(2, 5))
def test_the_nearest_are_those_of_the_largest_cosines(seed: int, count: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    rows, asked, hidden = rng.normal(size=(9, dim)), rng.normal(size=dim), rng.random(9) < 0.3
    hidden[0] = False
    found = nearest(unit(rows), asked, count, hidden=hidden)
    wanted = naive(rows, asked, count, np.flatnonzero(hidden).tolist())
    assert found.places.tolist() == [place for _, place in wanted]
    assert found.cosines == pytest.approx([cosine for cosine, _ in wanted])


def test_shares_are_a_softmax_of_cosines_and_do_not_overflow() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    found = nearest(unit(rows), np.array([2.0, 0.1]), 3)
    cosines = found.cosines.tolist()
    total = sum(math.exp(cosine / 0.07) for cosine in cosines)
    assert found.shares(0.07) == pytest.approx([math.exp(cosine / 0.07) / total for cosine in cosines])
    assert found.shares(1e-6).tolist() == [1.0, 0.0, 0.0]


def test_equal_rows_keep_their_order_and_a_row_of_nothing_is_no_trouble() -> None:
    rows = unit(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    assert nearest(rows, np.array([3.0, 0.0]), 9).places.tolist() == [1, 2, 0]
    assert nearest(rows, np.zeros(2), 2).cosines.tolist() == [0.0, 0.0]


def test_what_cannot_be_asked_is_refused() -> None:
    rows = unit(np.eye(2))
    with pytest.raises(ValueError, match="cannot be the nearest"):
        nearest(rows, np.ones(2), 1, hidden=np.ones(2, bool))
    with pytest.raises(ValueError, match="cannot be the nearest"):
        nearest(rows, np.ones(2), 0)
    with pytest.raises(ValueError, match="must be positive"):
        nearest(rows, np.ones(2), 1).shares(0.0)


def test_votes_of_few_are_never_certain_and_keep_their_order() -> None:
    shares = np.sort(np.random.default_rng(0).random(20))
    for voters in (1, 3, 5, 50):
        soft = [softened(np.array([1 - share, share]), voters) for share in shares]
        assert all(pair.sum() == pytest.approx(1) and 0 < pair.min() for pair in soft)
        assert np.argsort([pair[1] for pair in soft]).tolist() == list(range(20))
        assert softened(np.array([0.0, 1.0, 0.0]), voters).max() == pytest.approx((voters + 1 / 3) / (voters + 1))
