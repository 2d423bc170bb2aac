from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.covariance import ledoit_wolf
from sklearn.neighbors import NearestNeighbors

from voxelstem.certainty import strangeness
from voxelstem.certainty.strangeness import KnownClasses, NearestKnown, Yardstick, fit_classes, fit_nearest


def scans(
    count: int, *, dim: int = 12, each: int = 1, classes: int = 2, seed: int = 0
) -> tuple[np.ndarray, list[str], list[str]]:
    """Embeddings, labels and subjects of `count` people with `each` scans, which are alike within a person."""
    rng = np.random.default_rng(seed)
    # The world stays the same, whoever is drawn from it.
    world = np.random.default_rng(100 + dim)
    middles, mix = 2 * world.normal(size=(classes, dim)), world.normal(size=(dim, dim)) / math.sqrt(dim)
    of = rng.integers(0, classes, count)
    people = middles[of] + rng.normal(size=(count, dim)) @ mix + 0.1 * rng.normal(size=(count, dim)) + 3
    rows = np.repeat(people, each, axis=0) + (0.05 * rng.normal(size=(count * each, dim)) if each > 1 else 0)
    labels = [f"class {kind}" for kind in np.repeat(of, each)]
    return rows.astype(np.float32), labels, [f"s{n}" for n in range(count) for _ in range(each)]


def both(
    count: int, *, level: float = 0.9, dim: int = 12, each: int = 1, seed: int = 0
) -> list[NearestKnown | KnownClasses]:
    rows, labels, subjects = scans(count, dim=dim, each=each, seed=seed)
    return [fit_nearest(rows, subjects, level=level), fit_classes(rows, labels, subjects, level=level)]


@given(st.integers(0, 100), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=25)
def test_neighbours_agree_with_loops(seed: int, neighbours: int, each: int) -> None:
    rows, _, subjects = scans(9, dim=5, each=each, seed=seed)
    new, _, _ = scans(4, dim=5, seed=seed + 1000)
    found = fit_nearest(rows, subjects, neighbours=neighbours, level=0.8)

    def kth(row: np.ndarray, others: list[np.ndarray]) -> float:
        unit = row / math.sqrt(sum(float(x) ** 2 for x in row))
        return sorted(
            math.sqrt(sum(float(a - b) ** 2 for a, b in zip(unit, other / np.linalg.norm(other), strict=True)))
            for other in others
        )[neighbours - 1]

    wide = rows.astype(np.float64)
    known = [
        kth(row, [o for o, s in zip(wide, subjects, strict=True) if s != name])
        for row, name in zip(wide, subjects, strict=True)
    ]
    np.testing.assert_allclose(found.yardstick.scores, known, atol=1e-6)
    np.testing.assert_allclose(
        found.apply(new).score, [kth(row, list(wide)) for row in new.astype(np.float64)], atol=1e-6
    )


def test_neighbours_are_scikit_learns_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangeness, "CHUNK", 7)
    rows, _, subjects = scans(40)
    new, _, _ = scans(25, seed=1)
    unit, new_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, new))
    oracle = NearestNeighbors(n_neighbors=5).fit(unit)
    found = fit_nearest(rows, subjects)
    np.testing.assert_allclose(found.apply(new).score, oracle.kneighbors(new_unit)[0][:, 4], atol=1e-5)
    np.testing.assert_allclose(found.yardstick.scores, oracle.kneighbors()[0][:, 4], atol=1e-5)


