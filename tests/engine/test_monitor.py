from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from voxelstem.engine.monitor import (
    HealthConfig,
    Monitor,
    ProbeSet,
    draw_blocks,
    draw_probe_set,
    feature_entropy,
    gram,
    knn_accuracy,
    ridge_accuracy,
    spread,
)
from voxelstem.errors import CheckpointError
from voxelstem.metrics import effective_rank
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


def test_blocks_of_brains_are_normalised_as_they_are_for_training(brains: Store):
    unit, scores = (
        replace(SPEC, modality="MR", low_hu=-1000.0, high_hu=1000.0, normalisation=how) for how in ("unit99", "zscore")
    )
    keys = sorted(record.key for record in brains)
    one, other = (draw_blocks(brains, keys, spec, blocks=16, seed=0) for spec in (unit, scores))
    assert 0 <= one.min() < 0.1
    assert 0.9 < one.max() <= 1
    assert other.min() < 0
    assert other.max() > 1
    probe = draw_probe_set(brains, list(brains), unit, patch_ijk=(4, 4, 4), blocks=4, seed=0)
    assert probe is not None
    assert 0 <= probe.blocks.min() < probe.blocks.max() <= 1


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
        self.at = 0

    def encode_blocks(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Blocks come in their order, some at a time, and then from the first again.
        part = self.tokens[self.at : self.at + len(blocks)]
        self.at = (self.at + len(blocks)) % len(self.tokens)
        return blocks.flatten(1), part


def test_tokens_that_know_score_one_and_tokens_that_do_not_score_chance():
    labels = torch.randint(0, 4, (200, 8), generator=torch.Generator().manual_seed(1))
    probe = ProbeSet(blocks=torch.zeros(200, 1, 1, 1, 1), labels=labels, held_out=torch.arange(200) % 2 * 1.0)
    assert ridge_accuracy(Answers(labels, knows=True).tokens, probe) > 0.99
    assert ridge_accuracy(Answers(labels, knows=False).tokens, probe) == pytest.approx(0.25, abs=0.08)


def test_the_probe_s_accuracy_is_balanced():
    # Nine of ten patches are of class 0; always answering 0 is worth one half.
    labels = (torch.arange(400) % 10 == 0).long().view(50, 8)
    probe = ProbeSet(blocks=torch.zeros(50, 1, 1, 1, 1), labels=labels, held_out=(torch.arange(50) % 2).float())
    assert ridge_accuracy(torch.rand(50, 8, 3, generator=torch.Generator().manual_seed(2)), probe) < 0.8


def tokens(rows: int = 40, patches: int = 8, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, patches, dim, generator=torch.Generator().manual_seed(seed))


def test_spread_is_one_for_directions_drawn_evenly_and_zero_where_all_are_the_same():
    assert spread(tokens(2000, 1, 16)[:, 0]) == pytest.approx(1.0, abs=0.02)
    assert spread(torch.ones(50, 16) * torch.arange(1, 51)[:, None]) == pytest.approx(0.0, abs=1e-6)
    rows = tokens(30, 1)[:, 0] + 1.0
    unit = [row / row.norm() for row in rows.double()]
    naive = np.mean([np.std([float(row[d]) for row in unit]) for d in range(6)]) * np.sqrt(6)
    assert spread(rows) == pytest.approx(naive, rel=1e-12)


def test_feature_entropy_is_one_where_all_dimensions_vary_alike_and_zero_where_one_does():
    assert feature_entropy(tokens(5000, 1, 8)[:, 0]) == pytest.approx(1.0, abs=0.01)
    alone = torch.zeros(50, 8)
    alone[:, 3] = torch.arange(50.0)
    assert feature_entropy(alone) == 0.0
    # Two of four dimensions vary, alike: half of the dimensions in bits.
    two = torch.tensor([[1.0, 1.0, 0, 0], [-1.0, 1.0, 0, 0], [1.0, -1.0, 0, 0], [-1.0, -1.0, 0, 0]])
    assert feature_entropy(two) == pytest.approx(0.5, rel=1e-12)
    assert feature_entropy(torch.ones(5, 4)) == 0.0


def test_gram_holds_the_cosines_of_patches_of_the_same_block():
    patches = tokens(2, 3)
    for n in range(2):
        for p in range(3):
            for q in range(3):
                a, b = patches[n, p], patches[n, q]
                assert float(gram(patches)[n, p, q]) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)


