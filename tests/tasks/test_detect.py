from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from voxelstem import baselines, metrics
from voxelstem.heads import boxes
from voxelstem.heads.boxes import RATES, Matched, Sweep
from voxelstem.protocols import Example, Head, Task
from voxelstem.sources.anatomy import Lesion
from voxelstem.sources.phantom import PhantomConfig, phantom, phantom_anatomy
from voxelstem.study import InputSpec, LabelMap
from voxelstem.tasks import detect
from voxelstem.tasks.detect import Detect, Detected
from voxelstem.views import cells

AFFINE = np.array([[1.5, 0, 0, -90.0], [0, 2.0, 0, 40.0], [0, 0, 3.0, -700.0], [0, 0, 0, 1.0]])
SHAPE = (40, 30, 20)
"""A scan of 60 mm along every axis."""
CLASSES = ("ball", "brick")
SMALL = Detect(background=400, rounds=2)


@dataclass(frozen=True)
class Seen:
    tokens: np.ndarray | None
    tokens_affine_ras: np.ndarray | None
    scan: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))


def labels(seed: int, *, bricks: int = 1) -> LabelMap:
    """A ball or two, and a brick, wherever they fit."""
    rng = np.random.default_rng(seed)
    x, y, z = (index * step for index, step in zip(np.indices(SHAPE), (1.5, 2.0, 3.0), strict=True))
    array = np.zeros(SHAPE, np.int16)
    for value, size in [(7, 8.0), (7, 6.0)][: 1 + seed % 2] + [(3, 7.0)] * bricks:
        while True:
            centre = rng.uniform(9, 51, 3)
            gap = np.stack([x - centre[0], y - centre[1], z - centre[2]])
            near = np.linalg.norm(gap, axis=0) < size if value == 7 else np.abs(gap).max(axis=0) < size
            if not array[np.abs(gap).max(axis=0) < size + 6].any():
                array[near] = value
                break
    return LabelMap(array=array, classes={7: "ball", 3: "brick"})


def knowing_tokens(truth: LabelMap, seed: int, size_mm: float = 6.0) -> Seen:
    """Tokens that hold the share of each class in their patch, a little noise, and a column that says nothing."""
    affine, size = cells.cover(AFFINE, SHAPE, (size_mm,) * 3)
    values = np.select([truth.array == 7, truth.array == 3], [1, 2])
    counts = cells.tally(values, cells.lay(AFFINE, SHAPE, affine, size), 3)
    shares = counts / np.maximum(counts.sum(axis=3, keepdims=True), 1)
    noise = np.random.default_rng([seed, 1]).normal(size=(*size, 3))
    tokens = np.concatenate([shares[..., 1:] + 0.03 * noise[..., :2], noise[..., 2:]], axis=3)
    return Seen(tokens.astype(np.float32), affine)


def example(seed: int, features: Seen | None = None, *, bricks: int = 1) -> Example:
    truth = labels(seed, bricks=bricks)
    return Example(
        subject=f"s{seed}",
        key=f"k{seed}",
        features=features or knowing_tokens(truth, seed),
        affine_ras=AFFINE,
        labels=truth,
    )


@pytest.fixture(scope="module")
def head() -> Head:
    return SMALL.fit([example(seed) for seed in range(6)], CLASSES, mode="probe", seed=0)


def outcome(scores: tuple[float, ...], hits: tuple[bool, ...], truths: int, name: str = "ball") -> Detected:
    return Detected(by_class={name: Matched(scores=scores, hits=hits, truths=truths)})


# ------------------------------------------------------------------------------------------------- finding


def test_tokens_that_know_give_the_boxes_of_another_scan(head: Head) -> None:
    outcomes = [SMALL.outcome(head, example(seed)) for seed in range(20, 26)]
    assert SMALL.statistic("froc:ball")(outcomes) > 0.9
    assert SMALL.statistic("froc:brick")(outcomes) > 0.9
    assert SMALL.statistic("average_precision")(outcomes) > 0.9


def test_the_boxes_are_those_of_the_labels_in_millimetres(head: Head) -> None:
    overlaps: list[float] = []
    gaps_mm: list[float] = []
    for seed in range(20, 26):
        one = example(seed)
        assert one.labels is not None
        found = SMALL.predict(head, one.features, AFFINE, SHAPE)
        there = boxes.of_labels(one.labels, AFFINE, CLASSES)
        for truth in there:
            # As many of the surest boxes of a class as there are things of it.
            count = [box.name for box in there].count(truth.name)
            same = [box for box in found if box.name == truth.name][:count]
            overlap = boxes.iou(boxes.corners(same), boxes.corners([truth]))[:, 0]
            overlaps.append(float(overlap.max()))
            gap = np.subtract(same[int(overlap.argmax())].centre_ras_mm, truth.centre_ras_mm)
            gaps_mm.append(float(np.linalg.norm(gap)))
    assert np.mean(overlaps) > 0.6
    assert np.mean(gaps_mm) < 3.0  # half a token
    assert max(gaps_mm) < 6.0


