from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from voxelstem.errors import AuditError, ConfigError
from voxelstem.finetune.cases import Case, Seen
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.fates import check, head_of, risk_sets, way_of
from voxelstem.finetune.loop import fit, in_turns
from voxelstem.finetune.network import build
from voxelstem.finetune.tune import Asked, Speaker, tune
from voxelstem.heads.risks import cox_of_sets
from voxelstem.heads.survival import Watched, breslow, harrell_c
from voxelstem.model import Model, make_model
from voxelstem.protocols import Example
from voxelstem.store import Store
from voxelstem.study import Survival
from voxelstem.tasks.survive import Survive
from voxelstem.truth import Truth


def case(at: int, time: float, event: bool, *, bright: float = 0.0) -> Case:
    """A block in noise, as much brighter or darker than it as its subject fares worse or better."""
    image = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(at))
    image[:, 4:12, 4:12, 4:12] += 0.5 * bright
    seen = Seen(image=image, affine_ras=np.eye(4), shape_ijk=(16, 16, 16))
    return Case(seen=seen, target=Survival(time=time, event=event), subject=f"s{at}")


def test_a_batch_is_an_event_and_others_who_were_watched_until_then_at_least() -> None:
    cases = [case(at, time, at % 2 == 0) for at, time in enumerate([4.0, 1.0, 2.0, 8.0, 8.0, 6.0])]
    pick, rng = risk_sets(cases), np.random.default_rng(0)
    firsts: Counter[str] = Counter()
    for _ in range(300):
        first, *others = pick(3, rng)
        assert first.target.event  # pyright: ignore[reportAttributeAccessIssue]
        assert all(one.target.time >= first.target.time for one in others)  # pyright: ignore
        assert all(one.subject != first.subject for one in others)
        firsts[first.subject] += 1
    assert set(firsts) == {"s0", "s2", "s4"}
    assert min(firsts.values()) > 60
    # Of the last event one other is left: it is drawn twice.
    assert [one.subject for one in risk_sets([cases[4], cases[3]])(3, rng)] == ["s4", "s3", "s3"]


def test_where_nobody_can_be_compared_that_is_said() -> None:
    with pytest.raises(AuditError, match="nothing to compare"):
        risk_sets([case(0, 1.0, False), case(1, 5.0, True)])
    with pytest.raises(AuditError, match="nothing to compare"):  # two scans of one subject are no comparison
        risk_sets([case(0, 1.0, True), replace(case(1, 5.0, True), subject="s0")])
    with pytest.raises(ValueError, match="needs a time"):
        risk_sets([replace(case(0, 1.0, True), target=1.0)])


def test_settings_that_a_trained_network_cannot_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="one risk for all intervals"):
        check(Survive(kind="hazard", by_interval=True), FinetuneConfig())
    with pytest.raises(ConfigError, match="compares scans of a batch"):
        check(Survive(), FinetuneConfig(batch=1))
    check(Survive(kind="hazard"), FinetuneConfig(batch=1))


@pytest.mark.parametrize("kind", ["cox", "hazard"])
def test_a_network_learns_who_fares_worse_from_few_at_a_time(unet: Model, kind: str) -> None:
    rng, task = np.random.default_rng(1), Survive(kind=kind, intervals=3)  # pyright: ignore[reportArgumentType]
    bright = rng.normal(size=24)
    times = 10 * rng.exponential(size=24) * np.exp(-1.5 * bright)
    cases = [
        case(at, float(time), bool(at % 4), bright=float(one))
        for at, (time, one) in enumerate(zip(times, bright, strict=True))
    ]
    config = FinetuneConfig(steps=150, batch=4, lr=5e-3, patch_ijk=(16, 16, 16), jitter=0.0)
    net, _ = build(unet, out=1, config=config, voxels=False, seed=0)
    pick, loss = way_of(task, cases)
    assert (pick is risk_sets, loss is cox_of_sets) == (kind == "cox", kind == "cox")
    assert (pick is in_turns) == (kind == "hazard")
    fit(net, cases, config, loss=loss, seed=0, pick=pick)
    with torch.no_grad():
        said = net(torch.stack([one.seen.image for one in cases]))[:, 0].double().numpy()
    watched = Watched.of(one.target for one in cases)  # pyright: ignore[reportArgumentType]
    assert harrell_c(watched, said) > 0.7
    head = head_of(task, cases, said.tolist(), mode="full")
    found = [task.predict(head, np.array([one])) for one in said]
    assert np.array_equal(np.argsort([one.risk for one in found]), np.argsort(said))
    if kind == "cox":
        assert head.arrays["baseline"] == pytest.approx(breslow(watched, said - said.mean()).value)


def test_two_scans_of_a_subject_are_one_in_the_curves() -> None:
    cases = [case(at, 2.0 + at, True) for at in range(4)]
    double = [*cases, replace(cases[0])]
    task = Survive()
    head = head_of(task, double, [1.0, 0.0, -1.0, 2.0, 3.0], mode="full")
    plain = head_of(task, cases, [2.0, 0.0, -1.0, 2.0], mode="full")
    assert all(np.array_equal(head.arrays[name], plain.arrays[name]) for name in head.arrays)


@pytest.mark.parametrize("held", [0.0, 0.4])
def test_a_tuned_run_answers_as_curves_and_is_the_same_again(store: Store, unet: Model, held: float) -> None:
    records = [record for record in store if record.acquisition.contrast == "T1w"]
    told = {record.subject: Survival(time=3.0 + at, event=at != 2) for at, record in enumerate(records)}
    task = Survive()
    truth = Truth(records=tuple(records), labels={}, classes=(), survival=told)
    asked = Asked.of("survive", task, truth, ())
    config = FinetuneConfig(steps=2, held=held, looks=2)
    head, card, tensors = tune(unet, store, records, asked, config, seed=0)
    again, _, _ = tune(unet, store, records, asked, config, seed=0)
    assert all(np.array_equal(array, again.arrays[name]) for name, array in head.arrays.items())
    model = make_model(card, seed=9)
    model.backbone.load_state_dict(tensors)
    # As `evaluate` and `predict` ask: they know the task's name and no more.
    bare = Asked(task="survive", voxels=False, classes=(), targets={})
    say = Speaker(replace(model, card=card), head, store, bare, config)
    first = records[0]
    example = Example(
        subject=first.subject,
        key=first.key,
        features=say(first.key),
        affine_ras=first.affine_ras,
        survival=told[first.subject],
    )
    found = task.outcome(head, example)
    assert all(0 <= chance <= 1 for chance in found.chances)
    assert found.truth == told[first.subject]
