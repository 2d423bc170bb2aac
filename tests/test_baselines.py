from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from voxelstem.baselines import RADIOMICS, Body, carry, find_body, intensity, nearest, radiomics, token_mm
from voxelstem.protocols import Features
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.study import InputSpec, LabelMap, Provenance, Volume

SPEC = InputSpec(low_hu=-1000.0, high_hu=1000.0)


def volume(array: np.ndarray, *, modality: str = "CT", spacing: float = 4.0) -> Volume:
    return Volume(
        array=array[None].astype(np.float32),
        affine_ras=np.diag([spacing, spacing, spacing, 1.0]),
        modality=modality,
        provenance=Provenance(source_format="nifti", sha256="0", orientation="RAS"),
    )


def body_with_a_lung() -> np.ndarray:
    array = np.full((20, 18, 16), -1000.0)
    array[4:16, 3:15, 2:14] = 40
    array[8:12, 6:10, 4:12] = -800
    array[18:20, :, :] = 500  # a table, apart from the body
    array[18:20, :, 8:] = -1000
    return array


def test_the_body_is_the_largest_piece_with_its_lungs_and_without_the_table() -> None:
    body = find_body(volume(body_with_a_lung()))
    assert body.start_ijk == (4, 3, 2)
    assert body.stop_ijk == (16, 15, 14)
    assert body.mask.sum() == 12 * 12 * 12


def test_the_bodys_box_is_in_voxels_of_the_whole_scan() -> None:
    fine = np.repeat(np.repeat(np.repeat(body_with_a_lung(), 4, 0), 4, 1), 4, 2)
    body = find_body(volume(fine, spacing=1.0))
    assert body.stride == (4, 4, 4)
    assert body.start_ijk == (16, 12, 8)
    assert body.stop_ijk == (64, 60, 56)


def test_a_scan_of_nothing_but_air_is_all_body() -> None:
    assert find_body(volume(np.full((5, 5, 5), -1000.0))).mask.all()


def test_the_scan_is_described_by_the_histogram_of_its_body() -> None:
    found = intensity(volume(body_with_a_lung()), SPEC, token_mm=None, bins=20)
    share = found.scan**2
    assert found.tokens is None
    assert share.sum() == pytest.approx(1)
    assert share[2] == pytest.approx(4 * 4 * 8 / 12**3)  # lung at -800 HU
    assert share[10] == pytest.approx(1 - 4 * 4 * 8 / 12**3)  # 40 HU
    assert share[15] == 0  # the table is not counted


def test_a_token_is_described_by_the_histogram_of_its_patch() -> None:
    array = np.random.default_rng(0).uniform(-1200, 1200, (6, 4, 8))
    found = intensity(volume(array), SPEC, token_mm=(8.0, 8.0, 16.0), bins=10)
    assert found.tokens is not None
    assert found.tokens.shape == (3, 2, 2, 10)
    patch = np.clip(array[2:4, 0:2, 4:8], -1000, 999.99)
    expected = np.histogram(patch, bins=10, range=(-1000, 1000))[0] / patch.size
    np.testing.assert_allclose(found.tokens[1, 0, 1] ** 2, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("resampling", "edges"),
    [
        ("spacing", (6.0, 6.0, 12.0)),  # 3 mm of the spec, patches of 2 x 2 x 4
        ("native", (8.0, 8.0, 16.0)),  # 4 mm of the scan
        ("fit", (6.0, 6.0, 12.0)),  # a box of 12 voxels of 4 mm becomes 16 of 3 mm
    ],
)
def test_a_token_is_as_large_as_a_patch_where_the_scan_is_fed(
    resampling: Literal["spacing", "native", "fit"], edges: tuple[float, float, float]
) -> None:
    spec = InputSpec(resampling=resampling, block_ijk=(16, 16, 16))
    array = np.full((20, 18, 16), -1000.0)
    array[4:16, 3:15, 2:14] = 40
    assert token_mm(volume(array), spec, (2, 2, 4)) == pytest.approx(edges)


def test_mri_has_no_unit_so_its_own_range_is_the_window() -> None:
    array = np.random.default_rng(0).uniform(0, 1, (12, 12, 12))
    small, large = (intensity(volume(array * k, modality="MR"), SPEC, token_mm=None).scan for k in (3.0, 3000.0))
    np.testing.assert_allclose(small, large, atol=0.03)


def test_weights_without_a_window_leave_brightness_to_the_scan_s_own_range() -> None:
    rng = np.random.default_rng(0)
    array = rng.uniform(0, 1000, (12, 12, 12))
    spec = InputSpec(modality="MR", normalisation="zscore")
    dim, bright = (intensity(volume(array * gain, modality="MR"), spec, token_mm=None).scan for gain in (1.0, 50.0))
    np.testing.assert_allclose(dim, bright, atol=0.05)
    assert (dim > 0).sum() > 10


def test_the_nearest_atlas_is_the_most_similar_histogram() -> None:
    rows = np.eye(3)
    assert nearest(np.array([0.1, 0.2, 0.7]), list(rows)) == 2


def test_labels_carried_to_the_same_scan_stay_where_they_are() -> None:
    study = phantom(PhantomConfig(seed=1, spacing_mm=(5.0, 5.0, 6.0)))
    scan = study.volumes[0]
    assert scan.labels is not None
    body = find_body(scan)
    np.testing.assert_array_equal(carry(scan.labels, body, body, scan.shape_ijk).array, scan.labels.array)


