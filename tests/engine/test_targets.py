from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from tests.engine.brains import filled, key_of, scan

from voxelstem.engine.targets import Facts, blank_targets, number_of, read_facts
from voxelstem.errors import StoreError
from voxelstem.store import Store
from voxelstem.views.pair import PairConfig

ALL = PairConfig(same_session=0.5, other_session=0.25, any_scan=0.25)


def volumes(thalamus: object, ventricles: object, icv: object = 1_500_000) -> dict[str, str]:
    told = {"thalamus": thalamus, "ventricles": ventricles, "total intracranial": icv}
    return {f"volume:{name}": str(value) for name, value in told.items() if value is not None}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    first = {"session": "01", "date": "2020-01-01", "age": 60.0, "labels": volumes(15_000, 30_000)}
    second = {"session": "02", "date": "2022-01-01", "age": 62.0, "labels": volumes(14_000, 36_000)}
    return filled(
        tmp_path_factory.mktemp("targets") / "store",
        [
            scan("a", "T1w", **first),
            scan("a", "T2w", session="01", date="2020-01-01", age=60.0),
            scan("a", "T1w", **second),
            scan("b", "FLAIR", age=90.0, labels=volumes(12_000, "nan", 1_200_000) | {"pathology": "yes"}),
            scan("b", "T1w", session="02", age=89.0, labels=volumes("none", -4, 0) | {"pathology": "no"}),
            scan("c", "MP2RAGE", labels={"pathology": "perhaps"}),
            scan("c", "", session="02"),
        ],
    )


def facts(store: Store, config: PairConfig = ALL) -> Facts:
    return read_facts(store, {record.key for record in store}, config)


def test_partners_of_each_kind_are_the_subject_s_own(store: Store):
    found = facts(store)
    t1, t2, later = key_of(store, "T1w", who="a"), key_of(store, "T2w"), key_of(store, "T1w", "02", who="a")
    assert found.partners(t1, "same_session") == [t2]
    assert found.partners(t1, "other_session") == [later]
    assert found.partners(t1, "any_scan") == sorted([t2, later])
    assert found.partners(t2, "other_session") == []
    # Nobody knows the contrast of the second: it is no repetition of the first.
    assert found.partners(key_of(store, "MP2RAGE"), "other_session") == []
    assert found.relatives(t1) == {t2, later}


def test_scans_without_a_session_s_name_belong_together_by_day(tmp_path: Path):
    store = filled(
        tmp_path / "store",
        [
            scan("a", contrast, session="", date=date)
            for contrast, date in (("T1w", "2020-01-01"), ("T2w", "2020-01-01"), ("FLAIR", "2020-01-02"))
        ],
    )
    found = facts(store)
    assert found.partners(key_of(store, "T1w", ""), "same_session") == [key_of(store, "T2w", "")]


def test_candidates_come_once_each_and_those_of_the_drawn_kind_first(store: Store):
    found = facts(store)
    t1, t2, later = key_of(store, "T1w", who="a"), key_of(store, "T2w"), key_of(store, "T1w", "02", who="a")
    orders = {tuple(found.draw(t1, np.random.default_rng(seed))) for seed in range(40)}
    assert orders == {(t2, later), (later, t2)}
    only = facts(store, PairConfig(same_session=0.0, other_session=1.0))
    assert list(only.draw(t1, np.random.default_rng(0))) == [later]


def test_targets_say_what_is_known_of_both_scans(store: Store):
    found = facts(store)
    t1, t2, later = key_of(store, "T1w", who="a"), key_of(store, "T2w"), key_of(store, "T1w", "02", who="a")
    told = found.targets(t1, later)
    assert {name: value.dtype for name, value in told.items()} == dict.fromkeys(told, np.dtype(np.float32))
    assert told["copy"] == [0.0]
    assert told["same_session"] == [0.0]
    assert told["years"][0] == pytest.approx(731 / 365.25, abs=1e-5)
    assert found.targets(later, t1)["years"][0] == pytest.approx(-731 / 365.25, abs=1e-5)
    assert told["age"].tolist() == [60.0, 62.0]
    assert found.targets(t1, t2)["contrast"].tolist() == [0.0, 1.0]
    assert found.targets(t1, t2)["same_session"] == [1.0]
    assert found.targets(t1, t2)["years"] == [0.0]


