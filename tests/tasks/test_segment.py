from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy import ndimage

from voxelstem.heads.queries import QueryConfig
from voxelstem.protocols import Example, Head
from voxelstem.study import LabelMap
from voxelstem.tasks import segment
from voxelstem.tasks.segment import Segment, argmax_at, compare, numbered
from voxelstem.views import cells

AFFINE = np.diag([1.5, 2.0, 3.0, 1.0])
SHAPE = (24, 20, 14)
CLASSES = ("ball", "wall")


@dataclass(frozen=True)
class Seen:
    tokens: np.ndarray | None
    tokens_affine_ras: np.ndarray | None
    scan: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))


def labels(seed: int = 0) -> LabelMap:
    rng = np.random.default_rng(seed)
    centre = np.array(SHAPE) * [1.5, 2.0, 3.0] / 2 + rng.uniform(-3, 3, 3)
    i, j, k = np.indices(SHAPE)
    distance = np.sqrt((i * 1.5 - centre[0]) ** 2 + (j * 2.0 - centre[1]) ** 2 + (k * 3.0 - centre[2]) ** 2)
    array = np.where(distance < 9, 7, 0).astype(np.int16)
    array[:, -5:] = 3
    return LabelMap(array=array, classes={7: "ball", 3: "wall"})


def knowing_tokens(truth: LabelMap, *, sub: int, size_mm: float = 6.0) -> Seen:
    """Tokens that hold the share of every class in every cell: a head that learns anything must read them."""
    affine, size = cells.cover(AFFINE, SHAPE, (size_mm,) * 3)
    grid = cells.lay(AFFINE, SHAPE, affine, size, sub=sub)
    counts = cells.tally(numbered(truth, CLASSES), grid, 3)
    ti, tj, tk = size
    shares = counts / np.maximum(counts.sum(axis=3, keepdims=True), 1)
    tokens = shares.reshape(ti, sub, tj, sub, tk, sub, 3).transpose(0, 2, 4, 1, 3, 5, 6).reshape(ti, tj, tk, -1)
    return Seen(tokens.astype(np.float32), affine)


def example(seed: int, features: Seen | None = None) -> Example:
    truth = labels(seed)
    return Example(
        subject=f"s{seed}",
        key=f"k{seed}",
        features=features or knowing_tokens(truth, sub=2),
        affine_ras=AFFINE,
        labels=truth,
    )


def test_tokens_that_know_give_a_good_segmentation_of_another_scan() -> None:
    task = Segment(iterations=100)
    head = task.fit([example(0)], CLASSES, mode="probe", seed=0)
    dice = task.outcome(head, example(1))
    assert dice["ball"] > 0.85
    assert dice["wall"] > 0.9


def test_tokens_that_know_nothing_give_a_poor_one() -> None:
    task = Segment()
    grid = knowing_tokens(labels(), sub=2)
    rng = np.random.default_rng(0)
    assert grid.tokens is not None
    noise = [Seen(rng.normal(size=grid.tokens.shape).astype(np.float32), grid.tokens_affine_ras) for _ in range(2)]
    head = task.fit([example(0, noise[0])], CLASSES, mode="probe", seed=0)
    assert task.outcome(head, example(1, noise[1]))["ball"] < 0.5


def test_the_same_seed_gives_the_same_head() -> None:
    task = Segment(tokens=40)
    heads = [task.fit([example(0)], CLASSES, mode="probe", seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(heads[0].arrays["weight"], heads[1].arrays["weight"])
    assert (heads[0].arrays["weight"] != heads[2].arrays["weight"]).any()


def test_the_head_minimises_the_balanced_cross_entropy_of_soft_cells() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 3)).astype(np.float32)
    counts = rng.dirichlet(np.ones(3), size=(40, 8)).astype(np.float32)
    task = Segment(iterations=300, decay=0.01, balance=0.5)
    weight, bias = task._descend(rows, counts)

    def naive(weight: np.ndarray, bias: np.ndarray) -> float:
        share = counts.sum(axis=(0, 1)) / counts.sum()
        total = mass = 0.0
        for row, token in zip(rows, counts, strict=True):
            logits = (row @ weight + bias).reshape(8, 3)
            for cell in range(8):
                log_chance = logits[cell] - math.log(sum(math.exp(value) for value in logits[cell]))
                for kind in range(3):
                    loud = token[cell, kind] * share[kind] ** -0.5
                    total -= loud * log_chance[kind]
                    mass += loud
        return total / mass + 0.01 * float((weight**2).sum()) / 8

    best = naive(weight, bias)
    for _ in range(5):
        assert naive(weight + rng.normal(0, 0.01, weight.shape), bias + rng.normal(0, 0.01, bias.shape)) > best
    assert best < naive(np.zeros_like(weight), np.zeros_like(bias))


