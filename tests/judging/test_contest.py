from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelstem import adapt, evaluate
from voxelstem.adapted import Adapted, read_run
from voxelstem.aligned import read_aligned
from voxelstem.backbones.text import TowerConfig
from voxelstem.card import Card, write_weights
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.heads.survival import Watched, kaplan_meier
from voxelstem.judging.contest import Contest, Vector, mode_of, once, radiomics_features, remembered, zeroshot_baselines
from voxelstem.model import make_model
from voxelstem.objectives.siglip import Siglip, SiglipConfig
from voxelstem.prompts import read_prompts
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.store import Fractions, Store, write
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.study import InputSpec, LabelMap, Provenance, Study, Survival, Volume
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.retrieve import Retrieve
from voxelstem.tasks.survive import Survive
from voxelstem.tasks.zeroshot import Zeroshot
from voxelstem.truth import Truth, read_truth

SPEC = InputSpec(spacing_mm=(12.0, 12.0, 12.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))
ARCHITECTURE = {
    "name": "scan_vit",
    "block_ijk": (16, 16, 16),
    "block.dim": 24,
    "block.depth": 1,
    "block.heads": 2,
    "scan.dim": 24,
    "scan.depth": 1,
    "scan.heads": 2,
}
FRACTIONS = Fractions(train=0.0, validation=0.5, test=0.5)


