from __future__ import annotations

import torch

from voxelstem.backbones.heads import AlignHead
from voxelstem.backbones.standard import MOMENTUM, Standard


def rows(count: int, *, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 3.0 + torch.tensor([1.0, 0.1, 5.0, 2.0]) * torch.randn(count, 4, generator=draw)


def test_in_training_a_batch_is_standardised_as_torch_does_it():
    x = rows(20).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    found = Standard(4)(x)
    wanted = torch.nn.functional.batch_norm(twin, None, None, training=True)
    torch.testing.assert_close(found, wanted)
    weight = rows(20, seed=5)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)


def test_making_everything_more_alike_changes_nothing():
    x, standard = rows(30), Standard(4)
    torch.testing.assert_close(standard(0.5 * x + 1000.0), standard(x), rtol=1e-2, atol=1e-2)


def test_outside_training_what_comes_in_goes_out_until_something_is_known():
    x = rows(5)
    torch.testing.assert_close(Standard(4).eval()(x), x, rtol=1e-4, atol=1e-4)


def test_the_first_step_is_taken_whole_and_later_ones_by_a_part():
    standard, x, y = Standard(4), rows(50), rows(50, seed=1) + 7
    standard.move(standard.sums(x))
    torch.testing.assert_close(standard.mean, x.mean(dim=0))
    torch.testing.assert_close(standard.variance, x.var(dim=0, unbiased=False))
    torch.testing.assert_close(standard.eval()(x), standard.train()(x), rtol=1e-4, atol=1e-4)
    standard.move(standard.sums(y))
    torch.testing.assert_close(standard.mean, MOMENTUM * x.mean(dim=0) + (1 - MOMENTUM) * y.mean(dim=0))


def test_sums_of_shares_are_the_sum_of_the_whole():
    x = rows(9)
    torch.testing.assert_close(Standard.sums(x[:4]) + Standard.sums(x[4:]), Standard.sums(x))


def test_a_number_that_never_changes_is_no_division_by_zero():
    standard, x = Standard(4), torch.ones(6, 4)
    standard.move(standard.sums(x))
    assert standard(x).abs().max() == 0
    assert standard.eval()(x).abs().max() < 1e-3


def test_a_head_with_the_statistics_inside_says_the_same():
    head, other = (AlignHead(3, hidden=8, bottleneck=4, out=5) for _ in range(2))
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, generator=draw)
    standard = Standard(4)
    standard.move(standard.sums(head.mlp(x)))
    other.load_state_dict(standard.within(head))
    torch.testing.assert_close(other(x), head.turn(standard.eval()(head.mlp(x))), rtol=1e-4, atol=1e-4)