def naive_knn(patches: torch.Tensor, probe: ProbeSet, neighbours: int) -> float:
    """Every held-out patch asks all patches of the other half, one after the other."""
    fit = [(n, p) for n in range(len(patches)) if not probe.held_out[n] for p in range(patches.shape[1])]
    mean = torch.stack([patches[n, p] for n, p in fit]).mean(dim=0)
    right: dict[int, list[bool]] = {}
    for n in range(len(patches)):
        for p in range(patches.shape[1]) if probe.held_out[n] else ():
            asked = patches[n, p] - mean
            near = []
            for m, q in fit:
                voter = patches[m, q] - mean
                near.append((float(asked @ voter / asked.norm() / voter.norm()), int(probe.labels[m, q])))
            votes = np.zeros(10)
            for cosine, label in sorted(near, reverse=True)[:neighbours]:
                votes[label] += np.exp(cosine / 0.07)
            truth = int(probe.labels[n, p])
            right.setdefault(truth, []).append(int(votes.argmax()) == truth)
    return float(np.mean([np.mean(each) for each in right.values()]))


def test_the_neighbours_vote_is_that_of_its_slow_twin():
    labels = torch.randint(0, 3, (12, 5), generator=torch.Generator().manual_seed(3))
    patches = tokens(12, 5) + torch.nn.functional.one_hot(labels, 6)
    probe = ProbeSet(blocks=torch.zeros(12, 1, 1, 1, 1), labels=labels, held_out=(torch.arange(12) % 2).float())
    fast = knn_accuracy(patches, probe, neighbours=4, per_class=1000)
    assert fast == pytest.approx(naive_knn(patches, probe, 4), abs=1e-9)
    assert 0.3 < fast < 1.0


