from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
from tests.fewlabelled import make_store, make_weights

from voxelstem import adapt
from voxelstem.adapted import read_run
from voxelstem.errors import AuditError, ConfigError
from voxelstem.judging.entries import contest_of, enter, labels_line, read_runs
from voxelstem.store import Store


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entries")
    with pytest.MonkeyPatch.context() as patch:
        key = tmp_path_factory.getbasetemp() / "entries.key"
        key.write_text("5a" * 32)
        patch.setenv("VOXELSTEM_KEY", str(key))
        make_store(folder, 12)
        make_weights(folder)
        for mode in ("probe", "knn"):
            adapt.run(
                weights=folder / "weights",
                store=folder / "store",
                labels=folder / "contrast.csv",
                task="classify",
                mode=mode,
                out=folder / mode,
                budget=4,
            )
    return folder


@pytest.fixture(autouse=True)
def one_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(place.parent / "entries.key"))


def test_an_entry_brings_the_run_s_own_labelled_scans_against_all_labelled_test_scans(place: Path) -> None:
    adapted, store = read_run(place / "probe"), Store.open(place / "store")
    entry = enter(adapted, store, place / "contrast.csv", place / "features", commercial=False)
    assert tuple(record.key for record in entry.contest.labelled) == adapted.labelled
    assert {record.split for record in entry.contest.tested} == {"test"}
    assert set(entry.contest.subjects) == set(store.subjects("test"))
    assert entry.model.spec == adapt.load(adapted.weights).spec
    # Another mode has other baselines.
    other = enter(read_run(place / "knn"), store, place / "contrast.csv", place / "features", commercial=False)
    assert other.mark != entry.mark


def test_runs_are_called_by_their_folders_and_by_more_of_the_path_where_two_are_alike(
    place: Path, tmp_path: Path
) -> None:
    assert [run.name for run in read_runs([place / "probe", place / "knn"])] == ["probe", "knn"]
    twins = [tmp_path / name / "run" for name in ("few", "many")]
    for source, twin in zip(("probe", "knn"), twins, strict=True):
        copytree(place / source, twin)
    assert [run.name for run in read_runs(twins)] == ["few/run", "many/run"]
    assert [run.name for run in read_runs([*twins, place / "knn"])] == ["few/run", "many/run", f"{place.name}/knn"]
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([place / "probe", place / "knn" / ".." / "probe"])


def test_labels_that_no_longer_fit_the_run_are_refused(place: Path) -> None:
    adapted, store = read_run(place / "probe"), Store.open(place / "store")
    entry = enter(adapted, store, place / "contrast.csv", place / "features", commercial=False)
    truth = entry.contest.truth
    fewer = replace(truth, records=truth.of("test"))
    with pytest.raises(ConfigError, match="4 of the scans that 'probe' learned from are not in this store"):
        contest_of(adapted, store, fewer)
    with pytest.raises(AuditError, match="no held-out test subject"):
        contest_of(adapted, store, replace(truth, records=truth.of("train")))
    strange = replace(truth, labels=dict.fromkeys(truth.labels, "perhaps"))
    with pytest.raises(ConfigError, match="test label 'perhaps' is none that 'probe' knows"):
        contest_of(adapted, store, strange)


def test_labels_of_another_question_are_refused_with_the_number_of_whom_they_differ(place: Path) -> None:
    adapted, store = read_run(place / "probe"), Store.open(place / "store")
    truth = enter(adapted, store, place / "contrast.csv", place / "features", commercial=False).contest.truth
    turn = {"yes": "no", "no": "yes"}
    one, two, *_ = adapted.subjects
    other = replace(truth, labels={s: turn[said] if s in (one, two) else said for s, said in truth.labels.items()})
    with pytest.raises(ConfigError, match="something else of 2 of the 4 subjects that 'probe' learned from"):
        contest_of(adapted, store, other)
    # What is said of others may be corrected, and more of them labelled.
    tested = set(store.subjects("test"))
    mended = replace(truth, labels={s: turn[said] if s in tested else said for s, said in truth.labels.items()})
    assert contest_of(adapted, store, mended).labelled
    assert labels_line(adapted) == "probe: these labels say the same of all 4 subjects as those that it learned from"


def test_a_run_that_kept_nothing_of_its_labels_is_judged_and_the_page_says_what_is_not_known(place: Path) -> None:
    adapted, store = read_run(place / "probe"), Store.open(place / "store")
    truth = enter(adapted, store, place / "contrast.csv", place / "features", commercial=False).contest.truth
    old = replace(adapted, card=replace(adapted.card, labels=replace(adapted.card.labels, told=())))
    turned = replace(truth, labels={s: {"yes": "no", "no": "yes"}[said] for s, said in truth.labels.items()})
    assert contest_of(old, store, turned).labelled
    assert "NOT MEASURED, the run was made before that was kept" in labels_line(old)
    assert labels_line(replace(old, labelled=())) == ""


def test_labels_that_ask_for_other_structures_are_refused(place: Path, tmp_path: Path) -> None:
    adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "labels.json",
        task="segment",
        mode="probe",
        out=tmp_path / "organs",
        budget=2,
    )
    adapted, store = read_run(tmp_path / "organs"), Store.open(place / "store")
    contest = enter(adapted, store, place / "labels.json", place / "features", commercial=False).contest
    assert contest.labelled
    with pytest.raises(ConfigError, match="ask for other structures than 'organs' learned"):
        contest_of(adapted, store, replace(contest.truth, classes=("liver",)))
