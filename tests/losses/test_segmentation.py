from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxelstem.losses.segmentation import (
    mirror_symmetry,
    opposite,
    soft_segmentation,
    soft_volumes,
    volume_consistency,
)

NAMES = ("background", "csf", "hippocampus_left", "hippocampus_right")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape, classes=4, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def naive_segmentation(logits, truth):
    rows, classes = logits.shape[:2]
    entropies, losses = [], []
    for row in range(rows):
        shares = logits[row].double().softmax(dim=0)
        entropies += [-shares[truth[row][at]][at].log() for at in zip(*torch.where(truth[row] >= 0), strict=True)]
        scores = []
        for kind in range(classes):
            true = (truth[row] == kind).double()
            if true.sum():
                scores.append(2 * (shares[kind] * true).sum() / (shares[kind].sum() + true.sum()))
        losses.append(1 - sum(scores) / len(scores))
    return sum(entropies) / len(entropies) + sum(losses) / rows


def test_segmentation_is_cross_entropy_plus_the_dice_of_classes_that_are_there():
    logits, truth = drawn(2, 4, 3, 4, 2), labels(2, 3, 4, 2)
    truth[0][truth[0] == 2] = 1  # a class that one row does not have
    assert soft_segmentation(logits, truth).item() == pytest.approx(float(naive_segmentation(logits, truth)), abs=1e-5)


def test_a_certain_and_right_segmentation_costs_nothing():
    truth = labels(2, 3, 3, 3)
    logits = 100 * torch.nn.functional.one_hot(truth, 4).movedim(-1, 1).float()
    assert soft_segmentation(logits, truth).item() == pytest.approx(0.0, abs=1e-6)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows():
    logits, truth = drawn(4, 3, 3, 3, 3), labels(4, 3, 3, 3, classes=3)
    parts = [soft_segmentation(logits[row : row + 1], truth[row : row + 1]) for row in range(4)]
    assert torch.allclose(soft_segmentation(logits, truth), torch.stack(parts).mean())


@given(seed=st.integers(0, 50), voxel=st.floats(0.5, 64.0))
@settings(max_examples=20)
def test_volumes_add_up_to_the_box_and_a_certain_map_gives_its_voxel_counts(seed, voxel):
    logits, each = drawn(2, 4, 3, 4, 2, seed=seed), torch.full((2,), voxel)
    assert torch.allclose(soft_volumes(logits, each).sum(dim=1), torch.full((2,), 24 * voxel))
    truth = labels(2, 3, 4, 2, seed=seed)
    certain = soft_volumes(100 * torch.nn.functional.one_hot(truth, 4).movedim(-1, 1).float(), each)
    wanted = torch.stack([torch.bincount(row.flatten(), minlength=4) for row in truth]) * voxel
    assert torch.allclose(certain, wanted, rtol=1e-4, atol=1e-3)


def naive_consistency(volumes, target, beta):
    terms = []
    for row, known in zip(volumes.tolist(), target.tolist(), strict=True):
        for have, want in zip(row, known, strict=True):
            if not math.isnan(want):
                error = abs(have - want) / max(want, 1000.0)
                terms.append(0.5 * error**2 / beta if error < beta else error - 0.5 * beta)
    return sum(terms) / len(terms)


def test_consistency_is_the_smooth_error_relative_to_known_volumes():
    volumes, target = 5000 * drawn(3, 4).abs(), 5000 * drawn(3, 4, seed=2).abs()
    target[0, 1] = target[2, 3] = math.nan
    found = volume_consistency(volumes, target)
    assert found.value.item() == pytest.approx(naive_consistency(volumes, target, 0.1), rel=1e-5)
    assert found.count.item() == 10


def test_a_volume_that_nobody_knows_gives_no_slope_and_no_loss():
    volumes = drawn(2, 3).abs().requires_grad_()
    found = volume_consistency(volumes, torch.full((2, 3), math.nan))
    found.value.backward()
    assert (found.value.item(), found.count.item()) == (0.0, 0.0)
    assert not volumes.grad.any()


def test_known_volumes_teach_a_segmentation_without_a_single_label():
    logits = torch.zeros(1, 2, 4, 4, 4, requires_grad=True)
    target, voxel = torch.tensor([[48000.0, 16000.0]]), torch.tensor([1000.0])
    for _ in range(40):
        (slope,) = torch.autograd.grad(volume_consistency(soft_volumes(logits, voxel), target).value, logits)
        logits.data -= 0.02 * slope.sign()
    assert torch.allclose(soft_volumes(logits, voxel), target, rtol=0.02)


def test_sides_change_places_by_their_words_and_the_middle_stays():
    assert opposite(NAMES) == (0, 1, 3, 2)
    assert opposite(["right cerebral white matter", "csf", "left cerebral white matter"]) == (2, 1, 0)
    assert opposite(["bright", "leftover"]) == (0, 1)
    with pytest.raises(ValueError, match="'hippocampus_left' has a side"):
        opposite(NAMES[:3])


def naive_symmetry(logits, mirrored, swap):
    here, there = logits.double().softmax(dim=1), mirrored.double().softmax(dim=1)
    rows, classes, width, *_ = here.shape
    errors = [
        ((here[row, kind, at] - there[row, swap[kind], width - 1 - at]) ** 2).mean()
        for row in range(rows)
        for kind in range(classes)
        for at in range(width)
    ]
    return sum(errors) / len(errors)


def test_symmetry_compares_with_the_mirror_image_sides_exchanged():
    logits, mirrored, swap = drawn(2, 4, 5, 3, 2), drawn(2, 4, 5, 3, 2, seed=3), opposite(NAMES)
    found = mirror_symmetry(logits, mirrored, swap).item()
    assert found == pytest.approx(float(naive_symmetry(logits, mirrored, swap)), abs=1e-6)


def test_a_network_that_only_knows_which_side_is_which_breaks_no_symmetry():
    def network(images):
        """Left of the middle of the array all is left, whatever the picture; brightness is fluid."""
        place = torch.linspace(-1, 1, images.shape[2])[None, :, None, None].expand_as(images[:, 0])
        return torch.stack([torch.zeros_like(place), images[:, 0], -place, place], dim=1)

    images = drawn(2, 1, 6, 4, 4)
    mirrored = images.flip(2)
    assert mirror_symmetry(network(images), network(mirrored), opposite(NAMES)).item() == pytest.approx(0.0, abs=1e-9)
    # One that does not exchange the sides is found out.
    assert mirror_symmetry(network(images), network(mirrored), (0, 1, 2, 3)).item() > 0.01
