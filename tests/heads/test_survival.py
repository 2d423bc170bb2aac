from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter
from lifelines.utils import concordance_index
from tests.draws import counts_of

from voxelstem import metrics
from voxelstem.heads import survival
from voxelstem.heads.survival import (
    Curve,
    Watched,
    breslow,
    brier,
    brier_weights,
    censoring,
    counted_concordance,
    harrell_c,
    integrated_brier,
    interval_edges,
    kaplan_meier,
    spans,
    uno_c,
    uno_weights,
)
from voxelstem.study import Survival


def made(count: int, first: int) -> tuple[Watched, np.ndarray]:
    """Subjects by formula, with equal times and equal risks: what scikit-survival was asked about, too."""
    i = np.arange(count) + first
    until = np.round(2 + 18 * ((i * 0.6180339887498949) % 1)) / 2
    return Watched(time=until, event=(i * 7) % 5 < 3), np.round(np.sin(1.7 * i) - 0.15 * until, 1)


TRAIN, (TEST, RISK) = made(60, 0)[0], made(40, 100)
MOMENTS = np.linspace(1.5, 9.0, 6)
CHANCES = np.exp(-np.outer(np.exp(0.5 * RISK), MOMENTS / 8))
KNOWN = censoring(TRAIN)

people = st.lists(
    st.tuples(st.integers(0, 5), st.booleans(), st.integers(-3, 3)), min_size=2, max_size=12
)  # few values, so that many are equal


def of(rows: list[tuple[int, bool, int]]) -> tuple[Watched, np.ndarray]:
    watched = Watched(time=np.array([row[0] for row in rows], float), event=np.array([row[1] for row in rows]))
    return watched, np.array([row[2] for row in rows], float)


# ------------------------------------------------------------------------------------------- naive twins


def naive_curve(watched: Watched, at: float) -> float:
    """Kaplan and Meier's product, one time after another."""
    left = 1.0
    for moment in sorted({t for t in watched.time if t <= at}):
        at_risk = sum(t >= moment for t in watched.time)
        came = sum(t == moment and e for t, e in zip(watched.time, watched.event, strict=True))
        left *= 1 - came / at_risk
    return left


def naive_censoring(watched: Watched, at: float) -> float:
    left = 1.0
    for moment in sorted({t for t in watched.time if t <= at}):
        rows = list(zip(watched.time, watched.event, strict=True))
        ended = sum(t == moment and not e for t, e in rows)
        at_risk = sum(t > moment or (t == moment and not e) for t, e in rows)
        left *= 1 - ended / at_risk if ended else 1
    return left


def naive_c(watched: Watched, risk: np.ndarray, weight: np.ndarray) -> float:
    right = pairs = 0.0
    for i in range(len(watched)):
        for j in range(len(watched)):
            later = watched.time[j] > watched.time[i]
            stayed = watched.time[j] == watched.time[i] and not watched.event[j]
            if watched.event[i] and (later or stayed):
                pairs += weight[i]
                right += weight[i] * (1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0)
    return right / pairs if pairs else math.nan


def naive_brier(watched: Watched, chance: np.ndarray, at: float, uncensored: Curve) -> float:
    total = 0.0
    for until, event, said in zip(watched.time, watched.event, chance, strict=True):
        if until > at:
            total += (1 - said) ** 2 / uncensored.at(np.array([at]))[0]
        elif event:
            total += said**2 / uncensored.at(np.array([until]))[0]
    return total / len(watched)


@given(people)
@settings(deadline=None)
def test_curves_are_products_over_the_times_before(rows: list[tuple[int, bool, int]]) -> None:
    watched, _ = of(rows)
    for found, naive in ((kaplan_meier(watched), naive_curve), (censoring(watched), naive_censoring)):
        for at in np.unique([*watched.time, watched.time.max() / 2]):
            assert found.at(np.array([at]))[0] == pytest.approx(naive(watched, at), abs=1e-12)


@given(people)
@settings(deadline=None)
def test_harrell_s_c_is_counted_pair_by_pair(rows: list[tuple[int, bool, int]]) -> None:
    watched, risk = of(rows)
    assert harrell_c(watched, risk) == pytest.approx(naive_c(watched, risk, np.ones(len(risk))), nan_ok=True)


