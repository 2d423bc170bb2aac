from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.madeup import Counting, example

from voxelstem.certainty.crossfit import CrossFitted, Unseen, answering, cross_fit
from voxelstem.certainty.folds import plan_folds, strata_of
from voxelstem.choosing.ladder import HEAD, Climb, LadderConfig, Rung, Tried, climb, decide
from voxelstem.errors import AuditError, ConfigError
from voxelstem.metrics import Interval
from voxelstem.tasks.classify import Classify

MODES = ("knn", "probe", "attention", "adapters", "full")
TASK = Counting(says=lambda *_: 0.0)


def flat(mean: float, *, spread: float = 0.0, count: int = 40) -> CrossFitted:
    """Subjects whose figures are `mean` on average; half of them lie `spread` above and half below."""
    return CrossFitted(
        by_subject={
            f"s{place:02d}": (Unseen(outcome=mean + spread * (-1) ** place, fold=place // 2 % 2),)
            for place in range(count)
        }
    )


class Stairs:
    """Rungs of these figures, and which of them were tried."""

    def __init__(self, *figures: float | CrossFitted) -> None:
        self.figures = figures
        self.tried: list[str] = []

    def attempt(self, place: int) -> Callable[[], Tried]:
        def attempt() -> Tried:
            self.tried.append(MODES[place])
            figure = self.figures[place]
            return Tried(fitted=figure if isinstance(figure, CrossFitted) else flat(figure), seconds=10.0**place)

        return attempt

    def climb(self, *, metric: str = "dice", **settings: Any) -> Climb:
        rungs = [Rung(mode=MODES[place], attempt=self.attempt(place)) for place in range(len(self.figures))]
        return climb(rungs, task=TASK, metric=metric, config=LadderConfig(**settings))


def gain(estimate: float, low: float | None, note: str = "") -> Interval:
    return Interval(estimate=estimate, low=low, high=None if low is None else 2 * estimate - low, subjects=9, note=note)


@pytest.mark.parametrize(
    ("difference", "taken", "why"),
    [
        (gain(0.05, 0.01), True, "the gain is above the margin of 0.02, and a loss of as much is unlikely"),
        (gain(0.05, -0.01), True, "the gain is above the margin of 0.02, and a loss of as much is unlikely"),
        (gain(0.05, -0.02), False, "it may as well be worse by the margin of 0.02 or more"),
        (gain(0.05, -0.30), False, "it may as well be worse by the margin of 0.02 or more"),
        (gain(0.02, 0.02), False, "the gain is not above the margin of 0.02"),
        (gain(0.01, 0.005), False, "the gain is not above the margin of 0.02"),
        (gain(0.0, 0.0), False, "the gain is not above the margin of 0.02"),
        (gain(-0.1, -0.2), False, "the gain is not above the margin of 0.02"),
        (gain(0.5, None, "n=2, no interval"), False, "nobody can say how sure the gain is (n=2, no interval)"),
        (gain(math.nan, None), False, "the difference is undefined"),
    ],
)
def test_when_a_rung_pays(difference: Interval, taken: bool, why: str) -> None:
    assert decide(difference, 0.02) == (taken, why)


@pytest.mark.parametrize(
    ("figures", "chosen", "tried", "stopped"),
    [
        # Every rung pays.
        ([0.5, 0.6, 0.7, 0.8, 0.9], "full", 5, "there is no rung above"),
        # Ties and small gains go to the cheaper.
        ([0.6, 0.6, 0.6, 0.9], "knn", 3, "2 rungs in a row did not pay"),
        ([0.6, 0.61, 0.615, 0.9], "knn", 3, "2 rungs in a row did not pay"),
        # One rung of grace, anew after a rung that paid.
        ([0.5, 0.4, 0.7, 0.6, 0.8], "full", 5, "there is no rung above"),
        ([0.5, 0.7, 0.6, 0.6, 0.9], "probe", 4, "2 rungs in a row did not pay"),
        # Small steps add up, because each is measured against the best so far.
        ([0.6, 0.615, 0.63], "attention", 3, "there is no rung above"),
        # The last rungs fail: nothing is left to stop.
        ([0.5, 0.4, 0.4], "knn", 3, "there is no rung above"),
        # Nothing that matters is left to gain.
        (
            [0.5, flat(0.985, spread=0.015), 1.0],
            "probe",
            2,
            "probe leaves 0.015 to gain at most, which is within the margin of 0.02",
        ),
        # An interval without width does not say how much is left.
        (
            [0.5, 0.985, 1.0],
            "probe",
            2,
            "nothing better than probe can be measured here: all resamples of 40 subjects say dice 0.985, and an "
            "interval without width does not say how rare errors are: more labels or more test subjects would tell",
        ),
        (
            [1.0, 1.0],
            "knn",
            1,
            "nothing better than knn can be measured here: by dice no error was seen among 40 subjects, and an "
            "interval without width does not say how rare errors are: more labels or more test subjects would tell",
        ),
        ([0.3], "knn", 1, "there is no rung above"),
    ],
)
def test_how_a_ladder_is_climbed(figures: list[float | CrossFitted], chosen: str, tried: int, stopped: str) -> None:
    stairs = Stairs(*figures)
    found = stairs.climb()
    assert found.chosen == chosen
    assert stairs.tried == list(MODES[:tried]) == [step.mode for step in found.steps]
    assert found.untried == MODES[tried : len(figures)]
    assert found.stopped == stopped
    assert [step.mode for step in found.steps if step.taken][-1] == chosen
    assert found.seconds == sum(10.0**place for place in range(tried))


@pytest.mark.parametrize(("grace", "tried", "stopped"), [(0, 2, "one rung did not pay"), (2, 4, "3 rungs in a row")])
def test_grace_says_how_many_rungs_may_fail_in_a_row(grace: int, tried: int, stopped: str) -> None:
    stairs = Stairs(0.6, 0.6, 0.6, 0.6, 0.9)
    assert stairs.climb(grace=grace).stopped.startswith(stopped)
    assert len(stairs.tried) == tried


def test_a_gain_that_may_as_well_be_a_loss_is_not_taken() -> None:
    found = Stairs(0.5, flat(0.53, spread=0.4)).climb()
    step = found.steps[1]
    assert step.gain is not None
    assert step.gain.low is not None
    assert step.gain.estimate > 0.02
    assert step.gain.low < -0.02
    assert not step.taken
    assert found.chosen == "knn"
    # The same gain with less spread is.
    assert Stairs(0.5, flat(0.53, spread=0.05)).climb().chosen == "probe"


def test_what_subjects_share_does_not_blur_a_gain() -> None:
    wide = Stairs(flat(0.5, spread=0.4), flat(0.53, spread=0.4)).climb()
    assert wide.chosen == "probe"
    assert wide.steps[1].gain is not None
    assert wide.steps[1].gain.low == pytest.approx(0.03)


def test_where_less_is_better_a_margin_is_a_share_of_the_first_figure() -> None:
    found = Stairs(50.0, 49.5, 48.5, 47.6).climb(metric="mae")
    assert found.margin == pytest.approx(1.0)
    assert [step.taken for step in found.steps] == [True, False, True, False]
    assert [step.against for step in found.steps] == ["", "knn", "knn", "attention"]
    assert found.steps[2].gain is not None
    assert found.steps[2].gain.estimate == pytest.approx(1.5)
    near = Stairs(50.0, flat(0.4, spread=0.1), 0.0).climb(metric="mae")
    assert near.stopped.startswith("probe leaves 0.4 to gain at most")
    assert "by mae no error was seen among 40 subjects" in Stairs(50.0, 0.0, 0.0).climb(metric="mae").stopped


def test_two_subjects_are_too_few_to_climb() -> None:
    found = Stairs(flat(0.2, count=2), flat(0.9, count=2)).climb()
    assert found.chosen == "knn"
    assert found.steps[1].why == "nobody can say how sure the gain is (n=2, no interval)"


def test_an_undefined_figure_wins_nothing_and_becomes_none() -> None:
    found = Stairs(0.5, flat(math.nan), 0.7).climb()
    assert [step.taken for step in found.steps] == [True, False, True]
    facts = json.loads(json.dumps(found.facts(), allow_nan=False))
    assert facts["steps"][1]["figure"]["estimate"] is None
    assert facts["chosen"] == "attention"
    assert facts["seconds"] == 111.0


def test_a_table_has_a_row_for_each_rung_also_for_those_that_were_not_tried() -> None:
    rows = Stairs(0.5, 0.4, 0.45, 0.9).climb().rows()
    assert rows == [
        ("knn", "dice 0.500 [0.500, 0.500]", "", "1.0", "taken: the cheapest is where the climb begins"),
        (
            "probe",
            "dice 0.400 [0.400, 0.400]",
            "-0.100 [-0.100, -0.100] (knn)",
            "10.0",
            "not taken: the gain is not above the margin of 0.02",
        ),
        (
            "attention",
            "dice 0.450 [0.450, 0.450]",
            "-0.050 [-0.050, -0.050] (knn)",
            "100.0",
            "not taken: the gain is not above the margin of 0.02",
        ),
        ("adapters", "", "", "", "not tried: 2 rungs in a row did not pay"),
    ]
    assert all(len(row) == len(HEAD) for row in rows)


def test_a_real_ladder_climbs_to_the_probe_where_neighbours_see_noise() -> None:
    rng, classes = np.random.default_rng(0), ("no", "yes")
    scans = rng.normal(size=(60, 40)) * np.where(np.arange(40) < 1, 1.0, 3.0)
    scans[:, 0] += 4.0 * (np.arange(60) % 2)
    examples = [example(f"s{at:02d}", scan=row, label=classes[at % 2]) for at, row in enumerate(scans)]
    plan = plan_folds(strata_of(examples, classes), count=3, repeats=2, seed=0)
    task = Classify(folds=99)

    def rung(mode: str) -> Rung:
        answer = answering(task, examples, classes, mode=mode)
        return Rung(mode=mode, attempt=lambda: Tried(fitted=cross_fit(answer, plan, seed=0), seconds=1.0))

    found = climb([rung("knn"), rung("probe")], task=task, metric="auroc", config=LadderConfig())
    assert found.chosen == "probe"
    assert found.steps[1].figure.estimate > found.steps[0].figure.estimate + 0.1


@pytest.mark.parametrize(
    "error",
    [ValueError("one class"), AuditError("nothing to compare", hint="label more"), ConfigError("nobody is left")],
)
def test_a_rung_on_which_nothing_can_be_learned_did_not_pay_and_says_why(error: Exception) -> None:
    stairs = Stairs(0.5, 0.6, 0.7)
    rungs = [Rung(mode=MODES[place], attempt=stairs.attempt(place)) for place in range(3)]

    def fails() -> Tried:
        raise error

    rungs[1] = Rung(mode="probe", attempt=fails)
    found = climb(rungs, task=TASK, metric="dice", config=LadderConfig())
    assert found.chosen == "attention"
    assert stairs.tried == ["knn", "attention"]
    step = found.steps[1]
    assert (step.taken, step.gain, step.against) == (False, None, "knn")
    assert step.why == f"in one of the folds nothing could be learned: {error.args[0]}"
    assert found.rows()[1][:3] == ("probe", "", "")
    facts = json.loads(json.dumps(found.facts(), allow_nan=False))
    assert facts["steps"][1]["figure"]["estimate"] is None
    # It counts among those that did not pay, and on the first rung there is nothing to fall back on.
    strict = climb(rungs, task=TASK, metric="dice", config=LadderConfig(grace=0))
    assert (strict.chosen, strict.untried) == ("knn", ("attention",))
    with pytest.raises(type(error), match=str(error.args[0])):
        climb(rungs[1:], task=TASK, metric="dice", config=LadderConfig())


def test_what_the_settings_do_not_allow_is_told_beside_the_rungs() -> None:
    rungs = [Rung(mode="knn", attempt=Stairs(0.5).attempt(0))]
    found = climb(rungs, task=TASK, metric="dice", config=LadderConfig(), left_out={"full": "by these settings"})
    assert found.rows()[-1] == ("full", "", "", "", "not tried: by these settings")
    assert found.facts()["left_out"] == {"full": "by these settings"}


def test_rungs_of_other_folds_are_refused() -> None:
    with pytest.raises(ValueError, match="same plan"):
        Stairs(0.5, flat(0.6, count=38)).climb()


@pytest.mark.parametrize("modes", [(), ("knn", "knn")])
def test_a_ladder_without_rungs_or_with_one_twice_is_refused(modes: tuple[str, ...]) -> None:
    rungs = [Rung(mode=mode, attempt=Stairs(0.5).attempt(0)) for mode in modes]
    with pytest.raises(ValueError, match="each of them once"):
        climb(rungs, task=TASK, metric="dice", config=LadderConfig())


def test_a_metric_of_unknown_direction_is_refused_before_anything_is_tried() -> None:
    stairs = Stairs(0.5, 0.6)
    with pytest.raises(ValueError, match="whether more of 'speed'"):
        stairs.climb(metric="speed")
    assert stairs.tried == []


@pytest.mark.parametrize("settings", [{"margin": 0.0}, {"margin": math.nan}, {"grace": -1}])
def test_settings_without_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="margin must be positive"):
        LadderConfig(**settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_a_time_is_a_number(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be"):
        Tried(fitted=flat(0.5), seconds=seconds)
