from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from voxelstem.card import Card
from voxelstem.errors import CheckpointError, ConfigError
from voxelstem.finetune.cases import see
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.network import build
from voxelstem.finetune.tune import WINDOWS, Asked, Speaker, hold_out, mark, say, tune, tuned
from voxelstem.judging.contest import Contest
from voxelstem.model import Model, make_model
from voxelstem.protocols import Example, Head
from voxelstem.store import Record, Store
from voxelstem.tasks.classify import Classify
from voxelstem.tasks.regress import Regress
from voxelstem.tasks.segment import Segment
from voxelstem.truth import Truth
from voxelstem.views import slide

CONFIG = FinetuneConfig(steps=40, lr=5e-3)
BALL = Asked(task="segment", voxels=True, classes=("ball",), targets={})


def labelled(store: Store) -> list[Record]:
    return [record for record in store if record.acquisition.contrast == "T1w"]


def speaker(model: Model, store: Store, asked: Asked, config: FinetuneConfig) -> tuple[Head, Speaker]:
    """Tune, and open again what was kept, as `evaluate` does."""
    head, card, tensors = tune(model, store, labelled(store), asked, config, seed=0)
    again = make_model(card, seed=9)
    again.backbone.load_state_dict(tensors)
    return head, Speaker(replace(again, card=card), head, store, asked, config)


def example(store: Store, record: Record, said: object, **truth: object) -> Example:
    return Example(
        subject=record.subject,
        key=record.key,
        features=said,
        affine_ras=record.affine_ras,
        labels=store.labels(record.key),
        **truth,
    )


def test_a_tuned_network_labels_the_ball_where_it_is(store: Store, unet: Model) -> None:
    head, say = speaker(unet, store, BALL, CONFIG)
    task, record = Segment(), labelled(store)[3]
    said = say(record.key)
    assert said.tokens is not None
    assert said.tokens.shape == (18, 20, 14, 2)
    assert task.outcome(head, example(store, record, said))["ball"] > 0.7


def test_marks_made_a_window_at_a_time_are_those_of_all_logits_at_once(store: Store, unet: Model) -> None:
    config = replace(CONFIG, steps=4)
    head, card, tensors = tune(unet, store, labelled(store), BALL, config, seed=0)
    model = make_model(card, seed=9)
    model.backbone.load_state_dict(tensors)
    model, record = replace(model, card=card), labelled(store)[1]
    net, seen = tuned(model, head, BALL, config), see(store, [record.key], model.spec)
    marks = mark(net, seen, model.spec, config, record.affine_ras, record.shape_ijk)
    whole = Segment().predict(head, say(net, seen, model.spec, BALL, config), record.affine_ras, record.shape_ijk)
    assert 0 < marks.mean() < 1
    assert (marks != whole.array).mean() < 1e-3


