from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from voxelstem.backbones.heads import ProjectorConfig
from voxelstem.objectives.dino import Dino, DinoConfig
from voxelstem.protocols import Batch
from voxelstem.views.crop import ViewKind

K = 16


def dino(make: Any, **settings: Any) -> Dino:
    projector = ProjectorConfig(hidden=24, bottleneck=8, prototypes=K)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Dino(DinoConfig(projector=projector, **settings), make.backbone(scan_depth=0))


def scalar(output: Any, name: str) -> float:
    return next(value for key, value in output.scalars.items() if key.split("/")[-1] == name)


@pytest.fixture
def batch(make) -> Batch:
    return make.batch(samples=4, views=2)


def test_the_loss_falls_on_a_batch_that_repeats(make, batch: Batch):
    objective = dino(make, momentum_start=1.0, centre_momentum=1.0)
    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = objective.step(batch, progress=0.0)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(progress=0.0)
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_the_order_of_the_samples_does_not_matter_where_nothing_is_masked(make, batch: Batch):
    turned = replace(batch, views={name: view.flip(0) for name, view in batch.views.items()})
    one, two = (dino(make, mask_ratio=0.0).step(b, progress=0.1).loss for b in (batch, turned))
    assert torch.allclose(one, two, atol=1e-5)


def test_swapping_the_two_global_views_does_not_matter_where_nothing_is_masked(make, batch: Batch):
    views = {"global": batch.views["global"].flip(1), "local": batch.views["local"]}
    one, two = (dino(make, mask_ratio=0.0).step(b, progress=0.1).loss for b in (batch, replace(batch, views=views)))
    assert torch.allclose(one, two, atol=1e-5)


def test_the_first_loss_is_that_of_a_naive_loop(make, batch: Batch):
    objective = dino(make, mask_ratio=0.0, ibot_weight=0.0, koleo_weight=0.0)
    with torch.no_grad():
        student = {
            name: objective.student(batch.views[name].flatten(0, 1))[1].unflatten(0, (4, 2)) for name in batch.views
        }
        teacher = objective.teacher.network(batch.views["global"].flatten(0, 1))[1].unflatten(0, (4, 2))
    temperature, terms = 0.04 + (0.07 - 0.04) * 0.1 / 0.3, []
    for sample in range(4):
        for other in range(2):
            target = (teacher[sample, other] / temperature).softmax(0)
            for name, view in [("global", 0), ("global", 1), ("local", 0), ("local", 1)]:
                if (name, view) != ("global", other):
                    guess = (student[name][sample, view] / 0.1).log_softmax(0)
                    terms.append(-float((target * guess).sum()))
    assert float(objective.step(batch, progress=0.1).loss.detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_no_gradient_reaches_the_teacher_and_every_part_of_the_student_gets_one(make, batch: Batch):
    objective = dino(make)
    objective.step(batch, progress=0.1).loss.backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    idle = [name for name, parameter in objective.student.named_parameters() if parameter.grad is None]
    assert idle == []


def test_only_after_step_moves_the_teacher_and_towards_the_student(make, batch: Batch):
    objective = dino(make, momentum_start=0.9, momentum_end=1.0)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in objective.teacher.parameters()]
    objective.step(batch, progress=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, objective.teacher.parameters(), strict=True))
    objective.after_step(progress=0.0)
    for old, now in zip(before, objective.teacher.parameters(), strict=True):
        assert torch.allclose(now - old, torch.full_like(old, 0.1), atol=1e-5)
    still = [parameter.clone() for parameter in objective.teacher.parameters()]
    objective.after_step(progress=1.0)
    assert all(torch.equal(a, b) for a, b in zip(still, objective.teacher.parameters(), strict=True))


def test_the_centres_follow_the_teacher_s_mean(make, batch: Batch):
    objective = dino(make, centre_momentum=0.75)
    assert objective.cls_centre.abs().sum() == 0
    with torch.no_grad():
        _, logits, patches = objective.teacher.network(batch.views["global"].flatten(0, 1))
        patch_logits = objective.teacher.network.patch_head(patches)
    objective.step(batch, progress=0.0)
    assert objective.cls_centre.abs().sum() == 0  # a step that is left out must leave no trace
    objective.after_step(progress=0.0)
    assert torch.allclose(objective.cls_centre, 0.25 * logits.mean(0), atol=1e-5)
    assert torch.allclose(objective.patch_centre, 0.25 * patch_logits.mean((0, 1)), atol=1e-5)
    assert {"cls_centre", "patch_centre"} <= objective.state_dict().keys()


@pytest.mark.parametrize("temperature", [0.01, 0.07, 100.0])
def test_the_teacher_s_entropy_lies_between_nothing_and_that_of_an_even_spread(make, batch: Batch, temperature: float):
    output = dino(make, teacher_temperature_start=temperature, teacher_temperature_end=temperature).step(
        batch, progress=0.5
    )
    entropy = scalar(output, "teacher_entropy")
    assert 0 <= entropy <= math.log(K) + 1e-4
    if temperature == 100.0:
        assert entropy == pytest.approx(math.log(K), abs=1e-3)


def test_masks_follow_the_seed_of_the_batch(make, batch: Batch):
    same, other = dino(make).step(batch, progress=0.1), dino(make).step(replace(batch, seed=99), progress=0.1)
    assert scalar(same, "ibot") != scalar(other, "ibot")


def test_the_loss_is_the_weighted_sum_of_its_terms(make, batch: Batch):
    output = dino(make, ibot_weight=2.0, koleo_weight=0.5).step(batch, progress=0.1)
    total = scalar(output, "dino") + 2.0 * scalar(output, "ibot") + 0.5 * scalar(output, "koleo")
    assert float(output.loss.detach()) == pytest.approx(total, rel=1e-5)


def test_it_works_without_local_views(make, batch: Batch):
    only = replace(batch, views={"global": batch.views["global"]})
    assert dino(make).step(only, progress=0.1).loss.isfinite()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"koleo_weight": -1.0}, "koleo_weight >= 0"),
        ({"teacher_temperature_end": 0.0}, "temperatures"),
        ({"mask_ratio": 1.5}, "mask_ratio"),
        ({"momentum_start": -0.1}, "momentum_start"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float], said: str):
    with pytest.raises(ValueError, match=said):
        DinoConfig(**wrong)  # pyright: ignore[reportArgumentType]


def view(count: int, edge: int = 8) -> ViewKind:
    return ViewKind(count=count, size_ijk=(edge, edge, edge))


@pytest.mark.parametrize(
    ("global_", "local", "batch", "said"),
    [
        (view(1), view(0), 2, "two views or more"),
        (view(2, 6), view(0), 2, r"views\.global_\.size_ijk must be a multiple"),
        (view(2), view(1, 6), 2, r"views\.local\.size_ijk must be a multiple"),
        (view(2), view(0), 1, r"loader\.batch >= 2"),
    ],
)
def test_views_without_pairs_patches_or_neighbours_are_refused(
    make, global_: ViewKind, local: ViewKind, batch: int, said: str
):
    with pytest.raises(ValueError, match=said):
        DinoConfig().check(global_, local, batch=batch, backbone=make.backbone().config)


@pytest.mark.parametrize(("global_", "local"), [(view(2), view(0, 3)), (view(1), view(1, 4))])
def test_two_views_of_any_kind_are_a_pair(make, global_: ViewKind, local: ViewKind):
    DinoConfig().check(global_, local, batch=2, backbone=make.backbone().config)
    DinoConfig(koleo_weight=0.0).check(global_, local, batch=1, backbone=make.backbone().config)
