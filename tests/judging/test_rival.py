from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
from tests.finetune.conftest import SPEC, ball

from voxelstem.adapted import resolve
from voxelstem.errors import ConfigError
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.judging import rival as module
from voxelstem.judging.contest import Contest
from voxelstem.judging.rival import Rival, resting_rival, rival, rival_config
from voxelstem.store import Fractions, Store, write
from voxelstem.study import InputSpec
from voxelstem.tasks.segment import Segment
from voxelstem.truth import Truth

QUICK = FinetuneConfig(steps=2, lr=1e-2, optimiser="sgd")


@pytest.fixture(scope="module")
def contest(tmp_path_factory: pytest.TempPathFactory) -> Contest:
    store = Store.create(
        tmp_path_factory.mktemp("rival") / "store", fractions=Fractions(train=1.0, validation=0.0, test=0.0)
    )
    for seed in range(5):
        write(store, ball(seed, "T1w"))
    records = tuple(store)
    return Contest(
        store=store,
        truth=Truth(records=records, labels={}, classes=("ball",)),
        task=Segment(),
        mode="probe",
        classes=("ball",),
        labelled=records[:3],
        tested=records[3:],
        seed=0,
    )


def test_it_is_scored_on_the_tested_scans_by_the_same_task_and_says_what_it_took(contest: Contest) -> None:
    found = rival(contest, SPEC, QUICK)
    assert set(found.outcomes) == set(contest.subjects)
    assert set(next(iter(found.outcomes.values()))) == {"ball", "nsd:ball"}
    assert found.steps == 2
    assert found.parameters > 1_000_000
    assert found.spent.seconds > 0
    again = rival(contest, SPEC, QUICK)
    assert again.outcomes == found.outcomes


@pytest.mark.slow
def test_with_steps_enough_it_finds_the_ball(contest: Contest) -> None:
    found = rival(contest, SPEC, replace(QUICK, steps=60))
    assert contest.task.statistic("dice")(list(found.outcomes.values())) > 0.7


def test_what_was_trained_once_rests_until_anything_that_it_hangs_on_changes(
    contest: Contest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resting_rival(contest, SPEC, QUICK, tmp_path)
    trained: list[Contest] = []

    def counting(asked: Contest, spec: InputSpec, config: FinetuneConfig) -> Rival:
        trained.append(asked)
        return first

    monkeypatch.setattr(module, "rival", counting)
    assert resting_rival(contest, SPEC, QUICK, tmp_path) == dataclasses.replace(first, spent=first.spent)
    assert not trained
    # Another mode learns from the same labels: the U-Net is the same.
    resting_rival(replace(contest, mode="attention"), SPEC, QUICK, tmp_path)
    assert not trained
    others = [
        (replace(contest, labelled=contest.labelled[:2]), SPEC, QUICK),
        (replace(contest, tested=contest.tested[:1]), SPEC, QUICK),
        (replace(contest, seed=1), SPEC, QUICK),
        (replace(contest, task=Segment(tolerance_mm=1.0)), SPEC, QUICK),
        (contest, replace(SPEC, spacing_mm=(2.0, 2.0, 2.0)), QUICK),
        (contest, SPEC, replace(QUICK, steps=3)),
    ]
    for asked in others:
        resting_rival(*asked, tmp_path)
    assert len(trained) == len(others)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text()[:40])
    resting_rival(contest, SPEC, QUICK, tmp_path)
    assert len(trained) == len(others) + 1


def test_beside_a_tuned_network_it_has_that_one_s_budget_and_its_own_optimiser() -> None:
    settings = {"full.steps": 7, "full.batch": 3, "full.mirror": [0], "full.lr": 1e-4, "full.layer_decay": 0.5}
    tuned = resolve("segment", "full", budget=None, settings=settings)
    found = rival_config(tuned, 200)
    assert (found.steps, found.batch, found.mirror) == (7, 3, (0,))
    assert (found.optimiser, found.lr, found.layer_decay) == ("sgd", 1e-2, 1.0)
    frozen = resolve("segment", "probe", budget=None, settings={})
    assert rival_config(frozen, 11).steps == 11


def test_scans_that_are_fitted_to_a_block_have_no_such_rival(contest: Contest) -> None:
    with pytest.raises(ConfigError, match="windows cannot slide"):
        rival(contest, InputSpec(resampling="fit", block_ijk=(16, 16, 16)), QUICK)
