from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.madeup import Counting, classed, example, timed, voxels

from voxelstem.certainty.crossfit import answering, seed_of
from voxelstem.certainty.folds import EVENT, Folds, Strata, plan_folds, strata_of
from voxelstem.choosing.efficiency import (
    Curve,
    CurveConfig,
    Gain,
    Law,
    Point,
    draw_order,
    folds_of_curve,
    label_curve,
    recommend,
    sizes_of,
)
from voxelstem.metrics import Interval, bootstrap_interval
from voxelstem.protocols import Example
from voxelstem.tasks.classify import Classify

EXPONENT, TOP, DROP = 0.5, 0.9, 0.6


def truth(size: int) -> float:
    return TOP - DROP * size**-EXPONENT


def noisy(size: int, subject: str, seed: int, *, subjects: float = 0.1, draws: float = 0.02) -> float:
    """How far a subject and a draw are from the truth: the draws of one fold differ, and less the larger they are."""
    own = np.random.default_rng([ord(letter) for letter in subject]).normal(0, subjects)
    drawn = np.random.default_rng([seed, size]).normal(0, draws * size**-0.5)
    return float(own + drawn)


def rising(kept: frozenset[str], who: str, seed: int) -> float:
    return truth(len(kept)) + noisy(len(kept), who, seed)


def numbered(count: int) -> list[Example]:
    return [example(f"s{place:03d}", value=float(place)) for place in range(count)]


def curve_of(
    says: Any,
    *,
    count: int = 60,
    folds: int = 5,
    repeats: int = 6,
    metric: str = "dice",
    seed: int = 0,
    config: CurveConfig | None = None,
) -> Curve:
    examples = numbered(count)
    strata = strata_of(examples, ())
    plan = plan_folds(strata, count=folds, repeats=repeats, seed=seed)
    task = Counting(says=says)
    config = config or CurveConfig(seed=seed)
    return label_curve(
        answering(task, examples, (), mode="probe"), strata, plan, task=task, metric=metric, config=config
    )


def within(value: Interval, wanted: float) -> bool:
    return value.low is not None and value.high is not None and value.low <= wanted <= value.high


def test_the_exponent_and_the_gain_of_a_known_law_lie_within_their_intervals() -> None:
    curve = curve_of(rising, repeats=10, seed=1)  # how often they do is the next test's
    assert [point.subjects for point in curve.points] == [2, 5, 10, 20, 48]
    for point in curve.points:
        assert point.score.estimate == pytest.approx(truth(point.subjects), abs=0.04)
        assert within(point.score, truth(point.subjects))
    assert curve.rise is not None
    assert (curve.rise.have, curve.rise.then) == (2, 48)
    assert curve.rise.value.estimate == pytest.approx(truth(48) - truth(2), abs=0.02)
    assert curve.law is not None
    assert curve.law.exponent.estimate == pytest.approx(EXPONENT, abs=0.1)
    assert within(curve.law.exponent, EXPONENT)
    assert not curve.law.at_bound
    assert [(gain.have, gain.then) for gain in curve.gains] == [(60, 70), (60, 96)]
    for gain in curve.gains:
        assert within(gain.value, truth(gain.then) - truth(60))
        assert gain.value.low is not None
        assert gain.value.low > 0


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    found = [curve_of(rising, seed=seed, repeats=5, config=CurveConfig(seed=seed, draws=200)) for seed in range(20)]
    exponents = [curve.law is not None and within(curve.law.exponent, EXPONENT) for curve in found]
    gains = [bool(curve.gains) and within(curve.gains[0].value, truth(70) - truth(60)) for curve in found]
    assert sum(exponents) >= 16
    assert sum(gains) >= 16


def test_a_size_at_which_draws_differ_wildly_hardly_bends_the_law() -> None:
    def loud(kept: frozenset[str], who: str, seed: int) -> float:
        wild = float(np.random.default_rng([seed, 9]).normal(0, 0.15)) if len(kept) == 10 else 0.0
        return rising(kept, who, seed) + wild

    found = [curve_of(loud, seed=seed, repeats=5, config=CurveConfig(seed=seed, draws=100)) for seed in range(6)]
    off = [abs(curve.law.exponent.estimate - EXPONENT) for curve in found if curve.law is not None]
    assert len(off) == 6
    assert np.mean(off) < 0.04  # 0.12 if all sizes counted alike