def test_uno_s_c_is_counted_pair_by_pair() -> None:
    for tau in (3.0, 6.5, 9.0):
        weight = np.zeros(len(TEST))
        for i, (until, event) in enumerate(zip(TEST.time, TEST.event, strict=True)):
            if event and until < tau:
                weight[i] = naive_censoring(TRAIN, until) ** -2
        assert uno_weights(TEST, uncensored=KNOWN, tau=tau) == pytest.approx(weight)
        assert uno_c(TEST, RISK, uncensored=KNOWN, tau=tau) == pytest.approx(naive_c(TEST, RISK, weight))


def test_brier_s_score_is_added_up_subject_by_subject() -> None:
    found = brier(TEST, CHANCES, MOMENTS, uncensored=KNOWN)
    assert found == pytest.approx([naive_brier(TEST, CHANCES[:, k], at, KNOWN) for k, at in enumerate(MOMENTS)])
    area = sum((found[k] + found[k + 1]) / 2 * (MOMENTS[k + 1] - MOMENTS[k]) for k in range(5))
    assert integrated_brier(TEST, CHANCES, MOMENTS, uncensored=KNOWN) == pytest.approx(area / 7.5)


def test_breslow_s_baseline_adds_up_events_over_the_risks_still_watched() -> None:
    curve, hazard = breslow(TEST, RISK), 0.0
    for moment in np.unique(TEST.time):
        came = sum((TEST.time == moment) & TEST.event)
        hazard += came / sum(math.exp(r) for t, r in zip(TEST.time, RISK, strict=True) if t >= moment)
        assert curve.at(np.array([moment]))[0] == pytest.approx(math.exp(-hazard))
    # A log risk far from 0 is only a unit.
    assert breslow(TEST, RISK - 800).value[-1] == 0
    assert breslow(TEST, RISK + 800).value == pytest.approx(np.ones(len(curve.time)))


# ------------------------------------------------------------------------------------------- oracles


def test_lifelines_finds_the_same_curve_and_the_same_c() -> None:
    fitted = KaplanMeierFitter().fit(TEST.time, TEST.event)
    curve = kaplan_meier(TEST)
    assert curve.value == pytest.approx(fitted.survival_function_at_times(curve.time).to_numpy(), abs=1e-12)
    assert harrell_c(TEST, RISK) == pytest.approx(concordance_index(TEST.time, -RISK, TEST.event), abs=1e-12)


@given(people)
@settings(deadline=None, max_examples=50)
def test_lifelines_counts_equal_times_as_we_do(rows: list[tuple[int, bool, int]]) -> None:
    watched, risk = of(rows)
    if not math.isnan(harrell_c(watched, risk)):
        assert harrell_c(watched, risk) == pytest.approx(concordance_index(watched.time, -risk, watched.event))


def test_scikit_survival_finds_the_same() -> None:
    """Asked of 0.28.0 with TRAIN, TEST, RISK, MOMENTS and CHANCES as they are made above."""
    assert harrell_c(TEST, RISK) == pytest.approx(0.697544642857, abs=1e-9)
    found = [uno_c(TEST, RISK, uncensored=KNOWN, tau=tau) for tau in (6.5, 9.0)]
    assert found == pytest.approx([0.702625228748, 0.662845745287], abs=1e-9)
    scores = [0.0672348058577, 0.129483089562, 0.161949561457, 0.186649914273, 0.200164087252, 0.215944988135]
    assert brier(TEST, CHANCES, MOMENTS, uncensored=KNOWN) == pytest.approx(scores, abs=1e-9)
    assert integrated_brier(TEST, CHANCES, MOMENTS, uncensored=KNOWN) == pytest.approx(0.163967309908, abs=1e-9)
    watched = [0.92906254283, 0.828015580748, 0.683092123013, 0.376178354456]
    assert KNOWN.at(np.array([2.0, 4.0, 6.0, 9.0])) == pytest.approx(watched, abs=1e-9)


# ------------------------------------------------------------------------------------------- what they mean


