from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold
from tests.madeup import classed, example, timed, voxels

from voxelstem.certainty.folds import EVENT, NO_EVENT, Folds, Strata, asked_folds, draw_folds, plan_folds, strata_of
from voxelstem.study import Survival

counts = st.dictionaries(st.sampled_from("abcd"), st.integers(2, 14), min_size=2)


def shown(strata: Strata, folds: Folds) -> list[Counter[str]]:
    return [Counter(kind for subject in fold for kind in strata.kinds[subject]) for fold in folds.held]


@given(counts, st.integers(2, 8), st.integers(0, 50))
def test_everybody_is_held_out_once_and_classes_are_shared_out_evenly(
    by_class: dict[str, int], count: int, seed: int
) -> None:
    strata = strata_of(classed(**by_class), tuple(sorted(by_class)))
    folds = draw_folds(strata, count=count, seed=seed)
    assert sorted(subject for fold in folds.held for subject in fold) == sorted(strata.kinds)
    assert len(folds.held) == min(count, *by_class.values())
    for name in by_class:
        shares = [tally[name] for tally in shown(strata, folds)]
        assert max(shares) - min(shares) <= 1
        assert min(shares) >= 1
    sizes = [len(fold) for fold in folds.held]
    assert max(sizes) - min(sizes) <= 1


@given(counts, st.integers(2, 5))
def test_classes_are_shared_out_as_by_scikit_learn(by_class: dict[str, int], count: int) -> None:
    strata = strata_of(classed(**by_class), ())
    folds = draw_folds(strata, count=count, seed=0)
    labels = np.array([next(iter(kinds)) for kinds in strata.kinds.values()])
    theirs = [Counter(labels[held].tolist()) for _, held in StratifiedKFold(len(folds.held)).split(labels, labels)]
    for name in by_class:
        assert sorted(tally[name] for tally in shown(strata, folds)) == sorted(tally[name] for tally in theirs)


def test_classes_stay_even_where_joined_subjects_make_one_fold_larger() -> None:
    strata = strata_of(classed(no=8, yes=8), ())
    no = [subject for subject, own in strata.kinds.items() if own == {"no"}]
    for seed in range(5):
        folds = draw_folds(replace(strata, groups=(frozenset(no[:6]),)), count=2, seed=seed)
        assert sorted(tally["no"] for tally in shown(strata, folds)) == [2, 6]
        assert [tally["yes"] for tally in shown(strata, folds)] == [4, 4]


people = st.integers(0, 11)


@given(st.lists(st.sets(people, min_size=1, max_size=3), max_size=5), st.integers(2, 4), st.integers(0, 20))
def test_subjects_who_are_one_are_never_parted(joined: list[set[int]], count: int, seed: int) -> None:
    examples = [example(f"s{place}", value=1.0) for place in range(12)]
    strata = strata_of(examples, (), together=[[f"s{place}" for place in one] for one in joined])
    # The slow way: who can be reached from whom, step by step.
    near = {place: {place}.union(*(one for one in joined if place in one)) for place in range(12)}
    for _ in range(12):
        near = {place: set().union(*(near[other] for other in own)) for place, own in near.items()}
    wanted = {frozenset(f"s{place}" for place in own) for own in near.values()}
    assert set(strata.units) == wanted
    if len(wanted) < 2:
        with pytest.raises(ValueError, match="two folds are the least"):
            draw_folds(strata, count=count, seed=seed)
        return
    folds = draw_folds(strata, count=count, seed=seed)
    assert all(sum(bool(unit & fold) for fold in folds.held) == 1 for unit in wanted)


def test_subjects_who_share_a_scan_are_one_and_so_is_whoever_is_one_with_them() -> None:
    examples = [example("a", key="x"), example("b", key="x"), example("b", key="y"), example("c"), example("d")]
    strata = strata_of(examples, (), together=[("b", "c"), ("c", "somebody without a label")])
    assert strata.groups == (frozenset("abc"),)
    assert strata.units == [frozenset("abc"), frozenset("d")]


@given(st.integers(2, 9), st.integers(0, 20), st.integers(2, 6), st.integers(0, 9))
def test_every_fold_has_an_event(events: int, censored: int, count: int, seed: int) -> None:
    strata = strata_of(timed(events, censored), ())
    folds = draw_folds(strata, count=count, seed=seed)
    assert len(folds.held) == min(count, events)
    for kind in (EVENT, NO_EVENT):
        shares = [tally[kind] for tally in shown(strata, folds)]
        assert max(shares) - min(shares) <= 1
    assert min(tally[EVENT] for tally in shown(strata, folds)) >= 1


def test_an_event_at_time_0_is_none_that_can_be_learned_from() -> None:
    examples = [*timed(2, 2), example("at once", survival=Survival(time=0.0, event=True))]
    strata = strata_of(examples, ())
    assert strata.kinds["at once"] == {NO_EVENT}
    assert strata.needed == {EVENT: 2}