def test_a_subject_s_scans_share_a_number_that_no_process_draws_anew(store: Store):
    found = facts(store)
    numbers = {scan.key: float(found.targets(scan.key, scan.key)["subject"][0]) for scan in found.scans}
    of_each = {
        scan.subject: {numbers[each.key] for each in found.scans if each.subject == scan.subject}
        for scan in found.scans
    }
    assert all(len(shared) == 1 for shared in of_each.values())
    assert len(set(numbers.values())) == len(of_each) > 1
    # The polynomial of Ethernet, zip and PNG: the check value of all its tables.
    assert number_of("123456789") == 0xCBF43926 % 2**24
    assert all(number_of(f"s{at:024x}") == np.float32(number_of(f"s{at:024x}")) < 2**24 for at in range(200))


def test_a_copy_is_marked(store: Store):
    told = facts(store).targets(key_of(store, "FLAIR"), key_of(store, "FLAIR"))
    assert (told["copy"], told["same_session"], told["years"]) == ([1.0], [1.0], [0.0])


def test_what_nobody_knows_is_nan(store: Store):
    found = facts(store)
    told = found.targets(key_of(store, "MP2RAGE"), key_of(store, "", "02"))
    assert np.isnan(told["age"]).all()
    assert np.isnan(told["years"]).all()
    assert np.isnan(told["pathology"]).all()
    assert told["contrast"][0] == 9.0
    assert math.isnan(told["contrast"][1])
    # 90 stands for everybody over 89: no interval can be told.
    older = found.targets(key_of(store, "T1w", "02", who="b"), key_of(store, "FLAIR"))
    assert np.isnan(older["years"]).all()
    assert older["pathology"] == [0.0]


def test_volumes_are_shares_of_the_skull_s_standardised_by_column_and_a_session_s_contrasts_share_them(store: Store):
    found = facts(store)
    assert found.columns == ("thalamus", "ventricles")
    t1, t2, later = key_of(store, "T1w", who="a"), key_of(store, "T2w"), key_of(store, "T1w", "02", who="a")
    # By hand: the first session counts twice (T1w, T2w), the second once, subject b's FLAIR once.
    shares = np.array([[0.01, 0.02], [0.01, 0.02], [14 / 1500, 0.024], [0.01, np.nan]])
    mean, std = np.nanmean(shares, axis=0), np.nanstd(shares, axis=0)
    for row, key in zip(shares, (t1, t2, later, key_of(store, "FLAIR")), strict=True):
        np.testing.assert_allclose(found.targets(key)["volumes"], (row - mean) / std, rtol=1e-5)
    np.testing.assert_array_equal(found.targets(t1, later)["volumes_other"], found.targets(later)["volumes"])
    # Without a usable volume inside the skull there is none of anything.
    assert np.isnan(found.targets(key_of(store, "T1w", "02", who="b"))["volumes"]).all()


def test_volumes_can_be_each_scan_s_own_or_the_subject_s_first(store: Store):
    t1, t2, later = key_of(store, "T1w", who="a"), key_of(store, "T2w"), key_of(store, "T1w", "02", who="a")
    own = facts(store, PairConfig(volumes_of="scan"))
    assert np.isnan(own.targets(t2)["volumes"]).all()
    assert not np.isnan(own.targets(t1)["volumes"]).any()
    plain = facts(store, PairConfig(volumes_of="scan", standardise=False))
    np.testing.assert_allclose(plain.volumes, own.volumes * own.std + own.mean, rtol=1e-5)
    assert 0 < np.nanmin(plain.volumes) < np.nanmax(plain.volumes) < 1
    first = facts(store, PairConfig(volumes_of="subject"))
    np.testing.assert_array_equal(first.targets(later)["volumes"], first.targets(t1)["volumes"])


def test_what_is_missing_is_counted(store: Store):
    found = facts(store)
    told = found.note()["targets"]
    assert told["scans"] == 7
    assert told["subjects"] == 3
    assert told["without_contrast"] == 1
    assert told["contrasts_without_index"] == {}
    assert told["without_age"] == 2
    assert told["without_date"] == 4
    assert told["without_pathology"] == 5
    assert told["without_volumes"] == 3
    assert told["unreadable_volumes"] == 3
    assert told["without_partner"] == 0
    few = facts(store, PairConfig(contrasts=("T1w",))).note()["targets"]
    assert few["contrasts_without_index"] == {"flair": 1, "mp2rage": 1, "t2w": 1}
    assert few["without_partner"] == 5
    assert set(found.note()["volumes_mean_std"]) == {"thalamus", "ventricles"}


