from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.fewlabelled import SPEC, make_store, make_weights

from voxelstem import adapt, evaluate
from voxelstem.adapted import AutoConfig, read_run, resolve
from voxelstem.auto import Labelled, allowed_rungs, rungs_of
from voxelstem.card import Card
from voxelstem.errors import AuditError, ConfigError
from voxelstem.features import embedder
from voxelstem.model import load, make_model
from voxelstem.store import Store
from voxelstem.store.subjects import pseudonym, site_key
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.segment import Segment
from voxelstem.truth import Truth


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        make_store(folder, count=24)
    make_weights(folder)
    return folder


def climbed(place: Path, out: Path, *, task: str, labels: str, **settings: object) -> Path:
    return adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / labels,
        task=task,
        mode="auto",
        out=out,
        settings={"auto.repeats": 2, "auto.folds": 3, **{name.replace("__", "."): v for name, v in settings.items()}},
    )


def test_the_run_is_that_of_the_mode_that_was_chosen_and_says_how(place: Path, tmp_path: Path) -> None:
    out = climbed(place, tmp_path / "run", task="classify", labels="contrast.csv", auto__rungs=("knn", "probe"))
    read, told = read_run(out), json.loads((out / "auto.json").read_text())
    assert read.config.mode == told["climb"]["chosen"]
    assert read.config.mode in ("knn", "probe")
    steps = told["climb"]["steps"]
    assert [step["mode"] for step in steps] == ["knn", "probe"][: len(steps)]
    assert all(step["seconds"] > 0 for step in steps)
    assert told["curve"]["recommendation"]
    assert told["curve"]["points"][0]["subjects"] < told["curve"]["points"][-1]["subjects"]
    page = (out / "index.html").read_text()
    assert "Ways to adapt, from cheap to dear" in page
    assert "What labels buy" in page
    assert "phantom-" not in page
    report = evaluate.run([out], store=place / "store", labels=place / "contrast.csv", out=tmp_path / "report")
    assert {"run", "scratch", "intensity", "majority"} <= {score.name for score in report.scores}


def test_nobody_who_is_tested_on_takes_part_in_the_choice(place: Path, tmp_path: Path) -> None:
    out = climbed(place, tmp_path / "run", task="classify", labels="contrast.csv", auto__rungs=("knn",))
    labels = (place / "contrast.csv").read_text().splitlines()
    read = read_run(out)
    # Turning the test subjects' labels round changes nothing.
    tested = {record.subject for record in Store.open(place / "store") if record.split == "test"}
    turned = [labels[0]]
    for line in labels[1:]:
        subject, label = line.split(",")
        other = {"yes": "no", "no": "yes"}[label]
        turned.append(f"{subject},{other if pseudonym(subject, site_key()) in tested else label}")
    (place / "turned.csv").write_text("\n".join(turned) + "\n")
    again = climbed(place, tmp_path / "again", task="classify", labels="turned.csv", auto__rungs=("knn",))
    one, other = (json.loads((run / "auto.json").read_text()) for run in (out, again))
    for told in (one, other):
        told["climb"].pop("seconds")
        for step in told["climb"]["steps"]:
            step.pop("seconds")
    assert one == other
    assert read.subjects == read_run(again).subjects


def test_a_network_is_trained_anew_for_every_fold_where_that_rung_is_asked_for(place: Path, tmp_path: Path) -> None:
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "labels.json",
        task="segment",
        mode="auto",
        out=tmp_path / "run",
        budget=3,
        settings={"auto.rungs": ("probe", "adapters"), "auto.repeats": 1, "auto.folds": 2, "full.steps": 2},
    )
    told = json.loads((out / "auto.json").read_text())
    assert [step["mode"] for step in told["climb"]["steps"]] == ["probe", "adapters"]
    assert read_run(out).config.mode in ("probe", "adapters")


def tuned_alone(place: Path, out: Path, **settings: object) -> dict[str, Any]:
    run = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "labels.json",
        task="segment",
        mode="auto",
        out=out,
        budget=4,
        settings={
            "auto.rungs": ("adapters",),
            "auto.repeats": 1,
            "auto.curve_repeats": 1,
            "auto.folds": 2,
            "full.steps": 1,
            **{name.replace("__", "."): value for name, value in settings.items()},
        },
    )
    return json.loads((run / "auto.json").read_text())


def test_a_mode_that_trains_networks_has_a_curve_where_there_is_time_for_it(place: Path, tmp_path: Path) -> None:
    told = tuned_alone(place, tmp_path / "run")
    assert told["curve_of"] == told["climb"]["chosen"] == "adapters"
    assert [point["subjects"] for point in told["curve"]["points"]] == [1, 2]
    hasty = tuned_alone(place, tmp_path / "hasty", auto__curve_minutes=0.0)
    assert hasty["curve"] is None
    assert hasty["why"].startswith("no curve: a curve of adapters would train 4 networks, about 0 minutes")


