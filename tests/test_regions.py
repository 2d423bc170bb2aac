from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem import regions
from voxelstem.baselines import patch_histograms
from voxelstem.geometry import patient_to_voxel, voxel_to_patient
from voxelstem.protocols import Features
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.study import InputSpec, LabelMap
from voxelstem.views import cells

OBLIQUE = np.array(
    [[0.8 * 0.9986, -0.0523 * 1.1, 0, -20], [0.8 * 0.0523, 1.1 * 0.9986, 0, 7], [0, 0, 2.5, 3], [0, 0, 0, 1.0]]
)
HOWS: tuple[regions.How, ...] = ("mean", "max", "both")


@dataclass(frozen=True, kw_only=True)
class Said:
    tokens: np.ndarray | None
    tokens_affine_ras: np.ndarray | None
    scan: np.ndarray = field(default_factory=lambda: np.zeros(3))


def said(affine_ras: np.ndarray, tokens_ijk: tuple[int, int, int], *, dim: int = 3, seed: int = 0) -> Said:
    tokens = np.random.default_rng(seed).normal(size=(*tokens_ijk, dim)).astype(np.float32)
    return Said(tokens=tokens, tokens_affine_ras=affine_ras)


def shifted(affine_ras: np.ndarray, by: tuple[float, float, float]) -> np.ndarray:
    """The same grid of tokens, begun elsewhere (in tokens)."""
    moved = affine_ras.copy()
    moved[:3, 3] += affine_ras[:3, :3] @ by
    return moved


def naive_pool(features: Said, region: np.ndarray, affine_ras: np.ndarray, how: str) -> tuple[np.ndarray, float, int]:
    assert features.tokens is not None
    assert features.tokens_affine_ras is not None
    in_cell: dict[tuple[int, ...], int] = {}
    in_region: dict[tuple[int, ...], int] = {}
    for place, held in np.ndenumerate(region):
        token = patient_to_voxel(voxel_to_patient(np.array([place], float), affine_ras), features.tokens_affine_ras)[0]
        cell = tuple(int(at) for at in np.floor(token + 0.5 + 1e-6))
        if all(0 <= at < count for at, count in zip(cell, features.tokens.shape, strict=False)):
            in_cell[cell] = in_cell.get(cell, 0) + 1
            in_region[cell] = in_region.get(cell, 0) + int(held)
    touched = [cell for cell, count in in_region.items() if count]
    weights = [in_region[cell] / in_cell[cell] for cell in touched]
    rows = [features.tokens[cell].astype(float) for cell in touched]
    mean = sum(weight * row for weight, row in zip(weights, rows, strict=True)) / sum(weights)
    most = np.array([max(row[at] for row in rows) for at in range(len(rows[0]))])
    vector = {"mean": mean, "max": most, "both": np.concatenate([mean, most])}[how]
    return vector, sum(in_region.values()) / region.sum(), len(touched)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 8)] * 3),
    token_mm=st.tuples(*[st.floats(0.7, 7)] * 3),
    by=st.tuples(*[st.sampled_from([-0.5, 0.0, 0.25])] * 3),
    how=st.sampled_from(HOWS),
    seed=st.integers(0, 99),
)
def test_pooling_agrees_with_sending_every_voxel_through_the_patient(
    shape: tuple[int, int, int],
    token_mm: tuple[float, float, float],
    by: tuple[float, float, float],
    how: regions.How,
    seed: int,
) -> None:
    region = np.random.default_rng(seed).random(shape) < 0.4
    affine, size = cells.cover(OBLIQUE, shape, token_mm)
    features = said(shifted(affine, by), size, seed=seed)
    try:
        vector, seen, count = naive_pool(features, region, OBLIQUE, how)
    except ZeroDivisionError:  # nothing to weigh, or an empty region
        with pytest.raises(ValueError, match="region"):
            regions.pool(features, region, OBLIQUE, how=how)
        return
    found = regions.pool(features, region, OBLIQUE, how=how)
    np.testing.assert_allclose(found.scan, vector, rtol=1e-5, atol=1e-6)
    assert found.seen == pytest.approx(seen)
    assert found.count == count


def test_a_region_of_everything_is_the_plain_mean_over_covered_tokens() -> None:
    # Tokens of 3 voxels over 7 and 5: the last ones lie half beyond the scan, and 2 more rows lie beyond it wholly.
    affine, (ti, tj, tk) = cells.cover(OBLIQUE, (7, 5, 6), (2.4, 3.3, 5.0))
    features = said(affine, (ti + 2, tj, tk))
    found = regions.pool(features, np.ones((7, 5, 6), dtype=bool), OBLIQUE)
    assert features.tokens is not None
    np.testing.assert_allclose(found.scan, features.tokens[:ti].reshape(-1, 3).mean(axis=0), rtol=1e-5, atol=1e-6)
    assert (found.seen, found.count) == (1.0, ti * tj * tk)