def drawn(count: int, seed: int, most: float = 2.0) -> tuple[Watched, np.ndarray, Watched]:
    """Who is censored by chance, the log hazard of everybody, and what would have been seen without censoring."""
    rng = np.random.default_rng(seed)
    log_hazard = rng.normal(size=count)
    came, ended = rng.exponential(size=count) * np.exp(-log_hazard), rng.uniform(0, most, count)
    whole = Watched(time=came, event=np.ones(count, bool))
    return Watched(time=np.minimum(came, ended), event=came <= ended), log_hazard, whole


def test_weights_make_up_for_the_censored() -> None:
    """Without them the score of the very same predictions would depend on how long subjects were watched."""
    watched, log_hazard, whole = drawn(20000, 0)
    moments = np.array([0.3, 0.8, 1.4])
    true = np.exp(-np.outer(np.exp(log_hazard), moments))
    nobody = Curve(time=np.array([1e9]), value=np.ones(1))
    wanted = brier(whole, true, moments, uncensored=nobody)
    assert brier(watched, true, moments, uncensored=censoring(watched)) == pytest.approx(wanted, abs=0.006)
    assert (brier(watched, true, moments, uncensored=nobody) < wanted - 0.015).all()


def test_uno_s_c_does_not_move_with_the_censoring_and_harrell_s_does() -> None:
    """Effects that fade: early events are ranked better than late ones, and censoring leaves the early ones."""
    rng = np.random.default_rng(1)
    risk = rng.normal(size=4000)
    came = rng.exponential(size=4000) * np.exp(-risk)
    late = came > 0.7
    came[late] = 0.7 + rng.exponential(size=late.sum())
    ended = rng.uniform(0, 2.0, 4000)
    whole = Watched(time=came, event=np.ones(4000, bool))
    watched = Watched(time=np.minimum(came, ended), event=came <= ended)
    nobody = Curve(time=np.array([1e9]), value=np.ones(1))
    wanted = uno_c(whole, risk, uncensored=nobody, tau=1.6)
    assert uno_c(watched, risk, uncensored=censoring(watched), tau=1.6) == pytest.approx(wanted, abs=0.01)
    assert harrell_c(watched, risk) > wanted + 0.02


def test_who_ranks_by_the_true_time_is_right_and_who_says_the_same_of_all_gets_a_half() -> None:
    watched, *_ = drawn(200, 2)
    for figure in (harrell_c, lambda w, r: uno_c(w, r, uncensored=censoring(w), tau=1.5)):
        assert figure(watched, -watched.time) == 1.0
        assert figure(watched, watched.time) == 0.0
        assert figure(watched, np.ones(200)) == 0.5


def test_nobody_is_comparable_without_an_event() -> None:
    watched = Watched(time=np.arange(1.0, 5.0), event=np.zeros(4, bool))
    assert math.isnan(harrell_c(watched, np.arange(4.0)))
    assert kaplan_meier(watched).value.tolist() == [1.0] * 4
    assert math.isnan(harrell_c(Watched(time=np.ones(3), event=np.ones(3, bool)), np.arange(3.0)))


def test_times_without_anybody_watched_are_needed_by_nobody() -> None:
    """The curve of the labelled may end before times that no tested subject reaches either."""
    watched = Watched(time=np.array([1.0, 2.0]), event=np.array([True, True]))
    short = Curve(time=np.array([2.0]), value=np.array([0.5]))
    weights = brier_weights(watched, np.array([0.5, 3.0]), uncensored=short)
    assert weights.tolist() == [[1.0, 1.0], [1.0, 2.0]]


# ------------------------------------------------------------------------------------------- draws


def test_counting_a_draw_is_the_same_as_drawing() -> None:
    picks = np.random.default_rng(3).integers(0, len(TEST), (20, len(TEST)))
    counts = counts_of(picks, len(TEST))
    weights = uno_weights(TEST, uncensored=KNOWN, tau=9.0)
    found = counted_concordance(counts, TEST, RISK, weights)
    drawn_one_by_one = [
        naive_c(Watched(time=TEST.time[row], event=TEST.event[row]), RISK[row], weights[row]) for row in picks
    ]
    assert found == pytest.approx(drawn_one_by_one)


def test_pairs_that_are_compared_in_parts_are_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = harrell_c(TEST, RISK)
    monkeypatch.setattr(survival, "BLOCK", 2 * len(TEST))
    assert harrell_c(TEST, RISK) == pytest.approx(whole, abs=1e-14)