def test_prediction_interpolates_logits_between_cells_as_the_slow_twin_does() -> None:
    affine, size = cells.cover(AFFINE, SHAPE, (7.0, 7.0, 7.0))
    grid = cells.lay(AFFINE, SHAPE, affine, size, sub=2)
    logits = np.random.default_rng(0).normal(size=(3, *grid.cells_ijk)).astype(np.float32)
    found = argmax_at(torch.from_numpy(logits), grid)
    places = [
        np.clip(place, member.min(), member.max()) for place, member in zip(grid.places(), grid.members(), strict=True)
    ]
    for ijk in [(0, 0, 0), (23, 19, 13), (11, 7, 5), (3, 18, 9), (20, 2, 12)]:
        low = [min(int(places[axis][at]), grid.cells_ijk[axis] - 2) for axis, at in enumerate(ijk)]
        part = [places[axis][at] - low[axis] for axis, at in enumerate(ijk)]
        value = np.zeros(3)
        for corner in np.ndindex(2, 2, 2):
            share = math.prod(p if step else 1 - p for p, step in zip(part, corner, strict=True))
            value += share * logits[(slice(None), *np.add(low, corner))]
        assert found[ijk] == value.argmax()


def test_a_prediction_does_not_depend_on_the_size_of_the_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Segment()
    head = task.fit([example(0)], CLASSES, mode="probe", seed=0)
    whole = task.predict(head, example(1).features, AFFINE, SHAPE)
    monkeypatch.setattr(segment, "ROWS_AT_ONCE", 2000)
    slabs = task.predict(head, example(1).features, AFFINE, SHAPE)
    np.testing.assert_array_equal(whole.array, slabs.array)
    assert whole.classes == {1: "ball", 2: "wall"}


def test_padding_round_the_scan_changes_nothing() -> None:
    """Tokens beyond the scan hold no voxel: they are neither learned from nor interpolated with."""
    task, inner = Segment(), example(1).features
    head = task.fit([example(0)], CLASSES, mode="probe", seed=0)
    assert inner.tokens is not None
    assert inner.tokens_affine_ras is not None
    padded = np.pad(inner.tokens, ((2, 1), (1, 1), (1, 2), (0, 0)), constant_values=50.0)
    affine = inner.tokens_affine_ras.copy()
    affine[:3, 3] += affine[:3, :3] @ [-2, -1, -1]
    around = Seen(padded, affine)
    np.testing.assert_array_equal(
        task.predict(head, around, AFFINE, SHAPE).array, task.predict(head, inner, AFFINE, SHAPE).array
    )
    refit = task.fit([example(1, around)], CLASSES, mode="probe", seed=0)
    plain = task.fit([example(1)], CLASSES, mode="probe", seed=0)
    np.testing.assert_allclose(refit.arrays["weight"], plain.arrays["weight"], atol=1e-5)


def test_dice_agrees_with_its_definition_and_leaves_out_what_the_truth_has_not() -> None:
    truth = labels()
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 4, SHAPE).astype(np.int16)
    dice = compare(predicted, truth, ("wall", "absent", "ball"))
    for name, number in (("wall", 1), ("ball", 3)):
        wanted = truth.array == {"wall": 3, "ball": 7}[name]
        both = (wanted & (predicted == number)).sum()
        assert dice[name] == pytest.approx(2 * both / (wanted.sum() + (predicted == number).sum()))
    assert "absent" not in dice
    assert compare(numbered(truth, CLASSES), truth, CLASSES) == {"ball": 1.0, "wall": 1.0}


