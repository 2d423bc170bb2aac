from __future__ import annotations

import numpy as np
import pytest

from voxelstem.sources.told import HEALTHY, ILL, Told, acquisition, age, health, tell
from voxelstem.study import Acquisition, Provenance, Study, Volume


def study() -> Study:
    volume = Volume(
        array=np.zeros((1, 2, 2, 2), np.float32),
        affine_ras=np.eye(4),
        modality="MR",
        provenance=Provenance(source_format="nifti", sha256="0" * 64, orientation="RAS"),
        acquisition=Acquisition(date="2020-02-02", contrast="T2w", age_years=50.0),
    )
    return Study(subject="folder", volumes=(volume,), labels={"lesion": "yes"})


def test_what_the_table_says_wins_and_what_it_does_not_say_stays():
    told = Told(subject="set/1", acquisition=Acquisition(contrast="T1w", session="2"), labels={"pathology": "no"})
    found = tell(study(), told)
    assert (found.subject, found.labels) == ("set/1", {"lesion": "yes", "pathology": "no"})
    assert found.volumes[0].acquisition == Acquisition(date="2020-02-02", contrast="T1w", age_years=50.0, session="2")


def test_nothing_told_changes_nothing():
    one = study()
    assert tell(one, None) is one


def test_scans_of_a_session_share_its_study_and_no_other_session_s():
    facts = Acquisition(sex="F")
    one, other = (acquisition(("set", "1"), "ses-2", name=name, facts=facts) for name in ("t1", "t2"))
    assert one.study == other.study
    assert one.group != other.group
    assert (one.session, one.sex) == ("2", "F")
    assert acquisition(("set", "1"), "ses-3", name="t1", facts=facts).study != one.study
    assert acquisition(("other", "1"), "ses-2", name="t1", facts=facts).study != one.study


@pytest.mark.parametrize("word", ["", None, "n/a", "group 1", "unknown", 3])
def test_a_group_that_may_mean_anything_says_nothing_of_health(word):
    assert health(word) == {}


def test_no_word_means_both():
    assert not set(HEALTHY) & set(ILL)
    assert health(" Nondemented ") == {"pathology": "no"}


@pytest.mark.parametrize(("told", "years"), [("6 months", 0.5), (44, 44.0), (-1, None), ("200", None), ([3], None)])
def test_ages_that_are_none_are_not_known(told, years):
    assert age(told) == years