def test_less_of_an_error_is_a_gain() -> None:
    plain = curve_of(rising)
    turned = curve_of(lambda *given: 1.0 - rising(*given), metric="mae")
    assert plain.law is not None
    assert turned.law is not None
    assert turned.law.exponent.estimate == pytest.approx(plain.law.exponent.estimate, rel=1e-6)
    assert turned.law.asymptote == pytest.approx(1 - plain.law.asymptote)
    assert turned.law.drop == pytest.approx(plain.law.drop)
    assert [gain.value.estimate for gain in turned.gains] == pytest.approx(
        [gain.value.estimate for gain in plain.gains]
    )
    assert turned.margin == pytest.approx(0.01 * turned.points[-1].score.estimate)
    assert plain.margin == 0.01


def test_points_equal_loops_over_repeats_folds_and_draws() -> None:
    examples = classed(no=9, yes=6)
    strata = strata_of(examples, ("no", "yes"))
    plan = plan_folds(strata, count=3, repeats=2, seed=0)
    task = Counting(says=lambda kept, who, seed: noisy(len(kept), who, seed, draws=1.0) + len(min(kept)))
    config = CurveConfig(sizes=(3, 5), seed=4)
    answer = answering(task, examples, ("no", "yes"), mode="probe")
    curve = label_curve(answer, strata, plan, task=task, metric="dice", config=config)
    assert [point.subjects for point in curve.points] == [2, 3, 5, 10]
    for point in curve.points:
        by_subject: dict[str, list[float]] = {}
        for repeat, folds in enumerate(plan):
            for fold, held in enumerate(folds.held):
                seed = seed_of(4, repeat, fold)
                kept = frozenset(draw_order(strata, folds.subjects - held, seed)[: point.subjects])
                for who in held:
                    by_subject.setdefault(who, []).append(task.says(kept, who, seed))
        each = [math.fsum(own[repeat] for own in by_subject.values()) / 15 for repeat in range(2)]
        assert point.each == pytest.approx(each)
        plain = bootstrap_interval({who: sum(own) / 2 for who, own in by_subject.items()})
        assert (point.score.estimate, point.score.low, point.score.high) == pytest.approx(
            (plain.estimate, plain.low, plain.high)
        )


def test_nobody_who_is_scored_was_drawn_and_a_larger_draw_holds_the_smaller() -> None:
    asked: dict[tuple[int, frozenset[str]], list[frozenset[str]]] = {}

    def answer(kept: frozenset[str], held: frozenset[str], seed: int) -> dict[str, float]:
        assert not kept & held
        asked.setdefault((seed, held), []).append(kept)
        return dict.fromkeys(held, 0.5)

    strata = strata_of(classed(no=12, yes=12), ())
    plan = plan_folds(strata, count=4, repeats=2, seed=0)
    task, config = Counting(says=lambda *_: 0.5), CurveConfig()
    done: list[int] = []
    advance = lambda amount, **_: done.append(amount)  # noqa: E731
    curve = label_curve(answer, strata, plan, task=task, metric="dice", config=config, advance=advance)
    assert len(asked) == 8
    for draws in asked.values():
        assert [len(draw) for draw in draws] == [point.subjects for point in curve.points] == [2, 5, 10, 18]
        assert all(small < large for small, large in pairwise(draws))
    assert sum(done) == folds_of_curve(strata, plan, config) == 32


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=2), st.integers(0, 40))
def test_classes_take_turns_in_a_draw(by_class: dict[str, int], seed: int) -> None:
    strata = strata_of(classed(**by_class), ())
    order = draw_order(strata, frozenset(strata.kinds), seed)
    assert sorted(order) == sorted(strata.kinds)
    for size in range(len(by_class), len(order) + 1):
        drawn = Counter(next(iter(strata.kinds[who])) for who in order[:size])
        waiting = [drawn[name] for name, count in by_class.items() if drawn[name] < count]
        assert all(drawn.values())
        assert max(drawn.values()) - min(waiting, default=max(drawn.values())) <= 1


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 40))
def test_a_draw_holds_the_share_of_events_that_there_is(events: int, censored: int, seed: int) -> None:
    strata = strata_of(timed(events, censored), ())
    order = draw_order(strata, frozenset(strata.kinds), seed)
    for size in range(1, len(order) + 1):
        drawn = sum(EVENT in strata.kinds[who] for who in order[:size])
        assert drawn >= 1
        assert abs(drawn - size * events / len(order)) <= 1