def test_labels_are_renumbered_by_name_and_strange_ones_become_background() -> None:
    given = LabelMap(array=np.array([[[0, 2, 9, 5]]], dtype=np.int16), classes={2: "liver", 9: "spleen", 5: "rib"})
    assert numbered(given, ("spleen", "liver")).ravel().tolist() == [0, 2, 1, 0]


def test_organs_are_averaged_within_a_subject_and_then_over_subjects() -> None:
    task = Segment()
    outcomes = [{"ball": 0.5, "wall": 1.0}, {"wall": 0.5}]
    assert task.statistic("dice")(outcomes) == pytest.approx((0.75 + 0.5) / 2)
    assert task.statistic("dice:ball")(outcomes) == 0.5
    assert task.combine(outcomes) == {"ball": 0.5, "wall": 0.75}


def test_tokens_without_organs_are_thinned_first_and_still_stand_for_all() -> None:
    counts = np.zeros((100, 1, 2), np.float32)
    counts[:, :, 0] = 1
    counts[:10, :, 1] = 1
    kept, importance = segment._thin(counts, 40, 0)
    assert set(range(10)) <= set(kept.tolist())
    assert len(kept) == 40
    assert importance.sum() == pytest.approx(100)
    everything, ones = segment._thin(counts, 1000, 0)
    assert len(everything) == 100
    assert (ones == 1).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="no mode"):
        Segment().fit([example(0)], CLASSES, mode="knn", seed=0)
    with pytest.raises(ValueError, match="needs patch tokens"):
        Segment().fit([example(0, Seen(None, None))], CLASSES, mode="probe", seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        Segment(sub=0)


FEW = Segment(queries=QueryConfig(width=8, heads=2, layers=1, few_steps=10))


def lit(seed: int) -> Example:
    """A scan in which bright patches are the organ: brighter than the scan's own mean, which is anywhere."""
    rng = np.random.default_rng(seed)
    glow = ndimage.gaussian_filter(rng.normal(size=(8, 8, 8)), 1.2)
    glow /= glow.std()
    tokens = rng.normal(size=(8, 8, 8, 6)) * 0.3
    tokens[..., 0] += glow + 2 * rng.normal()
    mixed = tokens @ np.random.default_rng(99).normal(size=(6, 6))
    array = np.kron((glow > 0.5).astype(np.int16), np.ones((2, 2, 2), np.int16))
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = 0.5
    return Example(
        subject=f"s{seed}",
        key=f"k{seed}",
        features=Seen(mixed.astype(np.float32), affine),
        affine_ras=np.eye(4),
        labels=LabelMap(array=array, classes={1: "organ"}),
    )


def padded(features: Seen) -> Seen:
    """Tokens beyond the scan, on both sides."""
    assert features.tokens is not None
    assert features.tokens_affine_ras is not None
    affine = features.tokens_affine_ras.copy()
    affine[:3, 3] += affine[:3, :3] @ [-2, -1, -1]
    return Seen(np.pad(features.tokens, ((2, 1), (1, 1), (1, 2), (0, 0)), constant_values=50.0), affine)


def test_queries_see_the_rest_of_the_scan_where_the_probe_sees_single_patches() -> None:
    task, found = Segment(sub=1), {}
    for mode in ("probe", "attention"):
        head = task.fit([lit(seed) for seed in range(12)], ("organ",), mode=mode, seed=0)
        found[mode] = task.statistic("dice")([task.outcome(head, lit(seed)) for seed in range(100, 110)])
    assert found["attention"] > found["probe"] + 0.2
    assert found["attention"] > 0.65


def test_queries_of_a_single_labelled_subject_say_what_the_probe_says() -> None:
    heads = [FEW.fit([example(0)], CLASSES, mode=mode, seed=0) for mode in ("probe", "attention")]
    assert heads[1].facts["steps"] == 0
    tokens = example(1).features.tokens
    assert tokens is not None
    one, other = (FEW.logits(head, tokens) for head in heads)
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)


