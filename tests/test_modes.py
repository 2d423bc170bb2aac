"""Every task in every way that it can be adapted: from labels to a report and to findings of a scan that nobody saw."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.fewlabelled import QUICK, make_store, make_weights

from voxelstem import adapt, evaluate
from voxelstem.adapted import AUTO, TUNED, modes_of, read_run
from voxelstem.certainty.crossfit import scale_of
from voxelstem.findings import of_json, to_json
from voxelstem.predict import Predictor
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.tasks import TASKS

LABELS = {
    "classify": "contrast.csv",
    "retrieve": "contrast.csv",
    "regress": "ages.csv",
    "survive": "times.csv",
    "segment": "labels.json",
    "detect": "labels.json",
}
PAIRS = [(task, mode) for task in LABELS for mode in modes_of(TASKS[task])]
KINDS = {
    "classify": {"class"},
    "retrieve": {"class", "value"},
    "regress": {"value"},
    "survive": {"survival"},
    "segment": {"segment"},
    "detect": {"box"},
}
SLOW = {(task, mode) for task, mode in PAIRS if task in ("segment", "detect")} | {
    (task, mode) for task, mode in PAIRS if mode in TUNED
}
"""Those that train a network or label every voxel, and so do their baselines."""


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        make_store(folder, count=20)
        make_weights(folder)
        names = [row.split(",")[0] for row in (folder / "contrast.csv").read_text().splitlines()[1:]]
        ages = [f"{name},{40 + at}" for at, name in enumerate(names)]
        (folder / "ages.csv").write_text("\n".join(["subject,value", *ages]) + "\n")
        times = [f"{name},{5 + 3 * at},{int(at % 3 > 0)}" for at, name in enumerate(names)]
        (folder / "times.csv").write_text("\n".join(["subject,time,event", *times]) + "\n")
    return folder


def settings_of(task: str, mode: str) -> dict[str, object]:
    """What makes a run short; nothing else differs from what a user gets."""
    found: dict[str, object] = {"folds": 2}
    if mode in TUNED:
        found["full.steps"] = 2
    if mode == "attention" and task != "segment":
        found |= {"head.attention.steps": 20, "head.attention.few_steps": 5, "head.attention.most": 40}
    if task == "survive":
        found |= {"head.folds": 2, "head.intervals": 3}
    return found


def test_every_pair_of_the_table_is_here() -> None:
    asked = {name for name in TASKS if not getattr(TASKS[name], "aligned", False)}
    assert asked == set(LABELS)
    assert all(math.isfinite(scale_of(metric).best) for name in LABELS for metric in TASKS[name].metrics)


@pytest.mark.parametrize(
    ("task", "mode"),
    [pytest.param(*pair, marks=pytest.mark.slow if pair in SLOW else (), id="-".join(pair)) for pair in PAIRS],
)
def test_a_pair_is_adapted_judged_and_asked(
    place: Path, tmp_path: Path, task: str, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = place / LABELS[task]
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=labels,
        task=task,
        mode=mode,
        out=tmp_path / "run",
        budget=8,
        settings=settings_of(task, mode),
    )
    read = read_run(out)
    assert read.head.mode == mode
    assert len(read.subjects) == 8
    spent = json.loads((out / "adapt.json").read_text())["spent"]
    assert spent["seconds"] > 0
    assert spent["peak_gib"] > 0.05
    assert f"adapt: {task} by {mode}, " in capsys.readouterr().err
    found = evaluate.run([out], store=place / "store", labels=labels, out=tmp_path / "report", config=QUICK)
    own = {score.metric: score.value.estimate for score in found.scores if score.name == "run"}
    assert set(own) == set(TASKS[task].metrics)
    names = {score.name for score in found.scores}
    floors = {"survive": "kaplan_meier", "regress": "mean", "segment": "atlas", "detect": "atlas"}
    assert {"scratch", "intensity", floors.get(task, "majority")} <= names
    assert "phantom-" not in (tmp_path / "report" / "index.html").read_text()
    json.loads((tmp_path / "report" / "evaluation.json").read_text())
    study = phantom(PhantomConfig(seed=77, spacing_mm=(7.0, 7.0, 8.0), phase="portal"))
    said = Predictor(out).predict(replace(study, subject="somebody"))
    assert {one.kind for one in said.findings.findings} <= KINDS[task]
    assert said.findings.findings or task in ("segment", "detect")
    assert of_json(to_json(said.findings)) == said.findings


@pytest.mark.parametrize("kind", ["cox", "hazard"])
@pytest.mark.parametrize("mode", ["attention", pytest.param("full", marks=pytest.mark.slow)])
def test_both_kinds_of_survival_head_are_the_same_again_under_their_seed(
    place: Path, tmp_path: Path, kind: str, mode: str
) -> None:
    runs = [
        adapt.run(
            weights=place / "weights",
            store=place / "store",
            labels=place / "times.csv",
            task="survive",
            mode=mode,
            out=tmp_path / f"{at}",
            budget=8,
            settings=settings_of("survive", mode) | {"head.kind": kind},
        )
        for at in range(2)
    ]
    first, again = (read_run(run).head for run in runs)
    assert first.facts["kind"] == kind
    assert set(first.arrays) == set(again.arrays)
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


@pytest.mark.parametrize(("task", "rungs"), [("retrieve", ["knn", "probe"]), ("survive", ["knn", "probe"])])
def test_the_ladder_is_climbed_on_new_rungs(place: Path, tmp_path: Path, task: str, rungs: list[str]) -> None:
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / LABELS[task],
        task=task,
        mode=AUTO,
        out=tmp_path / "run",
        settings={"auto.rungs": rungs, "auto.folds": 2, "auto.repeats": 1, "auto.curve_repeats": 1},
    )
    told = json.loads((out / "auto.json").read_text())
    assert told["climb"]["chosen"] in rungs
    assert told["climb"]["metric"] == TASKS[task].metrics[0]
    assert all(step["seconds"] >= 0 for step in told["climb"]["steps"])
