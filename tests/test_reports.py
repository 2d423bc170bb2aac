from __future__ import annotations

import csv
import datetime
import json
import zipfile

import pytest
from openpyxl import Workbook

from voxelstem import reports as verb
from voxelstem.errors import ConfigError
from voxelstem.reports import read_reports, sections
from voxelstem.store.subjects import pseudonym
from voxelstem.study import Report

KEY = bytes(32)


def test_reports_are_found_by_scan_before_subject(tmp_path):
    path = tmp_path / "reports.jsonl"
    rows = [
        {"subject": 7, "findings": "Liver: clear.", "impression": "Normal."},
        {"scan": "a/ct.nii.gz", "report": "A cyst."},
        {"subject": "stranger", "report": "?"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    reports = read_reports(path, KEY)
    seven = pseudonym("7", KEY)
    assert reports.find("b/ct.nii.gz", seven).text == "Findings: Liver: clear.\nImpression: Normal."
    assert reports.find("a/ct.nii.gz", seven).text == "A cyst."
    assert reports.find("c/ct.nii.gz", "s0") is None
    assert reports.unused() == 1


def test_reports_come_as_csv_too(tmp_path):
    path = tmp_path / "reports.csv"
    path.write_text('scan,report\na/ct,"A cyst, 2 cm."\n')
    assert read_reports(path, KEY).find("a/ct.nii.gz", "s0").text == "A cyst, 2 cm."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"subject": "Miller"}', "row 1 has no text"),
        ('\n{"report": "Miller"}', "row 2 does not say whose"),
        ("Miller", "row 1 is not JSON"),
        ('["Miller"]', "row 1 is not a JSON object"),
    ],
)
def test_a_row_of_another_shape_is_named_by_its_number(tmp_path, text, said):
    path = tmp_path / "reports.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_reports(path, KEY)
    assert "Miller" not in str(caught.value)


def test_absent_reports_are_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no file 'reports\.jsonl'"):
        read_reports(tmp_path / "reports.jsonl", KEY)


CT_RATE = {
    "VolumeName": "train_1_a_1.nii.gz",
    "ClinicalInformation_EN": "Cough.",
    "Technique_EN": "Without contrast.",
    "Findings_EN": "Nodule of 4 mm.",
    "Impressions_EN": "Follow up.",
}
MERLIN = {
    "study id": "AC4213",
    "Findings": "TECHNIQUE: Portal phase.\nFINDINGS: Liver: smooth. Spleen: large.\nIMPRESSION:\n1. Splenomegaly.",
    "Split": "train",
}


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def write_xlsx(path, *rows):
    book = Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(path)
    return path


@pytest.mark.parametrize("write", [write_csv, write_xlsx])
def test_the_columns_of_ct_rate_are_known_by_name(tmp_path, write):
    path = write(tmp_path / f"reports.{write.__name__[6:]}", CT_RATE)
    found = read_reports(path, KEY).find("train_1/train_1_a/train_1_a_1.nii.gz", "s0")
    assert found == Report(
        findings_text="Nodule of 4 mm.",
        impression_text="Follow up.",
        history_text="Cough.",
        technique_text="Without contrast.",
        language="en",
    )


@pytest.mark.parametrize("write", [write_csv, write_xlsx])
def test_merlins_whole_report_is_parted_at_its_headings(tmp_path, write):
    path = write(tmp_path / f"reports.{write.__name__[6:]}", MERLIN, {**MERLIN, "study id": 7})
    reports = read_reports(path, KEY)
    assert reports.find("merlin_data/AC4213.nii.gz", "s0") == Report(
        findings_text="Liver: smooth. Spleen: large.",
        impression_text="1. Splenomegaly.",
        technique_text="Portal phase.",
        language="en",
    )
    assert reports.find("merlin_data/7.nii.gz", "s0") is not None


def test_merlins_findings_without_headings_are_findings(tmp_path):
    path = write_csv(tmp_path / "reports.csv", {**MERLIN, "Findings": "Liver: smooth."})
    assert read_reports(path, KEY).find("AC4213.nii.gz", "s0").findings_text == "Liver: smooth."