def test_a_fold_on_which_a_network_cannot_be_trained_costs_that_rung_and_not_the_run(
    place: Path, tmp_path: Path
) -> None:
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "labels.json",
        task="segment",
        mode="auto",
        out=tmp_path / "run",
        budget=3,
        # Of the two subjects that a fold leaves a fifth is nobody.
        settings={"auto.rungs": ("probe", "full"), "auto.repeats": 1, "auto.folds": 3, "full.held": 0.2},
    )
    probe, full = json.loads((out / "auto.json").read_text())["climb"]["steps"]
    assert (probe["taken"], full["taken"]) == (True, False)
    assert full["why"] == "in one of the folds nothing could be learned: full.held=0.2 of 2 labelled subjects is nobody"
    assert full["why"] in (out / "index.html").read_text()
    assert read_run(out).config.mode == "probe"


def test_a_curve_on_whose_draws_a_network_cannot_be_trained_is_left_out(place: Path, tmp_path: Path) -> None:
    told = tuned_alone(place, tmp_path / "run", full__held=0.4)
    assert told["climb"]["chosen"] == "adapters"
    assert told["curve"] is None
    assert told["why"] == "no curve: full.held=0.4 of 1 labelled subjects is nobody"


def test_rungs_that_the_settings_do_not_allow_are_left_out_before_anything_is_tried(
    place: Path, tmp_path: Path
) -> None:
    who = [line.split(",")[0] for line in (place / "contrast.csv").read_text().splitlines()[1:]]
    rows = [f"{one},{9 + 7 * at},{int(at % 3 > 0)}" for at, one in enumerate(who)]
    (place / "times.csv").write_text("\n".join(["subject,time,event", *rows]) + "\n")
    settings = {"head__kind": "hazard", "head__by_interval": True, "head__intervals": 2}
    with pytest.raises(ConfigError, match="one risk for all intervals"):
        climbed(place, tmp_path / "no", task="survive", labels="times.csv", auto__rungs=("probe", "full"), **settings)
    config = resolve("survive", "auto", budget=None, settings={"head.kind": "hazard", "head.by_interval": True})
    model, store = load(place / "weights"), Store.open(place / "store")
    truth = Truth(records=(), labels={}, classes=())
    what = Labelled(model=model, store=store, truth=truth, records=(), classes=())
    modes, left_out = allowed_rungs(what, config)
    assert modes == ["knn", "probe", "attention"]
    assert set(left_out) == {"adapters", "full"}
    assert "one risk for all intervals" in left_out["full"]
    plain = resolve("survive", "auto", budget=None, settings={"head.kind": "hazard"})
    assert allowed_rungs(what, plain) == (["knn", "probe", "attention", "adapters", "full"], {})


def test_voxel_tasks_hold_their_tokens_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def counted(*args: Any, tokens: bool, **settings: Any) -> Any:
        asked.append(tokens)
        return embedder(*args, tokens=tokens, **settings)

    monkeypatch.setattr("voxelstem.auto.embedder", counted)
    adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "labels.json",
        task="segment",
        mode="auto",
        out=tmp_path / "run",
        budget=3,
        settings={"auto.rungs": ("probe",), "auto.repeats": 1, "auto.curve_repeats": 1, "auto.folds": 3, "folds": 0},
    )
    assert asked == [True]


def test_rungs_go_from_cheap_to_dear_and_a_network_of_convolutions_has_no_adapters(place: Path) -> None:
    vit = load(place / "weights")
    unet = make_model(
        Card(
            architecture={
                "name": "unet",
                "features": (4, 8),
                "depths": (1, 1),
                "strides": (1, 2),
                "block_ijk": (16,) * 3,
            },
            spec=SPEC,
        ),
        seed=0,
    )
    rungs = rungs_of(Classify(), vit)
    assert rungs[:2] == ["knn", "probe"]
    assert rungs[-2:] == ["adapters", "full"]
    assert "adapters" not in rungs_of(Segment(), unet)
    assert rungs_of(Segment(), unet)[-1] == "full"


def test_too_few_to_hold_anybody_out_is_said(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="cannot be cross-fitted"):
        adapt.run(
            weights=place / "weights",
            store=place / "store",
            labels=place / "contrast.csv",
            task="classify",
            mode="auto",
            out=tmp_path / "run",
            budget=2,
        )


def test_settings_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        AutoConfig(folds=1)
    with pytest.raises(ConfigError, match="zeroshot has no mode 'auto'"):
        resolve("zeroshot", "auto", budget=None, settings={})


def test_a_rung_that_is_not_there_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auto.rungs: 'attentoin' is no rung of classify"):
        climbed(place, tmp_path / "run", task="classify", labels="contrast.csv", auto__rungs=("knn", "attentoin"))


def test_several_contrasts_are_not_climbed_on(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one contrast"):
        climbed(place, tmp_path / "run", task="segment", labels="labels.json", full__contrasts=("T1w", "FLAIR"))
