from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tests.fewlabelled import make_store, make_weights

from voxelstem import adapt, metrics
from voxelstem.adapted import Adapted, read_run
from voxelstem.certainty.crossfit import answering, cross_fit, seed_of
from voxelstem.certainty.folds import USUAL, plan_folds, strata_of
from voxelstem.features import examples_of
from voxelstem.judging.contest import radiomics_features
from voxelstem.judging.entries import Entry, enter
from voxelstem.judging.nested import CHOSEN, NO_RADIOMICS, REPEATS, is_wanted, nested
from voxelstem.samepeople import same_people
from voxelstem.store import Store
from voxelstem.tasks.classify import Classify


@dataclass(frozen=True, kw_only=True)
class Plain:
    scan: np.ndarray
    tokens: None = None
    tokens_affine_ras: None = None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    with pytest.MonkeyPatch.context() as patch:
        key = tmp_path_factory.getbasetemp() / "nested.key"
        key.write_text("5a" * 32)  # always the same, and so are the splits
        patch.setenv("VOXELSTEM_KEY", str(key))
        make_store(folder, 20)
        make_weights(folder)
        adapt.run(
            weights=folder / "weights",
            store=folder / "store",
            labels=folder / "contrast.csv",
            task="classify",
            mode="probe",
            out=folder / "run",
        )
    return folder


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the draws: intervals are not what is tested here."""
    for name in ("bootstrap_interval", "paired_difference"):
        monkeypatch.setattr(f"voxelstem.metrics.{name}", partial(getattr(metrics, name), draws=100))


@pytest.fixture
def one(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Adapted, Entry]:
    monkeypatch.setenv("VOXELSTEM_KEY", str(place.parent / "nested.key"))
    adapted = read_run(place / "run")
    store = Store.open(place / "store")
    return adapted, enter(adapted, store, place / "contrast.csv", place / "features", commercial=False)


def test_every_labelled_subject_of_any_split_is_predicted_beside_the_baselines(
    place: Path, one: tuple[Adapted, Entry]
) -> None:
    adapted, entry = one
    found = nested("run", adapted, entry.contest, entry.model, place / "features")
    assert (found.subjects, found.folds, found.repeats, found.why) == (20, USUAL, REPEATS, "")
    assert [(line.name, line.metric) for line in found.scores] == [
        (name, metric)
        for metric in adapted.task.metrics
        for name in ("run", "scratch", "intensity", "radiomics", "majority")
    ]
    assert {line.value.subjects for line in found.scores} == {20}
    mine, scratch, bright = found.scores[:3]
    assert mine.over_scratch is not None
    assert mine.over_scratch.estimate == pytest.approx(mine.value.estimate - scratch.value.estimate)
    assert scratch.over_scratch is None
    assert bright.over_intensity is None
    assert mine.value.low is not None
    assert found.notes == ()
    floor = found.scores[4]
    assert (floor.name, floor.metric, floor.value.estimate) == ("majority", "auroc", 0.5)


def test_radiomics_and_the_floor_are_fitted_to_those_who_are_not_held_out(
    place: Path, one: tuple[Adapted, Entry]
) -> None:
    adapted, entry = one
    contest = replace(entry.contest, labelled=entry.contest.truth.records)
    told = radiomics_features(contest.store, contest.labelled, "")
    assert told is not None
    examples = list(examples_of(contest.store, contest.labelled, contest.truth, told, contest.task))
    together = same_people(contest.store, contest.labelled, place / "features")
    plan = plan_folds(strata_of(examples, contest.classes, together=together), count=USUAL, repeats=REPEATS, seed=0)
    rows = {example.subject: example.features.scan for example in examples}
    labels = contest.truth.labels
    radiomics, floor = [], []
    for repeat, folds in enumerate(plan):
        right: list[dict[str, list[bool]]] = [{}, {}]
        for fold, held in enumerate(folds.held):
            kept = [example for example in examples if example.subject not in held]
            seen = np.stack([rows[example.subject] for example in kept])
            middle, spread = seen.mean(axis=0), seen.std(axis=0)
            spread[spread < 1e-9 * np.abs(middle)] = np.inf
            seed = seed_of(seed_of(0, repeat, 0), 0, fold)
            plain = [replace(e, features=Plain(scan=(e.features.scan - middle) / spread)) for e in kept]
            head = Classify(prior=0.0).fit(plain, contest.classes, mode="probe", seed=seed)
            names = [labels[example.subject] for example in kept]
            most = max(contest.classes, key=names.count)
            for subject in held:
                scores = Classify().predict(head, (rows[subject] - middle) / spread)
                for said, into in zip((contest.classes[int(scores.argmax())], most), right, strict=True):
                    into.setdefault(labels[subject], []).append(said == labels[subject])
        for into, figures in zip(right, (radiomics, floor), strict=True):
            figures.append(np.mean([np.mean(told) for told in into.values()]))
    found = nested("run", adapted, entry.contest, entry.model, place / "features")
    by_name = {line.name: line.value.estimate for line in found.scores if line.metric == "balanced_accuracy"}
    assert by_name["radiomics"] == pytest.approx(np.mean(radiomics))
    assert by_name["majority"] == pytest.approx(np.mean(floor))


def test_of_a_run_whose_mode_was_chosen_it_says_that_the_folds_do_not_choose(
    place: Path, one: tuple[Adapted, Entry]
) -> None:
    adapted, entry = one
    chosen = replace(adapted, card=replace(adapted.card, chosen=True))
    found = nested("run", chosen, entry.contest, entry.model, place / "features")
    assert found.notes == (CHOSEN,)


def test_the_table_goes_on_without_radiomics_where_a_scan_has_none(
    place: Path, one: tuple[Adapted, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, entry = one

    def undefined(*_: object) -> None:
        raise ValueError("morph_elongation cannot be told of this region of 1 voxels")

    monkeypatch.setattr("voxelstem.baselines.radiomics", undefined)
    found = nested("run", adapted, entry.contest, entry.model, place / "features")
    assert {line.name for line in found.scores} == {"run", "scratch", "intensity", "majority"}
    assert found.notes == (NO_RADIOMICS,)


@pytest.mark.parametrize(
    ("task", "floor"), [("regress", "mean"), ("survive", "kaplan_meier"), ("retrieve", "majority")]
)
def test_every_scan_level_task_has_its_floor(
    place: Path, one: tuple[Adapted, Entry], task: str, floor: str, tmp_path: Path
) -> None:
    store = Store.open(place / "store")
    told = {
        "regress": ("subject,value", [f"{at}.5" for at in range(20)]),
        "survive": ("subject,time,event", [f"{3 + at % 9},{int(at % 3 > 0)}" for at in range(20)]),
        "retrieve": ("subject,label", ["no" if at % 2 else "yes" for at in range(20)]),
    }[task]
    ids = [line.split(",")[0] for line in (place / "contrast.csv").read_text().splitlines()[1:]]
    lines = [told[0], *(f"{name},{fact}" for name, fact in zip(ids, told[1], strict=True))]
    (tmp_path / "told.csv").write_text("\n".join(lines) + "\n")
    out = adapt.run(
        weights=place / "weights",
        store=place / "store",
        labels=tmp_path / "told.csv",
        task=task,
        mode="knn",
        out=tmp_path / "run",
    )
    adapted = read_run(out)
    entry = enter(adapted, store, tmp_path / "told.csv", place / "features", commercial=False)
    found = nested("run", adapted, entry.contest, entry.model, place / "features")
    assert found.why == ""
    by_name = {(line.name, line.metric): line.value.estimate for line in found.scores}
    assert {name for name, _ in by_name} == {"run", "scratch", "intensity", "radiomics", floor}
    assert ("mean", "r") not in by_name
    if task == "survive":
        assert by_name[floor, "harrell_c"] == 0.5
    if task == "retrieve":
        assert by_name[floor, "precision_at_k"] == pytest.approx(0.5, abs=0.05)


def test_the_figures_are_those_of_plain_cross_fitting_repeat_by_repeat(place: Path, one: tuple[Adapted, Entry]) -> None:
    adapted, entry = one
    contest = entry.contest
    examples = list(examples_of(contest.store, contest.truth.records, contest.truth, entry.features, contest.task))
    together = same_people(contest.store, contest.truth.records, place / "features")
    plan = plan_folds(strata_of(examples, contest.classes, together=together), count=USUAL, repeats=REPEATS, seed=0)
    figures = []
    for repeat, folds in enumerate(plan):
        answer = answering(contest.task, examples, contest.classes, mode="probe")
        fitted = cross_fit(answer, [folds], seed=seed_of(0, repeat, 0))
        figures.append(fitted.figure(contest.task, "balanced_accuracy").estimate)
    found = nested("run", adapted, contest, entry.model, place / "features")
    (mine,) = [line for line in found.scores if (line.name, line.metric) == ("run", "balanced_accuracy")]
    assert mine.value.estimate == pytest.approx(sum(figures) / len(figures))


def test_small_cohorts_are_cross_fitted_by_themselves_and_others_when_asked(one: tuple[Adapted, Entry]) -> None:
    adapted, entry = one
    many = replace(
        entry.contest, tested=tuple(replace(r, subject=f"s{n}") for n in range(20) for r in entry.contest.tested[:1])
    )
    assert is_wanted("few", adapted, entry.contest)
    assert not is_wanted("few", adapted, many)
    assert is_wanted("always", adapted, many)
    assert not is_wanted("never", adapted, entry.contest)


def test_what_cannot_be_cross_fitted_says_why(place: Path, one: tuple[Adapted, Entry]) -> None:
    adapted, entry = one
    whole = replace(adapted, config=replace(adapted.config, mode="full"))
    assert "train the network anew" in nested("run", whole, entry.contest, entry.model, place / "features").why
    truth = entry.contest.truth
    alone = replace(truth, labels={**dict.fromkeys(truth.labels, "no"), truth.records[0].subject: "yes"})
    found = nested("run", adapted, replace(entry.contest, truth=alone), entry.model, place / "features")
    assert found.why.startswith("the labelled subjects cannot be cross-fitted")
    assert not found.scores