def test_queries_do_not_look_at_padding() -> None:
    train = [example(seed) for seed in range(3)]
    head = FEW.fit(train, CLASSES, mode="attention", seed=0)
    around, inner = padded(knowing_tokens(labels(5), sub=2)), knowing_tokens(labels(5), sub=2)
    np.testing.assert_array_equal(
        FEW.predict(head, around, AFFINE, SHAPE).array, FEW.predict(head, inner, AFFINE, SHAPE).array
    )
    np.testing.assert_array_equal(FEW.mark(head, around, AFFINE, SHAPE), FEW.predict(head, around, AFFINE, SHAPE).array)
    one, other = (FEW._celled(example(5, features), CLASSES, 0) for features in (around, inner))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.counts, other.counts)


def test_queries_rest_as_plain_arrays_and_equal_seeds_give_equal_heads() -> None:
    train = [example(seed) for seed in range(3)]
    heads = [FEW.fit(train, CLASSES, mode="attention", seed=seed) for seed in (1, 1, 2)]
    for name, array in heads[0].arrays.items():
        np.testing.assert_array_equal(array, heads[1].arrays[name])
    assert (heads[0].arrays["queries"] != heads[2].arrays["queries"]).any()
    again = Head(
        mode="attention",
        classes=CLASSES,
        arrays={name: array.copy() for name, array in heads[0].arrays.items()},
        facts=dict(heads[0].facts),
    )
    # The size of the decoder is the head's own: settings of another run do not change what it says.
    tokens = example(9).features.tokens
    assert tokens is not None
    np.testing.assert_array_equal(Segment().logits(again, tokens), FEW.logits(heads[0], tokens))


def test_a_scan_of_more_patches_than_are_learned_from_keeps_its_organs() -> None:
    few = Segment(queries=QueryConfig(most=30))
    celled = few._celled(example(0), CLASSES, 0)
    assert len(celled.tokens) == 30
    whole = Segment()._celled(example(0), CLASSES, 0)
    assert celled.importance.sum() == pytest.approx(len(whole.tokens))


def test_patches_are_looked_at_in_every_mode() -> None:
    assert all(Segment().looks_at_tokens(mode) for mode in (*Segment.modes, "full"))


def test_queries_refuse_what_the_probe_refuses() -> None:
    with pytest.raises(ValueError, match="needs patch tokens"):
        Segment().fit([example(0, Seen(None, None))], CLASSES, mode="attention", seed=0)
    bare = Example(subject="s", key="k", features=example(0).features, affine_ras=AFFINE)
    for mode in Segment.modes:
        with pytest.raises(ValueError, match="needs voxel labels"):
            Segment().fit([bare], CLASSES, mode=mode, seed=0)


def test_surface_dice_is_measured_in_millimetres_beside_dice_and_averaged_by_itself():
    array = np.zeros((12, 12, 8), dtype=np.int16)
    array[3:9, 3:9, 2:6] = 1
    truth = LabelMap(array=array, classes={1: "liver", 2: "spleen"})
    moved = LabelMap(array=np.roll(array, 1, axis=2), classes=truth.classes)
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    near, far = (
        Segment(tolerance_mm=tolerance).outcome_of_labels(moved, truth, affine, ("liver", "spleen"))
        for tolerance in (3.5, 1.0)
    )
    assert set(near) == {"liver", "nsd:liver"}
    assert near["nsd:liver"] == 1.0
    assert far["nsd:liver"] < 1.0
    assert near["liver"] == far["liver"] == pytest.approx(0.75)
    task = Segment()
    assert task.statistic("dice")([far]) == far["liver"]
    assert task.statistic("nsd")([far]) == task.statistic("nsd:liver")([far]) == far["nsd:liver"]
    assert np.isnan(task.statistic("nsd:spleen")([far]))
    with pytest.raises(ValueError, match="tolerance_mm positive"):
        Segment(tolerance_mm=0.0)