def test_shares_of_a_region_and_of_the_rest_make_one() -> None:
    region = np.random.default_rng(0).random((9, 8, 7)) < 0.3
    affine, size = cells.cover(OBLIQUE, region.shape, (2.0, 3.0, 6.0))
    one, other = (regions.overlap(part, OBLIQUE, affine, size) for part in (region, ~region))
    np.testing.assert_allclose(one.of_cells + other.of_cells, 1)
    assert one.of_region == other.of_region == 1


def test_what_lies_beyond_the_tokens_is_not_seen() -> None:
    # Tokens of two voxels cover voxels 4 to 7 of ten.
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [4.5, 0.5, 0.5]
    features = said(affine, (2, 1, 1))
    region = np.zeros((10, 2, 2), dtype=bool)
    region[3:6] = True
    found = regions.pool(features, region, np.eye(4))
    assert features.tokens is not None
    np.testing.assert_allclose(found.scan, features.tokens[0, 0, 0], rtol=1e-6)
    assert (found.seen, found.count) == (pytest.approx(2 / 3), 1)
    beyond = np.zeros_like(region)
    beyond[8:] = True
    with pytest.raises(ValueError, match="no token lies in the region"):
        regions.pool(features, beyond, np.eye(4))


def test_a_token_weighs_as_much_as_its_cell_lies_inside() -> None:
    affine, size = cells.cover(np.eye(4), (8, 4, 4), (4.0, 4.0, 4.0))
    tokens = np.array([[1.0, -1.0], [5.0, -9.0]]).reshape(2, 1, 1, 2)
    region = np.zeros((8, 4, 4), dtype=bool)
    region[1:] = True
    region[4, :2] = False
    features = Said(tokens=tokens, tokens_affine_ras=affine)
    assert size == (2, 1, 1)
    found = regions.pool(features, region, np.eye(4), how="both")
    share = (3 / 4, 7 / 8)
    mean = (share[0] * tokens[0] + share[1] * tokens[1]).ravel() / sum(share)
    np.testing.assert_allclose(found.scan, [*mean, 5, -1])
    assert found.scan.dtype == np.float64


def test_halves_are_pooled_in_32_bits_or_more() -> None:
    affine, size = cells.cover(np.eye(4), (6, 6, 6), (2.0, 2.0, 2.0))
    plain = said(affine, size)
    assert plain.tokens is not None
    half = Said(tokens=plain.tokens.astype(np.float16), tokens_affine_ras=affine)
    assert regions.pool(half, np.ones((6, 6, 6), dtype=bool), np.eye(4)).scan.dtype == np.float32


def test_a_lesions_region_tells_what_the_whole_scan_drowns() -> None:
    """A liver with a lesion and one without: their livers look alike, the lesion's own region does not."""
    spec = InputSpec(low_hu=-160.0, high_hu=240.0)
    scan = phantom(PhantomConfig(seed=2, lesions=1, lesion_radius_mm=(14.0, 15.0), spacing_mm=(3.0, 3.0, 3.0))).volumes[
        0
    ]
    healthy = phantom(PhantomConfig(seed=2, lesions=0, spacing_mm=(3.0, 3.0, 3.0))).volumes[0]
    assert scan.labels is not None
    names = set(scan.labels.classes.values())
    lesion = regions.of_class(scan.labels, next(name for name in names if "lesion" in name))
    affine, size = cells.cover(scan.affine_ras, scan.shape_ijk, (6.0, 6.0, 6.0))
    bright = [
        Said(tokens=patch_histograms(one, spec, affine, size), tokens_affine_ras=affine) for one in (scan, healthy)
    ]
    there = [regions.pool(features, lesion, scan.affine_ras).scan for features in bright]
    everywhere = [
        regions.pool(features, np.ones(scan.shape_ijk, dtype=bool), scan.affine_ras).scan for features in bright
    ]
    assert np.abs(there[0] - there[1]).sum() > 20 * np.abs(everywhere[0] - everywhere[1]).sum()


