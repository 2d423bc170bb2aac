from __future__ import annotations

import pytest

from voxelstem.errors import ConfigError
from voxelstem.store.labels import LabelFile, Survival, is_formula, match, read_findings, read_labels, says_many
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
    assert read_labels(table("subject,label\na,yes\nb,no\n"), "classify", KEY).labels == {a: "yes", b: "no"}
    assert read_labels(table("subject,value\na,1.5\nb,-2e3\n"), "regress", KEY).labels == {a: 1.5, b: -2000.0}
    assert read_labels(table("subject,time,event\na,12,1\nb,3.5,no\n"), "survive", KEY).labels == {
        a: Survival(time=12.0, event=True),
        b: Survival(time=3.5, event=False),
    }


@pytest.mark.parametrize("cells", [("1", "0"), ("1.0", "0.0"), ("True", "False"), ("YES", "no")])
def test_an_event_is_said_in_several_ways(table, cells):
    read = read_labels(table(f"subject,time,event\na,0,{cells[0]}\nb,0.5,{cells[1]}\n"), "survive", KEY).labels
    assert [(one.time, one.event) for one in read.values()] == [(0.0, True), (0.5, False)]


def test_what_spreadsheets_add_does_no_harm(table):
    text = 'age, label , subject\r\n41, "yes", a \r\n,,\r\n\r\n'
    assert read_labels(table(text, "utf-8-sig"), "classify", KEY).labels == {pseudonym("a", KEY): "yes"}


@pytest.mark.parametrize(("third", "said"), [("1", "say the same"), ("2", "label the same subject differently")])
def test_a_subject_has_one_row(table, third, said):
    with pytest.raises(ConfigError, match=f"rows 2 and 4 {said}") as caught:
        read_labels(table(f"subject,label\na,1\nb,1\na,{third}\n"), "classify", KEY)
    assert "keep one row for each subject" in caught.value.hint


@pytest.mark.parametrize(
    ("one", "other"), [("Yes", "yes"), ("1", "1.0"), ("grade  2", "grade 2"), ("Straße", "STRASSE")]
)
def test_a_class_is_spelt_in_one_way(table, one, other):
    with pytest.raises(ConfigError, match=f"rows 2 and 4 spell one class in two ways, '{one}' and '{other}'"):
        read_labels(table(f"subject,label\na,{one}\nb,no\nc,{other}\n"), "classify", KEY)
    assert len(read_labels(table("subject,label\na,HER2\nb,HER2-\nc,HER2+\n"), "classify", KEY).labels) == 3


def test_the_row_of_each_label_is_known(table):
    read = read_labels(table("subject,label\na,1\n\nb,2\n"), "classify", KEY)
    assert (read.name, read.rows, read.folds) == ("labels.csv", {pseudonym("a", KEY): 2, pseudonym("b", KEY): 4}, {})


def test_a_column_called_fold_says_who_is_held_out_together(table):
    names = [pseudonym(name, KEY) for name in "abc"]
    read = read_labels(table("subject,fold,label\na,0,x\nb,1,y\nc,0,x\n"), "classify", KEY)
    assert read.folds == dict(zip(names, [0, 1, 0], strict=True))
    many = read_findings(table("subject,fold,cyst\na,0,1\nb,1,0\nc,0,\n"), KEY, plain)
    assert many.folds == dict(zip(names, [0, 1, 0], strict=True))
    assert many.labels == {names[0]: {"cyst": True}, names[1]: {"cyst": False}}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a,0,x\nb,1,y\na,1,x\n", "rows 2 and 4 put the same subject into the folds 0 and 1"),
        ("a,0,x\nb,one,y\n", "row 3: 'fold' must be a whole number from 0 upwards, got 'one'"),
        ("a,0,x\nb,-1,y\n", "row 3: 'fold' must be a whole number"),
        ("a,0,x\nb,,y\n", "row 3: 'fold' is empty"),
        ("a,1,x\nb,2,y\n", "must number two folds or more from 0 without a gap, it has 1, 2"),
        ("a,0,x\nb,0,y\n", "must number two folds or more from 0 without a gap, it has 0"),
    ],
)
def test_folds_that_are_none_are_refused(table, rows, said):
    with pytest.raises(ConfigError, match=said) as caught:
        read_labels(table(f"subject,fold,label\n{rows}"), "classify", KEY)
    assert caught.value.hint


def plain(columns):
    return {name: name for name in columns}


