from __future__ import annotations

import pytest
import torch
from torch import nn

from voxelstem.backbones.teacher import Teacher


def make_student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 3))


def disturb(student: nn.Module) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_it_equals_the_student_at_the_start_but_shares_no_memory() -> None:
    student = make_student()
    teacher = Teacher(student)
    for mine, theirs in zip(teacher.network.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996])
def test_it_follows_exactly(momentum: float) -> None:
    student = make_student()
    teacher = Teacher(student)
    expected = [parameter.detach().double() for parameter in student.parameters()]
    for _ in range(3):
        disturb(student)
        teacher.follow(student, momentum=momentum)
        expected = [
            momentum * mine + (1 - momentum) * theirs.detach().double()
            for mine, theirs in zip(expected, student.parameters(), strict=True)
        ]
    for mine, twin in zip(teacher.network.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.double(), twin, atol=1e-6, rtol=1e-5)


def test_a_momentum_of_one_stands_still_to_the_bit() -> None:
    student = make_student()
    teacher = Teacher(student)
    before = [parameter.clone() for parameter in teacher.network.parameters()]
    disturb(student)
    teacher.follow(student, momentum=1.0)
    assert all(torch.equal(*pair) for pair in zip(before, teacher.network.parameters(), strict=True))


def test_following_leaves_the_student_alone() -> None:
    student = make_student()
    teacher = Teacher(student)
    disturb(student)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    teacher.follow(student, momentum=0.3)
    assert all(torch.equal(*pair) for pair in zip(before, student.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_no_gradient_reaches_it() -> None:
    student = make_student()
    teacher = Teacher(student)
    x = torch.randn(5, 4)
    target = teacher.network(x)
    assert not target.requires_grad
    (student(x) - target).square().sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_it_never_drops_out_whatever_the_student_does() -> None:
    student = make_student().train()
    teacher = Teacher(student).train()
    x = torch.randn(5, 4)
    assert torch.equal(teacher.network(x), teacher.network(x))
    assert not torch.equal(student(x), student(x))


def test_a_network_of_another_shape_cannot_be_followed() -> None:
    teacher = Teacher(make_student())
    with pytest.raises(ValueError, match="shorter"):
        teacher.follow(nn.Sequential(nn.Linear(4, 8)), momentum=0.5)


def test_statistics_of_a_batch_normalisation_are_taken_over() -> None:
    student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    teacher = Teacher(student)
    student.train()(torch.randn(16, 4) + 3)
    teacher.follow(student, momentum=0.9)
    for mine, theirs in zip(teacher.network.buffers(), student.buffers(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