def test_a_draw_of_things_shows_each_of_them_first() -> None:
    examples = [*(voxels(f"s{place}", 1) for place in range(8)), voxels("t", 2, 3), voxels("u", 3)]
    strata = strata_of(examples, ())
    for seed in range(10):
        order = draw_order(strata, frozenset(strata.kinds), seed)
        shown = [frozenset[str]().union(*(strata.kinds[who] for who in order[:size])) for size in (1, 2, 3)]
        assert shown[2] == {"liver", "spleen", "kidney"}
        assert len(shown[1]) > len(shown[0])


def everything(by_class: dict[str, int], *, count: int) -> tuple[Strata, tuple[Folds, ...]]:
    strata = strata_of(classed(**by_class), ())
    return strata, plan_folds(strata, count=count, repeats=1, seed=0)


def test_sizes_begin_with_one_of_each_class_and_end_with_what_the_folds_leave() -> None:
    assert sizes_of(*everything({"a": 5, "b": 5, "c": 5}, count=5), CurveConfig()) == [3, 5, 10, 12]
    assert sizes_of(*everything({"a": 30, "b": 31}, count=5), CurveConfig()) == [2, 5, 10, 20, 48]
    assert sizes_of(*everything({"a": 30, "b": 31}, count=5), CurveConfig(sizes=())) == [2, 48]
    assert sizes_of(*everything({"a": 2, "b": 2}, count=5), CurveConfig()) == [2]


@pytest.mark.parametrize(
    ("examples", "first"),
    [
        (numbered(9), 2),
        (timed(4, 5), 2),
        ([voxels(f"s{place}", 1, 2) for place in range(9)], 1),
        ([voxels(f"s{place}", 1 + place % 2) for place in range(9)], 2),
    ],
)
def test_the_smallest_size_is_what_a_task_can_learn_from(examples: Sequence[Example], first: int) -> None:
    strata = strata_of(examples, ())
    assert sizes_of(strata, plan_folds(strata, count=3, repeats=2, seed=0), CurveConfig())[0] == first


def test_a_size_that_no_fold_leaves_and_a_plan_of_others_are_refused() -> None:
    strata = strata_of(numbered(3), ())
    pairs = replace(strata, groups=(frozenset(["s000", "s001"]),))
    with pytest.raises(ValueError, match="begins at 2 labelled subjects, and the folds leave 1"):
        sizes_of(pairs, plan_folds(pairs, count=2, repeats=1, seed=0), CurveConfig())
    with pytest.raises(ValueError, match="other subjects"):
        sizes_of(strata_of(numbered(4), ()), plan_folds(strata, count=3, repeats=1, seed=0), CurveConfig())


def test_nothing_is_said_beyond_twice_the_largest_size() -> None:
    curve = curve_of(rising, count=12, folds=3, config=CurveConfig(step=1000))
    assert curve.points[-1].subjects == 8
    assert [gain.then for gain in curve.gains] == [16]
    halves = curve_of(rising, count=21, folds=2, repeats=8)
    assert halves.points[-1].subjects == 10
    assert halves.law is not None
    assert halves.gains == ()
    assert recommend(halves) == "too few to say: the curve ends at half of the 21 labelled subjects"


def test_what_never_rises_is_flat_and_has_no_law() -> None:
    curve = curve_of(lambda kept, who, seed: 0.7 + noisy(len(kept), who, seed, draws=0.002))
    assert curve.flat
    assert curve.law is None
    assert curve.gains == ()
    assert recommend(curve).startswith("the curve is flat: from 2 to 48 labelled subjects dice got better by ")
    assert recommend(curve).endswith("more labels of this kind would buy little")


def test_what_has_levelled_off_has_a_law_and_is_flat_at_its_end() -> None:
    curve = curve_of(lambda kept, who, seed: 0.9 - len(kept) ** -2.0 + noisy(len(kept), who, seed, draws=0.001))
    assert curve.law is not None
    assert not curve.flat
    assert recommend(curve).startswith(
        "the curve is flat: 10 more labelled subjects would improve dice by no more than"
    )


