"""Heads over many classes: what they learn, and the whole way from a label file to findings and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fewlabelled import make_store, make_weights

from voxelstem import adapt, evaluate
from voxelstem.adapted import read_run
from voxelstem.answers import Answer
from voxelstem.certainty.assurance import assure
from voxelstem.embedding import Embedding
from voxelstem.errors import AuditError
from voxelstem.findings import Weights
from voxelstem.heads.attending import AttendConfig
from voxelstem.heads.manylabels import about, answers_each, asks_each, balanced_loss, truths
from voxelstem.metrics import averaged, bootstrap_interval
from voxelstem.predict import Predictor
from voxelstem.protocols import Example
from voxelstem.sources.phantom import PhantomConfig, phantom
from voxelstem.tasks.classify import Classify

CLASSES = ("cyst", "stone", "gas")
QUICK = Classify(attention=AttendConfig(steps=60))


def patients(count: int, *, seed: int = 0, unknown: float = 0.25, blocks: int = 4) -> list[Example]:
    """Each class has a direction of its own, in one block of a scan; a class is there whatever the others are."""
    rng = np.random.default_rng(seed)
    made: list[Example] = []
    for place in range(count):
        there = rng.random(3) < (0.5, 0.3, 0.6)
        rows = rng.normal(size=(blocks, 8)).astype(np.float32)
        rows[rng.integers(blocks), :3] += 6.0 * there
        told = {name: bool(yes) for name, yes in zip(CLASSES, there, strict=True) if rng.random() >= unknown}
        made.append(
            Example(
                subject=f"s{place:03d}",
                key=f"k{place}",
                features=Embedding(
                    scan=rows.mean(axis=0),
                    blocks=rows,
                    grid=(blocks, 1, 1),
                    coverage=1.0,
                ),
                affine_ras=np.eye(4),
                findings=told or {"cyst": bool(there[0])},
            )
        )
    return made


def scored(task: Classify, mode: str, *, train: Sequence[Example], test: Sequence[Example]) -> list[Answer]:
    head = task.fit(train, CLASSES, mode=mode, seed=0)
    assert answers_each(head)
    return [task.outcome(head, example) for example in test]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("mode", Classify.modes)
def test_every_class_is_told_from_its_absence_whatever_the_others_are(mode: str) -> None:
    outcomes = scored(QUICK, mode, train=patients(60), test=patients(80, seed=1))
    for name in CLASSES:
        assert QUICK.statistic(f"auroc:{name}")(outcomes) > 0.8
    assert QUICK.statistic("auroc")(outcomes) == pytest.approx(
        np.mean([QUICK.statistic(f"auroc:{name}")(outcomes) for name in CLASSES])
    )
    assert QUICK.statistic("balanced_accuracy")(outcomes) > 0.65
    assert not np.allclose([sum(one.scores) for one in outcomes], 1.0)


@pytest.mark.parametrize("mode", ["knn", "probe"])
def test_a_class_by_itself_is_the_head_of_yes_and_no_fitted_to_whom_it_is_known_of(mode: str) -> None:
    """The naive twin: a file for each class, and a run for each file."""
    train, test = patients(40), patients(10, seed=1)
    answers = scored(QUICK, mode, train=train, test=test)
    for at, name in enumerate(CLASSES):
        known = about(train, name)
        assert 0 < len(known) < len(train)
        alone = QUICK.fit(known, ("no", "yes"), mode=mode, seed=0)
        for one, example in zip(answers, test, strict=True):
            assert one.scores[at] == pytest.approx(QUICK.answer(alone, example.features)[1], abs=1e-9)


@pytest.mark.parametrize("mode", ["knn", "probe"])
def test_what_nobody_knows_changes_nothing_of_a_class(mode: str) -> None:
    """Subjects of whom only the gas is known may say of it what they like: the cysts' head does not hear of it."""
    train, test = patients(40, unknown=0.0), patients(5, seed=1)
    more = [replace(one, subject=f"x{one.subject}", findings={"gas": True}) for one in patients(10, seed=2)]
    few, many = (scored(QUICK, mode, train=some, test=test) for some in (train, [*train, *more]))
    for one, two in zip(few, many, strict=True):
        assert one.scores[:2] == pytest.approx(two.scores[:2], abs=1e-12)
    assert any(one.scores[2] != two.scores[2] for one, two in zip(few, many, strict=True))


