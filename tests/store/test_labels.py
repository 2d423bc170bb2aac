from __future__ import annotations

import pytest

from voxelstem.errors import ConfigError
from voxelstem.store.labels import Survival, match, read_labels
from voxelstem.store.subjects import pseudonym

KEY = bytes(32)


@pytest.fixture
def table(tmp_path):
    def write(text: str, encoding: str = "utf-8"):
        path = tmp_path / "labels.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


def test_classes_numbers_and_survival_are_read(table):
    a, b = pseudonym("a", KEY), pseudonym("b", KEY)
    assert read_labels(table("subject,label\na,yes\nb,no\n"), "classify", KEY) == {a: "yes", b: "no"}
    assert read_labels(table("subject,value\na,1.5\nb,-2e3\n"), "regress", KEY) == {a: 1.5, b: -2000.0}
    assert read_labels(table("subject,time,event\na,12,1\nb,3.5,no\n"), "survive", KEY) == {
        a: Survival(time=12.0, event=True),
        b: Survival(time=3.5, event=False),
    }


@pytest.mark.parametrize("cells", [("1", "0"), ("1.0", "0.0"), ("True", "False"), ("YES", "no")])
def test_an_event_is_said_in_several_ways(table, cells):
    read = read_labels(table(f"subject,time,event\na,0,{cells[0]}\nb,0.5,{cells[1]}\n"), "survive", KEY)
    assert [(one.time, one.event) for one in read.values()] == [(0.0, True), (0.5, False)]


def test_what_spreadsheets_add_does_no_harm(table):
    text = 'age, label , subject\r\n41, "yes", a \r\n,,\r\n\r\n'
    assert read_labels(table(text, "utf-8-sig"), "classify", KEY) == {pseudonym("a", KEY): "yes"}


def test_a_subject_may_be_labelled_twice_alike_but_not_differently(table):
    assert len(read_labels(table("subject,label\na,1\na,1\n"), "classify", KEY)) == 1
    with pytest.raises(ConfigError, match="rows 2 and 4 label the same subject differently"):
        read_labels(table("subject,label\na,1\nb,1\na,2\n"), "classify", KEY)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("subject,lable\nMiller,1\n", "classify", "must name the columns subject,label; it has subject, lable"),
        ("subject;label\nMiller;1\n", "classify", "it has 1 unknown name"),
        ("Miller,1\n", "classify", "it has 2 unknown name"),
        ("", "classify", "it has 0 unknown name"),
        ("subject,label\n", "classify", "holds no labels"),
        ("subject,label\nMiller,\n", "classify", "row 2: 'label' is empty"),
        ("subject,label\n,1\n", "classify", "row 2: 'subject' is empty"),
        ("subject,label\nok,1\nMiller\n", "classify", "row 3: 'label' is empty"),
        ("subject,value\nok,1\nMiller,1,5\n", "regress", "row 3 has 3 cells, row 1 names 2"),
        ("subject,value\nok,1\nMiller,high\n", "regress", "row 3: 'value' must be a number, got 'high'"),
        ("subject,value\nMiller,nan\n", "regress", "row 2: 'value' must be a number"),
        ("subject,time,event\nMiller,-1,1\n", "survive", "row 2: 'time' must be a number >= 0"),
        ("subject,time,event\nMiller,1,2\n", "survive", "row 2: 'event' must be 0 or 1, got '2'"),
        ("subject,time,event\nMiller,nan,1\n", "survive", "row 2: 'time' must be a number, got 'nan'"),
        ("subject,time,event\nMiller,inf,1\n", "survive", "row 2: 'time' must be a number, got 'inf'"),
        ("subject,time,event\nok,1,1\nMiller,,1\n", "survive", "row 3: 'time' is empty"),
        ("subject,time,event\nMiller,1,0.5\n", "survive", "row 2: 'event' must be 0 or 1, got '0.5'"),
        ("subject,time\nMiller,1\n", "survive", "must name the columns subject,time,event; it has subject, time"),
        ("subject,time,event\nMiller,1,1\nMiller,2,1\n", "survive", "rows 2 and 3 label the same subject differently"),
        ("subject,time,event\nMiller,1,1\nMiller,1,0\n", "survive", "rows 2 and 3 label the same subject differently"),
        ('subject,label\n"Miller,1\n', "classify", "cannot be read as CSV"),
    ],
)
def test_errors_name_the_row_and_never_the_subject(table, text, kind, said):
    with pytest.raises(ConfigError, match=said) as caught:
        read_labels(table(text), kind, KEY)
    assert "Miller" not in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no file 'labels\.csv'"):
        read_labels(tmp_path / "labels.csv", "classify", KEY)


def test_labels_of_strangers_are_counted_and_only_strangers_are_an_error():
    matched = match({"s1": "yes", "s2": "no", "s9": "no"}, ["s1", "s2", "s3"])
    assert matched.labels == {"s1": "yes", "s2": "no"}
    assert matched.missing == 1
    with pytest.raises(ConfigError, match="none of the 1 labelled subjects is among the 2 in the store"):
        match({"s9": "no"}, ["s1", "s2"])