def test_things_of_which_subjects_show_several_are_spread() -> None:
    rng = np.random.default_rng(0)
    names = ("liver", "spleen", "kidney", "cyst")
    kinds = {
        f"s{place:02d}": frozenset(name for name, share in zip(names, (0.9, 0.5, 0.3, 0.1), strict=True) if row < share)
        for place, row in enumerate(rng.random(60))
    }
    strata = Strata(rule="things", kinds=kinds)
    order = rng.permutation(60)

    def spread(folds: list[list[str]]) -> float:
        tallies = [Counter(kind for subject in fold for kind in kinds[subject]) for fold in folds]
        return sum(float(np.std([tally[name] for tally in tallies])) for name in names)

    blind = spread([[f"s{place:02d}" for place in part] for part in np.array_split(order, 5)])
    ours = spread([list(fold) for fold in draw_folds(strata, count=5, seed=0).held])
    assert ours < blind / 2
    assert max(len(fold) for fold in draw_folds(strata, count=5, seed=0).held) <= 13


def test_voxel_labels_count_by_what_is_there_and_asked_for() -> None:
    strata = strata_of([voxels("a", 1, 3), voxels("b", 1, 1), voxels("c")], ("liver", "kidney"))
    assert strata.rule == "things"
    assert strata.kinds == {"a": {"liver", "kidney"}, "b": {"liver"}, "c": frozenset()}
    assert strata_of([voxels("a", 1, 2)], ()).kinds == {"a": {"liver", "spleen"}}


def test_findings_count_by_yes_and_no_and_what_nobody_knows_counts_nothing() -> None:
    strata = strata_of([example("a", findings={"cyst": True, "stone": False}), example("b", findings={})], ())
    assert strata.kinds == {"a": {"cyst: yes", "stone: no"}, "b": frozenset()}


def test_folds_depend_on_seed_and_repeat_and_not_on_the_order_of_scans() -> None:
    examples = classed(no=12, yes=9)
    strata = strata_of(examples, ())
    assert draw_folds(strata, count=3, seed=1) == draw_folds(strata_of(examples[::-1], ()), count=3, seed=1)
    plan = plan_folds(strata, count=3, repeats=4, seed=1)
    assert plan[2] == draw_folds(strata, count=3, seed=1, repeat=2)
    assert len({folds.held for folds in (*plan, draw_folds(strata, count=3, seed=2))}) == 5


def test_too_few_of_a_class_are_counted_for_the_reader() -> None:
    strata = strata_of(classed(benign=9, malignant=1), ())
    with pytest.raises(
        ValueError, match="two folds are the least: 5 planned, 10 subjects, 9 of 'benign', 1 of 'malignant'"
    ):
        draw_folds(strata, count=5, seed=0)
    with pytest.raises(ValueError, match="1 planned, 8 subjects, 4 of 'no', 4 of 'yes'"):
        draw_folds(strata_of(classed(no=4, yes=4), ()), count=1, seed=0)
    with pytest.raises(ValueError, match="5 planned, 4 subjects, 1 of 'event'"):
        draw_folds(strata_of(timed(1, 3), ()), count=5, seed=0)


def test_copies_of_one_scan_do_not_make_a_class_larger() -> None:
    examples = [*classed(no=6), *(example(f"y{place}", key="the same", label="yes") for place in range(4))]
    with pytest.raises(ValueError, match="1 of 'yes'"):
        draw_folds(strata_of(examples, ()), count=2, seed=0)


def test_a_class_that_joined_subjects_of_others_bring_into_one_fold_is_refused() -> None:
    kinds = {name: frozenset(kind) for name, kind in zip("abcdefg", "xwyxwyx", strict=True)}
    strata = Strata(rule="classes", kinds=kinds, groups=(frozenset("acg"), frozenset("bd"), frozenset("ef")))
    assert strata.needed == {"w": 2, "x": 2, "y": 2}
    outcomes: Counter[str] = Counter()
    for seed in range(40):
        try:
            folds = draw_folds(strata, count=2, seed=seed)
            assert all(kind in tally for kind in "wxy" for tally in shown(strata, folds))
            outcomes["parted"] += 1
        except ValueError as error:
            assert "joined with others of another kind" in str(error)  # noqa: PT017
            outcomes["refused"] += 1
    assert outcomes["refused"]


@settings(max_examples=40)
@given(st.lists(st.sampled_from("xyz"), min_size=4, max_size=9), st.integers(0, 30), st.data())
def test_joined_subjects_of_different_classes_leave_every_class_on_both_sides_or_are_refused(
    labels: list[str], seed: int, data: st.DataObject
) -> None:
    examples = [example(f"s{place}", label=label) for place, label in enumerate(labels)]
    pairs = data.draw(st.lists(st.sets(st.integers(0, len(labels) - 1), min_size=2, max_size=3), max_size=3))
    strata = strata_of(examples, (), together=[[f"s{place}" for place in pair] for pair in pairs])
    try:
        folds = draw_folds(strata, count=3, seed=seed)
    except ValueError as error:
        assert "two folds are the least" in str(error) or "joined with others" in str(error)  # noqa: PT017
        return
    for fold in folds.held:
        assert {kind for s in folds.subjects - fold for kind in strata.kinds[s]} == set(labels)


