from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.errors import ConfigError
from voxelstem.store.volumes import Measured, choose, normalise, read_volumes, volumes_of
from voxelstem.study import INTRACRANIAL, LabelMap

HEADER = ("subject", INTRACRANIAL, "left hippocampus", "right hippocampus", "csf")
ROWS = (
    ("sub-07_T1w", "1500000", "3500.5", "3600", "300000"),
    ("sub-09_T1w.nii.gz", "1200000", "3000", "", "250000"),
)
SCORES = (("subject", "csf", "hippocampus+amygdala"), ("sub-07_T1w", "0.9", "0.7"), ("sub-09_T1w", "0.5", "0.5"))


def write(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "volumes.csv", HEADER, *ROWS)


def test_volumes_come_by_name_and_empty_cells_are_not_known(table):
    found = read_volumes([table]).by_scan
    assert set(found) == {"sub-07_T1w", "sub-09_T1w"}
    sizes = found["sub-07_T1w"].volumes
    assert dict(sizes) == {
        INTRACRANIAL: 1.5e6, "left hippocampus": 3500.5, "right hippocampus": 3600.0, "csf": 3e5
    }  # fmt: skip
    assert math.isnan(found["sub-09_T1w"].volumes["right hippocampus"])
    assert "volume:right hippocampus" not in found["sub-09_T1w"].labels()
    assert found["sub-07_T1w"].labels()["volume:left hippocampus"] == "3500.5"