def test_the_integrated_score_is_a_mean_over_subjects_that_can_be_resampled() -> None:
    parts = brier_weights(TEST, MOMENTS, uncensored=KNOWN) * ((TEST.time[:, None] > MOMENTS) - CHANCES) ** 2
    by_subject = dict(enumerate((parts @ spans(MOMENTS)).tolist()))
    found = metrics.bootstrap_interval({str(key): value for key, value in by_subject.items()})
    assert found.estimate == pytest.approx(integrated_brier(TEST, CHANCES, MOMENTS, uncensored=KNOWN))
    assert found.low is not None
    assert found.low < found.estimate


# ------------------------------------------------------------------------------------------- ranges and intervals


def test_shares_of_a_range_are_those_of_trapezoids() -> None:
    times = np.array([0.0, 1.0, 1.5, 4.0])
    values = np.array([3.0, -1.0, 2.0, 0.5])
    assert spans(times) @ values == pytest.approx(np.trapezoid(values, times) / 4)
    assert spans(times).sum() == pytest.approx(1.0)


@given(people, st.integers(1, 6))
@settings(deadline=None)
def test_every_interval_holds_an_event_and_all_times_lie_in_one(rows: list[tuple[int, bool, int]], many: int) -> None:
    watched, _ = of(rows)
    if not watched.event.any():
        return
    edges = interval_edges(watched, many)
    inside, _ = np.histogram(watched.time[watched.event], edges)
    assert (inside > 0).all()
    assert inside.sum() == watched.event.sum()
    assert len(inside) <= many
    assert edges[0] == 0
    assert edges[-1] > watched.time.max()


def test_intervals_hold_about_as_many_events() -> None:
    watched, *_ = drawn(1000, 6)
    inside, _ = np.histogram(watched.time[watched.event], interval_edges(watched, 8))
    assert len(inside) == 8
    assert np.ptp(inside) <= 2


# ------------------------------------------------------------------------------------------- bad input


def test_records_become_arrays() -> None:
    watched = Watched.of([Survival(time=2.0, event=True), Survival(time=3.0, event=False)])
    assert watched.time.tolist() == [2.0, 3.0]
    assert watched.event.tolist() == [True, False]


@pytest.mark.parametrize("times", [[], [-1.0], [math.nan], [math.inf]])
def test_times_that_are_none_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"times must be numbers|one time and one event"):
        Watched(time=np.array(times), event=np.ones(len(times), bool))


@pytest.mark.parametrize(("times", "values"), [([], []), ([1.0, 1.0], [0.5, 0.4]), ([1.0], [1.5]), ([1.0, 2.0], [0.5])])
def test_what_is_no_curve_is_refused(times: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"a curve needs|must rise"):
        Curve(time=np.array(times), value=np.array(values))


def test_nothing_is_said_beyond_what_was_observed() -> None:
    with pytest.raises(ValueError, match="the curve ends at 10, and was asked for 11"):
        KNOWN.at(np.array([11.0]))
    ends = censoring(Watched(time=np.array([1.0, 2.0]), event=np.array([True, False])))
    late = Watched(time=np.array([2.0]), event=np.array([True]))
    with pytest.raises(ValueError, match="nobody who was learned from is watched until 2"):
        uno_c(late, np.zeros(1), uncensored=ends, tau=3.0)
    with pytest.raises(ValueError, match="nobody who was learned from"):
        brier(late, np.zeros((1, 1)), np.array([2.0]), uncensored=ends)


def test_shapes_and_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="finite risk"):
        harrell_c(TEST, np.where(RISK > 0, np.nan, RISK))
    with pytest.raises(ValueError, match="finite risk"):
        harrell_c(TEST, RISK[1:])
    with pytest.raises(ValueError, match=r"chances must be \(40, 6\)"):
        brier(TEST, CHANCES[1:], MOMENTS, uncensored=KNOWN)
    with pytest.raises(ValueError, match="two or more times"):
        spans(np.array([1.0, 1.0]))
    with pytest.raises(ValueError, match="at least one event"):
        interval_edges(Watched(time=np.ones(2), event=np.zeros(2, bool)), 3)
