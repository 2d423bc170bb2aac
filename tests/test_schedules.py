from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem import schedules

PROGRESS = st.floats(0, 1)
RATES = st.floats(0, 10)


def test_cosine_begins_at_start_is_halfway_in_the_middle_and_ends_at_end() -> None:
    assert schedules.cosine(0.0, start=0.99, end=1.0) == pytest.approx(0.99)
    assert schedules.cosine(0.5, start=0.99, end=1.0) == pytest.approx(0.995)
    assert schedules.cosine(1.0, start=0.99, end=1.0) == 1.0


def test_cosine_stands_still_outside_the_run() -> None:
    assert schedules.cosine(-0.5, start=3.0, end=1.0) == 3.0
    assert schedules.cosine(1.5, start=3.0, end=1.0) == 1.0


@given(first=PROGRESS, second=PROGRESS, start=RATES, end=RATES)
def test_cosine_never_turns_back(first: float, second: float, start: float, end: float) -> None:
    early, late = (schedules.cosine(progress, start=start, end=end) for progress in sorted((first, second)))
    assert (late - early) * (end - start) >= -1e-9
    assert min(start, end) - 1e-9 <= early <= max(start, end) + 1e-9


def test_warm_up_rises_in_a_straight_line_to_the_peak() -> None:
    rates = [schedules.warm_up_cosine(progress, warm_up=0.2, peak=4.0, end=1.0) for progress in (0.0, 0.05, 0.1, 0.2)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 4.0])


@given(progress=st.floats(0.2, 1))
def test_after_warm_up_it_glides_to_the_end(progress: float) -> None:
    share = (progress - 0.2) / 0.8
    expected = 1.0 + 3.0 * (1 + math.cos(math.pi * share)) / 2
    assert schedules.warm_up_cosine(progress, warm_up=0.2, peak=4.0, end=1.0) == pytest.approx(expected)


def test_without_warm_up_it_begins_at_the_peak() -> None:
    assert schedules.warm_up_cosine(0.0, warm_up=0.0, peak=4.0, end=1.0) == pytest.approx(4.0)


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.04), (0.15, 0.055), (0.3, 0.07), (0.9, 0.07)])
def test_linear_moves_over_its_share_and_then_stays(progress: float, expected: float) -> None:
    assert schedules.linear(progress, start=0.04, end=0.07, share=0.3) == pytest.approx(expected)


def naive_rates(steps: int, warm_up_steps: int, peak: float, end: float) -> list[float]:
    """One rate a step, counted instead of computed from progress."""
    rising = [peak * step / warm_up_steps for step in range(warm_up_steps)]
    left = steps - warm_up_steps
    return rising + [end + (peak - end) * (1 + math.cos(math.pi * step / left)) / 2 for step in range(left)]


@given(steps=st.integers(2, 60), share=st.floats(0, 0.9), peak=RATES, end=RATES)
def test_warm_up_and_glide_equal_a_table_of_rates(steps: int, share: float, peak: float, end: float) -> None:
    warm_up_steps = min(int(share * steps), steps - 1)
    seen = [
        schedules.warm_up_cosine(step / steps, warm_up=warm_up_steps / steps, peak=peak, end=end)
        for step in range(steps)
    ]
    assert seen == pytest.approx(naive_rates(steps, warm_up_steps, peak, end), abs=1e-9)


@given(steps=st.integers(1, 60), share=st.floats(0.01, 1), start=RATES, end=RATES)
def test_linear_equals_walking_in_equal_steps(steps: int, share: float, start: float, end: float) -> None:
    walked, stride = start, (end - start) / (share * steps)
    for step in range(steps):
        seen = schedules.linear(step / steps, start=start, end=end, share=share)
        assert seen == pytest.approx(walked, abs=1e-9)
        walked = end if step + 1 >= share * steps else walked + stride


def test_linear_over_no_share_is_there_at_once() -> None:
    assert schedules.linear(0.0, start=1.0, end=2.0, share=0.0) == 2.0


def test_poly_falls_as_a_power_of_what_is_left() -> None:
    for progress in (0.0, 0.3, 0.9):
        rate = schedules.warm_up_poly(progress, warm_up=0.0, peak=0.01, end=0.0)
        assert rate == pytest.approx(0.01 * (1 - progress) ** 0.9)
    assert schedules.warm_up_poly(1.0, warm_up=0.0, peak=0.01, end=0.0) == 0.0


def test_poly_rises_first_where_it_is_asked_to_and_ends_at_the_end() -> None:
    rates = [schedules.warm_up_poly(progress, warm_up=0.2, peak=4.0, end=1.0) for progress in (0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([2.0, 4.0, 1 + 3 * 0.5**0.9, 1.0])


def tuning(kind: schedules.Tuning, *progress: float) -> list[tuple[float, float]]:
    return [schedules.tuning(at, kind=kind, warm_up=0.2) for at in progress]


def test_fine_tuning_by_default_falls_from_the_peak_in_all_parts() -> None:
    assert tuning("default", 0.0, 0.5) == [(1.0, 1.0), pytest.approx((0.5**0.9, 0.5**0.9))]


def test_a_frozen_encoder_never_learns() -> None:
    assert [encoder for encoder, _ in tuning("frozen", 0.0, 0.3, 0.9)] == [0.0, 0.0, 0.0]
    assert tuning("frozen", 0.0)[0][1] == 1.0


def test_warm_up_raises_both_parts_and_then_lets_them_fall() -> None:
    half = pytest.approx((0.5, 0.5))
    assert tuning("warm_up", 0.0, 0.1, 0.2) == [(0.0, 0.0), half, (1.0, 1.0)]


def test_a_sawtooth_raises_the_rest_then_all_and_a_valley_lets_the_rest_fall_first() -> None:
    assert tuning("sawtooth", 0.0, 0.1, 0.2, 0.3, 0.4) == [
        (0.0, 0.0),
        pytest.approx((0.0, 0.5)),
        (0.0, 0.0),
        pytest.approx((0.5, 0.5)),
        (1.0, 1.0),
    ]
    assert tuning("valley", 0.0, 0.1, 0.3) == [(0.0, 1.0), pytest.approx((0.0, 0.5)), pytest.approx((0.5, 0.5))]


@given(kind=st.sampled_from(["default", "warm_up", "frozen", "valley", "sawtooth"]), progress=PROGRESS)
def test_a_fine_tuned_encoder_never_outruns_the_rest(kind: schedules.Tuning, progress: float) -> None:
    encoder, rest = schedules.tuning(progress, kind=kind, warm_up=0.1)
    assert 0 <= encoder <= rest <= 1
    assert schedules.tuning(1.0, kind=kind, warm_up=0.1)[1] == 0


def test_warm_ups_must_leave_something_to_the_run() -> None:
    with pytest.raises(ValueError, match="must leave a part of the run to sawtooth"):
        schedules.tuning(0.0, kind="sawtooth", warm_up=0.5)