def test_labels_follow_the_box_of_the_body() -> None:
    small, large = body_with_a_lung(), np.full((50, 40, 40), -1000.0)
    large[10:34, 10:34, 10:34] = 40
    labels = LabelMap(array=np.where(small == -800, 1, 0).astype(np.int16), classes={1: "lung"})
    carried = carry(labels, find_body(volume(small)), find_body(volume(large)), (50, 40, 40))
    where = np.argwhere(carried.array == 1)
    # In the small body the lung runs from 4/12 to 8/12 along i; the large one is 24 voxels wide from 10.
    assert (where.min(axis=0)[0], where.max(axis=0)[0]) == (18, 25)
    assert carried.array[:4].sum() == 0
    assert carried.classes == {1: "lung"}


def test_radiomics_are_the_features_of_a_region_by_name() -> None:
    array = np.random.default_rng(0).normal(40, 20, (12, 10, 8)).round()
    scan = volume(array, spacing=2.0)
    region = np.zeros(array.shape, dtype=bool)
    region[3:9, 2:7, 2:6] = True
    found = radiomics(scan, region)
    assert isinstance(found, Features)
    assert found.tokens is found.tokens_affine_ras is None
    assert found.names == RADIOMICS
    assert len(found.scan) == len(RADIOMICS) == 59
    assert np.isfinite(found.scan).all()
    value = dict(zip(found.names, found.scan, strict=True))
    assert value["stat_mean"] == pytest.approx(array[region].mean())
    assert value["stat_rms"] == pytest.approx(np.sqrt((array[region] ** 2).mean()))
    assert value["ih_max"] == (array[region].max() + 1000) // 25 + 1
    assert value["morph_vol_approx"] == 6 * 5 * 4 * 8


def test_some_radiomics_can_be_asked_for() -> None:
    scan, region = volume(np.arange(60.0).reshape(3, 4, 5)), np.ones((3, 4, 5), dtype=bool)
    assert radiomics(scan, region, features=["stat_max", "stat_min"]).scan.tolist() == [59, 0]
    with pytest.raises(ValueError, match="no such feature: mean"):
        radiomics(scan, region, features=["mean", "stat_min"])


def test_of_ct_what_lies_below_air_counts_for_the_shape_only() -> None:
    array = np.full((4, 4, 4), 50.0)
    array[0] = -2000
    found = radiomics(volume(array), np.ones((4, 4, 4), dtype=bool), features=["stat_min", "morph_vol_approx"])
    assert found.scan.tolist() == [50, 4**6]


def test_radiomics_of_mri_do_not_know_the_scanners_gain_and_offset() -> None:
    array = np.random.default_rng(0).gamma(2.0, 1.0, (12, 12, 12))
    region = array > np.median(array)
    one, other = (radiomics(volume(scan, modality="MR"), region) for scan in (array, 300 * array + 50))
    np.testing.assert_allclose(one.scan, other.scan, rtol=2e-3, atol=1e-3)
    value = dict(zip(one.names, one.scan, strict=True))
    low, high = np.quantile(array[::1, ::1, ::1], [0.005, 0.995])
    assert value["stat_mean"] == pytest.approx(((array[region] - low) / (high - low)).mean(), rel=1e-5)
    assert value["ih_max"] == 32


def test_radiomics_of_the_body_are_those_of_its_thinned_copy() -> None:
    fine = np.repeat(np.repeat(np.repeat(body_with_a_lung(), 4, 0), 4, 1), 4, 2)
    body = find_body(volume(fine, spacing=1.0))
    assert body.stride == (4, 4, 4)
    thick = volume(body_with_a_lung(), spacing=4.0)
    found = radiomics(volume(fine, spacing=1.0), body)
    np.testing.assert_allclose(found.scan, radiomics(thick, find_body(thick)).scan, rtol=1e-9)
    value = dict(zip(found.names, found.scan, strict=True))
    assert value["morph_vol_approx"] == 12**3 * 64
    assert value["stat_mean"] == pytest.approx(40 - 840 * (4 * 4 * 8) / 12**3)


def test_radiomics_refuse_what_they_cannot_tell() -> None:
    scan = volume(np.arange(64.0).reshape(4, 4, 4))
    point = np.zeros((4, 4, 4), dtype=bool)
    with pytest.raises(ValueError, match="empty"):
        radiomics(scan, point)
    point[1, 2, 3] = True
    with pytest.raises(
        ValueError, match="morph_pca_elongation, morph_pca_flatness cannot be told of this region of 1 vox"
    ):
        radiomics(scan, point)
    with pytest.raises(ValueError, match="on the scan's grid"):
        radiomics(scan, Body(mask=point, stride=(2, 2, 2), start_ijk=(0, 0, 0), stop_ijk=(4, 4, 4)))


@pytest.mark.parametrize("seed", range(3))
def test_every_region_of_three_voxels_has_all_radiomics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    region = np.zeros((5, 5, 5), dtype=bool)
    region.ravel()[rng.permutation(125)[:3]] = True
    for array in (np.zeros((5, 5, 5)), rng.integers(-100, 100, (5, 5, 5)).astype(float)):
        for modality in ("CT", "MR"):
            assert np.isfinite(radiomics(volume(array, modality=modality), region).scan).all()