def test_a_class_that_all_or_nobody_show_is_named() -> None:
    train = patients(20, unknown=0.0)
    same = [replace(one, findings={**(one.findings or {}), "stone": True}) for one in train]
    for mode in Classify.modes:
        with pytest.raises(ValueError, match="of 'stone' all say yes"):
            QUICK.fit(same, CLASSES, mode=mode, seed=0)
    with pytest.raises(ValueError, match="of 'bone' nobody says anything"):
        truths(train, ("cyst", "bone"))


def test_labels_of_one_class_are_not_taken_for_many() -> None:
    train = patients(4)
    assert asks_each(train)
    assert not asks_each(about(train, "cyst"))
    assert not asks_each([*train, *about(train, "cyst")])


def test_the_loss_of_attention_takes_the_weights_of_all_scans() -> None:
    import torch

    truth = truths(patients(30), CLASSES)
    loss, logits = balanced_loss(truth), torch.zeros(30, 3)
    parts = [loss(logits[rows], rows) * len(rows) for rows in np.array_split(np.arange(30), 4)]
    assert sum(part.item() for part in parts) / 30 == pytest.approx(math.log(2), rel=1e-5)


def test_figures_of_repeats_are_the_mean_of_the_repeats_figures() -> None:
    sample = scored(QUICK, "probe", train=patients(40), test=patients(12, seed=1))
    other = scored(QUICK, "knn", train=patients(40), test=patients(12, seed=1))
    pairs = {str(place): pair for place, pair in enumerate(zip(sample, other, strict=True))}
    for metric in Classify.metrics:
        statistic = QUICK.statistic(metric)
        both = bootstrap_interval(pairs, averaged(statistic))
        assert both.estimate == pytest.approx(np.mean([statistic(sample), statistic(other)]))


@pytest.fixture(autouse=True)
def one_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here share one site key, because they share one store."""
    monkeypatch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of phantoms, weights, and a table of two classes: contrast, and one that halves it otherwise."""
    folder = tmp_path_factory.mktemp("manylabels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXELSTEM_KEY", str(tmp_path_factory.getbasetemp() / "shared-site.key"))
        make_store(folder, 20)
    make_weights(folder)
    rows = [f"phantom-{n:04d},{n % 2},{'' if n % 5 == 4 else ('no', 'yes')[n % 4 // 2]}\n" for n in range(20)]
    (folder / "findings.csv").write_text("subject,contrast,other\n" + "".join(rows))
    return folder


def run_of(place: Path, out: Path, mode: str, **settings: Any) -> Path:
    return adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=place / "findings.csv",
        task="classify",
        mode=mode,
        out=out,
        settings={name.replace("__", "."): value for name, value in settings.items()},
    )


