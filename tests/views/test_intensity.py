from __future__ import annotations

import torch

from voxelstem.study import InputSpec
from voxelstem.views.intensity import lift, squeeze_, window

SPEC = InputSpec(low_hu=-160.0, high_hu=240.0)


def test_the_ends_of_the_window_become_zero_and_one() -> None:
    torch.testing.assert_close(window(torch.tensor([-160.0, 40.0, 240.0]), SPEC), torch.tensor([0.0, 0.5, 1.0]))


def test_what_lies_outside_the_window_is_clamped() -> None:
    assert window(torch.tensor([-3000.0, -160.1, 240.1, 9000.0]), SPEC).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_inside_the_window_values_keep_their_order_and_their_distances() -> None:
    hu = torch.linspace(-160, 240, 101)
    steps = window(hu, SPEC).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 0.01))


def test_the_scan_itself_is_left_alone() -> None:
    hu = torch.tensor([[-500.0, 500.0]])
    window(hu, SPEC)
    assert hu.tolist() == [[-500.0, 500.0]]


def test_the_halves_make_the_whole_also_of_integers() -> None:
    hu = torch.arange(-500, 500, dtype=torch.int16)
    lifted = lift(hu, SPEC)
    assert lifted.dtype == torch.float32
    assert lifted[340] == 0
    assert torch.equal(squeeze_(lifted, SPEC), window(hu.float(), SPEC))
