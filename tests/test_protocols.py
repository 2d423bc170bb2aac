from __future__ import annotations

import dataclasses

import pytest
import torch

from voxelstem.protocols import Batch, StepOutput, Tokens


def test_two_steps_do_not_share_their_scalars():
    assert StepOutput(loss=torch.tensor(0.0)).scalars is not StepOutput(loss=torch.tensor(0.0)).scalars


def test_a_backbone_without_a_scan_level_has_no_scan_tokens():
    tokens = Tokens(cls=torch.zeros(1, 2, 3), patches=torch.zeros(1, 2, 4, 3))
    assert tokens.blocks is None
    assert tokens.scan is None


def test_a_part_of_a_batch_keeps_its_samples_texts_and_numbers():
    batch = Batch(
        views={"global": torch.arange(4.0).view(4, 1, 1, 1, 1, 1)},
        places_mm={"global": torch.zeros(4, 1, 2, 3)},
        seed=5,
        first=8,
        texts=("a", "b", "c", "d"),
    )
    part = batch.part(1, 3)
    assert (part.texts, part.first, part.seed, len(part)) == (("b", "c"), 9, 5, 2)
    assert part.views["global"].flatten().tolist() == [1.0, 2.0]


def test_a_batch_cannot_be_changed_by_an_objective():
    batch = Batch(
        views={"global": torch.zeros(1, 2, 1, 4, 4, 4)}, places_mm={"global": torch.zeros(1, 2, 2, 3)}, seed=0
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
