from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.finetune.conftest import ball

from voxelstem.certainty.assurance import LEVEL, Assurance
from voxelstem.certainty.calibrators import fit_temperature
from voxelstem.certainty.familiar import NEIGHBOURS
from voxelstem.certainty.strangeness import fit_nearest
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.sure import ON_ITS_OWN, assure_tuned
from voxelstem.finetune.tune import Asked, Speaker, hold_out, strangeness_of, tune
from voxelstem.model import Model
from voxelstem.protocols import Head, Task
from voxelstem.store import Fractions, Record, Store, write
from voxelstem.study import Survival
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.regress import Regress
from voxelstem.tasks.segment import Segment
from voxelstem.tasks.survive import Survive
from voxelstem.truth import Truth

COUNT = 20


@dataclass(frozen=True)
class Finished:
    speaker: Speaker
    head: Head
    sure: Assurance
    truth: Truth
    records: list[Record]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("many") / "store"
    opened = Store.create(folder, fractions=Fractions(train=1.0, validation=0.0, test=0.0))
    for seed in range(COUNT):
        write(opened, ball(seed, "T1w"))
    return opened


def truth_of(task: Task, records: list[Record]) -> Truth:
    subjects = sorted(record.subject for record in records)
    told: dict[str, Mapping[str, Any]] = {}
    if isinstance(task, Classify):
        told = {"labels": {name: "ab"[at % 2] for at, name in enumerate(subjects)}}
    elif isinstance(task, Regress):
        told = {"values": {name: float(at) for at, name in enumerate(subjects)}}
    elif isinstance(task, Survive):
        told = {"survival": {name: Survival(time=5.0 + at, event=at % 3 > 0) for at, name in enumerate(subjects)}}
    return Truth(**({"records": tuple(records), "labels": {}, "classes": ()} | told))


def finish(task: Task, name: str, store: Store, model: Model, held: float) -> Finished:
    records = list(store)
    truth = truth_of(task, records)
    classes = {"classify": ("a", "b"), "segment": ("ball",)}.get(name, ())
    asked, config = Asked.of(name, task, truth, classes), FinetuneConfig(steps=2, held=held, looks=1)
    head, card, tensors = tune(model, store, records, asked, config, seed=3)
    speaker = Speaker(model.with_weights(card, tensors), head, store, asked, config)
    return Finished(
        speaker=speaker,
        head=head,
        sure=assure_tuned(speaker, task, head, truth, records, seed=3),
        truth=truth,
        records=records,
    )


def test_the_labelled_scans_are_known_by_vectors_from_inside_each_without_its_subject(many: Store, unet: Model) -> None:
    done = finish(Classify(), "classify", many, unet, held=0.0)
    rows = np.stack([done.speaker.inside(record.key) for record in done.records]).astype(np.float64)
    names = [record.subject for record in done.records]
    wanted = fit_nearest(rows, names, neighbours=NEIGHBOURS, level=LEVEL)
    assert done.sure.inside is not None
    assert done.sure.known is None
    np.testing.assert_allclose(done.sure.inside.yardstick.scores, wanted.yardstick.scores, atol=1e-9)
    assert done.sure.calibrator is None
    assert done.sure.subjects == 0
    assert done.sure.notes == (
        "not calibrated: every fold would have to train the network anew, and full.held=0 holds nobody out",
        ON_ITS_OWN,
    )
    key = done.records[0].key
    np.testing.assert_array_equal(strangeness_of(done.speaker, key), done.speaker.inside(key))
    np.testing.assert_array_equal(strangeness_of(lambda _: done.speaker(key), key), done.speaker(key).scan)
    back = Assurance.of(done.sure.arrays(), done.sure.notes)
    odd = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).numpy()
    told = back.novelty_inside(odd)
    assert told is not None
    assert told == done.sure.novelty_inside(odd)
    assert told.flagged
    near = back.novelty_inside(rows[4])
    assert near is not None
    assert not near.flagged


@pytest.mark.parametrize("task", [Classify(), Regress()], ids=["classify", "regress"])
def test_those_whom_no_step_saw_calibrate_what_the_network_says(task: Task, many: Store, unet: Model) -> None:
    name = "classify" if isinstance(task, Classify) else "regress"
    done = finish(task, name, many, unet, held=0.6)
    apart = hold_out([record.subject for record in done.records], done.speaker.asked, 0.6, 3)
    assert done.sure.subjects == len(apart) == 12
    held = sorted((one for one in done.records if one.subject in apart), key=lambda one: one.subject)
    said = np.stack([done.speaker(one.key).scan for one in held]).astype(np.float64)
    if name == "classify":
        true = np.array(["ab".index(done.truth.labels[one.subject]) for one in held])
        chances = np.exp(said)
        wanted = fit_temperature(np.log(chances / chances.sum(axis=1, keepdims=True)), true, modest=True)
        assert done.sure.calibrator is not None
        assert done.sure.calibrator.temperature == pytest.approx(wanted.temperature, rel=1e-4)
        assert done.sure.sets is not None
    else:
        values = np.array([done.truth.values[one.subject] for one in held])
        told = done.head.arrays["weight"][0] * said[:, 0] + done.head.arrays["bias"][0]
        assert done.sure.intervals is not None
        found = done.sure.quantity(7.0, "a")
        assert found.high is not None
        # Of twelve, nine of ten new ones lie no farther out than the twelfth.
        assert found.high - 7.0 == pytest.approx(np.abs(values - told).max(), rel=1e-4)
    assert "calibrated on 12 subjects who also said when training was to stop" in done.sure.notes
    assert not any("anew" in note for note in done.sure.notes)
    assert done.sure.inside is not None
    assert len(done.sure.inside.vectors) == COUNT


def test_too_few_who_were_held_out_say_that_nothing_is_calibrated(many: Store, unet: Model) -> None:
    done = finish(Classify(), "classify", many, unet, held=0.2)
    assert done.sure.subjects == 0
    assert "not calibrated: 4 subjects are fewer than 10" in done.sure.notes
    assert not any("also said when" in note for note in done.sure.notes)


@pytest.mark.parametrize(
    ("task", "name", "why"),
    [
        (Segment(), "segment", "volumes without intervals: every fold would have to train the network anew"),
        (Survive(folds=2, intervals=3), "survive", "survival curves are not calibrated"),
    ],
    ids=["segment", "survive"],
)
def test_tasks_that_are_not_calibrated_know_strange_scans_all_the_same(
    task: Task, name: str, why: str, many: Store, unet: Model, tmp_path: Path
) -> None:
    done = finish(task, name, many, unet, held=0.0)
    assert done.sure.notes == (why, ON_ITS_OWN)
    assert done.sure.inside is not None
