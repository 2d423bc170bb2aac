from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.fewlabelled import QUICK

from voxelstem import adapt, evaluate
from voxelstem.adapted import read_run
from voxelstem.baselines import Intensity, intensity
from voxelstem.card import Card, write_weights
from voxelstem.errors import AuditError, ConfigError
from voxelstem.features import FeaturesOf, embedder
from voxelstem.judging.contest import Contest
from voxelstem.judging.entries import contest_of
from voxelstem.judging.rival import CAVEAT
from voxelstem.model import make_model
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import InputSpec
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.segment import Segment
from voxelstem.truth import read_truth

SPEC = InputSpec(spacing_mm=(8.0, 8.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))
ARCHITECTURE = {
    "name": "scan_vit",
    "block_ijk": (16, 16, 16),
    "block.dim": 24,
    "block.depth": 1,
    "block.heads": 2,
    "scan.depth": 0,
}


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here share one site key, because they share one store."""
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of coarse phantoms, weights, and one run of each task."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        store = Store.create(folder / "store", fractions=Fractions(train=0.6, validation=0.0, test=0.4))
        rows = [("subject", "label")]
        for seed in range(14):
            study = phantom(
                PhantomConfig(seed=seed, spacing_mm=(7.0, 7.0, 8.0), phase="portal" if seed % 2 else "none")
            )
            write(store, replace(study, subject=pseudonym(study.subject, site_key())))
            rows.append((study.subject, study.labels["contrast"]))
        with (folder / "contrast.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        (folder / "labels.json").write_text(
            json.dumps({"classes": {"1": "lung_left", "2": "lung_right", "3": "liver"}})
        )
        model = make_model(Card(architecture=ARCHITECTURE, spec=SPEC), seed=0)
        write_weights(folder / "weights", model.backbone.state_dict(), model.card)
        for name, task, labels in (("contrast", "classify", "contrast.csv"), ("organs", "segment", "labels.json")):
            adapt.run(
                weights=folder / "weights",
                store=folder / "store",
                labels=folder / labels,
                task=task,
                mode="probe",
                out=folder / name,
                budget=2,
            )
    return folder


def test_a_scan_level_run_stands_beside_scratch_intensity_and_majority(place: Path, tmp_path: Path) -> None:
    found = evaluate.run(
        [place / "contrast"], store=place / "store", labels=place / "contrast.csv", out=tmp_path / "report"
    )
    by_name = {score.name: score for score in found.scores if score.metric == "auroc"}
    assert list(by_name) == ["contrast", "scratch", "intensity", "radiomics", "majority"]
    assert by_name["majority"].value.estimate == 0.5
    assert by_name["scratch"].repeats == evaluate.INITS
    assert by_name["scratch"].over_scratch is None
    for name in ("contrast", "majority"):
        assert by_name[name].over_scratch is not None
        assert by_name[name].over_intensity is not None
    assert {score.value.subjects for score in found.scores} == {found.test_subjects}


@pytest.mark.parametrize(
    ("run", "labels"),
    [("contrast", "contrast.csv"), pytest.param("organs", "labels.json", marks=pytest.mark.slow)],
)
def test_every_scan_that_is_scored_moves_a_bar(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str, labels: str
) -> None:
    found = evaluate.run(
        [place / run], store=place / "store", labels=place / labels, out=tmp_path / "report", config=QUICK
    )
    scans = len(read_run(place / run).labelled) + found.test_scans
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith(f"evaluate: {run} {found.test_scans}/{found.test_scans} ")]
    total = (evaluate.INITS + 2) * scans
    (last,) = [line for line in lines if line.startswith(f"evaluate: baselines {total}/")]
    assert last.startswith(f"evaluate: baselines {total}/{total} ")


def test_the_page_says_what_was_checked_and_nothing_of_the_model_s_size(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    found = evaluate.run([place / "contrast"], store=place / "store", labels=place / "contrast.csv", out=out)
    words = "of this store on both sides of the split; what the weights saw before is told under"
    assert words in found.checked[0]
    html = (out / "index.html").read_text()
    assert words in html
    assert "tiny" not in html


def test_a_voxel_level_run_stands_beside_the_nearest_atlas_and_shows_every_organ(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    found = evaluate.run([place / "organs"], store=place / "store", labels=place / "labels.json", out=out, config=QUICK)
    by_name = {score.name: score for score in found.scores if score.metric == "dice"}
    assert list(by_name) == ["organs", "scratch", "intensity", "atlas", "unet"]
    assert [score.name for score in found.scores if score.metric == "nsd"] == list(by_name)
    assert set(by_name["atlas"].parts) == {"lung_left", "lung_right", "liver"}
    assert by_name["atlas"].value.estimate > 0.5
    difference = by_name["organs"].over_scratch
    assert difference is not None
    assert difference.estimate == pytest.approx(by_name["organs"].value.estimate - by_name["scratch"].value.estimate)
    written = json.loads((out / "evaluation.json").read_text())
    assert written["scores"][0]["value"]["estimate"] == pytest.approx(by_name["organs"].value.estimate)
    html = (out / "index.html").read_text()
    assert "What these numbers cannot show" in html
    assert "lung_left" in html


def test_runs_that_share_labels_share_their_baselines(place: Path, tmp_path: Path) -> None:
    adapt.run(
        weights="scratch",
        store=place / "store",
        labels=place / "contrast.csv",
        task="classify",
        mode="probe",
        out=tmp_path / "untrained",
        budget=2,
        settings={"like": str(place / "weights")},
    )
    found = evaluate.run(
        [place / "contrast", tmp_path / "untrained"],
        store=place / "store",
        labels=place / "contrast.csv",
        out=tmp_path / "report",
    )
    names = [score.name for score in found.scores if score.metric == "auroc"]
    assert names == ["contrast", "scratch", "intensity", "radiomics", "majority", "untrained"]


def test_the_floor_of_volumes_is_told_of_each_run_and_not_of_one_for_all(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "contrast.csv",
        task="classify",
        mode="probe",
        out=tmp_path / "three",
        budget=3,
    )
    # Volumes are known of the few scans of one run, and of the other's not.
    few = len(read_run(place / "contrast").labelled)
    monkeypatch.setattr(Contest, "morphometry", lambda self: self.majority() if len(self.labelled) == few else None)

    def floors(*runs: Path) -> list[str]:
        found = evaluate.run(runs, store=place / "store", labels=place / "contrast.csv", out=tmp_path / "report")
        return [line for line in found.checked if line.startswith("morphometry")]

    measured, missing = floors(place / "contrast", tmp_path / "three")
    assert measured.startswith("morphometry of contrast: a head on volumes")
    assert missing.startswith("morphometry floor of three: NOT MEASURED")
    assert floors(tmp_path / "three") == [missing.replace(" of three", "")]
    assert floors(place / "contrast") == [measured.replace(" of contrast", "")]


def test_an_untrained_run_scores_exactly_like_the_scratch_baseline_of_its_seed(place: Path, tmp_path: Path) -> None:
    """The baseline is fitted as a run is: the same labels, the same head, the same features."""
    out = adapt.run(
        weights="scratch",
        store=place / "store",
        labels=place / "labels.json",
        task="segment",
        mode="probe",
        out=tmp_path / "untrained",
        budget=1,
        settings={"like": str(place / "weights"), "seed": 1},
    )
    run = read_run(out)
    store = Store.open(place / "store")
    contest = contest_of(run, store, read_truth(store, place / "labels.json", run.task, SPEC))
    model = adapt.load(run.weights)
    mine = contest.score(run.head, embedder(model, store, tmp_path / "a", tokens=True))
    again = contest.fit_and_score(embedder(model.scratch(seed=1), store, tmp_path / "b", tokens=True))
    assert mine == again


def all_of(place: Path, task: Classify | Segment, labels: str) -> evaluate.Contest:
    store = Store.open(place / "store")
    truth = read_truth(store, place / labels, task, SPEC)
    return evaluate.Contest(
        store=store,
        truth=truth,
        task=task,
        mode="probe",
        classes=truth.classes,
        labelled=(),
        tested=truth.of("test"),
        seed=0,
    )


def test_label_efficiency_is_shown_for_every_budget_and_contestant(place: Path) -> None:
    contest = all_of(place, Segment(iterations=20, tokens=800), "labels.json")
    made: list[str] = []

    def bright() -> FeaturesOf:
        made.append("bright")
        return evaluate.intensity_features(contest.store, SPEC, (32.0, 32.0, 32.0))

    def blind() -> FeaturesOf:
        def features(key: str) -> Intensity:
            seen = intensity(contest.store.volume(key), SPEC, token_mm=(32.0, 32.0, 32.0))
            assert seen.tokens is not None
            return dataclasses.replace(seen, tokens=np.zeros_like(seen.tokens))

        return features

    scores = evaluate.few_label_table(
        contest,
        {"intensity": [bright], "scratch": [blind, blind]},
        task="segment",
        budgets=(1, 3),
        draws=2,
        atlas=SPEC,
    )
    assert [
        (score.name, score.budget, score.labelled, score.repeats) for score in scores if score.metric == "dice"
    ] == [
        ("intensity", 1, 1, 2),
        ("scratch", 1, 1, 4),
        ("atlas", 1, 1, 2),
        ("intensity", 3, 3, 2),
        ("scratch", 3, 3, 4),
        ("atlas", 3, 3, 2),
    ]
    assert made == ["bright"]
    assert scores[0].value.estimate > scores[1].value.estimate
    assert scores[0].over_scratch is not None
    assert scores[0].over_scratch.low is not None
    assert scores[0].over_scratch.low > 0


def test_two_test_subjects_get_their_own_figures_and_no_interval(place: Path) -> None:
    contest = all_of(place, Segment(), "labels.json")
    subjects = sorted({record.subject for record in contest.tested})[:2]
    own = {subjects[0]: ({"liver": 0.5},), subjects[1]: ({"liver": 0.7},)}
    score, surface = evaluate.table_of(contest, {"run": own}, task="segment", budget=1)
    assert (score.metric, surface.metric) == ("dice", "nsd")
    assert score.value.note == "n=2, no interval"
    assert score.each == (0.5, 0.7)
    assert score.parts["liver"].low is None


def test_leakage_is_found_by_subject_by_scan_and_by_voxels(place: Path) -> None:
    store = Store.open(place / "store")
    train = next(record for record in store if record.split == "train")
    test = next(record for record in store if record.split == "test")
    evaluate.check_leakage(store, [train], [test])
    for changes, word in (
        ({"subject": train.subject}, "1 of the test subjects"),
        ({"key": train.key}, "1 of the test scans"),
        ({"voxels": train.voxels}, "voxel for voxel"),
    ):
        with pytest.raises(AuditError, match=word):
            evaluate.check_leakage(store, [train], [replace(test, **changes)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(AuditError, match="also trained on"):
        evaluate.check_leakage(store, [test], [test])


def test_a_store_without_test_subjects_is_refused(place: Path, tmp_path: Path) -> None:
    rows = (place / "contrast.csv").read_text().splitlines()
    store = Store.open(place / "store")
    train = set(store.subjects("train"))
    kept = [rows[0], *(row for row in rows[1:] if pseudonym(row.split(",")[0], site_key()) in train)]
    (tmp_path / "labels.csv").write_text("\n".join(kept) + "\n")
    with pytest.raises(AuditError, match="no held-out test subject"):
        evaluate.run([place / "contrast"], store=place / "store", labels=tmp_path / "labels.csv", out=tmp_path / "out")
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_another_store_is_refused(place: Path, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", fractions=Fractions(train=0.6, validation=0.0, test=0.4))
    for seed in range(5):
        study = phantom(PhantomConfig(seed=seed, spacing_mm=(12.0, 12.0, 12.0)))
        write(store, replace(study, subject=pseudonym(study.subject, site_key())))
    with pytest.raises(ConfigError, match="have no CT scan in the store"):
        evaluate.run([place / "contrast"], store=store.path, labels=place / "contrast.csv", out=tmp_path / "out")


def test_no_run_and_what_is_no_run_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one run was named twice"):
        evaluate.run(
            [place / "contrast", place / "a" / ".." / "contrast"],
            store=place / "store",
            labels=place / "contrast.csv",
            out=tmp_path,
        )
    with pytest.raises(ConfigError, match="no run"):
        evaluate.run([], store=place / "store", labels=place / "contrast.csv", out=tmp_path)
    with pytest.raises(ConfigError, match="not a finished run"):
        evaluate.run([place / "weights"], store=place / "store", labels=place / "contrast.csv", out=tmp_path)


def test_a_u_net_from_scratch_stands_beside_every_segmentation_and_is_trained_once(place: Path, tmp_path: Path) -> None:
    where = {"store": place / "store", "labels": place / "labels.json", "out": tmp_path / "report", "config": QUICK}
    found = evaluate.run([place / "organs"], **where)  # pyright: ignore[reportArgumentType]
    (cost,) = [one for one in found.costs if one.name == "unet"]
    assert "2 steps" in cost.what
    assert cost.seconds is not None
    (rests,) = (tmp_path / "report" / "baselines").iterdir()
    before = rests.stat().st_mtime_ns
    again = evaluate.run([place / "organs"], **where)  # pyright: ignore[reportArgumentType]
    assert rests.stat().st_mtime_ns == before
    assert again.scores == found.scores
    assert [(pair.one, pair.other) for pair in found.compared] == [("organs", "unet")] * 2
    html = (tmp_path / "report" / "index.html").read_text()
    assert "What it took" in html
    assert "M parameters, 2 steps" in html
    assert CAVEAT in html


def test_no_steps_are_no_u_net_and_the_page_says_so(place: Path, tmp_path: Path) -> None:
    out, none = tmp_path / "report", evaluate.EvaluateConfig(unet_steps=0)
    found = evaluate.run([place / "organs"], store=place / "store", labels=place / "labels.json", out=out, config=none)
    assert "unet" not in {score.name for score in found.scores}
    (line,) = [line for line in found.checked if line.startswith("U-Net")]
    assert "NOT MEASURED: 0 steps" in line
    html = (out / "index.html").read_text()
    assert line.replace("'", "&#x27;") in html
    assert CAVEAT not in html


def test_a_store_that_pretraining_saw_is_held_against_the_test_subjects(place: Path, tmp_path: Path) -> None:
    where = {"store": place / "store", "labels": place / "contrast.csv", "out": tmp_path / "report"}
    tested = Store.open(place / "store").subjects("test")
    pools = {}
    for name, wanted in (("clean", False), ("dirty", True)):
        pool = Store.create(tmp_path / name, fractions=Fractions(train=1.0, validation=0.0, test=0.0))
        for seed in range(14):
            study = phantom(PhantomConfig(seed=seed, spacing_mm=(12.0, 12.0, 12.0)))
            subject = pseudonym(study.subject, site_key())
            if (subject in tested) == wanted:
                write(pool, replace(study, subject=subject))
        pools[name] = evaluate.EvaluateConfig(pretrained_on=(pool.path,), nested="never")
    with pytest.raises(AuditError, match=f"the pretraining saw what is tested on: {len(tested)} subjects"):
        evaluate.run([place / "contrast"], **where, config=pools["dirty"])  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "report" / "evaluation.json").exists()
    found = evaluate.run([place / "contrast"], **where, config=pools["clean"])  # pyright: ignore[reportArgumentType]
    assert found.exposure["contrast"].tested is not None
    assert not found.exposure["contrast"].tested.found
    written = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert written["exposure"]["contrast"]["tested"]["subjects"] == 0
    assert not found.crossed


def test_pretraining_that_nobody_named_is_not_measured_on_page_and_in_json(place: Path, tmp_path: Path) -> None:
    adapted = read_run(place / "contrast")
    card = Card(architecture=ARCHITECTURE, spec=SPEC, trained=("block",), data=("9 CT scans",))
    model = make_model(card, seed=0)
    write_weights(tmp_path / "weights", model.backbone.state_dict(), card)
    run = adapt.run(
        weights=tmp_path / "weights",
        store=place / "store",
        labels=place / "contrast.csv",
        task=adapted.config.task,
        mode="probe",
        out=tmp_path / "pretrained",
        budget=2,
    )
    out = tmp_path / "report"
    found = evaluate.run([run], store=place / "store", labels=place / "contrast.csv", out=out)
    assert found.exposure["pretrained"].state == "unknown"
    assert "leakage_pretraining" in json.loads((out / "evaluation.json").read_text())["not_measured"]
    assert "name it with --pretrained-on" in (out / "index.html").read_text()
    # Fewer than twenty are tested: everybody is cross-fitted too.
    (crossed,) = found.crossed
    assert crossed.subjects == 14
    assert "Cross-fitted over all labelled subjects" in (out / "index.html").read_text()