def test_a_rise_that_may_be_chance_has_no_law() -> None:
    curve = curve_of(lambda kept, who, seed: truth(50) + noisy(1, who, seed + len(kept), draws=0.4), repeats=3)
    assert curve.law is None
    assert not curve.flat
    assert curve.why.endswith("which may be chance")
    assert recommend(curve) == f"too few to say: {curve.why}"


def test_one_repeat_and_too_few_sizes_have_no_law_and_say_why() -> None:
    once = curve_of(rising, repeats=1)
    assert once.law is None
    assert once.rise is None
    assert recommend(once) == (
        "too few to say: one repeat does not show how much one draw of subjects differs from another"
    )
    few = curve_of(rising, count=6, folds=3)
    assert [point.subjects for point in few.points] == [2, 4]
    assert recommend(few) == "too few to say: a curve needs 3 sizes at which dice is defined, and there are 2"


def test_sizes_at_which_the_figure_is_undefined_are_shown_and_left_out_of_the_law() -> None:
    curve = curve_of(lambda kept, who, seed: math.nan if len(kept) == 2 else rising(kept, who, seed))
    assert math.isnan(curve.points[0].score.estimate)
    assert curve.rise is not None
    assert (curve.rise.have, curve.rise.then) == (5, 48)
    assert curve.law is not None
    assert curve.facts()["points"][0]["score"]["estimate"] is None


def test_a_curve_of_a_real_classifier_rises_and_is_json() -> None:
    rng = np.random.default_rng(0)
    examples = [
        example(f"s{place:02d}", scan=rng.normal(size=30) + 0.45 * (place % 2), label=("no", "yes")[place % 2])
        for place in range(60)
    ]
    strata = strata_of(examples, ("no", "yes"))
    plan = plan_folds(strata, count=3, repeats=3, seed=0)
    task = Classify(folds=99)
    answer = answering(task, examples, ("no", "yes"), mode="probe")
    config = CurveConfig(draws=100, sizes=(5, 10, 20))
    curve = label_curve(answer, strata, plan, task=task, metric="auroc", config=config)
    assert curve.rise is not None
    assert curve.rise.value.low is not None
    assert curve.rise.value.low > 0
    facts = json.loads(json.dumps(curve.facts(), allow_nan=False))
    assert facts["recommendation"] == recommend(curve)
    assert [point["subjects"] for point in facts["points"]] == [2, 5, 10, 20, 40]


def said(estimate: float, low: float | None, high: float | None, note: str = "") -> Interval:
    return Interval(estimate=estimate, low=low, high=high, subjects=40, note=note)


