from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from voxelstem import metrics
from voxelstem.certainty.calibration import calibration_error, reliability_curve
from voxelstem.heads.boxes import RATES, Matched, Sweep
from voxelstem.metrics import Interval
from voxelstem.report import sweeps
from voxelstem.report.sweeps import Judged, Line
from voxelstem.tasks.classify import Classify, Guess


def drawn(seed: int = 0, subjects: int = 30, repeats: int = 1, *, levels: int = 9) -> Judged:
    """Scores with ties, which tell a little."""
    rng = np.random.default_rng(seed)
    truth = rng.random(subjects) < 0.4
    chance = np.round((0.3 * truth[:, None] + 0.7 * rng.random((subjects, repeats))) * levels) / levels
    return Judged(name="run", truth=truth, chance=chance)


both_kinds = (
    st.integers(4, 25)
    .flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.bool_, n), hnp.arrays(np.float64, n, elements=st.integers(0, 6).map(lambda v: v / 6))
        )
    )
    .filter(lambda pair: pair[0].any() and not pair[0].all())
)


def naive_roc(truth: np.ndarray, score: np.ndarray) -> list[tuple[float, float]]:
    points = [(0.0, 0.0)]
    for threshold in sorted(set(score.tolist()), reverse=True):
        said = [value >= threshold for value in score]
        right = sum(one and is_true for one, is_true in zip(said, truth, strict=True))
        false = sum(one and not is_true for one, is_true in zip(said, truth, strict=True))
        points.append((false / int((~truth).sum()), right / int(truth.sum())))
    return points


def naive_height(points: list[tuple[float, float]], at: float) -> float:
    """Of a curve that rises: its top at a jump."""
    reached = [(x, y) for x, y in points if x <= at + 1e-9]
    x, y = reached[-1]
    if len(reached) == len(points) or abs(x - at) < 1e-9:
        return y
    next_x, next_y = points[len(reached)]
    return y + (at - x) / (next_x - x) * (next_y - y)


def naive_precision(truth: np.ndarray, score: np.ndarray, recall: float) -> float:
    for threshold in sorted(set(score.tolist()), reverse=True):
        said = score >= threshold
        if (said & truth).sum() / truth.sum() >= max(recall, 1e-9) - 1e-9 and (said & truth).any():
            return float((said & truth).sum() / said.sum())
    raise AssertionError("recall 1 is always reached")


def resampled(subjects: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, subjects, (1000, subjects))