def test_predictions_are_sorted_sure_and_apart(head: Head) -> None:
    found = SMALL.predict(head, example(21).features, AFFINE, SHAPE)
    assert [box.name for box in found] == sorted((box.name for box in found), key=CLASSES.index)
    for name in CLASSES:
        same = [box for box in found if box.name == name]
        scores = [box.score for box in same]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < score < 1 for score in scores)
        assert len(same) <= SMALL.most
        overlap = boxes.iou(boxes.corners(same), boxes.corners(same))
        assert overlap[~np.eye(len(same), dtype=bool)].max() <= SMALL.overlap
    assert len(dataclasses.replace(SMALL, most=2).predict(head, example(21).features, AFFINE, SHAPE)) == 4


def test_no_box_is_smaller_or_larger_than_those_learned_from(head: Head) -> None:
    far = knowing_tokens(labels(30), 30)
    assert far.tokens is not None
    loud = Seen(far.tokens * 40, far.tokens_affine_ras)
    found = SMALL.predict(head, loud, AFFINE, SHAPE)
    for place, name in enumerate(CLASSES):
        corners = boxes.corners([box for box in found if box.name == name])
        edges = corners[:, 3:] - corners[:, :3]
        assert (edges >= head.arrays["shortest_mm"][place] - 1e-6).all()
        assert (edges <= head.arrays["longest_mm"][place] + 1e-6).all()


def test_tokens_that_know_nothing_find_little() -> None:
    rng = np.random.default_rng(0)
    plain = knowing_tokens(labels(0), 0)
    assert plain.tokens is not None
    noise = [Seen(rng.normal(size=plain.tokens.shape).astype(np.float32), plain.tokens_affine_ras) for _ in range(10)]
    blind = SMALL.fit([example(seed, noise[seed]) for seed in range(6)], CLASSES, mode="probe", seed=0)
    outcomes = [SMALL.outcome(blind, example(20 + seed, noise[6 + seed])) for seed in range(4)]
    assert SMALL.statistic("froc")(outcomes) < 0.5


def test_padding_round_the_scan_changes_nothing(head: Head) -> None:
    inner = example(21).features
    assert inner.tokens is not None
    assert inner.tokens_affine_ras is not None
    affine = inner.tokens_affine_ras.copy()
    affine[:3, 3] += affine[:3, :3] @ [-2, -1, -1]
    around = Seen(np.pad(inner.tokens, ((2, 1), (1, 1), (1, 2), (0, 0)), constant_values=50.0), affine)
    plain, padded = (SMALL.predict(head, one, AFFINE, SHAPE) for one in (inner, around))
    np.testing.assert_allclose(boxes.corners(plain), boxes.corners(padded), atol=1e-4)
    np.testing.assert_allclose([box.score for box in plain], [box.score for box in padded], atol=1e-6)


# ------------------------------------------------------------------------------------------------- phantoms

PHANTOM = Detect(smallest_mm3=1000.0, background=6000)


def lesion_phantom(seed: int) -> tuple[Example, Lesion]:
    config = PhantomConfig(
        seed=seed,
        spacing_mm=(5.0, 5.0, 5.0),
        lesions=1,
        lesion_radius_mm=(10.0, 16.0),
        phase="portal",
        noise_hu=12.0,
    )
    volume = phantom(config).volumes[0]
    features = baselines.intensity(volume, InputSpec(low_hu=-1000.0, high_hu=400.0), token_mm=(8.0, 8.0, 8.0))
    made = Example(
        subject=f"s{seed}", key=f"k{seed}", features=features, affine_ras=volume.affine_ras, labels=volume.labels
    )
    return made, phantom_anatomy(config).lesions[0]


@pytest.fixture(scope="module")
def phantoms() -> tuple[Head, list[tuple[Example, Lesion]]]:
    drawn = [lesion_phantom(seed) for seed in range(14)]
    return PHANTOM.fit([made for made, _ in drawn[:8]], ("lesion",), mode="probe", seed=0), drawn[8:]