def test_neither_the_order_of_labels_nor_that_of_scans_moves_a_column(tmp_path: Path, store: Store):
    studies = [scan("a", labels=volumes(15_000, 30_000)), scan("b", labels=volumes(14_000, 33_000))]
    turned = [scan("b", labels=dict(reversed(volumes(14_000, 33_000).items()))), studies[0]]
    one, other = (filled(tmp_path / name, each) for name, each in (("one", studies), ("other", turned)))
    config = PairConfig(same_session=0.0)
    for record in one:
        first, second = (facts(each, config).targets(record.key) for each in (one, other))
        np.testing.assert_array_equal(first["volumes"], second["volumes"])


def test_a_column_that_does_not_vary_has_no_scale(tmp_path: Path):
    store = filled(
        tmp_path / "store", [scan("a", labels=volumes(15_000, 30_000)), scan("b", labels=volumes(15_000, 1))]
    )
    found = facts(store, PairConfig(same_session=0.0))
    for record in store:
        told = found.targets(record.key)["volumes"]
        assert math.isnan(told[0])
        assert abs(told[1]) == pytest.approx(1.0)


def test_named_structures_decide_the_columns_and_must_be_there(store: Store):
    found = facts(store, PairConfig(structures=("ventricles",)))
    assert found.columns == ("ventricles",)
    with pytest.raises(StoreError, match="thalamsu") as caught:
        facts(store, PairConfig(structures=("thalamsu",)))
    assert "thalamus" in str(caught.value.hint)


def test_volumes_that_nothing_divides_are_refused_or_taken_as_they_are(tmp_path: Path):
    store = filled(tmp_path / "store", [scan("a", labels=volumes(5, 6, None)), scan("b", labels=volumes(7, 8, None))])
    with pytest.raises(StoreError, match="total intracranial"):
        facts(store, PairConfig(same_session=0.0))
    plain = facts(store, PairConfig(same_session=0.0, icv=""))
    assert sorted(plain.targets(record.key)["volumes"][0] for record in store) == [-1.0, 1.0]


def test_without_volumes_there_is_no_such_target(tmp_path: Path):
    store = filled(tmp_path / "store", [scan("a", "T1w"), scan("a", "T2w")])
    found = facts(store)
    assert not any(name.startswith("volumes") for name in found.targets(key_of(store, "T1w")))
    assert found.note()["targets"]["without_volumes"] == 2


def test_one_contrast_only_gives_no_pair_and_is_an_error_that_says_so(tmp_path: Path):
    store = filled(tmp_path / "store", [scan("a", "T1w"), scan("b", "T1w"), scan("b", "T1w", session="02")])
    with pytest.raises(StoreError, match=r"none of the 3 training scans has a partner \(same_session\).*t1w"):
        facts(store, PairConfig())
    assert facts(store, PairConfig(same_session=0.0, other_session=1.0)).note()["targets"]["without_partner"] == 1


def test_alone_a_scan_has_targets_of_its_own(store: Store):
    told = facts(store, PairConfig(same_session=0.0)).targets(key_of(store, "FLAIR"))
    assert sorted(told) == ["age", "contrast", "pathology", "subject", "volumes"]
    assert told["contrast"].shape == told["age"].shape == (1,)


def test_blank_targets_have_the_names_and_widths_of_real_ones(store: Store):
    for config in (
        PairConfig(structures=("thalamus", "ventricles")),
        PairConfig(same_session=0, structures=("thalamus",)),
    ):
        key = key_of(store, "T2w")
        real = facts(store, config).targets(key, *[key] * config.paired)
        blank = blank_targets(config, 3)
        assert {name: value.shape for name, value in blank.items()} == {
            name: (3, *value.shape) for name, value in real.items()
        }


def test_facts_travel_to_other_processes(store: Store):
    found = facts(store)
    there = pickle.loads(pickle.dumps(found))
    key = key_of(store, "T2w")
    np.testing.assert_array_equal(there.targets(key)["volumes"], found.targets(key)["volumes"])


def test_blank_volumes_are_as_many_as_the_objective_learns_where_nothing_is_named():
    assert blank_targets(PairConfig(), 2, 6)["volumes_other"].shape == (2, 6)
    assert "volumes" not in blank_targets(PairConfig(), 2)