def read(
    value: Interval, *, far: Interval | None = None, metric: str = "auroc", margin: float = 0.01, then: int = 50
) -> Curve:
    """A curve from 2 to 32 of 40 labelled subjects that promises this gain, and this one of 24 more."""
    point = Point(subjects=2, score=said(0.6, 0.5, 0.7), each=(0.6, 0.6))
    return Curve(
        metric=metric,
        labelled=40,
        repeats=2,
        margin=margin,
        points=(point, replace(point, subjects=32)),
        rise=Gain(have=2, then=32, value=said(0.2, 0.1, 0.3)),
        law=Law(asymptote=0.9, drop=0.5, exponent=said(0.5, 0.3, 0.8), at_bound=False),
        gains=(Gain(have=40, then=then, value=value), Gain(have=40, then=64, value=far or value)),
    )


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        (
            read(said(0.03, 0.01, 0.06)),
            "by this curve 10 more labelled subjects would improve auroc by 0.030 [0.010, 0.060]",
        ),
        (
            read(said(0.03, 0.01, 0.06), then=44),
            "by this curve 4 more labelled subjects would improve auroc by 0.030 [0.010, 0.060]",
        ),
        (
            read(said(1.234, 0.5, 2.0), metric="mae", margin=0.3),
            "by this curve 10 more labelled subjects would improve mae by 1.23 [0.5, 2]",
        ),
        (
            read(said(0.002, 0.0, 0.004)),
            "the curve is flat: 10 more labelled subjects would improve auroc by no more than 0.004: "
            "more labels of this kind would buy little",
        ),
        (
            read(said(0.03, 0.0, 0.09)),
            "too few to say: by this curve 10 more labelled subjects would improve auroc by 0.030 [0.000, 0.090]",
        ),
        (
            read(said(0.006, 0.001, 0.02)),
            "too few to say: by this curve 24 more labelled subjects would improve auroc by 0.006 [0.001, 0.020]",
        ),
        (
            read(said(0.002, 0.001, 0.003), far=said(0.02, 0.012, 0.03)),
            "by this curve 24 more labelled subjects would improve auroc by 0.020 [0.012, 0.030]",
        ),
        (
            read(said(0.03, None, None, "undefined in most resamples, no interval")),
            "too few to say: by this curve 10 more labelled subjects would improve auroc by "
            "0.030 (undefined in most resamples, no interval)",
        ),
        (
            replace(read(said(0.0, 0.0, 0.0)), gains=()),
            "too few to say: the curve ends at half of the 40 labelled subjects",
        ),
        (
            replace(read(said(0.0, 0.0, 0.0)), law=None, gains=(), why="a curve needs 3 sizes"),
            "too few to say: a curve needs 3 sizes",
        ),
        (
            replace(
                read(said(0.0, 0.0, 0.0)),
                flat=True,
                law=None,
                gains=(),
                rise=Gain(have=2, then=32, value=said(0.001, -0.0004, 0.006)),
            ),
            "the curve is flat: from 2 to 32 labelled subjects auroc got better by 0.001 [0.000, 0.006]: "
            "more labels of this kind would buy little",
        ),
        (
            replace(
                read(said(0.0, 0.0, 0.0)),
                flat=True,
                law=None,
                gains=(),
                rise=Gain(have=2, then=32, value=said(-0.05, -0.08, -0.02)),
            ),
            "the curve falls: from 2 to 32 labelled subjects auroc got better by -0.050 [-0.080, -0.020]: "
            "more labels of this kind would buy little",
        ),
        # Nothing went wrong at any size: neither the rise nor the last figure says how rare errors are.
        (
            replace(
                read(said(0.0, 0.0, 0.0)),
                points=(Point(subjects=32, score=said(1.0, 1.0, 1.0), each=(1.0, 1.0)),),
                flat=True,
                law=None,
                gains=(),
                rise=Gain(have=2, then=32, value=said(0.0, 0.0, 0.0)),
            ),
            "too few to say: by auroc no error was seen among 40 subjects, and an interval without width does not say "
            "how rare errors are: more labels or more test subjects would tell",
        ),
        # Nothing more can go right at the last size, and a size of which nothing is known says nothing either.
        (
            replace(
                read(said(0.002, 0.0, 0.004)),
                points=(
                    Point(subjects=31, score=said(1.0, 1.0, 1.0), each=(1.0, 1.0)),
                    Point(subjects=32, score=said(math.nan, None, None, "undefined"), each=(math.nan, math.nan)),
                ),
            ),
            "too few to say: by auroc no error was seen among 40 subjects, and an interval without width does not say "
            "how rare errors are: more labels or more test subjects would tell",
        ),
        # A head that says the same at all sizes.
        (
            replace(
                read(said(0.0, 0.0, 0.0)),
                flat=True,
                law=None,
                gains=(),
                rise=Gain(have=2, then=32, value=said(0.0, 0.0, 0.0)),
            ),
            "too few to say: all resamples of 40 subjects say from 2 to 32 labelled subjects auroc got better by "
            "0.000 [0.000, 0.000], and an interval without width does not say how rare errors are: more labels or "
            "more test subjects would tell",
        ),
    ],
)
def test_what_is_recommended_word_by_word(curve: Curve, words: str) -> None:
    assert recommend(curve) == words


@pytest.mark.parametrize(
    "settings", [{"sizes": (0, 2)}, {"step": 0}, {"margin": 0.0}, {"draws": 99}, {"level": 1.0}, {"margin": math.nan}]
)
def test_settings_without_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CurveConfig(**settings)


def test_what_begins_to_rise_late_is_not_carried_on() -> None:
    def late(kept: frozenset[str], who: str, seed: int) -> float:
        return 0.5 + 0.2 * (len(kept) > 20) + noisy(len(kept), who, seed, draws=0.002)

    curve = curve_of(late)
    assert curve.law is None
    assert curve.gains == ()
    assert recommend(curve) == (
        "too few to say: from 20 to 48 labelled subjects dice rose faster than a power law can; "
        "label more and draw the curve again"
    )
