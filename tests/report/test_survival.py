from __future__ import annotations

import io
import math

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from PIL import Image

from voxelstem.heads.survival import Watched
from voxelstem.report import survival
from voxelstem.report.survival import at_risk, kaplan_meier_picture, outlook


def watched(seed: int = 0, subjects: int = 40) -> tuple[Watched, np.ndarray]:
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=subjects)
    event = rng.exponential(400 * np.exp(-risk))
    ended = rng.uniform(50, 900, subjects)
    # Whole tens, so that events and ends of watches share times.
    time = np.maximum(np.round(np.minimum(event, ended), -1), 10)
    return Watched(time=time, event=event <= ended), risk


@pytest.mark.parametrize("seed", range(4))
def test_curve_and_limits_are_those_of_lifelines(seed: int) -> None:
    some, _ = watched(seed)
    fitted = KaplanMeierFitter().fit(some.time, some.event)
    found = outlook(some)
    np.testing.assert_allclose(found.chance, fitted.survival_function_.loc[found.time].to_numpy()[:, 0], atol=1e-12)
    limits = fitted.confidence_interval_.loc[found.time].to_numpy()
    inside = found.chance > 0
    np.testing.assert_allclose(found.low[inside], limits[inside, 0], atol=1e-6)
    np.testing.assert_allclose(found.high[inside], limits[inside, 1], atol=1e-6)


def test_limits_are_the_naive_ones() -> None:
    some = Watched(time=np.array([1.0, 2.0, 2.0, 3.0, 5.0]), event=np.array([True, True, False, False, True]))
    chance, variance, naive = 1.0, 0.0, []
    for time in (1.0, 2.0, 3.0, 5.0):
        left = sum(t >= time for t in some.time)
        came = sum(t == time and e for t, e in zip(some.time, some.event, strict=True))
        chance *= 1 - came / left
        if came and left > came:
            variance += came / (left * (left - came))
        if chance > 0:
            middle, half = math.log(-math.log(chance)), 1.959964 * math.sqrt(variance) / abs(math.log(chance))
            naive.append((math.exp(-math.exp(middle + half)), math.exp(-math.exp(middle - half))))
    found = outlook(some)
    np.testing.assert_allclose(np.stack([found.low, found.high], axis=1)[:3], naive, atol=1e-9)


def test_before_any_event_all_is_certain_and_after_the_last_nothing_is() -> None:
    found = outlook(Watched(time=np.array([1.0, 2.0, 3.0]), event=np.array([False, True, True])))
    assert (found.low[0], found.high[0]) == (1.0, 1.0)
    assert found.chance[-1] == 0
    assert math.isnan(found.low[-1])
    assert math.isnan(found.high[-1])


def test_at_risk_is_who_was_watched_until_then() -> None:
    some, _ = watched()
    times = np.array([0.0, 10.0, 10.5, 300.0, 5000.0])
    naive = [sum(1 for time in some.time if time >= moment) for moment in times]
    assert at_risk(some, times).tolist() == naive
    assert naive[0] == len(some)


def test_the_picture_says_chances_and_numbers_at_risk_of_both_groups() -> None:
    some, risk = watched()
    picture = kaplan_meier_picture(some, risk, threshold=0.3, name="run", unit="days")
    fitted = KaplanMeierFitter()
    for group, who in (("higher risk", risk > 0.3), ("lower risk", risk <= 0.3)):
        fitted.fit(some.time[who], some.event[who])
        said = f"{group}, {who.sum()} subjects, {some.event[who].sum()} events: {fitted.predict(200):.2f} at 200"
        assert f"{said} ({(some.time[who] >= 200).sum()} at risk)" in picture.alt
    assert "median risk of the labelled subjects" in picture.caption
    assert "Greenwood" in picture.caption
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))
    assert pixels.std() > 5


def test_the_threshold_is_taken_as_it_is_given() -> None:
    some, risk = watched()
    assert (
        "No held-out subject is of lower risk"
        in kaplan_meier_picture(some, risk, threshold=-99.0, name="run", unit="days").caption
    )
    low = kaplan_meier_picture(some, risk, threshold=99.0, name="run", unit="days")
    assert "No held-out subject is of higher risk" in low.caption
    assert "higher risk" not in low.alt
    equal = kaplan_meier_picture(some, np.ones(40), threshold=1.0, name="run", unit="days")
    # Equal to the threshold is not above it, and nobody stands in both groups.
    assert "lower risk, 40 subjects" in equal.alt
    assert "higher risk" not in equal.alt


@pytest.mark.parametrize("last", [0.003, 1.0, 7.0, 59.0, 2400.0, 1e6])
def test_ticks_are_round_and_within_what_was_observed(last: float) -> None:
    ticks = survival._ticks(last)
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 7
    assert ticks[-1] <= last * (1 + 1e-9)
    assert ticks[-1] >= last / 2
    assert np.allclose(np.diff(ticks), ticks[1])


def test_watches_that_all_end_at_once_can_be_drawn() -> None:
    nothing = Watched(time=np.zeros(3), event=np.array([False, True, False]))
    assert kaplan_meier_picture(nothing, np.arange(3.0), threshold=1.0, name="run", unit="").png


@pytest.mark.parametrize(
    ("risk", "threshold"), [(np.zeros(39), 0.0), (np.full(40, np.nan), 0.0), (np.zeros(40), math.inf)]
)
def test_risks_without_sense_are_refused(risk: np.ndarray, threshold: float) -> None:
    some, _ = watched()
    with pytest.raises(ValueError, match="finite risks"):
        kaplan_meier_picture(some, risk, threshold=threshold, name="run", unit="days")
