from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.engine.watch import Verdict, Watch, WatchConfig
from voxelstem.errors import CheckpointError

CONFIG = WatchConfig(window=8, skips=1, suspects=3, roll_backs=1)


def steady(watch: Watch, start: int, stop: int) -> None:
    """Steps whose loss and gradient breathe a little."""
    for step in range(start, stop):
        assert watch.judge(step, 1.0 + 0.01 * (step % 3), 2.0 + 0.1 * (step % 5)).action == "take"


def test_a_steady_run_takes_every_step():
    watch = Watch(CONFIG)
    steady(watch, 0, 50)
    assert watch.excluded == set()


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_a_number_is_never_taken_not_even_in_the_first_step(loss: float, norm: float):
    verdict = Watch(CONFIG).judge(0, loss, norm)
    assert verdict.action == "skip"
    assert verdict.reason.endswith("is not a number")


def test_a_spike_is_a_long_gradient_and_a_high_loss_together():
    watch = Watch(CONFIG)
    steady(watch, 0, 8)
    assert watch.judge(8, 1.0, 1000.0).action == "take"
    assert watch.judge(9, 9.0, 2.0).action == "take"
    verdict = watch.judge(10, 9.0, 1000.0)
    assert verdict.action == "skip"
    assert verdict.reason == "a spike: gradient 1e+03 (usually 2.2), loss 9 (usually 1.01)"


def test_no_spike_is_seen_before_half_a_window_of_steps():
    watch = Watch(CONFIG)
    steady(watch, 0, 3)
    assert watch.judge(3, 9.0, 1000.0).action == "take"


def test_a_spike_that_is_left_out_does_not_become_the_usual():
    watch = Watch(WatchConfig(window=8, skips=7))
    steady(watch, 0, 8)
    verdicts = [watch.judge(step, 9.0, 1000.0) for step in range(8, 15)]
    assert {verdict.action for verdict in verdicts} == {"skip"}


def test_without_spikes_only_what_is_not_a_number_is_left_out():
    watch = Watch(WatchConfig(spike=math.inf, window=8))
    steady(watch, 0, 20)
    assert watch.judge(20, 1e9, 1e9).action == "take"
    assert watch.judge(21, math.nan, 1.0).action == "skip"


def test_one_bad_step_too_many_goes_back_before_the_suspects():
    watch = Watch(CONFIG)
    steady(watch, 0, 12)
    assert watch.judge(12, math.nan, 1.0) == Verdict(action="skip", reason="the loss is not a number")
    steady(watch, 13, 14)
    verdict = watch.judge(14, math.nan, 1.0)
    assert verdict == Verdict(action="roll_back", reason="the loss is not a number", back_to=9)
    assert watch.excluded == {9, 10, 11, 12, 14}


def test_bad_steps_far_apart_are_only_left_out():
    watch = Watch(CONFIG)
    for bad in (5, 15, 25, 35):
        steady(watch, bad - 4, bad)
        assert watch.judge(bad, math.nan, math.nan).action == "skip"


def test_a_run_that_may_go_back_no_more_says_what_to_do():
    watch = Watch(CONFIG)
    steady(watch, 0, 12)
    at_ten = watch.facts()
    for step in (12, 13):
        verdict = watch.judge(step, math.nan, 1.0)
    assert verdict.action == "roll_back"
    watch.roll_back(at_ten)
    steady(watch, 14, 20)
    assert watch.judge(20, math.nan, 1.0).action == "skip"
    with pytest.raises(CheckpointError, match="went back 1 times") as raised:
        watch.judge(21, math.nan, 1.0)
    assert "optim.lr" in raised.value.hint


def test_a_roll_back_forgets_what_came_after_the_checkpoint_but_not_what_is_left_out():
    watch = Watch(CONFIG)
    steady(watch, 0, 8)
    at_eight = json.loads(json.dumps(watch.facts()))
    steady(watch, 8, 12)
    watch.judge(12, math.nan, 1.0)
    watch.judge(13, math.nan, 1.0)
    watch.roll_back(at_eight)
    assert watch.facts() == at_eight | {"excluded": [9, 10, 11, 12, 13], "rolled_back": 1}


@given(
    st.lists(st.tuples(st.floats(0, 10), st.sampled_from([1.0, 2.0, 500.0, math.nan, math.inf])), min_size=1),
    st.integers(0, 200),
)
def test_a_resumed_watch_decides_as_one_that_never_stopped(steps: list[tuple[float, float]], cut: int):
    config = WatchConfig(window=6, skips=2, roll_backs=1000)
    whole, parts = Watch(config), Watch(config)
    for step, (loss, norm) in enumerate(steps):
        if step == cut % len(steps):
            parts = Watch(config, json.loads(json.dumps(parts.facts(), allow_nan=False)))
        assert whole.judge(step, loss, norm) == parts.judge(step, loss, norm)
    assert whole.excluded == parts.excluded


@pytest.mark.parametrize(
    "wrong", [{"spike": 1.0}, {"spike": math.nan}, {"window": 1}, {"suspects": 0}, {"skips": -1}, {"roll_backs": -1}]
)
def test_numbers_that_make_no_policy_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WatchConfig(**wrong)  # type: ignore[arg-type]