@pytest.mark.parametrize(
    ("cell", "formula"),
    [
        ("=1+1", True),
        ("  =1+1", True),
        ("+positive", True),
        ("-", True),
        ("@SUM(A1)", True),
        ("\t=1", True),
        ("\r=1", True),
        ("\uff1d1", True),
        ("-1", False),
        ("+2.5e3", False),
        ("T1-T2", False),
        ("", False),
    ],
)
def test_what_a_spreadsheet_would_run_is_a_formula_and_a_number_is_none(cell, formula):
    assert is_formula(cell) is formula


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("subject,cyst\nMiller,perhaps\n", "row 2: 'perhaps' is neither 1 nor 0"),
        ("subject,cyst\nMiller,\n", "says nothing of any class"),
        ("subject,cyst\nMiller,1\nMiller,1\n", "rows 2 and 3 say the same"),
        ("subject,cyst\nMiller,1\nMiller,0\n", "rows 2 and 3 label the same subject differently"),
        ("subject,=cyst\nMiller,1\n", "row 1: the name of a column begins like a formula"),
        ("subject,cyst,cyst\nMiller,1,0\n", "row 1 gives the columns 2 and 3 one name"),
        (f"subject,{'c' * 65}\nMiller,1\n", "at most 64 printable characters"),
        ("subject,cyst\n=Miller,1\n", "row 2: 'subject' begins like a formula"),
    ],
)
def test_findings_that_cannot_be_read_are_refused_with_their_row(table, text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        read_findings(table(text), KEY, plain)
    assert "Miller" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "many"),
    [("subject,cyst", True), ("subject,label", False), ("subject,label,cyst", False), ("subject,fold", False)],
)
def test_a_file_without_a_column_called_label_is_about_many_classes(table, names, many):
    assert says_many(table(f"{names}\n")) is many


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
        ("subject,label\nok,1\nMiller,=HYPERLINK(1)\n", "classify", "row 3: 'label' begins like a formula"),
        ("subject,label\nMiller,+\n", "classify", "row 2: 'label' begins like a formula"),
        ("subject,value\nMiller,=1+1\n", "regress", "row 2: 'value' begins like a formula"),
        ("subject,label\nMiller,NaN\n", "classify", "row 2: 'label' must name a class, got 'NaN'"),
        (f"subject,label\nMiller,{'x' * 65}\n", "classify", "row 2: 'label' must be one line of at most 64"),
        ("subject,label,label\nMiller,1,2\n", "classify", "row 1 gives the columns 2 and 3 one name"),
    ],
)
def test_errors_name_the_row_and_never_the_subject(table, text, kind, said):
    with pytest.raises(ConfigError, match=said) as caught:
        read_labels(table(text), kind, KEY)
    assert "Miller" not in str(caught.value)
    assert caught.value.hint


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no file 'labels\.csv'"):
        read_labels(tmp_path / "labels.csv", "classify", KEY)


def told(**labels):
    return LabelFile(name="labels.csv", labels=labels, rows={name: at for at, name in enumerate(labels, 2)})


def test_labels_of_strangers_are_refused_with_their_rows_or_left_out_and_counted():
    file = told(s1="yes", s9="no", s2="no", s8="no")
    matched = match(file, ["s1", "s2", "s3"], others=["s9"], scan="CT", unknown="left_out")
    assert (matched.labels, matched.left_out) == ({"s1": "yes", "s2": "no"}, 2)
    with pytest.raises(
        ConfigError, match=r"2 of 4 labelled subjects have no CT scan in the store: rows 3, 5; 1 of"
    ) as no:
        match(file, ["s1", "s2", "s3"], others=["s9"], scan="CT", unknown="refused")
    assert "unknown=left_out" in no.value.hint
    for unknown in ("refused", "left_out"):
        with pytest.raises(ConfigError, match="none of the 1 labelled subjects is among the 2 in the store"):
            match(told(s9="no"), ["s1", "s2"], others=[], scan="CT", unknown=unknown)


def test_of_many_strangers_the_first_rows_are_named_and_the_others_counted():
    many = told(**{f"s{place}": "no" for place in range(9)})
    with pytest.raises(ConfigError, match=r"8 of 9 .*: rows 3, 4, 5, 6, 7 and 3 more\n"):
        match(many, ["s0"], others=[], scan="CT", unknown="refused")
    with pytest.raises(ConfigError, match=r"1 of 9 .*: row 10\n"):
        match(many, [f"s{place}" for place in range(8)], others=[], scan="CT", unknown="refused")