def test_neighbours_vote_where_products_come_in_half_precision_too():
    labels = torch.randint(0, 3, (12, 5), generator=torch.Generator().manual_seed(3))
    patches = tokens(12, 5) + 4 * torch.nn.functional.one_hot(labels, 6)
    probe = ProbeSet(blocks=torch.zeros(12, 1, 1, 1, 1), labels=labels, held_out=(torch.arange(12) % 2).float())
    exact = knn_accuracy(patches, probe, neighbours=4, per_class=1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert knn_accuracy(patches, probe, neighbours=4, per_class=1000) == pytest.approx(exact, abs=0.1)


def test_a_class_votes_with_no_more_patches_than_allowed():
    # Class 0 fills the space ten times as densely; with one voter each, both are equally far.
    labels = (torch.arange(400) % 10 == 0).long().view(50, 8)
    probe = ProbeSet(blocks=torch.zeros(50, 1, 1, 1, 1), labels=labels, held_out=(torch.arange(50) % 2).float())
    noise = tokens(50, 8)
    crowded = knn_accuracy(noise, probe, neighbours=25, per_class=1000)
    assert crowded == pytest.approx(0.5, abs=0.06)
    far = noise.clone()
    far[labels == 1] += 20
    assert knn_accuracy(far, probe, neighbours=1, per_class=1) == 1.0


def monitor(seen: ProbeSet | torch.Tensor, memory: Path, *, begins: bool = True) -> Monitor:
    return Monitor(
        HealthConfig(blocks=12, neighbours=3), seen, device=torch.device("cpu"), memory=memory, begins=begins
    )


def timeless(told: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in told.items() if name != "look_seconds"}


def test_a_look_tells_the_signs_and_changes_nothing(phantoms: Store, make, tmp_path: Path):
    objective = make.objective()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    look = monitor(probe_set(phantoms), tmp_path / "start.safetensors")
    told = look(objective)
    assert told.keys() == {
        "effective_rank",
        "effective_rank/cls",
        "spread/patch",
        "spread/cls",
        "entropy/patch",
        "gram_drift",
        "probe/patch_balanced_accuracy",
        "probe/patch_knn",
        "look_seconds",
    }
    assert told["gram_drift"] == 0.0
    with torch.no_grad():
        cls, patches = objective.backbone.encode_blocks(look.blocks)
    assert told["effective_rank"] == pytest.approx(effective_rank(patches.flatten(0, 1).numpy()), rel=1e-4)
    assert told["effective_rank/cls"] == pytest.approx(effective_rank(cls.numpy()), rel=1e-4)
    assert timeless(look(objective)) == timeless(told)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_without_labels_there_are_signs_of_collapse_alone(phantoms: Store, make, tmp_path: Path):
    blocks = draw_blocks(phantoms, [record.key for record in phantoms], SPEC, blocks=5, seed=0)
    assert blocks.shape == (5, 1, 8, 8, 8)
    assert torch.equal(blocks, draw_blocks(phantoms, [r.key for r in phantoms], SPEC, blocks=5, seed=0))
    told = monitor(blocks, tmp_path / "start.safetensors")(make.objective())
    assert not any(name.startswith("probe/") for name in told)
    assert {"effective_rank", "gram_drift", "spread/cls"} <= told.keys()


def test_drift_is_measured_from_the_starting_weights_also_after_a_resume(phantoms: Store, make, tmp_path: Path):
    probe, memory = probe_set(phantoms), tmp_path / "start.safetensors"
    one, other = make.objective(seed=0), make.objective(seed=1)
    whole = monitor(probe, memory)
    whole(one)
    drifted = whole(other)
    assert drifted["gram_drift"] > 1e-4
    resumed = monitor(probe, memory, begins=False)
    assert timeless(resumed(other)) == timeless(drifted)
    assert resumed(one)["gram_drift"] == 0.0


def test_drift_is_the_mean_squared_change_of_cosines(phantoms: Store, make, tmp_path: Path):
    one, other = make.objective(seed=0), make.objective(seed=1)
    blocks = probe_set(phantoms).blocks[:3]
    look = monitor(blocks, tmp_path / "start.safetensors")
    look(one)
    with torch.no_grad():
        pair = [gram(each.backbone.encode_blocks(blocks)[1]) for each in (one, other)]
    naive = np.mean([(float(a) - float(b)) ** 2 for a, b in zip(pair[0].flatten(), pair[1].flatten(), strict=True)])
    assert look(other)["gram_drift"] == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize("content", [None, b"", b"no tensors"])
def test_a_resumed_run_that_lost_its_memory_says_so_and_goes_on(
    phantoms: Store, make, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
):
    memory = tmp_path / "start.safetensors"
    if content is not None:
        memory.write_bytes(content)
    told = monitor(probe_set(phantoms), memory, begins=False)(make.objective())
    assert "gram_drift" not in told
    assert "drift since the start is not reported" in caplog.text


def test_a_memory_that_cannot_be_written_names_the_next_step(phantoms: Store, make, tmp_path: Path):
    look = monitor(probe_set(phantoms), tmp_path / "nowhere" / "start.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written"):
        look(make.objective())


def test_a_probe_that_sees_one_class_only_is_left_out(tmp_path: Path):
    labels = torch.zeros(4, 8, dtype=torch.long)
    probe = ProbeSet(blocks=torch.zeros(4, 1, 1, 1, 2), labels=labels, held_out=torch.tensor([0.0, 1.0, 0.0, 1.0]))
    told = monitor(probe, tmp_path / "m")(SimpleNamespace(backbone=Answers(labels, knows=False)))  # type: ignore[arg-type]
    assert not any(name.startswith("probe/") for name in told)


def test_collapsed_tokens_are_seen(tmp_path: Path):
    backbone = Answers(torch.zeros(4, 8, dtype=torch.long), knows=False)
    backbone.tokens = torch.ones(4, 8, 5) + 1e-6 * tokens(4, 8, 5)
    told = monitor(tokens(4, 1, 8).view(4, 1, 2, 2, 2), tmp_path / "m")(SimpleNamespace(backbone=backbone))  # type: ignore[arg-type]
    assert told["spread/patch"] < 1e-5
    assert told["spread/cls"] > 0.5


def test_probes_agree_on_tokens_that_tell_all():
    labels = torch.randint(0, 4, (20, 8), generator=torch.Generator().manual_seed(1))
    probe = ProbeSet(blocks=torch.zeros(20, 1, 1, 1, 1), labels=labels, held_out=torch.arange(20) % 2 * 1.0)
    patches = Answers(labels, knows=True).tokens
    assert ridge_accuracy(patches, probe) == knn_accuracy(patches, probe, neighbours=5, per_class=10) == 1.0


@pytest.mark.parametrize("wrong", [{"every": 0}, {"blocks": 1}, {"neighbours": 0}, {"per_class": 0}])
def test_numbers_that_cannot_be_looked_with_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HealthConfig(**wrong)
