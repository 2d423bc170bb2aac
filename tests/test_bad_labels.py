"""Labels that a user gets wrong, through the door of `adapt`: refused with the row named, and nothing is written.

Masks on another grid and values that nobody described are refused at `ingest`; the last tests are about these.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Image
from tests.fewlabelled import make_store, make_weights

from voxelstem import adapt
from voxelstem.adapted import read_run
from voxelstem.errors import AuditError, ConfigError, VoxelstemError
from voxelstem.ingest import ingest
from voxelstem.intake import IntakeConfig
from voxelstem.store import Store

PHANTOMS = [f"phantom-{n:04d}" for n in range(12)]
USUAL = {"classify": ("label", "no", "yes"), "each": ("cyst", "0", "1"), "regress": ("value", "1.5", "2.5")}
"""For each kind of label file: its column, and two cells that take turns; `each` has a column for a class."""


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here share one site key, because they share one store."""
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-labels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        make_store(folder)
    make_weights(folder)
    return folder


def rows_of(kind: str) -> list[str]:
    """A good label file of all twelve phantoms, a line each; the first names the columns."""
    if kind == "survive":
        return ["subject,time,event", *(f"{name},{5 + n},{n % 2}" for n, name in enumerate(PHANTOMS))]
    column, *cells = USUAL[kind]
    return [f"subject,{column}", *(f"{name},{cells[n % 2]}" for n, name in enumerate(PHANTOMS))]


def adapted(place: Path, folder: Path, kind: str, rows: list[str], **settings: object) -> Path:
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=folder / "labels.csv",
        task="classify" if kind == "each" else kind,
        mode="probe",
        out=folder / "run",
        settings={name.replace("__", "."): value for name, value in settings.items()},
    )


def refused(place: Path, folder: Path, kind: str, rows: list[str], **settings: object) -> VoxelstemError:
    """The refusal, which names nobody and leaves no run behind."""
    with pytest.raises(VoxelstemError) as caught:
        adapted(place, folder, kind, rows, **settings)
    assert "mueller" not in str(caught.value)
    assert "phantom-0" not in str(caught.value)
    assert not (folder / "run").exists()
    return caught.value


KINDS = ("classify", "each", "regress", "survive")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_unknown_subjects(place: Path, tmp_path: Path, kind: str) -> None:
    rows = rows_of(kind)
    rows += [row.replace("phantom-0000", "mueller").replace("phantom-0001", "maier") for row in rows[1:3]]
    error = refused(place, tmp_path, kind, rows)
    assert "2 of 14 labelled subjects have no CT scan in the store: rows 14, 15" in error.problem
    assert "unknown=left_out" in error.hint


