from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.certainty.turns import check_kinds, show_both, show_classes, spread_events, take_turns
from voxelstem.errors import AuditError, ConfigError
from voxelstem.study import Survival

CLASSES = ("cyst", "stone", "gas")


def test_classestake_turns_even_when_one_runs_out() -> None:
    labels = {"a": "x", "b": "x", "c": "x", "d": "y"}
    assert take_turns(["a", "b", "c", "d"], labels) == ["a", "d", "b", "c"]


def test_a_class_that_is_nobody_s_here_is_refused_and_one_of_a_single_subject_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = {"a": "no", "b": "no", "c": "yes", "d": "yess", "e": "yes"}
    with pytest.raises(AuditError, match="no labelled training subject is 'yess', and 1 of the other splits is") as met:
        show_classes("abc", labels, ("no", "yes", "yess"), None, "training")
    assert "slip" in str(met.value.hint)
    assert show_classes("abc", labels, ("no", "yes"), None, "training") == ["a", "c", "b"]
    assert not caplog.records or "'yes'" in caplog.text
    caplog.clear()
    assert show_classes("abcde", labels, ("no", "yes", "yess"), None, "training") == ["a", "c", "d", "b", "e"]
    assert caplog.messages == ["of 5 labelled training subjects one alone is 'yess': is it a slip?"]
    with pytest.raises(ConfigError, match="budget 2 cannot show each of 3 classes once"):
        show_classes("abcde", labels, ("no", "yes", "yess"), 2, "training")
    with pytest.raises(AuditError, match="all 2 labelled training subjects have the same label, 'no'"):
        show_classes("ab", labels, ("no",), None, "training")


def made_up(count: int, seed: int) -> dict[str, dict[str, bool]]:
    """Of rarer and rarer classes, a quarter not known; both kinds of each are there."""
    rng = np.random.default_rng(seed)
    told = {
        f"s{place:02d}": {
            name: bool(rng.random() < share)
            for name, share in zip(CLASSES, (0.5, 0.2, 0.05), strict=True)
            if rng.random() < 0.75
        }
        for place in range(count)
    }
    return told | {"all": dict.fromkeys(CLASSES, True), "none": dict.fromkeys(CLASSES, False)}


@given(st.integers(4, 30), st.integers(0, 99))
def test_the_first_few_show_every_class_both_ways_and_larger_draws_hold_smaller_ones(count: int, seed: int) -> None:
    told = made_up(count, seed)
    order = sorted(told)
    turns = show_both(order, told, CLASSES, len(order), "training")
    assert sorted(turns) == order
    # Nobody could do with fewer than two; with six there is one for each kind of each class.
    shown = {(name, kind) for subject in turns[: 2 * len(CLASSES)] for name, kind in told[subject].items()}
    assert shown == {(name, kind) for name in CLASSES for kind in (True, False)}
    for budget in range(6, len(order)):
        assert show_both(order, told, CLASSES, budget, "training")[:budget] == turns[:budget]
    assert show_both(order, told, CLASSES, None, "training") == order


def test_a_budget_that_leaves_a_kind_unseen_names_the_class() -> None:
    told = {"a": {"cyst": True}, "b": {"cyst": False}, "c": {"stone": True}, "d": {"stone": False}}
    with pytest.raises(ConfigError, match=r"budget 3 cannot .* of '(cyst|stone)' it does not"):
        show_both("abcd", told, ("cyst", "stone"), 3, "training")
    assert show_both("abcd", told, ("cyst", "stone"), 4, "training")


def test_of_findings_that_are_calibrated_one_class_with_both_kinds_is_enough() -> None:
    check_kinds([{"a": True, "b": True}, {"a": False, "b": True}], ["a", "b"], "validation")
    with pytest.raises(AuditError, match="of every class all 2 labelled validation subjects say the same"):
        check_kinds([{"a": True}, {"b": True}], ["a", "b"], "validation")


def test_events_and_censored_come_by_their_shares() -> None:
    told = {f"s{n}": Survival(time=1.0 + n, event=n < 3) for n in range(9)}
    turns = spread_events(sorted(told), told, None, "training")
    assert [sum(told[subject].event for subject in turns[:size]) for size in (3, 6, 9)] == [1, 2, 3]
