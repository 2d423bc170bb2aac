from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from voxelstem.geometry import to_ras
from voxelstem.radiomics.biomarkers import FEATURES, Biomarkers
from voxelstem.radiomics.radiomics import (
    CT_BINS,
    Bins,
    FixedBinNumber,
    FixedBinSize,
    describe,
    discretise,
    histogram,
    morphology,
    statistics,
)
from voxelstem.study import Provenance, Volume

PHANTOM = Path(os.environ.get("VOXELSTEM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "ibsi_digital_phantom"
SPACING = (0.75, 1.25, 2.5)

# What mirp 2.7.0 measures of `formula()`, with 7 bins; its statistics are sums of 32 bits.
BY_NUMBER = """
morph_volume 426.367188, morph_vol_approx 440.625, morph_area_mesh 357.885131, morph_av 0.839382443,
morph_comp_1 0.0355298484, morph_comp_2 0.448527376, morph_sph_dispr 1.30638248, morph_sphericity 0.765472604,
morph_asphericity 0.306382482, morph_com 0.0700695612, morph_integ_int 3653.60397, morph_diam 17.5445861,
morph_vol_dens_conv_hull 0.845141309, morph_area_dens_conv_hull 1.00785744, morph_vol_dens_aabb 0.360945767,
morph_area_dens_aabb 0.496201222, morph_pca_maj_axis 13.7979273, morph_pca_min_axis 7.9853375,
morph_pca_least_axis 5.65109495, morph_pca_elongation 0.57873457, morph_pca_flatness 0.40956115,
morph_vol_dens_aee 1.30781231, morph_area_dens_aee 1.49942212, stat_mean 8.56914902, stat_var 49.0703545,
stat_skew -0.0259495135, stat_kurt -1.21256185, stat_median 9.125, stat_min -3.5, stat_p10 -1.25, stat_p90 18.5,
stat_max 20, stat_iqr 11.75, stat_range 23.5, stat_mad 6.05098438, stat_rmad 4.95076704, stat_medad 6.03989363,
stat_cov 0.817470133, stat_qcod 0.72307694, stat_energy 23030.125, stat_rms 11.0680017, ih_mean 4.05319149,
ih_var 4.2737665, ih_skew -0.0350639145, ih_kurt -1.2705196, ih_median 4, ih_min 1, ih_p10 1, ih_p90 7, ih_max 7,
ih_mode 7, ih_iqr 4, ih_range 6, ih_mad 1.77161612, ih_rmad 1.77161622, ih_medad 1.76595747, ih_cov 0.51004474,
ih_qcod 0.5, ih_entropy 2.78111986, ih_uniformity 0.14791761, ih_max_grad 15, ih_max_grad_g 7, ih_min_grad -5,
ih_min_grad_g 1
"""
# The same, with bins of 4 from 0 on, and intensities from 0 to 18 only.
BY_SIZE = """
morph_com 0.291693445, morph_integ_int 3909.66272, stat_mean 9.16970825, stat_var 26.2462883,
stat_skew -0.062357422, stat_kurt -1.10080945, stat_median 9.25, stat_min 0, stat_p10 2, stat_p90 16.3500004,
stat_max 18, stat_iqr 8, stat_range 18, stat_mad 4.36658859, stat_rmad 3.43929768, stat_medad 4.36131382,
stat_cov 0.558699667, stat_qcod 0.432432443, stat_energy 15115.1875, stat_rms 10.5038013, ih_mean 2.86861314,
ih_var 1.74916083, ih_skew 0.0718304674, ih_kurt -1.16513302, ih_median 3, ih_min 1, ih_p10 1, ih_p90 5, ih_max 5,
ih_mode 2, ih_iqr 2, ih_range 4, ih_mad 1.12962864, ih_rmad 1.12962866, ih_medad 1.10948908, ih_cov 0.461044546,
ih_qcod 0.333333343, ih_entropy 2.29651747, ih_uniformity 0.206457456, ih_max_grad 4, ih_max_grad_g 1,
ih_min_grad -13, ih_min_grad_g 5
"""
# The manual's values of the digital phantom, as printed.
PUBLISHED = """
morph_volume 556, morph_vol_approx 592, morph_area_mesh 388, morph_av 0.698, morph_comp_1 0.0411,
morph_comp_2 0.599, morph_sph_dispr 1.19, morph_sphericity 0.843, morph_asphericity 0.186, morph_com 0.672,
morph_diam 13.1, morph_pca_maj_axis 11.4, morph_pca_min_axis 9.31, morph_pca_least_axis 8.54,
morph_pca_elongation 0.816, morph_pca_flatness 0.749, morph_vol_dens_aabb 0.869, morph_area_dens_aabb 0.866,
morph_vol_dens_aee 1.17, morph_area_dens_aee 1.36, morph_vol_dens_conv_hull 0.961, morph_area_dens_conv_hull 1.03,
morph_integ_int 1.2e3, stat_mean 2.15, stat_var 3.05, stat_skew 1.08, stat_kurt -0.355, stat_median 1, stat_min 1,
stat_p10 1, stat_p90 4, stat_max 6, stat_iqr 3, stat_range 5, stat_mad 1.55, stat_rmad 1.11, stat_medad 1.15,
stat_cov 0.812, stat_qcod 0.6, stat_energy 567, stat_rms 2.77, ih_mean 2.15, ih_var 3.05, ih_skew 1.08,
ih_kurt -0.355, ih_median 1, ih_min 1, ih_p10 1, ih_p90 4, ih_max 6, ih_mode 1, ih_iqr 3, ih_range 5, ih_mad 1.55,
ih_rmad 1.11, ih_medad 1.15, ih_cov 0.812, ih_qcod 0.6, ih_entropy 1.27, ih_uniformity 0.512, ih_max_grad 8,
ih_max_grad_g 3, ih_min_grad -50, ih_min_grad_g 1
"""


def read(text: str) -> dict[str, str]:
    return dict(part.split() for part in text.replace("\n", " ").split(","))


def volume(array: np.ndarray, spacing_mm: tuple[float, float, float] = SPACING, *, modality: str = "CT") -> Volume:
    return Volume(
        array=array[None].astype(np.float32),
        affine_ras=np.diag([*spacing_mm, 1.0]),
        modality=modality,
        provenance=Provenance(source_format="nifti", sha256="0", orientation="RAS"),
    )


def formula() -> tuple[Volume, np.ndarray]:
    """Intensities in quarters, and a ball with a hole and with a voxel that touches it along edges only."""
    i, j, k = np.indices((9, 8, 7))
    region = ((i - 4) / 4.2) ** 2 + ((j - 3.5) / 3.6) ** 2 + ((k - 3) / 3.1) ** 2 <= 1
    region[5, 3, 3] = False
    region[1, 1, 1] = True
    return volume(((7 * i * i + 11 * j * k + 5 * k + 3 * i * j) % 97) / 4 - 3.5), region


@pytest.mark.parametrize(
    ("golden", "bins", "intensity_range"),
    [
        (BY_NUMBER, FixedBinNumber(count=7), (-math.inf, math.inf)),
        (BY_SIZE, FixedBinSize(width=4.0, lowest=0.0), (0.0, 18.0)),
    ],
)
def test_all_features_are_those_that_mirp_measures(
    golden: str, bins: Bins, intensity_range: tuple[float, float]
) -> None:
    scan, region = formula()
    assert region.sum() == 188
    found = describe(scan, region, bins=bins, intensity_range=intensity_range)
    assert found.names == tuple(FEATURES)
    for name, value in read(golden).items():
        assert found[name] == pytest.approx(float(value), rel=1e-6, abs=1e-6), name


@pytest.mark.skipif(
    not (PHANTOM / "image.nii.gz").is_file(), reason="the folder of real scans is absent (VOXELSTEM_DATA)"
)
def test_the_digital_phantom_has_the_values_that_the_manual_prints() -> None:
    image, mask = (nib.load(PHANTOM / f"{name}.nii.gz") for name in ("image", "mask"))
    array, affine = to_ras(np.asarray(image.dataobj), image.affine)
    region, _ = to_ras(np.asarray(mask.dataobj), mask.affine)
    scan = volume(array, (2.0, 2.0, 2.0))
    assert np.allclose(np.abs(affine[:3, :3]), np.eye(3) * 2)
    assert region.sum() == 74
    published = read(PUBLISHED)
    assert set(published) == set(FEATURES)
    for bins in (FixedBinSize(width=1.0, lowest=1.0), FixedBinNumber(count=6)):
        found = describe(scan, region > 0, bins=bins)
        for name, value in published.items():
            digits = 2 if name == "morph_integ_int" else 3
            assert float(f"{found[name]:.{digits}g}") == float(value), name


def naive_percentile(ordered: list[float], share: float) -> float:
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def naive_distribution(values: list[float]) -> dict[str, float]:
    count, ordered = len(values), sorted(values)
    mean = sum(values) / count
    variance = sum((x - mean) ** 2 for x in values) / count
    p10, p25, p50, p75, p90 = (naive_percentile(ordered, share) for share in (0.1, 0.25, 0.5, 0.75, 0.9))
    robust = [x for x in values if p10 <= x <= p90]
    return {
        "mean": mean,
        "var": variance,
        "skew": sum((x - mean) ** 3 for x in values) / count / variance**1.5,
        "kurt": sum((x - mean) ** 4 for x in values) / count / variance**2 - 3,
        "median": ordered[count // 2] if count % 2 else (ordered[count // 2 - 1] + ordered[count // 2]) / 2,
        "min": ordered[0],
        "p10": p10,
        "p90": p90,
        "max": ordered[-1],
        "iqr": p75 - p25,
        "range": ordered[-1] - ordered[0],
        "mad": sum(abs(x - mean) for x in values) / count,
        "rmad": sum(abs(x - sum(robust) / len(robust)) for x in robust) / len(robust),
        "medad": sum(abs(x - p50) for x in values) / count,
        "cov": variance**0.5 / mean,
        "qcod": (p75 - p25) / (p75 + p25),
    }


@pytest.mark.parametrize("count", [3, 4, 10, 41, 74])
def test_statistics_are_those_of_slow_loops(count: int) -> None:
    values = np.random.default_rng(count).gamma(2.0, 30.0, count)
    naive = naive_distribution(values.tolist())
    naive |= {"energy": sum(x * x for x in values), "rms": math.sqrt(sum(x * x for x in values) / count)}
    found = statistics(values)
    assert len(found.names) == 18
    for name in found.names:
        assert found[name] == pytest.approx(naive[name.removeprefix("stat_")], rel=1e-9), name


@pytest.mark.parametrize("seed", range(5))
def test_histogram_features_are_those_of_slow_loops(seed: int) -> None:
    levels = np.random.default_rng(seed).integers(2, 9, 50)
    naive = naive_distribution([float(level) for level in levels])
    counts = Counter(levels.tolist())
    bars = [counts[level] for level in range(1, max(counts) + 1)]
    slopes = [bars[1] - bars[0]]
    slopes += [(bars[at + 1] - bars[at - 1]) / 2 for at in range(1, len(bars) - 1)]
    slopes += [bars[-1] - bars[-2]]
    most = [level for level in counts if counts[level] == max(bars)]
    naive |= {
        "mode": min(most, key=lambda level: (abs(level - naive["mean"]), level)),
        "entropy": -sum(n / 50 * math.log2(n / 50) for n in counts.values()),
        "uniformity": sum((n / 50) ** 2 for n in counts.values()),
        "max_grad": max(slopes),
        "max_grad_g": slopes.index(max(slopes)) + 1,
        "min_grad": min(slopes),
        "min_grad_g": slopes.index(min(slopes)) + 1,
    }
    found = histogram(levels)
    assert len(found.names) == 23
    for name in found.names:
        assert found[name] == pytest.approx(naive[name.removeprefix("ih_")], rel=1e-9), name


def test_of_two_modes_the_nearer_to_the_mean_is_named_and_of_two_as_near_the_lower() -> None:
    assert histogram(np.array([1, 1, 4, 4, 5]))["ih_mode"] == 4
    assert histogram(np.array([1, 1, 3, 3]))["ih_mode"] == 1


@pytest.mark.parametrize("bins", [FixedBinNumber(count=5), FixedBinSize(width=3.5, lowest=-40.0)])
def test_intensities_fall_into_the_bins_of_the_manuals_formulas(bins: Bins) -> None:
    values = np.round(np.random.default_rng(1).normal(0, 10, 200), 1).clip(-39, 60)
    naive = []
    for x in values:
        if isinstance(bins, FixedBinSize):
            naive.append(math.floor((x - bins.lowest) / bins.width) + 1)
        elif x < values.max():
            naive.append(math.floor(bins.count * ((x - values.min()) / (values.max() - values.min()))) + 1)
        else:
            naive.append(bins.count)
    assert discretise(values, bins).tolist() == naive


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e6, 1e6, width=32)),
    count=st.integers(1, 40),
)
def test_a_fixed_number_of_bins_is_never_left(values: np.ndarray, count: int) -> None:
    levels = discretise(values, FixedBinNumber(count=count))
    assert levels.min() >= 1
    assert levels.max() == count
    if values.min() < values.max():
        assert levels[values.argmin()] == 1


