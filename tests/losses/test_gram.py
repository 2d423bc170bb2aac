from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from voxelstem.losses.gram import Negatives, gram


def naive_cosine(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def naive_gram(student: Tensor, teacher: Tensor, negatives: Negatives) -> float:
    terms = []
    for row in range(student.shape[0]):
        for one in range(student.shape[1]):
            for other in range(student.shape[1]):
                mine = naive_cosine(student[row, one].tolist(), student[row, other].tolist())
                theirs = naive_cosine(teacher[row, one].tolist(), teacher[row, other].tolist())
                if negatives in ("drop", "drop_teacher"):
                    theirs = max(theirs, 0.0)
                if negatives == "drop":
                    mine = max(mine, 0.0)
                terms.append((mine - theirs) ** 2)
    return sum(terms) / len(terms)


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 7, generator=generator)


@pytest.mark.parametrize("negatives", ["keep", "drop", "drop_teacher"])
def test_it_equals_its_naive_twin(negatives: Negatives) -> None:
    student, teacher = draw()
    expected = naive_gram(student, teacher, negatives)
    assert float(gram(student, teacher, negatives=negatives)) == pytest.approx(expected, rel=1e-5)


def test_the_three_ways_with_negatives_differ() -> None:
    ways: tuple[Negatives, ...] = ("keep", "drop", "drop_teacher")
    assert len({float(gram(*draw(), negatives=way)) for way in ways}) == 3


def test_lengths_and_a_common_rotation_cost_nothing() -> None:
    student, _ = draw()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    lengths = torch.linspace(0.1, 9, 5)[:, None]
    assert float(gram(lengths * student @ turn, student)) < 1e-10


def test_the_batch_as_one_row_also_compares_patches_of_different_scans() -> None:
    student, teacher = draw()
    whole = gram(student.flatten(0, 1)[None], teacher.flatten(0, 1)[None])
    expected = naive_gram(student.flatten(0, 1)[None], teacher.flatten(0, 1)[None], "keep")
    assert float(whole) == pytest.approx(expected, rel=1e-5)
    assert float(whole) != pytest.approx(float(gram(student, teacher)), rel=1e-3)


def test_following_the_gradient_brings_the_resemblances_closer() -> None:
    student, teacher = draw()
    student.requires_grad_()
    loss = gram(student, teacher)
    loss.backward()
    assert student.grad is not None
    assert float(gram(student.detach() - 0.5 * student.grad, teacher)) < float(loss.detach())


@pytest.mark.parametrize("negatives", ["keep", "drop", "drop_teacher"])
def test_loss_and_gradient_are_spectre_s(golden: Any, negatives: Negatives) -> None:
    for level in ("view", "batch"):
        student, teacher = golden.cases.patches()
        student.requires_grad_()
        pair = [student, teacher] if level == "view" else [part.flatten(0, 1)[None] for part in (student, teacher)]
        loss = gram(pair[0], pair[1], negatives=negatives)
        loss.backward()
        golden.agrees(f"spectre/gram/{negatives}/{level}/loss", loss)
        golden.agrees(f"spectre/gram/{negatives}/{level}/gradient", student.grad)
