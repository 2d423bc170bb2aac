from __future__ import annotations

import io
import math
import statistics

import numpy as np
import pytest
from PIL import Image

from voxelstem.report.agreement import Estimated, agreement_picture, limits_of_agreement


def estimated(
    name: str = "run", *, subjects: int = 30, repeats: int = 1, noise: float = 3.0, seed: int = 0
) -> Estimated:
    rng = np.random.default_rng(seed)
    truth = np.linspace(20, 80, subjects)
    return Estimated(
        name=name, truth=truth, predicted=truth[:, None] + 1 + noise * rng.normal(size=(subjects, repeats))
    )


def test_bias_and_limits_are_those_of_bland_and_altman() -> None:
    one = estimated()
    gaps = [float(said - true) for said, true in zip(one.predicted[:, 0], one.truth, strict=True)]
    limits = limits_of_agreement(one)
    bias, spread = statistics.mean(gaps), statistics.stdev(gaps)
    assert limits.bias.estimate == pytest.approx(bias)
    assert limits.low.estimate == pytest.approx(bias - 1.959964 * spread)
    assert limits.high.estimate == pytest.approx(bias + 1.959964 * spread)
    assert limits.bias.subjects == 30


def test_intervals_resample_subjects() -> None:
    one = estimated(subjects=9)
    picks = np.random.default_rng(0).integers(0, 9, (1000, 9))
    naive = []
    for row in picks:
        gaps = [float(one.differences[pick, 0]) for pick in row]
        naive.append(statistics.mean(gaps) + 1.959964 * statistics.stdev(gaps))
    low, high = np.quantile(naive, [0.025, 0.975])
    found = limits_of_agreement(one).high
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_for_many_normal_differences_intervals_are_as_wide_as_the_textbook_says() -> None:
    # Bland and Altman 1999, section 2: standard errors s / sqrt(n) of the bias and about sqrt(3) times that of limits.
    limits = limits_of_agreement(estimated(subjects=600, noise=2.0))
    error = 2.0 / math.sqrt(600)
    for value, wanted in (
        (limits.bias, error),
        (limits.low, math.sqrt(3) * error),
        (limits.high, math.sqrt(3) * error),
    ):
        assert value.low is not None
        assert value.high is not None
        assert (value.high - value.low) / (2 * 1.959964) == pytest.approx(wanted, rel=0.15)


def test_repeats_are_averaged_as_figures_and_not_as_predictions() -> None:
    many = estimated(repeats=8)
    limits = limits_of_agreement(many)
    alone = [statistics.variance(many.differences[:, repeat].tolist()) for repeat in range(8)]
    wanted = 1.959964 * math.sqrt(statistics.mean(alone))
    assert limits.high.estimate - limits.bias.estimate == pytest.approx(wanted)
    # The mean of eight predictions would agree far better than any of them.
    ensemble = Estimated(name="run", truth=many.truth, predicted=many.predicted.mean(axis=1, keepdims=True))
    better = limits_of_agreement(ensemble)
    assert better.high.estimate - better.bias.estimate < 0.6 * wanted


def test_small_differences_of_large_numbers_keep_their_digits() -> None:
    truth = np.full(5, 1e9)
    gaps = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    limits = limits_of_agreement(Estimated(name="run", truth=truth, predicted=(truth + gaps)[:, None]))
    assert limits.high.estimate == pytest.approx(3 + 1.959964 * statistics.stdev(gaps.tolist()), rel=1e-6)


def test_one_subject_has_a_bias_and_no_limits() -> None:
    limits = limits_of_agreement(estimated(subjects=1))
    assert math.isfinite(limits.bias.estimate)
    assert math.isnan(limits.low.estimate)
    assert limits.bias.low is None
    assert agreement_picture([estimated(subjects=1)], about="age", unit="years").png


def test_the_picture_says_bias_and_limits_in_words() -> None:
    run, scratch = estimated(), estimated("scratch", repeats=3, noise=9.0)
    picture = agreement_picture([run, scratch], about="age", unit="years")
    for one in (run, scratch):
        limits = limits_of_agreement(one)
        assert f"{one.name}: bias {limits.bias.estimate:+.3g} [{limits.bias.low:+.3g}, " in picture.alt
        assert f"to {limits.high.estimate:+.3g} [" in picture.alt
    assert "30 held-out subjects" in picture.alt
    assert "95 % bootstrap intervals" in picture.caption
    assert "a point for each seed" in picture.caption
    assert "a point for each seed" not in agreement_picture([run], about="age", unit="years").caption
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))
    assert pixels.std() > 5
    assert pixels.shape[1] <= 710


def test_equal_predictions_and_truths_of_one_value_can_be_drawn() -> None:
    flat = Estimated(name="mean", truth=np.full(4, 7.0), predicted=np.full((4, 1), 7.0))
    assert "+0 [+0, +0]" in agreement_picture([flat], about="age", unit="").alt


def test_repeats_are_read_in_the_order_of_subjects() -> None:
    read = Estimated.of("run", {"b": [(2.0, 2.5)], "a": [(1.0, 1.5)]})
    np.testing.assert_array_equal(read.truth, [1.0, 2.0])
    np.testing.assert_array_equal(read.predicted, [[1.5], [2.5]])
    np.testing.assert_array_equal(read.means, [[1.25], [2.25]])
    with pytest.raises(ValueError, match="one truth"):
        Estimated.of("run", {"a": [(1.0, 1.5), (2.0, 1.5)]})


@pytest.mark.parametrize(
    ("truth", "predicted"),
    [
        ([], np.zeros((0, 1))),
        ([1.0], np.zeros((2, 1))),
        ([math.nan], np.ones((1, 1))),
        ([1.0], np.full((1, 1), np.inf)),
    ],
)
def test_numbers_without_sense_are_refused(truth: list[float], predicted: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"predictions must|finite"):
        Estimated(name="run", truth=np.array(truth), predicted=predicted)


def test_contestants_of_other_subjects_share_no_picture() -> None:
    with pytest.raises(ValueError, match="same subjects"):
        agreement_picture([estimated(), estimated("scratch", subjects=31)], about="age", unit="years")