def test_a_subject_whose_scans_say_different_things_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 labelled subjects"):
        strata_of([example("a", label="no"), example("a", label="yes"), example("b", label="no")], ())
    with pytest.raises(ValueError, match="1 of 2 labelled subjects"):
        strata_of([example("a", label="no"), example("b")], ())


@pytest.mark.parametrize("groups", [(frozenset("ab"), frozenset("bc")), (frozenset("az"),)])
def test_groups_that_overlap_or_name_strangers_are_refused(groups: tuple[frozenset[str], ...]) -> None:
    with pytest.raises(ValueError, match="do not overlap"):
        Strata(rule="numbers", kinds=dict.fromkeys("abc", frozenset()), groups=groups)


@pytest.mark.parametrize("held", [("abc",), ("ab", ""), ("ab", "bc"), ()])
def test_folds_guard_themselves(held: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="nobody is in two of them"):
        Folds(held=tuple(frozenset(part) for part in held))


FEW = st.lists(st.sampled_from([None, False, True]), min_size=3, max_size=3)


@settings(max_examples=60)
@given(st.lists(FEW, min_size=2, max_size=14), st.integers(2, 6), st.integers(0, 9))
def test_of_findings_every_kind_is_learned_whoever_is_held_out_or_it_is_named(
    cells: list[list[bool | None]], count: int, seed: int
) -> None:
    told = [{name: there for name, there in zip("abc", row, strict=True) if there is not None} for row in cells]
    strata = strata_of([example(f"s{place:02d}", findings=one) for place, one in enumerate(told)], ())
    tally = Counter(kind for own in strata.kinds.values() for kind in own)
    alone = sorted(kind for kind, times in tally.items() if times < 2)
    assert strata.needed == tally
    if alone:
        with pytest.raises(ValueError, match=f"1 of '{alone[0]}'"):
            draw_folds(strata, count=count, seed=seed)
        return
    folds = draw_folds(strata, count=count, seed=seed)
    assert len(folds.held) == min(count, len(cells))
    for held in folds.held:
        assert {kind for subject in folds.subjects - held for kind in strata.kinds[subject]} == set(tally)


def test_a_number_of_folds_that_was_asked_for_is_taken_at_its_word() -> None:
    strata = strata_of(classed(no=9, yes=3), ())
    (usual,) = asked_folds(strata, count="auto", told={}, repeats=1, seed=0)
    assert len(usual.held) == 3
    assert asked_folds(strata, count=3, told={}, repeats=2, seed=0) == plan_folds(strata, count=3, repeats=2, seed=0)
    with pytest.raises(ValueError, match="4 folds are asked for, and the labelled subjects, 3 of 'yes', allow 3"):
        asked_folds(strata, count=4, told={}, repeats=1, seed=0)
    few = strata_of([example(f"s{place}", value=1.0) for place in range(4)], ())
    with pytest.raises(ValueError, match="9 folds are asked for, and the labelled subjects, 4, allow 4"):
        asked_folds(few, count=9, told={}, repeats=1, seed=0)


def test_folds_that_the_label_file_tells_are_kept() -> None:
    strata = strata_of(classed(no=6, yes=6), ())
    told = {subject: place % 3 for place, subject in enumerate(sorted(strata.kinds))} | {"somebody else": 0}
    plan = asked_folds(strata, count=2, told=told, repeats=2, seed=0)
    assert plan[0] == plan[1]
    assert [{told[subject] for subject in held} for held in plan[0].held] == [{0}, {1}, {2}]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"a": 0, "b": 1, "c": 0}, "gives 1 of 4 labelled subjects no fold"),
        ({"a": 0, "b": 0, "c": 1, "d": 1}, "all subjects of 'x' are in one fold"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, "all 4 labelled subjects in fold 1"),
    ],
)
def test_folds_of_a_label_file_that_hold_a_class_out_or_leave_somebody_out_are_refused(
    told: dict[str, int], message: str
) -> None:
    strata = strata_of([example(name, label=label) for name, label in zip("abcd", "xxyy", strict=True)], ())
    with pytest.raises(ValueError, match=message):
        asked_folds(strata, count="auto", told=told, repeats=1, seed=0)


def test_subjects_who_share_a_scan_are_in_one_fold_of_a_label_file_or_refused() -> None:
    labels = zip("abcd", "xyxy", strict=True)
    strata = strata_of([example(name, label=label) for name, label in labels], (), together=["ab"])
    assert asked_folds(strata, count="auto", told={"a": 0, "b": 0, "c": 1, "d": 1}, repeats=1, seed=0)
    with pytest.raises(ValueError, match="subjects who share a scan in the folds 0 and 1"):
        asked_folds(strata, count="auto", told={"a": 0, "b": 1, "c": 1, "d": 0}, repeats=1, seed=0)


def test_no_repeat_and_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        plan_folds(strata_of(classed(no=4, yes=4), ()), count=2, repeats=0, seed=0)
    with pytest.raises(ValueError, match="need labelled subjects"):
        strata_of([], ())