@settings(max_examples=40, deadline=None)
@given(
    values=hnp.arrays(np.float64, st.integers(3, 40), elements=st.integers(-500, 500)),
    gain=st.sampled_from([0.5, 2.0, 8.0]),
    offset=st.sampled_from([-64.0, 0.0, 1024.0]),
)
def test_gain_and_offset_do_to_each_feature_what_its_unit_says(values: np.ndarray, gain: float, offset: float) -> None:
    before, after = statistics(values), statistics(values * gain + offset)
    for name in ("stat_mean", "stat_median", "stat_min", "stat_p10", "stat_p90", "stat_max"):
        assert after[name] == pytest.approx(before[name] * gain + offset, abs=1e-6)
    for name in ("stat_iqr", "stat_range", "stat_mad", "stat_medad"):
        assert after[name] == pytest.approx(before[name] * gain, abs=1e-6)
    for name in ("stat_skew", "stat_kurt"):
        assert after[name] == pytest.approx(before[name], abs=1e-6)
    assert after["stat_var"] == pytest.approx(before["stat_var"] * gain**2, abs=1e-6)
    bins = FixedBinNumber(count=6)
    same = histogram(discretise(values, bins)), histogram(discretise(values * gain + offset, bins))
    np.testing.assert_allclose(same[0].values, same[1].values)


