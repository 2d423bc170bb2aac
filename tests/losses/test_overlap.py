from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from voxelstem.losses.overlap import overlap, tversky


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (2, 3, 4, 5), generator=rng)
    return torch.randn(2, 3, 3, 4, 5, generator=rng), truth


def naive_index(logits: torch.Tensor, truth: torch.Tensor, *, missed: float, too_much: float) -> float:
    """Mean over classes of hits / (hits + weighted mistakes), counted over the whole batch."""
    shares, found = logits.softmax(1), []
    for kind in range(1, logits.shape[1]):
        share, there = shares[:, kind].flatten().tolist(), (truth == kind).flatten().tolist()
        hits = sum(p for p, is_it in zip(share, there, strict=True) if is_it)
        lost = sum(1 - p for p, is_it in zip(share, there, strict=True) if is_it)
        wrong = sum(p for p, is_it in zip(share, there, strict=True) if not is_it)
        found.append(hits / (hits + missed * lost + too_much * wrong))
    return sum(found) / len(found)


def test_tversky_counts_what_was_missed_more_than_what_was_said_too_much() -> None:
    logits, truth = a_batch()
    wanted = 0.5 * F.cross_entropy(logits, truth).item() + 1 - naive_index(logits, truth, missed=0.7, too_much=0.3)
    assert overlap(logits, truth, kind="ce_tversky").item() == pytest.approx(wanted, abs=1e-4)


def test_dice_counts_both_mistakes_alike() -> None:
    logits, truth = a_batch()
    wanted = F.cross_entropy(logits, truth).item() + 1 - naive_index(logits, truth, missed=0.5, too_much=0.5)
    assert overlap(logits, truth, kind="dice_ce").item() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", ["dice_ce", "ce_tversky"])
def test_the_truth_itself_costs_nothing(kind: str) -> None:
    _, truth = a_batch()
    certain = 50.0 * F.one_hot(truth, 3).permute(0, 4, 1, 2, 3).float()
    assert overlap(certain, truth, kind=kind).item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("missed", "too_much"), [(0.5, 0.5), (0.7, 0.3)])
def test_the_index_is_monais(missed: float, too_much: float) -> None:
    from monai.losses.tversky import TverskyLoss

    logits, truth = a_batch()
    theirs = TverskyLoss(
        include_background=False, to_onehot_y=True, softmax=True, alpha=too_much, beta=missed, batch=True
    )
    wanted = 1 - theirs(logits, truth[:, None]).item()
    assert tversky(logits, truth, missed=missed, too_much=too_much).item() == pytest.approx(wanted, abs=1e-5)


def test_what_nobody_said_of_a_class_that_is_not_there_is_no_mistake() -> None:
    truth = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    certain = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1, 1).expand(1, 2, 2, 2, 2)
    assert tversky(certain, truth, missed=0.5, too_much=0.5).item() == pytest.approx(1.0)
