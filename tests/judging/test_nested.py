from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.fewlabelled import make_store, make_weights

from voxelstem import adapt
from voxelstem.adapted import Adapted, read_run
from voxelstem.certainty.crossfit import answering, cross_fit, seed_of
from voxelstem.certainty.folds import USUAL, plan_folds, strata_of
from voxelstem.features import examples_of
from voxelstem.judging.entries import Entry, enter
from voxelstem.judging.nested import REPEATS, is_wanted, nested
from voxelstem.samepeople import same_people
from voxelstem.store import Store


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
        (name, metric) for metric in adapted.task.metrics for name in ("run", "scratch", "intensity")
    ]
    assert {line.value.subjects for line in found.scores} == {20}
    mine, scratch, bright = found.scores[:3]
    assert mine.over_scratch is not None
    assert mine.over_scratch.estimate == pytest.approx(mine.value.estimate - scratch.value.estimate)
    assert scratch.over_scratch is None
    assert bright.over_intensity is None
    assert mine.value.low is not None


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
