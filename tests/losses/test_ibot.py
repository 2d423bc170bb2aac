from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.losses.dino import centred_softmax, moved_centre
from voxelstem.losses.ibot import ibot, patch_weights


def naive_ibot(student: Tensor, target: Tensor, masked: Tensor, temperature: float) -> float:
    rows = []
    for row in range(student.shape[0]):
        terms = []
        for patch in range(student.shape[1]):
            if not bool(masked[row, patch]):
                continue
            logits = [float(value) / temperature for value in student[row, patch]]
            total = math.log(sum(math.exp(value) for value in logits))
            wanted = target[row, patch].tolist()
            terms.append(-sum(share * (value - total) for share, value in zip(wanted, logits, strict=True)))
        rows.append(sum(terms) / len(terms) if terms else 0.0)
    return sum(rows) / len(rows)


def draw() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    masked = torch.rand(5, 7) < 0.4
    masked[2] = False
    return torch.randn(5, 7, 6), torch.randn(5, 7, 6).softmax(-1), masked


def of_rows(student: Tensor, target: Tensor, masked: Tensor, *, temperature: float = 0.2) -> Tensor:
    return ibot(student[masked], target[masked], patch_weights(masked), temperature=temperature)


def test_it_equals_its_naive_twin_when_rows_hide_different_numbers() -> None:
    student, target, masked = draw()
    assert len(set(masked.sum(dim=1).tolist())) > 2
    expected = naive_ibot(student, target, masked, 0.2)
    assert float(of_rows(student, target, masked)) == pytest.approx(expected, rel=1e-5)


def test_only_masked_patches_get_a_gradient() -> None:
    student, target, masked = draw()
    student.requires_grad_()
    of_rows(student, target, masked).backward()
    assert student.grad is not None
    assert torch.equal(student.grad.abs().sum(-1) > 0, masked)


def test_the_patches_of_a_row_share_one_part_of_the_whole() -> None:
    _, _, masked = draw()
    weights = torch.zeros(masked.shape)
    weights[masked] = patch_weights(masked)
    expected = masked.any(dim=1) / 5
    torch.testing.assert_close(weights.sum(dim=1), expected)
    assert not weights[~masked].any()


def test_two_shares_make_the_whole_even_if_one_of_them_hides_nothing() -> None:
    student, target, masked = draw()
    masked[:2] = False
    parts = [of_rows(student[rows], target[rows], masked[rows]) for rows in (slice(0, 2), slice(2, 4))]
    assert float(parts[0]) == 0.0
    torch.testing.assert_close(sum(parts) / 2, of_rows(student[:4], target[:4], masked[:4]))


def test_with_nothing_masked_there_is_no_loss_and_still_a_gradient_of_zero() -> None:
    student, target, masked = draw()
    student.requires_grad_()
    loss = of_rows(student, target, torch.zeros_like(masked))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("peer", ["lightly", "spectre"])
def test_steps_with_a_moving_centre_are_those_of_the_peers(golden: Any, peer: str) -> None:
    cases = golden.cases
    centre, weights = torch.zeros(cases.PROTOTYPES), patch_weights(cases.masks())
    for step, temperature in enumerate(cases.TEMPERATURES):
        teacher, student = cases.behind(step)
        student.requires_grad_()
        target = centred_softmax(teacher, centre, temperature=temperature)
        loss = ibot(student, target, weights, temperature=cases.STUDENT_TEMPERATURE)
        loss.backward()
        golden.agrees(f"{peer}/ibot/loss/{step}", loss)
        golden.agrees(f"{peer}/ibot/gradient/{step}", student.grad)
        centre = moved_centre(centre, teacher.sum(0), torch.tensor(len(teacher)), momentum=cases.CENTRE_MOMENTUM)
    golden.agrees(f"{peer}/ibot/centre", centre)