@settings(max_examples=40, deadline=None)
@given(both_kinds)
def test_the_roc_curve_is_scikit_learns_and_its_naive_twins(pair: tuple[np.ndarray, np.ndarray]) -> None:
    truth, score = pair
    line = sweeps.roc_points(truth, score)
    false, right, _ = roc_curve(truth, score, drop_intermediate=False)
    np.testing.assert_allclose(line.x, false, atol=1e-12)
    np.testing.assert_allclose(line.y, right, atol=1e-12)
    np.testing.assert_allclose(np.stack([line.x, line.y], axis=1), naive_roc(truth, score), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(both_kinds)
def test_precision_and_recall_are_scikit_learns_without_lines_between_points(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    truth, score = pair
    line = sweeps.precision_points(truth, score)
    precision, recall, _ = precision_recall_curve(truth, score)
    # The best threshold of each recall stands last in scikit-learn's falling order.
    best = {round(r, 9): p for p, r in zip(precision[:-1], recall[:-1], strict=True)}
    for at, height in zip(line.x[1::2], line.y[1::2], strict=True):
        assert height == pytest.approx(best[round(float(at), 9)])
        assert height == pytest.approx(naive_precision(truth, score, float(at)))
    area = float((np.diff(line.x) * line.y[1:]).sum())
    assert area == pytest.approx(average_precision_score(truth, score))
    assert line.x[0] == 0
    assert line.x[-1] == 1


@settings(max_examples=40, deadline=None)
@given(both_kinds, st.integers(0, 20))
def test_heights_between_points_are_the_naive_ones_and_a_jump_has_two(
    pair: tuple[np.ndarray, np.ndarray], place: int
) -> None:
    line = sweeps.roc_points(*pair)
    at = place / 20
    assert line.after(np.array([at]))[0] == pytest.approx(naive_height(naive_roc(*pair), at))
    # Turned about, the end of a jump is its beginning.
    turned = Line(x=1 - line.x[::-1], y=1 - line.y[::-1])
    assert line.before(np.array([at]))[0] == pytest.approx(1 - turned.after(np.array([1 - at]))[0])


def test_a_jump_begins_low_and_ends_high() -> None:
    line = Line(x=np.array([0.0, 0.5, 0.5, 1.0]), y=np.array([0.0, 0.2, 0.8, 1.0]))
    np.testing.assert_allclose(line.before(np.array([0.0, 0.25, 0.5, 1.0])), [0.0, 0.1, 0.2, 1.0])
    np.testing.assert_allclose(line.after(np.array([0.0, 0.25, 0.5, 1.0])), [0.0, 0.1, 0.8, 1.0])


@pytest.mark.parametrize("repeats", [1, 3])
def test_under_the_drawn_curves_lies_the_mean_area_of_the_repeats(repeats: int) -> None:
    judged = drawn(1, repeats=repeats)
    roc, precision = sweeps.roc(judged), sweeps.precision_recall(judged)
    areas = [roc_auc_score(judged.truth, column) for column in judged.chance.T]
    assert np.trapezoid(roc.line.y, roc.line.x) == pytest.approx(np.mean(areas))
    assert roc.area.estimate == pytest.approx(np.mean(areas))
    averages = [average_precision_score(judged.truth, column) for column in judged.chance.T]
    assert (np.diff(precision.line.x) * precision.line.y[1:]).sum() == pytest.approx(np.mean(averages))
    assert precision.area.estimate == pytest.approx(np.mean(averages))
    assert roc.repeats == precision.repeats == repeats


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_auroc_and_its_interval_are_those_of_the_table(repeats: int) -> None:
    judged = drawn(2, subjects=25, repeats=repeats)
    outcomes = {
        f"s{row:02}": tuple(Guess(truth=int(true), scores=(1 - p, p)) for p in chances.tolist())
        for row, (true, chances) in enumerate(zip(judged.truth, judged.chance, strict=True))
    }
    table = metrics.bootstrap_interval(outcomes, metrics.averaged(Classify().statistic("auroc")))
    again = Judged.of("run", {s: [(g.truth == 1, g.scores[1]) for g in own] for s, own in outcomes.items()})
    drawn_area = sweeps.roc(again).area
    assert drawn_area.estimate == pytest.approx(table.estimate)
    assert (drawn_area.low, drawn_area.high) == (pytest.approx(table.low), pytest.approx(table.high))
    assert drawn_area.subjects == 25


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_roc_band_holds_95_percent_of_the_curves_of_resampled_subjects(repeats: int) -> None:
    judged = drawn(3, subjects=12, repeats=repeats)
    band = sweeps.roc(judged).band
    places = (0, 10, 33, 50, 100)
    heights: list[list[float]] = []
    for picks in resampled(12):
        truth = judged.truth[picks]
        if truth.any() and not truth.all():
            curves = [naive_roc(truth, column[picks]) for column in judged.chance.T]
            heights.append([float(np.mean([naive_height(c, at / 100) for c in curves])) for at in places])
    assert band is not None
    for column, at in enumerate(places):
        low, high = np.quantile([row[column] for row in heights], [0.025, 0.975])
        assert band.x[at] == pytest.approx(at / 100)
        assert (band.low[at], band.high[at]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_the_precision_band_holds_95_percent_of_the_curves_of_resampled_subjects() -> None:
    judged = drawn(4, subjects=12)
    band = sweeps.precision_recall(judged).band
    places = (0, 7, 50, 100)
    heights = [
        [naive_precision(judged.truth[picks], judged.chance[picks, 0], at / 100) for at in places]
        for picks in resampled(12)
        if judged.truth[picks].any() and not judged.truth[picks].all()
    ]
    assert band is not None
    for column, at in enumerate(places):
        low, high = np.quantile([row[column] for row in heights], [0.025, 0.975])
        assert (band.low[at], band.high[at]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_large_sets_are_swept_in_parts_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [sweep(drawn(5, repeats=2)) for sweep in (sweeps.roc, sweeps.precision_recall)]
    monkeypatch.setattr(sweeps, "CELLS_AT_ONCE", 200)
    for at_once, sweep in zip(whole, (sweeps.roc, sweeps.precision_recall), strict=True):
        parts = sweep(drawn(5, repeats=2))
        assert parts.area == at_once.area
        assert parts.band is not None
        assert at_once.band is not None
        np.testing.assert_array_equal(parts.band.high, at_once.band.high)


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_searched_all_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.integers(0, 9, (6, 7)), axis=1).astype(np.float64)
    wanted = np.minimum(rng.integers(0, 18, (6, 5)) / 2, rows.max())
    for side in ("left", "right"):
        naive = [np.searchsorted(row, some, side) for row, some in zip(rows, wanted, strict=True)]
        np.testing.assert_array_equal(sweeps._search(rows, wanted, side), naive)


def test_with_two_subjects_there_is_no_band_and_no_interval() -> None:
    judged = Judged(name="run", truth=np.array([True, False]), chance=np.array([[0.9], [0.2]]))
    for trace in (sweeps.roc(judged), sweeps.precision_recall(judged)):
        assert trace.band is None
        assert trace.area.low is None
        assert trace.area.estimate == 1
        assert "n=2" in trace.area.note


def test_where_most_resamples_have_no_curve_there_is_no_band() -> None:
    values = np.full((1000, 3), 0.5)
    values[:500] = math.nan
    assert sweeps.band_of(np.arange(3.0), values, 9) is None
    values[499] = 0.5
    assert sweeps.band_of(np.arange(3.0), values, 9) is not None


@pytest.mark.parametrize("truth", [[True, True, True], [False, False, False]])
@pytest.mark.parametrize("sweep", [sweeps.roc, sweeps.precision_recall])
def test_a_curve_of_one_kind_of_subjects_is_refused(sweep, truth: list[bool]) -> None:
    judged = Judged(name="run", truth=np.array(truth), chance=np.array([[0.1], [0.5], [0.6]]))
    with pytest.raises(ValueError, match="both kinds"):
        sweep(judged)


@pytest.mark.parametrize(
    ("truth", "chance"),
    [([], np.zeros((0, 1))), ([True], np.zeros((1, 0))), ([True], np.zeros((2, 1))), ([True], np.array([[math.nan]]))],
)
def test_scores_without_sense_are_refused(truth: list[bool], chance: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"score"):
        Judged(name="run", truth=np.array(truth, np.bool_), chance=chance)


def test_repeats_that_disagree_on_the_truth_are_refused() -> None:
    with pytest.raises(ValueError, match="one truth"):
        Judged.of("run", {"a": [(True, 0.1), (False, 0.2)]})
    with pytest.raises(ValueError, match="as many repeats"):
        Judged.of("run", {"a": [(True, 0.1), (True, 0.2)], "b": [(True, 0.1)]})


def matched(seed: int, subjects: int = 14) -> dict[str, tuple[Matched, ...]]:
    rng = np.random.default_rng(seed)
    found = {}
    for subject in range(subjects):
        truths = int(rng.integers(0, 4))
        hits = [True] * int(rng.integers(0, truths + 1)) + [False] * int(rng.integers(0, 6))
        scores = np.round(rng.random(len(hits)) + 0.4 * np.array(hits, float), 1)
        found[f"s{subject:02}"] = (Matched(scores=tuple(scores.tolist()), hits=tuple(hits), truths=truths),)
    return found


def test_the_froc_curve_passes_the_sensitivity_at_each_rate_and_its_figure_is_their_mean() -> None:
    by_subject = matched(0)
    trace = sweeps.froc("run", by_subject)
    sweep = Sweep.of([one[0] for one in by_subject.values()])
    wanted = sweep.sensitivity_at(np.ones((1, 14)), RATES)[0]
    np.testing.assert_allclose(trace.line.after(np.array(RATES)), wanted, atol=1e-9)
    assert trace.area.estimate == pytest.approx(wanted.mean())
    # The naive twin of a draw: the subjects written out as often as they were drawn.
    people = list(by_subject.values())
    redrawn = [
        Sweep.of([people[pick][0] for pick in picks]).sensitivity_at(np.ones((1, 14)), [1.0])[0, 0]
        for picks in resampled(14)
    ]
    assert trace.band is not None
    at = int(np.abs(trace.band.x - 1.0).argmin())
    assert (trace.band.low[at], trace.band.high[at]) == tuple(
        pytest.approx(q) for q in np.quantile(redrawn, [0.025, 0.975])
    )


def test_repeats_of_a_detector_are_averaged() -> None:
    one, other = matched(1), matched(1)
    both = {subject: (*one[subject], *other[subject]) for subject in one}
    assert sweeps.froc("run", both).repeats == 2
    assert sweeps.froc("run", both).area == sweeps.froc("run", one).area


def test_a_detector_without_anything_to_find_has_no_curve() -> None:
    with pytest.raises(ValueError, match="to be found"):
        sweeps.froc("run", {"a": (Matched(scores=(0.5,), hits=(False,), truths=0),)})
    with pytest.raises(ValueError, match="as many repeats"):
        sweeps.froc("run", {"a": (), "b": ()})


def test_reliability_is_that_of_the_calibration_module() -> None:
    judged = drawn(6, subjects=40)
    found = sweeps.reliability(judged, bins=5)
    assert found.bins == reliability_curve(judged.truth, judged.chance[:, 0], bins=5)
    assert found.ece.estimate == pytest.approx(calibration_error(judged.truth, judged.chance[:, 0], bins=5))
    assert found.ece.low is not None


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 100), st.integers(2, 4))
def test_repeats_that_say_the_same_are_no_further_subjects(seed: int, repeats: int) -> None:
    once = drawn(seed, subjects=20)
    assume(once.truth.any())
    again = Judged(name="run", truth=once.truth, chance=np.repeat(once.chance, repeats, axis=1))
    for one, other in zip(sweeps.reliability(once).bins, sweeps.reliability(again).bins, strict=True):
        assert one.rows == other.rows
        assert one.mean_chance == pytest.approx(other.mean_chance)
        assert one.came_true.low == pytest.approx(other.came_true.low)
    assert sweeps.reliability(once).ece.estimate == pytest.approx(sweeps.reliability(again).ece.estimate)


def test_reliability_of_what_is_no_probability_is_refused() -> None:
    judged = Judged(name="run", truth=np.array([True, False]), chance=np.array([[1.2], [0.1]]))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        sweeps.reliability(judged)


def test_intervals_are_drawn_as_those_of_the_tables() -> None:
    values = np.random.default_rng(7).normal(size=15)
    own = sweeps.interval_of(15, lambda counts: counts @ values / counts.sum(axis=1))
    table = metrics.bootstrap_interval({f"{row:02}": float(value) for row, value in enumerate(values)})
    assert isinstance(own, Interval)
    assert (own.low, own.high) == (pytest.approx(table.low), pytest.approx(table.high))
    np.testing.assert_array_equal(sweeps.draws_of(15)[5], np.bincount(resampled(15)[5], minlength=15))
