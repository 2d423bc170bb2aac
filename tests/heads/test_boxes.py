from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data import box_utils
from monai.metrics.froc import compute_froc_curve_data, compute_froc_score
from scipy.spatial.transform import Rotation
from tests.draws import counts_of

from voxelstem.heads import boxes
from voxelstem.heads.boxes import RATES, Box, Hit, Matched, Sweep, centre_distance, iou, match, of_labels, suppress
from voxelstem.study import LabelMap

edges = st.tuples(st.integers(-6, 6), st.integers(1, 7))
whole = st.tuples(edges, edges, edges).map(
    lambda axes: [*(low for low, _ in axes), *(low + size for low, size in axes)]
)
"""Corners on a grid of millimetres."""


def drawn(seed: int, count: int, *, spread: float = 20.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    low = rng.uniform(-spread, spread, (count, 3))
    return np.concatenate([low, low + rng.uniform(2, 15, (count, 3))], axis=1)


def as_boxes(corners: np.ndarray, scores: Sequence[float] | None = None, name: str = "lesion") -> list[Box]:
    sure = [1.0] * len(corners) if scores is None else scores
    return [
        Box(name=name, low_ras_mm=tuple(row[:3]), high_ras_mm=tuple(row[3:]), score=float(score))
        for row, score in zip(np.asarray(corners, float).tolist(), sure, strict=True)
    ]


def some_matches(seed: int, subjects: int = 6, *, ties: bool = False, missed: int = 1) -> list[Matched]:
    rng = np.random.default_rng(seed)
    made: list[Matched] = []
    for _ in range(subjects):
        count = int(rng.integers(0, 7))
        scores = rng.integers(0, 4, count) / 4 if ties else rng.uniform(0.01, 1, count)
        hits = rng.random(count) < 0.4
        scans = int(rng.integers(1, 3))
        made.append(
            Matched(
                scores=tuple(scores.tolist()),
                hits=tuple(hits.tolist()),
                truths=int(hits.sum()) + int(rng.integers(0, 3)),
                scans=scans,
            )
        )
    return [*made, Matched(scores=(), hits=(), truths=missed)]


# ------------------------------------------------------------------------------------------------- overlap


@given(whole, whole)
def test_iou_counts_the_cubes_of_a_millimetre_that_lie_in_both(one: list[int], other: list[int]) -> None:
    def cubes(box: list[int]) -> set[tuple[int, int, int]]:
        x, y, z = (range(box[axis], box[axis + 3]) for axis in range(3))
        return {(i, j, k) for i in x for j in y for k in z}

    a, b = cubes(one), cubes(other)
    assert iou(np.array([one], float), np.array([other], float))[0, 0] == pytest.approx(len(a & b) / len(a | b))


@given(st.integers(0, 10_000), st.tuples(*[st.floats(-500, 500)] * 3))
def test_iou_is_symmetric_within_0_and_1_and_does_not_move_with_the_patient(
    seed: int, shift: tuple[float, float, float]
) -> None:
    one, other = drawn(seed, 5), drawn(seed + 1, 4)
    found = iou(one, other)
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_allclose(found, iou(other, one).T)
    moved = np.array([*shift, *shift])
    np.testing.assert_allclose(found, iou(one + moved, other + moved), atol=1e-9)
    np.testing.assert_allclose(np.diag(iou(one, one)), 1)


def test_overlap_and_suppression_agree_with_monai() -> None:
    one, other = drawn(0, 60), drawn(1, 50)
    np.testing.assert_allclose(iou(one, other), box_utils.box_iou(one, other), atol=1e-5)
    for seed in range(10):
        corners, scores = drawn(seed, 80, spread=8.0), np.random.default_rng(seed).random(80)
        theirs = box_utils.non_max_suppression(corners, scores, nms_thresh=0.2)
        assert suppress(corners, scores, overlap=0.2, most=80).tolist() == np.asarray(theirs).tolist()
        assert suppress(corners, scores, overlap=0.2, most=5).tolist() == np.asarray(theirs)[:5].tolist()


def test_suppression_agrees_with_its_definition_and_of_equal_scores_the_first_stays() -> None:
    corners = drawn(3, 40, spread=8.0)
    scores = np.random.default_rng(3).integers(0, 4, 40) / 4
    kept: list[int] = []
    for place in sorted(range(40), key=lambda place: (-scores[place], place)):
        if all(iou(corners[[place]], corners[[other]])[0, 0] <= 0.15 for other in kept):
            kept.append(place)
    assert suppress(corners, scores, overlap=0.15, most=40).tolist() == kept
    assert suppress(np.zeros((0, 6)), np.zeros(0), overlap=0.5, most=3).tolist() == []


def test_the_centre_s_distance_is_1_on_the_ellipsoid_that_fits_a_box_and_on_the_box() -> None:
    truth = np.array([[0.0, 0.0, 0.0, 10.0, 20.0, 40.0]])
    directions = np.random.default_rng(0).normal(size=(20, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    on = np.array([5.0, 10.0, 20.0]) * (1 + directions)
    np.testing.assert_allclose(centre_distance(np.concatenate([on - 3, on + 3], axis=1), truth), 1.0)
    corner = np.array([[9.0, 19.0, 39.0, 11.0, 21.0, 41.0]])
    assert centre_distance(corner, truth, within="box")[0, 0] == pytest.approx(1.0)
    assert centre_distance(corner, truth)[0, 0] == pytest.approx(math.sqrt(3))


def test_with_cubes_about_balls_it_is_the_distance_over_the_radius() -> None:
    rng = np.random.default_rng(0)
    centres, radii = rng.uniform(-30, 30, (12, 3)), rng.uniform(3, 15, 12)
    truths = np.concatenate([centres - radii[:, None], centres + radii[:, None]], axis=1)
    found = drawn(4, 9)
    distance, _, _ = box_utils.boxes_center_distance(found, truths)
    np.testing.assert_allclose(centre_distance(found, truths), distance / radii, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- boxes of labels


def flooded(mask: np.ndarray) -> list[list[tuple[int, int, int]]]:
    """Voxels of each piece, one neighbour after another."""
    left = {tuple(int(v) for v in at) for at in np.argwhere(mask)}
    pieces = []
    while left:
        todo, piece = [left.pop()], []
        while todo:
            at = todo.pop()
            piece.append(at)
            for step in np.ndindex(3, 3, 3):
                near = (at[0] + step[0] - 1, at[1] + step[1] - 1, at[2] + step[2] - 1)
                if near in left:
                    left.remove(near)
                    todo.append(near)
        pieces.append(piece)
    return pieces


def oblique() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [12, -9, 20], degrees=True).as_matrix() * [1.0, 2.0, 3.0]
    affine[:3, 3] = [-80.0, 30.0, -400.0]
    return affine


@pytest.mark.parametrize("affine", [np.diag([1.0, 2.0, 3.0, 1.0]), oblique()], ids=["straight", "oblique"])
def test_every_connected_piece_of_a_class_gets_the_box_that_holds_its_voxels_whole(affine: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    array = np.where(rng.random((12, 9, 7)) < 0.06, rng.choice([2, 5, 9], (12, 9, 7)), 0).astype(np.int16)
    labels = LabelMap(array=array, classes={2: "nodule", 5: "liver", 9: "nodule"})
    expected = []
    for piece in flooded((array == 2) | (array == 9)):
        corners = [affine[:3, :3] @ (np.array(at) + np.array(c) - 0.5) for at in piece for c in np.ndindex(2, 2, 2)]
        expected.append([*(np.min(corners, axis=0) + affine[:3, 3]), *(np.max(corners, axis=0) + affine[:3, 3])])
    found = of_labels(labels, affine, ("nodule",))
    assert {box.name for box in found} == {"nodule"}
    np.testing.assert_allclose(sorted(boxes.corners(found).tolist()), sorted(np.array(expected).tolist()))


def test_pieces_smaller_than_the_limit_and_other_classes_are_left_out() -> None:
    array = np.zeros((10, 10, 10), np.int16)
    array[1:4, 1:4, 1:4], array[6, 6, 6], array[8, 1:3, 1] = 1, 1, 4
    labels = LabelMap(array=array, classes={1: "lesion", 4: "clip", 7: "absent"})
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    (large,) = of_labels(labels, affine, ("lesion",), smallest_mm3=9.0)
    assert (large.low_ras_mm, large.high_ras_mm) == ((1.0, 1.0, 1.0), (7.0, 7.0, 7.0))
    assert large.centre_ras_mm == (4.0, 4.0, 4.0)
    assert [box.name for box in of_labels(labels, affine, ("clip", "absent", "nowhere", "lesion"))] == [
        "clip",
        "lesion",
        "lesion",
    ]
    assert len(of_labels(labels, affine, ("lesion",), smallest_mm3=8.0)) == 2
    assert of_labels(LabelMap(array=np.zeros((3, 3, 3), np.int16), classes={1: "lesion"}), affine, ("lesion",)) == ()


def test_voxels_that_touch_at_a_corner_are_one_piece() -> None:
    array = np.zeros((4, 4, 4), np.int16)
    array[1, 1, 1] = array[2, 2, 2] = 1
    (box,) = of_labels(LabelMap(array=array, classes={1: "lesion"}), np.eye(4), ("lesion",))
    assert (box.low_ras_mm, box.high_ras_mm) == ((0.5, 0.5, 0.5), (2.5, 2.5, 2.5))


# ------------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("seed", range(20))
def test_matching_by_overlap_agrees_with_monai_s_coco_matching(seed: int) -> None:
    truths, found = drawn(seed, 6, spread=10.0), drawn(seed + 100, 15, spread=10.0)
    scores = np.random.default_rng(seed).random(15)
    (theirs,) = matching_batch(
        iou_fn=box_utils.box_iou,
        iou_thresholds=[0.1],
        pred_boxes=[found],
        pred_classes=[np.zeros(15, int)],
        pred_scores=[scores],
        gt_boxes=[truths],
        gt_classes=[np.zeros(6, int)],
        gt_ignore=[np.zeros(6, int)],
    )
    ours = match(as_boxes(found, scores.tolist()), as_boxes(truths), Hit(kind="iou", iou=0.1))
    assert list(ours.hits) == (theirs[0]["dtMatches"][0] > 0).tolist()
    np.testing.assert_allclose(ours.scores, theirs[0]["dtScores"])
    assert 0 < sum(ours.hits) <= ours.truths == 6


def test_the_three_kinds_of_hit_differ_where_they_should() -> None:
    truth = as_boxes(np.array([[0, 0, 0, 10, 10, 10]]))
    in_the_corner = as_boxes(np.array([[8, 8, 8, 10, 10, 10]]))
    half_over = as_boxes(np.array([[5.1, 0, 0, 15.1, 10, 10]]))

    def hit(found: list[Box], kind: boxes.Kind) -> tuple[bool, ...]:
        return match(found, truth, Hit(kind=kind, iou=0.3)).hits

    assert [hit(in_the_corner, kind) for kind in ("radius", "inside", "iou")] == [(False,), (True,), (False,)]
    assert [hit(half_over, kind) for kind in ("radius", "inside", "iou")] == [(False,), (False,), (True,)]


def test_a_second_hit_is_passed_over_by_place_and_false_by_overlap() -> None:
    truth = as_boxes(np.array([[0, 0, 0, 10, 10, 10]]))
    twice = as_boxes(
        np.array([[0, 0, 0, 10, 10, 10], [0, 0, 0, 10, 10, 11], [90, 90, 90, 99, 99, 99]]), [0.5, 0.9, 0.7]
    )
    assert match(twice, truth, Hit()) == Matched(scores=(0.9, 0.7), hits=(True, False), truths=1)
    by_overlap = match(twice, truth, Hit(kind="iou"))
    assert by_overlap == Matched(scores=(0.9, 0.7, 0.5), hits=(True, False, False), truths=1)


def test_the_surer_prediction_chooses_first_and_takes_what_it_finds_best() -> None:
    truths = as_boxes(np.array([[0, 0, 0, 10, 10, 10], [4, 0, 0, 14, 10, 10]]))
    found = as_boxes(np.array([[3, 0, 0, 13, 10, 10], [3.5, 0, 0, 13.5, 10, 10]]), [0.9, 0.8])
    assert match(found, truths, Hit()).hits == (True, True)
    assert match(found[:1], truths, Hit()).hits == (True,)
    assert match(found, truths[:1], Hit()).hits == (True,)
    assert match([], truths, Hit()) == Matched(scores=(), hits=(), truths=2)
    assert match(found, [], Hit()).hits == (False, False)


# ------------------------------------------------------------------------------------------------- FROC


def naive_points(sample: Sequence[Matched]) -> list[tuple[float, float]]:
    """False positives per scan and sensitivity, threshold after threshold."""
    scans, truths = sum(one.scans for one in sample), sum(one.truths for one in sample)
    rows = [row for one in sample for row in zip(one.scores, one.hits, strict=True)]
    points = [(0.0, 0.0)]
    for limit in sorted({score for score, _ in rows}, reverse=True):
        said = [hit for score, hit in rows if score >= limit]
        points.append((said.count(False) / scans, said.count(True) / truths))
    return points


def naive_sensitivity(sample: Sequence[Matched], rate: float) -> float:
    points = naive_points(sample)
    before = max((x, y) for x, y in points if x <= rate)
    after = [point for point in points if point[0] > rate]
    if not after:
        return before[1]
    nearest = min(after)
    return before[1] + (nearest[1] - before[1]) * (rate - before[0]) / (nearest[0] - before[0])


def naive_precision(sample: Sequence[Matched]) -> float:
    truths = sum(one.truths for one in sample)
    rows = [row for one in sample for row in zip(one.scores, one.hits, strict=True)]
    at: list[tuple[float, float]] = []
    for limit in sorted({score for score, _ in rows}, reverse=True):
        said = [hit for score, hit in rows if score >= limit]
        at.append((said.count(True) / truths, said.count(True) / len(said)))
    area, recall = 0.0, 0.0
    for place, (reached, _) in enumerate(at):
        area += (reached - recall) * max(precision for _, precision in at[place:])
        recall = reached
    return area


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_the_figures_agree_with_their_slow_twins(seed: int, ties: bool) -> None:
    sample = some_matches(seed, ties=ties)
    sweep, once = Sweep.of(sample), np.ones((1, len(sample)))
    wanted = [naive_sensitivity(sample, rate) for rate in RATES]
    np.testing.assert_allclose(sweep.sensitivity_at(once, RATES)[0], wanted)
    assert sweep.average_precision(once)[0] == pytest.approx(naive_precision(sample))


@pytest.mark.parametrize("ties", [False, True])
def test_the_curve_runs_through_every_threshold(ties: bool) -> None:
    sample = some_matches(5, ties=ties)
    curve = Sweep.of(sample).curve()
    kept = list(zip(curve.false_per_scan.round(9).tolist(), curve.sensitivity.round(9).tolist(), strict=True))
    everything = [(round(x, 9), round(y, 9)) for x, y in naive_points(sample)]
    assert set(kept) <= set(everything)
    # What is left out lies on a flat piece between two that are kept.
    for x, y in set(everything) - set(kept):
        level = [point for point in kept if point[1] == y]
        assert min(level)[0] < x < max(level)[0]


def test_froc_agrees_with_monai_where_something_is_missed() -> None:
    for seed in range(10):
        sample = [dataclasses.replace(one, scans=1) for one in some_matches(seed)]
        right = [score for one in sample for score, hit in zip(one.scores, one.hits, strict=True) if hit]
        wrong = [score for one in sample for score, hit in zip(one.scores, one.hits, strict=True) if not hit]
        truths = sum(one.truths for one in sample)
        # MONAI leaves its lowest threshold out; what was missed scores 0, so here that is no threshold of ours.
        probs = np.array(right + [0.0] * (truths - len(right)))
        false, sensitivity = compute_froc_curve_data(np.array(wrong), probs, truths, len(sample))
        ours = Sweep.of(sample).sensitivity_at(np.ones((1, len(sample))), RATES).mean()
        assert ours == pytest.approx(compute_froc_score(false, sensitivity, RATES))


def test_average_precision_is_near_coco_s_at_101_recalls() -> None:
    for seed in range(5):
        sample = some_matches(seed, subjects=40)
        results = [
            {
                0: {
                    "dtMatches": np.array(one.hits, dtype=float)[None],
                    "gtMatches": np.zeros((1, one.truths)),
                    "dtScores": np.array(one.scores),
                    "gtIgnore": np.zeros(one.truths),
                    "dtIgnore": np.zeros((1, len(one.hits))),
                }
            }
            for one in sample
        ]
        metric = COCOMetric(
            classes=["lesion"], iou_list=[0.1], iou_range=(0.1, 0.1, 0.1), max_detection=[100], per_class=False
        )
        theirs = metric(results)[0]["AP_IoU_0.10_MaxDet_100"]
        assert Sweep.of(sample).average_precision(np.ones((1, len(sample))))[0] == pytest.approx(theirs, abs=0.01)


def test_the_seven_rates_of_luna16_on_a_curve_drawn_by_hand() -> None:
    # Eight scans with a nodule each. Hits at once: 4; then a false one before each further hit: 4 at 1/8 to 4/8.
    scores, hits = [0.9] * 4, [True] * 4
    for step in range(4):
        scores += [0.8 - step / 10, 0.79 - step / 10]
        hits += [False, True]
    sample = [Matched(scores=tuple(scores), hits=tuple(hits), truths=8, scans=8)]
    found = Sweep.of(sample).sensitivity_at(np.ones((1, 1)), RATES)[0]
    np.testing.assert_allclose(found, [5 / 8, 6 / 8, 1, 1, 1, 1, 1])


@given(st.integers(0, 10_000), st.booleans())
def test_froc_never_falls_and_stays_within_0_and_1(seed: int, ties: bool) -> None:
    sample = some_matches(seed, ties=ties)
    sweep = Sweep.of(sample)
    curve = sweep.curve()
    assert (curve.false_per_scan[0], curve.sensitivity[0]) == (0, 0)
    assert (np.diff(curve.false_per_scan) >= 0).all()
    assert (np.diff(curve.sensitivity) >= 0).all()
    at = sweep.sensitivity_at(np.ones((1, len(sample))), [0.0, *RATES, 100.0])[0]
    assert (np.diff(at) >= -1e-12).all()
    assert ((at >= 0) & (at <= 1)).all()
    assert at[-1] == pytest.approx(curve.sensitivity[-1])


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.booleans())
def test_counting_a_subject_twice_is_the_same_as_having_it_twice(seed: int, ties: bool) -> None:
    sample = some_matches(seed, ties=ties)
    picks = np.random.default_rng(seed).integers(0, len(sample), (3, len(sample)))
    counts = counts_of(picks, len(sample))
    sweep, once = Sweep.of(sample), np.ones((1, len(sample)))
    for row, at, precision in zip(
        picks, sweep.sensitivity_at(counts, RATES), sweep.average_precision(counts), strict=True
    ):
        repeated = Sweep.of([sample[place] for place in row])
        np.testing.assert_allclose(at, repeated.sensitivity_at(once, RATES)[0])
        np.testing.assert_allclose(precision, repeated.average_precision(once)[0])


def test_where_nothing_is_there_nothing_is_known_and_where_nothing_is_said_nothing_is_found() -> None:
    silent = Sweep.of([Matched(scores=(), hits=(), truths=2)])
    empty = Sweep.of([Matched(scores=(0.5,), hits=(False,), truths=0)])
    once = np.ones((1, 1))
    assert silent.sensitivity_at(once, RATES).tolist() == [[0.0] * 7]
    assert silent.average_precision(once).tolist() == [0.0]
    assert np.isnan(empty.sensitivity_at(once, RATES)).all()
    assert np.isnan(empty.average_precision(once)).all()
    assert math.isnan(empty.curve().sensitivity[-1])
    assert empty.curve().false_per_scan.tolist() == [0.0, 1.0]


def test_scans_of_a_subject_are_joined() -> None:
    one = Matched(scores=(0.9, 0.2), hits=(True, False), truths=1)
    other = Matched(scores=(0.5,), hits=(False,), truths=3, scans=2)
    assert boxes.joined([one, other]) == Matched(scores=(0.9, 0.2, 0.5), hits=(True, False, False), truths=4, scans=3)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(name="a", low_ras_mm=(0.0, 0.0, 0.0), high_ras_mm=(1.0, 0.0, 1.0)), "from low to high"),
        (lambda: Box(name="a", low_ras_mm=(0.0, 0.0, math.nan), high_ras_mm=(1.0, 1.0, 1.0)), "finite"),
        (lambda: Box(name="a", low_ras_mm=(0.0, 0.0, 0.0), high_ras_mm=(1.0, 1.0, 1.0), score=math.inf), "finite"),
        (lambda: Hit(kind="dice"), "one of radius, inside, iou"),  # pyright: ignore[reportArgumentType]
        (lambda: Hit(iou=0.0), r"\(0, 1\]"),
        (lambda: Matched(scores=(0.5,), hits=(), truths=1), "verdict"),
        (lambda: Matched(scores=(math.nan,), hits=(False,), truths=1), "finite"),
        (lambda: Matched(scores=(0.5,), hits=(True,), truths=0), "1 hits are more than the 0"),
        (lambda: Matched(scores=(), hits=(), truths=0, scans=0), "one scan at least"),
    ],
)
def test_records_guard_themselves(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # pyright: ignore[reportCallIssue]