@pytest.mark.slow
def test_from_a_label_file_to_findings_and_a_table(place: Path, tmp_path: Path) -> None:
    run = run_of(place, tmp_path / "run", "probe")
    adapted = read_run(run)
    assert adapted.head.classes == ("contrast", "other")
    found = evaluate.run([run], store=place / "store", labels=place / "findings.csv", out=tmp_path / "report")
    names = {score.name for score in found.scores}
    assert {"run", "scratch", "intensity", "majority"} <= names
    (auroc,) = [score for score in found.scores if (score.name, score.metric) == ("run", "auroc")]
    assert set(auroc.parts) == {"contrast", "other"}
    assert auroc.value.estimate == pytest.approx(np.mean([part.estimate for part in auroc.parts.values()]))
    (blind,) = [score for score in found.scores if (score.name, score.metric) == ("majority", "auroc")]
    assert blind.value.estimate == 0.5
    (shift,) = found.prevalence
    assert set(shift.labelled) == {"contrast", "other"}
    assert "contrast" in (tmp_path / "report" / "index.html").read_text()
    said = Predictor(run).predict(phantom(PhantomConfig(seed=99, spacing_mm=(7.0, 7.0, 8.0)))).findings
    assert [(one.name, one.kind, one.answer in ("yes", "no")) for one in said.findings] == [
        ("contrast", "class", True),
        ("other", "class", True),
    ]
    assert all(one.certainty is not None and one.certainty.probability >= 0.5 for one in said.findings)


def test_auto_climbs_with_many_classes(place: Path, tmp_path: Path) -> None:
    settings = {"auto__rungs": ("knn", "probe"), "auto__repeats": 1, "auto__folds": 2, "auto__curve_repeats": 1}
    run = run_of(place, tmp_path / "run", "auto", **settings, auto__curve__draws=100)
    climb = json.loads((run / "auto.json").read_text())["climb"]
    assert climb["chosen"] in ("knn", "probe")
    assert answers_each(read_run(run).head)


def test_a_network_is_trained_on_many_classes(place: Path, tmp_path: Path) -> None:
    run = run_of(place, tmp_path / "run", "full", full__steps=2, full__held=0.3, full__looks=1)
    adapted = read_run(run)
    assert answers_each(adapted.head)
    said = Predictor(run).predict(phantom(PhantomConfig(seed=99, spacing_mm=(7.0, 7.0, 8.0)))).findings
    assert [one.name for one in said.findings] == ["contrast", "other"]


def test_folds_that_leave_a_class_unlearned_name_it(place: Path, tmp_path: Path) -> None:
    rows = (place / "findings.csv").read_text().splitlines()
    lone = [f"{row},{int(at == 1)}" for at, row in enumerate(rows[1:])]
    (tmp_path / "lone.csv").write_text("\n".join([f"{rows[0]},rare", *lone]) + "\n")
    with pytest.raises(AuditError, match="'rare"):
        adapt.run(
            weights=place / "weights",
            store=place / "store",
            labels=tmp_path / "lone.csv",
            task="classify",
            mode="knn",
            out=tmp_path / "run",
            settings={"folds": 2},
        )
    assert not (tmp_path / "run").exists()


def test_findings_say_yes_where_the_scored_answer_says_yes_whatever_the_calibration() -> None:
    """Of something rare the calibrated probability of a yes is below one half long after the answer is yes."""
    task, known = Classify(), patients(120, seed=3)
    rare = [replace(one, findings={"gas": place % 8 == 0}) for place, one in enumerate(known)]
    head = task.fit(rare, ("gas",), mode="probe", seed=0)
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.02, 0.98, 400)
    sure = assure(
        {
            f"s{at}": Answer(classes=("gas",), truth=(float(rng.random() < p / 4),), scores=(p,), thresholds=(0.5,))
            for at, p in enumerate(chance.tolist())
        },
        [],
    )
    assert sure.present("gas", 0.9).probability < 0.4
    weights = Weights(sha256="ab" * 32, name="w", licence="l")
    scored, said = set[bool](), set[bool]()
    for one in rare:
        outcome = task.outcome(head, one)
        assert isinstance(outcome, Answer)
        (finding,) = task.findings(head, one.features, weights, sure)
        yes = outcome.scores[0] >= outcome.thresholds[0]
        assert finding.answer == ("yes" if yes else "no")
        assert finding.certainty is not None
        there = sure.present("gas", outcome.scores[0]).probability
        assert finding.certainty.probability == pytest.approx(there if yes else 1 - there)
        scored.add(yes)
        said.add(finding.certainty.probability < 0.5)
    assert scored == said == {True, False}