def test_lesions_of_phantoms_are_found_where_they_are(phantoms: tuple[Head, list[tuple[Example, Lesion]]]) -> None:
    head, held_out = phantoms
    found: list[bool] = []
    for made, lesion in held_out:
        assert made.labels is not None
        i, j, k = made.labels.array.shape
        first = PHANTOM.predict(head, made.features, made.affine_ras, (i, j, k))[0]
        away = np.linalg.norm(np.subtract(first.centre_ras_mm, lesion.centre_ras_mm))
        size = np.mean(np.subtract(first.high_ras_mm, first.low_ras_mm))
        found.append(bool(away < lesion.radius_mm) and 0.5 < size / (2 * lesion.radius_mm) < 2)
    assert sum(found) >= 5  # the surest box of each of six phantoms
    outcomes = [PHANTOM.outcome(head, made) for made, _ in held_out]
    assert PHANTOM.statistic("froc")(outcomes) > 0.7


def test_an_atlas_of_another_phantom_knows_less_than_the_head(
    phantoms: tuple[Head, list[tuple[Example, Lesion]]],
) -> None:
    head, held_out = phantoms
    outcomes: list[Detected] = []
    for (made, _), (other, _) in zip(held_out, held_out[1:] + held_out[:1], strict=True):
        assert made.labels is not None
        assert other.labels is not None
        carried = np.zeros(made.labels.array.shape, np.int16)
        part = tuple(slice(min(pair)) for pair in zip(carried.shape, other.labels.array.shape, strict=True))
        carried[part] = other.labels.array[part]
        laid = LabelMap(array=carried, classes=other.labels.classes)
        outcomes.append(PHANTOM.outcome_of_labels(laid, made.labels, made.affine_ras, head.classes))
    mine = [PHANTOM.outcome(head, made) for made, _ in held_out]
    figure = PHANTOM.statistic("froc")
    assert figure(outcomes) < figure(mine)


# ------------------------------------------------------------------------------------------------- the head


def test_the_head_rests_on_disk_as_plain_arrays(head: Head, tmp_path: Path) -> None:
    save_file(head.arrays, tmp_path / "head.safetensors")
    about = json.loads(json.dumps({"mode": head.mode, "classes": head.classes, "facts": head.facts}))
    read = Head(
        mode=about["mode"],
        classes=tuple(about["classes"]),
        arrays=load_file(tmp_path / "head.safetensors"),
        facts=about["facts"],
    )
    one = example(22).features
    assert SMALL.predict(read, one, AFFINE, SHAPE) == SMALL.predict(head, one, AFFINE, SHAPE)