@given(order=st.permutations(range(5)))
@settings(max_examples=20)
def test_the_order_of_columns_changes_nothing(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("columns")
    moved = write(folder / "moved.csv", *[[row[place] for place in order] for row in (HEADER, *ROWS)])
    plain = write(folder / "plain.csv", HEADER, *ROWS)
    first, other = read_volumes([plain]), read_volumes([moved])
    assert {scan: one.labels() for scan, one in first.by_scan.items()} == {
        scan: one.labels() for scan, one in other.by_scan.items()
    }
    assert list(normalise(first.by_scan["sub-07_T1w"].volumes).items()) == list(
        normalise(other.by_scan["sub-07_T1w"].volumes).items()
    )


def naive_score(sizes, scores):
    total = 100.0
    for size in sizes.values():
        if math.isnan(size):
            total -= 8
        if size < 0:
            total -= 6
        if size <= 1:
            total -= 0.25
    whole = sizes.get(INTRACRANIAL, math.nan)
    if math.isnan(whole):
        total -= 10
    elif whole < 0.9e6:
        total -= min(40, (0.9e6 - whole) / 25000)
    elif whole > 2.6e6:
        total -= min(40, (whole - 2.6e6) / 25000)
    else:
        total += 10
    return total + (20 * sum(scores) / len(scores) if scores else 0)


numbers = st.one_of(st.just(math.nan), st.floats(-100, 4e6))


@given(whole=numbers, sizes=st.lists(numbers, max_size=6), scores=st.lists(st.floats(0, 1), max_size=8))
def test_the_score_is_the_published_rule(whole, sizes, scores):
    volumes = {INTRACRANIAL: whole} | {f"part {place}": size for place, size in enumerate(sizes)}
    assert Measured(volumes=volumes, scores=tuple(scores)).score() == pytest.approx(naive_score(volumes, scores))


def test_a_perfect_run_has_130_points():
    assert Measured(volumes={INTRACRANIAL: 1.4e6, "csf": 2e5}, scores=(1.0, 1.0)).score() == 130.0


def test_of_several_runs_the_best_usable_one_is_chosen_and_the_first_of_equals():
    good = Measured(volumes={INTRACRANIAL: 1.4e6, "csf": 3e5}, scores=(0.9,))
    same = Measured(volumes={INTRACRANIAL: 1.5e6, "csf": 4e5}, scores=(0.9,))
    poor = Measured(volumes={INTRACRANIAL: 1.4e6, "csf": math.nan}, scores=(0.9,))
    none = Measured(volumes={INTRACRANIAL: 999.0, "csf": 3e5}, scores=(1.0,))
    assert choose([poor, good, same]) is good
    assert choose([none, poor]) is poor
    assert choose([none]) is None
    assert choose([]) is None


def test_several_tables_give_each_scan_its_best_run_and_count_scans_without_any(tmp_path, table):
    other = write(
        tmp_path / "again.csv",
        HEADER,
        ("sub-07_T1w", "1400000", "", "", "1"),
        ("sub-09_T1w", "1250000", "3100", "3200", "240000"),
        ("sub-11_T1w", "12", "1", "1", "1"),
    )
    found = read_volumes([table, other])
    assert found.by_scan["sub-07_T1w"].volumes[INTRACRANIAL] == 1.5e6
    assert found.by_scan["sub-09_T1w"].volumes[INTRACRANIAL] == 1.25e6
    assert set(found.by_scan) == {"sub-07_T1w", "sub-09_T1w"}
    assert found.unusable == 1


def test_scores_belong_to_their_scan_by_name(tmp_path, table):
    found = read_volumes([table], [write(tmp_path / "qc.csv", *SCORES)]).by_scan
    assert found["sub-07_T1w"].scores == (0.9, 0.7)
    assert found["sub-09_T1w"].scores == (0.5, 0.5)
    with pytest.raises(ConfigError, match="1 tables of volumes and 2 of scores"):
        read_volumes([table], [tmp_path / "qc.csv", tmp_path / "qc.csv"])


SECRET = "mueller_T1w"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([HEADER, (SECRET, "=SUM(B2:B9)", "1", "2", "3")], "row 2: 'total intracranial' is a formula"),
        ([HEADER, (SECRET, "1e6", "12 ml", "2", "3")], "row 2: 'left hippocampus' is no number"),
        ([HEADER, (SECRET, "1e6", "inf", "2", "3")], "row 2: 'left hippocampus' is no number"),
        ([HEADER, ROWS[0], (SECRET, "1e6", "3")], "row 3 has 3 cells, row 1 names 5"),
        ([HEADER, (SECRET, "1e6", "3", "4", "5", "6")], "row 2 has 6 cells, row 1 names 5"),
        ([HEADER, (SECRET, "1e6", "3", "4", "5"), (f"{SECRET}.nii.gz", "1e6", "3", "4", "5")], "row 3 tells of a scan"),
        ([("subject", "csf"), (SECRET, "3")], "does not name the column 'total intracranial'"),
        ([("scan", INTRACRANIAL), (SECRET, "3")], "row 1 must name the columns subject"),
        ([(*HEADER, "csf"), (SECRET, "1e6", "3", "4", "5", "6")], "gives the columns 5 and 6 one name"),
        ([HEADER, ("", "1e6", "3", "4", "5")], "row 2: 'subject' is empty"),
        ([(*HEADER, "patient_id"), (SECRET, "1e6", "3", "4", "5", "6")], "names the column 'patient_id', which is no"),
    ],
)
def test_damaged_tables_are_refused_with_the_row_and_without_anybodys_name(tmp_path, rows, said):
    with pytest.raises(ConfigError) as caught:
        read_volumes([write(tmp_path / "volumes.csv", *rows)])
    assert said in str(caught.value)
    assert "mueller" not in f"{caught.value} {caught.value.hint}"


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file 'volumes\.csv'"):
        read_volumes([tmp_path / "volumes.csv"])


def test_volumes_are_shares_of_the_inside_of_the_skull_in_alphabetical_order():
    shares = normalise({"csf": 2e5, INTRACRANIAL: 1e6, "brain": 7e5, "left": math.nan})
    assert list(shares) == ["brain", "csf", "left"]
    assert shares["csf"] == 0.2
    assert math.isnan(shares["left"])
    with pytest.raises(ValueError, match="at least 1000 mm3"):
        normalise({"csf": 1.0, INTRACRANIAL: 10.0})
    with pytest.raises(ValueError, match="at least 1000 mm3"):
        normalise({"csf": 1.0})


def test_a_label_map_gives_volumes_where_no_program_has():
    array = np.zeros((4, 5, 6), np.int16)
    array[:2], array[2, 0, 0] = 1, 7
    labels = LabelMap(array=array, classes={1: "brain", 7: "csf", 9: "lesion"})
    found = volumes_of(labels, 2.0, inside=("brain", "csf"))
    assert dict(found.volumes) == {"brain": 120.0, "csf": 2.0, "lesion": 0.0, INTRACRANIAL: 122.0}
    assert INTRACRANIAL not in volumes_of(labels, 2.0).volumes
    with pytest.raises(ValueError, match="'skull' is none"):
        volumes_of(labels, 2.0, inside=("skull",))