def aligned_weights(folder: Path) -> Path:
    """Weights that were never trained, with heads and the packaged text tower."""
    card = Card(architecture=ARCHITECTURE, spec=SPEC, trained=("block", "scan"), licence="cc-by-nc-4.0")
    model = make_model(card, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = SiglipConfig(text=TowerConfig(), hidden=16, bottleneck=8, out=12)
        extras, texts = Siglip(config, model.backbone).beside()
    write_weights(folder, model.backbone.state_dict(), card, extras, texts)
    return folder


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here share one site key, because they share one store."""
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of coarse phantoms, tables of what is true of them, and aligned weights."""
    folder = tmp_path_factory.mktemp("contest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        store = Store.create(folder / "store", fractions=FRACTIONS)
        findings, sides = [("subject", "contrast", "spleen enlarged")], [("subject", "label")]
        for seed in range(20):
            study = phantom(
                PhantomConfig(seed=seed, spacing_mm=(12.0, 12.0, 12.0), phase="portal" if seed % 2 else "none")
            )
            write(store, replace(study, subject=pseudonym(study.subject, site_key())))
            spleen = "" if seed == 3 else str(int(study.labels["spleen"] == "enlarged"))
            findings.append((study.subject, study.labels["contrast"], spleen))
            sides.append((study.subject, "Contrast" if seed % 2 else "spleen_enlarged"))
        for name, rows in (("findings.csv", findings), ("one.csv", sides)):
            with (folder / name).open("w", newline="") as file:
                csv.writer(file).writerows(rows)
        aligned_weights(folder / "weights")
    return folder


def asked(place: Path, out: Path, **changes: object) -> Path:
    usual = {
        "weights": place / "weights",
        "store": place / "store",
        "labels": place / "findings.csv",
        "task": "zeroshot",
        "mode": "prompts",
        "out": out / "run",
        "settings": {"head.prompts": "phantom"},
    }
    return adapt.run(**(usual | changes))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def calibrated(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        return asked(place, tmp_path_factory.mktemp("calibrated"), mode="calibrated")


def test_prompts_need_no_label_and_ask_for_the_whole_set(place: Path, tmp_path: Path) -> None:
    read = read_run(asked(place, tmp_path, labels=None))
    said = read_prompts("phantom")
    assert read.head.classes == said.classes
    assert (read.labelled, read.subjects) == ((), ())
    assert read.head.facts["prompts_sha256"] == said.sha256
    assert read_aligned(read.weights).out == 12


def test_calibration_learns_from_validation_subjects_and_no_others(place: Path, calibrated: Path) -> None:
    read = read_run(calibrated)
    store = Store.open(place / "store")
    assert read.labelled
    assert {store.record(key).split for key in read.labelled} == {"validation"}
    assert read.head.classes == ("spleen_enlarged", "contrast")
    assert read.head.facts["uncalibrated"] == 0.0


def test_a_calibrated_run_stands_beside_untrained_networks_intensities_and_shares(
    place: Path, calibrated: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    found = evaluate.run([calibrated], store=place / "store", labels=place / "findings.csv", out=out)
    by_name = {score.name: score for score in found.scores if score.metric == "auroc"}
    assert list(by_name) == ["run", "scratch", "intensity", "majority"]
    assert by_name["majority"].value.estimate == 0.5
    assert by_name["scratch"].repeats == evaluate.INITS
    assert by_name["intensity"].value.estimate > 0.5
    assert set(by_name["run"].parts) == {"contrast", "spleen_enlarged"}
    assert {score.metric for score in found.scores} == set(Zeroshot.metrics)
    assert all(score.value.low is not None for score in found.scores if score.metric == "ece")
    (one,) = found.asked
    said = read_prompts("phantom")
    assert (one["prompts"], one["version"], one["sha256"]) == ("phantom", said.version, said.sha256)
    assert one["pool"] == found.test_scans
    assert one["calibrated_on"] == len(read_run(calibrated).subjects)
    html = (out / "index.html").read_text()
    assert said.sha256 in html
    assert f"{one['pool']} test scans of {one['subjects']} subjects" in html
    assert json.loads((out / "evaluation.json").read_text())["asked"][0]["sha256"] == said.sha256


def test_prompts_alone_stand_beside_untrained_networks_only(place: Path, tmp_path: Path) -> None:
    run = asked(place, tmp_path)
    found = evaluate.run([run], store=place / "store", labels=place / "findings.csv", out=tmp_path / "report")
    assert {score.name for score in found.scores} == {"run", "scratch"}
    assert {score.labelled for score in found.scores} == {0}


def test_a_file_of_prompts_that_was_changed_between_two_runs_has_other_baselines(place: Path, tmp_path: Path) -> None:
    runs, alone, mine = [], [], tmp_path / "mine.toml"
    for number, (there, gone) in enumerate([("Contrast was given.", "No contrast."), ("A cat.", "A tree in May.")]):
        mine.write_text(
            f'name = "mine"\nversion = {number + 1}\nlanguage = "en"\nabout = "-"\n'
            f'[contrast]\npositive = ["{there}"]\nnegative = ["{gone}"]\n'
        )
        labels = tmp_path / "contrast.csv"
        rows = (place / "findings.csv").read_text().splitlines()
        labels.write_text("\n".join(row.rpartition(",")[0] for row in rows) + "\n")
        usual = {"labels": labels, "settings": {"head.prompts": str(mine)}}
        run = asked(place, tmp_path / f"run{number}", **usual)
        runs.append(run.rename(run.with_name(f"run-{number}")))
        alone.append(_eces(place, labels, runs[-1:], tmp_path / f"alone{number}"))
    assert alone[0] != alone[1]
    assert _eces(place, labels, runs, tmp_path / "both") == alone[0] + alone[1]


def _eces(place: Path, labels: Path, runs: list[Path], out: Path) -> list[float]:
    found = evaluate.run(runs, store=place / "store", labels=labels, out=out)
    return [score.value.estimate for score in found.scores if (score.name, score.metric) == ("scratch", "ece")]


def test_one_of_several_is_answered_and_judged(place: Path, tmp_path: Path) -> None:
    settings = {"head.prompts": "phantom", "head.answers": "one"}
    run = asked(place, tmp_path, labels=place / "one.csv", mode="calibrated", settings=settings)
    found = evaluate.run([run], store=place / "store", labels=place / "one.csv", out=tmp_path / "report")
    assert [score.name for score in found.scores if score.metric == "f1"] == ["run", "scratch", "intensity", "majority"]
    (one,) = found.asked
    assert sum(one["classes"].values()) == found.test_subjects


def test_an_untrained_network_answers_through_the_trained_heads(place: Path, calibrated: Path, tmp_path: Path) -> None:
    run = read_run(calibrated)
    store, space = Store.open(place / "store"), read_aligned(run.weights)
    contest = contest_of(place, run)
    found = zeroshot_baselines(contest, run.head, space, tmp_path / "features")
    drawn = dataclasses.replace(space, model=space.model.scratch(seed=1))
    features = adapt.projector(drawn, store, tmp_path / "again")
    mine = contest.score(contest.calibrated(run.head, features), features)
    assert {subject: outcomes[1] for subject, outcomes in found["scratch"].items()} == mine
    np.testing.assert_array_equal(
        contest.calibrated(run.head, features).arrays["positive"], run.head.arrays["positive"]
    )


def contest_of(place: Path, run: Adapted) -> Contest:
    store = Store.open(place / "store")
    truth = read_truth(store, place / "findings.csv", run.task, SPEC)
    by_key = {record.key: record for record in truth.records}
    return Contest(
        store=store,
        truth=truth,
        task=run.task,
        mode=run.config.mode,
        classes=run.head.classes,
        labelled=tuple(by_key[key] for key in run.labelled),
        tested=truth.of("test"),
        seed=0,
    )


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"labels": None, "mode": "calibrated"}, ConfigError, "mode calibrated learns from labels"),
        ({"budget": 3}, ConfigError, "learns from no labels"),
        ({"settings": {"head.prompts": "phantm"}}, ConfigError, "did you mean 'phantom'"),
        ({"settings": {"head.prompts": "phantom", "head.classes": ["spleen"]}}, ConfigError, "no class of the prompt"),
        ({"weights": "scratch"}, ConfigError, "an untrained network has no words"),
        ({"settings": {"head.prompts": "phantom", "commercial": True}}, ConfigError, "cc-by-nc-4.0"),
        ({"task": "classify", "mode": "knn", "labels": None, "settings": None}, ConfigError, "learns from labels"),
    ],
)
def test_wrong_use_is_one_clear_sentence(
    place: Path, tmp_path: Path, changes: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        asked(place, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_weights_that_read_no_report_are_refused(place: Path, tmp_path: Path) -> None:
    model = make_model(Card(architecture=ARCHITECTURE, spec=SPEC), seed=0)
    write_weights(tmp_path / "plain", model.backbone.state_dict(), model.card)
    with pytest.raises(CheckpointError, match="not aligned with reports"):
        asked(place, tmp_path, weights=tmp_path / "plain")


def test_features_that_are_remembered_are_computed_once() -> None:
    calls: list[str] = []
    recall = remembered(calls.append)  # pyright: ignore[reportArgumentType]
    assert [recall("a"), recall("a"), recall("b")] == [None, None, None]
    assert calls == ["a", "b"]
    assert once({"s": 1}) == {"s": (1,)}


@pytest.mark.parametrize("task", [Survive(), Survive(kind="hazard")])
def test_the_floor_of_survival_is_the_labelled_subjects_curve_for_everybody(place: Path, task: Survive) -> None:
    store = Store.open(place / "store")
    records = list(store)
    told = {r.subject: Survival(time=1.0 + at % 7, event=at % 3 > 0) for at, r in enumerate(records)}
    contest = Contest(
        store=store,
        truth=Truth(records=tuple(records), labels={}, classes=(), survival=told),
        task=task,
        mode="probe",
        classes=(),
        labelled=tuple(records[:12]),
        tested=tuple(records[12:]),
        seed=0,
    )
    outcomes = contest.kaplan_meier()
    assert set(outcomes) == {record.subject for record in records[12:]}
    curve = kaplan_meier(Watched.of(told[record.subject] for record in records[:12]))
    for subject, outcome in outcomes.items():
        assert outcome.risk == 0
        assert outcome.truth == told[subject]
        assert set(outcome.chances) <= {1.0, *curve.value.tolist()}
    assert [task.statistic(name)(list(outcomes.values())) for name in ("harrell_c", "uno_c")] == [0.5, 0.5]


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Truth]:
    """Thirty-two scans of noise with a block in each; who has a large one is ill, and nothing else tells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        store = Store.create(tmp_path_factory.mktemp("lesions") / "store", fractions=FRACTIONS)
        rng, told = np.random.default_rng(0), {}
        for at in range(32):
            side = 4 + at % 8
            mask = np.zeros((20, 20, 20), dtype=np.int16)
            mask[4 : 4 + side, 4:12, 5:11] = 1
            volume = Volume(
                array=rng.normal(rng.normal(0, 30), 20, size=(1, 20, 20, 20)).astype(np.float32),
                affine_ras=np.diag([2.0, 2.0, 2.0, 1.0]),
                modality="CT",
                provenance=Provenance(source_format="phantom", sha256=f"{at:064d}", orientation="RAS"),
                labels=LabelMap(array=mask, classes={1: "lesion"}),
            )
            sizes = {"lungs": rng.normal(4e6, 6e5), "liver": rng.normal(1.5e6, 2e5), "lesion": side * 48 * 8}
            subject = pseudonym(f"s{at}", site_key())
            facts = {f"volume:{name}": f"{size:.6g}" for name, size in sizes.items()}
            write(store, Study(subject=subject, volumes=(volume,), labels=facts))
            told[subject] = "ill" if side > 7 else "well"
    return store, Truth(records=tuple(store), labels=told, classes=("ill", "well"))


@pytest.mark.parametrize(
    ("task", "mode"),
    [(Classify(), "probe"), (Classify(), "knn"), (Classify(), "attention"), (Retrieve(), "knn"), (Retrieve(), "probe")],
)
def test_the_lesions_size_alone_decides_and_radiomics_and_morphometry_find_it(
    lesions: tuple[Store, Truth], task: Classify | Retrieve, mode: str
) -> None:
    store, truth = lesions
    records = sorted(truth.records, key=lambda record: record.key)
    contest = Contest(
        store=store,
        truth=truth,
        task=task,
        mode=mode,
        classes=truth.classes,
        labelled=tuple(records[:20]),
        tested=tuple(records[20:]),
        seed=0,
    )
    told = radiomics_features(store, records, "lesion")
    assert told is not None
    sizes = contest.morphometry()
    assert sizes is not None
    figure = task.statistic(task.metrics[0])
    assert figure(list(contest.fit_and_score(told, parts=False).values())) > (
        0.75 if task.metrics[0] == "precision_at_k" else 0.85
    )
    assert figure(list(sizes.values())) > 0.7

    # The naive twin: rows standardised by hand, by the labelled scans.
    rows = {record.key: told(record.key).scan for record in records}
    seen = np.stack([rows[record.key] for record in records[:20]])
    middle, spread = seen.mean(axis=0), seen.std(axis=0)
    by_hand = {
        key: [(a - m) / s if s > 1e-9 * abs(m) else 0.0 for a, m, s in zip(row, middle, spread, strict=True)]
        for key, row in rows.items()
    }
    twin = contest.fit_and_score(lambda key: Vector(scan=np.array(by_hand[key])), parts=False)
    mine = contest.fit_and_score(told, parts=False)
    for subject, outcome in twin.items():
        scores = [one.shares if task.metrics[0] == "precision_at_k" else one.scores for one in (outcome, mine[subject])]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_values_without_parts_are_fitted_in_the_usual_mode_where_a_run_attends_to_parts() -> None:
    assert mode_of(Classify(), "attention", parts=True) == "attention"
    assert mode_of(Classify(), "attention", parts=False) == "probe"
    assert mode_of(Classify(), "knn", parts=False) == "knn"
    assert mode_of(Classify(), "full", parts=True) == "probe"


def test_where_a_scan_lacks_a_feature_there_is_no_radiomics(
    lesions: tuple[Store, Truth], caplog: pytest.LogCaptureFixture
) -> None:
    store, truth = lesions
    assert radiomics_features(store, truth.records[:1], "spleen") is None
    assert "no radiomics baseline" in caplog.text