def test_lengths_areas_and_volumes_grow_with_the_voxel() -> None:
    scan, region = formula()
    large = volume(scan.array[0], (2.25, 3.75, 7.5))
    small, big = (describe(one, region, bins=CT_BINS) for one in (scan, large))
    power = {"volume": 3, "vol_approx": 3, "integ_int": 3, "area_mesh": 2, "av": -1, "com": 1, "diam": 1}
    power |= {"pca_maj_axis": 1, "pca_min_axis": 1, "pca_least_axis": 1}
    for name in small.names:
        grown = 3.0 ** power.get(name.removeprefix("morph_"), 0) if name.startswith("morph_") else 1.0
        assert big[name] == pytest.approx(small[name] * grown), name


def test_a_ball_is_round_and_a_rod_is_not() -> None:
    i, j, k = np.indices((31, 31, 31)) - 15
    ones = np.ones((31, 31, 31))
    ball, rod = i**2 + j**2 + k**2 <= 13**2, (np.abs(i) <= 13) & (j**2 + k**2 <= 2**2)
    round_, long = (morphology(ones, region, region, (1.0, 1.0, 1.0)) for region in (ball, rod))
    assert round_["morph_sphericity"] > 0.9
    assert long["morph_sphericity"] < 0.75
    assert round_["morph_pca_elongation"] == pytest.approx(1)
    assert long["morph_pca_elongation"] < 0.2
    assert round_["morph_com"] == pytest.approx(0, abs=1e-9)
    # Of a true ball both densities of the ellipsoid are known: its half axes are 2 / sqrt(5) of the radius.
    assert round_["morph_vol_dens_aee"] == pytest.approx((math.sqrt(5) / 2) ** 3, rel=0.01)
    assert round_["morph_volume"] == pytest.approx(4 / 3 * math.pi * 13**3, rel=0.02)