def test_labels_of_unknown_subjects_are_left_out_where_a_user_says_so_and_the_run_counts_them(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = adapted(place, tmp_path, "classify", [*rows_of("classify"), "mueller,no"], unknown="left_out")
    assert "1 of 13 labelled subjects are not in the store (no CT scan)" in caplog.messages
    assert json.loads((run / "adapt.json").read_text())["card"]["labels"]["left_out"] == 1
    assert "1 more were labelled and left out" in (run / "README.md").read_text()
    assert read_run(run).config.unknown == "left_out"


@pytest.mark.parametrize("kind", KINDS)
def test_doubled_rows_alike_or_not(place: Path, tmp_path: Path, kind: str) -> None:
    rows = rows_of(kind)
    error = refused(place, tmp_path, kind, [*rows, rows[3]])
    assert "rows 4 and 14 say the same of the same subject" in error.problem
    assert "joining tables" in error.hint
    other = rows[4].split(",", 1)[1]
    error = refused(place, tmp_path, kind, [*rows, f"{PHANTOMS[2]},{other}"])
    assert "rows 4 and 14 label the same subject differently" in error.problem


@pytest.mark.parametrize("kind", KINDS)
def test_a_subject_in_two_folds(place: Path, tmp_path: Path, kind: str) -> None:
    names, *rows = rows_of(kind)
    told = [f"{names},fold", *(f"{row},{n % 3}" for n, row in enumerate(rows))]
    error = refused(place, tmp_path, kind, [*told, told[1].removesuffix("0") + "2"])
    assert "rows 2 and 14 put the same subject into the folds 0 and 2" in error.problem


@pytest.mark.parametrize(
    ("kind", "cells", "said"),
    [
        ("classify", ["no"] * 12, "subjects have the same label, 'no': nothing to tell apart"),
        ("regress", ["2.5"] * 12, "have the same value"),
        ("each", ["1"] * 12, "of 'cyst' all"),
        ("survive", ["5,0"] * 12, "are censored, and none has an event"),
    ],
)
def test_one_class_only_and_censored_only(place: Path, tmp_path: Path, kind: str, cells: list[str], said: str) -> None:
    rows = [rows_of(kind)[0], *(f"{name},{cell}" for name, cell in zip(PHANTOMS, cells, strict=True))]
    error = refused(place, tmp_path, kind, rows)
    assert isinstance(error, AuditError)
    assert said in error.problem


@pytest.mark.parametrize(
    ("kind", "cell", "said"),
    [
        ("regress", "nan", "row 4: 'value' must be a number, got 'nan'"),
        ("regress", "inf", "row 4: 'value' must be a number, got 'inf'"),
        ("regress", "", "row 4: 'value' is empty"),
        ("survive", "nan,1", "row 4: 'time' must be a number, got 'nan'"),
        ("survive", "5,nan", "row 4: 'event' must be 0 or 1, got 'nan'"),
        ("survive", "-5,1", "row 4: 'time' must be a number >= 0"),
        ("classify", "nan", "row 4: 'label' must name a class, got 'nan'"),
        ("classify", "", "row 4: 'label' is empty"),
        ("each", "2", "row 4: '2' is neither 1 nor 0"),
        ("classify", "=cmd|' /C calc'!A0", "row 4: 'label' begins like a formula"),
        ("classify", "@SUM(A1)", "row 4: 'label' begins like a formula"),
        ("regress", "+1+1", "row 4: 'value' begins like a formula"),
        ("survive", "=1,1", "row 4: 'time' begins like a formula"),
    ],
)
def test_cells_that_are_no_label(place: Path, tmp_path: Path, kind: str, cell: str, said: str) -> None:
    rows = rows_of(kind)
    rows[3] = f"{PHANTOMS[2]},{cell}"
    error = refused(place, tmp_path, kind, rows)
    assert isinstance(error, ConfigError)
    assert said in error.problem


def test_a_class_whose_name_is_a_formula(place: Path, tmp_path: Path) -> None:
    rows = rows_of("each")
    assert (
        "row 1: the name of a column begins like a formula"
        in refused(place, tmp_path, "each", ["subject,-cyst", *rows[1:]]).problem
    )


def test_fewer_subjects_than_folds_that_were_asked_for(place: Path, tmp_path: Path) -> None:
    rare = len(Store.open(place / "store").subjects("train"))
    error = refused(place, tmp_path, "classify", rows_of("classify"), folds=rare)
    assert f"{rare} folds are asked for" in error.problem
    assert "of '" in error.problem
    error = refused(place, tmp_path, "regress", rows_of("regress"), folds=rare + 1)
    assert f"{rare + 1} folds are asked for, and the labelled subjects, {rare}, allow {rare}" in error.problem


def test_fewer_subjects_than_the_usual_folds_are_said_and_not_refused(place: Path, tmp_path: Path) -> None:
    train = set(Store.open(place / "store").subjects("train"))
    run = adapted(place, tmp_path, "classify", rows_of("classify"))
    notes = json.loads((run / "adapt.json").read_text())["assurance"]
    assert len(train) < 10
    assert any("not calibrated" in note for note in notes)


@pytest.mark.parametrize(
    ("classes", "moved_mm", "code"), [({"1": "lesion"}, 5.0, "label-grid"), ({"2": "lesion"}, 0.0, "label-values")]
)
def test_masks_on_another_grid_and_values_never_described_are_in_the_ledger(
    tmp_path: Path, classes: dict[str, str], moved_mm: float, code: str
) -> None:
    shape, affine = (12, 12, 10), np.diag([8.0, 8.0, 8.0, 1.0])
    body = np.full(shape, -1000.0)
    body[2:-2, 2:-2, 1:-1] = np.random.default_rng(0).normal(40, 20, (8, 8, 8))
    scan, mask = tmp_path / "scans" / "a.nii.gz", tmp_path / "masks" / "a.nii.gz"
    marked = np.zeros(shape, np.uint8)
    marked[4:6, 4:6, 4:6] = 1
    place = affine.copy()
    place[0, 3] = moved_mm
    for path, array, where in ((scan, body.astype(np.int16), affine), (mask, marked, place)):
        path.parent.mkdir()
        Nifti1Image(array, where).to_filename(path)
    (mask.parent / "labels.json").write_text(json.dumps({"classes": classes}))
    report = ingest([scan.parent], tmp_path / "store", labels=mask.parent, config=IntakeConfig(modality="CT"))
    (entry,) = [refusal for refusal in report.refusals if refusal.code == code]
    assert "a.nii.gz" in entry.relative
    records = list(Store.open(tmp_path / "store"))
    assert not any(record.has_labels for record in records)