@pytest.mark.parametrize(
    ("text", "rest", "findings", "impression"),
    [
        ("All clear.", "All clear.", "", ""),
        ("Findings: clear. Impression: normal.", "", "clear.", "normal."),
        ("CT chest.\nBefund: frei.\nBeurteilung: normal.", "CT chest.", "frei.", "normal."),
        ("Comparaison : 2019.\nRésultats : normal.\nConclusion : rien.", "Comparaison: 2019.", "normal.", "rien."),
        ("Bevindingen: vrij.\nConclusie: normaal.", "", "vrij.", "normaal."),
        ("No new findings: none were sought", "No new findings: none were sought", "", ""),
    ],
)
def test_a_report_is_parted_at_headings_that_begin_a_line_or_sentence(text, rest, findings, impression):
    assert sections(text) == Report(rest_text=rest, findings_text=findings, impression_text=impression)


def test_the_language_is_kept(tmp_path):
    path = tmp_path / "reports.jsonl"
    path.write_text(json.dumps({"scan": "a.nii", "findings": "frei", "language": "DE"}))
    assert read_reports(path, KEY).find("a.nii", "s0").language == "de"


def test_a_workbook_that_would_unpack_to_too_much_is_refused(tmp_path, monkeypatch):
    path = write_xlsx(tmp_path / "reports.xlsx", CT_RATE)
    monkeypatch.setattr(verb, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="GiB"):
        read_reports(path, KEY)


@pytest.mark.parametrize("content", [b"PK\3\4 nothing", b"", None])
def test_a_broken_or_absent_workbook_is_a_clear_error(tmp_path, content):
    path = tmp_path / "reports.xlsx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"reports\.xlsx"):
        read_reports(path, KEY)


def test_a_zip_that_is_no_workbook_is_a_clear_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "reports.xlsx", "w") as packed:
        packed.writestr("a.txt", "nothing")
    with pytest.raises(ConfigError, match="cannot be read as a workbook"):
        read_reports(tmp_path / "reports.xlsx", KEY)


