from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.errors import IngestError
from voxelstem.study import INPUT_SPECS, InputSpec
from voxelstem.views.intensity import Limits, Stats, doubt, lift, limits, measure, squeeze_, window

SPEC = InputSpec(low_hu=-160.0, high_hu=240.0)
SOFT = limits(None, SPEC)
ZSCORE, UNIT99 = INPUT_SPECS["mri-nnssl"], INPUT_SPECS["mri-fomo25"]


def head(shape: tuple[int, int, int] = (40, 24, 20), seed: int = 0) -> np.ndarray:
    """Air at 0 about a box of tissue between 200 and 900, with a few very bright voxels."""
    rng = np.random.default_rng(seed)
    array = np.zeros((1, *shape), np.float32)
    inside = tuple(slice(size // 5, size - size // 5) for size in shape)
    tissue = array[0][inside]
    tissue[...] = rng.uniform(200, 900, tissue.shape)
    tissue[0, 0, :3] = 5000.0
    return array


def of_array(array: np.ndarray) -> Stats:
    return measure(lambda low, high: array[:, low:high], array.shape[1])


def made(array: np.ndarray, spec: InputSpec) -> np.ndarray:
    return window(torch.from_numpy(array), limits(array, spec)).numpy()


def test_the_ends_of_the_window_become_zero_and_one() -> None:
    torch.testing.assert_close(window(torch.tensor([-160.0, 40.0, 240.0]), SOFT), torch.tensor([0.0, 0.5, 1.0]))


def test_what_lies_outside_the_window_is_clamped() -> None:
    assert window(torch.tensor([-3000.0, -160.1, 240.1, 9000.0]), SOFT).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_inside_the_window_values_keep_their_order_and_their_distances() -> None:
    hu = torch.linspace(-160, 240, 101)
    steps = window(hu, SOFT).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 0.01))


def test_the_scan_itself_is_left_alone() -> None:
    hu = torch.tensor([[-500.0, 500.0]])
    window(hu, SOFT)
    assert hu.tolist() == [[-500.0, 500.0]]


@pytest.mark.parametrize("how", [SOFT, Limits(low=100.0, high=180.0, outside=-160.0, clamped=False)])
def test_the_halves_make_the_whole_also_of_integers(how: Limits) -> None:
    hu = torch.arange(-500, 500, dtype=torch.int16)
    lifted = lift(hu, how)
    assert lifted.dtype == torch.float32
    assert lifted[340] == 0
    assert torch.equal(squeeze_(lifted, how), window(hu.float(), how))


def test_a_window_asks_nothing_of_the_volume() -> None:
    assert limits(None, SPEC) == Limits(low=-160.0, high=240.0, outside=-160.0)
    assert limits(head(), SPEC) == limits(None, SPEC)


def test_z_scores_have_mean_0_and_deviation_1_over_the_whole_volume_and_are_not_clamped() -> None:
    array = head()
    found = made(array, ZSCORE)
    np.testing.assert_allclose(found, (array - array.mean()) / array.std(), rtol=0, atol=1e-4)
    assert found.max() > 5


def test_unit99_clips_bright_voxels_and_brings_air_to_0() -> None:
    array = head()
    # The same step by step: clip, standardise the foreground, then bring the whole range to [0, 1].
    tissue = array[array != array.min()]
    clipped = np.minimum(array, np.percentile(tissue, 99))
    scored = (clipped - clipped[array != array.min()].mean()) / clipped[array != array.min()].std()
    naive = (scored - scored.min()) / (scored.max() - scored.min())
    found = made(array, UNIT99)
    np.testing.assert_allclose(found, naive, rtol=0, atol=1e-5)
    assert (found.min(), found.max(), found[0, 0, 0, 0]) == (0, 1, 0)


@pytest.mark.parametrize("spec", [ZSCORE, UNIT99])
def test_what_lies_outside_of_the_scan_is_its_minimum_and_not_its_mean(spec: InputSpec) -> None:
    array = head() - 300
    found = limits(array, spec)
    assert found.outside == -300
    outside = squeeze_(torch.zeros(1), found)
    torch.testing.assert_close(outside, torch.from_numpy(made(array, spec)).amin()[None])