def test_the_same_seed_gives_the_same_head(head: Head) -> None:
    few = dataclasses.replace(SMALL, background=60)
    fitted = [few.fit([example(0), example(1)], CLASSES, mode="probe", seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(fitted[0].arrays["weight"], fitted[1].arrays["weight"])
    assert (fitted[0].arrays["weight"] != fitted[2].arrays["weight"]).any()


def test_what_the_head_says_of_the_whole_field_is_what_its_rows_say(head: Head) -> None:
    one = SMALL._labelled(example(23), CLASSES)
    every = np.arange(len(one.kinds))
    rows = (one.anchors.rows(every, SMALL.around) - head.arrays["middle"]) / head.arrays["scale"]
    wanted = rows @ head.arrays["weight"] + head.arrays["bias"]
    said = detect._say(head, one.anchors.tokens)
    np.testing.assert_allclose(said.reshape(len(every), -1), wanted, atol=1e-4)


def test_the_head_minimises_balanced_cross_entropy_and_the_smooth_l1_loss() -> None:
    task = Detect(around=0, iterations=400, decay=0.02, background=60, rounds=0)
    scans = [task._labelled(example(seed), CLASSES) for seed in (0, 1)]
    lesson = detect._Lesson.of(scans, [scan.drawn(30, 0) for scan in scans], 0)
    head = task._descend(lesson, task._blank(lesson, CLASSES, "probe"))
    rows = (lesson.rows - head.arrays["middle"]) / head.arrays["scale"]

    def naive(weight: np.ndarray, bias: np.ndarray) -> float:
        total = 0.0
        for place in range(2):
            amid = [row for row in range(len(rows)) if lesson.kinds[row, place] == 1]
            off = [row for row in range(len(rows)) if lesson.kinds[row, place] == 0]
            for row in amid + off:
                said = (rows[row] @ weight + bias)[place * 7 : place * 7 + 7]
                if row in amid:
                    total += 0.25 * math.log(1 + math.exp(-said[0])) / len(amid) / 2
                    gaps = [abs(said[1 + side] - lesson.aims[row, place, side]) for side in range(6)]
                    smooth = [gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps]
                    total += sum(smooth) / 6 / len(amid) / 2
                else:
                    total += 0.75 * math.log(1 + math.exp(said[0])) / len(off) / 2
        return total + 0.02 * float((weight**2).sum())

    weight, bias = head.arrays["weight"].astype(float), head.arrays["bias"].astype(float)
    best = naive(weight, bias)
    rng = np.random.default_rng(0)
    for _ in range(8):
        assert naive(weight + rng.normal(0, 0.02, weight.shape), bias + rng.normal(0, 0.02, bias.shape)) > best
    blank = task._blank(lesson, CLASSES, "probe")
    assert best < naive(blank.arrays["weight"].astype(float), blank.arrays["bias"].astype(float))


def test_each_round_adds_the_tokens_that_are_most_firmly_wrong(head: Head) -> None:
    scans = [SMALL._labelled(example(seed), CLASSES) for seed in (0, 1)]
    chosen = [scan.drawn(50, 0) for scan in scans]
    firm: list[tuple[float, int, int]] = []
    for at, scan in enumerate(scans):
        said = detect._say(head, scan.anchors.tokens)[:, :, 0]
        firm += [
            (max(said[token, place] for place in range(2) if scan.kinds[token, place] == 0), at, token)
            for token in range(len(said))
            if token not in chosen[at] and (scan.kinds[token] == 0).any()
        ]
    wanted = {(at, token) for _, at, token in sorted(firm, reverse=True)[:40]}
    found = detect._hardest(head, scans, chosen, 40)
    assert {(at, int(token)) for at, tokens in enumerate(found) for token in tokens} == wanted
    everything = detect._hardest(head, scans, chosen, 10**6)
    assert sum(len(tokens) for tokens in everything) == len(firm)


def test_tokens_at_the_rim_of_things_are_not_learned_from() -> None:
    scan = SMALL._labelled(example(1), ("ball",))
    assert {-1, 0, 1} == set(scan.kinds.ravel().tolist())
    drawn = scan.drawn(10**6, 0)
    assert (scan.kinds[drawn] != -1).all()
    assert len(drawn) == (scan.kinds != -1).sum()


# ------------------------------------------------------------------------------------------------- figures


def test_an_outcome_is_plain_data_and_says_what_was_looked_for(head: Head) -> None:
    task: Task = SMALL
    found = task.outcome(head, example(24))
    plain = json.loads(json.dumps(dataclasses.asdict(found)))
    again = {
        name: Matched(**{k: tuple(v) if k in ("scores", "hits") else v for k, v in one.items()})
        for name, one in plain["by_class"].items()
    }
    assert Detected(by_class=again) == found
    assert "ball" in found
    assert "liver" not in found


def test_a_class_that_a_scan_has_not_still_counts_its_false_positives(head: Head) -> None:
    without = SMALL.outcome(head, example(24, bricks=0))
    assert "brick" in without
    assert without.by_class["brick"].truths == 0
    assert without.by_class["brick"].hits == (False,) * len(without.by_class["brick"].scores)
    assert math.isnan(SMALL.statistic("froc:brick")([without]))


def test_the_figures_are_means_over_classes_and_over_the_seven_rates() -> None:
    sample = [
        Detected(
            by_class={
                "ball": Matched(scores=(0.9, 0.8), hits=(True, False), truths=2),
                "brick": Matched(scores=(0.7,), hits=(True,), truths=1),
                "rod": Matched(scores=(0.7,), hits=(False,), truths=0),
            }
        )
    ]
    task = Detect()
    balls = Sweep.of([sample[0].by_class["ball"]]).sensitivity_at(np.ones((1, 1)), RATES)
    assert task.statistic("froc:ball")(sample) == pytest.approx(balls.mean())
    assert task.statistic("froc:ball")(sample) == pytest.approx(0.5)
    assert task.statistic("froc:brick")(sample) == 1.0
    assert math.isnan(task.statistic("froc:rod")(sample))
    assert math.isnan(task.statistic("froc:liver")(sample))
    assert task.statistic("froc")(sample) == pytest.approx(0.75)
    assert task.statistic("average_precision")(sample) == pytest.approx(0.75)
    assert math.isnan(task.statistic("froc")([]))


def test_scans_of_a_subject_are_put_together_and_rates_are_per_scan() -> None:
    one, other = outcome((0.9,), (True,), 1), outcome((0.8, 0.1), (False, True), 2)
    both = SMALL.combine([one, other, outcome((), (), 0, name="brick")])
    assert both.by_class["ball"] == Matched(scores=(0.9, 0.8, 0.1), hits=(True, False, True), truths=3, scans=2)
    assert both.by_class["brick"].scans == 1
    assert SMALL.statistic("froc:ball")([both]) == pytest.approx(SMALL.statistic("froc:ball")([one, other]))


def test_a_subject_in_whom_a_class_was_not_looked_for_has_no_say_in_it() -> None:
    sample = [outcome((0.9,), (True,), 1), outcome((0.95,), (False,), 1, name="brick")]
    assert SMALL.statistic("froc:ball")(sample) == 1.0
    found = SMALL.statistic("froc:ball").of_draws(sample, np.array([[1.0, 1.0], [0.0, 2.0]]))
    assert found[0] == 1.0
    assert math.isnan(found[1])


def test_repeats_are_averaged() -> None:
    good, poor = outcome((0.9,), (True,), 1), outcome((0.9,), (False,), 1)
    figure = metrics.averaged(SMALL.statistic("froc"))
    assert figure([(good, poor), (good, poor)]) == pytest.approx(0.5)


@pytest.mark.parametrize("metric", Detect.metrics)
def test_an_interval_over_fifty_subjects_is_that_of_draw_after_draw(metric: str) -> None:
    rng = np.random.default_rng(0)
    by_subject: dict[str, Detected] = {}
    for place in range(50):
        hits = rng.random(100) < 0.02
        scores = rng.random(100) + hits
        by_subject[f"s{place}"] = outcome(tuple(scores.tolist()), tuple(hits.tolist()), int(hits.sum()) + 1)
    statistic = SMALL.statistic(metric)
    few = metrics.bootstrap_interval(by_subject, statistic, draws=100)
    slow = metrics.bootstrap_interval(by_subject, statistic.__call__, draws=100)
    assert few.low == pytest.approx(slow.low)
    assert few.high == pytest.approx(slow.high)
    assert few.low is not None
    assert few.high is not None
    assert few.low < few.estimate < few.high


def test_labels_that_are_the_truth_find_everything_and_others_nothing() -> None:
    truth = labels(1)
    task = Detect()
    same = task.outcome_of_labels(truth, truth, AFFINE, CLASSES)
    assert task.statistic("froc")([same]) == 1.0
    assert same.by_class["ball"].truths == 2
    empty = LabelMap(array=np.zeros(SHAPE, np.int16), classes=truth.classes)
    none = task.outcome_of_labels(empty, truth, AFFINE, CLASSES)
    assert none.by_class["ball"] == Matched(scores=(), hits=(), truths=2)
    assert task.statistic("froc")([none]) == 0.0


def test_the_settings_decide_what_a_hit_is(head: Head) -> None:
    one = example(25)
    outcomes = {kind: dataclasses.replace(SMALL, hit=kind, iou=0.99).outcome(head, one) for kind in ("radius", "iou")}
    assert any(outcomes["radius"].by_class["ball"].hits)
    assert not any(outcomes["iou"].by_class["ball"].hits)


def test_pieces_below_the_smallest_size_are_neither_learned_nor_looked_for(head: Head) -> None:
    assert dataclasses.replace(SMALL, smallest_mm3=1e6).outcome(head, example(24)).by_class["ball"].truths == 0
    with pytest.raises(ValueError, match="shows a 'ball'"):
        dataclasses.replace(SMALL, smallest_mm3=1e6).fit([example(0)], CLASSES, mode="probe", seed=0)


# ------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="no mode"):
        SMALL.fit([example(0)], CLASSES, mode="knn", seed=0)
    with pytest.raises(ValueError, match="no labelled scan shows a 'brick'"):
        SMALL.fit([example(seed, bricks=0) for seed in range(3)], CLASSES, mode="probe", seed=0)
    with pytest.raises(ValueError, match="needs patch tokens"):
        SMALL.fit([example(0, Seen(None, None))], CLASSES, mode="probe", seed=0)
    with pytest.raises(ValueError, match="needs voxel labels"):
        SMALL.fit([dataclasses.replace(example(0), labels=None)], CLASSES, mode="probe", seed=0)
    with pytest.raises(ValueError, match="no metric 'dice'"):
        SMALL.statistic("dice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "at least 1"),
        ({"background": 1}, "at least 2"),
        ({"decay": -0.1}, "not be negative"),
        ({"rounds": -1}, "not be negative"),
        ({"reach": 0.0}, "reach must be positive"),
        ({"overlap": 1.0}, "overlap"),
        ({"hit": "dice"}, "one of radius, inside, iou"),
        ({"iou": 0.0}, "overlap of a hit"),
    ],
)
def test_settings_guard_themselves(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detect(**changes)  # pyright: ignore[reportArgumentType]
