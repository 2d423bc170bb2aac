from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from voxelstem.losses.ibot import ibot


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
        if terms:
            rows.append(sum(terms) / len(terms))
    return sum(rows) / len(rows)


def draw() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    masked = torch.rand(5, 7) < 0.4
    masked[2] = False
    return torch.randn(5, 7, 6), torch.randn(5, 7, 6).softmax(-1), masked


def test_it_equals_its_naive_twin_when_rows_hide_different_numbers() -> None:
    student, target, masked = draw()
    assert len(set(masked.sum(dim=1).tolist())) > 2
    assert float(ibot(student, target, masked, temperature=0.2)) == pytest.approx(
        naive_ibot(student, target, masked, 0.2), rel=1e-5
    )


def test_visible_patches_do_not_count() -> None:
    student, target, masked = draw()
    other = torch.where(masked[..., None], student, torch.randn(5, 7, 6))
    assert torch.equal(ibot(student, target, masked), ibot(other, target, masked))


def test_only_masked_patches_get_a_gradient() -> None:
    student, target, masked = draw()
    student.requires_grad_()
    ibot(student, target, masked).backward()
    assert student.grad is not None
    assert torch.equal(student.grad.abs().sum(-1) > 0, masked)


def test_a_row_with_few_masked_patches_weighs_as_much_as_one_with_many() -> None:
    student, target, _ = draw()
    masked = torch.zeros(5, 7, dtype=torch.bool)
    masked[0, 0], masked[1] = True, True
    alone = [ibot(student[row : row + 1], target[row : row + 1], masked[row : row + 1]) for row in (0, 1)]
    torch.testing.assert_close(ibot(student, target, masked), (alone[0] + alone[1]) / 2)


def test_with_nothing_masked_there_is_no_loss() -> None:
    student, target, masked = draw()
    assert float(ibot(student, target, torch.zeros_like(masked))) == 0.0
