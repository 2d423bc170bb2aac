from __future__ import annotations

import pytest
import torch
from torch import Tensor

from voxelstem.losses.position import place_of, relative_position


def naive_relative_position(predicted: Tensor, true_mm: Tensor, scale_mm: float) -> float:
    terms = []
    for said, truth in zip(predicted.double(), true_mm.double(), strict=True):
        for axis in range(3):
            middle_said = sum(float(row[axis]) for row in said) / len(said)
            middle_true = sum(float(row[axis]) for row in truth) / len(truth)
            for a, b in zip(said, truth, strict=True):
                gap = abs((float(a[axis]) - middle_said) - (float(b[axis]) - middle_true) / scale_mm)
                terms.append(0.5 * gap**2 if gap < 1 else gap - 0.5)
    return sum(terms) / len(terms)


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 3, generator=generator), 200 * torch.randn(3, 5, 3, generator=generator)


@pytest.mark.parametrize("scale_mm", [50.0, 100.0, 1000.0])
def test_it_equals_its_naive_twin(scale_mm: float) -> None:
    predicted, true_mm = draw()
    expected = naive_relative_position(predicted, true_mm, scale_mm)
    assert float(relative_position(predicted, true_mm, scale_mm=scale_mm)) == pytest.approx(expected, rel=1e-5)


def test_where_a_scan_begins_does_not_matter() -> None:
    predicted, true_mm = draw()
    moved = relative_position(predicted + torch.randn(3, 1, 3), true_mm + 500 * torch.randn(3, 1, 3))
    torch.testing.assert_close(moved, relative_position(predicted, true_mm))


def test_the_right_places_cost_nothing() -> None:
    _, true_mm = draw()
    assert float(relative_position(true_mm / 100 + 7, true_mm)) < 1e-8


def test_one_axis_may_not_stand_in_for_another() -> None:
    _, true_mm = draw()
    assert float(relative_position(true_mm.flip(-1) / 100, true_mm)) > 0.1


def test_the_middle_of_a_patch_is_found_in_the_scan() -> None:
    # One sample of two views, each a grid of two blocks along i; three patches of each block are asked for.
    places = torch.tensor([[[[0.0, 10.0, 20.0], [40.0, 20.0, 10.0]], [[5.0, 0.0, 0.0], [80.0, 8.0, -8.0]]]])
    asked = torch.tensor([[-0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.5, -0.5, -0.5]]).expand(4, -1, -1)
    found = place_of(asked, places, (2, 1, 1))
    expected = []
    for view in range(2):
        for block in range(2):
            for position in asked[0].tolist():
                shares = [(block + (position[0] + 1) / 2) / 2, (position[1] + 1) / 2, (position[2] + 1) / 2]
                start, extent = places[0, view].tolist()
                expected.append([low + share * long for low, share, long in zip(start, shares, extent, strict=True)])
    torch.testing.assert_close(found, torch.tensor([expected]))