def test_headings_may_stand_alone_on_a_line_and_lines_may_hold_any_separator(tmp_path):
    text = "FINDINGS\nLung clear.\nNo findings of note.\n\nIMPRESSION\nNormal."
    assert sections(text) == Report(findings_text="Lung clear.\nNo findings of note.", impression_text="Normal.")
    path = tmp_path / "reports.jsonl"
    path.write_text(json.dumps({"scan": "a.nii", "report": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n")
    assert read_reports(path, KEY).find("a.nii", "s0").text == "one\u2028two\u0085three"


def test_two_reports_for_one_scan_are_refused_and_the_same_one_twice_is_not(tmp_path):
    path = tmp_path / "reports.jsonl"
    row = {"subject": "Miller", "report": "first"}
    path.write_text("\n".join(json.dumps(one) for one in (row, row)))
    assert read_reports(path, KEY).unused() == 1
    path.write_text("\n".join(json.dumps(one) for one in (row, {**row, "report": "second"})))
    with pytest.raises(ConfigError, match="row 2 gives another report") as caught:
        read_reports(path, KEY)
    assert "Miller" not in str(caught.value)


def test_a_file_s_name_counts_only_where_one_scan_has_it(tmp_path):
    path = tmp_path / "reports.jsonl"
    path.write_text(json.dumps({"scan": "ct.nii.gz", "report": "whose?"}))
    reports = read_reports(path, KEY)
    assert reports.find("p1/ct.nii.gz", "s0").text == "whose?"
    reports.ambiguous = frozenset({"ct.nii.gz", "ct"})
    assert reports.find("p1/ct.nii.gz", "s0") is None
    assert reports.find("ct.nii.gz", "s0").text == "whose?", "a path is a path"


def test_a_date_typed_as_an_id_keeps_its_day(tmp_path):
    path = write_xlsx(tmp_path / "reports.xlsx", {"subject": datetime.datetime(2020, 1, 2), "report": "clear"})
    assert read_reports(path, KEY).by_subject.keys() == {pseudonym("2020-01-02", KEY)}


@pytest.mark.parametrize(
    ("text", "history", "technique"),
    [
        (
            "History: cough. Indication: nodule? Technique: no contrast. Findings: clear.",
            "cough.\nnodule?",
            "no contrast.",
        ),
        ("Klinische Angaben: Husten.\nTechnik: nativ.\nBefund: frei.", "Husten.", "nativ."),
        ("Klinische gegevens: hoest.\nTechniek: blanco.\nBevindingen: vrij.", "hoest.", "blanco."),
        (
            "Renseignements cliniques : toux.\nTechnique : sans injection.\nRésultats : normal.",
            "toux.",
            "sans injection.",
        ),
    ],
)
def test_history_and_technique_are_sections_of_their_own_in_four_languages(text, history, technique):
    report = sections(text)
    assert (report.history_text, report.technique_text, report.rest_text) == (history, technique, "")
    assert report.findings_text


@pytest.mark.parametrize("write", [write_csv, write_xlsx])
@pytest.mark.parametrize(
    "original", [CT_RATE, {**MERLIN, "FULL ICD10 Cleaned": "Cyst of kidney; Cough ;Cyst of kidney"}]
)
def test_rewrites_and_codes_are_read_where_the_file_has_them(tmp_path, write, original):
    rewritten = {"Findings_EN_1": "One.", "Findings_EN_2": "", "Impressions_EN_1": "A.", "Impressions_EN_2": "B."}
    path = write(tmp_path / f"reports.{write.__name__[6:]}", {**original, **rewritten})
    (report,) = read_reports(path, KEY).by_scan.values()
    assert (report.findings_rewrites, report.impression_rewrites) == (("One.",), ("A.", "B."))
    assert report.icd10 == (("Cyst of kidney", "Cough") if "study id" in original else ())
    assert report.findings_text not in ("", "One.")


def test_a_file_without_rewrites_brings_none(tmp_path):
    (report,) = read_reports(write_csv(tmp_path / "reports.csv", CT_RATE), KEY).by_scan.values()
    assert (report.findings_rewrites, report.impression_rewrites, report.icd10) == ((), (), ())


def test_our_own_layout_takes_rewrites_as_a_list_or_a_text(tmp_path):
    path = tmp_path / "reports.jsonl"
    row = {
        "scan": "a.nii",
        "findings": "Cyst.",
        "history": "Pain.",
        "technique": "Native.",
        "findings_rewrites": ["A cyst.", "[One] cyst."],
        "impression_rewrites": "[Benign]",
        "icd10": ["Cyst of kidney", "Pain; chronic"],
    }
    path.write_text(json.dumps(row))
    assert read_reports(path, KEY).by_scan["a.nii"] == Report(
        findings_text="Cyst.",
        history_text="Pain.",
        technique_text="Native.",
        findings_rewrites=("A cyst.", "[One] cyst."),
        impression_rewrites=("[Benign]",),
        icd10=("Cyst of kidney", "Pain; chronic"),
    )


def test_rows_without_a_text_are_counted_and_a_file_of_them_is_refused(tmp_path):
    path = write_csv(tmp_path / "reports.csv", CT_RATE, {**dict.fromkeys(CT_RATE, ""), "VolumeName": "Miller.nii"})
    reports = read_reports(path, KEY)
    assert (reports.empty, list(reports.by_scan)) == (1, ["train_1_a_1.nii.gz"])
    write_csv(path, {"scan": "Miller.nii", "report": "FINDINGS:\nIMPRESSION:"})
    with pytest.raises(ConfigError, match="row 3 has no text") as caught:
        read_reports(path, KEY)
    assert "Miller" not in str(caught.value)


def test_reports_in_another_alphabet_s_bytes_are_a_clear_error(tmp_path):
    for name, text in (
        ("reports.csv", "scan,report\na,Müller\n"),
        ("reports.jsonl", '{"scan": "a", "report": "Müller"}'),
    ):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=rf"{name} cannot be read") as caught:
            read_reports(tmp_path / name, KEY)
        assert "ller" not in str(caught.value)