def test_the_centre_of_mass_moves_to_where_it_is_bright() -> None:
    array = np.ones((10, 4, 4))
    array[5:] = 3
    region = np.ones((10, 4, 4), dtype=bool)
    # Dark half at 2, bright half at 7: (2 + 3 * 7) / 4 = 5.75, against 4.5.
    assert morphology(array, region, region, (2.0, 1.0, 1.0))["morph_com"] == pytest.approx(2.5)


def test_voxels_beyond_the_range_count_for_the_shape_only() -> None:
    scan, region = formula()
    whole = describe(scan, region, bins=FixedBinNumber())
    cut = describe(scan, region, bins=FixedBinNumber(), intensity_range=(2.0, 11.25))
    kept = scan.array[0][region & (scan.array[0] >= 2) & (scan.array[0] <= 11.25)]
    assert cut["stat_min"] == 2
    assert cut["stat_max"] == 11.25
    assert cut["stat_mean"] == pytest.approx(kept.mean(dtype=np.float64))
    for name in ("morph_volume", "morph_vol_approx", "morph_area_mesh", "morph_diam", "morph_pca_flatness"):
        assert cut[name] == whole[name]
    assert cut["morph_integ_int"] == pytest.approx(cut["morph_volume"] * cut["stat_mean"])


def test_only_the_region_is_looked_at() -> None:
    scan, region = formula()
    spoilt = np.where(region, scan.array[0], np.nan)
    np.testing.assert_array_equal(
        describe(volume(spoilt), region, bins=CT_BINS).values, describe(scan, region, bins=CT_BINS).values
    )


