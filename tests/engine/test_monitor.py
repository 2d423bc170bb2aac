from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from voxelstem.engine.monitor import ProbeSet, draw_probe_set, probe_patches, token_rank
from voxelstem.store import Store
from voxelstem.study import InputSpec

SPEC = InputSpec(spacing_mm=(6.0, 6.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(8, 8, 8))


def probe_set(store: Store, seed: int = 0, blocks: int = 12) -> ProbeSet:
    probe = draw_probe_set(store, list(store), SPEC, patch_ijk=(4, 4, 4), blocks=blocks, seed=seed)
    assert probe is not None
    return probe


def test_the_probe_set_is_drawn_once_for_all(phantoms: Store):
    one, two, other = probe_set(phantoms), probe_set(phantoms), probe_set(phantoms, seed=1)
    assert torch.equal(one.blocks, two.blocks)
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.blocks, other.blocks)


def test_the_probe_set_has_a_label_for_each_patch(phantoms: Store):
    probe = probe_set(phantoms)
    assert probe.blocks.shape == (12, 1, 8, 8, 8)
    assert probe.labels.shape == (12, 8)
    assert len(torch.unique(probe.labels)) > 3
    assert 0 <= probe.blocks.min() <= probe.blocks.max() <= 1


def test_no_subject_is_in_both_halves_of_the_probe_set(phantoms: Store):
    subjects = sorted({record.subject for record in phantoms})
    for held in (0, 1):
        # Drawn from the subjects of one half alone, a set has no other half.
        records = [record for record in phantoms if subjects.index(record.subject) % 2 == held]
        alone = draw_probe_set(phantoms, records, SPEC, patch_ijk=(4, 4, 4), blocks=8, seed=0)
        assert alone is not None
        assert alone.held_out.tolist() == [0, 1] * 4
    everyone = probe_set(phantoms)
    # Blocks go round the subjects in order, so block n is of subject n modulo 4.
    halves = {n % len(subjects): set() for n in range(12)}
    for n, held_out in enumerate(everyone.held_out.tolist()):
        halves[n % len(subjects)].add(held_out)
    assert all(len(half) == 1 for half in halves.values())
    assert {next(iter(half)) for half in halves.values()} == {0.0, 1.0}


def test_scans_without_labels_or_a_single_subject_give_no_probe_set(phantoms: Store):
    bare = [replace(record, classes={}) for record in phantoms]
    assert draw_probe_set(phantoms, bare, SPEC, patch_ijk=(4, 4, 4), blocks=4, seed=0) is None
    assert draw_probe_set(phantoms, list(phantoms)[:1], SPEC, patch_ijk=(4, 4, 4), blocks=4, seed=0) is None


class Answers:
    """A backbone whose tokens tell the class, or say nothing about it."""

    def __init__(self, labels: torch.Tensor, knows: bool) -> None:
        noise = torch.rand(*labels.shape, 4, generator=torch.Generator().manual_seed(0))
        self.tokens = torch.nn.functional.one_hot(labels, 4).float() + 0.1 * noise if knows else noise

    def encode_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return blocks.flatten(1), self.tokens


def test_a_backbone_that_knows_scores_one_and_one_that_does_not_scores_chance():
    labels = torch.randint(0, 4, (200, 8), generator=torch.Generator().manual_seed(1))
    probe = ProbeSet(blocks=torch.zeros(200, 1, 1, 1, 1), labels=labels, held_out=torch.arange(200) % 2 * 1.0)
    assert probe_patches(Answers(labels, knows=True), probe) > 0.99
    score = probe_patches(Answers(labels, knows=False), probe)
    rank = token_rank(Answers(labels, knows=False), probe.blocks)
    assert score == pytest.approx(0.25, abs=0.08)
    assert rank == pytest.approx(4.0, abs=0.2)


def test_the_probe_s_accuracy_is_balanced():
    # Nine of ten patches are of class 0; always answering 0 is worth one half.
    labels = (torch.arange(400) % 10 == 0).long().view(50, 8)
    tokens = torch.rand(50, 8, 3, generator=torch.Generator().manual_seed(2))
    backbone = Answers(labels, knows=False)
    backbone.tokens = tokens
    probe = ProbeSet(blocks=torch.zeros(50, 1, 1, 1, 1), labels=labels, held_out=(torch.arange(50) % 2).float())
    assert probe_patches(backbone, probe) < 0.8


def test_probing_leaves_no_gradient_behind(phantoms: Store, make):
    backbone = make.objective().backbone
    probe = probe_set(phantoms)
    score, rank = probe_patches(backbone, probe), token_rank(backbone, probe.blocks)
    assert 0 <= score <= 1
    assert 1 <= rank <= 12
    assert all(parameter.grad is None for parameter in backbone.parameters())
