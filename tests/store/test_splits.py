from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelstem.store.splits import SPLITS, Fractions, folds, split_of


def test_shares_are_met_on_average():
    splits = [split_of(f"s{number:024x}") for number in range(4000)]
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.03)


@given(st.text(), st.sampled_from([0.0, 0.1, 0.4]))
def test_a_larger_train_share_takes_nobody_out_of_train(subject, more):
    before = Fractions(train=0.5, validation=0.1, test=0.4)
    after = Fractions(train=0.5 + more, validation=0.1, test=0.4 - more)
    if split_of(subject, before) == "train":
        assert split_of(subject, after) == "train"


def test_a_split_of_share_zero_or_one_is_empty_or_everything():
    everyone = [f"s{number}" for number in range(500)]
    assert {split_of(subject, Fractions(train=0.0, validation=0.0, test=1.0)) for subject in everyone} == {"test"}
    assert "validation" not in {split_of(s, Fractions(train=0.5, validation=0.0, test=0.5)) for s in everyone}


def test_a_known_subject_stays_where_it_was_in_every_version():
    subjects = ["s000000000000000000000000", "s000000000000000000000001", "s000000000000000000000002", "sabc"]
    assert [split_of(subject) for subject in subjects] == ["train", "validation", "train", "test"]


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (1.2, -0.2, 0.0), (0.0, 0.0, 0.0)])
def test_shares_that_make_no_sense_are_refused(shares):
    with pytest.raises(ValueError, match="add up to 1"):
        Fractions(train=shares[0], validation=shares[1], test=shares[2])


@given(count=st.integers(2, 6), more=st.integers(0, 30), seed=st.integers(0, 3))
def test_folds_hold_everybody_out_once_and_are_of_nearly_equal_size(count: int, more: int, seed: int) -> None:
    subjects = [f"s{index}" for index in range(count + more)]
    found = folds(subjects, count, seed=seed)
    assert sorted(subject for fold in found for subject in fold) == sorted(subjects)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert folds(subjects[::-1], count, seed=seed) == found


def test_other_seeds_make_other_folds_and_too_few_subjects_none() -> None:
    subjects = [f"s{index}" for index in range(20)]
    assert folds(subjects, 5, seed=0) != folds(subjects, 5, seed=1)
    with pytest.raises(ValueError, match="a subject for each"):
        folds(subjects[:2], 3)