def test_pooled_tokens_are_features_of_a_scan() -> None:
    affine, size = cells.cover(np.eye(4), (4, 4, 4), (2.0, 2.0, 2.0))
    pooled = regions.pool(said(affine, size), np.ones((4, 4, 4), dtype=bool), np.eye(4))
    assert isinstance(pooled, Features)
    assert pooled.tokens is pooled.tokens_affine_ras is None


def test_pooling_refuses_what_it_cannot_do() -> None:
    affine, size = cells.cover(np.eye(4), (4, 4, 4), (2.0, 2.0, 2.0))
    features, region = said(affine, size), np.ones((4, 4, 4), dtype=bool)
    assert features.tokens is not None
    with pytest.raises(ValueError, match="these features have none"):
        regions.pool(Said(tokens=None, tokens_affine_ras=None), region, np.eye(4))
    for none in (~region, region.astype(int)):
        with pytest.raises(ValueError, match="mask \\(bool\\) with a voxel"):
            regions.pool(features, none, np.eye(4))
    with pytest.raises(ValueError, match="how must be one of mean, max, both, got 'median'"):
        regions.pool(features, region, np.eye(4), how="median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="axes of the scan"):
        regions.pool(Said(tokens=features.tokens, tokens_affine_ras=-affine), region, np.eye(4))
    with pytest.raises(ValueError, match="empty"):
        regions.overlap(~region, np.eye(4), affine, size)
    broken = features.tokens.copy()
    broken[0, 0, 0] = np.nan
    part = region.copy()
    part[:2, :2, :2] = False
    features = Said(tokens=broken, tokens_affine_ras=affine)
    assert np.isfinite(regions.pool(features, part, np.eye(4)).scan).all()
    with pytest.raises(ValueError, match="not finite"):
        regions.pool(features, region, np.eye(4))


def test_a_class_is_where_its_values_are() -> None:
    array = np.array([[[0, 1, 2], [3, 1, 0]]], dtype=np.int16)
    labels = LabelMap(array=array, classes={1: "liver", 2: "lesion", 3: "lesion", 4: "spleen"})
    np.testing.assert_array_equal(regions.of_class(labels, "lesion"), (array == 2) | (array == 3))
    with pytest.raises(ValueError, match="no class is called 'kidney'; there are liver, lesion, lesion, spleen"):
        regions.of_class(labels, "kidney")
    with pytest.raises(ValueError, match="no voxel is labelled 'spleen'"):
        regions.of_class(labels, "spleen")


def test_a_box_of_voxels_holds_its_start_and_not_its_stop() -> None:
    region = regions.of_voxels((5, 6, 7), (1, 0, 3), (3, 6, 4))
    naive = np.zeros((5, 6, 7), dtype=bool)
    for place in np.ndindex(5, 6, 7):
        naive[place] = 1 <= place[0] < 3 and place[2] == 3
    np.testing.assert_array_equal(region, naive)
    for start, stop in (((0, 0, 0), (0, 1, 1)), ((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (6, 2, 2))):
        with pytest.raises(ValueError, match="is empty or not within a scan of"):
            regions.of_voxels((5, 6, 7), start, stop)


@settings(max_examples=40, deadline=None)
@given(
    low=st.tuples(*[st.floats(-3, 12)] * 3),
    size=st.tuples(*[st.floats(0.0, 9)] * 3),
    tilt=st.floats(-0.8, 0.8),
)
def test_a_box_in_the_patient_holds_the_voxels_whose_centres_lie_in_it(
    low: tuple[float, float, float], size: tuple[float, float, float], tilt: float
) -> None:
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.1, 0.9, 2.0])
    high = (low[0] + size[0], low[1] + size[1], low[2] + size[2])
    naive = np.zeros((8, 9, 5), dtype=bool)
    for place in np.ndindex(8, 9, 5):
        at = affine[:3, :3] @ place
        naive[place] = all(a <= x <= b for a, x, b in zip(low, at, high, strict=True))
    if naive.any():
        found = regions.of_box(affine, naive.shape, low_ras_mm=low, high_ras_mm=high)
        np.testing.assert_array_equal(found, naive)
    else:
        with pytest.raises(ValueError, match="no voxel's centre lies in the box"):
            regions.of_box(affine, naive.shape, low_ras_mm=low, high_ras_mm=high)


def test_a_box_that_is_none_is_refused() -> None:
    for high in ((-1.0, 2.0, 2.0), (np.nan, 2.0, 2.0), (np.inf, 2.0, 2.0)):
        with pytest.raises(ValueError, match="runs from low to high"):
            regions.of_box(np.eye(4), (4, 4, 4), low_ras_mm=(0.0, 0.0, 0.0), high_ras_mm=high)
