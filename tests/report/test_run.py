from __future__ import annotations

import json

import pytest

from voxelstem.report.run import SIGNS, curves, summary

LINES = [
    {"step": 0, "reader": "blosc2 mmap"},
    {"step": 0, "loss": 3.0, "lr": 0.0, "seconds": 10.0, "effective_rank": 20.0, "probe/patch_knn": 0.25, "kwh": 0.1},
    {"step": 1, "loss": 2.0, "lr": 0.1, "seconds": 12.0},
    {"step": 2, "skipped": "the loss is not a number", "samples": ["3fa277b1"]},
    {"step": 3, "loss": 9.0, "lr": 0.1, "seconds": 14.0},
    {"step": 4, "rolled_back_to": 2, "excluded": [2, 4]},
    {"step": 2, "quarantined": "77b1", "reason": "damaged"},
    {"step": 4, "loss": 1.0, "lr": 0.1, "seconds": 16.0, "energy": "estimated (10 W per busy core)", "kwh": 0.2},
    {"step": 5, "effective_rank": 15.0, "probe/patch_knn": 0.5, "data_wait_share": 0.04},
]


def test_a_summary_counts_what_was_taken_and_names_what_was_not():
    facts = summary(LINES, batch=4)
    assert (facts["steps_taken"], facts["samples"], facts["seconds"]) == (3, 12, 16.0)
    assert facts["samples_per_s"] == 3 * 4 / 16
    assert facts["skipped"] == [{"step": 2, "skipped": "the loss is not a number", "samples": ["3fa277b1"]}]
    assert facts["rolled_back"] == [{"step": 4, "rolled_back_to": 2, "excluded": [2, 4]}]
    assert facts["quarantined"] == [{"step": 2, "quarantined": "77b1", "reason": "damaged"}]
    assert (facts["kwh"], facts["energy"], facts["data_wait_share"]) == (0.2, "estimated (10 W per busy core)", 0.04)
    json.dumps(facts)


def test_signs_are_compared_between_the_first_look_and_the_last():
    signs = summary(LINES)["signs"]
    assert signs["probe/patch_knn"] == {"first": 0.25, "last": 0.5, "difference": 0.25}
    assert signs["effective_rank"]["difference"] == -5.0
    assert list(signs) == [name for name in SIGNS if name in signs]


def test_a_step_that_was_run_again_counts_once_with_its_last_numbers():
    again = [{"step": s, "loss": float(n)} for n, s in enumerate([0, 1, 2, 1, 2, 3])]
    assert [(line["step"], line["loss"]) for line in curves(again)] == [(0, 0), (1, 3), (2, 4), (3, 5)]


def test_what_was_undone_by_a_roll_back_is_on_no_curve():
    assert [line["step"] for line in curves(LINES)] == [0, 1, 4, 5]


def test_seconds_of_all_starts_add_up():
    starts = [1.0, 5.0, 9.0, 2.0, 4.0, 3.0]
    lines = [{"step": n, "loss": 1.0, "seconds": value} for n, value in enumerate(starts)]
    assert summary(lines)["seconds"] == pytest.approx(9.0 + 4.0 + 3.0)


def test_an_empty_journal_has_a_summary():
    facts = summary([])
    assert (facts["steps_taken"], facts["samples_per_s"], facts["signs"], facts["skipped"]) == (0, 0.0, {}, [])