def around(rows: np.ndarray, labels: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    kinds = np.array(labels)
    means = {name: rows[kinds == name].mean(axis=0) for name in sorted(set(labels))}
    return np.stack([row - means[name] for row, name in zip(rows, labels, strict=True)]), means


@pytest.mark.parametrize(("count", "dim"), [(60, 4), (40, 12), (24, 24), (20, 70)])
def test_distances_have_scikit_learns_covariance(count: int, dim: int) -> None:
    rows, labels, subjects = scans(count, dim=dim)
    wide = rows.astype(np.float64)
    residual, means = around(wide, labels)
    covariance, share = ledoit_wolf(residual, assume_centered=True)
    assert 0 < share < 1
    found = fit_classes(rows, labels, subjects, level=0.8)
    span = found.directions.T @ np.diag(found.variances - found.rest) @ found.directions
    np.testing.assert_allclose(span + found.rest * np.eye(dim), covariance, atol=1e-10)
    new = scans(15, dim=dim, seed=3)[0].astype(np.float64)
    inverse = np.linalg.inv(covariance)
    wanted = [min(math.sqrt((row - mean) @ inverse @ (row - mean)) for mean in means.values()) for row in new]
    np.testing.assert_allclose(found.apply(new).score, wanted, rtol=1e-7)


@pytest.mark.parametrize(("count", "dim", "each"), [(30, 4, 1), (30, 4, 3), (14, 30, 1), (12, 40, 3), (9, 24, 2)])
def test_a_known_scan_is_measured_as_if_its_subject_had_not_been_there(count: int, dim: int, each: int) -> None:
    rows, labels, subjects = scans(count, dim=dim, each=each)
    # A person whose scans have two labels, and a class that only one person has.
    labels[0], labels[-each:] = "class 1" if labels[0] == "class 0" else "class 0", ["rare"] * each
    found = fit_classes(rows, labels, subjects, level=0.8)
    wide = rows.astype(np.float64)
    residual, _ = around(wide, labels)
    _, share = ledoit_wolf(residual, assume_centered=True)
    sphere = share * (residual**2).sum() / residual.size * np.eye(dim)
    for at, name in enumerate(subjects):
        stay = [n for n, other in enumerate(subjects) if other != name]
        left, means = around(wide[stay], [labels[n] for n in stay])
        inverse = np.linalg.inv((1 - share) * left.T @ left / len(left) + sphere)
        wanted = min(math.sqrt((wide[at] - mean) @ inverse @ (wide[at] - mean)) for mean in means.values())
        assert found.yardstick.scores[at] == pytest.approx(wanted, rel=1e-7)


def test_the_share_as_strange_counts_known_scans() -> None:
    stick = Yardstick(level=0.75, scores=np.array([0.4, 0.1, 0.3, 0.2]))
    said = stick.judge(np.array([0.0, 0.1, 0.25, 0.4, 0.5]))
    np.testing.assert_allclose(said.as_strange, [5 / 5, 5 / 5, 3 / 5, 2 / 5, 1 / 5])
    assert stick.threshold == 0.4
    np.testing.assert_array_equal(said.flagged, [False, False, False, False, True])


@given(st.lists(st.integers(0, 9), min_size=19, max_size=50), st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_what_is_flagged_has_hardly_any_known_scan_as_strange(known: list[int], level: float) -> None:
    said = Yardstick(level=level, scores=np.array(known, dtype=float)).judge(np.arange(-1.0, 11))
    np.testing.assert_array_equal(said.flagged, said.as_strange <= 1 - level + 1e-12)
    naive = [(1 + sum(score >= new for score in known)) / (1 + len(known)) for new in range(-1, 11)]
    np.testing.assert_allclose(said.as_strange, naive)


@pytest.mark.parametrize("each", [1, 3])
def test_scans_of_new_people_are_flagged_as_seldom_as_they_should(each: int) -> None:
    # Known people with several scans each: were they measured by their own, every new person would look strange.
    flagged: list[list[float]] = [[], []]
    for seed in range(40):
        new = scans(60, seed=1000 + seed)[0]
        for place, known in enumerate(both(50, each=each, seed=seed)):
            flagged[place].append(float(known.apply(new).flagged.mean()))
    for shares in flagged:
        assert np.mean(shares) == pytest.approx(0.1, abs=0.03)


def test_what_is_of_another_kind_is_flagged() -> None:
    rng = np.random.default_rng(0)
    for known in both(80):
        knees = known.apply(rng.normal(-3, 1, (50, 12)))
        assert knees.flagged.all()
        assert (knees.as_strange == 1 / 81).all()
        assert (knees.score > known.yardstick.threshold).all()


def test_a_direction_in_which_nothing_varies_is_watched() -> None:
    # 12 scans of 40 dimensions: a step beside everything that was seen counts in full.
    rows, labels, subjects = scans(12, dim=40)
    known = fit_classes(rows, labels, subjects, level=0.8)
    beside = np.linalg.svd(np.concatenate([rows, np.ones((1, 40))]).astype(np.float64))[2][-1]
    near, far = known.means[:1], known.means[:1] + 3 * beside
    assert known.apply(near).score[0] == 0
    assert known.apply(far).score[0] == pytest.approx(3 / math.sqrt(known.rest), rel=1e-6)


def test_length_does_not_count_between_neighbours() -> None:
    rows, _, subjects = scans(40)
    known = fit_nearest(rows, subjects)
    new = scans(10, seed=1)[0]
    np.testing.assert_allclose(known.apply(new).score, known.apply(1000 * new).score, atol=1e-6)


def test_units_do_not_count_in_standard_deviations() -> None:
    rows, labels, subjects = scans(40)
    new = scans(10, seed=1)[0]
    one, other = fit_classes(rows, labels, subjects), fit_classes(1e3 * rows, labels, subjects)
    np.testing.assert_allclose(one.apply(new).score, other.apply(1e3 * new).score, rtol=1e-4)
    assert one.yardstick.threshold == pytest.approx(other.yardstick.threshold, rel=1e-4)


def test_a_single_number_has_a_distance_in_standard_deviations() -> None:
    rows = np.random.default_rng(0).normal(5, 2, (50, 1))
    known = fit_classes(rows, ["all"] * 50, [str(n) for n in range(50)])
    assert known.apply(np.array([[9.0]])).score[0] == pytest.approx(abs(9 - rows.mean()) / rows.std())


def test_records_rest_on_disk(tmp_path: Path) -> None:
    new = scans(10, seed=1)[0]
    for known in both(40, each=2):
        save_file(known.arrays(), tmp_path / "known.safetensors")
        back = type(known).of(load_file(tmp_path / "known.safetensors"))
        a, b = known.apply(new), back.apply(new)
        for name in ("score", "flagged", "as_strange"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert back.yardstick.threshold == known.yardstick.threshold


def test_damaged_records_are_refused() -> None:
    nearest, classes = both(40)
    arrays = nearest.arrays()
    with pytest.raises(ValueError, match="there is no vectors, neighbours"):
        NearestKnown.of(classes.arrays())
    with pytest.raises(ValueError, match="there is no scores"):
        NearestKnown.of({name: value for name, value in arrays.items() if name != "scores"})
    with pytest.raises(ValueError, match="as many scores, got 30"):
        NearestKnown.of(arrays | {"scores": arrays["scores"][:30]})
    with pytest.raises(ValueError, match="as many neighbours, got 41"):
        NearestKnown.of(arrays | {"neighbours": np.array(41)})
    arrays = classes.arrays()
    for name, value in (("rest", np.array(0.0)), ("variances", -arrays["variances"]), ("means", np.zeros((2, 5)))):
        with pytest.raises(ValueError, match="each with a positive variance"):
            KnownClasses.of(arrays | {name: value})
    with pytest.raises(ValueError, match="level lies in"):
        KnownClasses.of(arrays | {"level": np.array(1.5)})


def test_embeddings_that_are_none_are_refused() -> None:
    rows, labels, subjects = scans(40)
    broken = rows.copy()
    broken[6, 2] = math.nan
    zero = rows.copy()
    zero[6] = 0
    with pytest.raises(ValueError, match="1 of 40 embeddings are not finite; the first is row 6"):
        fit_nearest(broken, subjects)
    with pytest.raises(ValueError, match="1 of 40 embeddings are not finite; the first is row 6"):
        fit_classes(broken, labels, subjects)
    with pytest.raises(ValueError, match="1 of 40 embeddings are all zeros"):
        fit_nearest(zero, subjects)
    for known in both(40):
        with pytest.raises(ValueError, match="the first is row 6"):
            known.apply(broken)
        with pytest.raises(ValueError, match="12 numbers each, these 5"):
            known.apply(rows[:, :5])


def test_too_few_scans_are_refused_with_their_counts() -> None:
    rows, labels, subjects = scans(40)
    with pytest.raises(ValueError, match=r"a level of 0\.95 needs 19 known scans.*are 18 of 18"):
        fit_nearest(rows[:18], subjects[:18])
    with pytest.raises(ValueError, match=r"a level of 0\.95 needs 19 known scans.*are 18 of 18"):
        fit_classes(rows[:18], labels[:18], subjects[:18])
    with pytest.raises(ValueError, match="the 39 scans beside those of one subject, got 40"):
        fit_nearest(rows, subjects, neighbours=40)
    with pytest.raises(ValueError, match="between 1 and the 0 scans"):
        fit_nearest(rows, ["s"] * 40)
    with pytest.raises(ValueError, match="got 0"):
        fit_nearest(rows, subjects, neighbours=0)
    with pytest.raises(ValueError, match="two subjects at least, there are 1"):
        fit_classes(rows, labels, ["s"] * 40)
    with pytest.raises(ValueError, match="got 39 for 40"):
        fit_classes(rows, labels[1:], subjects)
    with pytest.raises(ValueError, match="got 39 for 40"):
        fit_nearest(rows, subjects[1:])
    with pytest.raises(ValueError, match="got 0 for 0"):
        fit_nearest(rows[:0], [])
    with pytest.raises(ValueError, match="level lies in"):
        fit_nearest(rows, subjects, level=1.0)


def test_scans_that_do_not_vary_are_refused() -> None:
    rows, _, subjects = scans(40)
    with pytest.raises(ValueError, match="do not vary enough"):
        fit_classes(np.repeat(rows[:1], 40, axis=0), ["a"] * 40, subjects)
    with pytest.raises(ValueError, match="do not vary enough"):
        fit_classes(np.full((40, 12), 0.1), ["a"] * 40, subjects)
    with pytest.raises(ValueError, match="do not vary enough"):
        fit_classes(rows, [str(n) for n in range(40)], subjects)