def test_less_memory_means_more_stripes_and_the_same_marks(
    store: Store, unet: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, card = build(unet, out=2, config=CONFIG, voxels=True, seed=0)
    net.eval()
    record, stripes = labelled(store)[1], list[slide.Stripe | None]()
    seen = see(store, [record.key], card.spec)
    rolled = slide.roll

    def roll(*given: Any, stripe: slide.Stripe, **named: Any) -> Iterator[slide.Slab]:
        stripes.append(stripe)
        return rolled(*given, stripe=stripe, **named)

    monkeypatch.setattr(slide, "roll", roll)
    counts: list[int] = []
    marks: list[np.ndarray] = []
    window = WINDOWS * 8 * math.prod(card.spec.block_ijk)
    for left in (math.inf, window + 60_000.0, window + 30_000.0):
        stripes.clear()
        monkeypatch.setattr("voxelstem.finetune.tune.left_bytes", lambda left=left: left)
        marks.append(mark(net, seen, card.spec, CONFIG, record.affine_ras, record.shape_ijk))
        counts.append(len(stripes))
    assert counts[0] == 1 < counts[1] < counts[2]
    assert 0 < marks[0].mean() < 1
    for few in marks[1:]:
        assert (few != marks[0]).mean() < 1e-3
    monkeypatch.setattr("voxelstem.finetune.tune.left_bytes", lambda: window + 8.0)
    with pytest.raises(MemoryError):
        mark(net, seen, card.spec, CONFIG, record.affine_ras, record.shape_ijk)


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_two_contrasts_are_seen_together_from_training_to_prediction(store: Store, unet: Model, fusion: str) -> None:
    config = replace(CONFIG, contrasts=("T1w", "FLAIR"), fusion=fusion, steps=80, lr=2e-2)
    head, say = speaker(unet, store, BALL, config)
    record = labelled(store)[3]
    assert Segment().outcome(head, example(store, record, say(record.key)))["ball"] > 0.5


def test_classes_of_scans_are_said_as_probabilities(store: Store, unet: Model) -> None:
    records = labelled(store)
    targets = {record.subject: int(int(record.labels["volume:ball"]) > 180) for record in records}
    asked = Asked(task="classify", voxels=False, classes=("small", "large"), targets=targets)
    head, say = speaker(unet, store, asked, replace(CONFIG, steps=2))
    guess = Classify().outcome(head, example(store, records[0], say(records[0].key), label="small"))
    assert sum(guess.scores) == pytest.approx(1.0)


def test_numbers_come_back_in_the_unit_of_the_labels(store: Store, unet: Model) -> None:
    records = labelled(store)
    targets = {record.subject: float(record.labels["volume:ball"]) for record in records}
    asked = Asked(task="regress", voxels=False, classes=(), targets=targets)
    head, say = speaker(unet, store, asked, replace(CONFIG, steps=1, lr=1e-6))
    found = [Regress().outcome(head, example(store, one, say(one.key), value=targets[one.subject])) for one in records]
    # Hardly trained, it says about the mean of what it was shown: not a number near 0.
    assert np.mean([one.predicted for one in found]) == pytest.approx(np.mean([one.truth for one in found]), rel=0.5)


def test_volumes_alone_are_a_floor_where_all_scans_have_them_and_none_where_one_lacks_them(store: Store) -> None:
    records = labelled(store)
    sizes = {record.subject: 2 * float(record.labels["volume:ball"]) for record in records}
    truth = Truth(records=tuple(records), labels={}, classes=(), values=sizes)
    contest = Contest(
        store=store,
        truth=truth,
        task=Regress(),
        mode="full",
        classes=(),
        labelled=tuple(records[:4]),
        tested=tuple(records[4:]),
        seed=0,
    )
    found, mean = contest.morphometry(), contest.average()
    assert found is not None
    error = Regress().statistic("mae")
    assert error(list(found.values())) < error(list(mean.values()))
    without = (*records[:3], replace(records[3], labels={}))
    assert replace(contest, labelled=without).morphometry() is None


def test_a_head_and_weights_of_two_runs_are_refused(store: Store, unet: Model) -> None:
    asked = Asked(task="regress", voxels=False, classes=(), targets={r.subject: 1.0 for r in labelled(store)})
    head, _, _ = tune(unet, store, labelled(store), asked, replace(CONFIG, steps=1), seed=0)
    with pytest.raises(CheckpointError, match="does not fit the weights"):
        Speaker(unet, head, store, replace(asked, classes=("a", "b")), CONFIG)


def test_the_model_that_tuning_begins_with_stays_as_it_was(store: Store, unet: Model) -> None:
    before = {name: tensor.clone() for name, tensor in unet.backbone.state_dict().items()}
    tune(unet, store, labelled(store), BALL, replace(CONFIG, steps=1), seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.backbone.state_dict().items())


@pytest.mark.parametrize("changes", ["all", "low_rank"])
def test_a_transformer_is_tuned_and_what_is_kept_is_a_plain_one(store: Store, unet: Model, changes: str) -> None:
    architecture = {
        "name": "scan_vit",
        "block_ijk": (16, 16, 16),
        "patch_ijk": (4, 4, 4),
        "block.dim": 24,
        "block.depth": 2,
        "block.heads": 2,
        "scan.depth": 0,
    }
    vit = make_model(Card(architecture=architecture, spec=unet.spec, sha256="c" * 64), seed=0)
    config = replace(CONFIG, changes=changes, steps=120, lr=5e-3, layer_decay=0.9, held=0.2)
    head, say_ = speaker(vit, store, BALL, config)
    assert head.mode == ("full" if changes == "all" else "adapters")
    assert not any("lora" in name for name in say_.net.backbone.state_dict())
    record = labelled(store)[3]
    assert Segment().outcome(head, example(store, record, say_(record.key)))["ball"] > 0.3


def test_subjects_are_held_out_by_class_and_nobody_is_the_last() -> None:
    asked = Asked(task="classify", voxels=False, classes=("a", "b"), targets={"1": 0, "2": 0, "3": 0, "4": 1, "5": 1})
    apart = hold_out(["1", "2", "3", "4", "5", "5"], asked, 0.4, 0)
    assert len(apart & {"1", "2", "3"}) == 1
    assert len(apart & {"4", "5"}) == 1
    assert hold_out(["1"], asked, 0.0, 0) == frozenset()
    with pytest.raises(ConfigError, match="is nobody"):
        hold_out(["1", "4"], asked, 0.4, 0)