@pytest.mark.parametrize("spec", [ZSCORE, UNIT99])
@given(st.floats(0.01, 100), st.floats(-1000, 1000))
@settings(max_examples=20)
def test_a_scanners_gain_and_offset_do_not_matter(spec: InputSpec, gain: float, offset: float) -> None:
    array = head((12, 10, 10))
    other = (array * gain + offset).astype(np.float32)
    assert np.allclose(made(array, spec), made(other, spec), atol=2e-2 if gain < 1 else 2e-3)


@given(st.integers(1, 90), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.sampled_from((1.0, 0.1, 1e4)))
@settings(max_examples=60)
def test_what_is_measured_in_parts_is_what_the_whole_gives(i: int, j: int, k: int, seed: int, scale: float) -> None:
    array = np.random.default_rng(seed).normal(3, scale, (1, i, j, k)).round(1).astype(np.float32)
    found, tissue = of_array(array), array[array > array.min()]
    assert found.minimum == array.min()
    assert found.mean == pytest.approx(array.mean(dtype=np.float64), rel=1e-9, abs=1e-9)
    assert found.deviation == pytest.approx(array.std(dtype=np.float64), rel=1e-9, abs=1e-9)
    top = np.percentile(tissue.astype(np.float64), 99) if tissue.size else array.min()
    assert found.top99 == pytest.approx(top, rel=1e-9, abs=1e-9)


def test_order_in_memory_and_whole_numbers_change_no_bit() -> None:
    array = head().round()
    whole = array.astype(np.int16)
    assert of_array(array) == of_array(np.asfortranarray(array)) == of_array(whole)


def test_a_volume_of_one_value_is_refused_before_anything_is_divided() -> None:
    for spec in (ZSCORE, UNIT99):
        with pytest.raises(IngestError, match=r"one value \(7\)") as refused:
            limits(np.full((1, 4, 4, 4), 7, np.float32), spec)
        assert refused.value.code == "constant"
    assert limits(np.full((1, 4, 4, 4), 7, np.float32), SPEC) == SOFT


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 39])
def test_one_voxel_that_is_no_number_refuses_the_volume(value: float, row: int) -> None:
    array = head()
    array[0, row, 3, 3] = value
    with pytest.raises(IngestError, match="not finite") as refused:
        limits(array, ZSCORE)
    assert refused.value.code == "not-finite"


def test_channels_are_not_measured_as_if_they_were_one() -> None:
    with pytest.raises(IngestError, match="2 channels"):
        limits(np.concatenate([head(), head()]), UNIT99)


def test_a_per_volume_normaliser_cannot_do_without_the_volume() -> None:
    with pytest.raises(ValueError, match="whole volume"):
        limits(None, ZSCORE)


def test_z_scores_of_the_whole_volume_are_undone_with_a_word() -> None:
    raw = head()
    raw[raw > 900] = 900
    scored = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(made(scored, UNIT99), made(raw, UNIT99), atol=1e-5)
    np.testing.assert_allclose(made(scored, ZSCORE), made(raw, ZSCORE), atol=1e-4)
    assert "z-scored: minimum -" in doubt(of_array(scored), UNIT99)
    assert doubt(of_array(raw), UNIT99) == doubt(of_array(scored), ZSCORE) == ""


@pytest.mark.parametrize("spec", [ZSCORE, UNIT99, InputSpec(modality="MR", low_hu=0.0, high_hu=1.0)])
@pytest.mark.parametrize("step", [0.0, 1e-4])
def test_tissue_that_was_scored_alone_is_refused_because_air_is_not_darkest(spec: InputSpec, step: float) -> None:
    raw = head()
    tissue = raw > 0
    scored = np.where(tissue, (raw - raw[tissue].mean()) / raw[tissue].std(), step)  # air may be rounded when stored
    with pytest.raises(IngestError, match="z-scored over tissue") as refused:
        limits(scored.astype(np.float32), spec)
    assert refused.value.code == "z-scored"


def test_z_scores_are_refused_by_a_window_that_was_made_for_other_values() -> None:
    raw = head()
    scored = (raw - raw.mean()) / raw.std()
    for low, high in ((0.0, 1.0), (0.0, 1000.0), (-1000.0, 1000.0)):
        spec = InputSpec(modality="MR", low_hu=low, high_hu=high)
        with pytest.raises(IngestError, match=f"window {low:g} to {high:g}") as refused:
            limits(scored, spec)
        assert refused.value.code == "z-scored"
        assert limits(raw, spec).high == high
    assert limits(scored, InputSpec(modality="MR", low_hu=-3.0, high_hu=5.0)).low == -3
