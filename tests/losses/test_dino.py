from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.losses.dino import centred_softmax, cross_entropy, dino, entropy, moved_centre


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def naive_softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def naive_cross_entropy(student: Tensor, target: Tensor, temperature: float) -> float:
    said = naive_softmax([float(value) / temperature for value in student])
    return -sum(float(wanted) * math.log(share) for wanted, share in zip(target, said, strict=True))


def naive_dino(student: Tensor, target: Tensor, temperature: float) -> float:
    pairs = []
    for view in range(student.shape[0]):
        for other in range(target.shape[0]):
            if view == other:
                continue
            rows = [
                naive_cross_entropy(student[view, n], target[other, n], temperature) for n in range(student.shape[1])
            ]
            pairs.append(sum(rows) / len(rows))
    return sum(pairs) / len(pairs)


def test_centring_equals_its_naive_twin() -> None:
    logits, centre = torch.randn(3, 2, 5), torch.randn(5)
    got = centred_softmax(logits, centre, temperature=0.3)
    for view in range(3):
        for n in range(2):
            row = [float(a - b) / 0.3 for a, b in zip(logits[view, n], centre, strict=True)]
            torch.testing.assert_close(got[view, n], torch.tensor(naive_softmax(row)))


def test_centring_takes_away_what_all_rows_share() -> None:
    logits, favourite = torch.randn(4, 6), torch.tensor([9.0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(
        centred_softmax(logits + favourite, favourite, temperature=0.1),
        centred_softmax(logits, torch.zeros(6), temperature=0.1),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_lower_temperature_sharpens() -> None:
    logits, centre = torch.randn(8, 6), torch.zeros(6)
    sharp, soft = (centred_softmax(logits, centre, temperature=t).max(dim=-1).values for t in (0.04, 0.5))
    assert (sharp > soft).all()


def test_cross_entropy_equals_its_naive_twin() -> None:
    student, target = torch.randn(4, 3, 7), torch.randn(4, 3, 7).softmax(-1)
    got = cross_entropy(student, target, temperature=0.2)
    assert got.shape == (4, 3)
    for a in range(4):
        for b in range(3):
            assert float(got[a, b]) == pytest.approx(naive_cross_entropy(student[a, b], target[a, b], 0.2), rel=1e-5)


@pytest.mark.parametrize(("views", "targets"), [(2, 2), (5, 2), (4, 1), (3, 3)])
def test_dino_equals_its_naive_twin_over_all_pairs(views: int, targets: int) -> None:
    student, target = torch.randn(views, 3, 6), torch.randn(targets, 3, 6).softmax(-1)
    assert float(dino(student, target, temperature=0.1)) == pytest.approx(naive_dino(student, target, 0.1), rel=1e-5)


def test_a_view_is_never_compared_with_itself() -> None:
    target = torch.eye(2).reshape(2, 1, 2)
    agrees_with_itself = torch.log(target + 1e-9)
    agrees_with_the_other = agrees_with_itself.flip(0)
    assert float(dino(agrees_with_the_other, target, temperature=1.0)) < 1e-6
    assert float(dino(agrees_with_itself, target, temperature=1.0)) > 10


def test_the_best_a_student_can_do_is_the_targets_entropy() -> None:
    one = torch.randn(1, 3, 6).softmax(-1)
    target = one.expand(2, -1, -1)
    entropy = float(-(one * one.log()).sum(-1).mean())
    assert float(dino(0.1 * target.log(), target, temperature=0.1)) == pytest.approx(entropy, rel=1e-5)
    assert float(dino(torch.randn(2, 3, 6), target, temperature=0.1)) > entropy


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[[500.0, -500.0]], [[-500.0, 500.0]]]).half()
    assert dino(student, torch.full((2, 1, 2), 0.5), temperature=0.1).isfinite()


def test_entropy_is_none_for_one_prototype_and_most_for_all_alike() -> None:
    target = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(entropy(target), torch.tensor([0.0, math.log(4)]))


def test_a_lower_precision_around_it_changes_nothing() -> None:
    student, target = torch.randn(4, 3, 6), torch.randn(2, 3, 6).softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dino(student, target)
    assert torch.equal(found, dino(student, target))


@pytest.mark.parametrize("peer", ["lightly", "spectre"])
def test_steps_with_a_moving_centre_are_those_of_the_peers(golden: Any, peer: str) -> None:
    cases = golden.cases
    centre = torch.zeros(cases.PROTOTYPES)
    for step, temperature in enumerate(cases.TEMPERATURES):
        teacher, student = cases.seen(step)
        student.requires_grad_()
        target = centred_softmax(teacher, centre, temperature=temperature)
        loss = dino(student, target, temperature=cases.STUDENT_TEMPERATURE)
        loss.backward()
        golden.agrees(f"{peer}/dino/loss/{step}", loss)
        golden.agrees(f"{peer}/dino/gradient/{step}", student.grad)
        rows = teacher.flatten(0, 1)
        centre = moved_centre(centre, rows.sum(0), torch.tensor(len(rows)), momentum=cases.CENTRE_MOMENTUM)
    golden.agrees(f"{peer}/dino/centre", centre)


def test_a_centre_stays_where_it_is_when_nothing_was_seen() -> None:
    centre = torch.randn(5)
    assert torch.equal(moved_centre(centre, torch.zeros(5), torch.tensor(0), momentum=0.9), centre)
