from __future__ import annotations

import numpy as np
import pytest

from voxelstem.store.nearest import NOBODY, Best, Nearest


def vectors(count: int, seed: int = 0, clusters: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(clusters, 16))[rng.integers(0, clusters, count)] + 0.4 * rng.normal(size=(count, 16))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def naive(queries: np.ndarray, base: np.ndarray, *, most: int, floor: float, own: bool) -> list[list[int]]:
    found = []
    for place, query in enumerate(queries):
        scores = {at: float(query @ vector) for at, vector in enumerate(base) if not (own and at == place)}
        order = sorted((at for at in scores if scores[at] >= floor), key=lambda at, of=scores: -of[at])
        found.append(order[:most])
    return found


@pytest.mark.parametrize("own", [True, False])
def test_the_best_are_those_of_an_exhaustive_search(own):
    base, queries = vectors(200), vectors(200, seed=0 if own else 1)
    best, asked = Best.empty(200, most=4, floor=0.8), Best.empty(200, most=4, floor=0.8)
    Nearest(base).search(queries, best, asked, among_themselves=own)
    assert [[at for at in row if at != NOBODY] for row in asked.ids.tolist()] == naive(
        base, queries, most=4, floor=0.8, own=own
    )
    assert [[at for at in row if at != NOBODY] for row in best.ids.tolist()] == naive(
        queries, base, most=4, floor=0.8, own=own
    )


def test_a_crowd_in_which_everything_is_near_gives_the_same_best():
    rng = np.random.default_rng(2)
    base = rng.normal(1.0, 0.05, (400, 16)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    best, asked = (Best.empty(400, most=3, floor=0.5) for _ in range(2))
    Nearest(base).search(base, best, asked, among_themselves=True)
    products = (base.astype(float) @ base.T.astype(float)) - 9 * np.eye(400)
    wanted = -np.sort(-products, axis=1)[:, :3]
    # By score, not by name: many are equally near.
    assert best.scores == pytest.approx(wanted, abs=1e-6)
    assert asked.scores == pytest.approx(wanted, abs=1e-6)
    assert np.take_along_axis(products, best.ids, axis=1) == pytest.approx(wanted, abs=1e-6)


def test_lists_find_nearly_all_of_an_exhaustive_search():
    base = vectors(3000, clusters=200)
    best, all_of = Best.empty(3000, most=5, floor=0.7), Best.empty(3000, most=5, floor=0.7)
    index = Nearest(base, exact=100)
    assert len(index._lists) > 10
    index.search(base, best, Best.empty(3000, most=5, floor=0.7), among_themselves=True)
    Nearest(base).search(base, all_of, Best.empty(3000, most=5, floor=0.7), among_themselves=True)
    wanted = set(all_of.pairs())
    assert len(wanted) > 3000
    assert len(wanted & set(best.pairs())) / len(wanted) > 0.98


def test_several_searches_add_up_and_a_vector_is_found_once_with_its_better_score():
    base = np.eye(3, dtype=np.float32)
    best = Best.empty(1, most=2, floor=0.1)
    index = Nearest(base)
    for query in ([0.6, 0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.2, 0.9]):
        index.search(np.array([query], np.float32), best, Best.empty(3, most=1, floor=0.1), among_themselves=False)
    assert best.ids.tolist() == [[2, 0]] or best.ids.tolist() == [[2, 1]]
    assert best.scores[0] == pytest.approx([0.9, 0.8])


def test_a_product_at_the_floor_counts_and_one_below_does_not():
    index, query = Nearest(np.eye(2, dtype=np.float32)), np.array([[0.5, 0.25]], np.float32)
    best = Best.empty(1, most=2, floor=0.5)
    index.search(query, best, Best.empty(2, most=2, floor=0.5), among_themselves=False)
    assert list(best.pairs()) == [(0, 0)]


@pytest.mark.parametrize(("base", "queries"), [(0, 3), (3, 0), (1, 1)])
def test_few_or_no_vectors_are_no_special_case(base, queries):
    best, asked = (Best.empty(count, most=2, floor=-1.0) for count in (queries, base))
    Nearest(vectors(base)).search(vectors(queries), best, asked, among_themselves=base == queries)
    assert list(best.pairs()) == []
    assert list(asked.pairs()) == []


def test_the_same_vectors_give_the_same_lists():
    one, two = (Nearest(vectors(500), exact=10) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one._lists, two._lists, strict=True))