def test_where_a_region_lies_in_the_scan_does_not_matter() -> None:
    scan, region = formula()
    moved = volume(np.pad(scan.array[0], ((3, 1), (0, 4), (5, 2)), constant_values=99.0))
    there = np.pad(region, ((3, 1), (0, 4), (5, 2)))
    here, away = describe(scan, region, bins=CT_BINS), describe(moved, there, bins=CT_BINS)
    np.testing.assert_allclose(here.values, away.values, rtol=1e-9)


def nan_of(found: Biomarkers) -> set[str]:
    return set(found.undefined)


def test_what_never_varies_has_neither_skewness_nor_kurtosis() -> None:
    found = statistics(np.full(7, 0.1))
    assert [found[f"stat_{name}"] for name in ("var", "skew", "kurt", "iqr", "mad", "cov", "qcod")] == [0] * 7
    assert nan_of(found) == set()


def test_what_divides_by_zero_is_nan_and_the_rest_stand() -> None:
    assert nan_of(statistics(np.array([-2.0, -1.0, 1.0, 2.0]))) == {"stat_cov", "stat_qcod"}
    assert nan_of(statistics(np.zeros(3))) == {"stat_cov", "stat_qcod"}
    gradients = {"ih_max_grad", "ih_max_grad_g", "ih_min_grad", "ih_min_grad_g"}
    assert nan_of(histogram(np.ones(4, dtype=int))) == gradients
    assert histogram(np.ones(4, dtype=int))["ih_entropy"] == 0
    assert nan_of(histogram(np.array([1, 2]))) == {"ih_rmad"}
    assert nan_of(histogram(np.array([1, 2, 2]))) == set()


@pytest.mark.parametrize(
    ("size", "missing"),
    [
        ((1, 1, 1), {"pca_elongation", "pca_flatness", "vol_dens_aee", "area_dens_aee"}),
        ((4, 1, 1), {"vol_dens_aee", "area_dens_aee"}),
        ((4, 3, 1), {"vol_dens_aee"}),
        ((4, 3, 2), set()),
    ],
)
def test_a_point_a_line_and_a_sheet_lack_what_divides_by_their_extent(
    size: tuple[int, int, int], missing: set[str]
) -> None:
    region = np.ones(size, dtype=bool)
    found = morphology(np.ones(size), region, region, SPACING)
    assert nan_of(found) == {f"morph_{name}" for name in missing}


def test_without_intensity_there_is_no_centre_of_mass() -> None:
    region = np.ones((2, 2, 2), dtype=bool)
    assert nan_of(morphology(np.zeros((2, 2, 2)), region, region, SPACING)) == {"morph_com"}


@pytest.mark.parametrize(
    ("region", "match"),
    [
        (np.zeros((9, 8, 7), dtype=bool), "empty"),
        (np.ones((9, 8, 6), dtype=bool), "on the scan's grid"),
        (np.ones((9, 8, 7), dtype=int), "mask \\(bool\\)"),
    ],
)
def test_a_region_that_is_none_is_refused(region: np.ndarray, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        describe(formula()[0], region, bins=CT_BINS)


def test_what_cannot_be_measured_is_refused() -> None:
    scan, region = formula()
    with pytest.raises(ValueError, match="no voxel of the region lies in the range 500 to 900"):
        describe(scan, region, bins=CT_BINS, intensity_range=(500.0, 900.0))
    with pytest.raises(ValueError, match="below the first bin, which begins at 0"):
        describe(scan, region, bins=FixedBinSize(width=1.0, lowest=0.0))
    with pytest.raises(ValueError, match="not finite"):
        describe(volume(np.full((9, 8, 7), np.inf)), region, bins=CT_BINS)
    with pytest.raises(ValueError, match="levels begin at 1, got 0"):
        histogram(np.array([0, 1]))
    nothing = np.zeros((2, 2, 2), dtype=bool)
    with pytest.raises(ValueError, match="empty"):
        morphology(np.ones((2, 2, 2)), nothing, nothing, SPACING)
    for ask in (statistics, histogram, lambda none: discretise(none, FixedBinNumber())):
        with pytest.raises(ValueError, match="no intensities"):
            ask(np.zeros(0, dtype=int))


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
def test_bins_without_a_width_are_refused(width: float) -> None:
    with pytest.raises(ValueError, match="positive width"):
        FixedBinSize(width=width, lowest=0.0)
    with pytest.raises(ValueError, match="finite start"):
        FixedBinSize(width=1.0, lowest=-math.inf)
    with pytest.raises(ValueError, match="one bin at least"):
        FixedBinNumber(count=0)
