from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.errors import ConfigError
from voxelstem.recall import PROTOCOLS, Protocol, named, ranks, recalls, text_of
from voxelstem.study import Report

WHOLE = Protocol(name="whole-1", section="full", recalls=(1, 3))
POOLED = Protocol(name="pooled-1", section="full", recalls=(1, 3), pools=(4, 8), partitions=20)


def units(rows: int, dim: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((rows, dim))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def naive_rank(queries: np.ndarray, targets: np.ndarray, row: int) -> int:
    scores = [math.fsum(float(a) * float(b) for a, b in zip(queries[row], target, strict=True)) for target in targets]
    return sum(score >= scores[row] for at, score in enumerate(scores) if at != row)


@settings(max_examples=30)
@given(rows=st.integers(1, 12), dim=st.integers(1, 4), seed=st.integers(0, 999))
def test_a_rank_counts_the_others_that_score_as_high(rows: int, dim: int, seed: int):
    queries, targets = units(rows, dim, seed), units(rows, dim, seed + 1)
    targets[-1] = targets[0]  # a tie
    found = ranks(queries, targets)
    gaps = np.abs(np.diff(np.sort(queries.astype(np.float64) @ targets.T, axis=1), axis=1))
    if rows > 2 and dim > 1 and (gaps[gaps > 0] > 1e-9).all():
        assert found.tolist() == [naive_rank(queries, targets, row) for row in range(rows)]
    assert found[0] >= (1 if rows > 1 else 0)


def test_a_model_that_gives_everything_one_vector_finds_nothing():
    same = np.ones((6, 4), np.float32) / 2
    assert ranks(same, same).tolist() == [5] * 6
    (first, third) = recalls(WHOLE, same, same, list("abcdef"))
    assert (first.value.estimate, third.value.estimate) == (0, 0)


def test_what_cannot_be_compared_finds_nothing():
    targets = units(4, 3, 0)
    queries = targets.copy()
    queries[1] = math.nan
    assert ranks(queries, targets).tolist() == [0, 3, 0, 0]
    targets[2, 0] = math.nan
    assert ranks(queries, targets).tolist() == [1, 3, 3, 1]


def test_halves_of_characters_are_no_text():
    for section in ("findings", "full"):
        assert text_of(Report(findings_text="Clear \ud800 lungs.", impression_text="Clear."), section) == ""


def test_a_perfect_model_finds_everything_and_the_pool_s_size_is_said():
    rows = units(12, 8, 0)
    first, third = recalls(WHOLE, rows, rows, [str(n) for n in range(12)])
    assert first.value.estimate == third.value.estimate == 1
    assert (first.pool, first.queries, first.k, third.k) == (12, 12, 1, 3)
    assert first.chance == pytest.approx(1 / 12)
    assert str(first).startswith("R@1 of a pool of 12: 1.000 [1.000, 1.000]")
    assert "chance 0.083" in str(first)


def test_one_pool_gives_the_share_of_ranks_below_k():
    queries, targets = units(40, 5, 1), units(40, 5, 2)
    queries = queries + targets
    wanted = [naive_rank(queries, targets, row) for row in range(40)]
    for line in recalls(WHOLE, queries, targets, [str(n // 2) for n in range(40)]):
        assert line.value.estimate == pytest.approx(np.mean([rank < line.k for rank in wanted]))
        assert line.value.subjects == 20
        assert line.value.low is not None
        assert line.value.high is not None
        assert line.value.low < line.value.estimate < line.value.high
        assert line.over_partitions is None


def test_random_pools_give_the_mean_over_partitions_of_each_partition_s_share():
    count = 19
    queries, targets = units(count, 5, 3), units(count, 5, 4)
    queries = queries + 0.5 * targets
    found = {
        (line.pool, line.k): line for line in recalls(POOLED, queries, targets, list("abcdefghijklmnopqrs"), seed=7)
    }
    assert set(found) == {(4, 1), (4, 3), (8, 1), (8, 3)}
    for (pool, k), line in found.items():
        shares = []
        for number in range(POOLED.partitions):
            order = np.random.default_rng((7, pool, number)).permutation(count)[: count // pool * pool]
            hits = []
            for start in range(0, len(order), pool):
                group = order[start : start + pool]
                hits += [naive_rank(queries[group], targets[group], row) < k for row in range(pool)]
            shares.append(np.mean(hits))
        assert line.value.estimate == pytest.approx(np.mean(shares))
        half = 1.96 * np.std(shares, ddof=1) / math.sqrt(len(shares))
        assert line.over_partitions == pytest.approx((np.mean(shares) - half, np.mean(shares) + half))
        assert line.partitions == 20


def test_guessing_finds_what_chance_says():
    count = 400
    found = recalls(
        replace(POOLED, partitions=5), units(count, 16, 5), units(count, 16, 6), [str(n) for n in range(count)]
    )
    for line in found:
        assert line.value.estimate == pytest.approx(line.chance, abs=0.05)


def test_patients_are_resampled_and_not_scans():
    """Twenty scans of two patients tell as much as two: no interval."""
    rows = units(20, 8, 0)
    (first, _) = recalls(WHOLE, rows, rows, ["a", "b"] * 10)
    assert (first.value.subjects, first.value.low) == (2, None)


def test_pools_that_the_scans_do_not_fill_are_left_out_and_none_at_all_is_refused():
    rows = units(6, 4, 0)
    assert {line.pool for line in recalls(POOLED, rows, rows, list("abcdef"))} == {4}
    with pytest.raises(ConfigError, match="needs pools of 4 scans with reports, there are 3"):
        recalls(POOLED, rows[:3], rows[:3], list("abc"))
    with pytest.raises(ConfigError, match="there are 1"):
        recalls(WHOLE, rows[:1], rows[:1], ["a"])


def test_the_published_protocols_are_as_they_were_published():
    ct_rate = PROTOCOLS["ct-rate-full-report-1"]
    assert (ct_rate.section, ct_rate.recalls, ct_rate.pools) == ("full", (5, 10, 50, 100), ())
    assert {one.pool for one in ct_rate.published} == {1564}
    for name, section in (("findings", "findings"), ("impressions", "impression"), ("full-report", "full")):
        merlin = PROTOCOLS[f"merlin-{name}-1"]
        assert (merlin.section, merlin.recalls, merlin.pools, merlin.partitions) == (
            section,
            (1, 8),
            (32, 64, 128),
            100,
        )
    spectre = {
        (one.pool, one.k): one.percent for one in PROTOCOLS["merlin-findings-1"].published if one.model == "SPECTRE"
    }
    assert spectre == {(32, 1): 55.5, (64, 1): 43.8, (128, 1): 33.0, (32, 8): 93.5, (64, 8): 86.3, (128, 8): 76.1}


def test_a_protocol_is_named_with_or_without_its_version():
    assert named("merlin-findings") is named("merlin-findings-1")
    with pytest.raises(ConfigError, match="unknown protocol 'merlin-finding'"):
        named("merlin-finding")


def test_a_query_is_a_section_or_both_under_their_headings():
    report = Report(findings_text=" A nodule. ", impression_text="Benign.", rest_text="History: cough.")
    assert text_of(report, "findings") == "A nodule."
    assert text_of(report, "impression") == "Benign."
    assert text_of(report, "full") == "Findings: A nodule.\nImpressions: Benign.\n"
    assert text_of(Report(impression_text="Benign."), "full") == "Impressions: Benign.\n"
    assert text_of(Report(rest_text="cough"), "full") == ""


@pytest.mark.parametrize("changes", [{"pools": (1,)}, {"recalls": (0,)}, {"partitions": 0}])
def test_pools_of_one_and_counts_below_one_are_refused(changes: dict):
    with pytest.raises(ValueError, match="pools hold >= 2"):
        replace(WHOLE, **changes)
